"""The kernel for one new token, run without a GPU, against attention with an explicit mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nanochat_jax import model
from nanochat_jax.attention import masked_attention
from nanochat_jax.cache import init_cache, slot_positions
from nanochat_jax.config import ModelConfig
from nanochat_jax.decode_attention import BLOCK, decode_attention, supports
from nanochat_jax.layers import Compute

B, K, G, H = 8, 2, 2, 16


def example(S, window):
    keys = jax.random.split(jax.random.key(S), 3)
    q_BKGH = jax.random.normal(keys[0], (B, K, G, H))
    k_BKSH, v_BKSH = (jax.random.normal(key, (B, K, S, H)) for key in keys[1:])
    is_ring = window == S - 1
    lengths_B = jnp.array([1, 5, BLOCK, BLOCK + 1, S - 1, S, S + 3 if is_ring else 2, 2 * S if is_ring else 7])
    lengths_B = lengths_B.astype(jnp.int32)
    positions_BS = slot_positions(lengths_B, S)
    distance_BS = (lengths_B - 1)[:, None] - positions_BS
    mask_BS = (positions_BS >= 0) & (distance_BS <= window)
    expected = masked_attention(q_BKGH.reshape(B, 1, K * G, H), k_BKSH, v_BKSH, mask_BS[:, None])
    return (q_BKGH, k_BKSH, v_BKSH, lengths_B), expected.reshape(B, K, G, H)


@pytest.mark.parametrize(("S", "window"), [(65, 64), (300, 1000), (513, 512), (576, 575), (700, 699)])
def test_kernel_sees_what_the_mask_allows(S, window):
    operands, expected = example(S, window)
    np.testing.assert_allclose(decode_attention(*operands, True), expected, atol=2e-6)


@pytest.mark.parametrize("groups", [16, 32])
def test_many_queries_of_a_head_and_empty_rows(groups):
    (_, k_BKSH, v_BKSH, lengths_B), _ = example(300, 1000)
    q_BKGH = jax.random.normal(jax.random.key(1), (B, K, groups, H))
    mask_B1S = (jnp.arange(300)[None] < lengths_B[:, None])[:, None]
    expected = masked_attention(q_BKGH.reshape(B, 1, -1, H), k_BKSH, v_BKSH, mask_B1S).reshape(q_BKGH.shape)
    np.testing.assert_allclose(decode_attention(q_BKGH, k_BKSH, v_BKSH, lengths_B, True), expected, atol=2e-6)
    assert np.isfinite(decode_attention(q_BKGH, k_BKSH, v_BKSH, 0 * lengths_B, True)).all()


def test_rows_and_heads_stay_on_their_devices():
    operands, expected = example(300, 1000)
    mesh = jax.make_mesh((4, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
    specs = [PartitionSpec("rows", "heads")] * 3 + [PartitionSpec("rows")]
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(operands, specs, strict=True)]
    program = jax.jit(lambda *operands: decode_attention(*operands, True)).lower(*placed).compile()
    assert not any(kind in program.as_text() for kind in ("all-gather", "all-reduce", "collective-permute"))
    result = program(*placed)
    np.testing.assert_allclose(result, expected, atol=2e-6)
    assert result.sharding.spec[:2] == ("rows", "heads")


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("gpu", ["NVIDIA A100-SXM4-80GB", "NVIDIA H200"])
def test_kernel_is_one_that_triton_takes(lowered_for, gpu, dtype, groups):
    q_BKGH = jax.ShapeDtypeStruct((4, 3, groups, 128), dtype)
    k_BKSH, lengths_B = jax.ShapeDtypeStruct((4, 3, 513, 128), dtype), jax.ShapeDtypeStruct((4,), jnp.int32)
    assert "triton" in lowered_for(gpu, decode_attention.fun, q_BKGH, k_BKSH, k_BKSH, lengths_B)


@pytest.mark.parametrize(("backend", "kernels"), [("cudnn", 3), ("xla", 0)])
def test_it_decodes_where_cudnn_attends(backend, kernels):
    cfg, compute = ModelConfig(128, 64, 3, 2, 1, 32), Compute("bfloat16", backend)
    params = jax.eval_shape(lambda: model.init_params(jax.random.key(0), cfg, Compute("bfloat16")))
    cache = jax.eval_shape(lambda: init_cache(cfg, 2, "bfloat16"))
    one = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    step = jax.make_jaxpr(lambda params, one, cache: model.forward(params, cfg, one, cache=cache, compute=compute))
    assert str(step(params, one, cache)).count("custom_partitioning[") == kernels


def test_odd_shapes_are_declined():
    one, keys = jnp.zeros((1, 1, 1, 128)), jnp.zeros((1, 1, 513, 128))
    assert supports(one, keys, 512)
    assert not supports(one, keys, 511)
    assert not supports(jnp.zeros((1, 1, 3, 128)), keys, 512)
    assert not supports(one, keys[:, :, : BLOCK - 1], 512)
