import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from nanochat_jax import model, optim, sharding, state
from nanochat_jax.config import Horizon, ModelConfig, OptimConfig
from nanochat_jax.layers import Compute

CFG = ModelConfig(sequence_len=32, vocab_size=64, n_layer=3, n_head=2, n_kv_head=2, n_embd=32)
COMPUTE = Compute()
ROWS = 16


def loss_fn(params, batch, key):
    nats_BT = model.token_nats(params, CFG, batch["tokens"], batch["targets"], compute=COMPUTE)
    return nats_BT.sum(), {"count": (batch["targets"] >= 0).sum()}


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CFG.vocab_size, (ROWS, CFG.sequence_len + 1), dtype=np.int32)
    targets = np.where(rng.random((ROWS, CFG.sequence_len)) < 0.5, tokens[:, 1:], -1)
    targets[:5] = -1  # whole rows, and so whole micro-batches, that do not count
    return {"tokens": tokens[:, :-1], "targets": targets}


class Trainer:
    """A train step and a fresh state on a mesh."""

    def __init__(self, mesh_cfg: sharding.MeshConfig, devices: int = 8, loss=loss_fn, cfg: ModelConfig = CFG) -> None:
        self.mesh = sharding.make_mesh(mesh_cfg, jax.devices()[:devices])
        tx = optim.make_optimizer(cfg, Horizon(100, 512, 51200, 0.3, 0.2), OptimConfig(warmup_steps=1), "float32")

        def init(key):
            # Far from the zeros of a fresh model, where Adam would blow up the rounding of vanishing gradients.
            fresh = model.init_params(key, cfg, COMPUTE)
            return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(key, x.shape), fresh)

        self.like = state.abstract_state(init, tx, model.logical_axes(cfg), self.mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.like)
        self.state = jax.jit(lambda key: state.new_state(init(key), tx), out_shardings=shardings)(jax.random.key(0))
        self.step = state.make_train_step(loss, tx, self.like, seed=0)

    def train(self, steps: int, accumulate: int = 1, start: int = 0) -> list[float]:
        losses = []
        for seed in range(start, start + steps):
            self.state, metrics = self.step(self.state, sharding.put_batch(self.mesh, batch(seed), accumulate))
            losses.append(float(metrics.loss))
        return losses


def largest_error(found, wanted) -> float:
    """The largest relative error (in norm) of any array of a state."""

    def error(a, b) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-12))

    return max(jax.tree.leaves(jax.tree.map(error, found, wanted)))


@pytest.fixture(scope="module")
def single():
    """Losses of three steps on one device, and the state after the first."""
    trainer = Trainer(sharding.MeshConfig(), devices=1)
    first = trainer.train(1)
    after_one = jax.device_get(trainer.state)
    return first + trainer.train(2, start=1), after_one


def check_like_single(trainer: Trainer, single, accumulate: int = 1) -> None:
    losses, after_one = single
    found = trainer.train(1, accumulate)
    assert largest_error(trainer.state, after_one) < 2e-5
    np.testing.assert_allclose(found + trainer.train(2, accumulate, start=1), losses, rtol=1e-5)


def test_accumulation_equals_one_large_batch(single):
    check_like_single(Trainer(sharding.MeshConfig(), devices=1), single, accumulate=4)


def test_gradients_of_bfloat16_tables_are_summed_in_float32():
    def loss(params, batch, key):
        return (params["table"].astype(jnp.float32) * batch["x"]).sum(), {"count": jnp.int32(1)}

    tx = optax.sgd(1.0)
    params = {"table": jnp.zeros(4, jnp.bfloat16)}
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    like = state.abstract_state(lambda key: params, tx, {"table": P(None)}, mesh)
    small_terms = np.array([1.0] + [2**-9] * 16, np.float32)[:, None] * np.ones((1, 4), np.float32)
    after, metrics = state.make_train_step(loss, tx, like, seed=0)(
        state.new_state(params, tx), {"x": jnp.asarray(small_terms)}
    )
    # 1 + 16 × 2⁻⁹ over 17 micro-batches; in bfloat16 the sum would stay at 1
    np.testing.assert_allclose(float(metrics.grad_norm), 2 * 1.03125 / 17, rtol=1e-5)
    np.testing.assert_allclose(float(metrics.update_norm), float(metrics.grad_norm), rtol=4e-3)  # at rate 1
    np.testing.assert_allclose(np.asarray(after.params["table"], np.float32), -1.03125 / 17, rtol=4e-3)


def test_parameters_and_moments_are_cut_by_the_rules():
    trainer = Trainer(sharding.MeshConfig(1, 2, 4))
    params = trainer.state.params
    assert params["wte"].sharding.spec == P("tensor", "fsdp")
    assert params["block_0"]["mlp"]["fc"].sharding.spec == P("fsdp", "tensor")
    assert params["block_0"]["attn"]["proj"].sharding.spec == P("tensor", "fsdp")
    by_shape = {}
    for leaf in jax.tree.leaves(trainer.state.opt_state):
        by_shape.setdefault(leaf.shape, set()).add(leaf.sharding.is_fully_replicated)
    assert by_shape[params["wte"].shape] == {False}
    assert by_shape[params["block_0"]["mlp"]["fc"].shape] == {False}


def test_a_step_that_is_not_finite_changes_nothing_but_the_step():
    def poisoned(params, batch, key):
        total, count = loss_fn(params, batch, key)
        return total * jnp.where(jnp.any(batch["tokens"] == 63), jnp.nan, 1.0), count

    trainer = Trainer(sharding.MeshConfig(), devices=1, loss=poisoned)
    before = jax.device_get(trainer.state)
    bad = {name: np.full_like(array, 63) for name, array in batch().items()}
    after, metrics = trainer.step(trainer.state, sharding.put_batch(trainer.mesh, bad, 1))
    assert not metrics.applied and not np.isfinite(metrics.loss)
    assert int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, (before.params, before.opt_state), (after.params, after.opt_state))
    good = {name: np.minimum(array, 62) for name, array in batch().items()}
    after, metrics = trainer.step(after, sharding.put_batch(trainer.mesh, good, 1))
    assert metrics.applied and np.isfinite(metrics.loss)


def test_a_batch_without_targets_is_harmless():
    trainer = Trainer(sharding.MeshConfig(), devices=1)
    nothing = {"tokens": batch()["tokens"], "targets": np.full((ROWS, 32), -1, np.int32)}
    after, metrics = trainer.step(trainer.state, sharding.put_batch(trainer.mesh, nothing, 2))
    assert float(metrics.loss) == 0.0 and bool(metrics.applied)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
