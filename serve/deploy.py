"""Write a folder that serves a model elsewhere: a Docker image, or a Space of Hugging Face, is built in it.

    python -m serve.deploy --checkpoint runs/demo/rl --out runs/deploy
    docker build -t nanochat runs/deploy && docker run --rm -p 7860:7860 nanochat
    hf auth login && hf upload NAME/nanochat runs/deploy . --repo-type space

It holds the program, what train/setup.sh installs, and the model without its optimizer's state.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.errors import UserError
from nanochat_jax.load import load_model
from train import cli

ROOT = Path(__file__).parent.parent
CONTENT = ("nanochat_jax", "serve", "train", "requirements.txt", "constraints.txt", "LICENSE")
SPACE = """---
title: {title}
emoji: 💬
colorFrom: gray
colorTo: green
sdk: docker
app_port: 7860
---

A small language model, trained and served with nanochat-jax. It can be wrong. What you write is not kept.
"""


@dataclass(frozen=True)
class Config:
    checkpoint: Path
    """Folder of the run to serve."""
    out: Path
    """Folder to write, which must not exist."""
    title: str = "nanochat"
    """Name of the Space."""


def main(config: Config) -> Path:
    """Write the folder, and return it."""
    if config.out.exists():
        raise UserError(f"--out {config.out} exists; remove it, or choose another folder")
    loaded, run = load_model(config.checkpoint), config.checkpoint.resolve()
    stored = loaded.stored.checkpoint
    unfinished = config.out.with_name(f".{config.out.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        for name in CONTENT:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, unfinished / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, unfinished)
        shutil.move(unfinished / "serve" / "Dockerfile", unfinished)
        (unfinished / "README.md").write_text(SPACE.format(title=config.title), encoding="utf-8")
        with Checkpoints(unfinished / "runs" / run.parent.name / run.name / "checkpoints") as checkpoints:
            checkpoints.save(loaded.step, {"params": loaded.params}, meta=stored.meta, tokenizer=stored.tokenizer)
        unfinished.rename(config.out)
    except OSError as error:
        raise UserError(f"cannot write {config.out}: {error.strerror}; free some space or choose another") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"wrote {config.out}; next: docker build -t nanochat {config.out}")
    return config.out


if __name__ == "__main__":
    cli.run(main, Config)
