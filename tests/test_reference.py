"""The model in the small against tests/reference.py, and cached decoding against the full pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from nanochat_jax import attention, model
from nanochat_jax.cache import init_cache
from nanochat_jax.config import ModelConfig
from nanochat_jax.interop import params_from_upstream, params_to_upstream
from nanochat_jax.layers import Compute

FLOAT32 = Compute("float32", "xla")
# Grouped queries, value embeddings in layers 0 and 2, windows of 128 tokens in layers 0 and 1, an unpadded vocabulary.
SMALL = ModelConfig(sequence_len=512, vocab_size=50, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SSL")
EVEN = ModelConfig(sequence_len=64, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=24, window_pattern="L")


def random_weights(cfg: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights by torch's names, none of them at a value that would hide a mistake (zero, one)."""
    rng = np.random.default_rng(seed)
    shapes = params_to_upstream(model.init_params(jax.random.key(0), cfg, FLOAT32))
    weights = {name: rng.normal(0, 0.3, x.shape).astype(np.float32) for name, x in shapes.items()}
    weights["lm_head.weight"] *= 3  # far enough for the soft cap to matter
    return weights


@partial(jax.jit, static_argnums=1)
def full_pass(params, cfg, tokens_BT, segments_BT=None):
    return model.forward(params, cfg, tokens_BT, segment_ids_BT=segments_BT, compute=FLOAT32)


@pytest.mark.parametrize("cfg", [SMALL, EVEN], ids=["windows-gqa", "even-layers"])
def test_forward(cfg):
    weights = random_weights(cfg)
    tokens_BT = np.random.default_rng(1).integers(0, cfg.vocab_size, (1, min(200, cfg.sequence_len)))
    expected = reference.forward(weights, cfg, tokens_BT[0])
    assert np.abs(expected).max() > 10  # well into the soft cap
    logits = full_pass(params_from_upstream(weights, cfg), cfg, tokens_BT)
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=5e-5)


def test_segments_cut_attention_and_smear():
    weights = random_weights(EVEN)
    tokens_BT = np.random.default_rng(1).integers(0, EVEN.vocab_size, (1, 20))
    segments_BT = np.repeat([0, 1, 2], [7, 1, 12])[None]
    params = params_from_upstream(weights, EVEN)
    logits = full_pass(params, EVEN, tokens_BT, segments_BT)
    np.testing.assert_allclose(
        logits[0], reference.forward(weights, EVEN, tokens_BT[0], segments_BT[0]), rtol=0, atol=5e-5
    )
    changed = tokens_BT.copy()
    changed[0, :8] = (changed[0, :8] + 1) % EVEN.vocab_size
    after = full_pass(params, EVEN, changed, segments_BT)
    np.testing.assert_array_equal(after[0, 8:], logits[0, 8:])


@pytest.mark.parametrize(
    ("window", "kv_heads", "segmented"), [(0, 1, False), (3, 2, False), (300, 4, True), (40, 2, True)]
)
def test_attention(window, kv_heads, segmented):
    """Across the boundaries of query chunks too."""
    rng, T = np.random.default_rng(2), attention.QUERY_CHUNK + 20
    q, k, v = (rng.normal(size=(T, heads, 8)).astype(np.float32) for heads in (4, kv_heads, kv_heads))
    segments = np.sort(rng.integers(0, 4, T)) if segmented else None
    ours = attention.attend(
        q[None], k[None], v[None], window=window, segment_ids_BT=None if segments is None else segments[None]
    )
    expected = reference.attention(*(x.astype(np.float64) for x in (q, k, v)), window, segments)
    np.testing.assert_allclose(ours[0], expected, rtol=0, atol=2e-6)


@pytest.fixture(scope="module")
def small():
    """Parameters, three rows of tokens and their logits by the full pass."""
    params = params_from_upstream(random_weights(SMALL), SMALL)
    tokens_BT = np.random.default_rng(3).integers(0, SMALL.vocab_size, (3, 420))
    return params, tokens_BT, np.asarray(full_pass(params, SMALL, tokens_BT))


@jax.jit
def extend(params, cache, chunk_BT, counts_B):
    x_BTD, cache = model.trunk(params, SMALL, chunk_BT, cache=cache, counts_B=counts_B, compute=FLOAT32)
    return model.unembed(params, SMALL, x_BTD), cache


def decode(params, tokens_BT, plan):
    """Logits of all tokens, fed in chunks: plan holds (chunk length, real tokens in each row)."""
    cache, done_B = init_cache(SMALL, len(tokens_BT), "float32"), np.zeros(len(tokens_BT), int)
    logits = [[] for _ in tokens_BT]
    for length, counts_B in plan:
        chunk_BT = np.full((len(tokens_BT), length), SMALL.vocab_size - 1)  # padding that would do harm
        for row, count in enumerate(counts_B):
            chunk_BT[row, :count] = tokens_BT[row, done_B[row] : done_B[row] + count]
        out_BTV, cache = extend(params, cache, chunk_BT, jnp.array(counts_B, jnp.int32))
        for row, count in enumerate(counts_B):
            logits[row] += list(np.asarray(out_BTV[row, :count]))
        done_B += counts_B
    np.testing.assert_array_equal(cache.lengths_B, done_B)
    return [np.array(row) for row in logits]


# Far beyond the window of 128: rings wrap in chunks shorter and longer than they are, and token by token.
PLANS = {
    "token by token": [(1, (1, 1, 1))] * 300,
    "padded chunks": [(64, (64, 1, 0)), (64, (3, 64, 5)), (1, (1, 1, 1)), *[(64, (60, 64, 31))] * 5],
    "chunks longer than the ring": [(200, (10, 0, 200)), (200, (200, 129, 1)), (200, (190, 130, 200)), (1, (1, 0, 1))],
    "rows that wait": [(64, (64, 10, 1))] * 4 + [(1, (1, 0, 1)), (1, (0, 1, 0))] * 30 + [(64, (64, 64, 64))],
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_cached_decoding_equals_the_full_pass(small, plan):
    params, tokens_BT, expected_BTV = small
    for row, logits in enumerate(decode(params, tokens_BT, plan)):
        np.testing.assert_allclose(logits, expected_BTV[row, : len(logits)], rtol=0, atol=1e-4)


def test_cache_holds_only_what_windows_need():
    cache = init_cache(SMALL, batch=1, dtype="float32")
    assert [keys.shape[2] for keys in cache.keys] == [129, 129, 512]
