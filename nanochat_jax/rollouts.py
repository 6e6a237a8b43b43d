"""Answers of a model to the questions of tasks, sampled on the engine and judged: for evaluation, pairs and RL."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from nanochat_jax.chat import parse, render_prompt, visible_text
from nanochat_jax.config import Architecture
from nanochat_jax.engine import Engine, EngineConfig, Output, Request
from nanochat_jax.layers import Compute
from nanochat_jax.model import Params
from nanochat_jax.sampling import Sampling
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
    """An engine with the calculator, and the prefill that suits the device."""
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
) -> list[list[Answer]]:
    """Sample and judge answers, with the calculator at hand.

    Args:
        engine: idle, as `make_engine` gives it.
        tokenizer: of its model.
        questions: any number, of any tasks.
        samples: of each question.
        sampling: its seed is mixed with the question's number and the sample's into a seed of each sample's own.
        max_new_tokens: of an answer, a tool's outputs included.

    Returns:
        For each question its samples.
    """
    end = [tokenizer.control["<|assistant_end|>"]]
    prompts = [render_prompt(question.example.prompt, tokenizer) for question in questions]
    requests = {
        (q, s): Request(
            prompts[q],
            max_new_tokens,
            replace(sampling, seed=_seed(sampling.seed, question.number, s)),
            stop_tokens=end,
            use_tools=True,
        )
        for q, question in enumerate(questions)
        if len(prompts[q]) < engine.context_len
        for s in range(samples)
    }
    outputs = dict(zip(requests, engine.run(list(requests.values())), strict=True))

    def judged(q: int, s: int) -> Answer:
        output = outputs.get((q, s), Output(-1, finish_reason="length"))
        text = visible_text(parse(output.tokens, tokenizer))
        return Answer(prompts[q], output, text, questions[q].task.judge(questions[q].example, text))

    return [[judged(q, s) for s in range(samples)] for q in range(len(questions))]


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
