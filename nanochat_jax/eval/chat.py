"""Chat evaluation: how often a model answers the questions of tasks rightly.

Categorical tasks are answered by the likeliest of an example's letters, generative ones by greedy sampling on the
engine, and judged by the task. Prompts come in batches of one size, padded to one of a few lengths, so that a handful
of programs serves any number of examples, and an answer depends on its own prompt alone.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import model, sharding
from nanochat_jax.chat import content_parts, render_prompt, visible_text
from nanochat_jax.config import Architecture
from nanochat_jax.engine import Engine
from nanochat_jax.errors import UserError
from nanochat_jax.eval.bpb import NORMAL_95
from nanochat_jax.generate import PROMPT_BUCKET
from nanochat_jax.layers import Compute
from nanochat_jax.rollouts import Question, answer, make_engine
from nanochat_jax.sharding import replicated
from nanochat_jax.tasks import Example, Task
from nanochat_jax.tokenizer import Tokenizer

CHATCORE = ("arc-easy", "arc-challenge", "mmlu", "gsm8k", "humaneval")  # Source: nanochat, scripts/chat_eval.py

Progress = Callable[[int], object]  # told how many more examples are done


@dataclass(frozen=True)
class Sizes:
    """Of batches and answers."""

    rows: int = 8  # prompts that one device reads at a time, to choose letters
    slots: int = 32  # answers that one device samples at a time
    max_new_tokens: int = 512  # of a sampled answer, within the model's context


@dataclass(frozen=True)
class Verdict:
    """An answer, and what became of it."""

    question: str
    answer: str
    is_right: bool
    is_too_long: bool  # the prompt fills the context: wrong without an answer


@dataclass(frozen=True)
class Result:
    """A model's performance on a task."""

    kind: str
    examples: int
    right: int
    too_long: int  # examples whose prompt fills the context; they count as wrong
    accuracy: float
    interval: tuple[float, float]  # 95 %, of the accuracy over all such examples (Wilson's)
    baseline: float
    centred: float  # accuracy, with the baseline at 0 and perfection at 1
    seconds: float
    samples: tuple[Verdict, ...]  # the first right one and the first wrong one


class Evaluator:
    """Measures a model on any number of tasks, with the same few programs.

    Args:
        params: the model's parameters, on the mesh.
        cfg: the architecture.
        tokenizer: of the model; it must know the turns of a conversation.
        compute: dtype and attention backend.
        mesh: over whose data axes batches are cut.
        sizes: of batches and answers.
    """

    def __init__(
        self,
        params: model.Params,
        cfg: Architecture,
        tokenizer: Tokenizer,
        compute: Compute,
        mesh: jax.sharding.Mesh,
        sizes: Sizes = Sizes(),
    ) -> None:
        self._params, self._cfg, self._tokenizer, self._compute = params, cfg, tokenizer, compute
        self._mesh, self._sizes = mesh, sizes
        self._rows = sizes.rows * sharding.batch_devices(mesh)
        self._lengths = [n for i in range(32) if (n := PROMPT_BUCKET << i) < cfg.sequence_len] + [cfg.sequence_len]
        self._likeliest = jax.jit(partial(_likeliest, cfg=cfg, compute=compute), out_shardings=replicated(mesh))
        self._programs: dict[int, jax.stages.Compiled] = {}  # by length

    @cached_property
    def _engine(self) -> Engine:
        slots = self._sizes.slots * sharding.batch_devices(self._mesh)
        return make_engine(self._params, self._cfg, self._tokenizer, self._compute, slots)

    @property
    def compilations(self) -> dict[str, int]:
        """Programs compiled so far: at most one for each length of prompts, and two more in the engine."""
        engine = self._engine.compilations if "_engine" in vars(self) else 0
        return {"categorical": len(self._programs), "engine": engine}

    def evaluate(self, task: Task, examples: Sequence[Example], progress: Progress = lambda _: None) -> Result:
        """Answer examples of a task, and count what is right.

        Args:
            task: says how they are answered, and whether rightly.
            examples: at least one.
            progress: told how many more examples are done.

        Raises:
            UserError: the tokenizer knows no turns, or has no token for a letter.
        """
        started = time.perf_counter()
        answers = self._choose if task.kind == "categorical" else self._sample
        verdicts = answers(task, examples, progress)
        return _result(task, verdicts, time.perf_counter() - started)

    def _sample(self, task: Task, examples: Sequence[Example], progress: Progress) -> list[Verdict]:
        questions = [Question(task, example, number) for number, example in enumerate(examples)]
        limit = self._sizes.max_new_tokens
        answers = answer(self._engine, self._tokenizer, questions, max_new_tokens=limit, progress=progress)
        return [
            Verdict(_asked(example), given.text, given.is_right, not given.output.tokens)
            for example, [given] in zip(examples, answers, strict=True)
        ]

    def _choose(self, task: Task, examples: Sequence[Example], progress: Progress) -> list[Verdict]:
        prompts = [render_prompt(example.prompt, self._tokenizer) for example in examples]
        letters = [{self._token(letter): letter for letter in example.letters} for example in examples]
        chosen = [""] * len(examples)
        by_length = defaultdict(list)
        for i, prompt in enumerate(prompts):
            by_length[next((n for n in self._lengths if n > len(prompt)), 0)].append(i)
        progress(len(by_length.pop(0, [])))
        for length, members in sorted(by_length.items()):
            for start in range(0, len(members), self._rows):
                batch = members[start : start + self._rows]
                tokens_B = self._read(length, [prompts[i] for i in batch], [list(letters[i]) for i in batch])
                for i, token in zip(batch, tokens_B.tolist(), strict=False):
                    chosen[i] = letters[i][token]
                progress(len(batch))
        return [
            Verdict(_asked(example), letter, bool(letter) and task.judge(example, letter), not letter)
            for example, letter in zip(examples, chosen, strict=True)
        ]

    def _token(self, letter: str) -> int:
        tokens = self._tokenizer.encode(letter)
        if len(tokens) != 1:
            raise UserError(
                f"the letter {letter!r} is {len(tokens)} tokens, and a categorical task needs it to be one: leave the "
                "task out, or train with another tokenizer"
            )
        return tokens[0]

    def _read(self, length: int, prompts: list[list[int]], letters: list[list[int]]) -> np.ndarray:
        """The likeliest of each prompt's letters, as tokens; rows without a prompt mean nothing."""
        tokens_BT, counts_B = np.zeros((self._rows, length), np.int32), np.ones(self._rows, np.int32)
        allowed_BV = np.zeros((self._rows, self._cfg.vocab_size), bool)
        for row, (prompt, tokens) in enumerate(zip(prompts, letters, strict=True)):
            tokens_BT[row, : len(prompt)], counts_B[row], allowed_BV[row, tokens] = prompt, len(prompt), True
        batch = {"tokens_BT": tokens_BT, "counts_B": counts_B, "allowed_BV": allowed_BV}
        placed = sharding.put_batch(self._mesh, sharding.host_rows(self._mesh, batch))
        if length not in self._programs:  # compiled ahead, so that an unforeseen shape is an error and not a pause
            self._programs[length] = self._likeliest.lower(self._params, placed).compile()
        return np.asarray(self._programs[length](self._params, placed))


