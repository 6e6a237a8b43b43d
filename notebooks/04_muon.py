# %% [markdown]
# # 4. Muon and the schedules, seen
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/nanochat-jax/blob/main/notebooks/04_muon.ipynb)
#
# Most of the model's parameters are matrices inside the blocks. Muon trains them: it takes the gradient's momentum and
# makes all its singular values alike, so that every direction of a matrix learns at one pace. Everything else (tables,
# gates, scalars) is left to AdamW.

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
VOCAB_SIZE, SEQUENCE_LEN, WIDTH, LAYERS, STEPS, ROWS = (
    (1024, 256, 96, 3, 150, 2) if SMALL else (4096, 1024, 512, 8, 150, 16)
)

# %% [markdown]
# ## Singular values, made alike
#
# A matrix whose singular values span three orders of magnitude goes in. What comes out has the same directions, and
# nearly one length in all but the weakest of them.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from nanochat_jax import muon

SIZE = 128
left_II, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (SIZE, SIZE)))
right_OO, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (SIZE, SIZE)))
x_IO = (left_II * jnp.logspace(0, -3, SIZE)) @ right_OO
y_IO = muon.orthogonalize(x_IO[None])[0]


def spectrum(matrix: jax.Array) -> np.ndarray:
    """Singular values, the largest first."""
    return np.linalg.svd(np.asarray(matrix, np.float32), compute_uv=False)


figure, axis = plt.subplots(figsize=(7, 3.2))
axis.semilogy(spectrum(x_IO), label="before")
axis.semilogy(spectrum(y_IO), label="after")
axis.set(xlabel="number of the singular value", ylabel="its size")
axis.legend()
figure.tight_layout()

# %% [markdown]
# ## Five polynomials
#
# No singular value is ever computed. An odd polynomial of a matrix, p(X) = aX + b(XXᵀ)X + c(XXᵀ)²X, acts on each of
# them alone, and takes three products. Five well-chosen ones after each other lift whatever is above a thousandth to
# about 1.

# %%
s = s_next = jnp.logspace(-4, 0, 400)
figure, axis = plt.subplots(figsize=(7, 3.2))
for number, (a, b, c) in enumerate(muon.POLAR_EXPRESS):
    s_next = a * s_next + b * s_next**3 + c * s_next**5
    axis.semilogx(s, s_next, label=f"after {number + 1}", alpha=0.4 + 0.15 * number)
axis.axhline(1, color="k", linewidth=0.5)
axis.set(xlabel="singular value that goes in", ylabel="comes out")
axis.legend()
figure.tight_layout()

# %% [markdown]
# ## Tokenizer and data
#
# Text becomes tokens once, and tokens become records of a fixed length. What is there already is not made again.

# %%
from pathlib import Path

from train import prepare
from train import tokenizer as train_tokenizer

RUNS = Path("runs/notebooks")
train_tokenizer.main(
    train_tokenizer.Config(vocab_size=VOCAB_SIZE, max_bytes=4_000_000, out=RUNS / "tokenizer/tokenizer.model")
)
_ = prepare.main(
    prepare.Config(tokenizer=RUNS / "tokenizer/tokenizer.model", sequence_len=SEQUENCE_LEN, out=RUNS / "data")
)

# %% [markdown]
# ## A real gradient
#
# The gradient of a model's first step is dominated by a few directions. So is momentum later on, and plain descent
# would hardly move in the others.

# %%
from nanochat_jax import model, sharding, state
from nanochat_jax.config import Horizon, ModelConfig, OptimConfig
from nanochat_jax.data.batches import batches
from nanochat_jax.data.pretrain import open_split
from nanochat_jax.layers import default_compute
from train.pretrain import language_model_loss

