"""Bring a model in from nanochat or GPT-2, or take one out to nanochat.

From a checkpoint folder of nanochat (model_*.pt, meta_*.json, tokenizer.pkl; needs `pip install torch`):

    python -m train.convert --source ~/.cache/nanochat/chatsft_checkpoints/d20 --out runs/d20

From GPT-2 by its name on the Hugging Face hub, or a folder with config.json, model.safetensors, vocab.json, merges.txt:

    python -m train.convert --source gpt2-xl --out runs/gpt2-xl

And back, so that nanochat's own scripts load it:

    python -m train.convert --source runs/d20 --out ~/.cache/nanochat/base_checkpoints/d20 --to nanochat

What comes in is a run like any other: train.sample, train.evaluate and --init-from take its folder, and train.prepare
the tokenizer.model in it. Optimizer state stays behind. The same command completes what was interrupted. Nothing that
is read can run code: pickles are read by restricted readers only.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.config import ModelConfig, to_json, write_json
from nanochat_jax.errors import UserError
from nanochat_jax.files import read_json
from nanochat_jax.gpt2_weights import read_gpt2
from nanochat_jax.interop import Foreign, read_upstream, write_upstream
from nanochat_jax.load import load_model
from train import cli


@dataclass(frozen=True)
class Config:
    source: str
    """What to convert: a folder of nanochat's, GPT-2 by folder or name, or a run of ours."""
    out: Path
    """Folder to write to."""
    to: Literal["run", "nanochat"] = "run"
    """run makes a run of ours; nanochat makes a checkpoint that nanochat loads."""
    step: int | None = None
    """Which checkpoint of the source; default: the newest."""
    tokenizer: Path | None = None
    """nanochat's tokenizer.pkl, where it lies neither in the source nor in nanochat's usual place."""


def main(config: Config) -> Path:
    """Convert, and return the folder that was written."""
    if config.to == "nanochat":
        _to_nanochat(config)
    else:
        _to_run(config)
    return config.out


def _to_run(config: Config) -> None:
    checkpoints, described = Checkpoints(config.out / "checkpoints"), config.out / "config.json"
    tokenizer_path = config.out / "tokenizer.model"
    same = described.exists() and read_json(described) == to_json(config)
    if not same and (described.exists() or checkpoints.steps()):
        raise UserError(f"{config.out} holds another run already; choose another folder")
    if checkpoints.steps() and tokenizer_path.exists():
        print(f"{config.out} is there already, made by the same command")
        return
    model = _read(config)
    recipe = {
        "model": to_json(model.cfg),
        "tokenizer": model.tokenizer.sha256,
        "compute_dtype": model.compute_dtype,
        "source": config.source,
    }
    write_json(described, config)
    model.tokenizer.save(tokenizer_path)
    if not checkpoints.steps():
        with checkpoints:  # last: a run with a checkpoint is taken as it is
            meta = {"stage": "convert", "recipe": recipe, "records": 0}
            checkpoints.save(model.step, {"params": model.params}, meta=meta, tokenizer=model.tokenizer.to_bytes())
    print(f"wrote {config.out}")


def _read(config: Config) -> Foreign:
    folder = Path(config.source)
    if (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} is a run of ours already; did you mean --to nanochat?")
    if next(folder.glob("model_*.pt"), None):
        return read_upstream(folder, step=config.step, tokenizer=config.tokenizer)
    return read_gpt2(config.source)


def _to_nanochat(config: Config) -> None:
    loaded = load_model(Path(config.source), step=config.step)
    if not isinstance(loaded.cfg, ModelConfig):
        raise UserError(f"{config.source} is a GPT-2; nanochat has no such architecture")
    write_upstream(config.out, loaded.params, loaded.cfg, loaded.tokenizer, loaded.step)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    cli.run(main, Config)
