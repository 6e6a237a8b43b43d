"""Pairs of answers to the same prompt, one better than the other: what preference optimisation learns from.

A pair is a row `{"prompt": text or messages, "chosen": answer, "rejected": answer}`, where an answer is text or parts
as in a conversation. Data sets whose chosen and rejected are whole conversations (the prompt, then the answer) are
read as well.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from nanochat_jax.chat import Conversation, Message, check_conversation, content_parts, render, render_prompt
from nanochat_jax.data.batches import Batch, NothingFitsError
from nanochat_jax.data.rows import Lazy, Row, concatenate, is_held_out, open_rows, row_conversation
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

    @property
    def prompt_key(self) -> str:
        """Tells the prompt from all others, however it is written down."""
        return json.dumps([(message["role"], _said(message)) for message in self.prompt["messages"]])


@dataclass(frozen=True)
class PairRows:
    """Pairs as arrays; chosen has index 0, rejected 1."""

    tokens_P2T: np.ndarray  # int32, padded with bos
    targets_P2T: np.ndarray  # int32, −1 except where the last answer is supervised
    too_long: int  # pairs left out because one of the two does not fit
    reference_P2: np.ndarray | None = None  # float32 nats: log-probability of each answer before training

    def __len__(self) -> int:
        return len(self.tokens_P2T)

    @property
    def lengths_P2(self) -> np.ndarray:
        """Supervised tokens of each answer, int32."""
        return (self.targets_P2T >= 0).sum(axis=-1, dtype=np.int32)

    @property
    def fingerprint(self) -> str:
        """Tells these pairs from all others."""
        shape = str(self.tokens_P2T.shape).encode()
        return hashlib.sha256(shape + self.tokens_P2T.tobytes() + self.targets_P2T.tobytes()).hexdigest()

    def row(self, index: int) -> Batch:
        """tokens and targets, int32 (2, T); reference, float32 (2,), once there is one."""
        row = {"tokens": self.tokens_P2T[index], "targets": self.targets_P2T[index]}
        return row if self.reference_P2 is None else row | {"reference": self.reference_P2[index]}


def open_pairs(specs: str) -> Sequence[Pair]:
    """Pairs of rows, parsed when asked for.

    Args:
        specs: jsonl:GLOB, parquet:GLOB, tfds:NAME#SPLIT, hub:OWNER/NAME#GLOB, with commas between.

    Raises:
        UserError: if the rows cannot be read; once asked for, for a row that is no pair, which it names.
    """
    rows = concatenate([open_rows(spec.strip()) for spec in specs.split(",")])
    return Lazy(len(rows), lambda i: read_pair(rows[i]))


def split_pairs(specs: str, val_specs: str = "") -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and held-out ones, which have no prompt in common.

    Args:
        specs: as `open_pairs` takes them.
        val_specs: the held-out ones; default: those of a tenth of the prompts, chosen by hash.

    Raises:
        UserError: as `open_pairs`, or if nothing is left to train on.
    """
    pairs = list(open_pairs(specs))
    if val_specs:
        held_out = list(open_pairs(val_specs))
        taken = {pair.prompt_key for pair in held_out}
    else:
        held_out = [pair for pair in pairs if is_held_out(pair.prompt_key)]
        taken = {pair.prompt_key for pair in held_out}
    train = [pair for pair in pairs if pair.prompt_key not in taken]
    if not train:
        raise UserError(f"{specs}: the prompts of all {len(pairs):,} pairs are held out; give others to train on")
    return train, held_out


def read_pair(row: Row) -> Pair:
    """A pair of a row; UserError if it is not valid, or if both answers are the same."""
    chosen, rejected = (_conversation(row, name) for name in ("chosen", "rejected"))
    pair = Pair(chosen, rejected)
    if pair.prompt_key != Pair(rejected, chosen).prompt_key:
        raise UserError(f"{row.where}: chosen and rejected answer different prompts")
    if _said(chosen["messages"][-1]) == _said(rejected["messages"][-1]):
        raise UserError(f"{row.where}: chosen and rejected are the same answer, which says nothing about preference")
    return pair


def _said(message: Message) -> list[tuple[str, str]]:
    """The same for text as for parts that say the same."""
    runs = groupby(content_parts(message), key=lambda part: part["type"])
    return [(kind, "".join(part["text"] for part in run)) for kind, run in runs]


def _conversation(row: Row, name: str) -> Conversation:
    prompt: Any = row.values.get("prompt")
    answer = row.values.get(name)
    if _is_conversation(answer):
        return row_conversation(Row(f"{row.where}: {name}", {"messages": answer}))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    check_conversation({"messages": prompt}, f"{row.where}: prompt", last="user")
    whole = {"messages": [*prompt, {"role": "assistant", "content": answer}]}
    return check_conversation(whole, f"{row.where}: {name}")


def _is_conversation(answer: Any) -> bool:
    first = answer[0] if isinstance(answer, list) and answer else answer  # TFDS gives an object of lists
    return isinstance(first, dict) and "role" in first


def render_pairs(pairs: Iterable[Pair], tokenizer: Tokenizer, sequence_len: int) -> PairRows:
    """Pairs as padded arrays, in order; those that do not fit whole are left out and counted.

    Args:
        pairs: at least one that fits.
        tokenizer: of the model.
        sequence_len: tokens the model sees at once.

    Raises:
        NothingFitsError: if no pair fits.
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
        raise NothingFitsError(f"of {too_long} pairs none fits into sequence-len={sequence_len}: choose a larger one")
    longest = max(len(tokens) for sides in rendered for tokens, _ in sides)
    T = min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, sequence_len)
    tokens_P2T = np.full((len(rendered), 2, T), tokenizer.bos, np.int32)
    targets_P2T = np.full((len(rendered), 2, T), -1, np.int32)
    for pair_number, sides in enumerate(rendered):
        for side_number, (tokens, targets) in enumerate(sides):
            tokens_P2T[pair_number, side_number, : len(tokens)] = tokens
            targets_P2T[pair_number, side_number, : len(targets)] = targets
    return PairRows(tokens_P2T, targets_P2T, too_long)
