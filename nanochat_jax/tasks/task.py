"""What a task is, and what several tasks share."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from nanochat_jax.chat import Conversation
from nanochat_jax.data.rows import Lazy, Row, open_rows
from nanochat_jax.errors import UserError

SPLITS = ("train", "test")
TRAIN_SIZE, TEST_SIZE = 20_000, 500  # of tasks that could go on for ever


@dataclass(frozen=True)
class Example:
    """One question."""

    conversation: Conversation  # ends with an answer that is right
    reference: Any  # what the judge compares with
    letters: tuple[str, ...] = ()  # of a categorical task: the possible answers

    @property
    def prompt(self) -> Conversation:
        """The conversation without its last answer."""
        return {"messages": self.conversation["messages"][:-1]}


@dataclass(frozen=True)
class Task:
    """Conversations, and how an answer is judged.

    A categorical task is answered by one of the example's letters, a generative one by any text. Judges read
    `chat.visible_text` of an answer, never its tool calls, and return False for whatever they cannot make out.
    """

    name: str
    kind: Literal["categorical", "generative"]
    examples: Callable[[str], Sequence[Example]]  # of a split, in a fixed order; UserError where there are none
    judge: Callable[[Example, str], bool]
    baseline: float = 0.0  # accuracy of blind guessing, for centring


def from_rows(
    name: str, source: str, defaults: Mapping[str, str], make: Callable[[Row], Example]
) -> Callable[[str], Sequence[Example]]:
    """Examples read from rows.

    Args:
        name: of the task.
        source: spec of rows in which {split} stands for train or test; "" for the defaults.
        defaults: spec for each split.
        make: an example of a row.
    """
    if source and "{split}" not in source:
        raise UserError(f"task {name}: source {source!r} must have {{split}} where its train and test files differ")
    specs = {split: source.replace("{split}", split) for split in SPLITS} if source else defaults

    def examples(split: str) -> Sequence[Example]:
        check_split(name, split)
        try:
            rows = open_rows(specs[split])
        except UserError as error:
            raise UserError(f"task {name}, split {split}: {error}") from error
        return Lazy(len(rows), lambda i: make(rows[i]))

    return examples


def generated(name: str, make: Callable[[str, random.Random], Example]) -> Callable[[str], Sequence[Example]]:
    """Examples made up, each from its split and a random generator of its own."""

    def examples(split: str) -> Sequence[Example]:
        check_split(name, split)
        size = TRAIN_SIZE if split == "train" else TEST_SIZE
        return Lazy(size, lambda i: make(split, random.Random(f"{name} {split} {i}")))

    return examples


def check_split(name: str, split: str, splits: Sequence[str] = SPLITS) -> None:
    if split not in splits:
        raise UserError(f"task {name} has no examples in split {split!r}; its splits: {', '.join(splits)}")


def check_no_argument(name: str, argument: str) -> None:
    if argument:
        raise UserError(f"task {name} is named alone, without '={argument}'")


def multiple_choice(question: str, choices: Sequence[str], letters: Sequence[str]) -> str:
    """A question and its options, the letter behind each: as in nanochat, `- text=A`, then what to answer with."""
    options = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=True))
    return f"{question}\n\n{options}\nAnswer with the letter alone."


def is_reference_letter(example: Example, answer: str) -> bool:
    """Judge of categorical tasks: the letter, and nothing but the letter."""
    return answer.strip() == example.reference


_NUMBER = r"(?>-?[0-9]+(?:,[0-9]+)*(?:\.[0-9]+)?)"  # atomic: 12.5kg is no number, and not 12 either
_NUMBERS = re.compile(rf"(?<![\w.,−]){_NUMBER}(?!\w)")
_MARKED = re.compile(rf"####[ \t]*\$?({_NUMBER})?(?!\w)")
_LONGEST_NUMBER = 28  # digits that Decimal keeps


def all_numbers(text: str) -> set[str]:
    """Numbers in a text, each written in one way; ASCII digits only."""
    return {_normal(number) for number in _NUMBERS.findall(text)}


def marked_numbers(text: str) -> set[str]:
    """What stands behind each `####`, "" for what is no number."""
    return {_normal(number) for number in _MARKED.findall(text)}


def _normal(number: str) -> str:
    """A number without commas, zeros at its ends and signs of zero; "" for one too long to mean anything."""
    digits = number.replace(",", "")
    if not digits or len(digits) > _LONGEST_NUMBER:
        return ""
    return format(Decimal(digits).normalize() + 0, "f")
