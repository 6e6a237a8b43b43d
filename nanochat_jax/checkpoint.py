"""Checkpoints on Orbax: asynchronous, atomic, verified on load, independent of the number of devices.

One commit, `<folder>/<step>/`, holds every array of the state in its logical shape, under its path ("params/wte", …),
and in its metadata a manifest: meta, metrics, tokenizer, a fingerprint of each array, and the sha256 of all this.
Orbax does not checksum array data, a flipped bit loads silently: hence the fingerprints, taken on the devices.

Of Orbax's v1 API this uses the free functions, not `training.Checkpointer`: that one cannot be opened at all when one
byte of any step's metrics is damaged, and tidies when opened, so that sampling would delete what a trainer is writing.
"""

import base64
import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from nanochat_jax import hosts
from nanochat_jax.errors import UserError
from nanochat_jax.files import as_path, is_remote

log = logging.getLogger(__name__)

_DEBRIS = ".orbax-checkpoint-tmp"  # Orbax commits by renaming "<step><this>"; kill -9 leaves it behind


class _Damaged(Exception):
    """A stored checkpoint cannot be read back as it was written."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds beside its arrays; `arrays` maps their paths to "dtype[shape] fingerprint"."""

    path: epath.Path
    step: int
    meta: dict[str, Any]
    metrics: dict[str, float]
    tokenizer: bytes
    arrays: dict[str, str]


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The checkpoints of one run. Reading never changes the folder; only `save` makes and tidies it.

    With several processes all must call `save`, `wait` and `restore`, in the same order.

    Args:
        folder: local path or object store.
        keep_newest: how many of the newest checkpoints stay (0: all); with one there is none to step back to.
        keep_best: metric whose lowest value marks one more to keep, or None.
    """

    def __init__(self, folder: epath.PathLike, *, keep_newest: int = 2, keep_best: str | None = "val_bpb") -> None:
        path = as_path(folder)
        self.folder = epath.Path(path if is_remote(path) else path.absolute())  # epath makes gs://… a folder of here
        self.keep_newest, self.keep_best = keep_newest, keep_best
        self._pending: tuple[int, ocp.AsyncResponse[None]] | None = None
        self._current: int | None = None  # the step saved or restored last
        self._damage: dict[int, str] = {}

    def __exit__(self, *_: object) -> None:
        self.wait()

    def steps(self) -> list[int]:
        """The steps with a complete (not necessarily undamaged) checkpoint, ascending."""
        paths = self.folder.iterdir() if self.folder.exists() else ()
        return sorted(int(path.name) for path in paths if path.name.isdecimal())

    def newest(self) -> int | None:
        """The last of `steps`."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the lowest finite `keep_best` metric."""
        scores = {}
        for step in self.steps():
            with contextlib.suppress(_Damaged):
                scores[step] = self._read(step).metrics.get(self.keep_best or "", math.nan)
        return min((step for step in scores if math.isfinite(scores[step])), key=scores.__getitem__, default=None)

    def save(
        self, step: int, state: Any, *, meta: dict[str, Any], tokenizer: bytes, metrics: dict[str, float] | None = None
    ) -> None:
        """Starts to write a checkpoint in the background; does nothing if `step` was saved or restored last.

        `state` may be donated or deleted at once: on accelerators its copy to the host is finished on return; on CPU
        the background holds views of the buffers, and JAX does not reuse or free a buffer with a view.
        Checkpoints of this or a later step (history that was gone back on) and damaged ones become "set-aside-…".

        Args:
            state: pytree of arrays.
            meta: JSON data: config, data position, ….
            tokenizer: `Tokenizer.to_bytes()`.
            metrics: numbers, for `best`.
        Raises:
            UserError: this or the previous save failed (disk full, no permission, …); complete ones stay intact.
        """
        self.wait()
        if step == self._current:
            return
        arrays = {key: jnp.asarray(x) for key, x in _by_path(state).items()}
        manifest = {
            "step": step,
            "meta": meta,
            "metrics": metrics or {},
            "tokenizer": base64.b64encode(tokenizer).decode(),
            "arrays": {key: _fingerprint(x) for key, x in arrays.items()},
        }
        manifest = json.loads(json.dumps(manifest))  # as it will be read back, and out of the caller's reach
        metadata = {"manifest": manifest, "sha256": _sha256(manifest)}
        path = self.folder / str(step)
        with _failures_as(UserError, f"could not save checkpoint {path}; check free space and permissions"):
            hosts.first(lambda: self._tidy(step))
            self._pending = step, ocp.save_checkpointables_async(path, {"state": arrays}, custom_metadata=metadata)
        self._damage.clear()

    def set_aside(self, steps: Iterable[int]) -> None:
        """Renames the checkpoints of these steps, so that nothing goes on from them any more."""
        for step in steps:
            aside = (self.folder / str(step)).rename(self.folder / f"set-aside-{step}-{int(time.time())}")
            log.warning(
                "checkpoint %d is no longer part of this run: renamed to %s; delete it if not needed", step, aside
            )

    def wait(self) -> None:
        """Waits until the save under way is complete; UserError if it failed."""
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None
        path = self.folder / str(step)
        with _failures_as(UserError, f"could not save checkpoint {path}; check free space and permissions"):
            response.result()
            self._current = step
            if hosts.is_first():
                self._prune()

    def peek(self, step: int | None = None) -> Checkpoint | None:
        """Reads the newest good manifest, or that of `step`, but no array; None when nothing was ever saved."""
        return self._first_good(step, self._read)

    def restore(self, like: Any, *, step: int | None = None) -> tuple[Any, Checkpoint] | None:
        """Loads and verifies the newest undamaged checkpoint, or exactly that of `step`.

        Args:
            like: pytree of jax.ShapeDtypeStruct, with the shardings to load onto (default: one local device). Fields
                of the state that it lacks at the top are not read: {"params": …} loads the parameters alone.
        Returns:
            The state, in the structure of `like`, and what came with it; None when nothing was ever saved.
        Raises:
            UserError: all candidates are damaged or absent, or the stored arrays are not those of `like`.
        """
        loaded = self._first_good(step, lambda candidate: _load(self._read(candidate), like))
        self._current = loaded[1].step if loaded else None
        return loaded

    def _first_good[T](self, step: int | None, load: Callable[[int], T]) -> T | None:
        there = hosts.first(self.steps)
        if step is not None and there and step not in there:
            raise UserError(f"no checkpoint of step {step:,} in {self.folder}: there are {', '.join(map(str, there))}")
        candidates = there[::-1] if step is None else [step]
        for candidate in candidates:
            if candidate in self._damage:
                continue
            loaded: list[T] = []
            damage = ""
            try:
                loaded.append(load(candidate))
            except _Damaged as error:
                damage = str(error)
            damage = next(filter(None, hosts.gather(damage)), "")  # what one process cannot read, none uses
            if not damage:
                return loaded[0]
            self._damage[candidate] = damage
            log.warning("checkpoint %s cannot be used: %s", self.folder / str(candidate), damage)
        if not candidates:
            return None
        found = "".join(f"\n  step {candidate}: {self._damage[candidate]}" for candidate in candidates)
        if step is not None and len(there) > 1:
            raise UserError(f"a damaged checkpoint in {self.folder}; those of other steps may be good:{found}")
        raise UserError(f"no good checkpoint in {self.folder} (move it away to start anew):{found}")

    def _read(self, step: int) -> Checkpoint:
        path = self.folder / str(step)
        with _failures_as(_Damaged, "manifest"):
            # Not through Orbax: its readers need all processes at their barriers, and process 0 prunes alone.
            stored = json.loads((path / "_CHECKPOINT_METADATA").read_bytes())["custom_metadata"]
            manifest = stored["manifest"]
            if _sha256(manifest) != stored["sha256"] or manifest["step"] != step:
                raise ValueError("its content does not match its sha256 or the folder's name")
            return Checkpoint(path=path, **manifest | {"tokenizer": base64.b64decode(manifest["tokenizer"])})

    def _tidy(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(f"*{_DEBRIS}*"):
            path.rmtree()
        self.set_aside(old for old in self.steps() if old >= step or old in self._damage)

    def _prune(self) -> None:
        steps = self.steps()
        for step in set(steps) - {*steps[-self.keep_newest :], self.best()}:
            path = self.folder / str(step)
            # A half-deleted folder must not look like a good checkpoint. Buckets rename by copying each object.
            if is_remote(path):
                (path / "_CHECKPOINT_METADATA").unlink(missing_ok=True)
            else:
                path = path.rename(self.folder / f"{step}{_DEBRIS}")
            path.rmtree()


@contextlib.contextmanager
def _failures_as(kind: type[Exception], message: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        # Orbax wraps everything, Ctrl-C included; lack of memory says nothing about the files.
        if isinstance(cause, MemoryError | jax.errors.JaxRuntimeError) or not isinstance(cause, Exception):
            raise cause from None
        raise kind(f"{message}: {type(cause).__name__}: {str(cause).split(' [tensorstore_spec')[0]}") from error


def _load(checkpoint: Checkpoint, like: Any) -> tuple[Any, Checkpoint]:
    wanted = _by_path(like)
    fields = {key.split("/")[0] for key in wanted}
    here = {key: _type(x) for key, x in wanted.items()}
    there = {key: text.split()[0] for key, text in checkpoint.arrays.items() if key.split("/")[0] in fields}
    for key in here | there:
        if here.get(key) != there.get(key):
            raise UserError(
                f"checkpoint {checkpoint.path} is of another config: array {key} is {there.get(key, 'absent')} there, "
                f"{here.get(key, 'absent')} in this run. Use the config stored in it, or start anew in another folder."
            )
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = {key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or local) for key, x in wanted.items()}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with _failures_as(_Damaged, "state"), context:
        arrays = ocp.load_checkpointables(checkpoint.path, {"state": abstract})["state"]
    for key, saved in checkpoint.arrays.items():
        if key in wanted and (loaded := _fingerprint(arrays.get(key))) != saved:
            raise _Damaged(f"array {key}: saved as {saved}, loaded as {loaded}")
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[key] for key in wanted]), checkpoint


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _type(x: Any) -> str:
    return f"{jnp.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"


def _sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _fingerprint(x: Any) -> str:
    if not isinstance(x, jax.Array):  # with damaged metadata Orbax returns an abstract array, or none
        return "nothing"
    # Fetched one at a time: many programs in flight, each with an all-reduce, deadlock on fake CPU devices.
    first, second = jax.device_get(_checksums(x))
    return f"{_type(x)} {first:08x}{second:08x}"


@jax.jit
def _checksums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two sums modulo 2^32 of every element's bits mixed with its global index: the same for every sharding.

    The mixing is a bijection of the bits at each index, so a single changed element always shows in both sums.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}").astype(jnp.uint32)
    index = jnp.uint32(0)
    for axis, size in enumerate(bits.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    first, second = (jnp.sum(_mix(bits ^ _mix(index ^ jnp.uint32(seed))), dtype=jnp.uint32) for seed in (1, 2))
    return first, second


def _mix(x: jax.Array) -> jax.Array:
    """Source: the 32-bit finaliser of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
