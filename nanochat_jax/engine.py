"""Many continuations at once, on a fixed number of slots: what rollouts, evaluation and serving sample with.

    engine = Engine(params, cfg)
    outputs = engine.run([Request(prompt, max_new_tokens=100) for prompt in prompts])

Requests wait for a free slot. A prompt is fed in chunks of a few fixed lengths (prefill.py) and inserted into the slot;
one program decodes a bank of slots, several tokens a call. What a request yields depends on its prompt, its sampling
and the parameters alone: to the last bit, not on neighbours, load, slot, order of arrival or earlier prompts. For this,
every program has one batch size whatever is waiting, a prompt's chunks follow from its length, and a token's randomness
from the request's seed and the token's position.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanochat_jax import generate, model
from nanochat_jax.config import Architecture
from nanochat_jax.errors import UserError
from nanochat_jax.generate import Sampled, Slots, in_dtype
from nanochat_jax.layers import Compute, default_compute
from nanochat_jax.prefill import Prefill, Programs, Prompt
from nanochat_jax.requests import FinishReason, Output, Request
from nanochat_jax.sampling import SamplingArrays
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
    prefill_chunk: int = 512  # longest piece of a prompt that is fed at once, and the unit of what is reused
    reuse_tokens: int = 0  # tokens of earlier prompts whose keys and values are kept for prompts that begin alike
    top_logprobs: int = 0  # how many of the likeliest tokens an Output tells at each position

    def __post_init__(self) -> None:
        least = {"slots": 1, "steps_per_dispatch": 1, "prefill_rows": 1, "prefill_chunk": 1}
        for name, value in (least | {"reuse_tokens": 0, "top_logprobs": 0}).items():
            if getattr(self, name) < value:
                raise UserError(f"engine: {name}={getattr(self, name)} must be at least {value}")


@dataclass
class _Progress:
    """What the host knows of a request that has not ended."""

    number: int
    request: Request
    prompt: Prompt
    room: int  # for tokens to come
    forced: list[int] = field(default_factory=list)  # tokens of a tool's answer that are not yet in the sequence
    call: list[int] | None = None  # tokens of the tool call that the model is writing


class Engine:
    """Continues requests; see the module's text. Not thread-safe: one thread calls submit, cancel and step.

    Args:
        params: the model's parameters, on one device, or over a mesh (the slots then lie over its data axes).
        cfg: the architecture.
        config: sizes.
        tools: answer what requests with use_tools write between <|python_start|> and <|python_end|>.
        tokenizer: the model's, which tools need.
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
        self._params = in_dtype(params, self._compute.dtype)
        at, slots_at, self._bank = _placement(self._params, config)
        how: dict[str, Any] = {"cfg": cfg, "compute": self._compute}
        sizes = cfg, self._compute, self.context_len
        self._new_bank = jax.jit(partial(generate.empty_slots, self._bank, *sizes), out_shardings=slots_at)
        new_rows = jax.jit(partial(generate.empty_rows, config.prefill_rows, *sizes), out_shardings=at)
        decode = partial(generate.decode, **how, top=config.top_logprobs)
        self._call = Programs()
        self._call.add("decode", decode, out_shardings=(slots_at, at), donate_argnums=1)
        self._call.add("insert", generate.insert, out_shardings=slots_at, donate_argnums=0)
        chunk = min(config.prefill_chunk, self.context_len)
        self.prefill = Prefill(self._call, config.prefill_rows, chunk, config.reuse_tokens, new_rows, at, how)
        # One thread's programs run one after another. Over several devices they have to, lest they wait for each other.
        n_banks = config.slots // self._bank
        self._threads = ThreadPoolExecutor(n_banks, "bank") if n_banks > 1 and len(at.device_set) == 1 else None
        self._numbers = count()
        self._waiting: dict[int, _Progress] = {}  # by number, in order of arrival
        self._running: dict[int, _Progress] = {}  # by slot
        self.reset()

    @property
    def compilations(self) -> int:
        """Programs compiled so far.

        At most two for each length of chunk, as a prompt's first and as a later one, and two more; four where prompts
        are kept.
        """
        return len(self._call)

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run, and that wait."""
        return len(self._running), len(self._waiting)

    def reset(self) -> None:
        """Forget all requests and kept prompts; also the way out after an exception in step."""
        self._waiting.clear()
        self._running.clear()
        self.prefill.forget()
        self._free = set(range(self.config.slots))
        self._banks = [self._new_bank() for _ in range(self.config.slots // self._bank)]

    def set_params(self, params: model.Params) -> None:
        """Go on with other parameters of the same shapes; UserError while requests run. Nothing is compiled."""
        if self._running:
            raise UserError(f"engine: {len(self._running)} requests run on the old parameters; finish or cancel them")
        new, old = in_dtype(params, self._compute.dtype), self._params
        if jax.tree.map(lambda x: (x.shape, x.dtype), new) != jax.tree.map(lambda x: (x.shape, x.dtype), old):
            raise UserError("engine: the new parameters are not shaped like the old; make another engine for them")
        self._params = jax.device_put(new, jax.tree.map(lambda x: x.sharding, old))
        self.prefill.forget()

    def warm_up(self) -> None:
        """Compile all programs now; for an idle engine."""
        whole = max(self.prefill.chunk_lens)
        later = [whole + size for size in self.prefill.chunk_lens]
        for size in (*self.prefill.chunk_lens, *later, whole + 1):  # the last begins with a chunk that is known by then
            self.run([Request([0] * min(size, self.context_len - 1), 1)])
        self.prefill.forget()
        self.prefill.prompt_tokens = self.prefill.reused_tokens = 0

    def check(self, request: Request) -> Prompt:
        """Its prompt; UserError if the request cannot be answered. May be called from any thread."""
        return request.checked_prompt(self.cfg.vocab_size, self.context_len, has_tools=bool(self._tools))

    def submit(self, request: Request) -> int:
        """Queue a request and return its number; UserError if it cannot be answered."""
        prompt, number = self.check(request), next(self._numbers)
        room = min(request.max_new_tokens, self.context_len - len(prompt))
        self._waiting[number] = _Progress(number, request, prompt, room)
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
        forced_NBT = np.full((len(self._banks), self._bank, self.config.steps_per_dispatch), -1, np.int32)
        limits_NB = np.zeros(forced_NBT.shape[:2], np.int32)
        for slot, progress in self._running.items():
            at, forced = divmod(slot, self._bank), progress.forced[: forced_NBT.shape[2]]
            forced_NBT[at][: len(forced)], limits_NB[at] = forced, progress.room
        banks = sorted({slot // self._bank for slot in self._running})
        decode = self._call.compiled("decode", self._params, self._banks[0], forced_NBT[0], limits_NB[0])

        def run(bank: int, slots: Slots) -> tuple[Slots, Sampled]:
            slots, sampled = decode(self._params, slots, forced_NBT[bank], limits_NB[bank])
            return slots, jax.device_get(sampled)

        each = self._threads.map if self._threads and len(banks) > 1 else map
        decoded = dict(zip(banks, each(run, banks, [self._banks[bank] for bank in banks]), strict=True))
        for bank, (slots, _) in decoded.items():
            self._banks[bank] = slots
        return [self._advance(slot, decoded[slot // self._bank][1], slot % self._bank) for slot in list(self._running)]

    def run(self, requests: Sequence[Request]) -> list[Output]:
        """Answer requests, in their order; nothing else may be waiting or running (else UserError)."""
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

    def _admit(self) -> None:
        """Prefill the first that waits, with others whose prompts are fed alike; equal prompts once."""
        plan = self.prefill.plan(next(iter(self._waiting.values())).prompt)
        rows: dict[Prompt, int] = {}
        admitted: list[_Progress] = []
        for progress in islice(self._waiting.values(), LOOKAHEAD):
            fits = progress.prompt in rows or len(rows) < self.config.prefill_rows
            if fits and len(admitted) < len(self._free) and self.prefill.plan(progress.prompt) == plan:
                rows.setdefault(progress.prompt, len(rows))
                admitted.append(progress)
        prefilled = self.prefill.feed(self._params, rows)
        for progress in admitted:
            slot, request = min(self._free), progress.request
            halts_1V = np.zeros((1, self.cfg.vocab_size), bool)
            python_end = self._tool_ids[1:2] if request.use_tools else []
            halts_1V[0, [*request.stop_tokens, *python_end]] = True
            bank, how_1 = slot // self._bank, SamplingArrays.of([request.sampling])
            which = np.int32(slot % self._bank), np.int32(rows[progress.prompt])
            self._banks[bank] = self._call("insert", self._banks[bank], prefilled, *which, halts_1V, how_1)
            self._running[slot] = self._waiting.pop(progress.number)
            self._free.remove(slot)

    def _advance(self, slot: int, new: Sampled, row: int) -> Output:
        """Note a slot's new tokens; free it if they are its last, answer a tool call that ends with them."""
        progress, tokens = self._running[slot], tuple(token for token in new.tokens_BT[row].tolist() if token >= 0)
        request, n_forced = progress.request, min(len(progress.forced), len(tokens))
        del progress.forced[:n_forced]
        progress.room -= len(tokens)
        sampled = tuple(i >= n_forced for i in range(len(tokens)))
        reason: FinishReason | None = None if progress.room else "length"
        if sampled[-1] and tokens[-1] in request.stop_tokens:
            reason = "stop"
        if reason:
            self._release(slot)
        elif request.use_tools:
            for token in tokens[n_forced:]:
                self._follow(progress, token)
        logprobs = tuple(new.logprobs_BT[row, : len(tokens)].tolist())
        return Output(progress.number, tokens, sampled, logprobs, reason, new.likeliest(row, len(tokens)))

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
        self._free.add(slot)


def _placement(params: model.Params, config: EngineConfig) -> tuple[jax.sharding.Sharding, jax.sharding.Sharding, int]:
    """Where arrays lie that belong to no slot, and where the slots' do; and how many slots are decoded together.

    On a CPU one row costs about as much as another, so that it pays to leave out those that are free; elsewhere many
    rows cost little more than one.
    """
    at = slots_at = jax.tree.leaves(params)[0].sharding
    devices = 1
    if isinstance(at, NamedSharding):
        mesh = cast(Mesh, at.mesh)
        devices, at, slots_at = batch_devices(mesh), replicated(mesh), NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    for name, rows in (("slots", config.slots / devices), ("prefill_rows", config.prefill_rows)):
        if rows % 1 or (rows > TILE and rows % TILE):
            raise UserError(f"engine: {name}: {rows:g} on each device must be up to {TILE}, or a multiple of {TILE}")
    on_cpu = next(iter(at.device_set)).platform == "cpu"
    return at, slots_at, min(config.slots, TILE * devices) if on_cpu else config.slots
