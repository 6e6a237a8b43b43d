"""What pretraining reads: a prepared set, several mixed by weight, or one that is still being prepared."""

import hashlib
import json
import re
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path

import grain

from nanochat_jax import hosts
from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.config import to_json
from nanochat_jax.data.batches import Batch, NotYetError, Order, Rows, batches, shuffled
from nanochat_jax.data.pretrain import Records, open_shards, open_split
from nanochat_jax.data.records import Recipe, finished_units, load_recipe
from nanochat_jax.errors import UserError
from nanochat_jax.files import as_path, is_remote, locked
from nanochat_jax.tokenizer import Tokenizer

POLL_SECONDS = 1.0
STALLED_SECONDS = 60.0  # without a new unit, before it is asked whether anybody is at work
_WEIGHT = re.compile(r"(.+?)\*([0-9]*\.?[0-9]+)")


@dataclass(frozen=True)
class Corpus:
    """Rows to train and to validate on."""

    spec: str
    tokenizer: Tokenizer
    sequence_len: int
    fingerprint: str  # tells these rows, and how they are mixed, from all others
    train: Rows
    val: Rows
    order: Callable[[int], Order]  # by seed
    sets: dict[str, tuple[float, int]]  # by name: share of the rows, records; without those still in preparation

    def batches(self, *, batch_size: int, seed: int, start_step: int = 0, **share: int) -> Iterator[Batch]:
        """Training batches as of `batches.batches`; {} every so often while the next one is still in preparation."""
        step = start_step
        while True:
            if isinstance(self.train, Arriving):
                yield from ({} for _ in self.train.wait_for((step + 1) * batch_size - 1))
            order = self.order(seed)
            for batch in batches(self.train, batch_size=batch_size, seed=seed, start_step=step, order=order, **share):
                if not batch:
                    break
                yield batch
                step += 1

    def wait_for(self, rows: int) -> None:
        """Return when so many rows are prepared, or all are."""
        if isinstance(self.train, Arriving):
            deque(self.train.wait_for(rows - 1), maxlen=0)

    def epochs(self, rows: int) -> dict[str, float]:
        """How often each set has been read after so many rows."""
        return {name: rows * share / records for name, (share, records) in self.sets.items()}


def open_corpus(spec: str | Path, *, window_units: int = 0) -> Corpus:
    """Open what a spec names.

    Args:
        spec: folder made by train.prepare, on disk or in a bucket; or several with weights, FOLDER*3,FOLDER*1: of
            four rows three are from the first, each set shuffled anew whenever it has been read.
        window_units: shuffle within so many work units at a time, in the order they are prepared in, and begin as
            soon as the first of these windows is ready, whose held-out part is what is validated on; 0 shuffles
            everything, which takes a finished set.

    Raises:
        UserError: a set is not prepared, or damaged, or the sets differ in tokenizer or sequence length, or the first
            window holds nothing out.
    """
    spec = str(spec)
    entries = [_WEIGHT.fullmatch(entry.strip()) or entry.strip() for entry in spec.split(",")]
    weighted = [(entry, 1.0) if isinstance(entry, str) else (entry[1], float(entry[2])) for entry in entries]
    folders = [as_path(folder) for folder, _ in weighted]
    weights = [weight for _, weight in weighted]
    if min(weights) <= 0 or len(set(map(str, folders))) < len(folders):
        raise UserError(f"data {spec!r}: weights must be positive, and each set be named once")
    if window_units < 0 or (window_units and len(folders) > 1):
        raise UserError(f"window-units={window_units} must not be negative, and goes with one set alone")
    recipes = [load_recipe(folder)[0] for folder in folders]
    for folder, recipe in zip(folders, recipes, strict=True):
        if recipe.tokenizer_sha256 != recipes[0].tokenizer_sha256:
            raise UserError(
                f"{folders[0]} and {folder} were made by two tokenizers, sha256 {recipes[0].tokenizer_sha256} and "
                f"{recipe.tokenizer_sha256}: prepare one of them again with the other's tokenizer.model"
            )
        if recipe.sequence_len != recipes[0].sequence_len:
            raise UserError(
                f"{folders[0]} has sequence-len={recipes[0].sequence_len}, {folder} {recipe.sequence_len}: prepare "
                "one of them again"
            )
    tokenizer = tokenizers.load(folders[0] / "tokenizer.model")
    if window_units:
        return _open_windows(spec, folders[0], window_units, tokenizer)
    train, val = (
        [open_split(folder, split, tokenizer_sha256=tokenizer.sha256) for folder in folders]
        for split in ("train", "val")
    )
    shares = [weight / sum(weights) for weight in weights]
    fingerprints = [part.manifest.fingerprint for part in train]
    starts = [0, *accumulate(map(len, train))]

    def order(seed: int) -> Order:
        parts = [shuffled(a, b, seed + number) for number, (a, b) in enumerate(pairwise(starts))]
        return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)

    return Corpus(
        spec,
        tokenizer,
        recipes[0].sequence_len,
        fingerprints[0] if len(train) == 1 else _digest([fingerprints, shares]),
        Joined(train),
        Joined(val),
        order,
        {str(f): (share, len(part)) for f, share, part in zip(folders, shares, train, strict=True)},
    )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


