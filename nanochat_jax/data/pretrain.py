"""Batches from prepared records: the order is a function of the seed and the step alone, on any number of hosts."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np

from nanochat_jax.data.records import SPLITS, Manifest, decode_example, load_manifest, shard_path
from nanochat_jax.errors import UserError

READ_THREADS = 4
BATCHES_AHEAD = 8

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Records:
    """Random access to the records of one split: `records[i]` is (sequence_len + 1,) in the stored dtype."""

    name: str  # for messages
    source: Any  # of Grain: serialised examples by index
    manifest: Manifest

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> np.ndarray:
        size = (self.manifest.sequence_len + 1) * self.manifest.dtype.itemsize
        try:
            example = self.source[index]
        except RuntimeError as error:  # a checksum of ArrayRecord's
            raise UserError(f"record {index:,} of the {self.name} is damaged ({error}): prepare them again") from error
        return np.frombuffer(decode_example(example, size), self.manifest.dtype)


def open_split(
    folder: Path, split: str, *, tokenizer_sha256: str | None = None, sequence_len: int | None = None
) -> Records:
    """Open one split of a prepared folder.

    Args:
        folder: as `prepare` made it.
        split: train or val.
        tokenizer_sha256: refuse records of any other tokenizer.
        sequence_len: refuse records of any other length.

    Raises:
        UserError: if the folder is not prepared, is damaged, or does not match.
    """
    manifest = load_manifest(folder)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: choose {' or '.join(SPLITS)}")
    if tokenizer_sha256 not in (None, manifest.tokenizer_sha256):
        raise UserError(
            f"the records in {folder} were made by tokenizer sha256 {manifest.tokenizer_sha256}, this run has "
            f"{tokenizer_sha256}: prepare the data again, or use {folder / 'tokenizer.model'}"
        )
    if sequence_len not in (None, manifest.sequence_len):
        raise UserError(
            f"the records in {folder} have sequence-len={manifest.sequence_len}, this run wants {sequence_len}: "
            "prepare the data again with the other length"
        )
    paths = [shard_path(folder, split, unit, manifest.units) for unit in range(manifest.units)]
    expected = getattr(manifest, split).records
    try:
        source = grain.sources.ArrayRecordDataSource([str(path) for path in paths])
        found = len(source)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot open the {split} records in {folder}: {error}; prepare the data again") from error
    if found != expected:
        raise UserError(f"{folder} holds {found:,} {split} records, its manifest says {expected:,}: prepare it again")
    return Records(f"{split} records in {folder}", source, manifest)


def batches(
    records: Records,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Endless training batches from any step on, every epoch in a new order, read ahead by threads.

    Step s takes the records s*batch_size to (s+1)*batch_size - 1 of the endless shuffled sequence, and each host
    its own contiguous slice of them: epochs follow each other without a gap, and seeking costs nothing.

    Args:
        records: of the training split.
        batch_size: rows in the batch of all hosts together.
        seed: of the order.
        start_step: first step to yield.
        process_index: this host.
        process_count: hosts in all.

    Yields:
        {"tokens", "targets"}, each int32 (batch_size / process_count, sequence_len).

    Raises:
        UserError: if the batch does not divide among the hosts, or the split is smaller than one batch.
    """
    rows = rows_per_process(batch_size, process_count)
    if len(records) < batch_size:
        raise UserError(
            f"there are {len(records):,} {records.name}, less than one batch of {batch_size:,} rows: "
            "give more text, a smaller batch or a shorter sequence-len"
        )
    shuffled = grain.MapDataset.source(records).shuffle(seed=seed).repeat()

    def load(step: int) -> Batch:
        first = step * batch_size + process_index * rows
        return _batch(np.stack([shuffled[i] for i in range(first, first + rows)]))

    steps = grain.MapDataset.range(start_step, sys.maxsize // batch_size)
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=BATCHES_AHEAD)
    return iter(steps.map(load).to_iter_dataset(options))


def validation_batches(
    records: Records, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Every record once, in order; rows that the last batch lacks have only targets of -1.

    Args:
        records: of the validation split.
        batch_size: rows in the batch of all hosts together.
        process_index: this host.
        process_count: hosts in all; each yields equally many batches.

    Yields:
        {"tokens", "targets"}, each int32 (batch_size / process_count, sequence_len).
    """
    rows = rows_per_process(batch_size, process_count)
    for first in range(process_index * rows, process_index * rows + len(records), batch_size):
        present = [records[i] for i in range(first, min(first + rows, len(records)))]
        batch = _batch(np.stack(present or [records[0]]))
        batch["targets"][len(present) :] = -1
        missing = rows - len(batch["tokens"])
        yield {
            name: np.pad(array, ((0, missing), (0, 0)), constant_values=-1 if name == "targets" else 0)
            for name, array in batch.items()
        }


def _batch(records: np.ndarray) -> Batch:
    records = records.astype(np.int32)
    return {"tokens": records[:, :-1], "targets": records[:, 1:]}


def rows_per_process(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"a batch of {batch_size} rows does not divide among {process_count} processes")
    return batch_size // process_count
