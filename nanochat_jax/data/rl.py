"""Questions to try, and answers as rows to learn from: for reinforcement learning."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np

from nanochat_jax.chat import render_prompt
from nanochat_jax.data.batches import Batch
from nanochat_jax.errors import UserError
from nanochat_jax.rollouts import Answer, Question
from nanochat_jax.tasks import open_task
from nanochat_jax.tokenizer import Tokenizer

SHORTEST = 64  # rows have this length, or twice, four times, … as many tokens: few shapes are compiled
EPSILON = 1e-6  # keeps the z-score finite


@dataclass(frozen=True)
class Questions:
    """Questions that fit into the context; a row of them, for `batches`, is a question's number."""

    all: list[Question]
    too_long: int  # prompts left out because they fill the context
    fingerprint: str  # tells these from all others

    def __len__(self) -> int:
        return len(self.all)

    def row(self, index: int) -> Batch:
        return {"question": np.array(index, np.int32)}


def open_questions(
    specs: str, split: str, tokenizer: Tokenizer, context_len: int, *, limit: int | None = None
) -> Questions:
    """Read the questions of tasks.

    Args:
        specs: tasks as `open_task` takes them, with commas between.
        split: train or test.
        tokenizer: of the model.
        context_len: tokens of prompt and answer together.
        limit: take the first so many of each task; None for all.

    Raises:
        UserError: if a task is unknown or lacks the split, or no question fits.
    """
    fitting: list[Question] = []
    too_long, digest = 0, hashlib.sha256()
    for spec in specs.split(","):
        task = open_task(spec.strip())
        for example in islice(task.examples(split), limit):
            digest.update(json.dumps(example.conversation).encode())
            if len(render_prompt(example.prompt, tokenizer)) < context_len:
                fitting.append(Question(task, example, len(fitting)))
            else:
                too_long += 1
    if not fitting:
        raise UserError(f"of {too_long:,} questions of {specs} none fits into a context of {context_len} tokens")
    return Questions(fitting, too_long, digest.hexdigest())


def advantages(rewards_QS: np.ndarray, kind: Literal["mean", "zscore"]) -> np.ndarray:
    """How much better each sample is than those of the same question are on average.

    Args:
        rewards_QS: float32, of each question its samples.
        kind: mean takes the difference; zscore divides it by the samples' standard deviation, so that questions
            almost always, or almost never, answered rightly weigh as much as the others.

    Returns:
        (Q, S) float32; 0 where all samples of a question are worth the same.

    Source: nanochat, scripts/chat_rl.py (mean); GRPO, arXiv:2402.03300 (zscore).
    """
    centred_QS = rewards_QS - rewards_QS.mean(axis=1, keepdims=True)
    if kind == "mean":
        return centred_QS
    return centred_QS / (rewards_QS.std(axis=1, keepdims=True) + EPSILON)


def answer_rows(answers: Sequence[Answer], advantages_B: np.ndarray, pad: int, sequence_len: int) -> Batch:
    """Answers as rows, each behind its prompt.

    Args:
        answers: in any order.
        advantages_B: float32, of each.
        pad: token behind what is shorter.
        sequence_len: tokens the model sees at once.

    Returns:
        tokens and targets, (B, T) int32, and advantages (B,). Only what the model itself wrote is a target, its
        last token included; prompts, outputs of tools and padding are −1.
    """
    longest = max(len(answer.prompt) + len(answer.output.tokens) for answer in answers) - 1
    T = min(SHORTEST << max(0, -(-longest // SHORTEST) - 1).bit_length(), sequence_len)
    tokens_BT = np.full((len(answers), T), pad, np.int32)
    targets_BT = np.full((len(answers), T), -1, np.int32)
    for answer, tokens_T, targets_T in zip(answers, tokens_BT, targets_BT, strict=True):
        start, written = len(answer.prompt) - 1, answer.output.tokens
        tokens_T[: start + len(written)] = [*answer.prompt, *written][:-1]
        targets_T[start : start + len(written)] = np.where(answer.output.sampled, written, -1)
    return {"tokens": tokens_BT, "targets": targets_BT, "advantages": advantages_B}
