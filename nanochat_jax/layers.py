"""The small pieces of the transformer, as plain functions of arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from nanochat_jax.fp8 import fp8_linear

RMS_EPSILON = 1.1920929e-07  # float32's epsilon, in every dtype
ROPE_BASE = 100_000.0
LOGIT_CAP = 15.0


@dataclass(frozen=True)
class Compute:
    """How to compute, as opposed to what: the same parameters run under any of these."""

    dtype: str = "float32"  # of activations; also of the token and value embeddings, and their moments
    attention: str = "xla"  # a backend of attention.py
    fp8: bool = False  # products of the blocks' matrices with 8-bit operands


def default_compute() -> Compute:
    """The compute that suits the default device: bfloat16 and fused attention where the hardware has them."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return Compute()
    if device.platform == "gpu":
        ampere_or_newer = float(getattr(device, "compute_capability", "0")) >= 8.0
        return Compute("bfloat16", "cudnn") if ampere_or_newer else Compute()
    return Compute("bfloat16", "splash")


def param(
    module: nn.Module,
    name: str,
    init: Callable[..., jax.Array],
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: str | jnp.dtype = "float32",
) -> jax.Array:
    """Declare a parameter once: initialiser, shape, logical axis names (for sharding) and dtype."""
    return cast(jax.Array, module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(dtype)))


@jax.custom_vjp
def rms_norm(x: jax.Array) -> jax.Array:
    """Scale the last axis to a root mean square of 1, without learned parameters; the arithmetic is float32.

    The gradient follows from the result, which the next product keeps anyway: x is not kept.
    """
    return _rms_norm_forward(x)[0]


def _rms_norm_forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x_f32 = x.astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.mean(x_f32**2, -1, keepdims=True) + RMS_EPSILON)
    y = (x_f32 * factor).astype(x.dtype)
    return y, (y, factor)


def _rms_norm_backward(residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array]:
    y, factor = (x.astype(jnp.float32) for x in residuals)
    grad_f32 = grad.astype(jnp.float32)
    return ((factor * (grad_f32 - y * jnp.mean(y * grad_f32, -1, keepdims=True))).astype(grad.dtype),)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def keep_and_norm(x: jax.Array, uses: int) -> tuple[jax.Array, ...]:
    """x itself, and its rms_norm once for each use: row_kernels.py has the same in a kernel."""
    return (x, *[rms_norm(x)] * uses)


def linear(x: jax.Array, kernel_IO: jax.Array, *, fp8: bool = False) -> jax.Array:
    """x @ kernel in the dtype of x, or from 8-bit operands: master weights may be wider."""
    if fp8:
        return fp8_linear(x, kernel_IO)
    return x @ kernel_IO.astype(x.dtype)


@jax.custom_vjp
def relu2(x: jax.Array) -> jax.Array:
    """Squared ReLU. Its gradient follows from the result, which the next product keeps anyway: x itself is not kept."""
    return jnp.square(jax.nn.relu(x))


def _relu2_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = relu2(x)
    return y, y


