"""What a run left in its folder, read back: what is missing or damaged is left out, and noted."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanochat_jax.checkpoint import Checkpoint, Checkpoints
from nanochat_jax.config import from_json
from nanochat_jax.data.preference import Pair, read_pair
from nanochat_jax.data.rows import Row
from nanochat_jax.errors import UserError
from nanochat_jax.eval import core, held_out
from nanochat_jax.eval.chat import Result, Verdict
from nanochat_jax.files import read_json
from nanochat_jax.metrics import read_metrics

STAGES = ("base", "sft", "dpo", "rl")  # of training, in order; each is a folder


@dataclass(frozen=True)
class StageRun:
    """One stage of training; what there is not is empty."""

    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    checkpoint: Checkpoint | None  # the newest good one
    evaluation: dict[str, Any]

    @property
    def suites(self) -> dict[str, Any]:
        """Results of train.evaluate by the name of the suite."""
        return self.evaluation.get("suites", {})

    @property
    def tasks(self) -> dict[str, Result]:
        """Results of the chat suite."""
        found = _results(self.evaluation, "chat", "tasks", Result)
        return {name: replace(result, samples=_samples(name, result.samples)) for name, result in found.items()}

    @property
    def texts(self) -> dict[str, held_out.Result]:
        """Results of the suite bpb by the name of the text; the first is the one that counts."""
        return _results(self.evaluation, "bpb", "texts", held_out.Result)

    @property
    def core(self) -> dict[str, core.Result]:
        """Results of the suite core."""
        return _results(self.evaluation, "core", "tasks", core.Result)

    @property
    def baselines(self) -> dict[str, float]:
        """Bits per byte of the first text by simpler methods."""
        return next((text.baselines for text in self.texts.values()), {})

    @property
    def bits_per_byte(self) -> float | None:
        """Of the model on held-out text: as train.evaluate measured it first, otherwise as training did last."""
        logged = [record["val_bpb"] for record in self.metrics if "val_bpb" in record]
        return next(iter([*(text.bits_per_byte for text in self.texts.values()), *logged[-1:]]), None)

    @property
    def recipe(self) -> dict[str, Any]:
        return self.checkpoint.meta["recipe"] if self.checkpoint else {}

    @property
    def parameters(self) -> int:
        """How many numbers the model is made of."""
        arrays = self.checkpoint.arrays.items() if self.checkpoint else ()
        shapes = [text.split()[0].partition("[")[2] for name, text in arrays if name.startswith("params/")]
        return sum(math.prod(map(int, re.findall(r"\d+", shape))) for shape in shapes)

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return max((record["step"] for record in self.metrics), default=0)

    @property
    def training_seconds(self) -> float:
        """Of all steps together; compilation, saving and measurements in between are not in it."""
        return sum(record.get("seconds_per_step") or 0.0 for record in self.metrics)

    @property
    def evaluation_seconds(self) -> float:
        """Of train.evaluate."""
        return sum(suite["seconds"] for suite in self.suites.values())


@dataclass(frozen=True)
class Run:
    """Everything that was found; what there is not is empty."""

    folder: Path
    tokenizer: dict[str, Any]
    tokenizer_config: dict[str, Any]
    data: dict[str, Any]
    pairs: dict[str, tuple[int, Pair]]  # by task: how many, and the first
    pairs_config: dict[str, Any]
    stages: dict[str, StageRun]
    notes: list[str]  # on what is missing or cannot be read


def gather(folder: Path) -> Run:
    """What there is of a run.

    Raises:
        UserError: if there is nothing.
    """
    notes: list[str] = []

    def part[T](name: str, read: Callable[[Path], T], nothing: T) -> T:
        path = folder / name
        try:
            found = read(path) if path.exists() else nothing
        except (OSError, ValueError, UserError) as error:
            notes.append(f"{name} cannot be read: {error}")
            return nothing
        if not found and path.parent != folder and path.parent.is_dir():
            notes.append(f"{name} is missing")
        return found

    run = Run(
        folder=folder,
        tokenizer=part("tokenizer/tokenizer.report.json", read_json, {}),
        tokenizer_config=part("tokenizer/tokenizer.config.json", read_json, {}),
        data=part("data/manifest.json", read_json, {}),
        pairs=part("pairs.jsonl", _read_pairs, {}),
        pairs_config=part("pairs.config.json", read_json, {}),
        stages={
            name: StageRun(
                config=part(f"{name}/config.json", read_json, {}),
                metrics=part(f"{name}/metrics.jsonl", lambda path: read_metrics(path.parent), []),
                checkpoint=part(f"{name}/checkpoints", lambda path: Checkpoints(path).peek(), None),
                evaluation=part(f"{name}/evaluation.json", _read_evaluation, {}),
            )
            for name in STAGES
            if (folder / name).is_dir()
        },
        notes=notes,
    )
    for name, stage in run.stages.items():
        measured, newest = stage.evaluation.get("step"), stage.checkpoint
        if measured is not None and newest is not None and measured != newest.step:
            notes.append(
                f"{name}/evaluation.json is of step {measured:,}, and there is a checkpoint of step {newest.step:,}: "
                "run train.evaluate again"
            )
    if not any((run.tokenizer, run.data, run.pairs, run.stages)):
        raise UserError(f"{folder} holds nothing of a run: neither tokenizer, data nor {', '.join(STAGES)}")
    return run


def _read_evaluation(path: Path) -> dict[str, Any]:
    evaluation = read_json(path)
    stage = StageRun({}, [], None, evaluation)
    _ = stage.tasks, stage.core, stage.texts  # so that what is of another version is known here
    return evaluation


def _results[T](evaluation: dict[str, Any], suite: str, part: str, kind: type[T]) -> dict[str, T]:
    found = evaluation.get("suites", {}).get(suite, {}).get(part, {})
    return {
        name: from_json(kind, {key: value for key, value in result.items() if key != "asked"}, name)
        for name, result in found.items()
    }


def _samples(name: str, samples: Sequence[Any]) -> tuple[Verdict, ...]:
    return tuple(from_json(Verdict, sample, f"{name}.samples") for sample in samples)


def _read_pairs(path: Path) -> dict[str, tuple[int, Pair]]:
    pairs: dict[str, tuple[int, Pair]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        values = json.loads(line)
        task = str(values.get("task", "pairs"))
        count, first = pairs.get(task) or (0, read_pair(Row(f"line {number}", values)))
        pairs[task] = (count + 1, first)
    return pairs
