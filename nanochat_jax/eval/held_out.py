"""Text to measure bits per byte on: the validation split of a prepared folder, or any text as it is."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanochat_jax.data.batches import Batch
from nanochat_jax.data.packing import pack
from nanochat_jax.data.pretrain import Records, open_split
from nanochat_jax.data.sources import open_source
from nanochat_jax.errors import UserError
from nanochat_jax.files import as_path
from nanochat_jax.tokenizer import Tokenizer


class Packed:
    """Documents packed into records as train.prepare packs them: what is measured on them is the same."""

    def __init__(self, documents: list[str], tokenizer: Tokenizer, sequence_len: int) -> None:
        encoded = (np.array(tokenizer.encode(document), np.int32) for document in documents)
        records = list(pack(encoded, sequence_len + 1, tokenizer.bos))
        records[-1] = np.pad(records[-1], (0, sequence_len + 1 - len(records[-1])), constant_values=tokenizer.bos)
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._records[index]

    def row(self, index: int) -> Batch:
        """tokens and targets, int32 (sequence_len,) each."""
        return {"tokens": self._records[index][:-1], "targets": self._records[index][1:]}


@dataclass(frozen=True)
class Result:
    """What came out for a text."""

    fingerprint: str  # of the text, as it is cut
    bytes: int
    tokens: int
    loss_nats_per_token: float
    bits_per_byte: float
    interval: tuple[float, float] | None  # 95 %
    baselines: dict[str, float]  # bits per byte by simpler methods
    seconds: float


class HeldOut(NamedTuple):
    """Records to measure on."""

    records: Records | Packed
    fingerprint: str  # of the text, as it is cut
    train: Records | None  # what token frequencies are learnt from


def open_held_out(data: str, tokenizer: Tokenizer, sequence_len: int) -> HeldOut:
    """Find text to measure on.

    Args:
        data: a folder made by train.prepare, a text file, or a source as train.prepare takes it.
        tokenizer: of the model.
        sequence_len: of the rows.

    Raises:
        UserError: there is no such thing, it cannot be read or holds no text, or the records are of another tokenizer
            or length.
    """
    if as_path(data).is_dir():
        folder = as_path(data)
        val = open_split(folder, "val", tokenizer_sha256=tokenizer.sha256, sequence_len=sequence_len)
        return HeldOut(val, val.manifest.fingerprint, open_split(folder, "train"))
    try:
        source = open_source(f"text:{data}" if Path(data).is_file() else data)
    except UserError as error:
        raise UserError(f"{data!r} is neither a folder that train.prepare made, nor a text file: {error}") from error
    documents = [text for unit in range(len(source.units)) for text in source.documents(unit) if text]
    if not documents:
        raise UserError(f"--data {data} holds no text to measure on: every document is empty")
    digest = hashlib.sha256(f"{tokenizer.sha256} {sequence_len}".encode())
    for document in documents:
        digest.update(document.encode() + b"\0")
    return HeldOut(Packed(documents, tokenizer, sequence_len), digest.hexdigest(), None)
