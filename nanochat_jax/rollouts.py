"""Answers of a model to the questions of tasks, sampled on the engine and judged: for evaluation, pairs and RL."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from nanochat_jax import hosts
from nanochat_jax.chat import parse, render_prompt, visible_text
from nanochat_jax.config import Architecture
from nanochat_jax.engine import TILE, Engine, EngineConfig, Output, Request
from nanochat_jax.layers import Compute
from nanochat_jax.model import Params
from nanochat_jax.sampling import Sampling
from nanochat_jax.sharding import batch_devices
from nanochat_jax.tasks import Example, Task
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.tools import calculate


@dataclass(frozen=True)
class Question:
    """An example of a task; `number` tells it from all others, so that its samples depend on nothing else."""

    task: Task
    example: Example
    number: int


@dataclass(frozen=True)
class Answer:
    """What the model said, and whether the task's judge holds it for right."""

    prompt: list[int]
    output: Output  # without tokens where the prompt fills the context
    text: str  # what the judge reads: without tool calls and their outputs
    is_right: bool


GREEDY = Sampling(temperature=0.0)


def make_engine(
    params: Params,
    cfg: Architecture,
    tokenizer: Tokenizer,
    compute: Compute,
    slots: int,
    context_len: int | None = None,
) -> Engine:
    """An engine with the calculator, the prefill that suits the device, and at least so many slots."""
    at = jax.tree.leaves(params)[0].sharding
    devices = batch_devices(cast(Mesh, at.mesh)) if isinstance(at, NamedSharding) else 1
    per_device = -(-slots // devices)
    slots = devices * (per_device if per_device <= TILE else -(-per_device // TILE) * TILE)
    prefill_rows = 1 if jax.default_backend() == "cpu" else min(8, slots)
    config = EngineConfig(slots=slots, context_len=context_len, prefill_rows=prefill_rows)
    return Engine(params, cfg, config, tools=calculate, tokenizer=tokenizer, compute=compute)


def answer(
    engine: Engine,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    samples: int = 1,
    sampling: Sampling = GREEDY,
    max_new_tokens: int = 256,
    progress: Callable[[int], object] | None = None,
) -> list[list[Answer]]:
    """Sample and judge answers, with the calculator at hand.

    Args:
        engine: idle, as `make_engine` gives it.
        tokenizer: of its model.
        questions: any number, of any tasks.
        samples: of each question.
        sampling: its seed is mixed with the question's number and the sample's into a seed of each sample's own.
        max_new_tokens: of an answer, a tool's outputs included.
        progress: told how many more answers have ended.

    Returns:
        For each question its samples. Where the prompt fills the context, they are empty, and wrong.
    """
    end = [tokenizer.control["<|assistant_end|>"]]
    prompts = [render_prompt(question.example.prompt, tokenizer) for question in questions]
    places = [(q, s) for q in range(len(questions)) for s in range(samples)]
    requests = {
        (q, s): Request(
            prompts[q],
            max_new_tokens,
            replace(sampling, seed=_seed(sampling.seed, questions[q].number, s)),
            stop_tokens=end,
            use_tools=True,
        )
        for q, s in places
        if len(prompts[q]) < engine.context_len
    }
    outputs = dict(zip(requests, _run(engine, list(requests.values()), progress or (lambda _: None)), strict=True))

    said = [outputs.get(place, Output(-1, finish_reason="length")) for place in places]
    texts = [visible_text(parse(output.tokens, tokenizer)) for output in said]

    def judged(number: int) -> bool:
        question = questions[places[number][0]]
        return bool(said[number].tokens) and question.task.judge(question.example, texts[number])

    # Some judges run programs, and wait for them.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rights = hosts.share(lambda numbers: list(pool.map(judged, numbers)), range(len(places)))
    answers = [Answer(prompts[q], *given) for (q, _), *given in zip(places, said, texts, rights, strict=True)]
    return [answers[q * samples : (q + 1) * samples] for q in range(len(questions))]


def _run(engine: Engine, requests: Sequence[Request], progress: Callable[[int], object]) -> list[Output]:
    """`engine.run`, telling how many more requests have ended."""
    outputs: dict[int, Output] = {}
    try:
        for request in requests:
            number = engine.submit(request)
            outputs[number] = Output(number)
        while news := engine.step():
            for new in news:
                outputs[new.request] += new
            progress(sum(new.finish_reason is not None for new in news))
    finally:
        for number in outputs:
            engine.cancel(number)
    return list(outputs.values())


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
