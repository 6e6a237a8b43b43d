# %% [markdown]
# # 6. Generation: the key-value cache and sampling
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/nanochat-jax/blob/main/notebooks/06_generation.ipynb)
#
# A model gives probabilities of one next token. To write, it is asked again and again. This notebook is about asking
# fast, about choosing, and about watching the choice ripen from layer to layer.

# %% cellView="form"
# On Colab this installs the library; where it is importable already, it does nothing.
import importlib.util
import shutil
import subprocess
import sys

REPO = "https://github.com/OWNER/nanochat-jax"  # @param {type: "string"}
sys.path.append("..")  # in a clone the library lies beside notebooks/
if importlib.util.find_spec("nanochat_jax") is None:
    assert "OWNER" not in REPO, "write the address of the repository that this notebook came from into REPO"
    extra = "cuda12" if shutil.which("nvidia-smi") else "tpu" if importlib.util.find_spec("libtpu") else "cpu"
    packages = [f"nanochat-jax @ git+{REPO}", f"jax[{extra}]"]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *packages], check=True)

# %% [markdown]
# Sizes that suit a CPU, and larger ones where there is a GPU or a TPU.

# %%
import jax

SMALL = jax.default_backend() == "cpu"
VOCAB_SIZE, SEQUENCE_LEN, DEPTH, STEPS, BATCH_TOKENS = (
    (1024, 256, 3, 120, 1024) if SMALL else (4096, 1024, 8, 200, 32768)
)

# %% [markdown]
# ## A small trained model
#
# The one of [the second notebook](02_transformer.ipynb): what is there already is not made again.

# %%
from pathlib import Path

from nanochat_jax.config import OptimConfig
from nanochat_jax.load import load_model
from train import prepare, pretrain
from train import tokenizer as train_tokenizer
from train.stage import RunConfig

RUNS = Path("runs/notebooks")
train_tokenizer.main(
    train_tokenizer.Config(vocab_size=VOCAB_SIZE, max_bytes=4_000_000, out=RUNS / "tokenizer/tokenizer.model")
)
prepare.main(prepare.Config(tokenizer=RUNS / "tokenizer/tokenizer.model", sequence_len=SEQUENCE_LEN, out=RUNS / "data"))
_ = pretrain.main(
    pretrain.Config(
        data=str(RUNS / "data"),
        run=RunConfig(out=RUNS / "base", eval_every=0),
        model=pretrain.ModelArgs(depth=DEPTH, head_dim=32),
        steps=STEPS,
        batch_tokens=BATCH_TOKENS,
        lr_scale=0.55,
        optim=OptimConfig(matrix_lr=0.04, warmup_steps=10),
        eval_rows=64,
        prompts=("My fellow citizens",),
    )
)

# %%
import matplotlib.pyplot as plt
import numpy as np

from nanochat_jax import model

loaded = load_model(RUNS / "base")
params, cfg, tok, compute = loaded.params, loaded.cfg, loaded.tokenizer, loaded.compute
PROMPT = [tok.bos, *tok.encode("The Congress of the United States")]

# %% [markdown]
# ## Nothing is computed twice
#
# A position's keys and values do not depend on what comes later. The cache keeps them, so that a new token is one
# position's work. Layers with a short window keep a ring of so many slots, and overwrite the oldest.

# %%
from nanochat_jax.cache import init_cache

cache = init_cache(cfg, batch=1, dtype=compute.dtype)
for number, keys_BKSH in enumerate(cache.keys):
    print(f"layer {number}: keys {keys_BKSH.shape} (rows, heads, slots, channels)")
total = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
print(f"{total / 1024:.0f} KiB for a conversation of {cfg.sequence_len} tokens")

# %% [markdown]
# Cached or not, the answer is the same, but for rounding. Here the prompt goes in as two pieces.

# %%
from functools import partial

import jax.numpy as jnp

tokens_BT = jnp.array([PROMPT], jnp.int32)
trunk = jax.jit(partial(model.trunk, cfg=cfg, compute=compute))
x_BTD, _ = trunk(params, tokens_BT=tokens_BT)
whole_V = model.unembed(params, cfg, x_BTD)[0, -1]
piece, rest = tokens_BT[:, :4], tokens_BT[:, 4:]
_, cache = trunk(params, tokens_BT=piece, cache=cache)
x_BTD, cache = trunk(params, tokens_BT=rest, cache=cache)
cached_V = model.unembed(params, cfg, x_BTD)[0, -1]
print(f"largest difference of a logit: {float(jnp.abs(whole_V - cached_V).max()):.1e}")
assert jnp.allclose(whole_V, cached_V, atol=1e-3 if compute.dtype == "float32" else 0.2)

