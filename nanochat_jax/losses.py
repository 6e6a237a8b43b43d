"""Losses as pure functions of hidden states, the head and targets."""

from functools import partial

import jax
import jax.numpy as jnp


def softcap(logits: jax.Array, cap: float | None) -> jax.Array:
    """Squash logits smoothly into ±cap; None leaves them alone."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def cross_entropy(
    x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, vocab_size: int, cap: float | None
) -> jax.Array:
    """Cross-entropy of soft-capped logits, without ever keeping them in float32.

    Args:
        x_BTD: hidden states, in the compute dtype.
        head_DV: output kernel; columns from vocab_size on are padding and take no part.
        targets_BT: int32 token ids; −1 where a position does not count.
        vocab_size: number of real columns.
        cap: of the logits, or None; model.head gives it with the kernel.

    Returns:
        (B, T) float32 nats; 0 where the target is −1.
    """
    x_ND, targets_N = x_BTD.reshape(-1, x_BTD.shape[-1]), targets_BT.reshape(-1)
    loss_N = _cross_entropy(cap, vocab_size, x_ND, head_DV.astype(x_BTD.dtype), targets_N)
    return loss_N.reshape(targets_BT.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(
    cap: float | None, vocab_size: int, x_ND: jax.Array, head_DV: jax.Array, targets_N: jax.Array
) -> jax.Array:
    return _cross_entropy_forward(cap, vocab_size, x_ND, head_DV, targets_N)[0]


def _cross_entropy_forward(
    cap: float | None, vocab_size: int, x_ND: jax.Array, head_DV: jax.Array, targets_N: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    logits_NV = x_ND @ head_DV
    capped_NV = softcap(logits_NV.astype(jnp.float32), cap)
    lse_N = jax.nn.logsumexp(_without_padding(capped_NV, vocab_size), axis=-1)
    target_N = jnp.take_along_axis(capped_NV, jnp.maximum(targets_N, 0)[:, None], axis=-1)[:, 0]
    loss_N = jnp.where(targets_N >= 0, lse_N - target_N, 0.0)
    return loss_N, (x_ND, head_DV, targets_N, logits_NV, lse_N)


def _cross_entropy_backward(
    cap: float | None, vocab_size: int, residuals: tuple[jax.Array, ...], grad_N: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    # The logits are kept in the compute dtype, the probabilities follow from them and the log-sum-exp: half the
    # memory and one pass less than differentiating through a float32 log-softmax.
    x_ND, head_DV, targets_N, logits_NV, lse_N = residuals
    capped_NV = softcap(logits_NV.astype(jnp.float32), cap)
    probs_NV = jnp.exp(_without_padding(capped_NV, vocab_size) - lse_N[:, None])
    is_target_NV = targets_N[:, None] == jnp.arange(head_DV.shape[1], dtype=targets_N.dtype)[None, :]
    grad_N = jnp.where(targets_N >= 0, grad_N, 0.0)
    grad_logits_NV = (probs_NV - is_target_NV) * grad_N[:, None]
    if cap is not None:
        grad_logits_NV *= 1 - (capped_NV / cap) ** 2
    grad_logits_NV = grad_logits_NV.astype(x_ND.dtype)
    return grad_logits_NV @ head_DV.T, x_ND.T @ grad_logits_NV, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _without_padding(logits_NV: jax.Array, vocab_size: int) -> jax.Array:
    """Masked rather than cropped: a product with a cropped kernel would not be aligned."""
    columns_1V = jnp.arange(logits_NV.shape[1])[None, :]
    return logits_NV if vocab_size == logits_NV.shape[1] else jnp.where(columns_1V < vocab_size, logits_NV, -jnp.inf)
