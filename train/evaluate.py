"""Measure a trained model: bits per byte of held-out text, beside what simpler methods need; samples; CORE; chat tasks.

    python -m train.evaluate --checkpoint runs/demo/base --data runs/demo/data
    python -m train.evaluate --checkpoint runs/demo/base --suite core
    python -m train.evaluate --checkpoint runs/demo/sft --tasks chatcore,spelling --examples 200

docs/evaluation.md says what the figures mean.

The results go to evaluation.json in the checkpoint's folder, those of --step N to evaluation-N.json. What was measured
before on the same checkpoint and data is not measured again, unless with --force; texts and chat tasks are kept one by
one, also where several commands measure at once.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nanochat_jax import hosts, sharding
from nanochat_jax.config import to_json, write_json
from nanochat_jax.errors import UserError
from nanochat_jax.files import as_path, locked
from nanochat_jax.load import load_model
from nanochat_jax.sharding import MeshConfig
from train import cli
from train.stage import at_least
from train.suites import SUITES, Subject


@dataclass(frozen=True)
class Config:
    checkpoint: Path
    """Folder of a training run."""
    data: str | None = None
    """What bpb measures on: a folder made by train.prepare with the model's tokenizer (its validation split), a text
    file, or a source as train.prepare takes it, such as jsonl:'held_out/*.jsonl#text'."""
    suite: str | None = None
    """What to measure, separated by commas: core (CORE's tasks for base models), bpb (bits per byte), sample (texts the
    model writes), chat (tasks of a chat model); default: bpb,sample where --data is given, chat where it is not."""
    step: int | None = None
    """Checkpoint to use, with results of its own; default: the newest good one."""
    rows: int = 8
    """Sequences of the model's length that one device computes at a time; of shorter ones more."""
    bundle: Path | None = None
    """For core: folder of the tasks' files, as unzipped; default: downloaded once."""
    force: bool = False
    """Measure again what is there already."""
    tasks: str = "spelling,counting,arithmetic,identity,refusals"
    """For chat: names of tasks, separated by commas; chatcore stands for the five of ChatCORE. NAME=SOURCE, such as
    gsm8k=jsonl:data/gsm8k_{split}.jsonl, reads a task's examples from there and not from the hub."""
    examples: int = 0
    """For core and chat: take so many examples of each task, the first; 0 for all."""
    slots: int = 32
    """For chat: answers that one device samples at a time."""
    max_new_tokens: int = 512
    """For chat: tokens of an answer at most, within the model's context."""

    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("examples", 0), ("slots", 1), ("max_new_tokens", 1)):
            at_least(name.replace("_", "-"), getattr(self, name), least)
        if unknown := set(self.suites) - set(SUITES):
            raise UserError(f"unknown suite {sorted(unknown)[0]!r}; choose from {', '.join(SUITES)}")
        if "bpb" in self.suites and self.data is None:
            raise UserError(
                "suite bpb measures on held-out text: add --data, a folder that train.prepare made or a text file"
            )

    @property
    def suites(self) -> list[str]:
        return (self.suite or ("bpb,sample" if self.data else "chat")).split(",")


def main(config: Config) -> dict[str, Any]:
    """Measure, print, store and return."""
    hosts.agree(config=config)
    mesh = sharding.make_mesh(config.mesh)
    loaded = load_model(config.checkpoint, step=config.step, mesh=mesh)
    folder, is_first = as_path(config.checkpoint), hosts.is_first()
    path = folder / ("evaluation.json" if config.step is None else f"evaluation-{config.step}.json")
    identity = {"step": loaded.step, "fingerprint": loaded.stored.fingerprint}

    def keep(results: dict[str, Any]) -> dict[str, Any]:
        """What is stored, and these results; not under the run's own lock, which its training may hold."""
        with locked(folder / "checkpoints", wait=True):
            suites = _stored(path, identity)
            for name, result in results.items():
                suites[name] = SUITES[name].merge(suites.get(name, {}), result)
            write_json(path, {"config": to_json(config), **identity, "suites": suites})
        return suites

    suites = hosts.first(lambda: _stored(path, identity))
    say = print if is_first else lambda *_: None  # one host speaks, and writes, for all
    say(f"{config.checkpoint}, step {loaded.step:,}{f', on {config.data}' if config.data else ''}")
    for name in config.suites:
        note = "measured before on this checkpoint (--force repeats it), "
        with sharding.on(mesh):
            for result in SUITES[name].measure(Subject(config, mesh, loaded), suites.get(name, {})):
                suites, note = hosts.first(partial(keep, {name: result})), ""
        say(f"\n{name}: {note}took {suites[name]['seconds']:.1f} s")
        if is_first:
            SUITES[name].show(suites[name])
    return {"config": to_json(config), **identity, "suites": hosts.first(partial(keep, {}))}


def _stored(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Suites already measured on the very same checkpoint; what cannot be read is measured again."""
    try:
        stored = json.loads(path.read_text())
        return dict(stored["suites"]) if all(stored[key] == value for key, value in identity.items()) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


if __name__ == "__main__":
    cli.run(main, Config)
