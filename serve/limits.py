"""What one client may ask of a server: how much, how often, how many things at once, for how long."""

import asyncio
import hmac
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
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
    """Rate of requests; in the app, of messages, ratings and looks at tokens. A quiet one may send as many at once."""
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


class Clients:
    """Counts what each client has asked, and is being answered. For one thread."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._running: Counter[str] = Counter()
        self._rates: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what is left, and at what time

    @contextmanager
    def admitted(self, client: str) -> Iterator[None]:
        """While a request of a client is answered.

        Raises:
            ApiError: it asks too often, or too many things at once.
        """
        rate, most = self.limits.requests_per_minute, self.limits.concurrent
        if rate and not self._take(client, rate):
            raise ApiError(429, f"more than {rate} requests a minute; try again in a while", "rate_limit_exceeded")
        if 0 < most <= self._running[client]:
            raise ApiError(429, f"more than {most} requests at once; wait for one to end", "rate_limit_exceeded")
        self._running[client] += 1
        try:
            yield
        finally:
            self._running[client] -= 1
            if not self._running[client]:
                del self._running[client]

    def _take(self, client: str, rate: int) -> bool:
        now = time.monotonic()
        left, at = self._rates.pop(client, (float(rate), now))
        left = min(rate, left + (now - at) * rate / 60)
        self._rates[client] = (left - 1 if left >= 1 else left, now)
        if len(self._rates) > MAX_CLIENTS:
            self._rates.popitem(last=False)
        return left >= 1


class Limiter:
    """ASGI middleware that asks for a key, and applies the limits, on all paths that begin with a prefix.

    Args:
        app: what answers.
        clients: and their limits.
        api_key: that a client must know, if any.
        prefix: of the paths.
    """

    def __init__(self, app: ASGIApp, clients: Clients, api_key: str = "", prefix: str = "/v1/") -> None:
        self._app, self._clients, self._prefix = app, clients, prefix
        self._key = f"Bearer {api_key}".encode() if api_key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(self._prefix):
            return await self._app(scope, receive, send)
        seconds, begun = self._clients.limits.request_seconds, False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        limit = asyncio.timeout(seconds or None)
        try:
            self._check_key(dict(scope["headers"]))
            with self._clients.admitted(scope["client"][0] if scope["client"] else ""):
                async with limit:
                    await self._app(scope, receive, noted)
        except ApiError as error:
            await error.response()(scope, receive, send)
        except TimeoutError:
            if not limit.expired():
                raise
            if not begun:  # otherwise it cannot become an error any more; the server ends the connection
                late = ApiError(408, f"the answer took longer than {seconds:g} s; ask for a shorter one", "timeout")
                await late.response()(scope, receive, send)

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        if self._key and not hmac.compare_digest(headers.get(b"authorization", b""), self._key):
            raise ApiError(401, "the API key is missing or wrong; send it as: Authorization: Bearer …", "invalid_key")


class BodyLimit:
    """ASGI middleware that refuses what is too large, or too slow to come."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            try:
                receive = _replayed(await self._whole(receive), receive)
            except ApiError as error:
                return await error.response()(scope, receive, send)
        await self._app(scope, receive, send)

    async def _whole(self, receive: Receive) -> bytes:
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
