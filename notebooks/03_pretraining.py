# %% [markdown]
# # 3. Pretraining on one GPU
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/nanochat-jax/blob/main/notebooks/03_pretraining.ipynb)
#
# A model learns to continue text by guessing every next token of a lot of it. Here one does so while we watch: the loss
# as it falls, what the model writes as it learns, and what happens when the machine goes down in the middle.

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
import os

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leaves memory of the GPU to a second process, further below

import jax

SMALL = jax.default_backend() == "cpu"
VOCAB_SIZE, SEQUENCE_LEN, DEPTH, STEPS, BATCH_TOKENS = (
    (1024, 256, 2, 60, 2048) if SMALL else (4096, 1024, 8, 200, 32768)
)

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
# A row of a batch is a stretch of tokens, and its targets are the same tokens, one place further.

# %%
from nanochat_jax.data.pretrain import open_split
from nanochat_jax.tokenizer import load

tok = load(RUNS / "tokenizer/tokenizer.model")
row = open_split(RUNS / "data", "train").row(0)
for token, target in zip(row["tokens"][:8], row["targets"][:8], strict=True):
    print(f"{tok.decode([token])!r:>15} → {tok.decode([target])!r}")

# %% [markdown]
# ## What it would take
#
# The depth decides everything, by scaling laws: tokens, batch, rates. Below is what it asks for, and how long one H100
# would need at 40 % of its peak: arithmetic, not a measurement. Our model here is far smaller, and stops far earlier.

# %%
from nanochat_jax.config import from_depth, horizon

print("depth   parameters    tokens      FLOPs   H100 hours")
for depth in (4, 8, 12, 16, 20):
    cfg = from_depth(depth)
    length = horizon(cfg)
    flops = length.target_tokens * cfg.flops_per_token()
    print(
        f"{depth:5} {cfg.param_counts()['total'] / 1e6:10,.0f} M {length.target_tokens / 1e9:7.2f} G {flops:10.1e} "
        f"{flops / (0.4 * 989e12) / 3600:10.1f}"
    )

# %% [markdown]
# ## Training, watched
#
# `pretrain.main` is what `python -m train.pretrain` runs, and a config is its command line. It runs in a thread, and
# writes every step's numbers into a file, which we draw while it grows.

# %%
import time
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
from IPython.display import clear_output, display

from nanochat_jax.metrics import read_metrics
from train import pretrain
from train.stage import RunConfig


def config(name: str) -> pretrain.Config:
    return pretrain.Config(
        data=str(RUNS / "data"),
        run=RunConfig(out=RUNS / name, eval_every=STEPS // 4, save_every=STEPS // 4, keep_newest=10, resume="auto"),
        model=pretrain.ModelArgs(depth=DEPTH, head_dim=32),
        steps=STEPS,
        batch_tokens=BATCH_TOKENS,
        lr_scale=0.55,
        eval_rows=64,
        prompts=(),
    )


def draw(folder: Path, title: str) -> plt.Figure:
    """The curves of a run, as far as it has come."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4))
    for axis, name, style in ((left, "loss", "-"), (left, "val_loss", "o"), (right, "val_bpb", "o-")):
        points = [(record["step"], record[name]) for record in read_metrics(folder) if name in record]
        axis.plot(*zip(*points, strict=True) if points else ([], []), style, label=name)
    left.set(xlim=(0, STEPS), xlabel="step", ylabel="nats a token", title=title)
    right.set(xlim=(0, STEPS), xlabel="step", ylabel="bits per byte", title="held-out text")
    left.legend()
    figure.tight_layout()
    plt.close(figure)
    return figure


with ThreadPoolExecutor(1) as thread:
    training = thread.submit(pretrain.main, config("watched"))
    while not training.done():
        time.sleep(3)
        clear_output(wait=True)
        display(draw(RUNS / "watched", "training …"))
result = training.result()
clear_output(wait=True)
display(draw(RUNS / "watched", f"{STEPS} steps of {BATCH_TOKENS:,} tokens"))

# %% [markdown]
# ## As it learns
#
# Checkpoints lie in the run's folder; each holds the model, the optimizer and the tokenizer. We open those on the way,
# and let each continue the same words, with the same seed.

# %%
from nanochat_jax.generate import continue_texts
from nanochat_jax.load import load_model
from nanochat_jax.sampling import Sampling

PROMPT = "The people of the United States"
for step in range(STEPS // 4, STEPS + 1, STEPS // 4):
    then = load_model(RUNS / "watched", step=step)
    how = Sampling(temperature=0.8, top_k=50, seed=1)
    (text,) = continue_texts(then.params, then.cfg, tok, [PROMPT], max_new_tokens=40, sampling=how)
    print(f"after {step} steps:\n    {PROMPT}│{text!r}\n")

# %% [markdown]
# ## Killed, and gone on
#
# The same training again, now as a process of its own, from the command line. In the middle of it we pull the plug:
# `SIGKILL`, which no program can catch, as when a machine goes down.

# %%
import subprocess
import sys

import train

out, plan = RUNS / "killed", config("killed")
command = [sys.executable, "-m", "train.pretrain", "--data", plan.data, "--run.out", str(out)]
command += ["--model.depth", str(DEPTH), "--model.head-dim", "32", "--steps", str(STEPS)]
command += ["--batch-tokens", str(BATCH_TOKENS), "--lr-scale", "0.55", "--eval-rows", "64"]
command += ["--run.eval-every", str(STEPS // 4), "--run.save-every", str(STEPS // 4), "--run.keep-newest", "10"]
root = str(Path(train.__file__).parent.parent)
print(*command[1:])
process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": root}, stderr=subprocess.DEVNULL)
while process.poll() is None and not any(record["step"] >= STEPS * 2 // 3 for record in read_metrics(out)):
    time.sleep(0.05)
process.kill()
process.wait()
print(f"killed: the log ends at step {read_metrics(out)[-1]['step']}")

# %% [markdown]
# The same again, and it goes on from the last checkpoint. The order of the data is a function of the step, and the
# checkpoint holds everything else, so that the result is the one that was never interrupted: on the same CPU to the
# last bit, on a GPU too with `deterministic`, and there without it but for the order of sums.

# %%
resumed = pretrain.main(plan)

loss = {
    name: {r["step"]: r["loss"] for r in read_metrics(RUNS / name) if "loss" in r} for name in ("watched", "killed")
}
figure, axis = plt.subplots(figsize=(8, 3))
axis.plot(loss["watched"].keys(), loss["watched"].values(), linewidth=5, alpha=0.4, label="never interrupted")
axis.plot(loss["killed"].keys(), loss["killed"].values(), "k--", linewidth=1, label="killed and gone on")
axis.set(xlabel="step", ylabel="nats a token")
axis.legend()
figure.tight_layout()

# %%
same = jax.tree.map(lambda a, b: bool((a == b).all()), result.state.params, resumed.state.params)
print("bitwise the same:", all(jax.tree.leaves(same)))
assert all(jax.tree.leaves(same)) or not SMALL

# %% [markdown]
# **Try:** another seed (`seed=1`) in `config`, and see how far apart two runs end. The same tokens in steps half as
# large. On a GPU: `--model.depth 12`, left to its scaling law. Next: [Muon](04_muon.ipynb).
