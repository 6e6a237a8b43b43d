"""How train.bench times things: medians over repeats of several calls each, after warming up."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from train.stage import ComputeConfig, at_least


@dataclass(frozen=True)
class Device:
    """What is measured on, and how often."""

    compute: ComputeConfig = field(default_factory=ComputeConfig)
    calls: int = 10
    """Calls in a repeat, dispatched one behind the other."""
    repeats: int = 3
    """The median of so many is given."""
    profile: Path | None = None
    """Folder for a trace, whose kernels are printed by time."""

    def __post_init__(self) -> None:
        at_least("device.calls", self.calls, 1)
        at_least("device.repeats", self.repeats, 1)


def seconds_per_call(call: Callable[[], Any], device: Device) -> float:
    """Median time of a call, dispatched ahead as in a loop."""
    jax.block_until_ready(call())
    measured = []
    for _ in range(device.repeats):
        start = time.perf_counter()
        for _ in range(device.calls):
            result = call()
        jax.block_until_ready(result)
        measured.append((time.perf_counter() - start) / device.calls)
    return statistics.median(measured)


def device_rates(dtype: str) -> tuple[float, float]:
    """FLOP/s of a large matrix product, and bytes/s of reading and writing, both measured here."""
    is_gpu = jax.default_backend() == "gpu"
    size = 8192 if is_gpu else 1024
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    big = jnp.zeros((2**28 if is_gpu else 2**24,), jnp.float32)
    product, copy, few = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1), Device(calls=5)
    product_seconds = seconds_per_call(lambda: product(x, x), few)
    return 2 * size**3 / product_seconds, 2 * big.nbytes / seconds_per_call(lambda: copy(big), few)
