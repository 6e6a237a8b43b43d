"""What app, API and terminal have in common: the models there are, and answers that keep to the safety policy.

backend = Backend(BackendConfig())
async for event in backend.chat(conversation("Hello!"), sampling=Sampling(seed=1)):
    print("".join(delta.text for delta in event.deltas), end="")
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

from nanochat_jax.chat import Conversation, content_parts
from nanochat_jax.dialogue import Fitted, NoRoom, Service, fit
from nanochat_jax.engine import TOOL_TOKENS
from nanochat_jax.errors import UserError
from nanochat_jax.requests import Output, Request
from nanochat_jax.safety import Finding, Policy, load_policy
from nanochat_jax.sampling import Sampling
from nanochat_jax.streaming import Delta, Ended, Handle, Usage
from serve.models import BackendConfig, Models
from serve.shown import Shown

Reason = Ended | Literal["content_filter"]

NOTHING = Output(-1)
DEFAULT_SAMPLING = Sampling()

WORKERS = 16  # threads that tokenise prompts


@dataclass(frozen=True)
class ChatEvent:
    """What is new of an answer, after the safety policy; the first comes as soon as the request is queued."""

    deltas: tuple[Delta, ...] = ()
    output: Output = NOTHING  # tokens whose text is shown by now; none any more once something was hidden
    finish_reason: Reason | None = None  # in the last event
    usage: Usage | None = None  # likewise
    dropped: int = 0  # in the first event: oldest turns that did not fit into the context
    refusal: str = ""  # in the last event after content_filter: what is said instead, also part of the deltas
    error: str = ""


class Backend(Models):
    """Models that answer. Everything may be called from any thread; the asynchronous from any event loop."""

    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config)
        self.policy = load_policy(config.policy) if config.safety else Policy()
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="backend")

    def close(self) -> None:
        """Cancel all requests and let go of all models."""
        super().close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def chat(
        self,
        conversation: Conversation,
        *,
        model: str = "",
        sampling: Sampling = DEFAULT_SAMPLING,
        max_new_tokens: int | None = None,
        stops: Sequence[str] = (),
        use_tools: bool = True,
    ) -> AsyncGenerator[ChatEvent]:
        """Answer the user; who stops reading should close the iterator, which cancels the request.

        Args:
            conversation: it ends with the user, whose last message must pass the safety policy, as must the system's.
            model: by name, or the first.
            sampling: how tokens are chosen.
            max_new_tokens: for which the context must have room; default: what it has, a quarter of it at least.
            stops: texts to end before.
            use_tools: let the calculator answer what the model asks of it.

        Raises:
            UserError, Busy: before the first event, if there will be no answer; NoRoom, if max_new_tokens is why.
        """

        def prompt(service: Service) -> tuple[Fitted, Finding | None]:
            fitted = fit(
                conversation,
                service.tokenizer,
                service.context_len,
                max(1, service.context_len // 4) if max_new_tokens is None else max_new_tokens,
            )
            system, last = [m for m in conversation["messages"] if m["role"] == "system"], conversation["messages"][-1]
            texts = ["".join(part["text"] for part in content_parts(message)) for message in (*system, last)]
            return fitted, self.policy.check("\n\n".join(texts))  # between which a sentence ends

        request = Request((), max_new_tokens or 1 << 30, sampling, use_tools=use_tools)
        async for event in self._answer(model, prompt, request, stops):
            yield event

    async def complete(
        self,
        text: str,
        *,
        model: str = "",
        sampling: Sampling = DEFAULT_SAMPLING,
        max_new_tokens: int = 16,
        stops: Sequence[str] = (),
    ) -> AsyncGenerator[ChatEvent]:
        """Continue a text; everything else as in `chat`."""

        def prompt(service: Service) -> tuple[Fitted, Finding | None]:
            tokens = [service.tokenizer.bos, *service.tokenizer.encode(text)]
            context_len, most = service.context_len, service.context_len - len(tokens)
            if most < 1:
                raise UserError(f"prompt: {len(tokens)} tokens fill a context of {context_len}; shorten it")
            if max_new_tokens > most:
                raise NoRoom(
                    f"{max_new_tokens} tokens of answer do not fit into a context of {context_len} with a prompt of "
                    f"{len(tokens)}; ask for 1 to {most}, or shorten it"
                )
            return Fitted(tokens, 0), self.policy.check(text)

        async for event in self._answer(model, prompt, Request((), max_new_tokens, sampling), stops):
            yield event

    async def _answer(
        self,
        model: str,
        prompt: Callable[[Service], tuple[Fitted, Finding | None]],
        request: Request,
        stops: Sequence[str],
    ) -> AsyncGenerator[ChatEvent]:
        def submit(service: Service) -> tuple[Handle, int, Finding | None]:
            (tokens, dropped), finding = prompt(service)
            has_tools = set(TOOL_TOKENS) <= set(service.tokenizer.control)
            asked = replace(request, prompt=tokens, use_tools=request.use_tools and has_tools)
            if finding and finding.action == "refuse":
                raise _Refused(finding, len(tokens))
            return service.submit(asked, stops=stops), dropped, finding

        try:
            handle, dropped, finding = await self._submitted(model, submit)
        except _Refused as refused:
            say, usage = refused.finding.say, Usage(refused.prompt_tokens, 0, None, 0.0)
            yield ChatEvent((Delta(0, "text", say),), finish_reason="content_filter", usage=usage, refusal=say)
            return
        shown = Shown(self.policy, finding)
        try:
            yield ChatEvent(dropped=dropped)
            async for event in handle:
                deltas, output = shown.take(event)
                if not shown.refusal:
                    yield ChatEvent(deltas, output, event.finish_reason, event.usage, error=event.error)
                    continue
                now = time.monotonic()
                first = (handle.first_token or now) - handle.submitted
                spent = Usage(len(handle.request.prompt), handle.completion_tokens, first, now - handle.submitted)
                yield ChatEvent(deltas, output, "content_filter", event.usage or spent, refusal=shown.refusal)
                return
        finally:
            handle.cancel()

    async def _submitted(
        self, model: str, submit: Callable[[Service], tuple[Handle, int, Finding | None]]
    ) -> tuple[Handle, int, Finding | None]:
        """Off the event loop; where the caller leaves meanwhile, the request is cancelled as soon as there is one."""
        while True:
            service = (await self.ready(model)).service
            future = self._pool.submit(submit, service)
            try:
                return await asyncio.wrap_future(future)
            except UserError:
                if service is (await self.ready(model)).service:  # otherwise it had to go for another, just now
                    raise
            except asyncio.CancelledError:
                future.add_done_callback(
                    lambda done: None if done.cancelled() or done.exception() else done.result()[0].cancel()
                )
                raise


class _Refused(Exception):
    """The policy refuses what was asked."""

    def __init__(self, finding: Finding, prompt_tokens: int) -> None:
        super().__init__(finding.category)
        self.finding, self.prompt_tokens = finding, prompt_tokens
