"""Hand-written gradients against those that JAX derives from the plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import layers


def plain_rms_norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + layers.RMS_EPSILON)


def plain_rotate_and_norm(x_BTNH, cos, sin):
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    turned = jnp.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)
    return 1.2 * plain_rms_norm(turned)


def rotate_and_norm(x_BTNH, cos, sin):
    return layers.rotate_and_norm(x_BTNH, cos, sin, 1.2)


ROTATION = layers.rotary(jnp.arange(5, dtype=jnp.int32)[None], 16, jnp.dtype("float32"))


@pytest.mark.parametrize(
    ("function", "plain", "others"),
    [
        (layers.rms_norm, plain_rms_norm, ()),
        (layers.relu2, lambda x: jnp.square(jax.nn.relu(x)), ()),
        (rotate_and_norm, plain_rotate_and_norm, ROTATION),
    ],
    ids=["rms_norm", "relu2", "rotate_and_norm"],
)
def test_gradient_from_the_result(function, plain, others):
    keys = jax.random.split(jax.random.key(0))
    x_BTNH, weights_BTNH = (jax.random.normal(key, (3, 5, 2, 16)) for key in keys)

    def loss(f, x):
        return (f(x, *others) * weights_BTNH).sum()

    value, grad = jax.value_and_grad(lambda x: loss(function, x))(x_BTNH)
    plain_value, plain_grad = jax.value_and_grad(lambda x: loss(plain, x))(x_BTNH)
    assert value == pytest.approx(float(plain_value), rel=1e-5)
    np.testing.assert_allclose(grad, plain_grad, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("function", [layers.rms_norm, layers.relu2])
def test_a_zero_has_a_finite_gradient(function):
    assert np.isfinite(jax.grad(lambda x: function(x).sum())(jnp.zeros((2, 8)))).all()


def test_products_that_only_move_are_exact(monkeypatch):
    """What a TPU multiplies, other devices move: bitwise the same."""
    x, grad = (jax.random.normal(key, (2, 5, 3, 16), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    rotation = layers.rotary(jnp.arange(5, dtype=jnp.int32)[None], 16, jnp.dtype("bfloat16"))

    def run():
        value, back = jax.vjp(lambda x: layers.rotate_and_norm(layers.turn_rows(x), *rotation, 1.2), x)
        return value, *back(grad)

    moved = run()
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda x, *, tpu, default: tpu(x))
    jax.tree.map(np.testing.assert_array_equal, run(), moved)
