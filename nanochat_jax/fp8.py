"""Matrix products from 8-bit operands, for training on Hopper and newer."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from nanochat_jax.sharding import auto_axes

TILE = 128  # rows and columns that a program of the kernel quantizes


class Quantized(NamedTuple):
    """A matrix in 8 bits, in both orders: GPUs multiply along the last axis of each operand only."""

    rows_IO: jax.Array
    columns_OI: jax.Array
    back: jax.Array  # the factor that takes it back: a power of two, which every float format holds exactly


def quantize(x_IO: jax.Array, dtype: jnp.dtype) -> Quantized:
    """A matrix in 8 bits, scaled as a whole so that its largest element just fits."""
    largest = jnp.maximum(jnp.max(jnp.abs(x_IO)).astype(jnp.float32), 1e-30)
    room = jnp.finfo(dtype).max.astype(jnp.float32) / largest
    exponent_bits = jax.lax.bitcast_convert_type(room, jnp.int32) & 0x7F800000
    scale = jax.lax.bitcast_convert_type(exponent_bits, jnp.float32)
    plain = partial(both_ways, dtype=dtype)
    if x_IO.shape[0] % TILE or x_IO.shape[1] % TILE or auto_axes():
        return Quantized(*plain(x_IO, scale), 1 / scale)
    kernel = partial(both_ways_by_tiles, dtype=dtype)
    rows_IO, columns_OI = jax.lax.platform_dependent(x_IO, scale, cuda=kernel, default=plain)
    return Quantized(rows_IO, columns_OI, 1 / scale)


def both_ways(x_IO: jax.Array, scale: jax.Array, *, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """x times scale in another dtype, and its transpose."""
    rows_IO = (x_IO * scale.astype(x_IO.dtype)).astype(dtype)
    return rows_IO, rows_IO.T


def both_ways_by_tiles(
    x_IO: jax.Array, scale: jax.Array, *, dtype: jnp.dtype, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The same as a kernel for NVIDIA GPUs, which writes each tile twice; XLA's transposes run at half the pace."""
    rows, columns = x_IO.shape
    found: Any = pl.pallas_call(
        _tile_both_ways,
        grid=(rows // TILE, columns // TILE),
        in_specs=[pl.BlockSpec((TILE, TILE), lambda i, j: (i, j)), pl.BlockSpec((1,), lambda i, j: (0,))],
        out_specs=[pl.BlockSpec((TILE, TILE), lambda i, j: (i, j)), pl.BlockSpec((TILE, TILE), lambda i, j: (j, i))],
        out_shape=[jax.ShapeDtypeStruct((rows, columns), dtype), jax.ShapeDtypeStruct((columns, rows), dtype)],
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
    )(x_IO, scale[None])
    return tuple(found)


def _tile_both_ways(x_ref: Any, scale_ref: Any, rows_ref: Any, columns_ref: Any) -> None:
    tile = (x_ref[:, :].astype(jnp.float32) * scale_ref[0]).astype(rows_ref.dtype)
    rows_ref[:, :], columns_ref[:, :] = tile, tile.T


def _product(
    a_MK: jax.Array, b_NK: jax.Array, back: jax.Array, dtype: jnp.dtype, precision: jax.lax.Precision | None = None
) -> jax.Array:
    """a bᵀ of quantized matrices, taken back by a factor: (M, N); the highest precision makes cuBLAS sum in float32."""
    along_K = (((1,), (1,)), ((), ()))
    # cuBLAS takes the factor along. Widening the operands first is another form that XLA should know, and does not.
    return jax.lax.dot_general(a_MK, b_NK, along_K, precision, preferred_element_type=dtype) * back.astype(dtype)


@jax.custom_vjp
def fp8_linear(x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """x @ kernel from 8-bit operands: e4m3 forward, e5m2 for the gradient, one scale a tensor (arXiv:2209.05433)."""
    return _fp8_linear_forward(x, kernel_IO)[0]


def _fp8_linear_forward(x: jax.Array, kernel_IO: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
    x_q, kernel_q = quantize(x.reshape(-1, x.shape[-1]), jnp.float8_e4m3fn), quantize(kernel_IO, jnp.float8_e4m3fn)
    y_NO = _product(x_q.rows_IO, kernel_q.columns_OI, x_q.back * kernel_q.back, x.dtype)
    kept = x_q.columns_OI, x_q.back, kernel_q.rows_IO, kernel_q.back, jnp.empty((0,), kernel_IO.dtype)
    return y_NO.reshape(*x.shape[:-1], -1), kept


def _fp8_linear_backward(residuals: tuple[Any, ...], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_IN, x_back, kernel_IO, kernel_back, like_kernel = residuals
    grad_q = quantize(grad.reshape(-1, grad.shape[-1]), jnp.float8_e5m2)
    x_grad_NI = _product(grad_q.rows_IO, kernel_IO, grad_q.back * kernel_back, grad.dtype)
    # A tensor core by itself keeps some 14 bits of a sum: too few for one over all tokens (docs/log.md).
    in_full = jax.lax.Precision.HIGHEST
    kernel_grad_IO = _product(x_IN, grad_q.columns_OI, x_back * grad_q.back, like_kernel.dtype, in_full)
    return x_grad_NI.reshape(*grad.shape[:-1], -1), kernel_grad_IO


fp8_linear.defvjp(_fp8_linear_forward, _fp8_linear_backward)
