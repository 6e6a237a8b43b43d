"""Preference loss against numbers worked out by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax import losses
from nanochat_jax.losses import dpo_loss

# Log-ratios of chosen and rejected, (0.5, −1), (0.25, 0.25) and (−0.5, 1): with beta ½ the margins are ¾, 0 and −¾.
POLICY = np.array([[-2.0, -3.0], [-1.0, -4.0], [-3.0, -1.0]])
REFERENCE = np.array([[-2.5, -2.0], [-1.25, -4.25], [-2.5, -2.0]])
LOSS_34, SLOPE_34 = 0.38687100, 0.32082130  # log(1 + exp(−¾)) and σ(−¾)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def test_loss_margin_and_accuracy():
    loss_P, margin_P, accuracy_P = dpo_loss(jnp.asarray(POLICY), jnp.asarray(REFERENCE), beta=0.5)
    assert loss_P.dtype == jnp.float64
    np.testing.assert_allclose(loss_P, [LOSS_34, np.log(2), LOSS_34 + 0.75], atol=1e-7)
    np.testing.assert_array_equal(margin_P, [0.75, 0, -0.75])
    np.testing.assert_array_equal(accuracy_P, [1, 0.5, 0])


def gradient(**options) -> np.ndarray:
    def total(policy_P2: jax.Array) -> jax.Array:
        return dpo_loss(policy_P2, jnp.asarray(REFERENCE), beta=0.5, **options)[0].sum()

    return np.asarray(jax.grad(total)(jnp.asarray(POLICY)))


def test_gradient():
    slopes = 0.5 * np.array([SLOPE_34, 0.5, 1 - SLOPE_34])  # beta σ(−margin)
    np.testing.assert_allclose(gradient(), np.stack([-slopes, slopes], axis=1), atol=1e-7)


def test_label_smoothing():
    """A tenth of the pairs may be the wrong way round: 0.9 of the loss, and 0.1 of that of the pair turned round."""
    loss_P, *_ = dpo_loss(jnp.asarray(POLICY), jnp.asarray(REFERENCE), beta=0.5, label_smoothing=0.1)
    np.testing.assert_allclose(loss_P, [0.46187100, np.log(2), 1.06187100], atol=1e-7)
    np.testing.assert_allclose(gradient(label_smoothing=0.1)[0], [-0.11041065, 0.11041065], atol=1e-7)
    sure = partial(dpo_loss, reference_logps_P2=jnp.zeros((1, 2)), beta=1.0, label_smoothing=0.1)
    slope = jax.grad(lambda m: sure(jnp.array([[m, 0.0]]))[0].sum())
    assert slope(2.0) < 0 < slope(2.4)  # it is content at σ(margin) = 0.9, a margin of log 9 = 2.197


def test_length_normalisation():
    """The first pair's log-ratios over 2 and 4 tokens are ¼ and −¼: the margin is ¼."""
    lengths = jnp.array([[2, 4], [1, 1], [1, 1]])
    loss_P, margin_P, _ = dpo_loss(jnp.asarray(POLICY), jnp.asarray(REFERENCE), beta=0.5, lengths_P2=lengths)
    np.testing.assert_allclose(margin_P, [0.25, 0, -0.75], atol=1e-15)
    np.testing.assert_allclose(loss_P[0], 0.57593942, atol=1e-8)
    np.testing.assert_allclose(gradient(lengths_P2=lengths)[0], [-0.10945588, 0.05472794], atol=1e-8)


def test_far_from_the_reference_everything_stays_finite():
    policy = jnp.array([[0.0, -1e5], [-1e5, 0.0]])
    loss_P, _, accuracy_P = dpo_loss(policy, jnp.zeros((2, 2)), beta=1.0, label_smoothing=0.0)
    np.testing.assert_allclose(loss_P, [0, 1e5])
    np.testing.assert_array_equal(accuracy_P, [1, 0])
    slopes = jax.grad(lambda p: dpo_loss(p, jnp.zeros((2, 2)), beta=1.0)[0].sum())(policy)
    np.testing.assert_allclose(slopes, [[0, 0], [-1, 1]], atol=1e-12)


def test_bfloat16_logits_are_capped_as_tanh_would():
    logits = jnp.linspace(-60, 60, 2001).astype(jnp.bfloat16)
    capped, slope = losses._capped_and_slope(logits, 15.0)
    exact = np.tanh(np.asarray(logits, np.float64) / 15)
    np.testing.assert_allclose(capped, 15 * exact, atol=2e-5)
    np.testing.assert_allclose(slope, 1 - exact**2, atol=2e-6)
