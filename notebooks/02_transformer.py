# %% [markdown]
# # 2. The transformer, piece by piece
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/nanochat-jax/blob/main/notebooks/02_transformer.ipynb)
#
# The whole model is one file, `nanochat_jax/model.py`, of small functions of arrays. Here we call them one by one, look
# at what they do, and then look inside a model that has learnt a little.
#
# Names of arrays end in their axes: B rows of a batch, T positions, D channels, N heads, H channels of a head,
# V tokens of the vocabulary.

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
# ## One dial
#
# The depth sets everything else: 64 channels a layer, heads of 128 channels, and with them parameters and compute.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from nanochat_jax.config import from_depth

print("depth  width  heads   parameters  FLOPs a token")
for depth in (4, 12, 20, 32):
    cfg = from_depth(depth)
    total, flops = cfg.param_counts()["total"], cfg.flops_per_token()
    print(f"{depth:5} {cfg.n_embd:6} {cfg.n_head:6} {total / 1e6:10,.0f} M {flops / 1e9:12.2f} G")

# %% [markdown]
# ## Normed, without parameters
#
# `rms_norm` scales every position's channels to a root mean square of 1. It stands before every product.

# %%
from nanochat_jax import layers

x_TD = jnp.array([[3.0, 4.0], [300.0, 400.0], [-0.01, 0.02]])
print(layers.rms_norm(x_TD))

# %% [markdown]
# ## Positions by turning
#
# Rotary embeddings turn pairs of a head's channels by an angle that grows with the position. What remains of the
# product of a query and an equal key depends on their distance alone.

# %%
T, H = 257, 128
ones_BTNH = jnp.ones((1, T, 1, H))
rotation = layers.rotary(jnp.arange(T)[None], H, jnp.float32)
turned_TH = layers.rotate_and_norm(ones_BTNH, *rotation, 1.0)[0, :, 0]
score_TT = turned_TH @ turned_TH.T / H

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(2, 1))
left.plot(score_TT[-1, ::-1])
left.set(xlabel="distance of the key", ylabel="cosine", title="the same query and key, further and further apart")
right.imshow(score_TT, cmap="RdBu", vmin=-1, vmax=1)
right.set(xlabel="key", ylabel="query", title="only the distance counts")
figure.tight_layout()

# %% [markdown]
# ## Attention
#
# Each position asks a question (its query) of the positions up to it. Products of the query with their keys, through a
# softmax, are weights; what it gets are their values, averaged by these weights. That is all of it, and `attend` does
# it in pieces, without a table of all weights.

# %%
from nanochat_jax import attention

T, N, H = 6, 2, 4
q_BTNH, k_BTNH, v_BTNH = jax.random.normal(jax.random.key(0), (3, 1, T, N, H))
score_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH) / H**0.5
past_TS = jnp.tril(jnp.ones((T, T), bool))
weight_BNTS = jax.nn.softmax(jnp.where(past_TS, score_BNTS, -jnp.inf), axis=-1)
by_hand_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weight_BNTS, v_BTNH)
print(f"queries {q_BTNH.shape} · keys {k_BTNH.shape} → weights {weight_BNTS.shape}; · values → {by_hand_BTNH.shape}")
assert jnp.allclose(by_hand_BTNH, attention.attend(q_BTNH, k_BTNH, v_BTNH, window=T), atol=1e-5)
print(np.asarray(weight_BNTS[0, 0]).round(2))

# %% [markdown]
# ## Windows
#
# Most layers look back a quarter of the sequence only (S), every fourth and the last at all of it (L). That saves time
# and memory, and hardly costs any loss: what is further away reaches a position by way of those between.

# %%
cfg = from_depth(8, sequence_len=512)
position = np.arange(cfg.sequence_len)
distance = position[:, None] - position[None]
figure, axes = plt.subplots(1, cfg.n_layer, figsize=(13, 2.1), sharey=True)
for number, (axis, spec) in enumerate(zip(axes, cfg.layer_specs(), strict=True)):
    axis.imshow((distance >= 0) & (distance <= spec.window), cmap="Blues", vmax=1.4)
    axis.set(title=f"layer {number}: {spec.window}", xticks=[], yticks=[])
axes[0].set_ylabel("query")
axes[0].set_xlabel("key")
figure.tight_layout()

