"""Bits per byte: a loss that does not depend on the tokenizer."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import model, sharding
from nanochat_jax.config import Architecture
from nanochat_jax.layers import Compute
from nanochat_jax.state import Batch

NORMAL_95 = 1.959964  # 95 % of a normal distribution lie within so many standard deviations
BATCHES_AHEAD = 2  # dispatched before results are read


@dataclass(frozen=True)
class BitsPerByte:
    """Summed loss of each row of a text; control tokens count for neither side."""

    nats_R: np.ndarray  # float64
    bytes_R: np.ndarray  # int64
    tokens_R: np.ndarray  # int64

    @property
    def bytes(self) -> int:
        return int(self.bytes_R.sum())

    @property
    def tokens(self) -> int:
        return int(self.tokens_R.sum())

    @property
    def bpb(self) -> float:
        return float(self.nats_R.sum()) / (math.log(2) * max(self.bytes, 1))

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return float(self.nats_R.sum()) / max(self.tokens, 1)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %, of the bits per byte of all text like this, from how much the rows differ; None of a single row.

        Source: the variance of a ratio of means, for instance Cochran, Sampling techniques (1977), section 2.11.
        """
        rows = np.count_nonzero(self.bytes_R)
        if rows < 2:
            return None
        residuals_R = self.nats_R / math.log(2) - self.bpb * self.bytes_R
        half = NORMAL_95 * math.sqrt(rows / (rows - 1) * float(residuals_R @ residuals_R)) / self.bytes
        return self.bpb - half, self.bpb + half


def make_evaluator(
    cfg: Architecture, byte_lengths_V: np.ndarray, compute: Compute, mesh: jax.sharding.Mesh | None = None
) -> Callable[[model.Params, Iterable[Batch]], BitsPerByte]:
    """A function that measures parameters on batches; compiled once.

    What it says of a row depends neither on the other rows of a batch nor on the number of devices.

    Args:
        cfg: the architecture.
        byte_lengths_V: bytes each token stands for; 0 for control tokens.
        compute: dtype and attention backend.
        mesh: that parameters and batches lie on; default: one device.
    """

    def batch_sums(params: model.Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        targets_BT = batch["targets"]
        segments = batch.get("segment_ids")
        nats_BT = model.token_nats(params, cfg, batch["tokens"], targets_BT, segment_ids_BT=segments, compute=compute)
        lengths_BT = jnp.where(targets_BT >= 0, jnp.asarray(byte_lengths_V)[jnp.maximum(targets_BT, 0)], 0)
        text_BT = lengths_BT > 0
        return jnp.sum(nats_BT * text_BT, axis=1), jnp.sum(lengths_BT, axis=1), jnp.sum(text_BT, axis=1)

    jitted = jax.jit(batch_sums, out_shardings=None if mesh is None else sharding.replicated(mesh))

    def evaluate(params: model.Params, batches: Iterable[Batch]) -> BitsPerByte:
        sums = [tuple(map(np.asarray, found)) for found in delayed(jitted(params, batch) for batch in batches)]
        nats_R, bytes_R, tokens_R = (np.concatenate(column) for column in zip(*sums, strict=True))
        return BitsPerByte(nats_R.astype(np.float64), bytes_R.astype(np.int64), tokens_R.astype(np.int64))

    return evaluate


def delayed[T](results: Iterable[T], by: int = BATCHES_AHEAD) -> Iterator[T]:
    """Results a few behind those dispatched, so that a device never waits for what the host does with them."""
    pending: deque[T] = deque()
    for result in results:
        pending.append(result)
        if len(pending) > by:
            yield pending.popleft()
    yield from pending
