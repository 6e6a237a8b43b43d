"""Which mesh fits a model, and what is said where none does."""

import re

import jax
import pytest

from nanochat_jax import model, optim, sharding, state
from nanochat_jax.capacity import STATE_SHARE, choose_mesh, training_bytes
from nanochat_jax.config import Horizon, OptimConfig, from_depth
from nanochat_jax.errors import UserError
from nanochat_jax.layers import Compute
from nanochat_jax.sharding import MeshConfig

CFG = from_depth(4)  # of 2 heads
ROWS = 16
AUTO = MeshConfig()


def like_on(mesh: jax.sharding.Mesh) -> state.TrainState:
    compute = Compute("bfloat16")
    tx = optim.make_optimizer(CFG, Horizon(100, 512, 51200, 1.0, 0.1), OptimConfig(), compute.dtype)
    return state.abstract_state(lambda key: model.init_params(key, CFG, compute), tx, model.logical_axes(CFG), mesh)


def needed(*shape: int) -> int:
    return training_bytes(like_on(sharding.make_mesh(MeshConfig(*shape))))


def chosen(limit: int, rows: int = ROWS, wanted: MeshConfig = AUTO) -> tuple[int, ...]:
    return choose_mesh(wanted, CFG, rows, like_on, limit=limit).devices.shape


def test_the_state_of_one_device_counts_every_array():
    like = like_on(sharding.make_mesh(devices=jax.devices()[:1]))
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like)]
    gradients = [4 * leaf.size for leaf in jax.tree.leaves(like.params)]
    found = training_bytes(like)
    assert found == pytest.approx(sum(sizes) + sum(gradients), rel=1e-3)


def test_fsdp_is_as_small_as_lets_the_state_fit():
    assert needed(8, 1, 1) > needed(4, 2, 1) > needed(2, 4, 1) > needed(1, 8, 1)
    for shape in ((8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1)):
        assert chosen(limit=int(needed(*shape) / STATE_SHARE) + 1) == shape
    assert chosen(limit=needed(1, 8, 1)) == (1, 8, 1)  # nothing is left, but it fits


def test_tensor_is_as_small_as_lets_the_rows_divide():
    assert chosen(limit=2**40, rows=8) == (8, 1, 1)
    assert chosen(limit=2**40, rows=4) == (4, 1, 2)
    assert chosen(limit=needed(4, 1, 2), rows=4)[1:] == (2, 2)


def test_what_is_asked_for_is_kept():
    assert chosen(limit=2**40, wanted=MeshConfig(fsdp=4)) == (2, 4, 1)
    assert chosen(limit=2**40, wanted=MeshConfig(data=2)) == (2, 4, 1)
    assert chosen(limit=2**40, wanted=MeshConfig(tensor=2)) == (4, 1, 2)
    with pytest.raises(UserError, match=r"tensor=4 does not divide 2 heads .* possible are 1, 2"):
        chosen(limit=2**40, wanted=MeshConfig(tensor=4))


def test_where_it_does_not_fit_what_would_is_said():
    between = (needed(4, 2, 1) + needed(8, 1, 1)) // 2
    with pytest.raises(UserError, match=r"need .* on each of 8 devices, of which .*; mesh.fsdp 2 needs"):
        chosen(limit=between, wanted=MeshConfig(8, 1, 1))
    with pytest.raises(UserError, match="take a smaller model") as error:
        chosen(limit=needed(1, 8, 1) // 3)
    found = re.search(r"(\d+) such devices could hold them", str(error.value))
    assert found and int(found[1]) == 32
