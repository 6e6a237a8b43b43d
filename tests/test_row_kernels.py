"""The kernels for norms, run without a GPU, against what layers.py computes, gradients included."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import attention, layers, model, row_kernels
from nanochat_jax.config import ModelConfig
from nanochat_jax.layers import Compute


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
def test_kernels_are_some_that_triton_takes(lowered_for, gpu, width):
    x_BTD = jax.ShapeDtypeStruct((2, 64, width), jnp.bfloat16)

    def loss(x_BTD):
        x_BTD, *normed = row_kernels.keep_and_norm(x_BTD, 3)
        turned = row_kernels.rotate_and_norm(
            normed[0].reshape(2, 64, -1, 128), *layers.rotary(jnp.arange(64)[None], 128, x_BTD.dtype), 1.2
        )
        return sum(jnp.sum(x.astype(jnp.float32)) for x in (x_BTD, turned, *normed[1:]))

    assert lowered_for(gpu, jax.grad(loss), x_BTD).count("__gpu$xla.gpu.triton") == 4


def test_a_whole_model_is_the_same_by_kernels(monkeypatch):
    """With segments, grouped heads and targets that do not count: the error against float32 stays that of bfloat16."""
    cfg = ModelConfig(sequence_len=32, vocab_size=500, n_layer=3, n_head=4, n_kv_head=2, n_embd=256)
    keys = jax.random.split(jax.random.key(0), 3)
    params = model.init_params(keys[0], cfg, Compute("bfloat16"))
    params = jax.tree.map(lambda x: (x + 0.05 * jax.random.normal(keys[1], x.shape)).astype(x.dtype), params)
    tokens_BT = jax.random.randint(keys[2], (2, 32), 0, 500)
    targets_BT, ids_BT = jnp.where(tokens_BT % 7 == 0, -1, tokens_BT), jnp.cumsum(tokens_BT % 13 == 0, axis=1)

    def gradients(dtype, rows):
        attend = partial(attention.attend, backend="xla")
        monkeypatch.setattr(model.attention, "attend", lambda *qkv, backend, **how: attend(*qkv, **how))
        monkeypatch.setattr(row_kernels, "KERNELS", rows)

        def nats(params):
            how = {"segment_ids_BT": ids_BT.astype(jnp.int32), "compute": Compute(dtype, "cudnn")}
            return model.token_nats(params, cfg, tokens_BT, targets_BT, **how).sum()

        found = jax.jit(jax.value_and_grad(nats))(params)
        monkeypatch.undo()
        return jnp.concatenate([leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(found)])

    interpreted = layers.RowFunctions(
        partial(row_kernels.keep_and_norm, interpret=True), partial(row_kernels.rotate_and_norm, interpret=True)
    )
    exact = gradients("float32", layers.PLAIN)
    by_kernels, plain = (jnp.linalg.norm(gradients("bfloat16", rows) - exact) for rows in (interpreted, layers.PLAIN))
    assert by_kernels < 1.2 * plain
