"""Between conversations and an engine: what fits into the context, and a thread that answers many at once.

    with Service(engine, tokenizer) as service:
        tokens, dropped = fit(conversation, tokenizer, service.context_len, reserve=256)
        for event in service.submit(Request(tokens, 256)):  # or: async for
            ...

App, API and terminal share this. The thread owns the engine; everything else may be called from any thread or task.
"""

import logging
import statistics
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

from nanochat_jax.chat import Conversation, render_prompt
from nanochat_jax.engine import Engine
from nanochat_jax.errors import UserError
from nanochat_jax.requests import Output, Request
from nanochat_jax.streaming import Delta, Ended, Event, Handle, Usage, closing_tokens, joined
from nanochat_jax.tokenizer import Tokenizer

log = logging.getLogger(__name__)

RATE_SECONDS = 10.0  # over which the rate of tokens is measured
LATENCIES = 256  # requests over which the time to the first token is


class Busy(UserError):
    """Too many requests are waiting already; later there may be room."""


class NoRoom(UserError):
    """More tokens are asked for than an answer can have, or none."""


class Fitted(NamedTuple):
    """A prompt that leaves room for an answer."""

    tokens: list[int]
    dropped: int  # turns left out: a user's message and its answer each


def fit(conversation: Conversation, tokenizer: Tokenizer, context_len: int, reserve: int) -> Fitted:
    """The prompt for the next answer; where it is too long, without the oldest turns, but never without the system's.

    Args:
        conversation: it ends with the user.
        tokenizer: of the model.
        context_len: tokens of prompt and answer together.
        reserve: tokens left for the answer.

    Raises:
        NoRoom: no such answer fits, however short the prompt.
        UserError: it is no such conversation, or its last message alone is too long.
    """
    limit = context_len - reserve
    tokens = render_prompt(conversation, tokenizer)
    if len(tokens) <= limit < context_len:
        return Fitted(tokens, 0)
    messages = conversation["messages"]
    first = int(messages[0]["role"] == "system")
    turns = (len(messages) - first - 1) // 2

    def without(dropped: int) -> list[int]:
        return render_prompt({"messages": messages[:first] + messages[first + 2 * dropped :]}, tokenizer)

    least = len(without(turns))
    most = context_len - least
    if most > 0 and not 0 < limit < context_len:
        raise NoRoom(f"{reserve} tokens of answer do not fit into a context of {context_len}; ask for 1 to {most}")
    if least > limit or most < 1:
        what = "the last message, with the system message," if first else "the last message"
        raise UserError(
            f"{what} takes {least} tokens, and a context of {context_len} tokens, {reserve} of them reserved for the "
            f"answer, has room for {max(limit, 0)}: shorten it" + (f", or ask for at most {most}" if most > 0 else "")
        )
    dropped = bisect_left(range(turns), True, key=lambda dropped: len(without(dropped)) <= limit)
    return Fitted(without(dropped), dropped)


