"""The models that can be served: found below a folder, loaded when asked for, let go for others."""

import asyncio
import logging
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax

from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.dialogue import Busy, Service
from nanochat_jax.engine import TOOL_TOKENS, Engine, EngineConfig
from nanochat_jax.errors import UserError
from nanochat_jax.load import LoadedModel, load_model, open_model
from nanochat_jax.tools import calculate

log = logging.getLogger(__name__)

BEST_FIRST = ("rl", "dpo", "sft", "convert", "pretrain")  # stages, in the order in which models are offered
TOP_LOGPROBS = 5
PREFILL_CHUNK = 128  # the unit of what is reused, too: about a turn of a conversation


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


class Loaded(NamedTuple):
    """A model in memory, and what answers with it."""

    info: ModelInfo
    model: LoadedModel
    service: Service


class Models:
    """Everything may be called from any thread."""

    def __init__(self, config: BackendConfig) -> None:
        self.config = config
        self._folders: dict[str, Path] = {}  # that were looked into, by the model's name
        self._seen: dict[tuple[Path, int, float], ModelInfo | None] = {}
        # Loaded or being loaded, by folder and step, used longest ago first. All wait for one future, which an event
        # loop can do without a thread: otherwise those who wait for a model would keep the threads of all others.
        self._loaded: OrderedDict[tuple[Path, int], Future[Loaded]] = OrderedDict()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._lock, self._looking = threading.Lock(), threading.Lock()

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
        if name in self._folders and (model := self._info(name, self._folders[name])):
            return model  # without a look at all others, which costs more than a short answer's tokens
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
        return self._future(name).result().service

    async def ready(self, name: str = "") -> Loaded:
        """A model, loaded as `service` does it, which raises the same; whoever waits holds no thread."""
        future = await asyncio.to_thread(self._future, name)
        return await asyncio.shield(asyncio.wrap_future(future))  # it is not cancelled with one of those who wait

    def stats(self) -> dict[str, dict[str, object]]:
        """`Service.stats` of each loaded model, by name."""
        with self._lock:
            return {entry.info.name: entry.service.stats() for entry in self._entries().values()}

    def close(self) -> None:
        """Cancel all requests and let go of all models."""
        self._loader.shutdown(cancel_futures=True)
        with self._lock:
            for entry in self._entries().values():
                entry.service.close()
            self._loaded.clear()

    def _info(self, name: str, folder: Path) -> ModelInfo | None:
        """What a run's newest good checkpoint says; remembered until there is a newer."""
        self._folders[name] = folder
        step = Checkpoints(folder / "checkpoints").newest()
        if step is None:
            return None
        try:
            saved = (folder / "checkpoints" / str(step)).stat().st_mtime
            key = folder, step, saved
            if key not in self._seen:
                with self._looking:
                    if key not in self._seen:
                        self._seen[key] = _described(name, folder, saved)
            return self._seen[key]
        except OSError as error:  # a trainer tidied it away just now, or the disk is back soon
            log.warning("%s is not offered for now: %s", folder, error)
            return None

    def _future(self, name: str) -> Future[Loaded]:
        info = self.find(name)
        key = info.folder, info.step
        with self._lock:
            if key not in self._loaded:
                self._loaded[key] = self._loader.submit(self._load, info)
            self._loaded.move_to_end(key)
            return self._loaded[key]

    def _load(self, info: ModelInfo) -> Loaded:
        try:
            self._make_room()
            log.info("loading %s, step %d", info.name, info.step)
            model = load_model(info.folder)
            return Loaded(info, model, self._serve(model))
        except BaseException:
            with self._lock:  # who asks next tries again
                del self._loaded[info.folder, info.step]
            raise

    def _entries(self) -> dict[tuple[Path, int], Loaded]:
        done = {key: future for key, future in self._loaded.items() if future.done() and not future.cancelled()}
        return {key: future.result() for key, future in done.items()}

    def _make_room(self) -> None:
        while True:
            with self._lock:
                entries = self._entries()
                if len(entries) < self.config.max_loaded:
                    return
                idle = [key for key, entry in entries.items() if not _has_requests(entry.service)]
                if not idle:
                    raise Busy(f"{len(entries)} models are loaded and busy; try again in a while")
                del self._loaded[idle[0]]
            entries[idle[0]].service.close()

    def _serve(self, loaded: LoadedModel) -> Service:
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
        return Service(
            engine,
            loaded.tokenizer,
            max_waiting=self.config.max_waiting,
            deadline_seconds=self.config.deadline_seconds,
        )


def _described(name: str, folder: Path, saved: float) -> ModelInfo | None:
    try:
        stored = open_model(folder)
    except UserError as error:
        log.warning("%s is not offered: %s", folder, error)
        return None
    stage = stored.checkpoint.meta["stage"]
    is_chat = stage != "pretrain" and "<|assistant_start|>" in stored.tokenizer.control
    return ModelInfo(name, folder, stage, stored.checkpoint.step, is_chat, saved)


def _has_requests(service: Service) -> bool:
    stats = service.stats()
    return bool(stats["running"] or stats["waiting"])
