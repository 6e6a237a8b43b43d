"""Products that come out symmetric, at half the work: a block above the diagonal is computed once, written twice."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

BLOCK_M, BLOCK_K = 128, 64

Coefficients = tuple[float, float, float]


def gram(x_SIO: jax.Array, polynomial: Coefficients | None = None, *, of_columns: bool = False) -> jax.Array:
    """x xᵀ of each matrix of a stack, or xᵀ x; with a polynomial (a, b, c), and symmetric x, a·1 + b·x + c·x².

    Args:
        x_SIO: S matrices.
        polynomial: its coefficients; x must be symmetric.
        of_columns: xᵀ x.

    Returns:
        (S, M, M) in x's dtype, M being I, or O of columns.
    """
    K, M = x_SIO.shape[1:] if of_columns else x_SIO.shape[:0:-1]
    plain = partial(reference, polynomial=polynomial, of_columns=of_columns)
    if x_SIO.dtype != jnp.bfloat16 or M % BLOCK_M or K % BLOCK_K:
        return plain(x_SIO)
    kernel = partial(blockwise, polynomial=polynomial, of_columns=of_columns)
    return jax.lax.platform_dependent(x_SIO, cuda=kernel, default=plain)


def reference(x_SIO: jax.Array, *, polynomial: Coefficients | None, of_columns: bool) -> jax.Array:
    """gram in plain JAX."""
    squares_SMM = x_SIO.mT @ x_SIO if of_columns else x_SIO @ x_SIO.mT
    if polynomial is None:
        return squares_SMM
    a, b, c = polynomial
    return a * jnp.eye(x_SIO.shape[1], dtype=x_SIO.dtype)[None] + b * x_SIO + c * squares_SMM


def blockwise(
    x_SIO: jax.Array, *, polynomial: Coefficients | None, of_columns: bool, interpret: bool = False
) -> jax.Array:
    """gram as a kernel for NVIDIA GPUs; sums in float32, rounds once."""
    S, M = x_SIO.shape[0], x_SIO.shape[2 if of_columns else 1]
    blocks = M // BLOCK_M
    return pl.pallas_call(
        partial(_gram_block, polynomial=polynomial, of_columns=of_columns),
        grid=(blocks * (blocks + 1) // 2, S),
        in_specs=[pl.BlockSpec((1, *x_SIO.shape[1:]), lambda t, s: (s, 0, 0))],
        out_specs=pl.BlockSpec((1, M, M), lambda t, s: (s, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((S, M, M), x_SIO.dtype),
        compiler_params=triton.CompilerParams(num_warps=8 if polynomial is None else 4, num_stages=3),
        interpret=interpret,
    )(x_SIO)


def _gram_block(x_ref: Any, out_ref: Any, *, polynomial: Coefficients | None, of_columns: bool) -> None:
    """One block on or above the diagonal: number t of them, column by column."""
    t = pl.program_id(0)
    column = ((jnp.sqrt(8 * t.astype(jnp.float32) + 1) - 1) / 2).astype(jnp.int32)  # the root may round either way
    column = jnp.where(column * (column + 1) // 2 > t, column - 1, column)
    column = jnp.where((column + 1) * (column + 2) // 2 <= t, column + 1, column)
    rows = pl.ds((t - column * (column + 1) // 2) * BLOCK_M, BLOCK_M)
    cols = pl.ds(column * BLOCK_M, BLOCK_M)

    def add(k: jax.Array, total: jax.Array) -> jax.Array:
        ks = pl.ds(k * BLOCK_K, BLOCK_K)
        if of_columns:
            return total + triton.dot(x_ref[0, ks, rows], x_ref[0, ks, cols], trans_a=True)
        return total + triton.dot(x_ref[0, rows, ks], x_ref[0, cols, ks], trans_b=True)

    total, c = jnp.zeros((BLOCK_M, BLOCK_M), jnp.float32), 1.0
    if polynomial is not None:  # its first terms begin the sum, and need no registers beside it
        a, b, c = polynomial
        row_MM, col_MM = (jax.lax.broadcasted_iota(jnp.int32, total.shape, axis) for axis in (0, 1))
        is_diagonal = row_MM + rows.start == col_MM + cols.start
        total = jnp.where(is_diagonal, a / c, 0.0) + b / c * x_ref[0, rows, cols].astype(jnp.float32)
    K = x_ref.shape[1 if of_columns else 2]
    total = c * jax.lax.fori_loop(0, K // BLOCK_K, add, total)
    out_ref[0, rows, cols] = total.astype(out_ref.dtype)
    out_ref[0, cols, rows] = total.astype(out_ref.dtype).T
