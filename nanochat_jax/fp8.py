"""Matrix products from 8-bit operands, for training on Hopper and newer."""

from typing import Any

import jax
import jax.numpy as jnp


def quantize(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """An array in 8 bits, scaled as a whole so that its largest element just fits.

    Returns:
        The quantized array, and the factor that takes it back: a power of two, which every float format holds exactly.
    """
    largest = jnp.maximum(jnp.max(jnp.abs(x)).astype(jnp.float32), 1e-30)
    room = jnp.finfo(dtype).max.astype(jnp.float32) / largest
    exponent_bits = jax.lax.bitcast_convert_type(room, jnp.int32) & 0x7F800000
    scale = jax.lax.bitcast_convert_type(exponent_bits, jnp.float32)
    return (x * scale.astype(x.dtype)).astype(dtype), 1 / scale


def _product(
    a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array], axes: tuple[int, int], dtype: jnp.dtype
) -> jax.Array:
    """Product of two quantized matrices over an axis of each, summed in float32."""
    contract = (((axes[0],), (axes[1],)), ((), ()))
    # cuBLAS takes the factor along. Widening the operands first is another form that XLA should know, and does not.
    return jax.lax.dot_general(a[0], b[0], contract, preferred_element_type=dtype) * (a[1] * b[1]).astype(dtype)


@jax.custom_vjp
def fp8_linear(x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """x @ kernel from 8-bit operands: e4m3 forward, e5m2 for the gradient, one scale a tensor (arXiv:2209.05433)."""
    return _fp8_linear_forward(x, kernel_IO)[0]


def _fp8_linear_forward(x: jax.Array, kernel_IO: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
    x_q, kernel_q = quantize(x.reshape(-1, x.shape[-1]), jnp.float8_e4m3fn), quantize(kernel_IO, jnp.float8_e4m3fn)
    y = _product(x_q, kernel_q, (1, 0), x.dtype).reshape(*x.shape[:-1], kernel_IO.shape[-1])
    return y, (x_q, kernel_q, jnp.empty((0,), kernel_IO.dtype))


def _fp8_linear_backward(residuals: tuple[Any, ...], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_q, kernel_q, like_kernel = residuals
    grad_q = quantize(grad.reshape(-1, grad.shape[-1]), jnp.float8_e5m2)
    x_grad = _product(grad_q, kernel_q, (1, 1), grad.dtype).reshape(*grad.shape[:-1], -1)
    return x_grad, _product(x_q, grad_q, (0, 0), like_kernel.dtype)


fp8_linear.defvjp(_fp8_linear_forward, _fp8_linear_backward)
