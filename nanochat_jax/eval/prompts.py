"""From an item of a CORE task to sequences of tokens, by the task's kind: what of them is scored, and what is right.

Sources: DataComp-LM (arXiv:2406.11794) and, for the layout of the prompts, nanochat (core_eval.py).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanochat_jax.errors import UserError
from nanochat_jax.eval.bundle import CoreTask, Item
from nanochat_jax.tokenizer import Tokenizer

SHOTS_SEED = 1234  # of the examples before item 0


@dataclass(frozen=True)
class Choices:
    """The sequences of one item, of which the model prefers one, or the one that it is to continue.

    Sequence i is shared + tails[i]; its last scored[i] tokens are what counts, and at least one token of the tail
    comes before them.
    """

    shared: np.ndarray  # int32
    tails: tuple[np.ndarray, ...]
    scored: tuple[int, ...]
    gold: int
    is_shortened: bool  # to a model's maximum length


def solved_examples(items: Sequence[Item], index: int, shots: int) -> list[Item]:
    """The items that are shown, solved, before the one of this index."""
    others = [i for i in range(len(items)) if i != index]
    return [items[i] for i in random.Random(SHOTS_SEED + index).sample(others, shots)]


def prompts(task: CoreTask, item: Item, examples: Sequence[Item]) -> list[str]:
    """The texts that an item becomes, solved examples before it.

    One for each choice, or each option of the context; of a language modelling task first the text as far as the model
    is given it, then with what it should continue it with.
    """

    def solved(item: Item) -> str:
        match task.kind:
            case "multiple_choice":
                return item["query"] + task.delimiter + item["choices"][item["gold"]]
            case "schema":
                return item["context_options"][item["gold"]] + task.delimiter + item["continuation"]
        return item["context"].strip() + task.delimiter + item["continuation"]

    before = "".join(solved(example) + "\n\n" for example in examples)
    match task.kind:
        case "multiple_choice":
            return [before + item["query"] + task.delimiter + choice for choice in item["choices"]]
        case "schema":
            options = item["context_options"]
            return [before + option + task.delimiter + item["continuation"] for option in options]
    given = before + item["context"].strip() + task.delimiter
    return [given.strip(), given + item["continuation"]]


def choices(task: CoreTask, item: Item, rows: list[list[int]], max_len: int) -> Choices:
    """What of the tokens is scored, and what the sequences have in common.

    Args:
        task: says where the scored part begins: behind what all choices begin with, before what all options end with,
            or behind what the model is given.
        item: for what is right.
        rows: tokens of each of its prompts, behind bos.
        max_len: of a sequence; of a longer one the tail is kept.

    Returns:
        At least one token of each sequence is scored, and one comes before it.
    """
    tokens = [np.array(row, np.int32) for row in rows]
    common = _common([row[::-1] for row in tokens] if task.kind == "schema" else tokens)
    if task.kind == "language_modeling":
        tokens = tokens[1:]
    if min(map(len, tokens)) < 2:
        raise UserError("it holds no text")
    count = min(max(common, 1), min(map(len, tokens)) - 1)
    starts = [len(row) - count if task.kind == "schema" else count for row in tokens]
    excess = [max(0, len(row) - max_len) for row in tokens]
    tokens = [row[cut:] for row, cut in zip(tokens, excess, strict=True)]
    starts = [max(start - cut, 1) for start, cut in zip(starts, excess, strict=True)]
    split = min(_common(tokens), min(starts) - 1)
    scored = tuple(len(row) - start for row, start in zip(tokens, starts, strict=True))
    tails = tuple(row[split:] for row in tokens)
    return Choices(tokens[0][:split], tails, scored, item.get("gold", 0), any(excess))


def _common(rows: Sequence[np.ndarray]) -> int:
    """How many tokens all rows begin with."""
    first, *others = rows
    common = len(first)
    for row in others:
        length = min(common, len(row))
        different = np.flatnonzero(first[:length] != row[:length])
        common = int(different[0]) if len(different) else length
    return common


def render(
    task: CoreTask, items: Sequence[Item], indices: Sequence[int], tokenizer: Tokenizer, max_len: int
) -> list[Choices]:
    """The sequences of some of a task's items.

    Raises:
        UserError: the tokenizer cannot write an item, or nothing stands in it.
    """
    rendered = []
    for index in indices:
        item = items[index]
        try:
            texts = prompts(task, item, solved_examples(items, index, task.shots))
            rows = [[tokenizer.bos, *tokenizer.encode(text)] for text in texts]
            rendered.append(choices(task, item, rows, max_len))
        except UserError as error:
            raise UserError(f"task {task.name} ({task.path}), item {index:,} in CORE's order: {error}") from error
    return rendered


def is_right(task: CoreTask, item: Choices, nats: Sequence[float], hits: Sequence[bool]) -> bool:
    """Whether the model chose rightly.

    Args:
        task: of a language modelling task every scored token must be the likeliest, of the others the right sequence
            must have the lowest mean loss, the first of equals.
        item: the sequences.
        nats: summed over the scored tokens of each.
        hits: whether each of them was the likeliest.
    """
    if task.kind == "language_modeling":
        return hits[0]
    means = [total / count for total, count in zip(nats, item.scored, strict=True)]
    return means.index(min(means)) == item.gold
