"""What an engine is asked, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from nanochat_jax.errors import UserError
from nanochat_jax.sampling import Sampling

FinishReason = Literal["stop", "length"]  # a stop token; no room for more
TopTokens = tuple[tuple[int, float], ...]  # the likeliest tokens at a position, likeliest first, and their logprobs


@dataclass(frozen=True)
class Request:
    """A prompt to continue."""

    prompt: Sequence[int]
    max_new_tokens: int  # a tool's answers count too
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: Sequence[int] = ()  # the first that is sampled is the last token
    use_tools: bool = False

    def checked_prompt(self, vocab_size: int, context_len: int, *, has_tools: bool) -> tuple[int, ...]:
        """The prompt; UserError if the request cannot be answered."""
        prompt = tuple(int(token) for token in self.prompt)
        if not prompt:
            raise UserError("request: the prompt is empty; begin it with the <|bos|> token")
        if len(prompt) >= context_len:
            raise UserError(f"request: a prompt of {len(prompt)} tokens fills the context of {context_len}; shorten it")
        if self.max_new_tokens < 1:
            raise UserError(f"request: max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.use_tools and not has_tools:
            raise UserError("request: use_tools is set, but the engine was made without tools")
        if alien := [token for token in (*prompt, *self.stop_tokens) if not 0 <= token < vocab_size]:
            raise UserError(f"request: token {alien[0]} is not in the vocabulary of {vocab_size}")
        return prompt


@dataclass(frozen=True)
class Output:
    """New tokens of a request: those of one step, or all of them."""

    request: int  # the number that submit gave
    tokens: tuple[int, ...] = ()
    sampled: tuple[bool, ...] = ()  # by the model; the other tokens are a tool's answer
    logprobs: tuple[float, ...] = ()  # nats, at temperature 1, without truncation and penalty, whatever the sampling
    finish_reason: FinishReason | None = None  # None while it goes on
    top: tuple[TopTokens, ...] = ()  # for each token, where the engine has top_logprobs

    def __add__(self, later: "Output") -> "Output":
        return Output(
            self.request,
            self.tokens + later.tokens,
            self.sampled + later.sampled,
            self.logprobs + later.logprobs,
            later.finish_reason,
            self.top + later.top,
        )

    def first(self, count: int) -> "Output":
        """The first tokens alone."""
        lists = (self.tokens[:count], self.sampled[:count], self.logprobs[:count])
        return Output(self.request, *lists, self.finish_reason, self.top[:count])
