"""GPT-2 against transformers' numbers (fixtures/gpt2.npz, made by make_gpt2_fixture.py) and nanoGPT's recipe."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanochat_jax import gpt2, losses, model
from nanochat_jax.cache import init_cache
from nanochat_jax.config import to_json
from nanochat_jax.errors import UserError
from nanochat_jax.generate import Sampling, generate
from nanochat_jax.gpt2 import PRESETS, GPT2Config, GPT2OptimConfig
from nanochat_jax.gpt2_weights import params_from_gpt2
from nanochat_jax.layers import Compute

FLOAT32 = Compute("float32", "xla")
LOGITS_ATOL = 1e-5
TINY = GPT2Config(sequence_len=16, vocab_size=20, n_layer=1, n_head=2, n_embd=16, dropout=0.3, bias=False)


@pytest.fixture(scope="module")
def stored():
    with np.load(Path(__file__).parent / "fixtures" / "gpt2.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def cfg(stored):
    values = json.loads(str(stored["config"]))
    return GPT2Config(*(values[key] for key in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")))


@pytest.fixture(scope="module")
def params(stored, cfg):
    return params_from_gpt2({k.removeprefix("weights/"): v for k, v in stored.items() if "weights/" in k}, cfg)


@pytest.fixture(scope="module")
def tiny_params():
    return model.init_params(jax.random.key(0), TINY, FLOAT32)


trunk = partial(jax.jit, static_argnums=1)(partial(model.trunk, compute=FLOAT32))


def mean_loss(params, cfg, tokens_BT, dropout_key=None):
    x_BTD, _ = model.trunk(params, cfg, tokens_BT[:, :-1], compute=FLOAT32, dropout_key=dropout_key)
    kernel_DV, cap = model.head(params, cfg)
    return losses.cross_entropy(x_BTD, kernel_DV, tokens_BT[:, 1:], cfg.vocab_size, cap).mean()


def test_logits(stored, cfg, params):
    logits = jax.jit(partial(model.forward, cfg=cfg, compute=FLOAT32))(params, tokens_BT=stored["tokens_BT"])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, stored["logits"], rtol=0, atol=LOGITS_ATOL)


def test_loss(stored, cfg, params):
    loss = jax.jit(mean_loss, static_argnums=1)(params, cfg, stored["tokens_BT"])
    assert abs(float(loss) - stored["loss"]) < LOGITS_ATOL


def test_greedy_generation(stored, cfg, params):
    """Through the KV cache of generate.py, which knows nothing of GPT-2."""
    prompt, expected = stored["greedy_T"][:8].tolist(), stored["greedy_T"][8:].tolist()
    (tokens,) = generate(
        params, cfg, [prompt], max_new_tokens=len(expected), sampling=Sampling(temperature=0.0), compute=FLOAT32
    )
    assert tokens == expected


def test_cached_decoding_equals_the_full_pass(stored, cfg, params):
    tokens_BT = stored["tokens_BT"]
    cache, done_B, errors = init_cache(cfg, 2, "float32"), np.zeros(2, int), []

    @jax.jit
    def extend(cache, chunk_BT, counts_B):
        x_BTD, cache = model.trunk(params, cfg, chunk_BT, cache=cache, counts_B=counts_B, compute=FLOAT32)
        return model.unembed(params, cfg, x_BTD), cache

    for length, counts_B in [(16, (16, 3)), (1, (1, 0)), (16, (2, 16)), (1, (1, 1)), (16, (0, 16)), (16, (16, 11))]:
        chunk_BT = np.full((2, length), 7)
        for row, count in enumerate(counts_B):
            chunk_BT[row, :count] = tokens_BT[row, done_B[row] : done_B[row] + count]
        logits_BTV, cache = extend(cache, chunk_BT, jnp.array(counts_B, jnp.int32))
        for row, count in enumerate(counts_B):
            expected = stored["logits"][row, done_B[row] : done_B[row] + count]
            errors.append(np.abs(logits_BTV[row, :count] - expected).max(initial=0))
        done_B += counts_B
    assert max(errors) < LOGITS_ATOL


def test_segments_do_not_see_each_other(tiny_params):
    tokens_BT = np.random.default_rng(0).integers(0, TINY.vocab_size, (1, 12))
    segments_BT = np.repeat([0, 1], [5, 7])[None]
    forward = partial(trunk, tiny_params, TINY, segment_ids_BT=segments_BT)
    changed = tokens_BT.copy()
    changed[0, :5] = (changed[0, :5] + 1) % TINY.vocab_size
    np.testing.assert_array_equal(forward(tokens_BT)[0][0, 5:], forward(changed)[0][0, 5:])


def test_bfloat16_compute(stored, cfg, params):
    x_BTD, _ = jax.jit(partial(model.trunk, cfg=cfg, compute=Compute("bfloat16", "xla")))(
        params, tokens_BT=stored["tokens_BT"]
    )
    assert x_BTD.dtype == jnp.bfloat16
    error = model.unembed(params, cfg, x_BTD) - stored["logits"]
    assert np.abs(error).max() < 0.2


@pytest.mark.parametrize("cap", [None, 15.0])
def test_cross_entropy_and_its_gradient(cap):
    """Against automatic differentiation of the plain formula; two columns are padding, one target does not count."""
    rng = np.random.default_rng(0)
    x_BTD, head_DV = rng.normal(size=(2, 3, 8)).astype(np.float32), rng.normal(size=(8, 12)).astype(np.float32) * 3
    targets_BT = np.array([[1, 9, -1], [0, 3, 3]])

    def plain(x_BTD, head_DV):
        logits = (x_BTD @ head_DV)[..., :10]
        logp = jax.nn.log_softmax(logits if cap is None else cap * jnp.tanh(logits / cap))
        nats = -jnp.take_along_axis(logp, jnp.maximum(targets_BT, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(targets_BT >= 0, nats, 0.0)

    def ours(x_BTD, head_DV):
        return losses.cross_entropy(x_BTD, head_DV, targets_BT, 10, cap)

    np.testing.assert_allclose(ours(x_BTD, head_DV), plain(x_BTD, head_DV), rtol=0, atol=1e-5)
    gradients = [jax.grad(lambda x, h, f=f: (f(x, h) ** 2).sum(), (0, 1))(x_BTD, head_DV) for f in (ours, plain)]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-3), *gradients)


def test_dropout(tiny_params):
    tokens_BT = np.random.default_rng(0).integers(0, TINY.vocab_size, (4, 16))

    @jax.jit
    def run(key):
        return trunk(tiny_params, TINY, tokens_BT, dropout_key=key)[0]

    off, _ = trunk(tiny_params, TINY, tokens_BT)
    one, again, other = run(jax.random.key(1)), run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1
    assert np.abs(one - off).max() > 0.1


def test_dropped_attention_without_dropping_is_attention(tiny_params):
    """The branch with dropout on weights has its own attention: at a vanishing rate both agree."""
    tokens_BT = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 16))
    segments_BT = np.repeat([0, 1], 8)[None].repeat(2, axis=0)
    barely = replace(TINY, dropout=1e-9)
    with_branch, _ = trunk(tiny_params, barely, tokens_BT, segment_ids_BT=segments_BT, dropout_key=jax.random.key(0))
    without, _ = trunk(tiny_params, TINY, tokens_BT, segment_ids_BT=segments_BT)
    np.testing.assert_allclose(with_branch, without, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("preset", ["gpt2", "char"])
def test_parameter_counts(preset, bias):
    cfg = replace(PRESETS[preset].model, bias=bias)
    shapes = jax.eval_shape(lambda: model.init_params(jax.random.key(0), cfg, FLOAT32))
    assert cfg.param_counts()["total"] == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def test_sizes_of_the_published_models():
    """124, 355, 774 and 1558 million, without the padding of the vocabulary."""
    sizes = {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
    }
    for name, size in sizes.items():
        cfg = replace(PRESETS[name].model, bias=True)
        padding = (cfg.padded_vocab_size - cfg.vocab_size) * cfg.n_embd
        assert cfg.param_counts()["total"] - padding == size


def test_initialisation(tiny_params):
    """nanoGPT's: 0.02 everywhere, projections into the residual stream smaller, so that its variance stays 1."""
    wide = model.init_params(
        jax.random.key(0), GPT2Config(sequence_len=64, vocab_size=64, n_layer=2, n_head=2, n_embd=128), FLOAT32
    )
    block = wide["block_1"]
    assert np.std(wide["wte"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(block["q"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(block["fc_proj"]["kernel"]) == pytest.approx(0.01, rel=0.05)
    assert not np.any(block["q"]["bias"])
    assert np.all(block["ln_1"]["scale"] == 1)
    assert "bias" not in tiny_params["block_0"]["q"]
    assert "bias" not in tiny_params["ln_f"]


def test_schedule():
    """nanoGPT's get_lr, at its edges."""
    multiplier = gpt2.lr_multiplier(1000, GPT2OptimConfig(warmup_steps=100))
    expected = {0: 1 / 101, 99: 100 / 101, 100: 1.0, 550: 0.55, 1000: 0.1, 5000: 0.1}
    for step, value in expected.items():
        assert float(multiplier(step)) == pytest.approx(value, rel=1e-5)


def test_optimizer_against_adamw_by_hand():
    """Four steps in float64 NumPy: clipping of the global norm, bias correction, decay of matrices only."""
    rng, cfg, steps = np.random.default_rng(0), GPT2OptimConfig(learning_rate=0.01, warmup_steps=2), 4
    ours = {"matrix": rng.normal(size=(3, 4)).astype(np.float32), "vector": rng.normal(size=5).astype(np.float32)}
    theirs = {name: x.astype(np.float64) for name, x in ours.items()}
    moments = {name: np.zeros((2, *x.shape)) for name, x in theirs.items()}
    tx = gpt2.make_gpt2_optimizer(cfg, steps)
    state, multiplier = tx.init(ours), gpt2.lr_multiplier(steps, cfg)
    for step in range(steps):
        grads = {name: rng.normal(size=x.shape).astype(np.float32) * 10 ** (step - 2) for name, x in ours.items()}
        updates, state = tx.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        scale = min(1, 1 / math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values())))
        for name, x in theirs.items():
            g, (m, v) = grads[name].astype(np.float64) * scale, moments[name]
            m[:], v[:] = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            direction = (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-8)
            decay = 0.1 * x if x.ndim > 1 else 0
            theirs[name] = x - 0.01 * float(multiplier(step)) * (direction + decay)
    for name, x in theirs.items():
        np.testing.assert_allclose(ours[name], x, rtol=0, atol=2e-6)


def test_learns(tiny_params):
    """A sequence by heart, with dropout on."""
    tokens_BT = np.random.default_rng(0).integers(0, TINY.vocab_size, (1, 17))
    tx = gpt2.make_gpt2_optimizer(GPT2OptimConfig(learning_rate=0.01, warmup_steps=5), 150)

    @jax.jit
    def step(params, state, key):
        grads = jax.grad(mean_loss)(params, TINY, tokens_BT, key)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = tiny_params, tx.init(tiny_params)
    for key in jax.random.split(jax.random.key(0), 150):
        params, state = step(params, state, key)
    loss = jax.jit(mean_loss, static_argnums=1)
    assert loss(tiny_params, TINY, tokens_BT) > 2.5
    assert loss(params, TINY, tokens_BT) < 0.3


def test_config_from_json_tells_the_architectures_apart():
    assert model.config_from_json(to_json(TINY)) == TINY
    cfg = model.ModelConfig()
    assert model.config_from_json(to_json(cfg)) == cfg


@pytest.mark.parametrize(
    ("field", "value"), [("n_layer", 0), ("n_head", 5), ("dropout", 1.0), ("dropout", -0.1), ("vocab_size", -1)]
)
def test_bad_config(field, value):
    with pytest.raises(UserError, match=f"{field}={value}"):
        GPT2Config(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("learning_rate", -1.0), ("grad_clip", 0.0), ("beta2", 1.0)])
def test_bad_optimizer(field, value):
    with pytest.raises(UserError, match=f"{field}={value}"):
        GPT2OptimConfig(**{field: value})


@pytest.mark.torch
@pytest.mark.parametrize("seed", range(3))
def test_logits_live(seed):
    """The comparison of the fixture with what is installed, for other sizes and weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"n_positions": 32 + seed, "vocab_size": 64 + seed, "n_layer": 2, "n_head": 2, "n_embd": 32}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    tokens_BT = np.random.default_rng(seed).integers(0, sizes["vocab_size"], (2, sizes["n_positions"]))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens_BT)).logits.numpy()
    cfg = GPT2Config(*sizes.values())
    params = params_from_gpt2({name: x.numpy() for name, x in theirs.state_dict().items()}, cfg)
    logits = model.forward(params, cfg, tokens_BT, compute=FLOAT32)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=LOGITS_ATOL)