def _relu2_backward(y: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    return (grad * (2 * jnp.sqrt(y)),)


relu2.defvjp(_relu2_forward, _relu2_backward)


@jax.custom_vjp
def embed(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Rows of a table; its gradient is summed in float32, because frequent tokens add up many small terms."""
    return table_VD[tokens_BT]


def _embed_forward(table_VD: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    like_V0 = jnp.empty((table_VD.shape[0], 0), table_VD.dtype)  # carries the table's height and dtype, but no data
    return embed(table_VD, tokens_BT), (tokens_BT, like_V0)


def _embed_backward(residuals: tuple[jax.Array, jax.Array], grad_BTD: jax.Array) -> tuple[jax.Array, None]:
    tokens_BT, like_V0 = residuals
    grads_ND = grad_BTD.reshape(-1, grad_BTD.shape[-1]).astype(jnp.float32)
    table_grad_VD = jax.ops.segment_sum(grads_ND, tokens_BT.reshape(-1), num_segments=like_V0.shape[0])
    return table_grad_VD.astype(like_V0.dtype), None


embed.defvjp(_embed_forward, _embed_backward)


def rotary(positions_BT: jax.Array, head_dim: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, (B, T, 1, head_dim/2), of the angles by which RoPE turns each position."""
    frequencies = ROPE_BASE ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def _rotate(x_BTNH: jax.Array, swapped_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the first half of each head against the second half by -theta (upstream's direction)."""
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([sin, -sin], axis=-1)
    return x_BTNH * cos + swapped_BTNH * sin


def _swap_halves(x_BTNH: jax.Array) -> jax.Array:
    """The second half of each head before the first, in float32."""
    H = x_BTNH.shape[-1]

    def move(x_BTNH: jax.Array) -> jax.Array:
        return x_BTNH.reshape(*x_BTNH.shape[:-1], 2, -1)[..., ::-1, :].reshape(x_BTNH.shape)

    return _permute(x_BTNH, np.roll(np.eye(H), H // 2, axis=0), move).astype(jnp.float32)


def turn_rows(x_BTNH: jax.Array) -> jax.Array:
    """x itself; on a TPU it comes to lie as the results of products do, for less than a copy costs."""
    return _permute(x_BTNH, np.eye(x_BTNH.shape[-1]), lambda x_BTNH: x_BTNH)


def _permute(x_BTNH: jax.Array, permutation_HH: np.ndarray, otherwise: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """A TPU multiplies faster than it moves: sums of one term and zeros, which are exact in bfloat16."""
    if x_BTNH.dtype != jnp.bfloat16:
        return otherwise(x_BTNH)
    product = partial(jnp.matmul, b=jnp.asarray(permutation_HH, x_BTNH.dtype))
    return cast(jax.Array, jax.lax.platform_dependent(x_BTNH, tpu=product, default=otherwise))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def rotate_and_norm(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array, scale: float) -> jax.Array:
    """RoPE, then each head scaled to a root mean square of `scale`; the arithmetic is float32.

    The gradient follows from the result, which attention keeps anyway: neither x nor the turned x is kept.
    """
    return _rotate_and_norm_forward(x_BTNH, cos, sin, scale)[0]


def _rotate_and_norm_forward(
    x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array, scale: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    turned = _rotate(x_BTNH.astype(jnp.float32), _swap_halves(x_BTNH), cos, sin)
    factor = scale * jax.lax.rsqrt(jnp.mean(turned**2, -1, keepdims=True) + RMS_EPSILON)
    y_BTNH = (turned * factor).astype(x_BTNH.dtype)
    return y_BTNH, (y_BTNH, factor, cos, sin)


def _rotate_and_norm_backward(
    scale: float, residuals: tuple[jax.Array, ...], grad_BTNH: jax.Array
) -> tuple[jax.Array, None, None]:
    y_BTNH, factor, cos, sin = residuals
    mean = jnp.mean(y_BTNH.astype(jnp.float32) / scale * grad_BTNH.astype(jnp.float32), -1, keepdims=True)

    def turned_grad(grad: jax.Array, y: jax.Array) -> jax.Array:
        return factor * (grad - y / scale * mean)

    # What is swapped are the operands, not the gradient, which bfloat16 does not hold.
    direct = turned_grad(grad_BTNH.astype(jnp.float32), y_BTNH.astype(jnp.float32))
    swapped = turned_grad(_swap_halves(grad_BTNH), _swap_halves(y_BTNH))
    return _rotate(direct, swapped, cos, -sin).astype(grad_BTNH.dtype), None, None


rotate_and_norm.defvjp(_rotate_and_norm_forward, _rotate_and_norm_backward)


class RowFunctions(NamedTuple):
    """What is done to whole rows: here in plain JAX, in row_kernels.py by kernels."""

    keep_and_norm: Callable[[jax.Array, int], tuple[jax.Array, ...]]
    rotate_and_norm: Callable[[jax.Array, jax.Array, jax.Array, float], jax.Array]


PLAIN = RowFunctions(keep_and_norm, rotate_and_norm)


def smear(x_BTD: jax.Array, previous_BTD: jax.Array, gate_C1: jax.Array, scale: jax.Array) -> jax.Array:
    """Mix a gated part of the previous token's embedding into each token's (a cheap bigram)."""
    gate_BT1 = scale.astype(x_BTD.dtype) * jax.nn.sigmoid(linear(x_BTD[..., : gate_C1.shape[0]], gate_C1))
    return x_BTD + gate_BT1 * previous_BTD
