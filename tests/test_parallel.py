"""Every kind of mesh trains as one device does, keeps what it should in pieces, and says no more than it must."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_state import Trainer, batch, largest_error

from nanochat_jax import gram, model, muon, optim, sharding, state
from nanochat_jax.config import Horizon, ModelConfig, OptimConfig, from_depth
from nanochat_jax.layers import Compute
from nanochat_jax.profile import Collective, collectives
from nanochat_jax.sharding import MeshConfig

CFG = ModelConfig(sequence_len=32, vocab_size=128, n_layer=3, n_head=4, n_kv_head=4, n_embd=64)
SHAPES = [(8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4)]
STEPS = 10
MATRICES = 4 * 3 + 2 * 3  # of the blocks
TABLES = 1 + 2  # wte and the value embeddings, which the way back needs not
CUT = MATRICES + TABLES + 1  # arrays that are large enough
WHOLE_STACKS = 1  # of gates, which are small


def loss_fn(params, micro, key):
    nats_BT = model.token_nats(params, CFG, micro["tokens"], micro["targets"], compute=Compute())
    return nats_BT.sum(), {"count": (micro["targets"] >= 0).sum()}


@dataclass
class Run:
    trainer: Trainer
    losses: list[float]
    after_one: state.TrainState
    said: list[Collective]


def train(shape: tuple[int, int, int], accumulate: int) -> Run:
    trainer = Trainer(MeshConfig(*shape), devices=math.prod(shape), loss=loss_fn, cfg=CFG)
    example = sharding.put_batch(trainer.mesh, batch(), accumulate)
    compiled = trainer.step.lower(trainer.state, example).compile()
    trainer.step = compiled  # and so an array that lies elsewhere is an error
    losses = trainer.train(1, accumulate)
    after_one = jax.device_get(trainer.state)
    losses += trainer.train(STEPS - 1, accumulate, start=1)
    return Run(trainer, losses, after_one, collectives(compiled.as_text()))


@pytest.fixture(scope="module")
def single() -> Run:
    return train((1, 1, 1), accumulate=1)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def run(request) -> Run:
    return train(request.param, accumulate=2)


def test_it_trains_like_one_device(run, single):
    """In float32, with two micro-batches against one large batch."""
    np.testing.assert_allclose(run.losses, single.losses, rtol=1e-5)
    assert largest_error(run.after_one, single.after_one) < 5e-5  # of all arrays; most are below 1e-6
    assert single.losses[-1] < single.losses[0] - 0.1


def test_every_array_stays_where_it_belongs(run):
    jax.tree.map(lambda leaf, like: leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim) or pytest.fail(str(like)),
                 run.trainer.state, run.trainer.like)  # fmt: skip


def test_devices_say_no_more_than_they_must(run):
    data, fsdp, tensor = run.trainer.mesh.devices.shape
    once = Counter(c.kind for c in run.said if c.calls == 1)
    repeated = Counter(c.kind for c in run.said if c.calls == 2)
    assert {c.calls for c in run.said} <= {1, 2}
    # For each micro-batch: parameters come, twice if the way back needs them, and gradients go.
    # Then tensor: after attention and MLP, there and back, the table, the loss (maximum, sum, target and back).
    assert repeated["all-gather"] == (2 * CUT - TABLES if fsdp > 1 else 0)
    assert repeated["reduce-scatter"] == (CUT if fsdp > 1 else 0)
    assert repeated["all-reduce"] <= (4 * CFG.n_layer + 5 if tensor > 1 else 0)
    assert repeated["all-to-all"] == repeated["collective-permute"] == 0
    # Once a step, over data: gradients are added up for the moments' parts, new parameters put together of them.
    assert once["reduce-scatter"] == (CUT if data > 1 else 0)
    blocks = {name: leaf for name, leaf in run.trainer.like.params.items() if name.startswith("block")}
    matrices = jax.tree.map(lambda at, like: (like.shape, at), sharding.moment_shardings(blocks), blocks)
    leaves = jax.tree.leaves(matrices, is_leaf=lambda leaf: isinstance(leaf, tuple))
    stacks = {(shape, at) for shape, at in leaves if shape != (CFG.padded_vocab_size, CFG.n_embd)}
    cut_axes = sum(sum(entry is not None for entry in at.spec) for _, at in stacks)
    assert once["all-gather"] == (CUT if data > 1 else 0) + WHOLE_STACKS + len(stacks)
    assert once["all-to-all"] == 2 * cut_axes  # gradients of whole matrices to one device each, and back
    assert once["collective-permute"] == 0
    # All that is not cut goes in a few sums, with loss and counts; and the gradients' norm.
    largest = max((c.bytes for c in run.said if c.kind == "all-reduce" and c.calls == 1), default=0)
    assert largest < 4 * sharding.SMALLEST_CUT


def test_eight_bit_products_are_those_of_one_device():
    """A tensor's scale is of all its parts; where a sum rounds over an 8-bit step, it shows."""

    def nats_and_gradients(shape):
        trainer = Trainer(MeshConfig(*shape), devices=math.prod(shape), cfg=CFG)
        micro = sharding.put_batch(trainer.mesh, batch())

        def total(params):
            how = Compute(fp8=True)
            return model.token_nats(params, CFG, micro["tokens"], micro["targets"], compute=how).sum()

        return jax.device_get(jax.jit(jax.value_and_grad(total))(trainer.state.params))

    (found, gradients), (wanted, wanted_gradients) = nats_and_gradients((2, 2, 2)), nats_and_gradients((1, 1, 1))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert largest_error(gradients, wanted_gradients) < 1e-2


