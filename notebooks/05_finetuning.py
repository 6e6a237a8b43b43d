# %% [markdown]
# # 5. From a model that continues to one that answers: SFT, DPO, RL
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/nanochat-jax/blob/main/notebooks/05_finetuning.ipynb)
#
# A pretrained model goes on with any text. Three more stages make it answer: it imitates conversations (SFT), prefers
# its right answers to its wrong ones (DPO), and is rewarded for what was right (RL). We watch it learn who it is.

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
# Sizes that suit a CPU, and larger ones where there is a GPU or a TPU. The small ones teach one thing only.

# %%
import jax

SMALL = jax.default_backend() == "cpu"
if SMALL:
    VOCAB_SIZE, SEQUENCE_LEN, DEPTH, STEPS, BATCH_TOKENS = 1024, 128, 2, 40, 1024
    MIX, TASKS, SFT_STEPS, DPO_STEPS, RL_STEPS, ANSWER_TOKENS = "task:identity*8", "identity", 45, 6, 24, 32
else:
    VOCAB_SIZE, SEQUENCE_LEN, DEPTH, STEPS, BATCH_TOKENS = 4096, 512, 8, 300, 16384
    MIX = "task:identity*14,task:arithmetic#20000,task:mental-arithmetic#20000,task:refusals*8,chatterbot"
    TASKS, SFT_STEPS, DPO_STEPS, RL_STEPS, ANSWER_TOKENS = "identity,arithmetic", 400, 16, 40, 48

# %% [markdown]
# ## A base model
#
# Shortly pretrained, as [before](03_pretraining.ipynb), with room for conversations.

# %%
from pathlib import Path

from nanochat_jax.config import OptimConfig
from train import prepare, pretrain
from train import tokenizer as train_tokenizer
from train.stage import RunConfig

RUNS = Path("runs/answers")
train_tokenizer.main(
    train_tokenizer.Config(vocab_size=VOCAB_SIZE, max_bytes=4_000_000, out=RUNS / "tokenizer/tokenizer.model")
)
_ = prepare.main(
    prepare.Config(tokenizer=RUNS / "tokenizer/tokenizer.model", sequence_len=SEQUENCE_LEN, out=RUNS / "data")
)
_ = pretrain.main(
    pretrain.Config(
        data=str(RUNS / "data"),
        run=RunConfig(out=RUNS / "base", eval_every=0),
        model=pretrain.ModelArgs(depth=DEPTH, head_dim=32),
        optim=OptimConfig(warmup_steps=5),
        steps=STEPS,
        batch_tokens=BATCH_TOKENS,
        lr_scale=0.55,
        eval_rows=64,
        prompts=(),
    )
)

# %% [markdown]
# ## A conversation, as the model sees it
#
# One row of tokens. Only what stands on green counts in the loss: the model learns to answer, not to ask.

# %%
import html

from IPython.display import HTML

from nanochat_jax.chat import conversation, parse, render, render_prompt, visible_text
from nanochat_jax.load import load_model

base = load_model(RUNS / "base")
tok = base.tokenizer
names = {token: name for name, token in tok.control.items()}
rendered = render(conversation("Who are you?", "I am nanochat."), tok)
spans = [
    f'<span style="background:{"#b7e4c7" if supervised else "#eee"};color:#000;margin:1px">'
    f"{html.escape(names.get(token) or tok.decode([token]))}</span>"
    for token, supervised in zip(*rendered, strict=True)
]
HTML(f'<div style="font:14px/2 monospace;white-space:pre-wrap">{"<wbr>".join(spans)}</div>')

# %% [markdown]
# Before: it has never seen these tokens, and babbles.

# %%
from nanochat_jax.engine import Request
from nanochat_jax.rollouts import make_engine
from nanochat_jax.sampling import Sampling

QUESTIONS = ("Who are you?", "Who made you?", "Could you introduce yourself?", "What are you?")


def answers(name: str) -> list[str]:
    """What the model of a run says to the questions, always the likeliest token."""
    loaded = load_model(RUNS / name)
    engine = make_engine(loaded.params, loaded.cfg, tok, loaded.compute, slots=len(QUESTIONS))
    end = [tok.control["<|assistant_end|>"]]
    requests = [
        Request(render_prompt(conversation(question), tok), ANSWER_TOKENS, Sampling(temperature=0), stop_tokens=end)
        for question in QUESTIONS
    ]
    return [visible_text(parse(output.tokens, tok)) for output in engine.run(requests)]


