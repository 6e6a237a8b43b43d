"""Top-k and top-p without sorting: the least probability that both still allow, found bit by bit."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding, PartitionSpec

NO_LIMIT = 2**30  # tokens
WIDEST = 2**16  # tokens of a vocabulary whose probabilities a program of the kernel can hold

type Vector = jax.Array | np.ndarray


def least_probability(probs_BV: jax.Array, top_k_B: Vector, top_p_B: Vector, *, by_kernel: bool = False) -> jax.Array:
    """The probability from which on tokens are kept: those with fewer than top_k, and less than top_p, before them.

    Tokens exactly as likely as the last one kept are kept too.

    Args:
        probs_BV: float32.
        top_k_B: how many to keep; 0 for all.
        top_p_B: what those kept reach together; 1 for all.
        by_kernel: on NVIDIA GPUs, Ampere or newer.

    Returns:
        (B,) float32.
    """
    most_B = jnp.where(top_k_B > 0, top_k_B, NO_LIMIT)
    mass_B = jnp.where(top_p_B < 1, top_p_B, jnp.inf)  # a sum of everything may round to 1
    if by_kernel and probs_BV.shape[1] <= WIDEST:
        return least_by_kernel(probs_BV, most_B, mass_B)
    bits_BV = jax.lax.bitcast_convert_type(probs_BV, jnp.int32)  # ordered as the floats are
    operands = probs_BV, bits_BV, most_B, mass_B
    least_B = jax.lax.platform_dependent(*operands, cpu=_least_by_halves, default=_least_by_digits)
    return jax.lax.bitcast_convert_type(least_B, jnp.float32)


ONE_BITS = int(np.float32(1).view(np.int32))
DIGIT = 3  # bits found at a time where kernels are cheap and the launch of one is not


def _least_by_halves(probs_BV: jax.Array, bits_BV: jax.Array, most_B: jax.Array, mass_B: jax.Array) -> jax.Array:
    """The least bit pattern that both limits still allow, by bisection: on CPUs several times faster than sorting."""

    # Most of the sampler's time; whether it is spent depends on the neighbours, what comes of it does not.
    is_limited = jnp.any(most_B <= probs_BV.shape[1]), jnp.any(mass_B < 1)
    return _by_halves(probs_BV, bits_BV, most_B, mass_B, is_limited)


def _by_halves(
    probs: jax.Array, bits: jax.Array, most: jax.Array, mass: jax.Array, is_limited: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """Of many rows or of one, the vocabulary in the last axis; is_limited: whether most and mass are limits at all."""

    def allows_most(middle: jax.Array) -> jax.Array:
        return jnp.sum((bits > middle[..., None]).astype(jnp.float32), axis=-1) < most

    def allows_mass(middle: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(bits > middle[..., None], probs, 0), axis=-1) < mass

    zero = jnp.zeros_like(most)
    return jnp.maximum(_bisect(allows_most, is_limited[0], zero), _bisect(allows_mass, is_limited[1], zero))


def _bisect(allows: Callable[[jax.Array], jax.Array], is_limit: jax.Array, zero: jax.Array) -> jax.Array:
    """The least bit pattern of a probability that is allowed, as all larger ones are; zero where there is no limit."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) >> 1
        is_allowed = allows(middle)
        return jnp.where(is_allowed, low, middle + 1), jnp.where(is_allowed, middle, high)

    rounds = ONE_BITS.bit_length() * is_limit.astype(jnp.int32)
    return jax.lax.fori_loop(0, rounds, halve, (zero, jnp.where(is_limit, zero + ONE_BITS, zero)))[1]


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


@partial(custom_partitioning, static_argnums=(3,))
def least_by_kernel(probs_BV: jax.Array, most_B: jax.Array, mass_B: jax.Array, interpret: bool = False) -> jax.Array:
    """The same, by halves again, as one kernel that holds a row's probabilities in registers all the while."""
    B, V = probs_BV.shape
    width = 1 << (V - 1).bit_length()
    one = pl.BlockSpec((1,), lambda b: (b,))
    return pl.pallas_call(
        _least_of_row,
        grid=(B,),
        in_specs=[pl.BlockSpec((1, width), lambda b: (b, 0)), one, one],
        out_specs=one,
        out_shape=jax.ShapeDtypeStruct((B,), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=32 if width > WIDEST // 2 else 16, num_stages=1),
        interpret=interpret,
    )(jnp.pad(probs_BV, ((0, 0), (0, width - V))), most_B, mass_B)


def _least_of_row(probs_ref: Any, most_ref: Any, mass_ref: Any, least_ref: Any) -> None:
    probs_V, most, mass = probs_ref[0, :], most_ref[0], mass_ref[0]
    bits_V = jax.lax.bitcast_convert_type(probs_V, jnp.int32)
    least = _by_halves(probs_V, bits_V, most, mass, (most <= probs_V.shape[0], mass < 1))
    least_ref[0] = jax.lax.bitcast_convert_type(least, jnp.float32)


def _partition(interpret: bool, mesh: Any, arg_shapes: Any, result_shape: Any) -> Any:
    """Each device its own rows."""
    rows = (*arg_shapes[0].sharding.spec, None)[0]
    one = NamedSharding(mesh, PartitionSpec(rows))
    return mesh, partial(least_by_kernel.fun, interpret=interpret), one, (one, one, one)


least_by_kernel.def_partition(partition=_partition, sharding_rule="b v, b, b -> b")
