"""The TPU's attention, interpreted on the CPU, against the reference; tests/test_preflight.py compiles it for TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nanochat_jax import attention, model, sharding, splash, state
from nanochat_jax.config import Horizon, ModelConfig, OptimConfig
from nanochat_jax.errors import UserError
from nanochat_jax.layers import Compute
from nanochat_jax.optim import make_optimizer
from nanochat_jax.sharding import MeshConfig
from train.stage import ComputeConfig

ROWS, T, HEADS = 8, 256, 4


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(splash, "LARGEST_BLOCK", 128)


def inputs(kv_heads: int, segments: int, length: int = T, rows: int = ROWS, head_dim: int = 32):
    """Queries, keys, values, the output's gradient, segment ids."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, out_grad = (jax.random.normal(key, (rows, length, HEADS, head_dim)) for key in keys[:2])
    k, v = (jax.random.normal(key, (rows, length, kv_heads, head_dim)) for key in keys[2:])
    ids = jnp.sort(jax.random.randint(jax.random.key(1), (rows, length), 0, segments)) if segments > 1 else None
    return q, k, v, out_grad, ids


def run(backend, window, q, k, v, out_grad, ids, dtype=jnp.float32):
    """The output and the gradients of queries, keys and values."""

    def weighted(q, k, v):
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        out = attention.attend(q, k, v, window=window, segment_ids_BT=ids, backend=backend)
        return jnp.sum(out.astype(jnp.float32) * out_grad), out

    gradients, out = jax.grad(weighted, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


run_jitted = jax.jit(run, static_argnames=("backend", "window", "dtype"))


def relative_errors(found, wanted) -> list[float]:
    """By the norms of the differences."""
    pairs = [[np.asarray(x, np.float64) for x in pair] for pair in zip(found, wanted, strict=True)]
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]


@pytest.mark.parametrize(
    ("window", "kv_heads", "segments", "head_dim"), [(1, 4, 1, 64), (128, 2, 1, 128), (T, 1, 1, 32), (100, 2, 5, 128)]
)
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 2e-6), (jnp.bfloat16, 6e-3)], ids=["float32", "bfloat16"])
def test_output_and_gradients_equal_the_reference(window, kv_heads, segments, head_dim, dtype, bound):
    everything = inputs(kv_heads, segments, rows=2, head_dim=head_dim)
    found = run_jitted("splash-interpreted", window, *everything, dtype=dtype)
    assert found[0].dtype == dtype
    assert max(relative_errors(found, run_jitted("xla", window, *everything))) < bound


@pytest.mark.parametrize("mesh_cfg", [MeshConfig(8, 1, 1), MeshConfig(2, 2, 2), MeshConfig(1, 2, 4)], ids=str)
def test_a_mesh_cuts_rows_and_heads(mesh_cfg):
    """And nothing is sent from device to device; two kv heads do not make four parts, so these stay whole."""
    mesh = sharding.make_mesh(mesh_cfg)
    q, k, v, out_grad, ids = inputs(kv_heads=2, segments=5)
    heads = "tensor" if mesh_cfg.tensor == 2 else None
    by_head, by_row = (NamedSharding(mesh, P(sharding.BATCH_AXES, *rest)) for rest in ([None, heads], []))
    placed = [*jax.device_put((q, k, v, out_grad), by_head), jax.device_put(ids, by_row)]
    with sharding.on(mesh):
        compiled = run_jitted.lower("splash-interpreted", 128, *placed).compile()
    if mesh_cfg.tensor != 4:
        assert not any(name in compiled.as_text() for name in ("all-gather", "all-reduce", "all-to-all", "permute"))
    found = compiled(*placed)
    assert found[0].sharding.is_equivalent_to(by_head, 4)
    assert max(relative_errors(found, run_jitted("xla", 128, q, k, v, out_grad, ids))) < 2e-6


def test_rows_that_do_not_divide_stay_whole():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    everything = inputs(kv_heads=2, segments=5, rows=2)
    placed = jax.device_put(everything, sharding.replicated(mesh))
    with sharding.on(mesh):
        found = run_jitted("splash-interpreted", 128, *placed)
    assert max(relative_errors(found, run_jitted("xla", 128, *everything))) < 2e-6


def test_within_a_shard_map_over_rows():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    everything = inputs(kv_heads=2, segments=5)

    @jax.jit
    def mapped(*arrays):
        def part(*arrays):
            return run("splash-interpreted", 128, *arrays)

        outside = jax.shard_map(
            part, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}, check_vma=False
        )
        return outside(*arrays)

    found = mapped(*jax.device_put(everything, NamedSharding(mesh, P("data"))))
    assert max(relative_errors(found, run_jitted("xla", 128, *everything))) < 2e-6


@pytest.mark.parametrize("length", [1, 200])
def test_lengths_that_are_no_multiple_of_128_go_through_xla(length):
    everything = inputs(kv_heads=2, segments=1, length=length, rows=2)
    both = [run_jitted(backend, 64, *everything) for backend in ("splash-interpreted", "xla")]
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_without_a_tpu_the_flag_is_refused():
    with pytest.raises(UserError, match="splash needs a TPU"):
        ComputeConfig(attention="splash").resolve()


def test_a_training_step_on_a_mesh():
    """The step knows its mesh; losses and gradient norms are those of plain XLA."""
    cfg = ModelConfig(sequence_len=128, vocab_size=64, n_layer=3, n_head=2, n_kv_head=2, n_embd=32)
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (8, 129), dtype=np.int32)
    batch = sharding.put_batch(mesh, {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}, accumulate=2)

    def train(backend: str) -> list[list[float]]:
        compute = Compute("float32", backend)
        tx = make_optimizer(cfg, Horizon(100, 1024, 102400, 0.3, 0.2), OptimConfig(warmup_steps=1), "float32")

        def init(key):
            fresh = model.init_params(key, cfg, compute)
            return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(key, x.shape), fresh)  # nothing stays at zero

        def loss(params, batch, key):
            nats_BT = model.token_nats(params, cfg, batch["tokens"], batch["targets"], compute=compute)
            return nats_BT.sum(), {"count": (batch["targets"] >= 0).sum()}

        like = state.abstract_state(init, tx, model.logical_axes(cfg), mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        now = jax.jit(lambda key: state.new_state(init(key), tx), out_shardings=shardings)(jax.random.key(0))
        step, metrics = state.make_train_step(loss, tx, like, seed=0), []
        for _ in range(3):
            now, measured = step(now, batch)
            metrics.append([float(measured.loss), float(measured.grad_norm)])
        return metrics

    np.testing.assert_allclose(train("splash-interpreted"), train("xla"), rtol=2e-5)
