"""From a backend's events to a response: several choices at once, whole or streamed, for a client that may leave."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.backend import ChatEvent
from serve.choices import Choice, usage
from serve.models import ModelInfo
from serve.schemas import ApiError, json_response

CLIENT_GONE = 499  # what is counted where nobody hears the answer

type Events = AsyncGenerator[ChatEvent]


@dataclass(frozen=True)
class Kind:
    """What tells the two kinds of answers apart: names of objects, and how choices look."""

    prefix: str
    whole: str
    chunk: str
    choice: Callable[[Choice], dict[str, Any]]
    chunk_choice: Callable[[Choice], dict[str, Any]]


CHAT = Kind("chatcmpl", "chat.completion", "chat.completion.chunk", Choice.chat, Choice.chat_chunk)
COMPLETION = Kind("cmpl", "text_completion", "text_completion", Choice.completion, Choice.completion)


class Answer:
    """The answer to one request.

    Args:
        kind: which of the two.
        model: that gives it.
        streams: a backend's events, for each choice.
        prompts: of which each has the same number of choices.
    """

    def __init__(self, kind: Kind, model: ModelInfo, streams: Sequence[Events], prompts: int = 1) -> None:
        self._kind, self.streams, self._prompts = kind, streams, prompts
        self._head = {
            "id": f"{kind.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": f"step-{model.step}",
        }

    async def begin(self) -> list[ChatEvent]:
        """Queue all choices, or none: the first event of each.

        Raises:
            UserError, Busy: what the backend raises.
        """
        try:
            return list(await asyncio.gather(*(anext(stream) for stream in self.streams)))
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Cancel what has not ended."""
        for stream in self.streams:
            with suppress(RuntimeError):  # it is being closed already
                await stream.aclose()

    async def whole(self, choices: Sequence[Choice], first: Sequence[ChatEvent]) -> Response:
        """As one object."""
        try:
            async for index, event in self._events(first):
                choices[index].add(event)
        finally:
            await self.close()
        body = self._head | {"object": self._kind.whole, "choices": [self._kind.choice(choice) for choice in choices]}
        return json_response(body | {"usage": usage(choices, self._prompts)})

    async def chunks(
        self, choices: Sequence[Choice], first: Sequence[ChatEvent], include_usage: bool
    ) -> AsyncIterator[str]:
        """As server-sent events."""
        head = self._head | {"object": self._kind.chunk} | ({"usage": None} if include_usage else {})
        for choice in choices if self._kind is CHAT else ():
            opening = {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield _sent(head | {"choices": [opening]})
        try:
            async for index, event in self._events(first):
                if not (new := choices[index].add(event)).is_empty:
                    yield _sent(head | {"choices": [self._kind.chunk_choice(new)]})
        except ApiError as error:
            yield _sent(error.body)
            return
        finally:
            await self.close()
        if include_usage:
            yield _sent(head | {"choices": [], "usage": usage(choices, self._prompts)})
        yield "data: [DONE]\n\n"

    async def _events(self, first: Sequence[ChatEvent]) -> AsyncIterator[tuple[int, ChatEvent]]:
        """The events of all choices as they come, with the number of the choice."""
        events: asyncio.Queue[tuple[int, ChatEvent | Exception]] = asyncio.Queue()

        async def pump(index: int) -> None:
            try:
                async for event in self.streams[index]:
                    events.put_nowait((index, event))
            except Exception as error:
                events.put_nowait((index, error))

        for numbered in enumerate(first):
            events.put_nowait(numbered)
        tasks = [asyncio.create_task(pump(index)) for index in range(len(self.streams))]
        going = len(tasks)
        try:
            while going:
                index, event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield index, event
                going -= event.finish_reason is not None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(StreamingResponse):
    """Sends chunks, and cancels the answer however that ends, also where it never began."""

    def __init__(self, answer: Answer, chunks: AsyncIterator[str]) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.close()


async def unless_gone(request: Request, answer: Awaitable[Response]) -> Response:
    """The answer, which is cancelled where the client leaves before it is there."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else Response(status_code=CLIENT_GONE)
    finally:
        answering.cancel()
        leaving.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)


def _sent(body: Any) -> str:
    return f"data: {json.dumps(body)}\n\n"
