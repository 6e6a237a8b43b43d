"""How many rows of a step a device computes at a time: as many as fit. Results depend on it by rounding alone."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanochat_jax import memory, sharding
from nanochat_jax.config import Architecture
from nanochat_jax.data.batches import Batch
from nanochat_jax.errors import UserError
from nanochat_jax.layers import Compute
from nanochat_jax.memory import in_words

log = logging.getLogger(__name__)

MicroBatch = int | Literal["auto"]
ENOUGH_TOKENS = 2**16  # in a micro-batch: more of them are not faster


def divisors(rows_per_step: int, mesh: Mesh) -> list[int]:
    """Rows that each device can compute at a time, in rising order; UserError if the devices cannot share the step."""
    parts = sharding.batch_devices(mesh)
    if rows_per_step % parts:
        raise UserError(f"batch: {rows_per_step} rows a step do not divide by {parts} data-parallel devices")
    share = rows_per_step // parts
    return [size for size in range(1, share + 1) if share % size == 0]


def micro_rows(rows_per_step: int, micro_batch: MicroBatch, mesh: Mesh, most: int = 32) -> int:
    """Rows that each device computes at a time; for auto the largest divisor up to `most`, whether it fits or not.

    Raises:
        UserError: if rows, devices and micro-batch do not divide.
    """
    sizes = divisors(rows_per_step, mesh)
    if micro_batch == "auto":
        return max(size for size in sizes if size <= most)
    if micro_batch not in sizes:
        raise UserError(
            f"batch: {sizes[-1]} rows a device and step do not divide by micro-batch={micro_batch}; "
            f"{rows_per_step} rows a step over {sharding.batch_devices(mesh)} devices"
        )
    return micro_batch


@dataclass(frozen=True)
class Sized:
    """A train step of a size that its device can hold, as far as that is known beforehand."""

    rows: int  # that each device computes at a time
    step: Callable[..., Any]
    advice: str  # for when memory runs out all the same


def unsized(train_step: jax.stages.Wrapped, rows: int) -> Sized:
    """A step whose batches differ in shape, so that nothing is known beforehand."""
    return Sized(rows, train_step, f"try a smaller --run.micro-batch than {rows}" if rows > 1 else SPREAD)


SPREAD = "spread the model over more devices (--run.mesh.fsdp), or take a smaller one or shorter rows"


def size_step(
    train_step: jax.stages.Wrapped,
    like: Any,
    row: Batch,
    rows_per_step: int,
    micro_batch: MicroBatch,
    mesh: Mesh,
    *,
    model: tuple[Architecture, Compute],
    memory_gib: float | None = None,
) -> Sized:
    """Compile a train step, with the largest micro-batch that fits, or with the given one and a warning if it does not.

    Args:
        train_step: as state.make_train_step gives.
        like: shapes, dtypes and shardings of its state.
        row: one row of its batches, for the shapes.
        rows_per_step: of all devices.
        micro_batch: rows that each device computes at a time, or auto.
        mesh: what it runs on.
        model: architecture and compute.
        memory_gib: of each device to plan for; default: what is usable of it.

    Raises:
        UserError: if not even one row fits.
    """
    device, tokens = mesh.local_devices[0], row["tokens"].size
    limit = memory.usable_bytes(device) if memory_gib is None else memory_gib * 2**30
    gradients = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(like.params))
    fixed = memory.state_bytes(like) + 8 * float(gradients)  # and their updates, in float32
    per_row = memory.activation_bytes(*model, tokens)
    sizes, parts = divisors(rows_per_step, mesh), sharding.batch_devices(mesh)
    compiled: dict[int, jax.stages.Compiled] = {}
    where, has = f"{device.device_kind}, of which {in_words(limit)} are usable", f"rows of {tokens:,} tokens at a time"
    cut = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH_AXES))

    def needed(rows: int) -> float:
        shapes = {
            name: jax.ShapeDtypeStruct((sizes[-1] // rows, rows * parts, *x.shape), x.dtype, sharding=cut)
            for name, x in row.items()
        }
        try:
            compiled[rows] = train_step.lower(like, shapes).compile()
        except jax.errors.JaxRuntimeError as error:
            if memory.is_exhausted(error):
                return math.inf
            raise
        return memory.program_bytes(compiled[rows])

    def smaller(rows: int, needs: float) -> str:
        """What to propose in place of so many rows, which need so much."""
        fit = [size for size in sizes if size < rows and fixed + size * (needs - fixed) / rows <= limit]
        return f"--run.micro-batch {max(fit)} should fit" if fit else SPREAD

    if micro_batch == "auto":
        candidates = [size for size in sizes if size * tokens <= ENOUGH_TOKENS] or sizes[:1]
        rows = memory.largest_fitting(candidates, needed, limit, fixed, per_row) or 0
        if not rows:
            raise UserError(f"not even one row of {tokens:,} tokens at a time fits {where}: {SPREAD}")
        needs: float = memory.program_bytes(compiled[rows])
    else:
        rows = micro_batch
        needs = needed(rows)
        if math.isinf(needs):
            raise UserError(f"{rows} {has} do not fit {where}: {smaller(rows, fixed + rows * per_row)}")
        if needs > limit:
            log.warning("%d %s need %s of %s: %s", rows, has, in_words(needs), where, smaller(rows, needs))
    print(f"memory: {rows} {has} need {in_words(needs)} of {where}; {sizes[-1] // rows} micro-batches a step")
    advice = (
        f"{rows} {has} were to need {in_words(needs)} of {where}; is it in use by others? {smaller(rows, 1.1 * limit)}"
    )
    return Sized(rows, compiled[rows], advice)
