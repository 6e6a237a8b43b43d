"""Prompts into rows: in chunks of a few fixed lengths, and without what earlier prompts have in common with them.

All chunks of a prompt but the last are whole. So what a whole chunk puts into the cache depends on the prompt up to its
end and on nothing else, and can be kept for other prompts that begin alike: the next turn of a conversation, another
try, an edited message, a shared system message. Restored or computed, it is the same to the last bit.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any, cast

import jax
import numpy as np

from nanochat_jax import generate, model, sharding
from nanochat_jax.cache import Stretch
from nanochat_jax.generate import Rows

SHORTEST_CHUNK = 32  # tokens; every other length is so much times a power of two

type Prompt = tuple[int, ...]


class Programs:
    """Functions, compiled ahead, so that an unforeseen shape or sharding is an error and not a pause."""

    def __init__(self) -> None:
        self._functions: dict[str, Any] = {}
        self._compiled: dict[tuple[Any, ...], jax.stages.Compiled] = {}

    def add(self, name: str, function: Callable[..., Any], **how: Any) -> None:
        """A function to be called by name; how: jax.jit's options."""
        self._functions[name] = jax.jit(function, **how)

    def compiled(self, name: str, *args: Any) -> jax.stages.Compiled:
        """The program of a function for such arguments."""
        key = (name, *(arg.shape for arg in args if isinstance(arg, np.ndarray)))
        if key not in self._compiled:
            self._compiled[key] = self.lower(name, *args).compile()
        return self._compiled[key]

    def lower(self, name: str, *args: Any, **how: Any) -> jax.stages.Lowered:
        """A function for such arguments, and the mesh that they lie on; how: options of lowering."""
        with sharding.where(args):
            return cast(jax.stages.Lowered, self._functions[name].trace(*args).lower(**how))

    def __call__(self, name: str, *args: Any) -> Any:
        return self.compiled(name, *args)(*args)

    def __len__(self) -> int:
        return len(self._compiled)


class Prefixes:
    """Stretches of the prompts used last, by the whole prefix that each ends: equal prefixes are kept once.

    Args:
        stretch_len: tokens of a stretch.
        capacity: stretches kept.
    """

    def __init__(self, stretch_len: int, capacity: int) -> None:
        self.stretch_len, self.capacity = stretch_len, capacity
        self._kept: OrderedDict[Prompt, Stretch] = OrderedDict()  # used longest ago first

    def find(self, prompt: Prompt) -> list[Stretch]:
        """The known stretches that a prompt begins with; at least one token of it remains."""
        return [self._kept[prefix] for prefix in takewhile(self._kept.__contains__, self._prefixes(prompt))]

    def keep(self, prompt: Prompt, stretches: Sequence[Stretch]) -> None:
        """Keep the first stretches of a prompt, the first of them longest: without it the others are of no use."""
        for prefix, stretch in reversed(list(zip(self._prefixes(prompt), stretches, strict=False))):
            self._kept[prefix] = stretch
            self._kept.move_to_end(prefix)
        while len(self._kept) > self.capacity:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        self._kept.clear()

    def _prefixes(self, prompt: Prompt) -> list[Prompt]:
        ends = range(self.stretch_len, len(prompt), self.stretch_len) if self.capacity else ()
        return [prompt[:end] for end in ends]


class Prefill:
    """Feeds prompts, a fixed number of rows at once.

    Args:
        programs: where to compile.
        rows: prompts fed together.
        longest: tokens of a whole chunk, rounded up to a multiple of SHORTEST_CHUNK.
        reuse_tokens: tokens of earlier prompts whose keys and values are kept.
        new_rows: makes empty rows.
        at: where rows lie.
        how: architecture and compute, as generate's functions take them.
    """

    def __init__(
        self,
        programs: Programs,
        rows: int,
        longest: int,
        reuse_tokens: int,
        new_rows: Callable[[], Rows],
        at: jax.sharding.Sharding,
        how: dict[str, Any],
    ) -> None:
        self._call, self._rows, self._new_rows = programs, rows, new_rows
        self.chunk_lens = [n for i in range(32) if (n := SHORTEST_CHUNK << i) < longest]
        whole = -(-longest // SHORTEST_CHUNK) * SHORTEST_CHUNK
        self.chunk_lens.append(whole)
        self._prefixes = Prefixes(whole, reuse_tokens // whole)
        self.prompt_tokens = self.reused_tokens = 0  # of all prompts so far; of them, those not computed again
        programs.add("begin", partial(generate.begin, **how), out_shardings=at, donate_argnums=1)
        programs.add("prefill", partial(generate.prefill, **how), out_shardings=at, donate_argnums=1)
        programs.add("restore", generate.restore, out_shardings=at, donate_argnums=0)
        programs.add("snapshot", partial(generate.snapshot, size=whole), out_shardings=at)

    def chunks(self, prompt: Prompt) -> list[int]:
        """Lengths of the chunks that a prompt is fed in, the last padded; they follow from its length."""
        whole, rest = divmod(len(prompt) - 1, self.chunk_lens[-1])
        return [self.chunk_lens[-1]] * whole + [next(n for n in self.chunk_lens if n > rest)]

    def plan(self, prompt: Prompt) -> tuple[list[int], int]:
        """A prompt's chunks, and how many of them are known; prompts of one plan can be fed together."""
        return self.chunks(prompt), len(self._prefixes.find(prompt))

    def feed(self, params: model.Params, prompts: Mapping[Prompt, int]) -> Rows:
        """Rows that hold these prompts, of one plan, each in the row that is given with it."""
        chunks, known = self.plan(next(iter(prompts)))
        stretches = {prompt: self._prefixes.find(prompt) for prompt in prompts}
        rows, start = self._new_rows(), 0
        for number, size in enumerate(chunks):
            tokens_BT, counts_B = np.zeros((self._rows, size), np.int32), np.zeros(self._rows, np.int32)
            for prompt, row in prompts.items():
                piece = prompt[start : start + size]
                tokens_BT[row, : len(piece)], counts_B[row] = piece, len(piece)
            if number < known:
                for prompt, row in prompts.items():
                    only_B = np.where(np.arange(self._rows) == row, counts_B, 0).astype(np.int32)
                    rows = self._call("restore", rows, stretches[prompt][number], tokens_BT, only_B)
            else:
                rows = self._call("prefill" if number else "begin", params, rows, tokens_BT, counts_B)
                if self._prefixes.capacity and number < len(chunks) - 1:
                    for prompt, row in prompts.items():
                        stretches[prompt].append(self._call("snapshot", rows, np.int32(row)))
            start += size
        for prompt in prompts:
            self._prefixes.keep(prompt, stretches[prompt])
            self.prompt_tokens += len(prompt)
            self.reused_tokens += known * self._prefixes.stretch_len
        return rows

    def forget(self) -> None:
        """Drop what is kept of earlier prompts."""
        self._prefixes.clear()