class Joined:
    """Rows of several sets, one set after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def row(self, index: int) -> Batch:
        part = bisect_right(self._ends, index)
        return self._parts[part].row(index - (self._ends[part - 1] if part else 0))


def _open_windows(spec: str, folder: Path, window_units: int, tokenizer: Tokenizer) -> Corpus:
    train = Arriving(folder, window_units)
    recipe, units = train.recipe, train.units
    deque(train.wait_for(0), maxlen=0)
    val = open_shards(folder, "val", recipe, range(min(window_units, units)), units, _digest(to_json(recipe)))
    if not len(val):
        raise UserError(
            f"the first {window_units:,} work units of {folder} hold no record to validate on: choose a larger "
            "--window-units, or prepare it again with a larger --val-fraction or --unit-bytes"
        )
    return Corpus(
        spec, tokenizer, recipe.sequence_len, _digest([to_json(recipe), window_units]), train, val, train.order, {}
    )  # fmt: skip


class Arriving:
    """Training records of a set whose preparation may still go on.

    Windows of so many work units follow each other, each shuffled for itself, in every epoch anew.
    """

    def __init__(self, folder: Path, window_units: int) -> None:
        self.recipe, self.units = load_recipe(folder)
        self._folder = folder
        self._window_units = window_units
        self._starts = [0]  # of the units that are known to be finished, in rows, and where the last one ends
        self._shards: dict[int, Records[Recipe]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Rows of the windows that are known to be finished."""
        known = len(self._starts) - 1
        return self._starts[known if known == self.units else known - known % self._window_units]

    def row(self, index: int) -> Batch:
        unit = bisect_right(self._starts, index) - 1
        with self._lock:
            if unit not in self._shards:
                version = _digest(to_json(self.recipe))
                self._shards[unit] = open_shards(self._folder, "train", self.recipe, [unit], self.units, version)
        return self._shards[unit].row(index - self._starts[unit])

    def order(self, seed: int) -> Order:
        return _Windowed(self, seed)

    def place(self, position: int) -> tuple[int, int, int]:
        """(window, epoch, row) of a position in the endless sequence; NotYetError if it is not prepared yet."""
        if position >= len(self) and len(self._starts) <= self.units:
            raise NotYetError
        epoch, row = divmod(position, len(self))
        return (bisect_right(self._starts, row) - 1) // self._window_units, epoch, row

    def bounds(self, window: int) -> tuple[int, int]:
        """First row of a finished window, and the one behind its last."""
        first = window * self._window_units
        return self._starts[first], self._starts[min(first + self._window_units, self.units)]

    def wait_for(self, position: int) -> Iterator[None]:
        """Yield before each pause, at first at once, until a position is prepared, or all is.

        The first of several processes looks for all, so that all wait, and yield, alike.

        Raises:
            UserError: nobody is at work on it.
        """
        changed = time.monotonic()
        told = False

        def look() -> list[int]:
            stalled = time.monotonic() - changed > STALLED_SECONDS and not _is_at_work(self._folder)
            new = finished_units(self._folder, len(self._starts) - 1)
            if stalled and not new:
                raise UserError(f"{self._done()}, and nobody is at work on the rest: run train.prepare again")
            return new

        while position >= len(self) and len(self._starts) <= self.units:
            if new := hosts.first(look):
                self._starts += list(accumulate(new, initial=self._starts[-1]))[1:]
                changed = time.monotonic()
                continue
            yield
            if not told:
                print(f"{self._done()}; waiting for more", flush=True)
                told = True
            time.sleep(POLL_SECONDS)

    def _done(self) -> str:
        return f"{len(self._starts) - 1:,} of {self.units:,} units of {self._folder} are prepared"


def _is_at_work(folder: Path) -> bool:
    if is_remote(folder):
        return True  # perhaps on another machine
    try:
        with locked(folder):
            return False
    except UserError:
        return True


class _Windowed:
    """The order of an Arriving's rows."""

    def __init__(self, rows: Arriving, seed: int) -> None:
        self._rows = rows
        self._shuffled = cache(lambda window: shuffled(*rows.bounds(window), seed + window))

    def __getitem__(self, position: int) -> int:
        window, epoch, row = self._rows.place(position)
        start, stop = self._rows.bounds(window)
        return self._shuffled(window)[epoch * (stop - start) + row - start]
