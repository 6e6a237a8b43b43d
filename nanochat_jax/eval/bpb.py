"""Bits per byte: a loss that does not depend on the tokenizer."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import model
from nanochat_jax.config import Architecture
from nanochat_jax.layers import Compute
from nanochat_jax.state import Batch


@dataclass(frozen=True)
class BitsPerByte:
    """Summed loss over text; control tokens count for neither side."""

    nats: float
    bytes: int
    tokens: int

    @property
    def bpb(self) -> float:
        return self.nats / (math.log(2) * max(self.bytes, 1))

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return self.nats / max(self.tokens, 1)


def make_evaluator(
    cfg: Architecture, byte_lengths_V: np.ndarray, compute: Compute
) -> Callable[[model.Params, Iterable[Batch]], BitsPerByte]:
    """A function that measures parameters on batches; compiled once.

    Args:
        cfg: the architecture.
        byte_lengths_V: bytes each token stands for; 0 for control tokens.
        compute: dtype and attention backend.
    """

    @jax.jit
    def batch_sums(params: model.Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        targets_BT = batch["targets"]
        segments = batch.get("segment_ids")
        nats_BT = model.token_nats(params, cfg, batch["tokens"], targets_BT, segment_ids_BT=segments, compute=compute)
        lengths_BT = jnp.where(targets_BT >= 0, jnp.asarray(byte_lengths_V)[jnp.maximum(targets_BT, 0)], 0)
        text_BT = lengths_BT > 0
        return jnp.sum(nats_BT * text_BT), jnp.sum(lengths_BT), jnp.sum(text_BT)

    def evaluate(params: model.Params, batches: Iterable[Batch]) -> BitsPerByte:
        sums = [batch_sums(params, batch) for batch in batches]
        return BitsPerByte(
            nats=sum(float(nats) for nats, _, _ in sums),
            bytes=sum(int(length) for _, length, _ in sums),
            tokens=sum(int(tokens) for _, _, tokens in sums),
        )

    return evaluate
