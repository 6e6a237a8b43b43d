"""What app, API and terminal have in common: the models there are, loaded when asked for, and answers that keep to the
safety policy.

    backend = Backend(BackendConfig())
    async for event in backend.chat(conversation("Hello!"), sampling=Sampling(seed=1)):
        print("".join(delta.text for delta in event.deltas), end="")
"""

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import jax

from nanochat_jax.chat import Conversation, content_parts
from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.dialogue import Busy, Fitted, Service, fit
from nanochat_jax.engine import TOOL_TOKENS, Engine, EngineConfig
from nanochat_jax.errors import UserError
from nanochat_jax.load import LoadedModel, load_model, open_model
from nanochat_jax.requests import Output, Request
from nanochat_jax.safety import Finding, Policy, load_policy
from nanochat_jax.sampling import Sampling
from nanochat_jax.streaming import Delta, Ended, Handle, Usage
from nanochat_jax.tools import calculate
from serve.shown import Shown

log = logging.getLogger(__name__)

Reason = Ended | Literal["content_filter"]

NOTHING = Output(-1)
DEFAULT_SAMPLING = Sampling()

BEST_FIRST = ("rl", "dpo", "sft", "convert", "pretrain")  # stages, in the order in which models are offered
TOP_LOGPROBS = 5
PREFILL_CHUNK = 128  # the unit of what is reused, too: about a turn of a conversation
LOADERS = 16  # threads that load models and tokenise prompts


@dataclass(frozen=True)
class BackendConfig:
    """Which models are served, and how many requests at once."""

    runs: Path = Path("runs")
    """Folder searched for checkpoints, two levels deep."""
    checkpoint: Path | None = None
    """Folder of the one run to serve, instead of all."""
    slots: int = 16
    """Requests that one model answers at once: up to 8, or a multiple of 8."""
    context_len: int | None = None
    """Tokens of prompt and answer together; default: what the model was trained with."""
    max_waiting: int = 64
    """Requests that may wait for a slot."""
    deadline_seconds: float = 300
    """From a request to its last token."""
    reuse_tokens: int = 8192
    """Tokens of earlier prompts that are remembered, so that the next turn of a conversation begins sooner."""
    safety: bool = True
    """Keep to a safety policy."""
    policy: Path | None = None
    """Policy file; default: the one that comes with the project."""
    max_loaded: int = 2
    """Models kept in memory."""

    def __post_init__(self) -> None:
        for name, least in {"slots": 1, "max_waiting": 0, "reuse_tokens": 0, "max_loaded": 1}.items():
            if getattr(self, name) < least:
                raise UserError(f"--backend.{name.replace('_', '-')} {getattr(self, name)} must be at least {least}")
        if not self.deadline_seconds > 0:
            raise UserError(f"--backend.deadline-seconds {self.deadline_seconds} must be more than 0")


@dataclass(frozen=True)
class ModelInfo:
    """A model that can be served."""

    name: str  # "demo/rl": the run's folder within `runs`
    folder: Path
    stage: str  # "pretrain", "sft", "dpo", "rl" or "convert"
    step: int
    is_chat: bool  # it knows turns, and was more than pretrained
    saved: float  # seconds since the epoch


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


class _Loaded(NamedTuple):
    name: str
    model: LoadedModel
    service: Service