# %% [markdown]
# And it is faster, the more so the longer the text.

# %%
import time

from nanochat_jax.generate import next_logits

forward = jax.jit(lambda params, tokens_BT: model.forward(params, cfg, tokens_BT, compute=compute)[:, -1])
step = jax.jit(partial(next_logits, cfg=cfg, compute=compute))


def seconds(call) -> float:
    """The fastest of a few calls, after one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(5):
        started = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - started)
    return min(times)


lengths = [cfg.sequence_len // 8, cfg.sequence_len // 4, cfg.sequence_len // 2, cfg.sequence_len * 3 // 4]
uncached, cached = [], []
one_BT, count_B = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
for length in lengths:
    tokens_BT = jnp.zeros((1, length), jnp.int32)
    uncached.append(1000 * seconds(partial(forward, params, tokens_BT)))
    filled = init_cache(cfg, 1, compute.dtype)._replace(lengths_B=jnp.full(1, length, jnp.int32))
    cached.append(1000 * seconds(partial(step, params, tokens_BT=one_BT, cache=filled, counts_B=count_B)))
figure, axis = plt.subplots(figsize=(6, 3.2))
axis.plot(lengths, uncached, "o-", label="everything anew")
axis.plot(lengths, cached, "o-", label="with the cache")
axis.set(xlabel="tokens so far", ylabel="milliseconds for one more", ylim=0)
axis.legend()
figure.tight_layout()

# %% [markdown]
# ## Many at once
#
# To write one token of one text, all parameters are read from memory, for little arithmetic. Several texts share the
# reading: this is why a server answers many together. Our model is too small to show it, as it fits the processor's
# caches; a wider one, untrained, as only its speed matters, shows it. A GPU gains far more than a few cores.

# %%
from nanochat_jax.config import ModelConfig
from nanochat_jax.generate import generate
from nanochat_jax.sampling import Sampling

wide = ModelConfig(256, cfg.vocab_size, 4, n_head=8, n_kv_head=8, n_embd=512 if SMALL else 1024)
wide_params = model.init_params(jax.random.key(0), wide, compute)
rows, rates = (1, 4, 16), []
for count in rows:
    how = [Sampling(seed=seed) for seed in range(count)]
    call = partial(generate, wide_params, wide, [PROMPT] * count, max_new_tokens=16, sampling=how, compute=compute)
    rates.append(sum(map(len, call())) / seconds(call))
figure, axis = plt.subplots(figsize=(6, 2.8))
axis.plot(rows, rates, "o-")
axis.set(xlabel="texts at once", ylabel="tokens a second, together", ylim=0, xticks=rows)
figure.tight_layout()

# %% [markdown]
# ## Temperature
#
# Logits are divided by it before they become probabilities: below 1 the likely gets likelier, above 1 everything gets
# more alike, and 0 always takes the likeliest.

# %%
order = np.argsort(-np.asarray(whole_V))[:15]
names = [repr(tok.decode([token])) for token in order]
figure, axes = plt.subplots(1, 3, figsize=(12, 3), sharey=True)
for axis, temperature in zip(axes, (0.5, 1.0, 2.0), strict=True):
    axis.bar(names, jax.nn.softmax(whole_V / temperature)[order])
    axis.set(title=f"temperature {temperature}")
    axis.tick_params(axis="x", rotation=90)
axes[0].set_ylabel("probability")
figure.tight_layout()

# %% [markdown]
# ## Cutting off the tail
#
# Hundreds of unlikely tokens are together not unlikely. `top_k` keeps the k likeliest, `top_p` the fewest that together
# reach a probability, `min_p` those not too far below the likeliest. We let the library's sampler choose 4,000 times.

# %%
from nanochat_jax.sampling import SamplingArrays, choose, uniforms

DRAWS = 4000


@jax.jit
def draw(logits_V, how: SamplingArrays):
    """One token for each of the rows of `how`, all from the same logits."""
    logits_BV = jnp.broadcast_to(logits_V, (DRAWS, logits_V.size))
    uniforms_B = uniforms(how.seed_B, jnp.zeros((DRAWS, 1), jnp.int32))[:, 0]
    return choose(logits_BV, how, uniforms_B, jnp.zeros_like(logits_BV, bool))


kinds = {
    "everything": {},
    "top_k = 5": {"top_k": 5},
    "top_p = 0.5": {"top_p": 0.5},
    "min_p = 0.1": {"min_p": 0.1},
}
figure, axes = plt.subplots(1, len(kinds), figsize=(13, 2.8), sharey=True)
for axis, (title, limits) in zip(axes, kinds.items(), strict=True):
    drawn = np.asarray(draw(whole_V, SamplingArrays.of([Sampling(seed=seed, **limits) for seed in range(DRAWS)])))
    counts = np.bincount(drawn, minlength=cfg.vocab_size)
    axis.bar(names, counts[order] / DRAWS)
    axis.set(title=f"{title}: {np.count_nonzero(counts)} tokens")
    axis.tick_params(axis="x", rotation=90)
axes[0].set_ylabel("how often")
figure.tight_layout()

# %% [markdown]
# What it does to the text:

# %%
from nanochat_jax.generate import continue_texts

ways = {
    "the likeliest": Sampling(temperature=0),
    "the likeliest, repetition penalised": Sampling(temperature=0, repetition_penalty=1.3),
    "temperature 0.7, top_k 50": Sampling(temperature=0.7, top_k=50),
    "temperature 1": Sampling(),
    "temperature 1.5": Sampling(temperature=1.5),
}
prompt = "The Congress of the United States"
texts = continue_texts(params, cfg, tok, [prompt] * len(ways), max_new_tokens=32, sampling=list(ways.values()))
for name, text in zip(ways, texts, strict=True):
    print(f"{name}:\n    {prompt}│{text!r}\n")

# %% [markdown]
# The same seed gives the same text, alone or among others: a token's random number is a function of the seed and the
# token's position, and of nothing else.

# %%
alone = continue_texts(params, cfg, tok, [prompt], max_new_tokens=32, sampling=[ways["temperature 1"]])
assert alone[0] == texts[list(ways).index("temperature 1")]

# %% [markdown]
# ## The logit lens
#
# What would the model say if it stopped early? Every block reads and writes the same stream, so the last product can be
# applied after any of them. A spy in the place of the blocks' norms sees the stream go by;
# `Compute()` is float32 on plain XLA, as suits a look.

# %%
from unittest import mock

from nanochat_jax import layers

seen = []


def spy(x_BTD, uses):
    seen.append(x_BTD)
    return layers.keep_and_norm(x_BTD, uses)


words = [tok.bos, *tok.encode("My fellow citizens, the Congress of the United States has the power")]
with mock.patch.object(layers, "PLAIN", layers.PLAIN._replace(keep_and_norm=spy)):
    end_BTD, _ = model.trunk(params, cfg, jnp.array([words], jnp.int32), compute=layers.Compute())
# Every block has two norms, for attention and MLP; what comes out of the trunk is normed.
stages = {f"into layer {i}": layers.rms_norm(seen[2 * i]) for i in range(cfg.n_layer)} | {"at the end": end_BTD}

figure, axis = plt.subplots(figsize=(12, 1.2 + 0.5 * len(stages)))
probs = [jax.nn.softmax(model.unembed(params, cfg, x_BTD)[0]) for x_BTD in stages.values()]
axis.imshow([probs_TV.max(axis=-1) for probs_TV in probs], cmap="Greens", vmin=0, vmax=0.8, aspect="auto")
for row, probs_TV in enumerate(probs):
    for column, token in enumerate(np.asarray(probs_TV.argmax(axis=-1))):
        colour = "white" if probs_TV[column, token] > 0.5 else "black"
        axis.text(column, row, tok.decode([token]).strip(), ha="center", va="center", fontsize=9, color=colour)
axis.set_xticks(range(len(words)), ["<bos>", *(tok.decode([token]) for token in words[1:])], rotation=45)
axis.set_yticks(range(len(stages)), list(stages))
axis.set_xlabel("after this token, the likeliest next one; the greener, the surer")
figure.tight_layout()

# %% [markdown]
# A young model knows pairs of words first, and those are in its embeddings: most guesses stand from the beginning. What
# the layers add shows in the loss on held-out text, if the stream is read after each.

# %%
from nanochat_jax.data.pretrain import open_split

row = open_split(RUNS / "data", "val").row(0)
seen.clear()
with mock.patch.object(layers, "PLAIN", layers.PLAIN._replace(keep_and_norm=spy)):
    end_BTD, _ = model.trunk(params, cfg, row["tokens"][None], compute=layers.Compute())
losses = []
for x_BTD in (*map(layers.rms_norm, seen[::2]), end_BTD):
    logprobs_TV = jax.nn.log_softmax(model.unembed(params, cfg, x_BTD)[0])
    losses.append(-float(jnp.take_along_axis(logprobs_TV, row["targets"][:, None], axis=1).mean()))
figure, axis = plt.subplots(figsize=(7, 2.8))
axis.plot(list(stages), losses, "o-")
axis.set(ylabel="nats a token", title="loss, if the model ended here")
figure.tight_layout()

# %% [markdown]
# **Try:** a longer training (`STEPS`, with another folder in `RUNS`): do more layers agree with the end? Which
# temperature writes best to your taste? Next: [sharding](07_sharding.ipynb).
