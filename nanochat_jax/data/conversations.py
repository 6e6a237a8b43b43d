"""Where conversations come from: short specs name sources, and weights mix them.

Sources: `chitchat` (people) and `chatterbot` (short dialogues), which pip installs; `task:NAME` (see tasks/);
`jsonl:GLOB` (OpenAI's chat format, one `{"messages": […]}` a line); `parquet:GLOB`, `tfds:NAME#SPLIT` and
`hub:OWNER/NAME#GLOB` (rows with a field "messages"). `SOURCE#N` takes the first N, `SOURCE*W` takes each W times:

    task:spelling#5000,task:identity*10,chitchat*0.5

Tasks have test splits; of every other source a twentieth is held out, chosen by hash.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import takewhile
from typing import Any

import numpy as np
import yaml

from nanochat_jax.chat import Conversation, Message, check_conversation, conversation
from nanochat_jax.data.rows import Lazy, is_held_out, open_rows, row_conversation
from nanochat_jax.data.sources import PROFANITY, open_source, package_folder
from nanochat_jax.errors import UserError
from nanochat_jax.tasks import open_task

VAL_SHARE = 0.05
SPLITS = ("train", "val")
_ENTRY = re.compile(r"(.+?)(?:#([0-9]+))?(?:\*([0-9]+(?:\.[0-9]+)?))?")
_ALTERNATIVES = ("computers", "emotion")  # files where what follows a question are answers to choose from


def open_mixture(mix: str, split: str = "train", *, seed: int = 0) -> Sequence[Conversation]:
    """Conversations of several sources in one fixed order.

    Args:
        mix: sources with commas between, as in the module's docstring.
        split: train, or val, which has the held-out conversations and the tasks' tests.
        seed: of the order, and of what a weight that is no whole number leaves out.

    Raises:
        UserError: if a source is unknown or cannot be read, or there are no conversations to train on.
    """
    rng = np.random.default_rng(seed)
    sources = [_open_entry(entry.strip(), split, rng) for entry in mix.split(",")]
    order = rng.permutation(sum(len(indices) for _, indices in sources))
    numbers = np.concatenate([np.full(len(indices), n) for n, (_, indices) in enumerate(sources)])[order]
    indices = np.concatenate([indices for _, indices in sources])[order]
    if not len(order) and split == "train":
        raise UserError(f"the mixture {mix!r} has no conversations for training")
    return Lazy(len(order), lambda i: sources[numbers[i]][0][int(indices[i])])


def join_turns(conversations: Iterable[Conversation], most: int, seed: int) -> Iterator[Conversation]:
    """Let conversations of one question and its answer follow each other, as people ask one thing after another.

    Args:
        conversations: those with a system message or several turns are left as they are.
        most: turns of a joined conversation; each has from 1 to so many, evenly drawn.
        seed: of the drawing.
    """
    rng = np.random.default_rng(seed)
    joined: list[Message] = []
    room = 0
    for chat in conversations:
        if len(chat["messages"]) != 2:
            yield chat
            continue
        if not room:
            if joined:
                yield {"messages": joined}
            joined, room = [], int(rng.integers(1, most + 1))
        joined = [*joined, *chat["messages"]]
        room -= 1
    if joined:
        yield {"messages": joined}


def _open_entry(entry: str, split: str, rng: np.random.Generator) -> tuple[Sequence[Conversation], np.ndarray]:
    """A source and the numbers of its conversations to take, some perhaps several times."""
    if not (match := _ENTRY.fullmatch(entry)):
        raise UserError(f"{entry!r} in a mixture is not SOURCE, SOURCE#N, SOURCE*WEIGHT or SOURCE#N*WEIGHT")
    spec, count, weight = match[1], match[2], float(match[3] or 1)
    source = open_conversations(spec, split)
    size = min(len(source), int(count)) if count else len(source)
    rest = rng.permutation(size)[: round(weight % 1 * size)]
    return source, np.concatenate([np.tile(np.arange(size), int(weight)), rest]).astype(np.int64)


def open_conversations(spec: str, split: str = "train") -> Sequence[Conversation]:
    """The training or held-out conversations of one source, valid ones only.

    Raises:
        UserError: if the source is unknown or cannot be read; once asked for, for a conversation that is not valid.
    """
    kind, _, argument = spec.partition(":")
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: choose {' or '.join(SPLITS)}")
    if kind == "task":
        examples = open_task(argument).examples("train" if split == "train" else "test")
        return Lazy(len(examples), lambda i: examples[i].conversation)
    if kind not in KINDS:
        raise UserError(f"unknown source of conversations {spec!r}; kinds are task, {', '.join(KINDS)}")
    everything, key = KINDS[kind](argument)
    kept = [i for i in range(len(everything)) if is_held_out(key(i), VAL_SHARE) == (split == "val")]
    return Lazy(len(kept), lambda i: everything[kept[i]])


type Keyed = tuple[Sequence[Conversation], Callable[[int], str]]  # conversations, and by what each is held out


def _by_first_message(conversations: Sequence[Conversation]) -> Keyed:
    return conversations, lambda i: str(conversations[i]["messages"][0]["content"])


def _rows(kind: str, argument: str) -> Keyed:
    rows = open_rows(f"{kind}:{argument}")
    if kind == "jsonl":  # a user's own file, where an unknown field is a mistake
        return Lazy(len(rows), lambda i: check_conversation(rows[i].values, rows[i].where)), str
    return Lazy(len(rows), lambda i: row_conversation(rows[i])), str


def _chitchat(argument: str) -> Keyed:
    source = open_source(f"chitchat{argument and ':'}{argument}")
    documents = (text for unit in range(len(source.units)) for text in source.documents(unit))
    # A turn without text (people send stickers) ends a conversation: what follows answers something unseen.
    return _by_first_message(list(_in_turns(takewhile(str.strip, text.split("\n")) for text in documents)))


@cache
def _chatterbot_dialogues() -> list[list[str]]:
    folder = package_folder("chatterbot_corpus", "chatterbot-corpus", "") / "data" / "english"
    dialogues: list[list[str]] = []
    for path in sorted(folder.glob("*.yml")):
        for dialogue in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            texts = [" ".join(text.split()) if "\n" not in text else text.strip() for text in _texts(dialogue)]
            if PROFANITY.isdisjoint(re.findall(r"\w+", " ".join(texts).lower())):
                dialogues += [[texts[0], answer] for answer in texts[1:]] if path.stem in _ALTERNATIVES else [texts]
    return dialogues


def _texts(dialogue: Any) -> list[str]:
    """Turns of a dialogue; one in the corpus lacks a hyphen, and is a question and its answer in one string."""
    return dialogue if isinstance(dialogue, list) else [part.strip(" '") for part in dialogue.rsplit(" - ", 1)]


def _chatterbot(argument: str) -> Keyed:
    package_folder("chatterbot_corpus", "chatterbot-corpus", argument)
    return _by_first_message(list(_in_turns(_chatterbot_dialogues())))


def _in_turns(dialogues: Any) -> Iterator[Conversation]:
    """Whoever speaks first is the user; a last word of the user's, which nobody answers, is left out."""
    for dialogue in dialogues:
        turns = list(dialogue)
        if len(turns) >= 2:
            yield conversation(*turns[: len(turns) // 2 * 2])


KINDS: dict[str, Callable[[str], Keyed]] = {
    "chitchat": _chitchat,
    "chatterbot": _chatterbot,
    "jsonl": lambda argument: _rows("jsonl", argument),
    "parquet": lambda argument: _rows("parquet", argument),
    "tfds": lambda argument: _rows("tfds", argument),
    "hub": lambda argument: _rows("hub", argument),
}
