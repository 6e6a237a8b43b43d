"""What app and terminal have in common: how they ask, and what they tell of an answer besides its text."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from nanochat_jax.chat import Conversation, Message, content_parts, visible_text
from nanochat_jax.sampling import Sampling
from nanochat_jax.streaming import Usage
from serve.backend import Backend, ChatEvent

CONTINUATION = 128  # tokens that a model without turns adds to a text, where nothing else is asked for
ENDS = {
    "length": "ended at the limit of its length",
    "deadline": "ended by the time limit",
    "content_filter": "ended by the safety policy",
    "cancelled": "stopped",
}


async def answer(
    backend: Backend,
    conversation: Conversation,
    *,
    model: str = "",
    sampling: Sampling,
    max_new_tokens: int | None = None,
    use_tools: bool = True,
) -> AsyncGenerator[ChatEvent]:
    """`backend.chat`; of a model that knows no turns, how the last message goes on."""
    if (await asyncio.to_thread(backend.find, model)).is_chat:
        events = backend.chat(
            conversation, model=model, sampling=sampling, max_new_tokens=max_new_tokens, use_tools=use_tools
        )
    else:
        text, limit = said(conversation["messages"][-1]), max_new_tokens or CONTINUATION
        events = backend.complete(text, model=model, sampling=sampling, max_new_tokens=limit)
    async with aclosing(events):
        async for event in events:
            yield event


def said(message: Message) -> str:
    """A message's text, without calls and outputs."""
    return visible_text(content_parts(message))


def told(usage: Usage | None, reason: str | None, dropped: int = 0) -> str:
    """An answer's cost and speed in words; how it ended, where that is unusual; how much was forgotten."""
    notes = []
    if usage and usage.first_token_seconds is not None:
        rate, first = usage.completion_tokens / max(usage.seconds, 1e-3), 1000 * usage.first_token_seconds
        notes += [f"{usage.prompt_tokens} tokens read, {usage.completion_tokens} written"]
        notes += [f"{rate:.0f} tokens/s", f"first after {first:.0f} ms"]
    if reason in ENDS:
        notes += [ENDS[reason]]
    if dropped:
        notes += [f"without the oldest {'turn' if dropped == 1 else f'{dropped} turns'}, which no longer fit"]
    return " · ".join(notes)
