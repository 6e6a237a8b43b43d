"""The kernels of the cross-entropy, run without a GPU, against the same in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import loss_kernels, losses

N, V = 6, 2 * loss_kernels.CHUNK


@pytest.mark.parametrize("vocab_size", [V, V - 100])
def test_kernels_equal_plain_jax(vocab_size):
    logits_NV = (8 * jax.random.normal(jax.random.key(0), (N, V))).astype(jnp.bfloat16)
    how = {"cap": 15.0, "vocab_size": vocab_size}
    lse_N = losses._log_sum_exp(logits_NV, **how)
    np.testing.assert_allclose(loss_kernels.log_sum_exp(logits_NV, **how, interpret=True), lse_N, rtol=1e-6)
    targets_N = jnp.array([0, 5, vocab_size - 1, loss_kernels.CHUNK, -1, 7], jnp.int32)
    grad_N = jnp.array([1.0, 2.0, 0.5, 1.0, 0.0, -3.0])
    found, wanted = (
        np.asarray(x, np.float64)
        for x in (
            loss_kernels.gradient(logits_NV, lse_N, targets_N, grad_N, **how, interpret=True),
            losses._gradient(logits_NV, lse_N, targets_N, grad_N, **how),
        )
    )
    np.testing.assert_allclose(found, wanted, rtol=2**-7, atol=1e-9)  # they round to bfloat16
    assert not found[:, vocab_size:].any() and not found[4].any()


@pytest.mark.parametrize("gpu", ["NVIDIA A100-SXM4-80GB", "NVIDIA H200"])
@pytest.mark.parametrize(("cap", "kernels"), [(15.0, 2), (None, 0)])
def test_kernels_are_some_that_triton_takes(lowered_for, gpu, cap, kernels):
    x_BTD, head_DV = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 8, 64), (64, V)))
    targets_BT = jax.ShapeDtypeStruct((2, 8), jnp.int32)

    def loss(x_BTD, head_DV, targets_BT):
        return jnp.sum(losses.cross_entropy(x_BTD, head_DV, targets_BT, V, cap))

    program = lowered_for(gpu, jax.grad(loss), x_BTD, head_DV, targets_BT)
    assert program.count("__gpu$xla.gpu.triton") == kernels
