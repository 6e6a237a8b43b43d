"""How much memory a training state takes on each device, and the mesh on which it fits."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import jax
from jax.sharding import Mesh

from nanochat_jax import memory
from nanochat_jax.config import Architecture
from nanochat_jax.errors import UserError
from nanochat_jax.memory import in_words
from nanochat_jax.sharding import MeshConfig, make_mesh, split_tiles
from nanochat_jax.state import TrainState

STATE_SHARE = 0.6  # of a device's memory at most, where there is a choice: activations want the rest

LikeOn = Callable[[Mesh], TrainState]  # the abstract state, as it lies on a mesh


def training_bytes(like: TrainState) -> int:
    """Bytes on each device of parameters, moments, and gradients in float32."""
    return memory.state_bytes(like) + 4 * sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(like.params)
    )


def choose_mesh(
    wanted: MeshConfig,
    cfg: Architecture,
    rows: int,
    like_on: LikeOn,
    devices: Sequence[jax.Device] | None = None,
    limit: int | None = None,
) -> Mesh:
    """The mesh that is wanted; what is left open is chosen.

    tensor is as small as lets the rows divide, then fsdp as small as lets the state fit, and data all that are left: so
    little is said as possible, and what must be said often stays within a host or slice.

    Args:
        wanted: sizes, or -1.
        cfg: the architecture, whose heads tensor must divide.
        rows: of a step.
        like_on: see LikeOn.
        devices: default: all.
        limit: bytes that a device can hold; default: what it says.

    Raises:
        UserError: sizes that do not divide devices or heads, or a state that does not fit.
    """
    devices = jax.devices() if devices is None else devices
    limit = limit or memory.usable_bytes(jax.local_devices()[0])
    check_heads(cfg, max(1, wanted.tensor))
    if wanted.tensor == -1:
        splits = (size for size in divisors(len(devices)) if math.gcd(cfg.n_head, cfg.n_kv_head) % size == 0)
        left = (size for size in splits if rows % (len(devices) // size) == 0)
        wanted = replace(wanted, tensor=next(left, 1))
    if wanted.fsdp == -1:
        sizes = [*_by_fsdp(wanted, rows, like_on, devices)] or [(_largest_fsdp(wanted, len(devices)), 0)]
        fitting = (fsdp for fsdp, size in sizes if size <= STATE_SHARE * limit)
        wanted = replace(wanted, fsdp=next(fitting, sizes[-1][0]))
    mesh = make_mesh(wanted, devices)
    if (needed := training_bytes(like_on(mesh))) > limit:
        smaller = [(fsdp, size) for fsdp, size in _by_fsdp(replace(wanted, data=-1), rows, like_on, devices)]
        fits = next((f"mesh.fsdp {fsdp} needs {in_words(size)}" for fsdp, size in smaller if size <= limit), "")
        least = len(devices) * math.ceil(min([needed, *(size for _, size in smaller)]) / limit)
        raise UserError(
            f"memory: parameters, gradients and moments need {in_words(needed)} on each of {len(devices)} devices, "
            f"of which {in_words(limit)} are usable; "
            + (fits or f"{least} such devices could hold them, or take a smaller model")
        )
    return mesh


def check_heads(cfg: Architecture, tensor: int) -> None:
    """UserError if tensor would cut through heads."""
    if cfg.n_head % tensor or cfg.n_kv_head % tensor:
        possible = divisors(math.gcd(cfg.n_head, cfg.n_kv_head))
        raise UserError(
            f"mesh: tensor={tensor} does not divide {cfg.n_head} heads ({cfg.n_kv_head} of keys); possible are "
            f"{', '.join(map(str, possible))}, or another --model.depth or --model.head-dim"
        )


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _largest_fsdp(wanted: MeshConfig, devices: int) -> int:
    return max(1, devices // (max(1, wanted.tensor) * max(1, wanted.data)))


def _by_fsdp(
    wanted: MeshConfig, rows: int, like_on: LikeOn, devices: Sequence[jax.Device]
) -> Iterator[tuple[int, int]]:
    """Sizes of fsdp that are possible, smallest first, and the bytes that the state then needs; no TPU splits tiles."""
    for fsdp in divisors(_largest_fsdp(wanted, len(devices))):
        try:
            mesh = make_mesh(replace(wanted, fsdp=fsdp), devices)
        except UserError:
            continue
        like = like_on(mesh)
        if rows % (mesh.shape["data"] * fsdp) == 0 and not (devices[0].platform == "tpu" and split_tiles(like.params)):
            yield fsdp, training_bytes(like)