class Service:
    """Runs an engine on a thread of its own.

    Args:
        engine: idle; nobody else may use it from now on.
        tokenizer: of its model.
        max_waiting: requests that may wait for a slot.
        deadline_seconds: from submission to the last token, for requests that set no other.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, *, max_waiting: int = 64, deadline_seconds: float = 600.0
    ) -> None:
        self.tokenizer, self.context_len = tokenizer, engine.context_len
        self._engine, self._deadline_seconds = engine, deadline_seconds
        self.capacity = engine.config.slots + max_waiting  # requests that are answered or wait
        self._closing = tuple(closing_tokens(tokenizer))
        self._changed = threading.Condition()
        self._inbox: list[Handle] = []
        self._active: dict[int, Handle] = {}  # by the engine's numbers; changed by the thread alone
        self._closed = False
        self._finished: Counter[str] = Counter()
        self._rejected = self._completion_tokens = 0
        self._rate: deque[tuple[float, int]] = deque()  # when, and how many tokens
        self._latencies: deque[float] = deque(maxlen=LATENCIES)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: Request, *, stops: Sequence[str] = (), deadline_seconds: float | None = None) -> Handle:
        """Queue a request.

        Args:
            request: as the engine takes it; control tokens that do not belong inside an answer end it in any case.
            stops: texts to end before; the token that completes one is the last.
            deadline_seconds: as the service's.

        Raises:
            UserError: it cannot be answered, or the service is closed.
            Busy: too many are waiting.
        """
        request = replace(request, stop_tokens=(*request.stop_tokens, *self._closing))
        self._engine.check(request)
        seconds = self._deadline_seconds if deadline_seconds is None else deadline_seconds
        handle = Handle(request, stops, self.tokenizer, seconds)
        with self._changed:
            if self._closed:
                raise UserError("the service is closed")
            if len(self._inbox) + len(self._active) >= self.capacity:
                self._rejected += 1
                raise Busy(f"{self.capacity} requests are being answered or waiting; try again in a while")
            self._inbox.append(handle)
            self._changed.notify_all()
        return handle

    def close(self) -> None:
        """Cancel what is left and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def stats(self) -> dict[str, Any]:
        """Numbers for a monitor: gauges, and counters since the start."""
        with self._changed:
            since = time.monotonic() - RATE_SECONDS
            running, waiting = self._engine.load
            return {
                "running": running,
                "waiting": waiting + len(self._inbox),
                "finished": dict(self._finished),
                "rejected": self._rejected,
                "prompt_tokens": self._engine.prefill.prompt_tokens,
                "reused_tokens": self._engine.prefill.reused_tokens,
                "completion_tokens": self._completion_tokens,
                "tokens_per_second": sum(tokens for at, tokens in self._rate if at > since) / RATE_SECONDS,
                "first_token_seconds": statistics.median(self._latencies) if self._latencies else None,
            }

    def _run(self) -> None:
        try:
            while not self._closed:
                self._round()
        finally:  # also where an engine could not be reset: nobody shall wait for it
            with self._changed:
                self._closed = True
                self._accept()
            for number in list(self._active):
                self._end(number, "cancelled")

    def _accept(self) -> None:
        for handle in self._inbox:
            self._active[self._engine.submit(handle.request)] = handle
        self._inbox.clear()

    def _round(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._inbox or self._active)
            self._accept()
        for number, handle in list(self._active.items()):
            if handle.cancelled:
                self._end(number, "cancelled")
            elif time.monotonic() > handle.deadline:
                self._end(number, "deadline")
        try:
            for output in self._engine.step():
                self._deliver(output)
        except Exception as error:
            log.exception("the engine failed; %d requests end with it", len(self._active))
            for number in list(self._active):
                self._end(number, "error", f"{type(error).__name__}: {error}")
            self._engine.reset()

    def _deliver(self, output: Output) -> None:
        handle, now = self._active[output.request], time.monotonic()
        handle.first_token = handle.first_token or now
        deltas: list[Delta] = []
        read = 0
        while read < len(output.tokens) and not handle.stream.ended:
            deltas += handle.stream.push(output.tokens[read])
            read += 1
        handle.completion_tokens += read
        with self._changed:
            self._completion_tokens += read
            self._rate.append((now, read))
            while self._rate[0][0] < now - RATE_SECONDS:
                self._rate.popleft()
        reason = "stop" if handle.stream.ended else output.finish_reason
        if reason:
            self._end(output.request, reason, deltas=deltas, output=output.first(read))
        else:
            handle.put(Event(joined(deltas), output.first(read)))

    def _end(
        self,
        number: int,
        reason: Ended,
        error: str = "",
        deltas: Sequence[Delta] = (),
        output: Output | None = None,
    ) -> None:
        handle, now = self._active.pop(number), time.monotonic()
        self._engine.cancel(number)
        first = None if handle.first_token is None else handle.first_token - handle.submitted
        usage = Usage(len(handle.request.prompt), handle.completion_tokens, first, now - handle.submitted)
        with self._changed:
            self._finished[reason] += 1
            if first is not None:
                self._latencies.append(first)
        last = joined((*deltas, *handle.stream.finish()))
        handle.put(Event(last, output or Output(number), reason, usage, error))
