"""Tokens into text as they come, and from the thread that makes them to whoever reads them.

Text comes in whole characters only, divided into parts, and up to a stop string.
"""

import asyncio
import codecs
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

from nanochat_jax.chat import PART_DELIMITERS, Part
from nanochat_jax.errors import UserError
from nanochat_jax.requests import FinishReason, Output, Request
from nanochat_jax.tokenizer import Tokenizer

Ended = FinishReason | Literal["cancelled", "deadline", "error"]

MAX_STOPS = 16
MAX_STOP_LENGTH = 100  # characters

_STARTS = {ends[0]: kind for kind, ends in PART_DELIMITERS.items() if ends}
_ENDS = {ends[1] for ends in PART_DELIMITERS.values() if ends}


class Delta(NamedTuple):
    """New text of one part of a message."""

    number: int  # of the part; two calls in a row are two parts
    type: Literal["text", "python", "python_output"]
    text: str


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """The stop strings; UserError if there are too many, or one is empty or too long."""
    if isinstance(stops, str) or not all(isinstance(stop, str) for stop in stops):
        raise UserError("stop: must be a list of texts")
    if len(stops) > MAX_STOPS:
        raise UserError(f"stop: {len(stops)} strings are too many; give at most {MAX_STOPS}")
    for number, stop in enumerate(stops):
        if not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise UserError(f"stop: string {number} has {len(stop)} characters; give 1 to {MAX_STOP_LENGTH}")
    return tuple(stops)


def closing_tokens(tokenizer: Tokenizer) -> list[int]:
    """The control tokens that end an answer: all that do not belong inside one."""
    return [token for name, token in tokenizer.control.items() if name not in _STARTS and name not in _ENDS]


class TextStream:
    """Reads tokens one by one and gives out their text as soon as it is certain.

    Held back are bytes that do not yet form a character, and text that may become a stop string. Bytes that can never
    form a character are left out: no replacement character comes out that the model did not write. Stop strings are
    looked for in what is said, not in tool calls and their outputs, and not across these. Where several occur, the one
    that is complete first counts, and of those that end together the longest. What comes out in all is therefore the
    same however the text is cut into tokens.

    Args:
        tokenizer: of the tokens.
        stops: texts to end before.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._pieces, self._stops = tokenizer.pieces, check_stops(stops)
        self._names = {token: name for name, token in tokenizer.control.items()}
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self._number, self._type, self._held = 0, "text", ""
        self.ended = False  # by a stop string, or a control token that does not belong inside an answer

    def push(self, token: int) -> list[Delta]:
        """New text, after one more token; none once the stream has ended."""
        if self.ended:
            return []
        name = self._names.get(token)
        if name is None:
            return self._emit(self._decoder.decode(self._pieces[token]))
        rest = self.finish()
        self.ended = self.ended or (name not in _STARTS and name not in _ENDS)
        self._number, self._type = self._number + 1, _STARTS.get(name, "text")
        return rest

    def finish(self) -> list[Delta]:
        """What was held back, where no more tokens follow."""
        if self.ended:
            return []
        rest = self._emit(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return rest if self.ended else rest + self._delta(held)

    def _emit(self, text: str) -> list[Delta]:
        if self._type != "text" or not self._stops:
            return self._delta(text)
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.ended, end, self._held = True, min(found)[1], ""
        else:
            end = next(
                at
                for at in range(max(0, len(text) - MAX_STOP_LENGTH), len(text) + 1)
                if at == len(text) or any(stop.startswith(text[at:]) for stop in self._stops)
            )
            self._held = text[end:]
        return self._delta(text[:end])

    def _delta(self, text: str) -> list[Delta]:
        return [Delta(self._number, cast(Literal["text"], self._type), text)] if text else []


def joined(deltas: Iterable[Delta]) -> tuple[Delta, ...]:
    """The same text, with one delta for each part."""
    texts: dict[tuple[int, str], str] = {}
    for number, kind, text in deltas:
        texts[number, kind] = texts.get((number, kind), "") + text
    return tuple(Delta(number, cast(Literal["text"], kind), text) for (number, kind), text in texts.items())


def parts(deltas: Iterable[Delta]) -> list[Part]:
    """The parts of a message of which these deltas came, as conversations hold them."""
    return [{"type": delta.type, "text": delta.text} for delta in joined(deltas)]


class Usage(NamedTuple):
    """What an answer took."""

    prompt_tokens: int
    completion_tokens: int  # a tool's answers count too
    first_token_seconds: float | None  # from submission; None if there was none
    seconds: float


@dataclass(frozen=True)
class Event:
    """What is new of an answer; the sum of all events is the whole answer."""

    deltas: tuple[Delta, ...]
    output: Output  # tokens, whose text may be held back until it is certain
    finish_reason: Ended | None = None  # in the last event
    usage: Usage | None = None  # likewise
    error: str = ""

    def __add__(self, later: "Event") -> "Event":
        return replace(later, deltas=self.deltas + later.deltas, output=self.output + later.output)


class Handle:
    """One request's events, for one reader: `for` or `async for`; a reader that leaves early cancels the request.

    A slow reader delays nobody: at most max_new_tokens + 1 events wait for it, and an asynchronous one gets those that
    have come meanwhile as one.
    """

    def __init__(self, request: Request, stops: Sequence[str], tokenizer: Tokenizer, seconds: float) -> None:
        self.request, self.stream = request, TextStream(tokenizer, stops)
        self.submitted = time.monotonic()
        self.deadline = self.submitted + seconds
        self.first_token: float | None = None
        self.completion_tokens, self.cancelled = 0, False
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._wake: Callable[[], object] | None = None  # of an asynchronous reader

    def cancel(self) -> None:
        """Have the request ended soon; its last event says so, if it has not ended before."""
        self.cancelled = True

    def put(self, event: Event) -> None:
        """Called by the service's thread."""
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()
            wake = self._wake
        if wake:
            try:
                wake()
            except RuntimeError:  # the reader's event loop is closed
                self.cancel()

    def __iter__(self) -> Iterator[Event]:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._events)
                    event = self._events.popleft()
                yield event
                if event.finish_reason:
                    return
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(arrived.set)
        try:
            while True:
                arrived.clear()
                while self._events:
                    event = self._events.popleft()
                    while self._events and not self._events[0].error:  # what was said before it is read before it
                        event += self._events.popleft()
                    yield event
                    if event.finish_reason:
                        return
                await arrived.wait()
        finally:
            self._wake = None
            self.cancel()
