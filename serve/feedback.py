"""Likes and dislikes into preference pairs, which `train.dpo --pairs jsonl:FILE` learns from."""

import fcntl
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_jax.chat import Message, Part
from nanochat_jax.data.preference import read_pair
from nanochat_jax.data.rows import Row
from nanochat_jax.errors import UserError


class Rating(NamedTuple):
    """What somebody thinks of an answer."""

    prompt: list[Message]
    answer: str | list[Part]
    liked: bool | None  # None takes an earlier one back


class Ratings(NamedTuple):
    """Those of one visitor, and all pairs that came of them: who changes their mind again makes none again."""

    current: list[Rating]
    pairs: list[dict[str, Any]]


def rate(ratings: Ratings, new: Rating) -> Ratings:
    """Take a rating in.

    Args:
        ratings: those before.
        new: it replaces an earlier one of the same answer to the same prompt.

    Returns:
        All ratings, and at the end of the pairs a new one for each answer to the same prompt that is rated otherwise.
    """
    others = [old for old in ratings.current if (old.prompt, old.answer) != (new.prompt, new.answer)]
    if new.liked is None:
        return Ratings(others, ratings.pairs)
    pairs = list(ratings.pairs)
    for old in others:
        if old.prompt == new.prompt and old.liked != new.liked:
            chosen, rejected = (new, old) if new.liked else (old, new)
            pair = {"prompt": new.prompt, "chosen": chosen.answer, "rejected": rejected.answer}
            if pair not in pairs:
                pairs.append(pair)
    return Ratings([*others, new], pairs)


def append_pairs(path: Path, pairs: Sequence[dict[str, Any]]) -> None:
    """Append lines, whole ones even where several processes write.

    Raises:
        UserError: the file cannot be written, or one of them is no pair to learn from, which would spoil the file.
    """
    for pair in pairs:
        read_pair(Row("this rating", pair))
    lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(lines)
            file.flush()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another file with --feedback") from error
