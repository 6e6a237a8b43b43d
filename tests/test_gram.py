"""The kernel against the plain product, and Muon's orthogonalisation built on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.gram import BLOCK_K, BLOCK_M, blockwise, gram, reference
from nanochat_jax.muon import orthogonalize


@pytest.mark.parametrize("of_columns", [False, True])
def test_kernel_is_the_product(of_columns):
    shape = (2, 3 * BLOCK_K, 2 * BLOCK_M) if of_columns else (2, 2 * BLOCK_M, 3 * BLOCK_K)
    x_SIO = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    how = {"polynomial": None, "of_columns": of_columns}
    result = blockwise(x_SIO, **how, interpret=True).astype(jnp.float32)
    expected = reference(x_SIO.astype(jnp.float32), **how)
    assert np.linalg.norm(result - expected) / np.linalg.norm(expected) < 3e-3  # one rounding to bfloat16
    np.testing.assert_array_equal(result, result.mT)


def test_kernel_is_the_polynomial():
    half_SMM = jax.random.normal(jax.random.key(1), (2, 2 * BLOCK_M, 2 * BLOCK_M)) / 16
    x_SMM = (half_SMM + half_SMM.mT).astype(jnp.bfloat16)
    how = {"polynomial": (3.0, -2.0, 0.5), "of_columns": False}
    result = blockwise(x_SMM, **how, interpret=True).astype(jnp.float32)
    expected = reference(x_SMM.astype(jnp.float32), **how)
    assert np.linalg.norm(result - expected) / np.linalg.norm(expected) < 3e-3


@pytest.mark.parametrize("how", [{}, {"of_columns": True}, {"polynomial": (3.0, -2.0, 0.5)}])
def test_kernel_is_one_that_triton_takes(lowered_for, how):
    x_SMM = jax.ShapeDtypeStruct((3, 512, 512), jnp.bfloat16)
    assert "triton" in lowered_for("NVIDIA H200", lambda x: gram(x, **how), x_SMM)


@pytest.mark.parametrize("shape", [(2, 48, 48), (2, 24, 72), (2, 72, 24)])
def test_orthogonalize_evens_out_singular_values(shape):
    x_SIO = jax.random.normal(jax.random.key(2), shape)
    values = np.linalg.svd(orthogonalize(x_SIO), compute_uv=False)
    assert values.min() > 0.7 and values.max() < 1.3
