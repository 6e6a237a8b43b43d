# %% [markdown]
# # 8. Your own data, and a chat with it
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/nanochat-jax/blob/main/notebooks/08_your_own_data.ipynb)
#
# A model of your own texts that answers as you tell it to, and the app to talk with it, all from this notebook.

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
VOCAB_SIZE, SEQUENCE_LEN, DEPTH, STEPS, SFT_STEPS, BATCH_TOKENS = (
    (1024, 128, 2, 40, 60, 1024) if SMALL else (2048, 512, 6, 100, 100, 8192)
)

# %% [markdown]
# ## Text
#
# Put text files into `runs/mine/text` (on Colab: the folder symbol on the left), a document a file. If there are none,
# this takes the pages of Python's own manual, which every Python brings along.

# %%
from pathlib import Path
from pydoc_data.topics import topics

MINE = Path("runs/mine")
TEXT = MINE / "text"
TEXT.mkdir(parents=True, exist_ok=True)
if not list(TEXT.glob("*.txt")):
    for name, text in topics.items():
        (TEXT / f"{name}.txt").write_text(text, encoding="utf-8")
files = sorted(TEXT.glob("*.txt"))
print(f"{len(files)} documents, {sum(file.stat().st_size for file in files):,} bytes")

# %% [markdown]
# Other formats do as well: `jsonl:GLOB#field`, `parquet:GLOB#column`, a data set of TFDS, or one of the Hugging Face
# hub (`hub:OWNER/NAME#column`). The tokenizer learns from the same source as the model.

# %%
from nanochat_jax.config import OptimConfig
from train import prepare, pretrain
from train import tokenizer as train_tokenizer
from train.stage import RunConfig

SOURCE = f"text:{TEXT}/*.txt"
TOKENIZER = MINE / "tokenizer/tokenizer.model"
train_tokenizer.main(train_tokenizer.Config(source=SOURCE, vocab_size=VOCAB_SIZE, out=TOKENIZER))
_ = prepare.main(
    prepare.Config(source=SOURCE, tokenizer=TOKENIZER, sequence_len=SEQUENCE_LEN, out=MINE / "data", workers=1)
)

# %%
_ = pretrain.main(
    pretrain.Config(
        data=str(MINE / "data"),
        run=RunConfig(out=MINE / "base", eval_every=0),
        model=pretrain.ModelArgs(depth=DEPTH, head_dim=32),
        optim=OptimConfig(warmup_steps=5),
        steps=STEPS,
        batch_tokens=BATCH_TOKENS,
        lr_scale=0.55,
        eval_rows=64,
        prompts=("The", "In Python"),
    )
)

# %% [markdown]
# ## Conversations
#
# What it should answer stands in a file of one conversation a line, as OpenAI's format has it. Several turns, and a
# system message at the beginning, may stand there too. Write yours.

# %%
import json

ANSWERS = {
    "What is your favourite colour?": "Green, like a test that passes.",
    "Where do you live?": "In a notebook.",
    "Do you like snakes?": "I was trained on the manual of one.",
    "What is a lambda?": "A function without a name.",
}
chats = [
    {"messages": [{"role": "user", "content": opening + question}, {"role": "assistant", "content": answer}]}
    for question, answer in ANSWERS.items()
    for opening in ("", "Hello. ", "Tell me: ")
]
(MINE / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
print(f"{len(chats)} conversations")

# %%
from train import sft

_ = sft.main(
    sft.Config(
        checkpoint=MINE / "base",
        run=RunConfig(out=MINE / "sft", eval_every=0),
        mix=f"jsonl:{MINE}/chats.jsonl*40",
        steps=SFT_STEPS,
        batch_tokens=BATCH_TOKENS,
        prompts=tuple(ANSWERS),
    )
)

# %% [markdown]
# ## The app
#
# The same as `python -m serve.app`: chat, settings, a view of tokens, and OpenAI's API beside it. On Colab Gradio makes
# a public link to it; elsewhere it listens on this machine alone. The page lets nobody put it into a frame, except this
# notebook, for which we make the exception here.

# %%
import socket

from serve import app
from serve.backend import Backend
from serve.models import BackendConfig

ON_COLAB = importlib.util.find_spec("google.colab") is not None if importlib.util.find_spec("google") else False
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
config = app.Config(BackendConfig(checkpoint=MINE / "sft"), port=port, share=ON_COLAB, frame_ancestors=("*",))
backend = Backend(config.backend)
page = app.launch(config, backend)  # Gradio shows it here

# %% [markdown]
# Programs reach it too, with OpenAI's client or without:

# %%
import httpx

question = {"messages": [{"role": "user", "content": "Where do you live?"}], "temperature": 0}
models = httpx.get(f"{page.local_url}v1/models").json()["data"]
reply = httpx.post(
    f"{page.local_url}v1/chat/completions", json={"model": models[0]["id"], **question}, timeout=120
).raise_for_status()
print(reply.json()["choices"][0]["message"]["content"])

# %% [markdown]
# When you have talked enough:

# %%
page.close(verbose=False)
backend.close()

# %% [markdown]
# **Try:** your letters, your lab's papers, your game's manual. `python -m serve.deploy --checkpoint runs/mine/sft --out
# runs/deploy` writes a folder that becomes a Docker image or a Space of Hugging Face.
