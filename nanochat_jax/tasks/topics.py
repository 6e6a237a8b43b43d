"""Tasks whose questions and answers stand in a small file: who the model is, and what it refuses.

A file has fields, which stand in braces in its answers, and topics. A topic has questions to learn from, other
`held_out` ones to test with, answers of which each is as good, and what an answer must and must not match.
"""

import itertools
import random
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat_jax.chat import conversation
from nanochat_jax.config import from_json
from nanochat_jax.errors import UserError
from nanochat_jax.tasks.task import Example, Task, check_split

OPENINGS = ("", "Hi! ", "Hello. ", "Please tell me: ", "One question: ")
MAX_ANSWER_CHARACTERS = 600  # a longer one is not an answer to these questions


@dataclass(frozen=True)
class Topic:
    """Questions with one kind of answer."""

    name: str
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    answers: tuple[str, ...]
    must: tuple[str, ...] = ()  # texts of which the answer contains one
    must_not: tuple[str, ...] = ()  # texts of which it contains none


def task(name: str, path: Path) -> Task:
    """The task that a file of topics describes."""

    def examples(split: str) -> Sequence[Example]:
        check_split(name, split)
        return [example for topic in load_topics(path) for example in topic_examples(topic, split)]

    return Task(name, "generative", examples, judge)


def load_topics(path: Path) -> list[Topic]:
    """Read a file of topics.

    Raises:
        UserError: that names the file and what is wrong with it.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read topics from {path}: {error}") from error
    topics, fields = data.pop("topic", []), {key: str(value) for key, value in data.items()}
    if not topics or not isinstance(topics, list) or not all(isinstance(topic, dict) for topic in topics):
        raise UserError(f"{path} has no [[topic]]: each topic begins with this line, in double brackets")
    return [_load_topic(topic, fields, f"{path}, topic {number}") for number, topic in enumerate(topics)]


def _load_topic(values: dict[str, list[str]], fields: dict[str, str], where: str) -> Topic:
    filled = {}
    for key, value in values.items():
        texts = value if isinstance(value, list) else [value]
        try:
            filled[key] = [text.format(**fields) for text in texts] if key != "name" else value
        except (AttributeError, KeyError, IndexError, ValueError) as error:
            raise UserError(f"{where}: {key} holds no text, or a field that the file lacks: {error!r}") from error
    topic = from_json(Topic, filled, where)
    for key in ("questions", "held_out", "answers"):
        if not getattr(topic, key):
            raise UserError(f"{where}: {key} is empty")
    if both := set(topic.questions) & set(topic.held_out):
        raise UserError(f"{where}: {min(both)!r} is both in questions and in held_out")
    return topic


def topic_examples(topic: Topic, split: str) -> list[Example]:
    """Train: each question with each opening, as written and carelessly; test: the held-out questions."""
    if split == "test":
        asked = list(topic.held_out)
    else:
        asked = [opening + q for q, opening in itertools.product(topic.questions, OPENINGS)]
        asked += [question.lower().rstrip("?.!") for question in topic.questions]
    rng = random.Random(topic.name)
    return [Example(conversation(question, rng.choice(topic.answers)), topic) for question in asked]


def judge(example: Example, answer: str) -> bool:
    """The answer has what it must and nothing that it must not, as whole words in any case."""
    topic = example.reference
    if not answer.strip() or len(answer) > MAX_ANSWER_CHARACTERS:
        return False
    plain = answer.replace("’", "'")
    has_one = not topic.must or any(_contains(plain, text) for text in topic.must)
    return has_one and not any(_contains(plain, text) for text in topic.must_not)


def _contains(answer: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w|-\w)", answer, re.IGNORECASE) is not None
