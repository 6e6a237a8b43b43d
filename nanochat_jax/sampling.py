"""How the next token is chosen: temperature, truncation and repetition penalty, for each row of a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax.errors import UserError

DRAW_BLOCK = 64  # tokens, about the root of a vocabulary

type Vector = jax.Array | np.ndarray


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


def choose(logits_BV: jax.Array, how: SamplingArrays, uniforms_B: jax.Array, seen_BV: jax.Array) -> jax.Array:
    """Choose a token for each row.

    A row's choice depends on its own logits, sampling, random number and seen tokens alone, never on its neighbours.

    Args:
        logits_BV: float32.
        how: each row's sampling.
        uniforms_B: a random number in [0, 1) for each row.
        seen_BV: bool, the tokens that the repetition penalty is for.

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
    least_B = jnp.maximum(least_probability(probs_BV, how.top_k_B, how.top_p_B), how.min_p_B * most_B1[:, 0])
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


def least_probability(probs_BV: jax.Array, top_k_B: Vector, top_p_B: Vector) -> jax.Array:
    """The probability from which on tokens are kept: those with fewer than top_k, and less than top_p, before them.

    Tokens exactly as likely as the last one kept are kept too.
    """
    most_B = jnp.where(top_k_B > 0, top_k_B, probs_BV.shape[1] + 1)
    mass_B = jnp.where(top_p_B < 1, top_p_B, jnp.inf)  # a sum of everything may round to 1
    bits_BV = jax.lax.bitcast_convert_type(probs_BV, jnp.int32)  # ordered as the floats are
    operands = probs_BV, bits_BV, most_B, mass_B
    least_B = jax.lax.platform_dependent(*operands, cpu=_least_by_halves, default=_least_by_digits)
    return jax.lax.bitcast_convert_type(least_B, jnp.float32)


ONE_BITS = int(np.float32(1).view(np.int32))
DIGIT = 3  # bits found at a time where kernels are cheap and the launch of one is not


def _least_by_halves(probs_BV: jax.Array, bits_BV: jax.Array, most_B: jax.Array, mass_B: jax.Array) -> jax.Array:
    """The least bit pattern that both limits still allow, by bisection: on CPUs several times faster than sorting."""
    limits = (
        (
            jnp.any(most_B <= probs_BV.shape[1]),
            lambda likelier_BV: jnp.sum(likelier_BV.astype(jnp.float32), axis=-1) < most_B,
        ),
        (jnp.any(mass_B < 1), lambda likelier_BV: jnp.sum(jnp.where(likelier_BV, probs_BV, 0), axis=-1) < mass_B),
    )

    def bisect(allows: Callable[[jax.Array], jax.Array]) -> jax.Array:
        def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low_B, high_B = bounds
            middle_B = (low_B + high_B) // 2
            allowed_B = allows(bits_BV > middle_B[:, None])
            return jnp.where(allowed_B, low_B, middle_B + 1), jnp.where(allowed_B, middle_B, high_B)

        bounds = jnp.zeros_like(bits_BV[:, 0]), jnp.full_like(bits_BV[:, 0], ONE_BITS)
        return jax.lax.fori_loop(0, ONE_BITS.bit_length(), halve, bounds)[1]

    # Most of the sampler's time; whether it is spent depends on the neighbours, what comes of it does not.
    none_B = jnp.zeros_like(bits_BV[:, 0])
    return jnp.maximum(*(jax.lax.cond(used, partial(bisect, allows), lambda: none_B) for used, allows in limits))


def _least_by_digits(probs_BV: jax.Array, bits_BV: jax.Array, most_B: jax.Array, mass_B: jax.Array) -> jax.Array:
    """The same, several bits at a time: on GPUs and TPUs a few wide kernels in place of a long chain of small ones."""
    least_B, limits_B2 = jnp.zeros_like(bits_BV[:, 0]), jnp.stack([most_B.astype(jnp.float32), mass_B], axis=1)
    worth_B21V = jnp.stack([jnp.ones_like(probs_BV), probs_BV], axis=1)[:, :, None]
    for shift in range(ONE_BITS.bit_length() - DIGIT, -1, -DIGIT):
        steps_1D = jnp.arange(1, 2**DIGIT, dtype=jnp.int32)[None] << shift
        likelier_BDV = bits_BV[:, None] >= (least_B[:, None] + steps_1D)[:, :, None]
        sums_B2D = jnp.sum(jnp.where(likelier_BDV[:, None], worth_B21V, 0), axis=-1)
        refused_BD = jnp.any(sums_B2D >= limits_B2[:, :, None], axis=1)
        least_B += jnp.sum(refused_BD, axis=-1, dtype=jnp.int32) << shift
    return least_B


def mark_seen(seen_BV: jax.Array, tokens_BT: jax.Array, counts_B: jax.Array) -> jax.Array:
    """Note the first counts_B of each row's tokens."""
    B, T = tokens_BT.shape
    real_BT = jnp.arange(T, dtype=jnp.int32)[None, :] < counts_B[:, None]
    tokens_BT = jnp.where(real_BT, tokens_BT, seen_BV.shape[1])  # out of range, hence dropped
    return seen_BV.at[jnp.arange(B)[:, None], tokens_BT].set(True, mode="drop")
