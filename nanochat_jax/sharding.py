"""One mesh, and where every array lies on it.

The mesh has three axes. `data` holds copies of the parameters and cuts the batch and the optimizer's moments; `fsdp`
cuts the batch and everything else; `tensor` cuts heads, MLP channels and vocabulary. Parameters name their axes
(layers.param), RULES say which of them `tensor` cuts, and `cut` finds the place for the other two.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nanochat_jax.errors import UserError

RULES = {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
SMALLEST_CUT = 1024  # elements; what is smaller stays whole
ROW_TILE, LANE_TILE = 16, 128  # of a TPU's memory in bfloat16: other shards are padded, and collectives of them slow


@dataclass(frozen=True)
class MeshConfig:
    """How many devices share each kind of work; -1 is chosen from the model's size, the devices and their memory."""

    data: int = -1
    """Devices that hold copies of the parameters and share the batch; the optimizer's moments are cut over them."""
    fsdp: int = -1
    """Devices that cut parameters, gradients and moments among themselves, and share the batch too: saves memory."""
    tensor: int = -1
    """Devices that cut heads, MLP channels and vocabulary among themselves, for the same rows."""


def make_mesh(cfg: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices; what the config leaves open goes to data.

    Raises:
        UserError: if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if any(size < 1 and size != -1 for size in (cfg.data, cfg.fsdp, cfg.tensor)):
        raise UserError(f"mesh: data={cfg.data}, fsdp={cfg.fsdp}, tensor={cfg.tensor} must be positive, or -1")
    fsdp, tensor = (1 if size == -1 else size for size in (cfg.fsdp, cfg.tensor))
    data = len(devices) // (fsdp * tensor) if cfg.data == -1 else cfg.data
    if data * fsdp * tensor != len(devices):
        raise UserError(f"mesh: data×fsdp×tensor = {data}×{fsdp}×{tensor} does not use {len(devices)} devices")
    return Mesh(arrange(devices, (data, fsdp, tensor)), AXES, axis_types=(AxisType.Auto,) * 3)


def arrange(devices: Sequence[jax.Device], shape: tuple[int, int, int]) -> np.ndarray:
    """Devices as (data, fsdp, tensor): fast links inside, slices (or hosts of GPUs) along data, if need be fsdp.

    Raises:
        UserError: if an axis would have to mix fast and slow links.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    along_data = math.gcd(shape[0], slices)
    along_fsdp = slices // along_data
    if slices == 1 or devices[0].platform == "cpu":
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[1] % along_fsdp:
        raise UserError(
            f"mesh: {slices} slices or hosts do not divide data×fsdp = {shape[0]}×{shape[1]}: tensor={shape[2]} would "
            "have to span the slow links between them"
        )
    inside = (shape[0] // along_data, shape[1] // along_fsdp, shape[2])
    return mesh_utils.create_hybrid_device_mesh(
        inside, (along_data, along_fsdp, 1), devices, allow_split_physical_axes=True
    )


def on(mesh: Mesh) -> AbstractContextManager[Any]:
    """A context whose computations lie on this mesh: for kernels, which the compiler cannot cut over devices itself."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def where(arrays: Any) -> AbstractContextManager[Any]:
    """The context of `on` for the mesh that a tree of arrays lies on; none for what lies on no mesh."""
    places = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(arrays))
    meshes = (cast(Mesh, place.mesh) for place in places if isinstance(place, NamedSharding))
    return next(map(on, meshes), nullcontext())


def batch_devices(mesh: Mesh) -> int:
    """Number of parts that a batch is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def axes_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes in an entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def cut(at: NamedSharding, shape: tuple[int, ...], axis: str) -> NamedSharding:
    """Cut a matrix over one more mesh axis, where it divides; what is small, or has no place for it, stays as it is.

    Along an axis that `tensor` cuts there is no place: parts would not follow each other in memory.
    """
    mesh, spec = at.mesh, [*at.spec, *[None] * (len(shape) - len(at.spec))]
    if len(shape) < 2 or math.prod(shape) < SMALLEST_CUT or mesh.shape[axis] == 1:
        return at

    def cuts(i: int) -> int:
        return math.prod(mesh.shape[name] for name in (*axes_of(spec[i]), axis))

    def fits(i: int) -> bool:
        return shape[i] % cuts(i) == 0 and "tensor" not in axes_of(spec[i])

    places = [i for i in range(len(shape)) if fits(i)]
    if not places:
        return at
    place = max(places, key=lambda i: (_is_whole_tiles(shape, i, cuts(i)), -i))
    spec[place] = (*axes_of(spec[place]), axis) if spec[place] else axis
    return NamedSharding(at.mesh, PartitionSpec(*spec))


def _is_whole_tiles(shape: tuple[int, ...], axis: int, cuts: int) -> bool:
    return shape[axis] // cuts % (LANE_TILE if axis == len(shape) - 1 else ROW_TILE) == 0


def split_tiles(params: Any) -> list[str]:
    """Arrays (with shardings) that devices cut through tiles: a TPU's compiler adds up whole ones to gather them."""
    return [
        f"{'/'.join(_names(path))} {like.shape}"
        for path, like in jax.tree_util.tree_leaves_with_path(params)
        for axis, entry in enumerate(like.sharding.spec)
        if {"data", "fsdp"} & {*axes_of(entry)}
        and not _is_whole_tiles(like.shape, axis, math.prod(like.sharding.mesh.shape[name] for name in axes_of(entry)))
    ]


