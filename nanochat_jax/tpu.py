"""Cloud TPUs by name: what a chip can do, and descriptions of slices to compile for, without any TPU at hand."""

import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax._src.cloud_tpu_init import get_tpu_library_path
from jax.experimental import topologies

from nanochat_jax.errors import UserError
from nanochat_jax.metrics import PEAK_FLOPS


@dataclass(frozen=True)
class Chip:
    """One chip of a generation, as one JAX device."""

    kind: str  # jax's device_kind
    memory_gib: float  # that the compiler lets a program use
    clock_hz: float
    memory_bytes_per_second: float
    link_bytes_per_second: float  # of one link in one direction; two links for each dimension of the torus
    ring: int  # chips along a dimension from which on it is closed to a ring
    dollars_per_hour: float  # on demand, by Google's price list; varies by region and contract
    accelerator: str  # name of a slice in gcloud, of {chips} or {cores}
    known: tuple[str, ...]  # shapes of slices
    options: tuple[tuple[str, str], ...] = ()  # of libtpu, for one device a chip

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return next(peak for name, peak in PEAK_FLOPS if name in self.kind)


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
# Clocks: at these, the cycles that XLA estimates for large matrix products come to 90 to 97 % of the peak, but on v6e
# to 75 to 90 %. Memory and links: Google's data sheets.
CHIPS = {
    "v4": Chip(
        "TPU v4", 30.75, 1.05e9, 1.228e12, 45e9, 4, 3.22, "v4-{cores}", CUBES, (("chip_config_name", "megacore"),)
    ),
    "v5e": Chip("TPU v5 lite", 15.75, 1.5e9, 0.819e12, 45e9, 16, 1.20, "v5litepod-{chips}", FLAT),
    "v5p": Chip("TPU v5", 95.74, 1.75e9, 2.765e12, 90e9, 4, 4.20, "v5p-{cores}", CUBES),
    "v6e": Chip("TPU v6 lite", 31.25, 1.75e9, 1.638e12, 90e9, 16, 2.70, "v6e-{chips}", FLAT),
}


@dataclass(frozen=True)
class Slice:
    """One or more slices of one shape."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    devices: Sequence[jax.Device]

    @property
    def accelerator(self) -> str:
        """What gcloud calls one of the slices."""
        chips = math.prod(self.shape)
        return self.chip.accelerator.format(chips=chips, cores=2 * chips)

    def link_bytes_per_second(self, group: Sequence[jax.Device]) -> float:
        """What a device can send while a group of devices gathers or reduces, over rings along its dimensions."""
        coordinates = [getattr(device, "coords") for device in group]  # noqa: B009 (unknown to jax's stubs)
        extents = [len({place[i] for place in coordinates}) for i in range(len(self.shape))]
        links = [
            2 if extent == size and size >= self.chip.ring else 1
            for extent, size in zip(extents, self.shape, strict=True)
            if extent > 1
        ]
        return self.chip.link_bytes_per_second * max(sum(links), 1)


def known_topologies() -> str:
    return "; ".join(f"{name}: {', '.join(chip.known)}" for name, chip in CHIPS.items())


def describe(topology: str, slices: int = 1) -> Slice:
    """The devices of slices that need not exist, to compile for.

    Args:
        topology: generation and shape, such as "v5p:4x4x4".
        slices: how many of them.

    Raises:
        UserError: the topology is unknown, or libtpu is not installed.
    """
    generation, _, shape = topology.partition(":")
    chip = CHIPS.get(generation)
    dimensions = 3 if chip is not None and chip.known is CUBES else 2
    if chip is None or not re.fullmatch("x".join([r"[1-9]\d*"] * dimensions), shape):
        raise UserError(f"topology: {topology!r} is not known; known are {known_topologies()}")
    if slices < 1:
        raise UserError(f"slices: {slices} must be at least 1")
    options: dict[str, Any] = dict(chip.options)
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    if slices > 1:
        options["num_slices"] = slices
    _prepare_environment()
    if get_tpu_library_path() is None:
        raise UserError(
            "compiling for TPUs needs libtpu, a download of 0.7 GB: bash train/setup.sh --preflight, "
            "or pip install -r requirements-tpu.txt"
        )
    try:
        devices = topologies.get_topology_desc(topology_name=topology, platform="tpu", **options).devices
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"topology: {topology!r} does not exist ({reason}); known are {known_topologies()}") from error
    return Slice(topology, chip, tuple(int(size) for size in shape.split("x")), devices)


def _prepare_environment() -> None:
    """Find libtpu, which must not look for chips, for a metadata server, or for another process that uses it."""
    beside = Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"  # where train/setup.sh puts it
    if beside.exists():
        os.environ.setdefault("TPU_LIBRARY_PATH", str(beside))
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
    }.items():
        os.environ.setdefault(name, value)