class Backend:
    """Finds, loads and runs models. Everything may be called from any thread; the asynchronous from any event loop."""

    def __init__(self, config: BackendConfig = BackendConfig()) -> None:
        self.config = config
        self.policy = load_policy(config.policy) if config.safety else Policy()
        self._seen: dict[tuple[Path, int, float], ModelInfo | None] = {}
        self._loaded: OrderedDict[tuple[Path, int], _Loaded] = OrderedDict()  # used longest ago first
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self._pool = ThreadPoolExecutor(LOADERS, thread_name_prefix="backend")

    def models(self) -> list[ModelInfo]:
        """The models there are, with the newest good checkpoint of each: the last stages first, of these the newest.

        Raises:
            UserError: there is none.
        """
        if self.config.checkpoint:
            folder = self.config.checkpoint.resolve()
            if info := self._info(f"{folder.parent.name}/{folder.name}", folder):
                return [info]
            raise UserError(f"{folder} holds no good checkpoint; give the folder of a run")
        runs = self.config.runs
        folders = {path.parent for pattern in ("*/checkpoints", "*/*/checkpoints") for path in runs.glob(pattern)}
        found = [self._info(folder.relative_to(runs).as_posix(), folder) for folder in sorted(folders)]
        models = [model for model in found if model]
        if not models:
            raise UserError(f"no checkpoint below {runs}/: make one with `bash train/demo.sh`")
        return sorted(models, key=lambda model: (not model.is_chat, BEST_FIRST.index(model.stage), -model.saved))

    def find(self, name: str = "") -> ModelInfo:
        """A model by its name, or the first; UserError lists the names there are."""
        models = self.models()
        for model in models:
            if name in ("", model.name):
                return model
        raise UserError(f"unknown model {name!r}; there are {', '.join(model.name for model in models)}")

    def service(self, name: str = "") -> Service:
        """The service of a model, which is loaded if it is not; the one used longest ago may have to go for it.

        Raises:
            UserError: there is no such model, or it cannot be loaded.
            Busy: it is not loaded, and none of those that are can go, since all have requests.
        """
        return self._load(name).service

    def loaded(self, name: str = "") -> LoadedModel:
        """A model's parameters and tokenizer; raises what `service` raises."""
        return self._load(name).model

    def stats(self) -> dict[str, dict[str, object]]:
        """`Service.stats` of each loaded model, by name."""
        with self._lock:
            return {entry.name: entry.service.stats() for entry in self._loaded.values()}

    def close(self) -> None:
        """Cancel all requests and let go of all models."""
        with self._loading, self._lock:
            for entry in self._loaded.values():
                entry.service.close()
            self._loaded.clear()
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
            conversation: it ends with the user, whose last message must pass the safety policy.
            model: by name, or the first.
            sampling: how tokens are chosen.
            max_new_tokens: for which the context must have room; default: what it has, a quarter of it at least.
            stops: texts to end before.
            use_tools: let the calculator answer what the model asks of it.

        Raises:
            UserError, Busy: before the first event, if there will be no answer.
        """

        def prompt(service: Service) -> tuple[Fitted, Finding | None]:
            fitted = fit(
                conversation,
                service.tokenizer,
                service.context_len,
                max(1, service.context_len // 4) if max_new_tokens is None else max_new_tokens,
            )
            parts = content_parts(conversation["messages"][-1])
            return fitted, self.policy.check("".join(part["text"] for part in parts))

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
            if len(tokens) + max_new_tokens > service.context_len:
                raise UserError(
                    f"prompt: {len(tokens)} tokens and {max_new_tokens} new ones do not fit into a context of "
                    f"{service.context_len}; shorten it, or ask for fewer"
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
        def submit() -> tuple[Handle, int, Finding | None]:
            while True:
                service = self.service(model)
                (tokens, dropped), finding = prompt(service)
                has_tools = set(TOOL_TOKENS) <= set(service.tokenizer.control)
                asked = replace(request, prompt=tokens, use_tools=request.use_tools and has_tools)
                if finding and finding.action == "refuse":
                    raise _Refused(finding, len(tokens))
                try:
                    return service.submit(asked, stops=stops), dropped, finding
                except UserError:
                    if service is self.service(model):  # otherwise it had to go for another, just now
                        raise

        try:
            handle, dropped, finding = await self._submitted(submit)
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
        self, submit: Callable[[], tuple[Handle, int, Finding | None]]
    ) -> tuple[Handle, int, Finding | None]:
        """Off the event loop; where the caller leaves meanwhile, the request is cancelled as soon as there is one."""
        future = self._pool.submit(submit)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(
                lambda done: None if done.cancelled() or done.exception() else done.result()[0].cancel()
            )
            raise

    def _info(self, name: str, folder: Path) -> ModelInfo | None:
        """What a run's newest good checkpoint says; remembered until there is a newer."""
        step = Checkpoints(folder / "checkpoints").newest()
        if step is None:
            return None
        try:
            saved = (folder / "checkpoints" / str(step)).stat().st_mtime
            key = folder, step, saved
            if key not in self._seen:
                self._seen[key] = None
                stored = open_model(folder)
                stage = stored.checkpoint.meta["stage"]
                is_chat = stage != "pretrain" and "<|assistant_start|>" in stored.tokenizer.control
                self._seen[key] = ModelInfo(name, folder, stage, stored.checkpoint.step, is_chat, saved)
            return self._seen[key]
        except (UserError, OSError) as error:  # OSError: a trainer tidied it away just now
            log.warning("%s is not offered: %s", folder, error)
            return None

    def _load(self, name: str) -> _Loaded:
        info = self.find(name)
        key = info.folder, info.step
        if entry := self._touch(key):
            return entry
        with self._loading:
            if entry := self._touch(key):
                return entry
            self._make_room()
            log.info("loading %s, step %d", info.name, info.step)
            entry = self._serve(info.name, load_model(info.folder))
            with self._lock:
                self._loaded[key] = entry
            return entry

    def _touch(self, key: tuple[Path, int]) -> _Loaded | None:
        with self._lock:
            if key in self._loaded:
                self._loaded.move_to_end(key)
            return self._loaded.get(key)

    def _make_room(self) -> None:
        while len(self._loaded) >= self.config.max_loaded:
            with self._lock:
                idle = [key for key, entry in self._loaded.items() if not _has_requests(entry.service)]
                if not idle:
                    raise Busy(f"{len(self._loaded)} models are loaded and busy; try again in a while")
                gone = self._loaded.pop(idle[0])
            gone.service.close()

    def _serve(self, name: str, loaded: LoadedModel) -> _Loaded:
        has_tools = set(TOOL_TOKENS) <= set(loaded.tokenizer.control)
        config = EngineConfig(
            slots=self.config.slots,
            context_len=self.config.context_len,
            prefill_rows=1 if jax.default_backend() == "cpu" else min(8, self.config.slots),
            prefill_chunk=PREFILL_CHUNK,
            reuse_tokens=self.config.reuse_tokens,
            top_logprobs=min(TOP_LOGPROBS, loaded.cfg.vocab_size),
        )
        engine = Engine(
            loaded.params,
            loaded.cfg,
            config,
            tools=calculate if has_tools else None,
            tokenizer=loaded.tokenizer,
            compute=loaded.compute,
        )
        engine.warm_up()
        service = Service(
            engine,
            loaded.tokenizer,
            max_waiting=self.config.max_waiting,
            deadline_seconds=self.config.deadline_seconds,
        )
        return _Loaded(name, loaded, service)


class _Refused(Exception):
    """The policy refuses what was asked."""

    def __init__(self, finding: Finding, prompt_tokens: int) -> None:
        super().__init__(finding.category)
        self.finding, self.prompt_tokens = finding, prompt_tokens


def _has_requests(service: Service) -> bool:
    stats = service.stats()
    return bool(stats["running"] or stats["waiting"])
