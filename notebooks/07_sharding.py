# %% [markdown]
# # 7. Sharding: one program, many devices
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/nanochat-jax/blob/main/notebooks/07_sharding.ipynb)
#
# A model that does not fit one device, or is too slow on one, is cut over many. In JAX the program stays the same: one
# says where arrays lie, and the compiler adds what the devices must tell each other. Eight virtual devices of a CPU
# behave like eight real ones, so all of this runs anywhere.

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

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax

DEVICES = jax.devices()
print(DEVICES)

# %% [markdown]
# ## A mesh
#
# The devices become a grid with three named axes: `data` holds copies of the parameters, `fsdp` cuts them, and both
# share the rows of a batch; `tensor` cuts heads, MLP channels and vocabulary.

# %%
from nanochat_jax import sharding
from nanochat_jax.sharding import MeshConfig, make_mesh

mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
print(dict(mesh.shape))

# %% [markdown]
# ## Where an array lies
#
# Each axis of an array may be cut along axes of the mesh. Devices with the same part hold copies of it.

# %%
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def place(*spec) -> jax.Array:
    return jax.device_put(jnp.zeros((1024, 1024)), NamedSharding(mesh, PartitionSpec(*spec)))


print("rows over fsdp, columns over tensor; copies along data:")
jax.debug.visualize_array_sharding(place("fsdp", "tensor"))
print("rows over data and fsdp, as a batch lies; copies along tensor:")
jax.debug.visualize_array_sharding(place(("data", "fsdp"), None))

# %% [markdown]
# ## What the compiler adds
#
# A product whose inner axis is cut gives each device a part of every sum. Nothing in the program says so, but the
# compiled one has an `all-reduce`. If the outer axis is cut, nobody needs to talk.

# %%
import re
from collections import Counter

COLLECTIVES = re.compile(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def collectives(compiled: jax.stages.Compiled) -> Counter:
    """How often each kind of communication occurs in a compiled program."""
    return Counter(COLLECTIVES.findall(compiled.as_text()))


product = jax.jit(lambda x, y: x @ y)
for x, y in ((place(None, "tensor"), place("tensor", None)), (place("fsdp", None), place(None, "tensor"))):
    compiled = product.lower(x, y).compile()
    print(f"{x.sharding.spec} @ {y.sharding.spec}: {dict(collectives(compiled)) or 'nothing to say'}")

# %% [markdown]
# ## The model
#
# Parameters name their axes; a table says which of them `tensor` cuts, and one function finds the place for `fsdp`. The
# optimizer's moments are cut over `data` too, as nobody needs all of them.

# %%
from nanochat_jax import model, optim, state
from nanochat_jax.config import Horizon, ModelConfig, OptimConfig
from nanochat_jax.layers import Compute

cfg = ModelConfig(sequence_len=128, vocab_size=512, n_layer=2, n_head=4, n_kv_head=4, n_embd=256)
compute = Compute()
tx = optim.make_optimizer(cfg, Horizon(20, 2048, 0, 0.5, 0.0), OptimConfig(warmup_steps=1), compute.dtype)


def init(key: jax.Array) -> model.Params:
    return model.init_params(key, cfg, compute)


def abstract(mesh: jax.sharding.Mesh) -> state.TrainState:
    """Shapes and places of everything that training carries, without making it."""
    return state.abstract_state(init, tx, model.logical_axes(cfg), mesh)


for path, leaf in jax.tree_util.tree_leaves_with_path(abstract(mesh).params):
    name = "/".join(key.key for key in path)
    if name.startswith("block_0") or "/" not in name:
        print(f"{name:28} {leaf.shape!s:13} {leaf.sharding.spec}")

# %% [markdown]
# ## Four ways to use eight devices
#
# The same training step, compiled for four meshes: what a device holds, and what it says. `tensor` talks within every
# layer, forward and backward; `fsdp` gathers parameters for every product; `data` talks once a step, when it hands each
# device its part of the summed gradients, and puts the new parameters together. `all-to-all`
# is Muon's: matrices travel so that each is whole on one device while it is orthogonalised.

# %%
import matplotlib.pyplot as plt
import numpy as np

from train.pretrain import language_model_loss

MESHES = {
    "one device": make_mesh(devices=DEVICES[:1]),
    "data 8": make_mesh(MeshConfig(data=8, fsdp=1, tensor=1)),
    "fsdp 8": make_mesh(MeshConfig(data=1, fsdp=8, tensor=1)),
    "2 × 2 × 2": mesh,
}
tokens_BT = np.random.default_rng(0).integers(0, cfg.vocab_size, (16, cfg.sequence_len), np.int32)
rows = {"tokens": tokens_BT, "targets": np.roll(tokens_BT, -1, axis=1)}
mebibytes, said, losses = {}, {}, {}
for name, on in MESHES.items():
    like = abstract(on)
    held = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(like)]
    sizes = [np.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(held, jax.tree.leaves(like), strict=True)]
    mebibytes[name] = sum(sizes) / 2**20
    batch = sharding.put_batch(on, rows, accumulate=1)
    step = state.make_train_step(language_model_loss(cfg, compute), tx, like, seed=0).lower(like, batch).compile()
    said[name] = collectives(step)
    make = jax.jit(lambda key: state.new_state(init(key), tx), out_shardings=jax.tree.map(lambda s: s.sharding, like))
    now, losses[name] = make(jax.random.key(0)), []
    for _ in range(3):
        now, metrics = step(now, batch)
        losses[name].append(float(metrics.loss))

kinds = sorted({kind for counts in said.values() for kind in counts})
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.4))
left.bar(list(mebibytes), list(mebibytes.values()))
left.set(title="parameters and moments of one device", ylabel="MiB")
below = np.zeros(len(said))
for kind in kinds:
    heights = np.array([counts[kind] for counts in said.values()])
    right.bar(list(said), heights, bottom=below, label=kind)
    below += heights
right.set(title="collectives in the compiled step", ylabel="how many")
right.legend()
figure.tight_layout()

# %% [markdown]
# Whatever the mesh, the training is the same, but for the order in which numbers are added.

# %%
for name, values in losses.items():
    print(f"{name:12}", *(f"{value:.5f}" for value in values))
assert all(np.allclose(values, losses["one device"], rtol=1e-3) for values in losses.values())

# %% [markdown]
# ## From here to a pod
#
# On a TPU pod slice the same command runs on every host at once; JAX finds the others, each host reads its own rows,
# and the mesh spans all chips:
#
# ```bash
# python -m train.pretrain --data gs://BUCKET/data --run.out gs://BUCKET/run --model.depth 20 --run.mesh.fsdp 4
# ```
#
# Links within a slice are fast, those between slices slow: `data`, which talks least, goes over the slow ones.
#
# **Try:** `tensor=8`: four heads do not divide by it, and stay whole. A matrix that `fsdp` does not divide. Next:
# [your own data](08_your_own_data.ipynb).
