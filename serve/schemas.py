"""What the API is asked, as OpenAI's clients ask it, and how it says no.

What OpenAI's API knows and this one cannot do may be sent as long as it changes nothing; everything else is refused.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from nanochat_jax.chat import Conversation, Message, Part
from nanochat_jax.streaming import MAX_STOP_LENGTH, MAX_STOPS
from serve.models import TOP_LOGPROBS

MAX_MESSAGES = 256
MAX_CHARACTERS = 200_000  # of one text
MAX_CHOICES = 8
MAX_NEW_TOKENS = 1 << 16

Text = Annotated[str, Field(max_length=MAX_CHARACTERS, pattern=r"^[^\x00]*$")]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH, pattern=r"^[^\x00]*$")]
TokenCount = Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)]
Zero = Annotated[float, Field(ge=0, le=0)]
Empty = Annotated[list[Any] | dict[str, Any], Field(max_length=0)]
Ignored = Annotated[Any, Field(description="Accepted, and changes nothing.")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class PartModel(_Strict):
    """A stretch of a message; only the assistant has other kinds than text."""

    type: Literal["text", "python", "python_output"]
    text: Text


class MessageModel(_Strict):
    """One turn, with the fields that an answer's message has, so that it can be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[PartModel], Field(max_length=MAX_MESSAGES)] | None = None
    parts: Annotated[list[PartModel], Field(max_length=MAX_MESSAGES)] | None = Field(
        None, description="The assistant's message with its tool calls; counts in place of content."
    )
    name: Ignored = None
    refusal: Ignored = None
    annotations: Ignored = None
    audio: None = None
    function_call: None = None
    tool_calls: Empty | None = None

    def message(self) -> Message:
        """As the rest of the program knows it."""
        content: str | list[Part] = self.content if isinstance(self.content, str) else _parts(self.content or [])
        role: Any = "system" if self.role == "developer" else self.role
        return {"role": role, "content": _parts(self.parts) if self.parts else content}


def _parts(parts: list[PartModel]) -> list[Part]:
    return [{"type": part.type, "text": part.text} for part in parts]


class StreamOptions(_Strict):
    """How to stream."""

    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class TextFormat(_Strict):
    """The one format of answers."""

    type: Literal["text"]


class _Sampled(_Strict):
    model: Annotated[str, Field(min_length=1, max_length=200)]
    max_tokens: TokenCount | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 20)] | None = Field(None, description="Not OpenAI's; 0 for all tokens.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Not OpenAI's.")
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = Field(None, description="Not OpenAI's.")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        None, description="Choice i has the seed + i, modulo 2**32; by default it differs each time."
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Ignored = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Empty | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(_Sampled):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[MessageModel], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    use_tools: bool = Field(True, description="Not OpenAI's; false takes the calculator away.")
    response_format: TextFormat | None = None
    tools: Empty | None = None
    functions: Empty | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    parallel_tool_calls: Ignored = None
    metadata: Ignored = None
    store: Literal[False] | None = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None

    @property
    def conversation(self) -> Conversation:
        return {"messages": [message.message() for message in self.messages]}


class CompletionRequest(_Sampled):
    """The body of /v1/completions."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        detail = ErrorDetail(message=message, type=kind, param=param, code=code)
        self.body = {"error": detail.model_dump()}
        later, key = {"Retry-After": "5"}, {"WWW-Authenticate": "Bearer"}
        self.headers: dict[str, str] = {401: key, 429: later, 503: later}.get(status, {})

    def response(self) -> Response:
        """As a client gets it."""
        return json_response(self.body, self.status, self.headers)


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII, so that a lone surrogate that is quoted in an error does no harm."""
    return Response(json.dumps(body), status, headers, media_type="application/json")


FIELDS = {
    name
    for model in (ChatRequest, CompletionRequest, MessageModel, PartModel, StreamOptions, TextFormat)
    for name in model.model_fields
}
UNSUPPORTED = {
    *("frequency_penalty", "presence_penalty", "logit_bias", "response_format", "tools", "functions", "tool_choice"),
    *("function_call", "tool_calls", "modalities", "audio", "store", "best_of", "echo", "suffix"),
}


def explain(errors: list[Any]) -> ApiError:
    """The first of pydantic's errors, in the API's words."""
    # Of a union every member complains; the one that came deepest into the body is about what was meant.
    error = max(errors, key=lambda error: len(error["loc"]))
    kind, loc = error["type"], error["loc"][1:]
    if kind == "json_invalid":
        said = error.get("ctx", {}).get("error", "unreadable")
        return ApiError(400, f"the body is not JSON: {said}", "invalid_json")
    unknown = loc[-1:] if kind == "extra_forbidden" else ()
    param = ".".join(str(part) for part in loc if isinstance(part, int) or part in FIELDS or part in unknown)
    if not param and kind == "string_unicode":
        return ApiError(400, "the name of a field must not hold lone surrogates", kind)
    if not param:
        return ApiError(400, "the body must be a JSON object, sent as application/json", "invalid_json")
    said = {
        "string_pattern_mismatch": "must not hold NUL characters",
        "string_unicode": "must not hold lone surrogates",
        "extra_forbidden": "is not known here; leave it out",
    }.get(kind, error["msg"])
    if UNSUPPORTED.intersection(loc):
        said = "is not supported here; leave it out"
    return ApiError(400, f"{param}: {said}", kind, param)
