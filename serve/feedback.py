"""Likes and dislikes into preference pairs, which `train.dpo --pairs jsonl:FILE` learns from."""

import fcntl
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nanochat_jax.chat import Message, Part
from nanochat_jax.errors import UserError


class Rating(NamedTuple):
    """What somebody thinks of an answer."""

    prompt: list[Message]
    answer: str | list[Part]
    liked: bool | None  # None takes an earlier one back


def rate(ratings: Sequence[Rating], new: Rating) -> tuple[list[Rating], list[dict[str, object]]]:
    """Take a rating in.

    Args:
        ratings: those before, of one visitor.
        new: it replaces an earlier one of the same answer to the same prompt.

    Returns:
        All ratings, and what is new: a pair for each answer to the same prompt that was rated otherwise.
    """
    if new in ratings:
        return list(ratings), []
    others = [old for old in ratings if (old.prompt, old.answer) != (new.prompt, new.answer)]
    if new.liked is None:
        return others, []
    pairs: list[dict[str, object]] = []
    for old in others:
        if old.prompt == new.prompt and old.liked != new.liked:
            chosen, rejected = (new, old) if new.liked else (old, new)
            pairs.append({"prompt": new.prompt, "chosen": chosen.answer, "rejected": rejected.answer})
    return [*others, new], pairs


def append_pairs(path: Path, pairs: Sequence[dict[str, object]]) -> None:
    """Append lines, whole ones even where several processes write; UserError if the file cannot be written."""
    lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(lines)
            file.flush()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another file with --feedback") from error
