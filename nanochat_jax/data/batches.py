"""Batches of rows: the order is a function of the seed and the step alone, on any number of hosts."""

import sys
from collections.abc import Iterator
from typing import Protocol

import grain
import numpy as np

from nanochat_jax.errors import UserError

READ_THREADS = 4
BATCHES_AHEAD = 8

Batch = dict[str, np.ndarray]


class NotYetError(Exception):
    """The row at a position of an order is not known yet."""


class NothingFitsError(UserError):
    """All that rows were to be made of is longer than a row."""


class Order(Protocol):
    """Which row is read when: the number of a row by its position in an endless sequence, or NotYetError."""

    def __getitem__(self, position: int, /) -> int: ...


class Rows(Protocol):
    """Things to learn from, each an array by name, all of one shape."""

    def __len__(self) -> int: ...
    def row(self, index: int, /) -> Batch: ...


def shuffled(start: int, stop: int, seed: int) -> Order:
    """The rows from start to stop again and again, each time in another order, which takes no memory to know."""
    order: Order = grain.MapDataset.range(start, stop).shuffle(seed=seed % 2**32).repeat()
    return order


def batches(
    rows: Rows,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    order: Order | None = None,
) -> Iterator[Batch]:
    """Endless training batches from any step on, every epoch in a new order, read ahead by threads.

    Step s takes rows s*batch_size to (s+1)*batch_size - 1 of the endless shuffled sequence, and each host its own
    contiguous slice of them: epochs follow each other without a gap, and seeking costs nothing.

    Args:
        rows: of the training split.
        batch_size: rows in the batch of all hosts together.
        seed: of the order.
        start_step: first step to yield.
        process_index: this host.
        process_count: hosts in all.
        order: in place of shuffling all rows anew each epoch.

    Yields:
        Each array of the rows, stacked: (batch_size / process_count, …); nothing in place of what is not known yet.

    Raises:
        UserError: if the batch does not divide among the hosts.
    """
    local = rows_per_process(batch_size, process_count)
    numbers = shuffled(0, len(rows), seed) if order is None else order

    def load(step: int) -> Batch:
        first = step * batch_size + process_index * local
        try:
            return stack([rows.row(numbers[i]) for i in range(first, first + local)])
        except NotYetError:
            return {}

    steps = grain.MapDataset.range(start_step, sys.maxsize // batch_size)
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=BATCHES_AHEAD)
    return iter(steps.map(load).to_iter_dataset(options))


def validation_batches(
    rows: Rows, batch_size: int, *, limit: int = 0, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Every row once, or `limit` evenly spaced ones, in order; rows that the last batch lacks have targets of -1 alone.

    The first ones would be of the first set of a mixture, or the longest, as rows of conversations are sorted.

    Other arguments as for `batches`.

    Yields:
        As `batches`; each host equally many.
    """
    local = rows_per_process(batch_size, process_count)
    count = min(limit or len(rows), len(rows))
    for first in range(process_index * local, process_index * local + count, batch_size):
        batch = stack([rows.row(min(i, count - 1) * len(rows) // count) for i in range(first, first + local)])
        batch["targets"][max(0, count - first) :] = -1
        yield batch


def stack(rows: list[Batch]) -> Batch:
    """Rows as one batch."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def rows_per_process(batch_size: int, process_count: int) -> int:
    """How many of a batch's rows each host reads."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"a batch of {batch_size} rows does not divide among {process_count} processes")
    return batch_size // process_count
