"""How likely a model finds sequences of tokens: in batches of a few fixed shapes, what sequences share read only once.

A row of a batch is a prefix and its branches: the prefix is fed to a cache once, the cache is repeated, and each branch
is fed to a copy of it. Where there is little to share, a row is one sequence, and needs no cache. What a row gives
depends on nothing else in its batch, and batches have as many rows for each device on any number of devices.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import batched
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import model, sharding
from nanochat_jax.cache import EmptyCache, init_cache
from nanochat_jax.config import Architecture
from nanochat_jax.eval.bpb import delayed
from nanochat_jax.eval.prompts import Choices
from nanochat_jax.generate import in_dtype
from nanochat_jax.layers import Compute


class Shape(NamedTuple):
    """Of the rows of a program: up to so many branches of up to so many tokens, behind a prefix of up to so many."""

    prefix: int  # 0 for none
    branches: int
    length: int
    scored: int  # tokens at the end of a branch

    @property
    def tokens(self) -> int:
        """Computed for a row."""
        return self.prefix + self.branches * self.length


# Eleven, and one more for what fits none of them: a dozen programs whatever the tasks.
SHAPES = (
    *(Shape(0, 1, length, min(length // 2, 128)) for length in (128, 256, 512, 1024, 2048, 3072)),
    *(Shape(prefix, 4, 64, 64) for prefix in (256, 512, 1024, 1536, 2048)),
)
ROUNDING = 128  # of the shape for what fits none


class Row(NamedTuple):
    """Some of an item's sequences."""

    item: int
    first: int  # of the sequences


Plan = dict[Shape, list[Row]]


