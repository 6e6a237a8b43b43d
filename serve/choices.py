"""A backend's events as the choices that OpenAI's API answers with."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from nanochat_jax.chat import visible_text
from nanochat_jax.requests import Output, TopTokens
from nanochat_jax.streaming import Delta, Usage, parts
from nanochat_jax.tokenizer import Tokenizer
from serve.backend import ChatEvent
from serve.schemas import ApiError

FINISH_REASONS = {"stop": "stop", "length": "length", "deadline": "length", "content_filter": "content_filter"}
LOWEST_LOGPROB = -9999.0  # JSON knows no infinity


class Said(NamedTuple):
    """A token of what was said, or the string of an end token among those that were likely."""

    token: int
    logprob: float
    top: TopTokens


class Choice:
    """One of the answers to a request, as far as it has come.

    Args:
        index: among all of them.
        tokenizer: of the model.
        top: how many alternatives to tell for each token; None for no logprobs at all.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, top: int | None) -> None:
        self.index, self._tokenizer, self._top = index, tokenizer, top
        self._names = {token: name for name, token in tokenizer.control.items()}
        self._deltas: list[Delta] = []
        self._said: list[Said] = []
        self._in_call = False
        self._begin = self._end = 0  # characters of the answer's tokens before these, and after
        self._finish: str | None = None
        self._refusal = ""
        self.usage: Usage | None = None

    def add(self, event: ChatEvent) -> "Choice":
        """Take an event, and return what is new as a choice of its own.

        Raises:
            ApiError: the answer failed.
        """
        if event.finish_reason in ("error", "cancelled"):
            raise ApiError(500 if event.error else 503, event.error or "the server is going down; try again later")
        new = Choice(self.index, self._tokenizer, self._top)
        new._deltas, new._said, new._begin = list(event.deltas), self._spoken(event.output), self._end
        new._finish = self._finish = FINISH_REASONS[event.finish_reason] if event.finish_reason else None
        self._refusal, self.usage = event.refusal, event.usage
        self._deltas += new._deltas
        self._said += new._said
        self._end += sum(len(self._text(said.token)) for said in new._said)
        return new

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not (self._deltas or self._said or self._finish)

    def chat_chunk(self) -> dict[str, Any]:
        """As a choice of a streamed chat completion."""
        delta: dict[str, Any] = {"content": self._content()}
        if calls := [delta._asdict() for delta in self._deltas if delta.type != "text"]:
            delta["parts"] = calls
        return self._choice(self._chat_logprobs(), delta=delta)

    def chat(self) -> dict[str, Any]:
        """As a choice of a chat completion."""
        message = {"role": "assistant", "content": self._content(), "refusal": self._refusal or None}
        return self._choice(self._chat_logprobs(), message=message | {"parts": parts(self._deltas)})

    def completion(self) -> dict[str, Any]:
        """As a choice of a completion, streamed or not."""
        return self._choice(self._completion_logprobs(), text=self._content())

    def _choice(self, logprobs: dict[str, Any] | None, **what: Any) -> dict[str, Any]:
        return {"index": self.index, **what, "logprobs": logprobs, "finish_reason": self._finish}

    def _content(self) -> str:
        return visible_text(parts(self._deltas))

    def _spoken(self, output: Output) -> list[Said]:
        """The tokens of the text: without tool calls, their outputs, and end tokens."""
        if self._top is None:
            return []
        said = []
        tops = output.top or ((),) * len(output.tokens)
        for token, logprob, top in zip(output.tokens, output.logprobs, tops, strict=True):
            name = self._names.get(token)
            if name is not None:
                self._in_call = name in ("<|python_start|>", "<|output_start|>")
            elif not self._in_call:
                said.append(Said(token, logprob, top[: self._top]))
        return said

    def _text(self, token: int) -> str:
        return self._names.get(token) or self._tokenizer.decode([token])

    def _chat_logprobs(self) -> dict[str, Any] | None:
        if self._top is None:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            piece = self._tokenizer.pieces[token]
            return {"token": self._text(token), "logprob": _finite(logprob), "bytes": list(piece) or None}

        content = [
            entry(said.token, said.logprob) | {"top_logprobs": [entry(*other) for other in said.top]}
            for said in self._said
        ]
        return {"content": content, "refusal": None}

    def _completion_logprobs(self) -> dict[str, Any] | None:
        if self._top is None:
            return None
        texts = [self._text(said.token) for said in self._said]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(said.logprob) for said in self._said],
            "top_logprobs": [{self._text(other): _finite(p) for other, p in said.top} for said in self._said],
            "text_offset": list(accumulate(map(len, texts), initial=self._begin))[:-1],
        }


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB


def usage(choices: Sequence[Choice], prompts: int = 1) -> dict[str, int]:
    """What an answer took; a prompt counts once, however many choices it has."""
    usages = [choice.usage or Usage(0, 0, None, 0.0) for choice in choices]
    asked = sum(used.prompt_tokens for used in usages[:: len(usages) // prompts])
    written = sum(used.completion_tokens for used in usages)
    return {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}
