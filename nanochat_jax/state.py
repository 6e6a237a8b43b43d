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
from nanochat_jax.gradients import make_gradients
from nanochat_jax.model import Params

Batch = dict[str, jax.Array]
# (params, micro-batch, PRNG key) → (summed loss, other sums: "count" of what is summed over, and what else to log)
LossFn = Callable[[Params, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class TrainState(NamedTuple):
    """All that a step changes."""

    step: jax.Array  # int32, batches consumed
    params: Params
    opt_state: Any


class StepMetrics(NamedTuple):
    """What a step tells of itself: float32 scalars but for `applied`, on the devices until they are read."""

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


def make_update(
    tx: optax.GradientTransformation, like: TrainState
) -> Callable[[Params, Params, Any], tuple[Params, Any, jax.Array]]:
    """(gradients, parameters, optimizer's state) → new ones, laid as the moments, and the norm of the change.

    New parameters are put together again by what leaves a program, whose out_shardings say so.
    """
    layout, tx = sharding.moment_shardings(like.params), optax.with_extra_args_support(tx)

    def update(grads: Params, params: Params, opt_state: Any) -> tuple[Params, Any, jax.Array]:
        params = jax.lax.with_sharding_constraint(params, layout)
        updates, opt_state = tx.update(grads, opt_state, params, layout=layout)
        norm = optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), updates))
        return optax.apply_updates(params, updates), opt_state, norm

    return update


def make_train_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, like: TrainState, seed: int, gather_dtype: str = "float32"
) -> jax.stages.Wrapped:
    """The jitted train step: (state, batch of micro-batches (A, B, …)) → (state, StepMetrics).

    Gradients are summed over micro-batches and divided by the step's count once, so that accumulation
    equals one large batch also where targets are masked. A step that is not finite leaves parameters and optimizer
    as they were. gather_dtype: see make_gradients.
    """
    gradients, update = make_gradients(loss_fn, like.params, gather_dtype), make_update(tx, like)
    layout, in_float32 = sharding.moment_shardings(like.params), partial(jax.tree.map, lambda x: x.astype(jnp.float32))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss_sum, others), grads = gradients(state.params, batch, key)
        count = jnp.maximum(others.pop("count"), 1).astype(jnp.float32)
        means = {name: value / count for name, value in others.items()}
        loss, grad_norm = loss_sum / count, optax.tree.norm(in_float32(grads)) / count
        applied = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        params = jax.lax.with_sharding_constraint(state.params, layout)
        updated = update(jax.tree.map(lambda g: g / count, in_float32(grads)), params, state.opt_state)
        # A select, which XLA puts into the kernels that write: for a branch the host would wait for the device.
        *kept, update_norm = jax.tree.map(partial(jnp.where, applied), updated, (params, state.opt_state, 0.0))
        return TrainState(state.step + 1, *kept), StepMetrics(loss, grad_norm, update_norm, applied, means)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jit_for_training(
        step, like, donate_argnums=0, in_shardings=(shardings, None), out_shardings=(shardings, None)
    )


def jit_for_training(function: Callable[..., Any], like: TrainState, **how: Any) -> jax.stages.Wrapped:
    """jax.jit with XLA's options for training where a state lies.

    On GPUs cuBLAS alone is faster than where some products are Triton's, takes less memory, and 8-bit programs
    compile in minutes less. (Decoding a row is slower without Triton; see docs/log.md for both.)
    """
    on_gpu = next(iter(jax.tree.leaves(like)[0].sharding.device_set)).platform == "gpu"
    options = {"xla_gpu_enable_triton_gemm": False} if on_gpu else None
    return jax.jit(function, compiler_options=options, **how)
