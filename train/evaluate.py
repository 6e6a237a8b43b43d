"""Measure a trained model: bits per byte of held-out text, beside what simpler methods need, and samples.

    python -m train.evaluate --checkpoint runs/demo/base --data runs/demo/data

The results go to evaluation.json in the checkpoint's folder. Suites measured before on the same checkpoint and data
are not measured again, unless with --force.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from nanochat_jax import sharding
from nanochat_jax.config import to_json, write_json
from nanochat_jax.data.batches import validation_batches
from nanochat_jax.data.pretrain import Records, open_split
from nanochat_jax.errors import UserError
from nanochat_jax.eval.baselines import baselines
from nanochat_jax.eval.bpb import make_evaluator
from nanochat_jax.generate import continue_texts, usable_prompts
from nanochat_jax.load import LoadedModel, load_model
from nanochat_jax.sampling import Sampling
from train import cli

PROMPTS = ("", "", "The", "My fellow citizens", "In the year")  # the empty ones leave the model free to begin
SAMPLE_TOKENS = 96
SAMPLING = Sampling(temperature=0.8, top_k=50)


@dataclass(frozen=True)
class Config:
    checkpoint: Path
    """Folder of a training run."""
    data: Path
    """Folder made by train.prepare, with the same tokenizer; its validation split is measured on."""
    suite: str = "bpb,sample"
    """What to measure, separated by commas: bpb (bits per byte), sample (texts the model writes)."""
    step: int | None = None
    """Checkpoint to use; default: the newest good one."""
    rows: int = 8
    """Sequences that one device computes at a time."""
    force: bool = False
    """Measure again what is there already."""


@dataclass(frozen=True)
class Subject:
    """What is measured, and on what."""

    config: Config
    mesh: jax.sharding.Mesh
    model: LoadedModel
    train: Records
    val: Records


def measure_bpb(subject: Subject) -> dict[str, Any]:
    """Bits per byte of the whole validation split: the model's and the baselines'."""
    tok, val, mesh = subject.model.tokenizer, subject.val, subject.mesh
    rows = subject.config.rows * sharding.batch_devices(mesh)
    evaluate = make_evaluator(subject.model.cfg, tok.byte_lengths, subject.model.compute)
    batches = validation_batches(val, rows, process_index=jax.process_index(), process_count=jax.process_count())
    progress = tqdm(batches, desc="bits per byte", unit="batch", total=math.ceil(len(val) / rows), disable=None)
    measured = evaluate(subject.model.params, (sharding.put_batch(mesh, batch) for batch in progress))
    return {
        "bytes": measured.bytes,
        "tokens": measured.tokens,
        "loss_nats_per_token": measured.loss,
        "bits_per_byte": {"this model": measured.bpb, **baselines(subject.train, val, tok)},
    }


def show_bpb(result: dict[str, Any]) -> None:
    (_, model), *others = result["bits_per_byte"].items()
    print(f"held-out text: {result['bytes']:,} bytes, {result['tokens']:,} tokens\n")
    print(f"{'':16}{'bits per byte':>15}{'against the model':>20}")
    for name, value in result["bits_per_byte"].items():
        print(f"{name:16}{value:15.4f}{value / model:19.2f}×")
    better = [name for name, value in others if value <= model]
    print(f"\nthe model {'does not beat ' + ', '.join(better) if better else 'beats all of them'}")


def write_samples(subject: Subject) -> dict[str, Any]:
    """How the model begins on its own, and how it continues a few prompts."""
    loaded = subject.model
    prompts = usable_prompts(loaded.cfg, loaded.tokenizer, PROMPTS)
    texts = continue_texts(
        loaded.params,
        loaded.cfg,
        loaded.tokenizer,
        prompts,
        max_new_tokens=SAMPLE_TOKENS,
        sampling=[replace(SAMPLING, seed=seed) for seed in range(len(prompts))],
        compute=loaded.compute,
    )
    samples = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
    return {"sampling": to_json(SAMPLING), "samples": samples}


def show_samples(result: dict[str, Any]) -> None:
    for sample in result["samples"]:
        print(f"  {sample['prompt']}│{sample['text']}\n")


class Suite(NamedTuple):
    measure: Callable[[Subject], dict[str, Any]]
    show: Callable[[dict[str, Any]], None]


SUITES = {"bpb": Suite(measure_bpb, show_bpb), "sample": Suite(write_samples, show_samples)}


def main(config: Config) -> dict[str, Any]:
    """Measure, print, store and return."""
    names = config.suite.split(",")
    if unknown := set(names) - set(SUITES):
        raise UserError(f"unknown suite {sorted(unknown)[0]!r}; choose from {', '.join(SUITES)}")
    if config.rows < 1:
        raise UserError(f"rows={config.rows} must be at least 1")
    mesh = sharding.make_mesh()
    loaded = load_model(config.checkpoint, step=config.step, mesh=mesh)
    train, val = (
        open_split(config.data, split, tokenizer_sha256=loaded.tokenizer.sha256, sequence_len=loaded.cfg.sequence_len)
        for split in ("train", "val")
    )
    path = config.checkpoint / "evaluation.json"
    identity = {"step": loaded.step, "data": val.manifest.fingerprint, "recipe": loaded.stored.recipe}
    suites = _stored(path, identity)
    print(f"{config.checkpoint}, step {loaded.step:,}, on {config.data}")
    for name in names:
        if name in suites and not config.force:
            print(f"\n{name}: measured before on this checkpoint and data (--force repeats it)")
        else:
            started = time.perf_counter()
            suites[name] = SUITES[name].measure(Subject(config, mesh, loaded, train, val))
            suites[name]["seconds"] = round(time.perf_counter() - started, 2)
            print(f"\n{name}: took {suites[name]['seconds']:.1f} s")
        SUITES[name].show(suites[name])
    evaluation = {"config": to_json(config), **identity, "suites": suites}
    write_json(path, evaluation)
    return evaluation


def _stored(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Suites already measured on the very same checkpoint and data; what cannot be read is measured again."""
    try:
        stored = json.loads(path.read_text())
        return stored["suites"] if all(stored[key] == value for key, value in identity.items()) else {}
    except (OSError, ValueError, KeyError):
        return {}


if __name__ == "__main__":
    cli.run(main, Config)