said = {"base": answers("base")}
for question, text in zip(QUESTIONS, said["base"], strict=True):
    print(f"> {question}\n{text!r}")

# %% [markdown]
# ## SFT: imitate
#
# Examples of questions and answers, packed into rows, and the same loss as ever.

# %%
from train import sft

_ = sft.main(
    sft.Config(
        checkpoint=RUNS / "base",
        run=RunConfig(out=RUNS / "sft", eval_every=0),
        mix=MIX,
        steps=SFT_STEPS,
        batch_tokens=BATCH_TOKENS,
        prompts=(),
    )
)
said["SFT"] = answers("sft")

# %% [markdown]
# ## DPO: prefer
#
# The model answers some questions several times. A judge tells right from wrong, and each pair of a right answer and a
# wrong one is a lesson: make the first likelier than the second, compared with how likely they were.

# %%
import json

from train import dpo, pairs

pairs.main(
    pairs.Config(
        checkpoint=RUNS / "sft",
        out=RUNS / "pairs.jsonl",
        tasks=TASKS,
        examples=100 if SMALL else 600,
        max_new_tokens=ANSWER_TOKENS,
    )
)
for line in (RUNS / "pairs.jsonl").read_text().splitlines()[:3]:
    pair = json.loads(line)
    print(f"> {pair['prompt'][-1]['content']}")
    for which in ("chosen", "rejected"):
        print(f"{which:>9}: {visible_text(pair[which])!r}")

# %%
_ = dpo.main(
    dpo.Config(
        checkpoint=RUNS / "sft",
        run=RunConfig(out=RUNS / "dpo", eval_every=0),
        pairs=f"jsonl:{RUNS / 'pairs.jsonl'}",
        steps=DPO_STEPS,
        batch_pairs=16 if SMALL else 32,
    )
)
said["DPO"] = answers("dpo")

# %% [markdown]
# ## RL: be rewarded
#
# Each question is answered several times, and each answer gets a reward of 1 or 0. What was better than the mean of its
# question becomes likelier, what was worse less likely. No example says how: only the judge.

# %%
import matplotlib.pyplot as plt

from nanochat_jax.metrics import read_metrics
from train import rl

_ = rl.main(
    rl.Config(
        checkpoint=RUNS / "dpo",
        run=RunConfig(out=RUNS / "rl", eval_every=0),
        task=TASKS,
        prompts_per_step=8 if SMALL else 16,
        samples=8,
        steps=RL_STEPS,
        lr_fraction=0.5 if SMALL else 0.1,
        max_new_tokens=ANSWER_TOKENS,
        slots=32,
        eval_examples=24,
        eval_samples=0,
    )
)
said["RL"] = answers("rl")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2))
losses = [(record["step"], record["loss"]) for record in read_metrics(RUNS / "sft") if "loss" in record]
left.plot(*zip(*losses, strict=True))
left.set(title="SFT: loss of the answers", xlabel="step", ylabel="nats a token", ylim=0)
rewards = [(record["step"], record["reward"]) for record in read_metrics(RUNS / "rl") if "reward" in record]
right.plot(*zip(*rewards, strict=True), "o-", label="answers of the step")
checked = [(record["step"], record["val_accuracy"]) for record in read_metrics(RUNS / "rl") if "val_accuracy" in record]
right.plot(*zip(*checked, strict=True), "s--", label="held-out questions, likeliest answer")
right.set(title="RL: share of right answers", xlabel="step", ylim=(-0.02, 1.02))
right.legend()
figure.tight_layout()

# %% [markdown]
# ## Before and after
#
# Read what it says, beside the curve. The judge of these questions looks for the right name in the answer and asks for
# nothing else, so that is what is learnt, in whatever way is found first.

# %%
rows = "".join(
    f"<tr><td>{html.escape(question)}</td>"
    + "".join(f"<td>{html.escape(said[name][i])}</td>" for name in said)
    + "</tr>"
    for i, question in enumerate(QUESTIONS)
)
HTML(f"<table><tr><th></th>{''.join(f'<th>{name}</th>' for name in said)}</tr>{rows}</table>")

# %% [markdown]
# **Try:** be somebody else: `identity.toml` in `nanochat_jax/tasks/` says who the model is. On a GPU, look at what
# becomes of the calculator: SFT shows arithmetic with and without it, and only one of the two earns a reward. Next:
# [generation](06_generation.ipynb).
