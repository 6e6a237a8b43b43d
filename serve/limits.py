"""What one client may ask of a server: an ASGI middleware for a key, size, rate, concurrency and time."""

import asyncio
import hmac
import json
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat_jax.errors import UserError
from serve.schemas import ApiError

MAX_CLIENTS = 10_000  # whose rate is remembered
DISCARDED_BODIES = 32  # times the limit that is read of a body that is too large, so that its sender hears the answer


@dataclass(frozen=True)
class Limits:
    """For each client, told by its address; 0 is no limit."""

    body_bytes: int = 1 << 20
    """Size of a request."""
    requests_per_minute: int = 240
    """Rate of requests; a client that was quiet may send as many at once."""
    concurrent: int = 32
    """Requests that are being answered."""
    send_seconds: float = 30
    """For a client to send a request."""
    request_seconds: float = 600
    """For a request from its first byte to the last of the answer, which a slow reader may not have read by then."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise UserError(f"--limits.{name.replace('_', '-')} {value} must be at least 0")


class Limiter:
    """Applies limits to all paths that begin with a prefix.

    Args:
        app: what answers.
        limits: for each client.
        api_key: that a client must know, if any.
        prefix: of the paths.
    """

    def __init__(self, app: ASGIApp, limits: Limits, api_key: str = "", prefix: str = "/v1/") -> None:
        self._app, self._limits, self._prefix = app, limits, prefix
        self._key = f"Bearer {api_key}".encode() if api_key else b""
        self._running: Counter[str] = Counter()
        self._rates: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what is left, and at what time

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(self._prefix):
            return await self._app(scope, receive, send)
        client = scope["client"][0] if scope["client"] else ""
        try:
            self._admit(scope, client)
        except ApiError as error:
            return await refuse(error, send)
        self._running[client] += 1
        try:
            async with asyncio.timeout(self._limits.request_seconds or None):
                try:
                    body = await self._read(scope, receive)
                except ApiError as error:
                    return await refuse(error, send)
                await self._app(scope, _replayed(body, receive), send)
        except TimeoutError:
            return  # an answer that was begun cannot become an error; the server ends the connection
        finally:
            self._running[client] -= 1
            if not self._running[client]:
                del self._running[client]

    def _admit(self, scope: Scope, client: str) -> None:
        headers = dict(scope["headers"])
        if self._key and not hmac.compare_digest(headers.get(b"authorization", b""), self._key):
            raise ApiError(401, "the API key is missing or wrong; send it as: Authorization: Bearer …", "invalid_key")
        rate = self._limits.requests_per_minute
        if rate:
            now = time.monotonic()
            left, at = self._rates.pop(client, (float(rate), now))
            left = min(rate, left + (now - at) * rate / 60)
            self._rates[client] = (max(0.0, left - 1) if left >= 1 else left, now)
            if len(self._rates) > MAX_CLIENTS:
                self._rates.popitem(last=False)
            if left < 1:
                raise ApiError(429, f"more than {rate} requests a minute; try again in a while", "rate_limit_exceeded")
        if 0 < self._limits.concurrent <= self._running[client]:
            most = self._limits.concurrent
            raise ApiError(429, f"more than {most} requests at once; wait for one to end", "rate_limit_exceeded")

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, also of clients that do not tell its length."""
        most = self._limits.body_bytes or 1 << 62
        pieces, size, more = list[bytes](), 0, True
        try:
            async with asyncio.timeout(self._limits.send_seconds or None):
                while more and size <= most * DISCARDED_BODIES:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        break
                    size += len(message.get("body", b""))
                    more = message.get("more_body", False)
                    if size <= most:
                        pieces.append(message.get("body", b""))
        except TimeoutError:
            raise ApiError(408, f"the request took longer than {self._limits.send_seconds:g} s to send") from None
        if size > most:
            raise ApiError(413, f"the request is larger than {most:,} bytes; shorten it", "request_too_large")
        return b"".join(pieces)


def _replayed(body: bytes, receive: Receive) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def refuse(error: ApiError, send: Send) -> None:
    """Answer with an error."""
    body = json.dumps(error.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | error.headers
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