# %% [markdown]
# ## The squared ReLU
#
# Between the two products of an MLP stands relu(x)². What it sets to zero takes no part for that token.

# %%
line = jnp.linspace(-2, 2, 200)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3))
left.plot(line, jax.nn.relu(line), label="ReLU")
left.plot(line, layers.relu2(line), label="ReLU²")
left.plot(line, jax.nn.gelu(line), label="GELU, for comparison")
left.set(title="activation")
left.legend()

from nanochat_jax.losses import softcap

line = jnp.linspace(-60, 60, 200)
right.plot(line, line, ":", label="raw")
right.plot(line, softcap(line, layers.LOGIT_CAP), label="capped")
right.set(title=f"logits are bent into ±{layers.LOGIT_CAP:.0f}", ylim=(-40, 40))
right.legend()
figure.tight_layout()

# %% [markdown]
# ## A small trained model
#
# Tokenizer, data and a short pretraining, as [the next notebook](03_pretraining.ipynb) explains them. What is there
# already is not made again.

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
loaded = load_model(RUNS / "base")
params, cfg, tok = loaded.params, loaded.cfg, loaded.tokenizer
for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = "/".join(key.key for key in path)
    if "block" not in name or "block_0" in name:
        print(f"{name:30} {leaf.shape!s:14} {leaf.size:9,}")
print(f"… and {cfg.n_layer - 1} more blocks: {cfg.param_counts()['total']:,} parameters in all")

# %% [markdown]
# ## What it expects
#
# `forward` gives logits for every position at once: (B, T) tokens in, (B, T, V) numbers out. Below, each token is the
# redder, the less the model expected it after what stands before it. `Compute()` is float32 on plain XLA, as suits a
# look.

# %%
import html
from functools import partial

from IPython.display import HTML

from nanochat_jax import model

TEXT = "My fellow citizens, the Congress of the United States has the power to pass laws. The Congress of the United"
tokens_T = np.array([tok.bos, *tok.encode(TEXT)], np.int32)
forward = jax.jit(partial(model.forward, cfg=cfg, compute=layers.Compute()))
logits_TV = forward(params, tokens_BT=tokens_T[None])[0]
print(f"tokens {tokens_T.shape} → logits {logits_TV.shape}")
nats_T = -jnp.take_along_axis(jax.nn.log_softmax(logits_TV[:-1]), tokens_T[1:, None], axis=1)[:, 0]
words = [tok.decode([token]) for token in tokens_T[1:]]
spans = [
    f'<span style="background:rgba(220,50,32,{min(float(nats) / 8, 1):.2f});white-space:pre">{html.escape(word)}</span>'
    for word, nats in zip(words, nats_T, strict=True)
]
HTML(f'<div style="font:15px/1.8 monospace">{"<wbr>".join(spans)}</div>')

# %% [markdown]
# An untrained model expects every token alike: its loss is the logarithm of the size of the vocabulary.

# %%
untrained = model.init_params(jax.random.key(0), cfg)
nats = jax.jit(partial(model.token_nats, cfg=cfg, compute=layers.Compute()))
first = nats(untrained, tokens_BT=tokens_T[None, :-1], targets_BT=tokens_T[None, 1:]).mean()
print(f"untrained {first:.3f} nats a token, log({cfg.vocab_size}) = {np.log(cfg.vocab_size):.3f}")
print(f"trained   {nats_T.mean():.3f}")

# %% [markdown]
# ## Attention maps
#
# To look inside, we put a spy in the place of `attention.attend`: it notes queries and keys, and passes them on.

# %%
from unittest import mock

seen = []


def spy(q_BTNH, k_BTKH, v_BTKH, *, window, **options):
    seen.append((q_BTNH[0], k_BTKH[0], window))
    return attend(q_BTNH, k_BTKH, v_BTKH, window=window, **options)


attend = attention.attend
with mock.patch.object(attention, "attend", spy):
    model.trunk(params, cfg, tokens_T[None], compute=layers.Compute())
position = np.arange(len(tokens_T))
distance = position[:, None] - position[None]
maps = []
for q_TNH, k_TNH, window in seen:
    score_NTT = jnp.einsum("TNH,SNH->NTS", q_TNH, k_TNH) / cfg.head_dim**0.5
    maps.append(jax.nn.softmax(jnp.where((distance >= 0) & (distance <= window), score_NTT, -jnp.inf), axis=-1))

