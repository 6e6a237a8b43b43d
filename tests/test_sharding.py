import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax import sharding
from nanochat_jax.errors import UserError


def test_data_takes_the_devices_that_are_left():
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.batch_devices(mesh) == 4


@pytest.mark.parametrize("shape", [(3, 1, 1), (-1, 3, 1), (2, 2, 4), (-1, 16, 1)])
def test_a_mesh_that_does_not_use_all_devices_is_refused(shape):
    with pytest.raises(UserError, match="does not use 8 devices"):
        sharding.make_mesh(sharding.MeshConfig(*shape))


def test_batches_are_cut_by_row_and_micro_batch():
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4))
    rows = np.arange(16 * 3).reshape(16, 3)
    whole = sharding.put_batch(mesh, {"x": rows})["x"]
    np.testing.assert_array_equal(whole, rows)
    assert whole.addressable_shards[0].data.shape == (2, 3)
    micro = sharding.put_batch(mesh, {"x": rows}, accumulate=2)["x"]
    np.testing.assert_array_equal(micro, rows.reshape(8, 2, 3).swapaxes(0, 1))  # each device keeps its own rows
    assert micro.addressable_shards[0].data.shape == (2, 1, 3)


def test_axes_that_do_not_divide_stay_whole():
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=8))
    axes = {"a": P("embed", "mlp")}
    shapes = {"a": jax.ShapeDtypeStruct((12, 8), np.float32)}
    assert sharding.param_shardings(mesh, axes, shapes)["a"].spec == P(None, None)  # and small ones stay whole
    shapes = {"a": jax.ShapeDtypeStruct((12, 128), np.float32)}
    assert sharding.param_shardings(mesh, axes, shapes)["a"].spec == P(None, "fsdp")


def test_cuts_prefer_whole_tiles_and_the_first_axis():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4))

    def cut(*shape, axis="fsdp", at=None):
        at = at or P(*[None] * len(shape))
        return sharding.cut(NamedSharding(mesh, at), shape, axis).spec

    assert cut(256, 256) == P("fsdp", None)
    assert cut(24, 512) == P(None, "fsdp")  # 6 rows are no tile, 128 lanes are
    assert cut(24, 256) == P("fsdp", None)  # neither is one
    assert cut(256, 256, axis="data", at=P("fsdp", None)) == P(("fsdp", "data"), None)
    assert cut(4096) == P(None)  # vectors are small
    tensor = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    along = sharding.cut(NamedSharding(tensor, P("tensor", None)), (256, 24), "fsdp")
    assert along.spec == P("tensor", "fsdp")  # not along what tensor cuts, tiles or not


def test_tiles_that_fsdp_splits_are_found():
    mesh = AbstractMesh((1, 64, 1), sharding.AXES)
    shapes = {"q": (1536, 1536), "fc": (1536, 6144), "wte": (32768, 1536), "gate": (12, 12)}
    whole = NamedSharding(mesh, P(None, None))
    copies = NamedSharding(AbstractMesh((64, 1, 1), sharding.AXES), P(None, None))
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.cut(whole, shape, "fsdp"))
        for name, shape in shapes.items()
    }
    split = ["fc (1536, 6144)", "q (1536, 1536)"]  # 24 rows; 96 columns would not do
    assert sharding.split_tiles(params) == split
    moments = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.cut(copies, shape, "data"))
        for name, shape in shapes.items()
    }
    assert sharding.split_tiles(moments) == split


@pytest.mark.parametrize(
    "spec", [P("fsdp", "tensor"), P("tensor", ("fsdp", "data")), P(("fsdp", "data"), None), P(None, None)]
)
@pytest.mark.parametrize("count", [3, 12])
def test_each_matrix_of_a_stack_is_whole_on_one_device(spec, count):
    mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2))
    at = NamedSharding(mesh, spec)
    rng = np.random.default_rng(0)
    matrices = rng.normal(size=(count, 8, 16)).astype(np.float32)
    factors = np.arange(1, count + 1, dtype=np.float32)[:, None, None]
    seen = []

    def function(stack_SIO, factors_S11):
        seen.append((stack_SIO.shape, factors_S11.shape))
        return jnp.cumsum(stack_SIO, axis=1) * factors_S11, (factors_S11 + 1, -factors_S11)  # needs whole columns

    def run(matrices, factors):
        stack = jnp.stack([jax.lax.with_sharding_constraint(matrix, at) for matrix in matrices])
        return sharding.on_whole_matrices(function, stack, factors, at)

    found, (others, negated) = jax.jit(run)(matrices, factors)
    np.testing.assert_allclose(found, np.cumsum(matrices, axis=1) * factors, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(others, factors + 1)
    np.testing.assert_array_equal(negated, -factors)
    per_device = -(-count // 8)
    assert seen == [((per_device, 8, 16), (per_device, 1, 1))]


@dataclass(frozen=True)
class Chip:
    """What a device says of where it is."""

    id: int
    slice_index: int
    process_index: int
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"


def pod(slices: int) -> list[Chip]:
    """Slices of 2×2×2 chips, 4 to a host."""
    places = list(itertools.product(range(2), repeat=3))
    return [Chip(8 * s + i, s, 2 * s + i // 4, place) for s in range(slices) for i, place in enumerate(places)]


def gpus(hosts: int) -> list[Chip]:
    return [Chip(i, i // 8, i // 8, platform="gpu", device_kind="NVIDIA H100") for i in range(8 * hosts)]


@pytest.mark.parametrize("devices", [pod(4), gpus(4)], ids=["tpu", "gpu"])
@pytest.mark.parametrize(
    ("shape", "along_data", "along_fsdp"),
    [
        ((4, 8, 1), 4, 1),
        ((8, 2, 2), 4, 1),
        ((4, 1, 8), 4, 1),
        ((2, 16, 1), 2, 2),
        ((1, 32, 1), 1, 4),
        ((2, 8, 2), 2, 2),
    ],
)
def test_slow_links_lie_along_data_and_only_then_fsdp(devices, shape, along_data, along_fsdp):
    found = sharding.arrange(devices, shape)
    assert found.shape == shape and {device.id for device in found.flat} == set(range(32))
    slice_of = np.vectorize(lambda device: device.slice_index)(found)
    data, fsdp, _ = shape
    blocks = slice_of.reshape(along_data, data // along_data, along_fsdp, fsdp // along_fsdp, -1)
    for i, k in itertools.product(range(along_data), range(along_fsdp)):
        assert len(set(blocks[i, :, k].flat)) == 1  # a block of the mesh is a slice


def test_tensor_over_slow_links_is_refused():
    with pytest.raises(UserError, match=r"4 slices or hosts do not divide data×fsdp = 1×2: tensor=16"):
        sharding.arrange(pod(4), (1, 2, 16))


def test_a_host_has_one_part_of_the_rows(monkeypatch):
    """Chips of one host that lie apart along the batch are refused; hosts apart along tensor share their rows."""
    shares = {}
    for name, order in {"rows": (0, 1, 2), "tensor": (2, 1, 0)}.items():
        devices = sharding.arrange(pod(1), (1, 4, 2))
        by_id = np.array(sorted(devices.flat, key=lambda device: device.id)).reshape(2, 2, 2).transpose(order)
        mesh = SimpleNamespace(devices=by_id.reshape(1, 4, 2), shape={"data": 1, "fsdp": 4, "tensor": 2})
        for process in range(2):
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            shares[name, process] = sharding.host_share(mesh)
    assert [shares["rows", process] for process in range(2)] == [(0, 2), (1, 2)]
    assert [shares["tensor", process] for process in range(2)] == [(0, 1), (0, 1)]
