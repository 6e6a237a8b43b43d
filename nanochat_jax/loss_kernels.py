"""The passes of the cross-entropy over soft-capped logits, as kernels for NVIDIA GPUs; losses.py has them in plain JAX.

A tensor of logits is by far the largest of a step, and what is done to each is arithmetic enough to hold memory up.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

CHUNK = 2048  # logits of a row that a program reads at once


def fits(logits_NV: jax.Array) -> bool:
    """Whether the kernels can take these: bfloat16, in whole chunks."""
    return logits_NV.dtype == jnp.bfloat16 and logits_NV.shape[1] % CHUNK == 0


def log_sum_exp(logits_NV: jax.Array, cap: float, vocab_size: int, interpret: bool = False) -> jax.Array:
    """Of each row's soft-capped logits; columns from vocab_size on take no part: (N,) float32."""
    N, V = logits_NV.shape
    return pl.pallas_call(
        partial(_log_sum_exp, cap=cap, vocab_size=vocab_size),
        grid=(N,),
        in_specs=[pl.BlockSpec((1, V), lambda n: (n, 0))],
        out_specs=pl.BlockSpec((1,), lambda n: (n,)),
        out_shape=jax.ShapeDtypeStruct((N,), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
    )(logits_NV)


def gradient(
    logits_NV: jax.Array,
    lse_N: jax.Array,
    targets_N: jax.Array,
    grad_N: jax.Array,
    cap: float,
    vocab_size: int,
    interpret: bool = False,
) -> jax.Array:
    """Of the loss by the logits before their cap, in their dtype and place: (N, V)."""
    N, V = logits_NV.shape
    row, one = pl.BlockSpec((1, V), lambda n: (n, 0)), pl.BlockSpec((1,), lambda n: (n,))
    return pl.pallas_call(
        partial(_gradient, cap=cap, vocab_size=vocab_size),
        grid=(N,),
        in_specs=[row, one, one, one],
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct((N, V), logits_NV.dtype),
        input_output_aliases={0: 0},
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
    )(logits_NV, lse_N, targets_N, grad_N)


def _sigmoid(logits_ref: Any, i: jax.Array, cap: float) -> tuple[jax.Array, jax.Array]:
    """σ(2x/c) of a chunk, with which the capped logit is c·(2σ − 1) and its slope 4·σ·(1 − σ); and its columns."""
    logits_C = logits_ref[0, pl.ds(i * CHUNK, CHUNK)].astype(jnp.float32)
    sigmoid_C = jnp.square(jax.lax.rsqrt(1 + jnp.exp(logits_C * (-2 / cap))))
    return sigmoid_C, i * CHUNK + jax.lax.iota(jnp.int32, CHUNK)


def _log_sum_exp(logits_ref: Any, lse_ref: Any, *, cap: float, vocab_size: int) -> None:
    V = logits_ref.shape[1]

    def add(i: jax.Array, total_C: jax.Array) -> jax.Array:
        sigmoid_C, column_C = _sigmoid(logits_ref, i, cap)
        exp_C = jnp.exp(2 * cap * sigmoid_C - 2 * cap)  # no capped logit is larger than the cap
        return total_C + (exp_C if vocab_size == V else jnp.where(column_C < vocab_size, exp_C, 0.0))

    lse_ref[0] = cap + jnp.log(jnp.sum(jax.lax.fori_loop(0, V // CHUNK, add, jnp.zeros(CHUNK))))


def _gradient(
    logits_ref: Any, lse_ref: Any, target_ref: Any, grad_ref: Any, found_ref: Any, *, cap: float, vocab_size: int
) -> None:
    V, below, target, grad = logits_ref.shape[1], cap + lse_ref[0], target_ref[0], 4 * grad_ref[0]

    def write(i: jax.Array, _: None) -> None:
        sigmoid_C, column_C = _sigmoid(logits_ref, i, cap)
        prob_C = jnp.exp(2 * cap * sigmoid_C - below)
        if vocab_size < V:
            prob_C = jnp.where(column_C < vocab_size, prob_C, 0.0)
        prob_C = jnp.where(column_C == target, prob_C - 1, prob_C)
        found_C = prob_C * grad * (sigmoid_C - sigmoid_C**2)
        found_ref[0, pl.ds(i * CHUNK, CHUNK)] = found_C.astype(found_ref.dtype)

    jax.lax.fori_loop(0, V // CHUNK, write, None)
