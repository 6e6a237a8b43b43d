"""Pairs of answers to the same prompt, one better than the other: what preference optimisation learns from.

A pair is a row `{"prompt": text or messages, "chosen": answer, "rejected": answer}`, where an answer is text or parts
as in a conversation. Data sets whose chosen and rejected are whole conversations (the prompt, then the answer) are
read as well.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanochat_jax.chat import Conversation, check_conversation, render, render_prompt
from nanochat_jax.data.rows import Lazy, Row, open_rows
from nanochat_jax.errors import UserError
from nanochat_jax.tokenizer import Tokenizer

LENGTH_MULTIPLE = 64  # rows are padded to a multiple of this, so that few shapes are compiled


@dataclass(frozen=True)
class Pair:
    """Two conversations that differ in the last answer alone."""

    chosen: Conversation
    rejected: Conversation

    @property
    def prompt(self) -> Conversation:
        """What both answer."""
        return {"messages": self.chosen["messages"][:-1]}


@dataclass(frozen=True)
class PairRows:
    """Pairs as arrays; chosen has index 0, rejected 1."""

    tokens_P2T: np.ndarray  # int32, padded with bos
    targets_P2T: np.ndarray  # int32, −1 except where the last answer is supervised
    too_long: int  # pairs left out because one of the two does not fit


def open_pairs(spec: str) -> Sequence[Pair]:
    """Pairs of a spec of rows (jsonl:GLOB, parquet:GLOB, tfds:NAME#SPLIT, hub:OWNER/NAME#GLOB), parsed when asked for.

    Raises:
        UserError: if the rows cannot be read; once asked for, for a row that is no pair, which it names.
    """
    rows = open_rows(spec)
    return Lazy(len(rows), lambda i: read_pair(rows[i]))


def read_pair(row: Row) -> Pair:
    """A pair of a row; UserError if it is not valid, or if both answers are the same."""
    prompt = row.values.get("prompt")
    chosen, rejected = (_conversation(row, name, prompt) for name in ("chosen", "rejected"))
    if chosen["messages"][:-1] != rejected["messages"][:-1]:
        raise UserError(f"{row.where}: chosen and rejected answer different prompts")
    if chosen == rejected:
        raise UserError(f"{row.where}: chosen and rejected are the same answer, which says nothing about preference")
    return Pair(chosen, rejected)


def _conversation(row: Row, name: str, prompt: Any) -> Conversation:
    answer = row.values.get(name)
    if isinstance(answer, list) and answer and isinstance(answer[0], dict) and "role" in answer[0]:
        return check_conversation({"messages": answer}, f"{row.where}: {name}")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    check_conversation({"messages": prompt}, f"{row.where}: prompt", last="user")
    whole = {"messages": [*prompt, {"role": "assistant", "content": answer}]}
    return check_conversation(whole, f"{row.where}: {name}")


def render_pairs(pairs: Iterable[Pair], tokenizer: Tokenizer, sequence_len: int) -> PairRows:
    """Pairs as padded arrays, in order; those that do not fit whole are left out and counted.

    Args:
        pairs: at least one that fits.
        tokenizer: of the model.
        sequence_len: tokens the model sees at once.

    Raises:
        UserError: if no pair fits.
    """
    rendered: list[list[tuple[list[int], list[int]]]] = []
    too_long = 0
    for pair in pairs:
        prompt_len = len(render_prompt(pair.prompt, tokenizer))
        sides = []
        for side in (pair.chosen, pair.rejected):
            tokens, supervised = render(side, tokenizer)
            answered = [
                t if s and i >= prompt_len else -1 for i, (t, s) in enumerate(zip(tokens, supervised, strict=True))
            ]
            sides.append((tokens[:-1], answered[1:]))
        if max(len(tokens) for tokens, _ in sides) > sequence_len:
            too_long += 1
        else:
            rendered.append(sides)
    if not rendered:
        raise UserError(f"of {too_long} pairs none fits into sequence-len={sequence_len}: choose a larger one")
    longest = max(len(tokens) for sides in rendered for tokens, _ in sides)
    T = min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, sequence_len)
    tokens_P2T = np.full((len(rendered), 2, T), tokenizer.bos, np.int32)
    targets_P2T = np.full((len(rendered), 2, T), -1, np.int32)
    for pair_number, sides in enumerate(rendered):
        for side_number, (tokens, targets) in enumerate(sides):
            tokens_P2T[pair_number, side_number, : len(tokens)] = tokens
            targets_P2T[pair_number, side_number, : len(targets)] = targets
    return PairRows(tokens_P2T, targets_P2T, too_long)
