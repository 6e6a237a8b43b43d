"""Prepared records, by number."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np

from nanochat_jax.data.batches import Batch
from nanochat_jax.data.records import SPLITS, Manifest, decode_example, load_manifest, shard_path
from nanochat_jax.errors import UserError


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

    def row(self, index: int) -> Batch:
        """tokens and targets, int32 (sequence_len,) each."""
        record = self[index].astype(np.int32)
        return {"tokens": record[:-1], "targets": record[1:]}


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
