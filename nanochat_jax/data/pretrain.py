"""Prepared records, by number."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np

from nanochat_jax.data.batches import Batch
from nanochat_jax.data.records import SPLITS, Manifest, Recipe, decode_example, load_manifest, shard_path
from nanochat_jax.errors import UserError
from nanochat_jax.files import as_path, staged


@dataclass(frozen=True)
class Records[R: Recipe]:
    """Random access to records of one split: `records[i]` is (sequence_len + 1,) in the stored dtype."""

    name: str  # for messages
    source: Any  # of Grain: serialised examples by index
    manifest: R

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> np.ndarray:
        size = (self.manifest.sequence_len + 1) * self.manifest.dtype.itemsize
        try:
            example = self.source[index]
        except RuntimeError as error:  # a checksum of ArrayRecord's
            raise UserError(f"record {index:,} of the {self.name} is damaged ({error}): prepare them again") from error
        return np.frombuffer(decode_example(example, size), self.manifest.dtype)

    def row(self, index: int) -> Batch:
        """tokens and targets, int32 (sequence_len,) each."""
        record = self[index].astype(np.int32)
        return {"tokens": record[:-1], "targets": record[1:]}


def open_split(
    folder: Path, split: str, *, tokenizer_sha256: str | None = None, sequence_len: int | None = None
) -> Records[Manifest]:
    """Open one split of a prepared folder.

    Args:
        folder: as `prepare` made it.
        split: train or val.
        tokenizer_sha256: refuse records of any other tokenizer.
        sequence_len: refuse records of any other length.

    Raises:
        UserError: if the folder is not prepared, is damaged, or does not match.
    """
    folder = as_path(folder)
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
    records = open_shards(folder, split, manifest, range(manifest.units), manifest.units, manifest.fingerprint)
    expected = getattr(manifest, split).records
    if len(records) != expected:
        raise UserError(
            f"{folder} holds {len(records):,} {split} records, its manifest says {expected:,}: prepare it again"
        )
    return records


def open_shards[R: Recipe](
    folder: Path, split: str, recipe: R, units: Iterable[int], units_in_all: int, version: str = ""
) -> Records[R]:
    """Records of some work units; those in a bucket are copied to the disk first, which ArrayRecord needs.

    Args:
        folder: that holds the shards.
        split: train or val.
        recipe: of the records.
        units: numbers of the units, which are finished.
        units_in_all: as many as the set will have.
        version: what tells the shards from others that had the same names.

    Raises:
        UserError: a shard is missing or damaged.
    """
    paths = [shard_path(folder, split, unit, units_in_all) for unit in units]
    try:
        with ThreadPoolExecutor(8) as pool:
            local = list(pool.map(lambda path: str(staged(path, version)), paths))
        source = grain.sources.ArrayRecordDataSource(local)
        len(source)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot open the {split} records in {folder}: {error}; prepare the data again") from error
    return Records(f"{split} records in {folder}", source, recipe)