def plan(items: Sequence[Choices], shapes: Sequence[Shape] = SHAPES) -> Plan:
    """The rows that items are scored in: each goes where it costs the fewest tokens."""
    rows: Plan = defaultdict(list)
    homeless: list[int] = []
    for i, item in enumerate(items):
        fitting = [shape for shape in shapes if _fits(item, shape)]
        if not fitting:
            homeless.append(i)
            continue
        shape = min(fitting, key=lambda shape: len(_rows(i, item, shape)) * shape.tokens)
        rows[shape] += _rows(i, item, shape)
    if homeless:
        length, scored = (
            -(-max(of(items[i]) for i in homeless) // ROUNDING) * ROUNDING
            for of in (lambda item: len(item.shared) + max(map(len, item.tails)), lambda item: max(item.scored))
        )
        shape = Shape(0, 1, length, scored)
        rows[shape] += [row for i in homeless for row in _rows(i, items[i], shape)]
    return dict(sorted(rows.items(), key=lambda entry: -entry[0].tokens))  # what needs most memory fails first


def _rows(i: int, item: Choices, shape: Shape) -> list[Row]:
    return [Row(i, first) for first in range(0, len(item.tails), shape.branches)]


def _fits(item: Choices, shape: Shape) -> bool:
    unshared = max(0, len(item.shared) - shape.prefix)
    return unshared + max(map(len, item.tails)) <= shape.length and max(item.scored) <= shape.scored


class Scores(NamedTuple):
    """Of one sequence's scored tokens."""

    nats: float  # summed
    hit: bool  # each was the likeliest


class Scorer:
    """Scores sequences under a model, with one program for each shape.

    Args:
        params: the model's parameters, on the mesh.
        cfg: the architecture.
        compute: dtype and attention backend.
        mesh: over whose data axes batches are cut.
        tokens: that one device computes at a time.
    """

    def __init__(
        self, params: model.Params, cfg: Architecture, compute: Compute, mesh: jax.sharding.Mesh, tokens: int
    ) -> None:
        self._params = in_dtype(params, compute.dtype)
        self._mesh, self._tokens = mesh, tokens
        self._jitted = jax.jit(
            partial(_score, cfg=cfg, compute=compute), static_argnames="shape", out_shardings=sharding.replicated(mesh)
        )
        self._programs: dict[tuple[Shape, int], jax.stages.Compiled] = {}

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    def score(
        self, items: Sequence[Choices], rows: Plan, progress: Callable[[int], object] = lambda _: None
    ) -> list[list[Scores]]:
        """The scores of each item's sequences.

        Args:
            items: what to score.
            rows: their plan.
            progress: told how many more tokens are computed, as `Shape.tokens` counts them.
        """
        found = [[Scores(0.0, False)] * len(item.tails) for item in items]
        batches = ((shape, members, self._run(shape, items, members)) for shape, members in self._batches(rows))
        for shape, members, results in delayed(batches):
            nats_BW, hits_BW = (np.asarray(result).tolist() for result in results)
            for row, nats_W, hits_W in zip(members, nats_BW, hits_BW, strict=False):
                last = min(row.first + shape.branches, len(found[row.item]))
                found[row.item][row.first : last] = map(Scores, nats_W[: last - row.first], hits_W)
            progress(len(members) * shape.tokens)
        return found

    def rows_of(self, shape: Shape) -> int:
        """In a batch."""
        return max(1, self._tokens // shape.tokens) * sharding.batch_devices(self._mesh)

    def _batches(self, rows: Plan) -> Iterator[tuple[Shape, tuple[Row, ...]]]:
        for shape, members in rows.items():
            for batch in batched(members, self.rows_of(shape)):
                yield shape, batch

    def _run(self, shape: Shape, items: Sequence[Choices], members: Sequence[Row]) -> tuple[jax.Array, jax.Array]:
        size = self.rows_of(shape)
        batch = _fill(shape, size, [(items[row.item], row.first) for row in members])
        placed = sharding.put_batch(self._mesh, sharding.host_rows(self._mesh, batch))
        if (shape, size) not in self._programs:  # compiled ahead, so that an unforeseen shape is an error and no pause
            self._programs[shape, size] = self._jitted.lower(self._params, placed, shape=shape).compile()
        return self._programs[shape, size](self._params, placed)


def _fill(shape: Shape, size: int, rows: Sequence[tuple[Choices, int]]) -> dict[str, np.ndarray]:
    """Rows as arrays; those that there are none for, and branches likewise, are empty."""
    batch = {
        "prefix_BP": np.zeros((size, shape.prefix), np.int32),
        "prefix_counts_B": np.zeros(size, np.int32),
        "tokens_BWL": np.zeros((size, shape.branches, shape.length), np.int32),
        "counts_BW": np.zeros((size, shape.branches), np.int32),
        "scored_BW": np.zeros((size, shape.branches), np.int32),
    }
    for b, (item, first) in enumerate(rows):
        prefix, rest = item.shared[: shape.prefix], item.shared[shape.prefix :]
        batch["prefix_BP"][b, : len(prefix)] = prefix
        batch["prefix_counts_B"][b] = len(prefix)
        for w, tail in enumerate(item.tails[first : first + shape.branches]):
            count = len(rest) + len(tail)
            batch["tokens_BWL"][b, w, : len(rest)] = rest
            batch["tokens_BWL"][b, w, len(rest) : count] = tail
            batch["counts_BW"][b, w] = count
            batch["scored_BW"][b, w] = item.scored[first + w]
    return batch


def _score(
    params: model.Params, batch: dict[str, jax.Array], *, shape: Shape, cfg: Architecture, compute: Compute
) -> tuple[jax.Array, jax.Array]:
    """Summed nats of each branch's scored tokens, and whether each of them was the likeliest: (B, W) each."""
    B, W, L = batch["tokens_BWL"].shape
    tokens_NL, counts_N, scored_N = (
        batch[name].reshape(B * W, *batch[name].shape[2:]) for name in ("tokens_BWL", "counts_BW", "scored_BW")
    )
    cache = None
    if shape.prefix:
        empty = EmptyCache(*init_cache(cfg, B, compute.dtype, max_len=shape.prefix + L))
        _, cache = model.trunk(
            params, cfg, batch["prefix_BP"], cache=empty, counts_B=batch["prefix_counts_B"], compute=compute
        )
        cache = jax.tree.map(lambda rows: jnp.repeat(rows, W, axis=0), cache)
    x_NLD, _ = model.trunk(params, cfg, tokens_NL, cache=cache, counts_B=counts_N, compute=compute)
    # What comes before each scored token, the last of them in the last place.
    places_NS = counts_N[:, None] - 1 - jnp.arange(shape.scored, 0, -1, dtype=jnp.int32)[None]
    targets_NS = jnp.take_along_axis(tokens_NL, jnp.clip(places_NS + 1, 0, L - 1), axis=1)
    x_NSD = jnp.take_along_axis(x_NLD, jnp.clip(places_NS, 0, L - 1)[..., None], axis=1)
    logits_NSV = model.unembed(params, cfg, x_NSD)
    nats_NS = -jnp.take_along_axis(jax.nn.log_softmax(logits_NSV), targets_NS[..., None], axis=-1)[..., 0]
    is_scored_NS = jnp.arange(shape.scored, 0, -1)[None] <= scored_N[:, None]
    nats_N = jnp.sum(jnp.where(is_scored_NS, nats_NS, 0.0), axis=1)
    hits_N = jnp.all((jnp.argmax(logits_NSV, axis=-1) == targets_NS) | ~is_scored_NS, axis=1)
    return nats_N.reshape(B, W), hits_N.reshape(B, W)
