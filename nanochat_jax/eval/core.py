"""CORE: how much better than guessing a base model is, averaged over 22 in-context tasks.

Source: DataComp-LM (arXiv:2406.11794), as nanochat measures it. Items of all tasks are scored together, sorted by
what they cost, so that the number of programs does not depend on the number of tasks.
"""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

from tqdm import tqdm

from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.config import Architecture, ModelConfig
from nanochat_jax.eval.bundle import CoreTask, read_items
from nanochat_jax.eval.chat import centred, wilson
from nanochat_jax.eval.prompts import Choices, is_right, render
from nanochat_jax.eval.score import Scorer, plan
from nanochat_jax.workers import exit_with_parent

ITEMS_PER_JOB = 100
FEW_ITEMS = 5000  # so many are rendered before other processes have started
# nanochat's rotary tables are ten times as long as its context, and it reads prompts of any length up to that.
CONTEXTS = 10


@dataclass(frozen=True)
class Result:
    """A model's performance on a task."""

    kind: str
    shots: int
    examples: int
    right: int
    shortened: int  # examples of which only the tail fits the model
    accuracy: float
    interval: tuple[float, float]  # 95 %, of the accuracy over all such examples (Wilson's)
    baseline: float
    centred: float  # accuracy, with the baseline at 0 and perfection at 1


def longest_prompt(cfg: Architecture) -> int:
    """Tokens that a model can read at once: GPT-2 has so many positions, nanochat goes on beyond its context."""
    return CONTEXTS * cfg.sequence_len if isinstance(cfg, ModelConfig) else cfg.sequence_len


@dataclass(frozen=True)
class Rendering:
    """What processes that render items need to know."""

    tasks: Sequence[CoreTask]
    limit: int
    tokenizer: bytes
    max_len: int


def render_all(rendering: Rendering, workers: int = 0) -> list[list[Choices]]:
    """The sequences of the items of each task, in order.

    Args:
        rendering: of what, and for which model.
        workers: processes to tokenise in; 0 for one per core.

    Raises:
        UserError: see `read_items` and `render`.
    """
    sizes = [len(read_items(task, rendering.limit)) for task in rendering.tasks]
    jobs = [
        (t, range(first, min(first + ITEMS_PER_JOB, size)))
        for t, size in enumerate(sizes)
        for first in range(0, size, ITEMS_PER_JOB)
    ]
    found: list[list[Choices]] = [[] for _ in sizes]
    workers = 1 if sum(sizes) <= FEW_ITEMS else workers or os.cpu_count() or 1
    with tqdm(total=sum(sizes), desc="prompts", unit="example", disable=None) as bar:
        for (t, _), rendered in zip(jobs, _rendered(rendering, jobs, workers), strict=True):
            found[t] += rendered
            bar.update(len(rendered))
    return found


type Job = tuple[int, range]  # number of the task, items


def _rendered(rendering: Rendering, jobs: list[Job], workers: int) -> Iterator[list[Choices]]:
    if workers == 1:
        yield from map(_Renderer(rendering), jobs)
        return
    # Spawned, because a fork of a process with threads (JAX) may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(rendering,)) as pool:
        yield from pool.map(_work, jobs)


class _Renderer:
    """Keeps the tokenizer and the items of the task at hand."""

    def __init__(self, rendering: Rendering) -> None:
        self._rendering, self._tokenizer = rendering, tokenizers.from_bytes(rendering.tokenizer)
        self._items = lru_cache(1)(lambda t: read_items(rendering.tasks[t], rendering.limit))  # large, and in order

    def __call__(self, job: Job) -> list[Choices]:
        t, indices = job
        task, max_len = self._rendering.tasks[t], self._rendering.max_len
        return render(task, self._items(t), indices, self._tokenizer, max_len)


_renderer: _Renderer  # of a worker process


def _start(rendering: Rendering) -> None:
    global _renderer
    exit_with_parent()
    _renderer = _Renderer(rendering)


def _work(job: Job) -> list[Choices]:
    return _renderer(job)


def evaluate(scorer: Scorer, tasks: Sequence[CoreTask], rendered: Sequence[list[Choices]]) -> dict[str, Result]:
    """Score the items of all tasks together, and count what is right; results by the tasks' names.

    Args:
        scorer: of the model.
        tasks: any number.
        rendered: each task's items, as `render_all` gives them.
    """
    items = [item for group in rendered for item in group]
    rows = plan(items)
    tokens = sum(len(members) * shape.tokens for shape, members in rows.items())
    with tqdm(total=tokens, desc="CORE", unit="tok", unit_scale=True, disable=None) as bar:
        scores = iter(scorer.score(items, rows, bar.update))
    results = {}
    for task, group in zip(tasks, rendered, strict=True):
        right = 0
        for item, found in zip(group, scores, strict=False):
            right += is_right(task, item, [score.nats for score in found], [score.hit for score in found])
        accuracy = right / len(group)
        results[task.name] = Result(
            kind=task.kind,
            shots=task.shots,
            examples=len(group),
            right=right,
            shortened=sum(item.is_shortened for item in group),
            accuracy=accuracy,
            interval=wilson(right, len(group)),
            baseline=task.baseline,
            centred=centred(accuracy, task.baseline),
        )
    return results
