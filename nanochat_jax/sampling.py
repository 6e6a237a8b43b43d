"""How the next token is chosen: temperature, truncation and repetition penalty, for each row of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.errors import UserError
from nanochat_jax.threshold import Vector, least_probability

DRAW_BLOCK = 64  # tokens, about the root of a vocabulary


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int = 0  # only the k likeliest; 0 for all
    top_p: float = 1.0  # only the likeliest that together reach this probability
    min_p: float = 0.0  # only those at least this fraction as likely as the likeliest
    seed: int = 0
    repetition_penalty: float = 1.0  # above 1, tokens of the prompt and the answer so far become less likely

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"sampling: temperature={self.temperature} must be 0 or a positive number")
        if self.top_k < 0:
            raise UserError(f"sampling: top_k={self.top_k} must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampling: top_p={self.top_p} must lie above 0 and at most at 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"sampling: min_p={self.min_p} must lie between 0 and 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"sampling: seed={self.seed} must lie between 0 and 2**32 - 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"sampling: repetition_penalty={self.repetition_penalty} must be a positive number")


class SamplingArrays(NamedTuple):
    """Sampling for each row of a batch."""

    temperature_B: Vector
    top_k_B: Vector
    top_p_B: Vector
    min_p_B: Vector
    seed_B: Vector
    repetition_penalty_B: Vector

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> "SamplingArrays":
        return cls(
            temperature_B=np.array([row.temperature for row in rows], np.float32),
            top_k_B=np.array([row.top_k for row in rows], np.int32),
            top_p_B=np.array([row.top_p for row in rows], np.float32),
            min_p_B=np.array([row.min_p for row in rows], np.float32),
            seed_B=np.array([row.seed for row in rows], np.uint32),
            repetition_penalty_B=np.array([row.repetition_penalty for row in rows], np.float32),
        )


def uniforms(seed_B: Vector, positions_BT: jax.Array) -> jax.Array:
    """The random number in [0, 1) with which a row of this seed draws its token at each position: (B, T) float32."""

    def uniform(seed: Vector, position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), position))

    return jax.vmap(jax.vmap(uniform, (None, 0)))(seed_B, positions_BT)


def choose(
    logits_BV: jax.Array, how: SamplingArrays, uniforms_B: jax.Array, seen_BV: jax.Array, *, by_kernel: bool = False
) -> jax.Array:
    """Choose a token for each row.

    A row's choice depends on its own logits, sampling, random number and seen tokens alone, never on its neighbours.

    Args:
        logits_BV: float32.
        how: each row's sampling.
        uniforms_B: a random number in [0, 1) for each row.
        seen_BV: bool, the tokens that the repetition penalty is for.
        by_kernel: as least_probability's.

    Returns:
        (B,) int32 token ids.

    Source: the penalty is CTRL's (arXiv:1909.05858, section 4.1).
    """
    penalty_BV = jnp.where(seen_BV, how.repetition_penalty_B[:, None], 1.0)
    logits_BV = jnp.where(logits_BV > 0, logits_BV / penalty_BV, logits_BV * penalty_BV)
    # The largest logit is taken off before, and the temperature bounded, so that nothing overflows.
    below_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    weights_BV = jnp.exp(below_BV / jnp.maximum(how.temperature_B, 1e-6)[:, None])  # of the likeliest exactly 1
    most_B1 = 1 / jnp.sum(weights_BV, axis=-1, keepdims=True)
    probs_BV = weights_BV * most_B1
    least_B = least_probability(probs_BV, how.top_k_B, how.top_p_B, by_kernel=by_kernel)
    least_B = jnp.maximum(least_B, how.min_p_B * most_B1[:, 0])
    drawn_B = _draw(jnp.where(probs_BV >= least_B[:, None], probs_BV, 0.0), uniforms_B)
    return jnp.where(how.temperature_B > 0, drawn_B, _first(below_BV == 0))


def _first(true_BN: jax.Array) -> jax.Array:
    """Index of each row's first True, or of its last element; on CPUs several times faster than argmax."""
    N = true_BN.shape[1]
    return jnp.min(jnp.where(true_BN, jnp.arange(N, dtype=jnp.int32)[None], N - 1), axis=-1)


def _draw(weights_BV: jax.Array, uniforms_B: jax.Array) -> jax.Array:
    """An index for each row, drawn in proportion to the weights: first a block, then an element of it.

    One random number a row, where Gumbel noise would take V, and no running sum over all of V, which is slow on CPUs.
    """
    B, V = weights_BV.shape
    blocks_BNW = jnp.pad(weights_BV, ((0, 0), (0, -V % DRAW_BLOCK))).reshape(B, -1, DRAW_BLOCK)
    block_B, rest_B = _pick(jnp.sum(blocks_BNW, axis=-1), uniforms_B)
    weights_BW = jnp.take_along_axis(blocks_BNW, block_B[:, None, None], axis=1)[:, 0]
    return jnp.minimum(block_B * DRAW_BLOCK + _pick(weights_BW, rest_B)[0], V - 1)


def _pick(weights_BN: jax.Array, uniforms_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The element into which a random share of the sum falls, and where in it, in [0, 1)."""
    mass_BN = jnp.cumsum(weights_BN, axis=-1)
    share_B1 = uniforms_B[:, None] * jnp.max(mass_BN, axis=-1, keepdims=True)
    # A parallel sum may fall by a rounding error from one element to the next: what has no weight is never picked.
    index_B = _first((mass_BN > share_B1) & (weights_BN > 0))
    mass_B1, weight_B1 = (jnp.take_along_axis(x_BN, index_B[:, None], axis=1) for x_BN in (mass_BN, weights_BN))
    rest_B = (share_B1 - (mass_B1 - weight_B1))[:, 0] / weight_B1[:, 0]
    return index_B, jnp.clip(rest_B, 0, 1 - 2**-24)


def mark_seen(seen_BV: jax.Array, tokens_BT: jax.Array, counts_B: jax.Array) -> jax.Array:
    """Note the first counts_B of each row's tokens."""
    B, T = tokens_BT.shape
    real_BT = jnp.arange(T, dtype=jnp.int32)[None, :] < counts_B[:, None]
    tokens_BT = jnp.where(real_BT, tokens_BT, seen_BV.shape[1])  # out of range, hence dropped
    return seen_BV.at[jnp.arange(B)[:, None], tokens_BT].set(True, mode="drop")