def param_shardings(mesh: Mesh, logical_axes: Any, shapes: Any) -> Any:
    """Sharding of each parameter: by RULES, and over fsdp; an axis that does not divide evenly stays whole."""

    def place(axes: PartitionSpec, like: jax.ShapeDtypeStruct) -> NamedSharding:
        names = [RULES.get(name) if name else None for name in axes]
        fits = [
            name if name and mesh.shape[name] > 1 and size % mesh.shape[name] == 0 else None
            for name, size in zip(names, like.shape, strict=True)
        ]
        return cut(NamedSharding(mesh, PartitionSpec(*fits)), like.shape, "fsdp")

    return jax.tree.map(place, logical_axes, shapes, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def moment_shardings(params: Any) -> Any:
    """Where moments, and gradients once they are summed, lie: as their parameters (with shardings), and over data."""
    return jax.tree.map(lambda like: cut(like.sharding, like.shape, "data"), params)


def state_shardings(mesh: Mesh, state: Any, logical_axes: Any) -> Any:
    """Shardings of a whole TrainState: what is shaped like a parameter, and stored under its path, is its moment.

    Args:
        mesh: the mesh.
        state: abstract TrainState (jax.eval_shape).
        logical_axes: model.logical_axes of its parameters.
    """
    params = param_shardings(mesh, logical_axes, state.params)
    by_path = {
        _names(path): (like.shape, cut(at, like.shape, "data"))
        for (path, at), like in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(state.params), strict=True
        )
    }

    def place(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> NamedSharding:
        names = _names(path)
        for start in range(len(names)):
            shape, at = by_path.get(names[start:], (None, replicated(mesh)))
            if shape == like.shape:
                return at
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)._replace(params=params)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", None)))) for key in path)


class HostShare(NamedTuple):
    """Which of how many equal parts of every batch this host's devices compute."""

    process_index: int
    process_count: int


def host_share(mesh: Mesh) -> HostShare:
    """This host's share of the rows; hosts that only `tensor` tells apart have the same.

    Raises:
        UserError: if the mesh scatters a host's devices over the batch.
    """
    parts = mesh.devices.reshape(batch_devices(mesh), -1)
    here = [i for i, row in enumerate(parts) if any(d.process_index == jax.process_index() for d in row)]
    if not here or here != list(range(here[0], here[0] + len(here))) or here[0] % len(here) or len(parts) % len(here):
        raise UserError(
            f"mesh: process {jax.process_index()} computes parts {here} of {len(parts)} of a batch: not one"
        )
    return HostShare(here[0] // len(here), len(parts) // len(here))


def host_rows(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """This host's rows of a batch that every host holds."""
    part, parts = host_share(mesh)
    return {name: np.split(rows, parts)[part] for name, rows in batch.items()}


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray], accumulate: int | None = None) -> dict[str, jax.Array]:
    """This host's rows of a batch → global arrays, rows cut over the mesh.

    Args:
        mesh: the mesh.
        batch: arrays (rows of this host, …).
        accumulate: cut each device's rows into that many micro-batches: (A, rows/A, …).
    """
    share = host_share(mesh)

    def put(rows: np.ndarray) -> jax.Array:
        spec = PartitionSpec(BATCH_AXES)
        if accumulate is not None:
            parts = batch_devices(mesh) // share.process_count
            rows = rows.reshape(parts, accumulate, -1, *rows.shape[1:]).swapaxes(0, 1)
            rows, spec = rows.reshape(accumulate, -1, *rows.shape[3:]), PartitionSpec(None, BATCH_AXES)
        axis = 0 if accumulate is None else 1
        shape = tuple(size * share.process_count if i == axis else size for i, size in enumerate(rows.shape))
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), rows, shape)

    return {name: put(rows) for name, rows in batch.items()}