compute = default_compute()
rows = open_split(RUNS / "data", "train")
cfg = ModelConfig(SEQUENCE_LEN, VOCAB_SIZE, LAYERS, n_head=WIDTH // 32, n_kv_head=WIDTH // 32, n_embd=WIDTH)
loss_fn = language_model_loss(cfg, compute)
params = model.init_params(jax.random.key(0), cfg, compute)
# The last products of attention and MLP begin at zero, and would pass no gradient on: give them something.
params = jax.tree.map(lambda p: p if p.any() else 0.02 * jax.random.normal(jax.random.key(1), p.shape, p.dtype), params)
batch = next(batches(rows, batch_size=ROWS, seed=0))
grads, _ = jax.jit(jax.grad(loss_fn, has_aux=True))(params, batch, jax.random.key(0))

names = [("attn", "q"), ("attn", "v"), ("mlp", "fc"), ("mlp", "proj")]
figure, axes = plt.subplots(1, len(names), figsize=(13, 2.8), sharey=True)
for axis, (part, name) in zip(axes, names, strict=True):
    grad_IO = grads["block_0"][part][name]
    for matrix, label in ((grad_IO, "gradient"), (muon.orthogonalize(grad_IO[None])[0], "orthogonalised")):
        values = spectrum(matrix)
        axis.semilogy(values / values[0], label=label)
    axis.set(title=f"{part}/{name} {grad_IO.shape}", ylim=(1e-4, 2), xlabel="singular value")
axes[0].legend()
figure.tight_layout()

# %% [markdown]
# ## The schedules
#
# Rates rise, stay, and fall over the last two thirds. Momentum does likewise; weight decay fades along a cosine.

# %%
from nanochat_jax import optim

LONG, shape = 2000, OptimConfig()
step = jnp.arange(LONG)
figure, axes = plt.subplots(1, 3, figsize=(12, 2.6))
for axis, values, title in zip(
    axes,
    (optim.lr_multiplier(LONG, shape), optim.muon_momentum(LONG, shape), optim.muon_weight_decay(LONG, 0.28)),
    ("factor of the learning rates", "Muon's momentum", "Muon's weight decay"),
    strict=True,
):
    axis.plot(step, jax.vmap(values)(step))
    axis.set(title=title, xlabel="step")
figure.tight_layout()

# %% [markdown]
# ## Does it pay?
#
# The same model, data and schedule, several times: once with Muon for the matrices, and with AdamW for them at three
# rates, so that it is not a bad rate that loses. All else is trained alike.

# %%
import optax

length = Horizon(STEPS, ROWS * SEQUENCE_LEN, 0, lr_scale=0.55, weight_decay=0.0)
numbers = OptimConfig(warmup_steps=STEPS // 10)
mesh = sharding.make_mesh(devices=jax.devices()[:1])
with_muon = optim.make_optimizer(cfg, length, numbers, compute.dtype)


def with_adamw(rate: float) -> optax.GradientTransformation:
    """AdamW for the matrices too."""
    multiplier = optim.lr_multiplier(STEPS, numbers)
    adamw = optax.adamw(lambda step: rate * multiplier(step), 0.9, 0.95, weight_decay=0.0)
    names = optim.parameter_groups(params)
    return optax.partition(
        {True: adamw, False: with_muon},
        jax.tree.map(lambda name: name == "matrices", names),
        mask_compatible_extra_args=True,
    )


def train(tx: optax.GradientTransformation) -> list[float]:
    """Losses of a training from scratch."""

    def init(key: jax.Array) -> model.Params:
        return model.init_params(key, cfg, compute)

    like = state.abstract_state(init, tx, model.logical_axes(cfg), mesh)
    step = state.make_train_step(loss_fn, tx, like, seed=0)
    now, losses = state.new_state(init(jax.random.key(0)), tx), []
    for _, batch in zip(range(STEPS), batches(rows, batch_size=ROWS, seed=0), strict=False):
        now, metrics = step(now, sharding.put_batch(mesh, batch, accumulate=1))
        losses.append(metrics.loss)
    return [float(loss) for loss in losses]


ways = {"Muon": with_muon} | {f"AdamW, rate {rate}": with_adamw(rate) for rate in (0.0003, 0.001, 0.003)}
losses = {name: train(tx) for name, tx in ways.items()}
figure, axis = plt.subplots(figsize=(8, 3.6))
for name, values in losses.items():
    smooth = np.convolve(values, np.ones(10) / 10, "valid")
    axis.plot(np.arange(len(smooth)) + 10, smooth, linewidth=3 if name == "Muon" else 1, label=name)
axis.set(xlabel="step", ylabel="nats a token, mean of ten steps")
axis.legend()
figure.tight_layout()
for name, values in losses.items():
    print(f"{name:18} {np.mean(values[-10:]):.3f} at the end")

# %% [markdown]
# In so short a training most of what is learnt are frequencies and pairs of tokens, which stand in the tables, and
# those are AdamW's here and there: do not expect much of a difference from a CPU's short training.
#
# ## How large its steps are
#
# With AdamW the size of an update depends on the gradient's history; with Muon every matrix moves by about the same,
# by construction: the rate says how far. Here is the length of one update of each matrix, beside the gradient's.

# %%
grads_f32 = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
updates, _ = jax.jit(with_muon.update)(grads_f32, with_muon.init(params), params)
labels, of_gradient, of_update = [], [], []
for part, name in [("attn", "q"), ("attn", "k"), ("attn", "v"), ("attn", "proj"), ("mlp", "fc"), ("mlp", "proj")]:
    for layer in range(cfg.n_layer):
        labels.append(f"{layer} {part}/{name}")
        of_gradient.append(float(jnp.linalg.norm(grads[f"block_{layer}"][part][name])))
        of_update.append(float(jnp.linalg.norm(updates[f"block_{layer}"][part][name])))
figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
for axis, values, title in zip(axes, (of_gradient, of_update), ("of the gradient", "of Muon's update"), strict=True):
    axis.barh(labels, values)
    axis.set(title=f"length {title}")
axes[0].invert_yaxis()
figure.tight_layout()

# %% [markdown]
# **Try:** fewer polynomials in `muon.POLAR_EXPRESS[:3]`. Weight decay in `Horizon`. Does AdamW catch up with more
# steps? Next: [fine-tuning](05_finetuning.ipynb).
