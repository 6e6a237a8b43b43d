"""What a run has come to in numbers: the headline, tasks before and after each stage, time and cost, run beside run."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from nanochat_jax import gpt2, optim
from nanochat_jax.config import Horizon, OptimConfig, from_json
from nanochat_jax.errors import UserError
from nanochat_jax.eval.plots import series
from nanochat_jax.eval.report import Table, number, side_by_side
from train.runs import Run, StageRun


def headline(run: Run, dollars_per_hour: float | None) -> dict[str, str]:
    """The numbers that one looks for first, by their names."""
    found: dict[str, str] = {}
    if base := run.stages.get("base"):
        if (bits := base.bits_per_byte) is not None:
            found["bits per byte of held-out text"] = f"{bits:.4f}"
        medians = (("tokens per second, median", "tokens_per_second", 1), ("MFU in %, median", "mfu", 100))
        for label, name, scale in medians:
            if len(values := series(base.metrics, name)[1]):
                found[label] = number(scale * float(np.median(values)), 4)
        if base.checkpoint and (records := base.checkpoint.meta.get("records")):  # not in converted models
            found["tokens of pretraining"] = number(records * base.recipe["model"]["sequence_len"])
        for name, text in list(base.texts.items())[1:]:
            found[f"bits per byte of {name}"] = f"{text.bits_per_byte:.4f}"
    if parameters := max((stage.parameters for stage in run.stages.values()), default=0):
        found["parameters"] = number(parameters)
    for name, stage in run.stages.items():
        if core := stage.suites.get("core"):
            label = f"mean of {len(core['tasks'])} CORE tasks" if core["core"] is None else "CORE"
            found[f"{label} after {name}"] = f"{core['mean_centred']:.4f}"
        if stage.tasks:
            mean, score = stage.suites["chat"]["mean_centred"], stage.suites["chat"]["chatcore"]
            found[f"mean of {len(stage.tasks)} tasks after {name}"] = f"{mean:.4f}"
            found |= {} if score is None else {f"ChatCORE after {name}": f"{score:.4f}"}
    if seconds := sum(map(sum, seconds_of(run).values())):
        found["minutes of training and evaluation"] = f"{seconds / 60:,.1f}"
        if dollars_per_hour:
            found["dollars"] = f"{seconds / 3600 * dollars_per_hour:,.2f}"
    return found


def seconds_of(run: Run) -> dict[str, tuple[float, float]]:
    """By stage what training and evaluation took, as far as it was logged."""
    learnt = {"tokenizer": (run.tokenizer.get("training_seconds", 0.0), 0.0)} if run.tokenizer else {}
    return learnt | {name: (stage.training_seconds, stage.evaluation_seconds) for name, stage in run.stages.items()}


def times(run: Run, dollars_per_hour: float | None) -> Table:
    """Steps, minutes and cost of each stage and in all."""
    seconds = seconds_of(run)
    seconds["in all"] = (sum(both[0] for both in seconds.values()), sum(both[1] for both in seconds.values()))
    rows = []
    for name, both in seconds.items():
        steps, pace = "", ""
        if stage := run.stages.get(name):
            planned = stage.recipe.get("steps") or stage.recipe.get("horizon", {}).get("steps") or stage.steps
            steps = f"{stage.steps:,}" if stage.steps == planned else f"{stage.steps:,} of {planned:,}"
            laps = series(stage.metrics, "seconds_per_step")[1]
            pace = number(float(np.median(laps)), 3) if len(laps) else ""
        cost = [f"{sum(both) / 3600 * dollars_per_hour:,.2f}"] if dollars_per_hour else []
        rows.append((name, steps, pace, *(f"{part / 60:,.1f}" for part in both), *cost))
    header = ("", "steps", "seconds a step", "training, minutes", "evaluation, minutes")
    return Table(rows, (*header, *(["dollars"] if dollars_per_hour else [])), "numbers")


def share(accuracy: float, examples: int, interval: Sequence[float]) -> str:
    """Of right answers, with its 95 % interval and the number of examples."""
    low, high = (100 * bound for bound in interval)
    return f"{100 * accuracy:.1f} % of {examples:,} ({low:.1f}–{high:.1f})"


def task_cells(stage: StageRun) -> dict[str, str]:
    """By task the share of right answers."""
    cells = {}
    for name, result in stage.tasks.items():
        too_long = f", {result.too_long:,} too long" if result.too_long else ""
        cells[name] = share(result.accuracy, result.examples, result.interval) + too_long
    return cells


def core_table(run: Run) -> Table | None:
    """CORE's tasks by the stages that they were measured on; None if they were on none."""
    measured = {name: stage for name, stage in run.stages.items() if stage.core}
    guessing = {task: f"{r.baseline:.0%}" for stage in measured.values() for task, r in stage.core.items()}
    columns = {"guessing": guessing}
    for name, stage in measured.items():
        suite = stage.suites["core"]
        shares = {task: share(r.accuracy, r.examples, r.interval) for task, r in stage.core.items()}
        columns[f"{name}, step {stage.evaluation['step']:,}"] = shares | {
            "mean, guessing at 0" if suite["core"] is None else "CORE": f"{suite['mean_centred']:.4f}",
            "programs compiled": f"{suite['compilations']:,}",
            "examples per second": f"{suite['examples_per_second']:,.1f}",
        }
    return side_by_side(columns, "numbers") if measured else None


def task_table(run: Run) -> Table | None:
    """Tasks by the stages that were asked; None if none was."""
    asked = {name: stage for name, stage in run.stages.items() if stage.tasks}
    columns = {"guessing": {task: f"{r.baseline:.0%}" for stage in asked.values() for task, r in stage.tasks.items()}}
    for name, stage in asked.items():
        chat = stage.suites["chat"]
        score = {} if chat["chatcore"] is None else {"ChatCORE": f"{chat['chatcore']:.4f}"}
        took = {
            "mean, guessing at 0": f"{chat['mean_centred']:.4f}",
            "programs compiled": f"{sum(chat['compilations'].values()):,}",
            "seconds": f"{chat['seconds']:,.1f}",
        }
        columns[f"{name}, step {stage.evaluation['step']:,}"] = task_cells(stage) | score | took
    return side_by_side(columns, "numbers") if asked else None


def learning_rates(stage: StageRun) -> list[dict[str, float]]:
    """Of the matrices at each step that was done, from the recipe; empty where it says nothing of a schedule."""
    recipe, steps = stage.recipe, jnp.arange(stage.steps)
    try:
        if "horizon" in recipe:
            length, numbers = from_json(Horizon, recipe["horizon"]), from_json(OptimConfig, recipe["optim"])
            rates = length.lr_scale * numbers.matrix_lr * optim.lr_multiplier(length.steps, numbers)(steps)
        else:
            adamw = from_json(gpt2.GPT2OptimConfig, recipe["optim"])
            rates = adamw.learning_rate * gpt2.lr_multiplier(recipe["steps"], adamw)(steps)
    except (KeyError, UserError):  # converted from elsewhere, or of another version
        return []
    return [{"step": step, "rate": rate} for step, rate in enumerate(np.asarray(rates).tolist(), 1)]


def compare(runs: list[Run], dollars_per_hour: float | None) -> Table:
    """Headlines and tasks of several runs, a column for each."""
    columns = {}
    for run in runs:
        cells = {
            f"{task} after {name}": cell
            for name, stage in run.stages.items()
            for task, cell in task_cells(stage).items()
        }
        columns[str(run.folder)] = headline(run, dollars_per_hour) | cells
    return side_by_side(columns, "numbers")
