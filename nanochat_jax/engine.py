"""Many continuations at once, on a fixed number of slots: what rollouts, evaluation and serving sample with.

    engine = Engine(params, cfg)
    outputs = engine.run([Request(prompt, max_new_tokens=100) for prompt in prompts])

Requests wait for a free slot. A prompt is prefilled in chunks of a few fixed lengths and inserted into the slot; one
program decodes all slots, several tokens a call. What a request yields depends on its prompt, its sampling and the
parameters alone: to the last bit, not on neighbours, load, slot or order of arrival. For this, every program has one
batch size whatever is waiting, a prompt's chunks follow from its length, and a token's randomness from the request's
seed and the token's position.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice
from typing import Any, Literal, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanochat_jax import model
from nanochat_jax.config import Architecture
from nanochat_jax.errors import UserError
from nanochat_jax.generate import PROMPT_BUCKET, decode, empty_rows, empty_slots, in_dtype, insert, prefill
from nanochat_jax.layers import Compute, default_compute
from nanochat_jax.sampling import Sampling, SamplingArrays
from nanochat_jax.sharding import BATCH_AXES, batch_devices, replicated
from nanochat_jax.tokenizer import Tokenizer

LOOKAHEAD = 1024  # waiting requests searched for those that can be prefilled together
TILE = 8  # on a CPU, products of more rows than this sum those behind the last whole tile in another order
TOOL_TOKENS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")

Tools = Callable[[str], str | None]  # what the model wrote → the answer, None for none; must not raise


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the compiled programs; other sizes may round differently."""

    slots: int = 32  # requests decoded at once
    context_len: int | None = None  # tokens of prompt and continuation together; default: the model's sequence_len
    steps_per_dispatch: int = 8  # tokens a slot may get between two looks of the host; one that ends idles until then
    prefill_rows: int = 1  # prompts prefilled together; fewer take as long. 1 suits a CPU
    prefill_chunk: int = 512  # longest piece of a prompt that is fed at once

    def __post_init__(self) -> None:
        for name in ("slots", "steps_per_dispatch", "prefill_rows", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"engine: {name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Request:
    """A prompt to continue."""

    prompt: Sequence[int]
    max_new_tokens: int  # a tool's answers count too
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: Sequence[int] = ()  # the first that is sampled is the last token
    use_tools: bool = False


@dataclass(frozen=True)
class Output:
    """New tokens of a request: those of one step, or all of them."""

    request: int  # the number that submit gave
    tokens: tuple[int, ...] = ()
    sampled: tuple[bool, ...] = ()  # by the model; the other tokens are a tool's answer
    logprobs: tuple[float, ...] = ()  # nats, at temperature 1, without truncation and penalty, whatever the sampling
    finish_reason: Literal["stop", "length"] | None = None  # a stop token; no room for more; None while it goes on

    def __add__(self, later: "Output") -> "Output":
        tokens, sampled = self.tokens + later.tokens, self.sampled + later.sampled
        return Output(self.request, tokens, sampled, self.logprobs + later.logprobs, later.finish_reason)


@dataclass
class _Progress:
    """What the host knows of a request that has not ended."""

    number: int
    request: Request
    room: int  # for tokens to come
    forced: list[int] = field(default_factory=list)  # tokens of a tool's answer that are not yet in the sequence
    call: list[int] | None = None  # tokens of the tool call that the model is writing


class Engine:
    """Continues requests; see the module's text. Not thread-safe: one thread calls submit, cancel and step.

    Args:
        params: the model's parameters, on one device, or over a mesh (the slots then lie over its data axes).
        cfg: the architecture.
        config: sizes.
        tools, tokenizer: answer what requests with use_tools write between <|python_start|> and <|python_end|>.
        compute: dtype and attention backend; default: what suits the device.

    Raises:
        UserError: the context is longer than the model's, or the tokenizer lacks what tools need.
    """

    def __init__(
        self,
        params: model.Params,
        cfg: Architecture,
        config: EngineConfig = EngineConfig(),
        *,
        tools: Tools | None = None,
        tokenizer: Tokenizer | None = None,
        compute: Compute | None = None,
    ) -> None:
        self.context_len = cfg.sequence_len if config.context_len is None else config.context_len
        if not 2 <= self.context_len <= cfg.sequence_len:
            raise UserError(f"engine: context_len={self.context_len} must be from 2 to the model's {cfg.sequence_len}")
        if tools and (tokenizer is None or not set(TOOL_TOKENS) <= set(tokenizer.control)):
            raise UserError(f"engine: tools need a tokenizer with {', '.join(TOOL_TOKENS)}")
        self.cfg, self.config, self._compute = cfg, config, compute or default_compute()
        self._tools, self._tokenizer = tools, tokenizer
        self._tool_ids = [tokenizer.control[name] for name in TOOL_TOKENS] if tools and tokenizer else []
        longest = min(config.prefill_chunk, self.context_len)
        self._chunk_lens = [n for i in range(32) if (n := PROMPT_BUCKET << i) < longest]
        self._chunk_lens.append(-(-longest // PROMPT_BUCKET) * PROMPT_BUCKET)

        self._params = in_dtype(params, self._compute.dtype)
        at, slots_at = _placement(self._params, config)
        sizes = cfg, self._compute, self.context_len
        self._empty_rows = jax.jit(partial(empty_rows, config.prefill_rows, *sizes), out_shardings=at)()
        self._slots = jax.jit(partial(empty_slots, config.slots, *sizes), out_shardings=slots_at)()
        how: dict[str, Any] = {"cfg": cfg, "compute": self._compute}
        self._functions = {
            "prefill": jax.jit(partial(prefill, **how), out_shardings=at),
            "insert": jax.jit(insert, out_shardings=slots_at, donate_argnums=0),
            "decode": jax.jit(partial(decode, **how), out_shardings=(slots_at, at, at), donate_argnums=1),
        }
        self._programs: dict[tuple[Any, ...], jax.stages.Compiled] = {}
        self._numbers = count()
        self._waiting: dict[int, _Progress] = {}  # by number, in order of arrival
        self._running: dict[int, _Progress] = {}  # by slot
        self._free = list(range(config.slots))

    @property
    def compilations(self) -> int:
        """Programs compiled so far: at most one for each length of chunk, and two more."""
        return len(self._programs)

    def set_params(self, params: model.Params) -> None:
        """Go on with other parameters of the same shapes, while no request runs; nothing is compiled."""
        if self._running:
            raise UserError(f"engine: {len(self._running)} requests run on the old parameters; finish or cancel them")
        new, old = in_dtype(params, self._compute.dtype), self._params
        if jax.tree.map(lambda x: (x.shape, x.dtype), new) != jax.tree.map(lambda x: (x.shape, x.dtype), old):
            raise UserError("engine: the new parameters are not shaped like the old; make another engine for them")
        self._params = jax.device_put(new, jax.tree.map(lambda x: x.sharding, old))

    def submit(self, request: Request) -> int:
        """Queue a request and return its number; UserError if it cannot be answered."""
        prompt = tuple(int(token) for token in request.prompt)
        if not prompt:
            raise UserError("request: the prompt is empty; begin it with the <|bos|> token")
        if len(prompt) >= self.context_len:
            raise UserError(f"request: a prompt of {len(prompt)} tokens fills the context of {self.context_len}")
        if request.max_new_tokens < 1:
            raise UserError(f"request: max_new_tokens={request.max_new_tokens} must be at least 1")
        if request.use_tools and not self._tools:
            raise UserError("request: use_tools is set, but the engine was made without tools")
        if alien := [token for token in (*prompt, *request.stop_tokens) if not 0 <= token < self.cfg.vocab_size]:
            raise UserError(f"request: token {alien[0]} is not in the vocabulary of {self.cfg.vocab_size}")
        number, room = next(self._numbers), min(request.max_new_tokens, self.context_len - len(prompt))
        self._waiting[number] = _Progress(number, replace(request, prompt=prompt), room)
        return number

    def cancel(self, number: int) -> None:
        """Forget a request, of which nothing more is reported; its slot is free at once. An ended one is no error."""
        self._waiting.pop(number, None)
        for slot in [slot for slot, progress in self._running.items() if progress.number == number]:
            self._release(slot)

    def step(self) -> list[Output]:
        """Fill free slots, decode some tokens in each, and return what is new: one Output for each running request."""
        while self._waiting and self._free:
            self._admit()
        if not self._running:
            return []
        forced_BT = np.full((self.config.slots, self.config.steps_per_dispatch), -1, np.int32)
        limits_B = np.zeros(self.config.slots, np.int32)
        for slot, progress in self._running.items():
            forced = progress.forced[: forced_BT.shape[1]]
            forced_BT[slot, : len(forced)], limits_B[slot] = forced, progress.room
        self._slots, tokens_BT, logprobs_BT = self._call("decode", self._params, self._slots, forced_BT, limits_B)
        tokens_BT, logprobs_BT = jax.device_get((tokens_BT, logprobs_BT))
        return [self._advance(slot, tokens_BT[slot], logprobs_BT[slot]) for slot in list(self._running)]

    def run(self, requests: Sequence[Request]) -> list[Output]:
        """Answer requests, in their order; nothing else may be waiting or running."""
        if self._waiting or self._running:
            raise UserError("engine: run is for an idle engine, and this one has requests; use step")
        outputs: dict[int, Output] = {}
        try:
            for request in requests:
                number = self.submit(request)
                outputs[number] = Output(number)
            while news := self.step():
                for new in news:
                    outputs[new.request] += new
        finally:
            for number in outputs:
                self.cancel(number)
        return list(outputs.values())

    def _call(self, name: str, *args: Any) -> Any:
        # Compiled ahead, so that an unforeseen shape or sharding is an error and not a pause.
        key = (name, *(arg.shape for arg in args if isinstance(arg, np.ndarray)))
        if key not in self._programs:
            self._programs[key] = self._functions[name].lower(*args).compile()
        return self._programs[key](*args)

    def _chunks(self, prompt: Sequence[int]) -> list[int]:
        """Lengths of the chunks that a prompt is fed in, the last padded; they follow from its length."""
        whole, rest = divmod(len(prompt) - 1, self._chunk_lens[-1])
        return [self._chunk_lens[-1]] * whole + [next(n for n in self._chunk_lens if n > rest)]

    def _admit(self) -> None:
        """Prefill the first that waits, with others whose prompts have the same chunks; equal prompts once."""
        chunks = self._chunks(next(iter(self._waiting.values())).request.prompt)
        rows: dict[Sequence[int], int] = {}
        admitted: list[_Progress] = []
        for progress in islice(self._waiting.values(), LOOKAHEAD):
            prompt = progress.request.prompt
            fits = prompt in rows or len(rows) < self.config.prefill_rows
            if fits and len(admitted) < len(self._free) and self._chunks(prompt) == chunks:
                rows.setdefault(prompt, len(rows))
                admitted.append(progress)
        prefilled, start = self._empty_rows, 0
        for size in chunks:
            tokens_BT = np.zeros((self.config.prefill_rows, size), np.int32)
            counts_B = np.zeros(self.config.prefill_rows, np.int32)
            for prompt, row in rows.items():
                piece = prompt[start : start + size]
                tokens_BT[row, : len(piece)], counts_B[row] = piece, len(piece)
            prefilled, start = self._call("prefill", self._params, prefilled, tokens_BT, counts_B), start + size
        for progress in admitted:
            slot, request = self._free.pop(), progress.request
            halts_1V = np.zeros((1, self.cfg.vocab_size), bool)
            python_end = self._tool_ids[1:2] if request.use_tools else []
            halts_1V[0, [*request.stop_tokens, *python_end]] = True
            which, how_1 = (np.int32(slot), np.int32(rows[request.prompt])), SamplingArrays.of([request.sampling])
            self._slots = self._call("insert", self._slots, prefilled, *which, halts_1V, how_1)
            self._running[slot] = self._waiting.pop(progress.number)

    def _advance(self, slot: int, tokens_T: np.ndarray, logprobs_T: np.ndarray) -> Output:
        """Note a slot's new tokens; free it if they are its last, answer a tool call that ends with them."""
        progress, tokens = self._running[slot], tuple(token for token in tokens_T.tolist() if token >= 0)
        request, n_forced = progress.request, min(len(progress.forced), len(tokens))
        del progress.forced[:n_forced]
        progress.room -= len(tokens)
        sampled = tuple(i >= n_forced for i in range(len(tokens)))
        reason: Literal["stop", "length"] | None = None if progress.room else "length"
        if sampled[-1] and tokens[-1] in request.stop_tokens:
            reason = "stop"
        if reason:
            self._release(slot)
        elif request.use_tools:
            for token in tokens[n_forced:]:
                self._follow(progress, token)
        return Output(progress.number, tokens, sampled, tuple(logprobs_T[: len(tokens)].tolist()), reason)

    def _follow(self, progress: _Progress, token: int) -> None:
        """Read along with what the model writes; at the end of a tool call, queue the answer."""
        assert self._tools and self._tokenizer
        python_start, python_end, output_start, output_end = self._tool_ids
        if token == python_start:
            progress.call = []
        elif token == python_end and progress.call is not None:
            answer, progress.call = self._tools(self._tokenizer.decode(progress.call)), None
            if answer is not None:
                progress.forced = [output_start, *self._tokenizer.encode(answer), output_end]
        elif progress.call is not None:
            progress.call.append(token)

    def _release(self, slot: int) -> None:
        del self._running[slot]
        self._free.append(slot)


def _placement(params: model.Params, config: EngineConfig) -> tuple[jax.sharding.Sharding, jax.sharding.Sharding]:
    """Where arrays lie that belong to no slot, and where the slots' do."""
    at = slots_at = jax.tree.leaves(params)[0].sharding
    devices = 1
    if isinstance(at, NamedSharding):
        mesh = cast(Mesh, at.mesh)
        devices, at, slots_at = batch_devices(mesh), replicated(mesh), NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    for name, rows in (("slots", config.slots / devices), ("prefill_rows", config.prefill_rows)):
        if rows % 1 or (rows > TILE and rows % TILE):
            raise UserError(f"engine: {name}: {rows:g} on each device must be up to {TILE}, or a multiple of {TILE}")
    return at, slots_at
