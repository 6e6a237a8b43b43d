"""One mesh, and where every array lies on it.

Parameters name their axes (layers.param); RULES say which mesh axis cuts which name; the optimizer's moments lie
as their parameters do; batches are cut over data and fsdp. jax.jit does the rest.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nanochat_jax.errors import UserError

RULES = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
    "value_vocab": "fsdp",
}
BATCH_AXES = ("data", "fsdp")


@dataclass(frozen=True)
class MeshConfig:
    """How many devices share each kind of work; -1 for data means all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(cfg: MeshConfig = MeshConfig(), devices: list[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices.

    Raises:
        UserError: if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if cfg.fsdp < 1 or cfg.tensor < 1 or (cfg.data < 1 and cfg.data != -1):
        raise UserError(
            f"mesh: data={cfg.data}, fsdp={cfg.fsdp}, tensor={cfg.tensor} must be positive (data may be -1)"
        )
    data = len(devices) // (cfg.fsdp * cfg.tensor) if cfg.data == -1 else cfg.data
    shape = (data, cfg.fsdp, cfg.tensor)
    if min(shape) < 1 or np.prod(shape) != len(devices):
        raise UserError(f"mesh: data×fsdp×tensor = {data}×{cfg.fsdp}×{cfg.tensor} does not use {len(devices)} devices")
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def on(mesh: Mesh) -> AbstractContextManager[Any]:
    """A context whose computations lie on this mesh: for kernels, which the compiler cannot cut over devices itself."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def batch_devices(mesh: Mesh) -> int:
    """Number of parts that a batch is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(mesh: Mesh, logical_axes: Any, shapes: Any) -> Any:
    """Sharding of each parameter by RULES; an axis that does not divide evenly stays whole."""

    def place(axes: PartitionSpec, like: jax.ShapeDtypeStruct) -> NamedSharding:
        names = [RULES.get(name) if name else None for name in axes]
        fits = [
            name if name and size % mesh.shape[name] == 0 else None
            for name, size in zip(names, like.shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree.map(place, logical_axes, shapes, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def state_shardings(mesh: Mesh, state: Any, logical_axes: Any) -> Any:
    """Shardings of a whole TrainState: whatever is shaped like a parameter, and stored under its path, lies like it.

    Args:
        mesh: the mesh.
        state: abstract TrainState (jax.eval_shape).
        logical_axes: model.logical_axes of its parameters.
    """
    params = param_shardings(mesh, logical_axes, state.params)
    by_path = {
        _names(path): (like.shape, sharding)
        for (path, sharding), like in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(state.params), strict=True
        )
    }

    def place(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> NamedSharding:
        names = _names(path)
        for start in range(len(names)):
            shape, sharding = by_path.get(names[start:], (None, None))
            if shape == like.shape:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", None)))) for key in path)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray], accumulate: int | None = None) -> dict[str, jax.Array]:
    """This host's rows of a batch → global arrays, rows cut over the mesh.

    Args:
        mesh: the mesh.
        batch: arrays (rows of this host, …).
        accumulate: cut the rows into that many micro-batches first: (A, rows/A, …).
    """

    def put(rows: np.ndarray) -> jax.Array:
        if accumulate is None:
            return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec(BATCH_AXES)), rows)
        micro = rows.reshape(accumulate, -1, *rows.shape[1:])
        return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec(None, BATCH_AXES)), micro)

    return {name: put(rows) for name, rows in batch.items()}
