"""Losses as pure functions of hidden states, the head and targets."""

from collections.abc import Callable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp

from nanochat_jax import loss_kernels
from nanochat_jax.sharding import auto_axes


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


def policy_gradient_loss(
    nats_BT: jax.Array, advantages_B: jax.Array, reference_nats_BT: jax.Array | None = None, kl_weight: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """What a policy gradient descends, for answers that the policy itself has just written.

    Args:
        nats_BT: −log-probability of each sampled token, float32; 0 where a token was not sampled.
        advantages_B: how much better each answer is than was to be expected; positive makes it likelier.
        reference_nats_BT: the same under the policy that this one should stay close to; None for none.
        kl_weight: of the divergence from the reference, in the loss.

    Returns:
        The loss and an unbiased estimate of the divergence, in nats, of each token.

    Source: GRPO (arXiv:2402.03300, equations 3 and 4). With one update for each batch of answers its ratio is 1, and
    there is nothing to clip.
    """
    loss_BT = advantages_B[:, None] * nats_BT
    if reference_nats_BT is None:
        return loss_BT, jnp.zeros_like(loss_BT)
    log_ratio_BT = nats_BT - reference_nats_BT
    kl_BT = jnp.exp(log_ratio_BT) - log_ratio_BT - 1
    return loss_BT + kl_weight * kl_BT, kl_BT


def dpo_loss(
    policy_logps_P2: jax.Array,
    reference_logps_P2: jax.Array,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    lengths_P2: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Direct preference optimisation: the policy should prefer the chosen answer more than the reference does.

    Args:
        policy_logps_P2: log-probability in nats of each pair's answers, the chosen one first.
        reference_logps_P2: the same under the policy that is started from.
        beta: how much a nat counts; the larger, the closer the policy stays to the reference.
        label_smoothing: share of the pairs that are thought to be the wrong way round.
        lengths_P2: tokens of each answer, to compare means over tokens in place of sums; None for sums.

    Returns:
        Of each pair the loss in nats, the margin between the implicit rewards, and the accuracy: whether the chosen
        answer has the larger reward, ½ where neither has.

    Source: arXiv:2305.18290, equation 7; Mitchell, A note on DPO with noisy preferences (2023), for the smoothing.
    """
    log_ratio_P2 = policy_logps_P2 - reference_logps_P2
    if lengths_P2 is not None:
        log_ratio_P2 = log_ratio_P2 / lengths_P2
    margin_P = beta * (log_ratio_P2[:, 0] - log_ratio_P2[:, 1])
    loss_P = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin_P) - label_smoothing * jax.nn.log_sigmoid(-margin_P)
    return loss_P, margin_P, (1 + jnp.sign(margin_P)) / 2


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(
    cap: float | None, vocab_size: int, x_ND: jax.Array, head_DV: jax.Array, targets_N: jax.Array
) -> jax.Array:
    return _cross_entropy_forward(cap, vocab_size, x_ND, head_DV, targets_N)[0]


def _cross_entropy_forward(
    cap: float | None, vocab_size: int, x_ND: jax.Array, head_DV: jax.Array, targets_N: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    logits_NV = x_ND @ head_DV
    lse_N = _pass(_log_sum_exp, loss_kernels.log_sum_exp, cap, vocab_size, logits_NV)
    target_N = jnp.take_along_axis(logits_NV, jnp.maximum(targets_N, 0)[:, None], axis=-1)[:, 0]
    loss_N = jnp.where(targets_N >= 0, lse_N - softcap(target_N.astype(jnp.float32), cap), 0.0)
    return loss_N, (x_ND, head_DV, targets_N, logits_NV, lse_N)


def _cross_entropy_backward(
    cap: float | None, vocab_size: int, residuals: tuple[jax.Array, ...], grad_N: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    # The logits are kept in the compute dtype, the probabilities follow from them and the log-sum-exp: half the
    # memory and one pass less than differentiating through a float32 log-softmax.
    x_ND, head_DV, targets_N, logits_NV, lse_N = residuals
    logits_NV = jax.lax.optimization_barrier(logits_NV)  # or XLA keeps the forward pass's float32 logits for this
    operands = logits_NV, lse_N, targets_N, jnp.where(targets_N >= 0, grad_N, 0.0)
    grad_logits_NV = _pass(_gradient, loss_kernels.gradient, cap, vocab_size, *operands)
    return grad_logits_NV @ head_DV.T, x_ND.T @ grad_logits_NV, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _pass(
    plain: Callable[..., jax.Array],
    kernel: Callable[..., jax.Array],
    cap: float | None,
    vocab_size: int,
    logits_NV: jax.Array,
    *others: jax.Array,
) -> jax.Array:
    """A pass over the logits, by the kernel where it can be."""
    how = {"cap": cap, "vocab_size": vocab_size}
    if cap is None or not loss_kernels.fits(logits_NV) or auto_axes():
        return plain(logits_NV, *others, **how)
    by_platform = {"cuda": partial(kernel, **how), "default": partial(plain, **how)}
    return cast(jax.Array, jax.lax.platform_dependent(logits_NV, *others, **by_platform))


def _log_sum_exp(logits_NV: jax.Array, *, cap: float | None, vocab_size: int) -> jax.Array:
    capped_NV = _without_padding(_capped_and_slope(logits_NV, cap)[0], vocab_size)
    # Capped logits need no maximum taken off before the exponential: one pass over them less.
    most_N1 = cap if cap is not None else jnp.max(capped_NV, axis=-1, keepdims=True)
    return (jnp.log(jnp.sum(jnp.exp(capped_NV - most_N1), axis=-1, keepdims=True)) + most_N1)[:, 0]


def _gradient(
    logits_NV: jax.Array,
    lse_N: jax.Array,
    targets_N: jax.Array,
    grad_N: jax.Array,
    *,
    cap: float | None,
    vocab_size: int,
) -> jax.Array:
    capped_NV, slope_NV = _capped_and_slope(logits_NV, cap)
    probs_NV = jnp.exp(_without_padding(capped_NV, vocab_size) - lse_N[:, None])
    is_target_NV = targets_N[:, None] == jnp.arange(logits_NV.shape[1], dtype=targets_N.dtype)[None, :]
    return ((probs_NV - is_target_NV) * grad_N[:, None] * slope_NV).astype(logits_NV.dtype)


def _capped_and_slope(logits_NV: jax.Array, cap: float | None) -> tuple[jax.Array, jax.Array | float]:
    """Soft-capped logits in float32, and their derivative by the logits."""
    x_NV = logits_NV.astype(jnp.float32)
    if cap is None:
        return x_NV, 1.0
    if logits_NV.dtype == jnp.float32:
        capped_NV = softcap(x_NV, cap)
        return capped_NV, 1 - (capped_NV / cap) ** 2
    # tanh(x/c) = 2 sigmoid(2x/c) − 1, accurate to 1e-6 and so far below what bfloat16 logits hold. On GPUs these passes
    # are bound by such arithmetic: exp and rsqrt are single instructions there, tanh and the division are not.
    sigmoid_NV = jnp.square(jax.lax.rsqrt(1 + jnp.exp(x_NV * (-2 / cap))))
    return cap * (2 * sigmoid_NV - 1), 4 * sigmoid_NV * (1 - sigmoid_NV)


def _without_padding(logits_NV: jax.Array, vocab_size: int) -> jax.Array:
    """Masked rather than cropped: a product with a cropped kernel would not be aligned."""
    columns_1V = jnp.arange(logits_NV.shape[1])[None, :]
    return logits_NV if vocab_size == logits_NV.shape[1] else jnp.where(columns_1V < vocab_size, logits_NV, -jnp.inf)
