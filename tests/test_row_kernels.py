"""The kernels for norms, run without a GPU, against what layers.py computes, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from nanochat_jax import layers, row_kernels


def close(found, wanted, tolerance):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 4e-3)])
@pytest.mark.parametrize("width", [128, 384])
@pytest.mark.parametrize("uses", [1, 3])
def test_norm(dtype, tolerance, width, uses):
    keys = jax.random.split(jax.random.key(0), 2 + uses)
    x_BTD, *weights = (jax.random.normal(key, (2, 16, width), dtype) for key in keys)

    def run(norm, *options):
        def weighted(x_BTD):
            found = norm(x_BTD, uses, *options)
            return sum(jnp.sum((x * w).astype(jnp.float32)) for x, w in zip(found, weights, strict=True)), found

        return jax.grad(weighted, has_aux=True)(x_BTD)

    close(run(row_kernels.keep_and_norm, True), run(layers.keep_and_norm), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 4e-3)])
@pytest.mark.parametrize("heads", [1, 3])
def test_rotation_and_norm(dtype, tolerance, heads):
    keys = jax.random.split(jax.random.key(0), 2)
    x_BTNH, weights = (jax.random.normal(key, (2, 32, heads, 64), dtype) for key in keys)
    rotation = layers.rotary(jnp.arange(32)[None], 64, dtype)

    def run(rotate_and_norm, *options):
        def weighted(x_BTNH):
            found = rotate_and_norm(x_BTNH, *rotation, 1.2, *options)
            return jnp.sum((found * weights).astype(jnp.float32)), found

        return jax.grad(weighted, has_aux=True)(x_BTNH)

    close(run(row_kernels.rotate_and_norm, True), run(layers.rotate_and_norm), tolerance)


@pytest.mark.parametrize("gpu", ["NVIDIA A100-SXM4-80GB", "NVIDIA H200"])
@pytest.mark.parametrize("width", [768, 1536])
def test_kernels_are_some_that_triton_takes(gpu, width):
    x_BTD = jax.ShapeDtypeStruct((2, 64, width), jnp.bfloat16)

    def loss(x_BTD):
        x_BTD, *normed = row_kernels.keep_and_norm(x_BTD, 3)
        turned = row_kernels.rotate_and_norm(
            normed[0].reshape(2, 64, -1, 128), *layers.rotary(jnp.arange(64)[None], 128, x_BTD.dtype), 1.2
        )
        return sum(jnp.sum(x.astype(jnp.float32)) for x in (x_BTD, turned, *normed[1:]))

    with use_abstract_mesh(AbstractMesh((1,), ("one",), abstract_device=AbstractDevice(gpu, 108, "gpu"))):
        lowered = jax.jit(jax.grad(loss)).trace(x_BTD).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") == 4