figure, axes = plt.subplots(cfg.n_layer, cfg.n_head, figsize=(2 * cfg.n_head, 2 * cfg.n_layer), squeeze=False)
for layer, head in np.ndindex(axes.shape):
    axes[layer, head].imshow(np.sqrt(maps[layer][head]), cmap="magma", vmin=0, vmax=1)
    axes[layer, head].set(title=f"layer {layer}, head {head}", xticks=[], yticks=[])
figure.tight_layout()

# %% [markdown]
# Heads that look at one place, rather than at everything alike, are the ones that have learnt something. Here is the
# sharpest of them, with its words (the root of the weights is shown, so that small ones can be seen).

# %%
sharpness = [float(jnp.sort(map_NTT[head], axis=-1)[10:, -1].mean()) for map_NTT in maps for head in range(cfg.n_head)]
layer, head = divmod(int(np.argmax(sharpness)), cfg.n_head)
labels = ["<bos>", *words]
figure, axis = plt.subplots(figsize=(8, 7))
axis.imshow(np.sqrt(maps[layer][head]), cmap="magma", vmin=0, vmax=1)
axis.set_xticks(position, labels, rotation=90, fontsize=7)
axis.set_yticks(position, labels, fontsize=7)
axis.set(title=f"layer {layer}, head {head}", xlabel="is looked at", ylabel="looks")
figure.tight_layout()

# %% [markdown]
# ## Gates
#
# Every second layer adds a second embedding of the token itself to the values that attention mixes, through a gate from
# 0 to 3 for each head. And *smear* lets each position take in a little of the token before it. The spy stands in front
# of `layers.linear` this time, and knows the gates by their shapes.

# %%
from nanochat_jax.config import SMEAR_CHANNELS, VE_GATE_CHANNELS

gates = []


def spy(x, kernel_IO, **options):
    y = linear(x, kernel_IO, **options)
    if kernel_IO.shape[0] in (VE_GATE_CHANNELS, SMEAR_CHANNELS):
        gates.append((kernel_IO.shape[0], jax.nn.sigmoid(y[0])))
    return y


linear = layers.linear
with mock.patch.object(layers, "linear", spy):
    model.trunk(params, cfg, tokens_T[None], compute=layers.Compute())
rows = [params["smear_lambda"][0] * gate.T for channels, gate in gates if channels == SMEAR_CHANNELS]
value_gates = [3 * gate.T for channels, gate in gates if channels == VE_GATE_CHANNELS]
with_values = [i for i, spec in enumerate(cfg.layer_specs()) if spec.has_value_embed]

figure, axes = plt.subplots(1 + len(value_gates), 1, figsize=(12, 1.2 + 1.7 * len(value_gates)), sharex=True)
for axis, gate, title in zip(
    axes, [*rows, *value_gates], ["smear", *(f"value gates of layer {i}" for i in with_values)], strict=True
):
    image = axis.imshow(gate, cmap="PuOr", aspect="auto")
    axis.set(title=title, yticks=range(len(gate)), ylabel="head" if len(gate) > 1 else "")
    figure.colorbar(image, pad=0.01)
axes[-1].set_xticks(position, labels, rotation=90, fontsize=7)
figure.tight_layout()

# %% [markdown]
# ## The residual stream
#
# Before each block the stream is scaled, and some of the first embedding is added again; before the end, some of what
# it was midway is taken away. The dotted line is where these numbers began.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 2.8))
for axis, name in zip(axes, ("resid_lambdas", "x0_lambdas"), strict=True):
    axis.plot(params[name], "o-", label="learnt")
    axis.plot(untrained[name], ":", label="at first")
    axis.set(title=name, xlabel="layer", xticks=range(cfg.n_layer))
axes[0].legend()
figure.tight_layout()
print(f"backout_lambda: {untrained['backout_lambda'][0]:.2f} at first, {params['backout_lambda'][0]:.2f} learnt")

# %% [markdown]
# **Try:** a text of your own in `TEXT`, with a name that occurs twice. A deeper `DEPTH`, and more `STEPS` (with another
# folder in `RUNS`): from when on does a head find the first occurrence? Next: [pretraining](03_pretraining.ipynb).
