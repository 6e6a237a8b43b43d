"""Does a training step fit a device's memory, and with how many rows at a time? Known before it runs.

A step is compiled for shapes alone, and XLA says what the program takes. Few compilations are needed: memory grows
linearly with the rows, and a formula gives the first guess.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from nanochat_jax.config import Architecture
from nanochat_jax.errors import UserError
from nanochat_jax.layers import Compute

USABLE = 0.93  # of a GPU's memory: what it holds besides, and what lies in pieces too small; a TPU's compiler is exact
USABLE_OF_HOST = 0.5  # of a CPU's, which others share
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def usable_bytes(device: jax.Device) -> int:
    """Bytes that a program may take on each device of its kind, on every host alike."""
    stats = device.memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        found = limit if device.platform == "tpu" else USABLE * limit
    else:
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        with contextlib.suppress(OSError, ValueError):  # there is no such limit
            host = min(host, int(CGROUP_LIMIT.read_text()))
        found = USABLE_OF_HOST * host / jax.local_device_count()
    if jax.process_count() > 1:  # all have to come to the same result
        found = float(np.min(multihost_utils.process_allgather(np.float32(found))))
    return int(found)


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that a compiled program takes on each device, its arguments and results included."""
    found: Any = compiled.memory_analysis()
    sizes = found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes
    return sum(sizes) - found.alias_size_in_bytes + found.generated_code_size_in_bytes


def is_exhausted(error: BaseException) -> bool:
    """Whether JAX ran out of memory, be it in compiling or in running."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def state_bytes(like: Any) -> int:
    """Bytes of each device's part of a state, given as shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))


def activation_bytes(cfg: Architecture, compute: Compute, tokens: int) -> int:
    """About what a row keeps for the backward pass; fitted to what XLA says of models of 3 to 24 layers."""
    width = jnp.dtype(compute.dtype).itemsize
    size = 20 * cfg.n_layer * cfg.n_embd * width + 2 * cfg.padded_vocab_size * width
    if compute.attention == "xla":  # keeps its scores, in float32
        size += sum(8 * cfg.n_head * min(spec.window + 256, tokens // 2 + 128) for spec in cfg.layer_specs())
    return tokens * size


def largest_fitting(
    sizes: list[int], needed: Callable[[int], float], limit: float, fixed: float, per_row: float
) -> int | None:
    """The largest size that fits, found by trying few.

    Memory is taken to grow linearly, so that most sizes need no trial to be left out; none is taken without one.

    Args:
        sizes: to choose from.
        needed: bytes that a size takes; costs a compilation.
        limit: bytes that there are.
        fixed: bytes that are taken however many rows there are, about.
        per_row: bytes of each row, about; replaced by what is found out.

    Returns:
        None if not even the smallest fits.
    """
    fits, too_many, known = 0, max(sizes) + 1, [(0, fixed)]
    while unknown := [size for size in sizes if fits < size < too_many]:
        promising = [size for size in unknown if known[-1][1] + (size - known[-1][0]) * per_row <= limit]
        if fits and not promising:
            break
        size = max(promising, default=min(unknown))
        found = needed(size)
        if math.isfinite(found):
            per_row = (found - known[-1][1]) / (size - known[-1][0])
            known.append((size, found))
        if found <= limit:
            fits = size
        else:
            too_many = size
    return fits or None


@contextlib.contextmanager
def explained(advice: str) -> Iterator[None]:
    """Turns running out of memory into a UserError that ends with the advice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_exhausted(error):
            raise
        raise UserError(f"the memory of {jax.devices()[0].device_kind} is exhausted; {advice}") from error


def in_words(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
