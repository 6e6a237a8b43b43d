"""Products from 8-bit operands: the scaling, and how far results are from those of wider operands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import model
from nanochat_jax.config import ModelConfig
from nanochat_jax.fp8 import TILE, both_ways, both_ways_by_tiles, fp8_linear, quantize
from nanochat_jax.layers import Compute

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("largest", [1e-20, 3e-5, 1.0, 447.9, 448.1, 7e4, 1e20])
def test_the_largest_element_just_fits(dtype, largest):
    x = jnp.array([[largest, -largest / 3, 0.0]], jnp.float32)
    x_q, _, back = quantize(x, dtype)
    limit = float(jnp.finfo(dtype).max)
    assert limit / 2 <= float(x_q[0, 0].astype(jnp.float32)) <= limit
    assert np.log2(float(back)) == round(np.log2(float(back)))  # exact in every float format
    relative_rounding = {E4M3: 2**-4, E5M2: 2**-3}[dtype]
    np.testing.assert_allclose(x_q.astype(jnp.float32) * back, x, rtol=relative_rounding)


def test_zeros_stay_zeros_and_what_is_not_finite_shows():
    x_q, _, back = quantize(jnp.zeros((1, 4)), E4M3)
    assert np.isfinite(float(back)) and not x_q.astype(jnp.float32).any()
    x_q, _, back = quantize(jnp.array([[1.0, jnp.inf]]), E4M3)
    assert not np.isfinite(x_q.astype(jnp.float32) * back).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_tiles_are_written_both_ways(dtype):
    x_IO, scale = jax.random.normal(jax.random.key(0), (2 * TILE, 3 * TILE), jnp.bfloat16), jnp.float32(64)
    for by_tiles, plain in zip(
        both_ways_by_tiles(x_IO, scale, dtype=dtype, interpret=True), both_ways(x_IO, scale, dtype=dtype), strict=True
    ):
        np.testing.assert_array_equal(by_tiles.astype(jnp.float32), plain.astype(jnp.float32))


def test_kernels_are_some_that_triton_takes(lowered_for):
    x_NI = jax.ShapeDtypeStruct((2 * TILE, TILE), jnp.bfloat16)
    kernel_IO = jax.ShapeDtypeStruct((TILE, TILE), jnp.float32)
    loss = jax.grad(lambda x, kernel: jnp.sum(fp8_linear(x, kernel).astype(jnp.float32)), (0, 1))
    assert lowered_for("NVIDIA H200", loss, x_NI, kernel_IO).count("__gpu$xla.gpu.triton") == 3


def relative(a, b):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_product_and_gradients_are_within_the_rounding_of_8_bits():
    keys = jax.random.split(jax.random.key(0), 3)
    x_BTI, kernel_IO, weights_BTO = (
        jax.random.normal(key, shape) for key, shape in zip(keys, ((2, 64, 128), (128, 96), (2, 64, 96)), strict=True)
    )

    def loss(f):
        return jax.value_and_grad(lambda x, kernel: (f(x, kernel) * weights_BTO).sum(), (0, 1))(x_BTI, kernel_IO)

    assert relative(fp8_linear(x_BTI, kernel_IO), x_BTI @ kernel_IO) < 0.05
    (_, grads), (_, exact) = loss(fp8_linear), loss(jnp.matmul)
    for grad, expected in zip(grads, exact, strict=True):
        assert grad.dtype == expected.dtype
        assert relative(grad, expected) < 0.08  # e5m2 has one bit less


def test_a_model_with_8_bit_products_stays_close_and_trains_every_matrix():
    cfg = ModelConfig(sequence_len=32, vocab_size=64, n_layer=3, n_head=2, n_kv_head=2, n_embd=64)
    wide = Compute("bfloat16")
    params = model.init_params(jax.random.key(0), cfg, wide)
    # output projections are born as zeros
    params = jax.tree.map(lambda x: x if x.any() else 0.1 * jax.random.normal(jax.random.key(1), x.shape), params)
    tokens_BT = jax.random.randint(jax.random.key(2), (2, 32), 0, 64)

    def loss(params, compute):
        return model.token_nats(params, cfg, tokens_BT, tokens_BT, compute=compute).mean()

    value, grads = jax.value_and_grad(loss)(params, Compute("bfloat16", fp8=True))
    assert value == pytest.approx(float(loss(params, wide)), rel=0.01)
    assert all(np.asarray(grad, np.float32).any() for grad in jax.tree.leaves(grads["block_1"]))
