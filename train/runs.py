"""What a run left in its folder, read back: what is missing or damaged is left out, and noted."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanochat_jax.checkpoint import Checkpoint, Checkpoints
from nanochat_jax.config import from_json
from nanochat_jax.data.preference import Pair, read_pair
from nanochat_jax.data.rows import Row
from nanochat_jax.errors import UserError
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
        return _task_results(self.evaluation)

    @property
    def bits_per_byte(self) -> float | None:
        """Of the model on held-out text: as train.evaluate measured it, otherwise as training did last."""
        logged = [record["val_bpb"] for record in self.metrics if "val_bpb" in record]
        return next(iter(self.suites.get("bpb", {}).get("bits_per_byte", {}).values()), logged[-1] if logged else None)

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
    _task_results(evaluation)  # so that what is of another version is known here
    return evaluation


def _task_results(evaluation: dict[str, Any]) -> dict[str, Result]:
    tasks = evaluation.get("suites", {}).get("chat", {}).get("tasks", {})
    return {name: _result(name, task) for name, task in tasks.items()}


def _result(name: str, task: dict[str, Any]) -> Result:
    result = from_json(Result, {key: value for key, value in task.items() if key != "asked"}, name)
    return replace(result, samples=tuple(from_json(Verdict, sample, f"{name}.samples") for sample in task["samples"]))


def _read_pairs(path: Path) -> dict[str, tuple[int, Pair]]:
    pairs: dict[str, tuple[int, Pair]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        values = json.loads(line)
        task = str(values.get("task", "pairs"))
        count, first = pairs.get(task) or (0, read_pair(Row(f"line {number}", values)))
        pairs[task] = (count + 1, first)
    return pairs
