"""What a language model has to beat: general compressors and token frequencies, on the same held-out bytes."""

import lzma
import math
import zlib
from typing import Protocol

import numpy as np

from nanochat_jax.tokenizer import Tokenizer

MAX_COUNTED_RECORDS = 100_000  # evenly spread; more would not change the frequencies, only take time


class Rows(Protocol):
    """The records of a split: rows[i] holds token ids."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> np.ndarray: ...


def gzip_size(data: bytes) -> int:
    """Bytes that `gzip -9` makes of data."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31, 9)  # gzip's header; the command's memory, not Python's default
    return len(compressor.compress(data) + compressor.flush())


def xz_size(data: bytes) -> int:
    """Bytes that `xz -9` makes of data."""
    return len(lzma.compress(data, preset=9))


def held_out_bytes(records: Rows, tokenizer: Tokenizer) -> bytes:
    """The text of a split as the model reads it, packed: control tokens, the padding too, stand for no bytes."""
    return b"".join(tokenizer.decode_bytes(records[i].tolist()) for i in range(len(records)))


def token_counts(records: Rows, vocab_size: int, every: int = 1) -> np.ndarray:
    """How often each token occurs in every so many records of a split, int64 (V,)."""
    counts_V = np.zeros(vocab_size, np.int64)
    for i in range(0, len(records), every):
        counts_V += np.bincount(records[i], minlength=vocab_size)
    return counts_V


def unigram_nats(train_counts_V: np.ndarray, held_out_counts_V: np.ndarray, byte_lengths_V: np.ndarray) -> float:
    """Summed cross-entropy of held-out text under the training text's token frequencies, add-one smoothed.

    Args:
        train_counts_V: how often each token occurs in the training text.
        held_out_counts_V: the same of the held-out text.
        byte_lengths_V: bytes each token stands for; tokens of none (control tokens) are left out on both sides.
    """
    text_V = byte_lengths_V > 0
    smoothed = train_counts_V[text_V] + 1.0
    return float(-held_out_counts_V[text_V] @ np.log(smoothed / smoothed.sum()))


def baselines(train: Rows | None, held_out: Rows, tokenizer: Tokenizer) -> dict[str, float]:
    """Bits per byte of the held-out text by token frequencies of the training text, if any, `gzip -9` and `xz -9`.

    The compressors see all held-out text as one stream, so they remember further back than a model's context.
    """
    text, bits = held_out_bytes(held_out, tokenizer), {}
    if train is not None:
        train_counts_V = token_counts(train, tokenizer.vocab_size, every=1 + len(train) // MAX_COUNTED_RECORDS)
        nats = unigram_nats(train_counts_V, token_counts(held_out, tokenizer.vocab_size), tokenizer.byte_lengths)
        bits["unigram tokens"] = nats / math.log(2)
    bits |= {"gzip -9": 8 * gzip_size(text), "xz -9": 8 * xz_size(text)}
    return {name: value / max(len(text), 1) for name, value in bits.items()}
