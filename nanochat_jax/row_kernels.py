"""Norms that read each row once, as kernels for NVIDIA GPUs; layers.py has what they compute, under the same names.

XLA reads a row twice, for its mean square and for what this divides, and its gradients likewise. Here a program keeps a
few rows in registers; the arithmetic is of no account beside memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from nanochat_jax.layers import RMS_EPSILON, RowFunctions

ROWS = 4  # of the residual stream, in one program
POSITIONS = 16  # of all heads, in one program

type Residuals = tuple[jax.Array, ...]


def fits(x_BTD: jax.Array, head_dim: int) -> bool:
    """Whether the kernels can take a stream of these sizes: blocks are powers of two, and rows come in whole blocks."""
    _, T, D = x_BTD.shape
    return x_BTD.dtype == jnp.bfloat16 and T % POSITIONS == 0 and _piece(D) >= 128 and _piece(head_dim) == head_dim


def _piece(width: int) -> int:
    """The largest power of two that a row is made of."""
    return width & -width


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def keep_and_norm(x_BTD: jax.Array, uses: int, interpret: bool = False) -> tuple[jax.Array, ...]:
    """x itself, and its norm for each use: on the way back the kernel adds up all their gradients."""
    return _keep_and_norm_forward(x_BTD, uses, interpret)[0]


def _keep_and_norm_forward(x_BTD: jax.Array, uses: int, interpret: bool) -> tuple[tuple[jax.Array, ...], Residuals]:
    y_BTD, factor_BT = _over_rows(_norm, (x_BTD,), (x_BTD.dtype, None), interpret)
    return (x_BTD, *[y_BTD] * uses), (y_BTD, factor_BT)


def _keep_and_norm_backward(
    uses: int, interpret: bool, residuals: Residuals, grads: tuple[jax.Array, ...]
) -> tuple[jax.Array]:
    (grad_BTD,) = _over_rows(_norm_gradient, (*residuals, *grads), (grads[0].dtype,), interpret)
    return (grad_BTD,)


keep_and_norm.defvjp(_keep_and_norm_forward, _keep_and_norm_backward)


def _over_rows(
    kernel: Callable[..., None], arrays: tuple[jax.Array, ...], results: tuple[Any, ...], interpret: bool
) -> tuple[jax.Array, ...]:
    """Run a kernel on blocks of rows of (B, T, D) and (B, T) arrays; results are given by dtype, or None for (B, T)."""
    B, T, D = max((x.shape for x in arrays), key=len)

    def block(ndim: int) -> pl.BlockSpec:
        return pl.BlockSpec((ROWS, D), lambda i: (i, 0)) if ndim == 3 else pl.BlockSpec((ROWS,), lambda i: (i,))

    found = pl.pallas_call(
        kernel,
        grid=(B * T // ROWS,),
        in_specs=[block(x.ndim) for x in arrays],
        out_specs=[block(2 if dtype is None else 3) for dtype in results],
        out_shape=[
            jax.ShapeDtypeStruct((B * T,) if dtype is None else (B * T, D), dtype or jnp.float32) for dtype in results
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(*(x.reshape(B * T, *x.shape[2:]) for x in arrays))
    return tuple(x.reshape(B, T, *x.shape[1:]) for x in found)


def _pieces(ref: Any) -> list[jax.Array]:
    """Rows in pieces that are powers of two wide, float32."""
    D = ref.shape[1]
    width = _piece(D)
    return [ref[:, pl.ds(start, width)].astype(jnp.float32) for start in range(0, D, width)]


def _put(ref: Any, pieces: list[jax.Array]) -> None:
    width = pieces[0].shape[1]
    for i, piece in enumerate(pieces):
        ref[:, pl.ds(i * width, width)] = piece.astype(ref.dtype)


def _norm(x_ref: Any, y_ref: Any, factor_ref: Any) -> None:
    pieces = _pieces(x_ref)
    factor = jax.lax.rsqrt(sum(jnp.sum(x**2, axis=1) for x in pieces) / x_ref.shape[1] + RMS_EPSILON)
    _put(y_ref, [x * factor[:, None] for x in pieces])
    factor_ref[:] = factor


def _norm_gradient(y_ref: Any, factor_ref: Any, kept_ref: Any, *refs: Any) -> None:
    *normed_refs, grad_ref = refs
    ys, factor = _pieces(y_ref), factor_ref[:][:, None]
    grads = [sum(parts[1:], parts[0]) for parts in zip(*map(_pieces, normed_refs), strict=True)]
    mean = (sum(jnp.sum(y * grad, axis=1) for y, grad in zip(ys, grads, strict=True)) / y_ref.shape[1])[:, None]
    kept = _pieces(kept_ref)
    _put(grad_ref, [k + factor * (grad - y * mean) for k, grad, y in zip(kept, grads, ys, strict=True)])


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def rotate_and_norm(
    x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array, scale: float, interpret: bool = False
) -> jax.Array:
    """RoPE, then each head scaled to a root mean square of `scale`; cos and sin are the same for all rows."""
    return _rotate_and_norm_forward(x_BTNH, cos, sin, scale, interpret)[0]


def _rotate_and_norm_forward(
    x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array, scale: float, interpret: bool
) -> tuple[jax.Array, Residuals]:
    y_BTNH, factor_BNT = _over_heads(partial(_turn, scale=scale), (x_BTNH,), (cos, sin), True, interpret)
    return y_BTNH, (y_BTNH, factor_BNT, cos, sin)


def _rotate_and_norm_backward(
    scale: float, interpret: bool, residuals: Residuals, grad_BTNH: jax.Array
) -> tuple[jax.Array, None, None]:
    y_BTNH, factor_BNT, cos, sin = residuals
    kernel = partial(_turn_gradient, scale=scale)
    (found_BTNH,) = _over_heads(kernel, (y_BTNH, factor_BNT, grad_BTNH), (cos, sin), False, interpret)
    return found_BTNH, None, None


rotate_and_norm.defvjp(_rotate_and_norm_forward, _rotate_and_norm_backward)


def _over_heads(
    kernel: Callable[..., None],
    arrays: tuple[jax.Array, ...],
    rotation: tuple[jax.Array, jax.Array],
    with_factor: bool,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Run a kernel on blocks of positions of (B, T, N, H) and (B, N, T) arrays; gives one of each, or the first."""
    B, T, N, H = arrays[0].shape
    by_position = pl.BlockSpec((1, POSITIONS, N, H), lambda b, t: (b, t, 0, 0))
    by_head = pl.BlockSpec((1, N, POSITIONS), lambda b, t: (b, 0, t))
    turn = pl.BlockSpec((1, POSITIONS, 1, H // 2), lambda b, t: (0, t, 0, 0))
    y, factor = jax.ShapeDtypeStruct((B, T, N, H), arrays[0].dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    return tuple(
        pl.pallas_call(
            kernel,
            grid=(B, T // POSITIONS),
            in_specs=[turn, turn, *(by_position if x.ndim == 4 else by_head for x in arrays)],
            out_specs=[by_position, by_head] if with_factor else [by_position],
            out_shape=[y, factor] if with_factor else [y],
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
            interpret=interpret,
        )(*rotation, *arrays)
    )


def _halves(ref: Any, n: int) -> tuple[jax.Array, jax.Array]:
    """Of a head, float32: RoPE turns one half against the other."""
    half = ref.shape[3] // 2
    first, second = (ref[0, :, n, pl.ds(start, half)].astype(jnp.float32) for start in (0, half))
    return first, second


def _put_halves(ref: Any, n: int, first: jax.Array, second: jax.Array) -> None:
    half = ref.shape[3] // 2
    ref[0, :, n, pl.ds(0, half)], ref[0, :, n, pl.ds(half, half)] = first.astype(ref.dtype), second.astype(ref.dtype)


def _turn(cos_ref: Any, sin_ref: Any, x_ref: Any, y_ref: Any, factor_ref: Any, *, scale: float) -> None:
    cos, sin = (ref[0, :, 0, :].astype(jnp.float32) for ref in (cos_ref, sin_ref))
    for n in range(x_ref.shape[2]):
        first, second = _halves(x_ref, n)
        first, second = first * cos + second * sin, second * cos - first * sin
        mean = jnp.sum(first**2 + second**2, axis=1) / x_ref.shape[3]
        factor = scale * jax.lax.rsqrt(mean + RMS_EPSILON)
        _put_halves(y_ref, n, first * factor[:, None], second * factor[:, None])
        factor_ref[0, n, :] = factor


def _turn_gradient(
    cos_ref: Any, sin_ref: Any, y_ref: Any, factor_ref: Any, grad_ref: Any, found_ref: Any, *, scale: float
) -> None:
    cos, sin = (ref[0, :, 0, :].astype(jnp.float32) for ref in (cos_ref, sin_ref))
    for n in range(y_ref.shape[2]):
        ys = [y / scale for y in _halves(y_ref, n)]
        grads, factor = _halves(grad_ref, n), factor_ref[0, n, :][:, None]
        mean = (jnp.sum(ys[0] * grads[0] + ys[1] * grads[1], axis=1) / y_ref.shape[3])[:, None]
        first, second = (factor * (grad - y * mean) for grad, y in zip(grads, ys, strict=True))
        _put_halves(found_ref, n, first * cos - second * sin, second * cos + first * sin)


KERNELS = RowFunctions(keep_and_norm, rotate_and_norm)
