"""Tasks by name: what a chat model is trained on, and judged by."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from nanochat_jax.errors import UserError
from nanochat_jax.tasks import arc, arithmetic, gsm8k, humaneval, mmlu, smoltalk, spelling, topics
from nanochat_jax.tasks.task import Example, Task

__all__ = ["TASKS", "Example", "Task", "open_task"]


def _topics(name: str, argument: str) -> Task:
    return topics.task(name, Path(argument) if argument else Path(__file__).with_name(f"{name}.toml"))


TASKS: dict[str, Callable[[str], Task]] = {
    "arc-easy": partial(arc.task, "arc-easy", "ARC-Easy"),
    "arc-challenge": partial(arc.task, "arc-challenge", "ARC-Challenge"),
    "mmlu": mmlu.task,
    "gsm8k": gsm8k.task,
    "humaneval": humaneval.task,
    "smoltalk": smoltalk.task,
    "spelling": spelling.spelling_task,
    "counting": spelling.counting_task,
    "arithmetic": arithmetic.task,
    "mental-arithmetic": arithmetic.mental_task,
    "identity": partial(_topics, "identity"),
    "refusals": partial(_topics, "refusals"),
}


def open_task(spec: str) -> Task:
    """The task of a name; nothing is read before its examples are asked for.

    Args:
        spec: NAME, or NAME=SOURCE: for a data set, rows with {split} for train and test, such as
            gsm8k=jsonl:data/gsm8k_{split}.jsonl; for identity and refusals, a file of topics.

    Raises:
        UserError: if there is no such task, or the source does not fit.
    """
    name, _, argument = spec.partition("=")
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; known are {', '.join(TASKS)}")
    return TASKS[name](argument)