def _likeliest(params: model.Params, batch: dict[str, jax.Array], *, cfg: Architecture, compute: Compute) -> jax.Array:
    """The likeliest of the allowed tokens to follow the first counts_B tokens of each row, (B,) int32."""
    x_BTD, _ = model.trunk(params, cfg, batch["tokens_BT"], compute=compute)
    last_B1D = jnp.take_along_axis(x_BTD, batch["counts_B"][:, None, None] - 1, axis=1)
    logits_BV = model.unembed(params, cfg, last_B1D)[:, 0]
    return jnp.argmax(jnp.where(batch["allowed_BV"], logits_BV, -jnp.inf), axis=-1)


def _asked(example: Example) -> str:
    return visible_text(content_parts(example.prompt["messages"][-1]))


def _result(task: Task, verdicts: list[Verdict], seconds: float) -> Result:
    right = sum(verdict.is_right for verdict in verdicts)
    samples = [next((v for v in verdicts if v.is_right is is_right), None) for is_right in (True, False)]
    accuracy = right / len(verdicts)
    return Result(
        kind=task.kind,
        examples=len(verdicts),
        right=right,
        too_long=sum(verdict.is_too_long for verdict in verdicts),
        accuracy=accuracy,
        interval=wilson(right, len(verdicts)),
        baseline=task.baseline,
        centred=centred(accuracy, task.baseline),
        seconds=round(seconds, 2),
        samples=tuple(verdict for verdict in samples if verdict),
    )


def centred(accuracy: float, baseline: float) -> float:
    """Accuracy on a scale on which guessing is 0 and perfection 1."""
    return (accuracy - baseline) / (1 - baseline)


def wilson(right: float, examples: int) -> tuple[float, float]:
    """95 % interval of a proportion.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    z2, p = NORMAL_95**2 / examples, right / examples
    centre, half = p + z2 / 2, (z2 * p * (1 - p) + z2**2 / 4) ** 0.5
    return (centre - half) / (1 + z2), (centre + half) / (1 + z2)


def chatcore(results: Mapping[str, Any]) -> float | None:
    """Mean centred accuracy of the five tasks of ChatCORE; None unless all of them were measured."""
    if not set(CHATCORE) <= set(results):
        return None
    return sum(results[name]["centred"] for name in CHATCORE) / len(CHATCORE)
