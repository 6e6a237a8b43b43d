import jax
import numpy as np
import pytest
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
    np.testing.assert_array_equal(micro, rows.reshape(2, 8, 3))
    assert micro.addressable_shards[0].data.shape == (2, 1, 3)


def test_axes_that_do_not_divide_stay_whole():
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=8))
    axes = {"a": P("embed", "mlp")}
    shapes = {"a": jax.ShapeDtypeStruct((12, 8), np.float32)}
    assert sharding.param_shardings(mesh, axes, shapes)["a"].spec == P(None, "tensor")
