"""Numbers for Prometheus: of the models that run, and of the requests that came."""

import time
from collections.abc import Iterable
from typing import Any, cast

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.backend import Backend

GAUGES = {
    "running": "Requests that are being answered.",
    "waiting": "Requests that wait for a slot.",
    "tokens_per_second": "Tokens written, over the last ten seconds.",
    "first_token_seconds": "Median time to the first token, over the last requests.",
}
COUNTERS = {
    "rejected": "Requests refused because too many were waiting.",
    "prompt_tokens": "Tokens of prompts.",
    "reused_tokens": "Tokens of prompts that were remembered from earlier ones.",
    "completion_tokens": "Tokens written.",
}
PATHS = ("/v1/models", "/v1/chat/completions", "/v1/completions")  # others are counted together


class _Models(Collector):
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def collect(self) -> Iterable[Metric]:
        stats = self._backend.stats()
        for name, text in GAUGES.items():
            gauge = GaugeMetricFamily(f"nanochat_{name}", text, labels=["model"])
            for model, numbers in stats.items():
                if numbers[name] is not None:
                    gauge.add_metric([model], cast(float, numbers[name]))
            yield gauge
        for name, text in COUNTERS.items():
            counter = CounterMetricFamily(f"nanochat_{name}", text, labels=["model"])
            for model, numbers in stats.items():
                counter.add_metric([model], cast(float, numbers[name]))
            yield counter
        finished = CounterMetricFamily("nanochat_finished", "Requests that ended.", labels=["model", "reason"])
        for model, numbers in stats.items():
            for reason, count in cast(dict[str, Any], numbers["finished"]).items():
                finished.add_metric([model, reason], count)
        yield finished


class Metrics:
    """All numbers of one server."""

    def __init__(self, backend: Backend) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Models(backend))
        self.requests = Counter(
            "nanochat_http_requests", "Requests over HTTP.", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "nanochat_http_seconds", "From a request to the end of its answer.", ["path"], registry=self.registry
        )

    def page(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)


class Counted:
    """ASGI middleware that counts requests."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.monotonic(), 500  # is what the server says where the app says nothing
        path = scope["path"] if scope["path"] in PATHS else "other"

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.monotonic() - began)
