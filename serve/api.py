"""A server that OpenAI's clients can talk to.

    python -m serve.api --backend.checkpoint runs/demo/rl
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "demo/rl", "messages": [{"role": "user", "content": "Hello!"}]}'

    client = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="any")

/v1/models, /v1/chat/completions, /v1/completions; /healthz, /metrics (Prometheus), /openapi.json. A message has what
was said in `content`, and in `parts` the tool calls and their outputs as well; a streamed delta has in `parts` the tool
calls alone. finish_reason is stop, length (max_tokens, the context or the time limit) or content_filter (the safety
policy).
No conversation is written to disk.
"""

import asyncio
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from nanochat_jax.dialogue import Busy, NoRoom
from nanochat_jax.errors import UserError
from nanochat_jax.sampling import Sampling
from serve.answers import CHAT, COMPLETION, Answer, Events, EventStream, unless_gone
from serve.backend import Backend
from serve.choices import Choice
from serve.limits import BodyLimit, Clients, Limiter, Limits
from serve.metrics import Counted, Metrics
from serve.models import BackendConfig, ModelInfo
from serve.schemas import MAX_CHOICES, ApiError, ChatRequest, CompletionRequest, ErrorBody, explain
from train import cli


@dataclass(frozen=True)
class Config:
    backend: BackendConfig = field(default_factory=BackendConfig)
    limits: Limits = field(default_factory=Limits)
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 8000
    api_key: str = ""
    """Key that clients must know; default: the environment variable NANOCHAT_API_KEY, or none."""


def secret(given: str, name: str) -> str:
    """What was given on the command line, or else in the environment, which other users of a machine cannot see."""
    return given or os.environ.get(name, "")


def create_app(backend: Backend, clients: Clients, api_key: str = "") -> FastAPI:
    """The server's app, which can be part of another.

    Args:
        backend: what answers; it stays open.
        clients: counted together with those of other servers of one process.
        api_key: that a client must know, if any.
    """
    metrics = Metrics(backend)
    app = FastAPI(title="nanochat-jax", docs_url=None, redoc_url=None)
    app.include_router(_routes(backend, metrics))
    app.add_middleware(BodyLimit, limits=clients.limits)
    app.add_middleware(Limiter, clients=clients, api_key=api_key)
    app.add_middleware(Counted, metrics=metrics)
    for kind in (ApiError, UserError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    return app


async def _on_error(_: Request, error: Exception) -> Response:
    match error:
        case ApiError():
            answer = error
        case Busy():
            answer = ApiError(429, str(error), "queue_full")
        case UserError():
            answer = ApiError(400, str(error))
        case RequestValidationError():
            answer = explain(list(error.errors()))
        case HTTPException():
            answer = ApiError(error.status_code, str(error.detail))
        case _:
            answer = ApiError(500, "the server failed; its log says how")
    if isinstance(error, HTTPException):
        answer.headers = {**(error.headers or {}), **answer.headers}
    return answer.response()


def _routes(backend: Backend, metrics: Metrics) -> APIRouter:
    router = APIRouter(responses={"default": {"model": ErrorBody, "description": "What was wrong."}})
    answers: dict[int | str, dict[str, Any]] = {
        200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "The answer."}
    }

    async def find(name: str) -> ModelInfo:
        try:
            return await asyncio.to_thread(backend.find, name)
        except UserError as error:
            raise ApiError(404, str(error), "model_not_found", "model") from error

    async def respond(
        body: ChatRequest | CompletionRequest, answer: Answer, model: ModelInfo, top: int | None
    ) -> Response:
        loaded, count = await backend.ready(model.name), len(answer.streams)
        if count > loaded.service.capacity:  # which no waiting would change
            message = f"n: {count} choices are more than the {loaded.service.capacity} this server can hold at once"
            raise ApiError(400, f"{message}; ask for fewer", param="n")
        try:
            first = await answer.begin()
        except NoRoom as error:
            field = "max_completion_tokens" if getattr(body, "max_completion_tokens", None) else "max_tokens"
            raise ApiError(400, f"{field}: {error}", param=field) from error
        choices = [Choice(index, loaded.model.tokenizer, top) for index in range(len(first))]
        if body.stream:
            return EventStream(answer, answer.chunks(choices, first, body.include_usage))
        return await answer.whole(choices, first)

    @router.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok", "loaded": sorted(backend.stats())}

    @router.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")

    @router.get("/v1/models")
    @router.get("/v1/models/", include_in_schema=False)
    async def list_models() -> dict[str, Any]:
        models = list[ModelInfo]()
        with suppress(UserError):  # there is none
            models = await asyncio.to_thread(backend.models)
        return {"object": "list", "data": [_model_object(model) for model in models]}

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        return _model_object(await find(name))

    @router.post("/v1/chat/completions", responses=answers, response_class=Response)
    async def chat(body: ChatRequest, request: Request) -> Response:
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs to be true", param="top_logprobs")
        model = await find(body.model)
        streams: list[Events] = [
            backend.chat(
                body.conversation,
                model=model.name,
                sampling=sampling,
                max_new_tokens=body.max_completion_tokens or body.max_tokens,
                stops=body.stops,
                use_tools=body.use_tools,
            )
            for sampling in _samplings(body)
        ]
        answer = Answer(CHAT, model, streams)
        top = (body.top_logprobs or 0) if body.logprobs else None
        return await unless_gone(request, respond(body, answer, model, top))

    @router.post("/v1/completions", responses=answers, response_class=Response)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        if len(body.prompts) * (body.n or 1) > MAX_CHOICES:
            raise ApiError(400, f"n: all prompts together may have {MAX_CHOICES} choices", param="n")
        model = await find(body.model)
        streams: list[Events] = [
            backend.complete(
                prompt,
                model=model.name,
                sampling=sampling,
                max_new_tokens=body.max_tokens or 16,
                stops=body.stops,
            )
            for prompt in body.prompts
            for sampling in _samplings(body)
        ]
        answer = Answer(COMPLETION, model, streams, len(body.prompts))
        return await unless_gone(request, respond(body, answer, model, body.logprobs))

    return router


def _samplings(body: ChatRequest | CompletionRequest) -> Sequence[Sampling]:
    """How each choice is sampled."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    seed = secrets.randbits(32) if body.seed is None else body.seed
    return [Sampling(**given, seed=(seed + choice) % 2**32) for choice in range(body.n or 1)]


def _model_object(model: ModelInfo) -> dict[str, Any]:
    known = {"stage": model.stage, "step": model.step, "is_chat": model.is_chat}
    return {"id": model.name, "object": "model", "created": int(model.saved), "owned_by": "nanochat-jax", **known}


def main(config: Config) -> None:
    """Serve until a signal comes."""
    backend = Backend(config.backend)
    try:
        backend.service()
        names = ", ".join(model.name for model in backend.models())
        print(f"serving {names} at http://{config.host}:{config.port}/v1", flush=True)
        uvicorn.run(
            create_app(backend, Clients(config.limits), secret(config.api_key, "NANOCHAT_API_KEY")),
            host=config.host,
            port=config.port,
            log_level="warning",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=5,
        )
    finally:
        backend.close()


if __name__ == "__main__":
    cli.run(main, Config)