@pytest.mark.parametrize("spec", [PartitionSpec("fsdp", "tensor"), PartitionSpec(("fsdp", "data"), None)])
def test_orthogonalized_by_the_kernel_on_a_mesh_as_on_one_device(spec, monkeypatch):
    """Each of six matrices whole on one of eight devices: bitwise the same."""
    kernel = partial(gram.blockwise, interpret=True)
    monkeypatch.setattr(
        muon, "gram", lambda x, c=None, of_columns=False: kernel(x, polynomial=c, of_columns=of_columns)
    )
    at = NamedSharding(sharding.make_mesh(MeshConfig(2, 2, 2)), spec)
    stack_SIO = jax.random.normal(jax.random.key(0), (6, 128, 256), jnp.bfloat16)

    def function(part_SIO, others_S):
        return muon.orthogonalize(part_SIO), (others_S,)

    found = jax.jit(lambda x: sharding.on_whole_matrices(function, x, jnp.zeros(6), at)[0])(stack_SIO)
    alone = jax.jit(muon.orthogonalize)
    for i in range(6):
        np.testing.assert_array_equal(found[i : i + 1], alone(stack_SIO[i : i + 1]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("depth", [12, 24])
def test_nothing_large_is_kept_whole(shape, depth):
    cfg, compute = from_depth(depth), Compute("bfloat16")
    mesh = sharding.make_mesh(MeshConfig(*shape))
    tx = optim.make_optimizer(cfg, Horizon(100, 2**19, 2**19 * 100, 1.0, 0.1), OptimConfig(), compute.dtype)
    like = state.abstract_state(lambda key: model.init_params(key, cfg, compute), tx, model.logical_axes(cfg), mesh)

    def parts(leaf) -> int:
        return math.prod(leaf.shape) // math.prod(leaf.sharding.shard_shape(leaf.shape))

    for tree, wanted in ((like.params, mesh.size // mesh.shape["data"]), (like.opt_state, mesh.size)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if math.prod(leaf.shape) * leaf.dtype.itemsize > 2**20:
                assert parts(leaf) == wanted, (jax.tree_util.keystr(path), leaf)
