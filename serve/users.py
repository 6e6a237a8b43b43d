"""Somebody who asks a server and reads the answer: by the API, or by the app's page. For the load test."""

import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx


class Failed(Exception):
    """There is no answer."""


@dataclass
class Asked:
    """A question, and what came of it so far."""

    prompt: str
    seed: int
    at: float = field(default_factory=time.monotonic)
    first: float | None = None  # when the first word came
    tokens: int = 0

    def has_words(self) -> None:
        self.first = self.first or time.monotonic()


class ApiUser:
    """Asks by the API."""

    def __init__(self, client: httpx.AsyncClient, model: str, max_tokens: int) -> None:
        self._client, self._model, self._max_tokens = client, model, max_tokens

    async def ask(self, asked: Asked) -> None:
        """Ask, and read all of the answer; Failed if there is none."""
        common = {"model": self._model, "max_tokens": self._max_tokens, "seed": asked.seed, "stream": True}
        messages = [{"role": "user", "content": asked.prompt}]
        body = common | {"messages": messages, "temperature": 0.8, "stream_options": {"include_usage": True}}
        ended, finish = False, None
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for data in _events(response):
                if data == "[DONE]":
                    ended = True
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise Failed(chunk["error"]["message"])
                for choice in chunk["choices"]:
                    if choice["delta"].get("content") or choice["delta"].get("parts"):
                        asked.has_words()
                    finish = choice["finish_reason"] or finish
                asked.tokens += (chunk["usage"] or {}).get("completion_tokens", 0)
        if not ended or finish not in ("stop", "length", "content_filter"):
            raise Failed(f"a stream ended early: [DONE] {ended}, finish_reason {finish}")


class PageUser:
    """Asks as a browser does that shows the app's page, by Gradio's protocol."""

    def __init__(self, client: httpx.AsyncClient, model: str, max_tokens: int) -> None:
        self._client, self._model, self._max_tokens = client, model, max_tokens
        self._session, self._functions = uuid.uuid4().hex, dict[str, int]()

    async def ask(self, asked: Asked) -> None:
        """Send a message, and read all of the answer; Failed if there is none."""

        def hear(output: list[Any]) -> None:
            if '"assistant"' in json.dumps(output[0]):
                asked.has_words()

        if not self._functions:
            await self._open()
        chat, *_ = await self._call("say", [asked.prompt, {"id": uuid.uuid4().hex, "messages": []}])
        how = [self._model, "", 0.8, 50, 1, 0, 1, self._max_tokens, asked.seed, True]
        _, _, stats, _ = await self._call("respond", [chat, *how], hear)
        if not (written := re.search(r"(\d+) written", str(stats))):
            raise Failed("the page does not tell what an answer took")
        asked.tokens = int(written[1])

    async def _open(self) -> None:
        """What the page does first: it asks which models there are."""
        page = (await self._client.get("/config")).raise_for_status().json()
        self._functions = {function["api_name"]: function["id"] for function in page["dependencies"]}
        await self._call("refresh", [None])

    async def _call(self, name: str, data: list[Any], hear: Callable[[list[Any]], None] | None = None) -> list[Any]:
        """What a function of the page returns in the end; what it returns before is heard as it comes."""
        body = {"data": data, "fn_index": self._functions[name], "session_hash": self._session}
        (await self._client.post("/gradio_api/queue/join", json=body)).raise_for_status()
        where = {"session_hash": self._session}
        async with self._client.stream("GET", "/gradio_api/queue/data", params=where) as response:
            async for sent in _events(response):
                message = json.loads(sent)
                if message["msg"] == "process_generating" and hear:
                    hear(message["output"]["data"])
                if message["msg"] == "process_completed":
                    if not message["success"]:
                        raise Failed(message["output"].get("error") or "the page failed")
                    return message["output"]["data"]
        raise Failed(f"the stream of {name} ended early")


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    if response.status_code != 200:
        raise Failed(f"status {response.status_code}: {(await response.aread()).decode()[:200]}")
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")
