import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanochat_jax.errors import UserError
from nanochat_jax.sampling import Sampling, SamplingArrays, choose, uniforms
from nanochat_jax.threshold import least_probability


def draws(logits, how: Sampling, count: int = 4000, seen: tuple[int, ...] = ()) -> np.ndarray:
    rows = SamplingArrays.of([dataclasses.replace(how, seed=seed) for seed in range(count)])
    logits_BV = jnp.tile(jnp.array(logits, jnp.float32)[None], (count, 1))
    seen_BV = jnp.zeros(logits_BV.shape, bool).at[:, list(seen)].set(True)
    uniforms_B = uniforms(rows.seed_B, jnp.zeros((count, 1), jnp.int32))[:, 0]
    return np.asarray(choose(logits_BV, rows, uniforms_B, seen_BV))


def test_frequencies_follow_the_tempered_softmax():
    logits = np.array([0.0, 1.0, 2.0, -1.0], np.float32)
    expected = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    found = np.bincount(draws(logits, Sampling(temperature=0.7)), minlength=4) / 4000
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / 4000))


@pytest.mark.parametrize(
    ("how", "allowed"),
    [
        (Sampling(top_k=2), {1, 2}),
        (Sampling(top_p=0.5), {2}),  # the likeliest alone has 0.64
        (Sampling(top_p=0.7), {1, 2}),
        (Sampling(top_k=3, top_p=0.7), {1, 2}),
        (Sampling(top_k=4), {0, 1, 2, 3}),
        (Sampling(top_k=9, top_p=0.999), {0, 1, 2, 3}),
        (Sampling(temperature=1e-38), {2}),
        (Sampling(min_p=0.1), {0, 1, 2}),  # e⁻³ of the likeliest is below a tenth
        (Sampling(temperature=0), {2}),
        (Sampling(top_k=1), {2}),
    ],
)
def test_truncation_keeps_exactly_the_likely_tokens(how, allowed):
    assert set(draws([0.0, 1.0, 2.0, -1.0], how, 2000).tolist()) == allowed


@pytest.mark.parametrize("how", [Sampling(top_k=50), Sampling(top_p=0.8), Sampling(top_k=700, top_p=0.3)])
def test_truncation_agrees_with_sorting(how):
    logits_V = np.random.default_rng(0).normal(0, 3, 1000).astype(np.float32)
    probs_V = np.asarray(jax.nn.softmax(logits_V))
    order_V = np.argsort(-probs_V)
    before_V = np.cumsum(probs_V[order_V]) - probs_V[order_V]
    count = min(how.top_k or 1000, int((before_V < how.top_p).sum()))
    rows = SamplingArrays.of([how])
    [least] = np.asarray(least_probability(probs_V[None], rows.top_k_B, rows.top_p_B))
    assert least == probs_V[order_V[count - 1]]


def test_repetition_penalty_makes_seen_tokens_less_likely():
    logits = [1.0, 0.5, -0.5, -1.0]
    assert set(draws(logits, Sampling(temperature=0, repetition_penalty=1.5), 2, seen=(3,)).tolist()) == {0}
    assert set(draws(logits, Sampling(temperature=0, repetition_penalty=3.0), 2, seen=(0,)).tolist()) == {1}
    penalised = np.array([0.5, 0.5, -0.5, -2.0])
    expected = np.exp(penalised) / np.exp(penalised).sum()
    found = np.bincount(draws(logits, Sampling(repetition_penalty=2.0), seen=(0, 3)), minlength=4) / 4000
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / 4000))


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 2.0},
        {"seed": -1},
        {"repetition_penalty": 0},
    ],
)
def test_impossible_sampling_is_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)