def auto_axes() -> dict[str, int]:
    """Sizes of the axes along which the compiler cuts arrays, as no surrounding shard_map has; none if all are 1.

    Of the mesh of the context alone (see `on` and `where`): outside of one it sees no axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}
    return free if any(size > 1 for size in free.values()) else {}


def over_rows_and_heads(
    attend: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    of_rows: jax.Array | None,
) -> jax.Array:
    """Attention by a kernel, which the compiler cannot cut over devices by itself, on each device's rows and heads.

    Over the mesh of the context (see `on`): rows over its batch axes and heads over `tensor`, as far as they divide.
    What else it needs for each row, such as segment ids or a mask, is cut with the rows. Axes that a surrounding
    shard_map has cut already are left alone.
    """
    free = auto_axes()
    if not free:
        return attend(q_BTNH, k_BTKH, v_BTKH, of_rows)
    rows: tuple[str, ...] = ()
    parts = 1
    for name in BATCH_AXES:
        if name in free and q_BTNH.shape[0] % (parts * free[name]) == 0:
            rows, parts = (*rows, name), parts * free[name]
    heads = "tensor" if "tensor" in free and k_BTKH.shape[2] % free["tensor"] == 0 else None
    by_head, by_row = PartitionSpec(rows, None, heads), PartitionSpec(rows)
    cut = jax.shard_map(
        attend,
        in_specs=(by_head, by_head, by_head, by_row),
        out_specs=by_head,
        axis_names=set(free),
        check_vma=False,  # kernels do not say over which axes their results vary
    )
    return cut(q_BTNH, k_BTKH, v_BTKH, of_rows)


MatrixFunction = Callable[[jax.Array, jax.Array], tuple[jax.Array, tuple[jax.Array, ...]]]


def on_whole_matrices(
    function: MatrixFunction, stack_SIO: jax.Array, others_S: jax.Array, at: NamedSharding | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Apply a function to a stack of matrices, each whole on one device and no two devices on the same.

    Args:
        function: (matrices, something of each) → changed matrices, and things like the other; zeros must do no harm.
        stack_SIO: S matrices.
        others_S: something small of each.
        at: how each matrix lies, before and after; None where there is but one device.
    """
    if at is None or at.mesh.size == 1:
        return function(stack_SIO, others_S)
    cuts = [(axis, axes_of(entry)) for axis, entry in enumerate(at.spec, 1)]
    cuts = [(axis, axes) for axis, axes in cuts if math.prod(at.mesh.shape[name] for name in axes) > 1]
    cutting = tuple(name for _, axes in cuts for name in axes)
    copies = tuple(name for name in AXES if name not in cutting and at.mesh.shape[name] > 1)

    def exchange(stack_SIO: jax.Array, others_S: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        stack_SIO, others_S = _own_part(stack_SIO, copies), _own_part(others_S, copies + cutting)
        for axis, axes in cuts:
            stack_SIO = jax.lax.all_to_all(stack_SIO, axes, split_axis=0, concat_axis=axis, tiled=True)
        stack_SIO, found = function(stack_SIO, others_S)
        for axis, axes in reversed(cuts):
            stack_SIO = jax.lax.all_to_all(stack_SIO, axes, split_axis=axis, concat_axis=0, tiled=True)
        at_once = _all_parts(jnp.stack(found, axis=1), copies + cutting)
        return _all_parts(stack_SIO, copies), tuple(jnp.moveaxis(at_once, 1, 0))

    S, padding = stack_SIO.shape[0], -stack_SIO.shape[0] % at.mesh.size
    stack_SIO, others_S = (jnp.pad(x, ((0, padding), *[(0, 0)] * (x.ndim - 1))) for x in (stack_SIO, others_S))
    specs = PartitionSpec(None, *at.spec), PartitionSpec()
    spread = jax.shard_map(exchange, mesh=at.mesh, in_specs=specs, out_specs=specs, check_vma=False)
    stack_SIO, found = spread(stack_SIO, others_S)
    return stack_SIO[:S], tuple(x[:S] for x in found)


def _own_part(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Of what all devices along some axes hold, the part that this one is to work on."""
    size = x.shape[0] // math.prod(jax.lax.axis_size(name) for name in axes)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * size, size) if axes else x


def _all_parts(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.all_gather(x, axes, tiled=True) if axes else x
