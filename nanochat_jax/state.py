"""What training carries from step to step, and one step of it."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from nanochat_jax import sharding
from nanochat_jax.model import Params

Batch = dict[str, jax.Array]
# (params, micro-batch, PRNG key) → (summed loss, other sums: "count" of what is summed over, and what else to log)
LossFn = Callable[[Params, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class TrainState(NamedTuple):
    step: jax.Array  # int32, batches consumed
    params: Params
    opt_state: Any


class StepMetrics(NamedTuple):
    loss: jax.Array  # mean over the step's counted targets
    grad_norm: jax.Array
    update_norm: jax.Array  # of what is added to the parameters
    applied: jax.Array  # bool; False where the loss or a gradient was not finite and nothing was updated
    means: Mapping[str, Any] = MappingProxyType({})  # of whatever else the loss function sums


def abstract_state(
    init_params: Callable[[jax.Array], Params], tx: optax.GradientTransformation, logical_axes: Any, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of a TrainState, without making one."""
    state = jax.eval_shape(lambda key: new_state(init_params(key), tx), jax.random.key(0))
    shardings = sharding.state_shardings(mesh, state, logical_axes)
    return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), state, shardings)


def new_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """Step 0 with a fresh optimizer; jit it with out_shardings to make it where it belongs."""
    return TrainState(jnp.zeros([], jnp.int32), params, tx.init(params))


def make_train_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, like: TrainState, seed: int
) -> jax.stages.Wrapped:
    """The jitted train step: (state, batch of micro-batches (A, B, …)) → (state, StepMetrics).

    Gradients are summed over micro-batches and divided by the step's count once, so that accumulation
    equals one large batch also where targets are masked. A step that is not finite leaves parameters and optimizer
    as they were.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    in_float32 = partial(jax.tree.map, lambda x: x.astype(jnp.float32))
    mesh = jax.tree.leaves(like)[0].sharding.mesh

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        accumulate = next(iter(batch.values())).shape[0]

        def sums(index: jax.Array | int, micro: Batch) -> Any:
            with sharding.on(mesh):
                return grad_fn(state.params, micro, jax.random.fold_in(key, index))

        def accumulate_one(total: Any, item: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, sums(*item)), None

        if accumulate == 1:
            total = sums(0, jax.tree.map(lambda x: x[0], batch))
        else:  # in float32: bfloat16 would lose the small terms of a long sum
            one = jax.eval_shape(sums, 0, jax.tree.map(lambda x: x[0], batch))
            start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), one)
            total, _ = jax.lax.scan(accumulate_one, start, (jnp.arange(accumulate), batch))
        (loss_sum, others), grads = total
        count = jnp.maximum(others.pop("count"), 1).astype(jnp.float32)
        means = {name: value / count for name, value in others.items()}
        loss, grad_norm = loss_sum / count, optax.tree.norm(in_float32(grads)) / count
        applied = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def update() -> tuple[Params, Any, jax.Array]:
            mean_grads = jax.tree.map(lambda g: g / count, in_float32(grads))
            updates, opt_state = tx.update(mean_grads, state.opt_state, state.params)
            return optax.apply_updates(state.params, updates), opt_state, optax.tree.norm(in_float32(updates))

        # A branch, not a select: that would read and write everything once more.
        *kept, update_norm = jax.lax.cond(applied, update, lambda: (state.params, state.opt_state, jnp.float32(0)))
        return TrainState(state.step + 1, *kept), StepMetrics(loss, grad_norm, update_norm, applied, means)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(step, donate_argnums=0, in_shardings=(shardings, None), out_shardings=(shardings, None))
