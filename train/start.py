"""What a stage begins with: random parameters, or those that another stage left behind."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from nanochat_jax import model, optim, state
from nanochat_jax.config import Architecture
from nanochat_jax.layers import Compute
from nanochat_jax.load import StoredModel

# The abstract state, with shardings → the state to begin with.
Start = Callable[[state.TrainState], state.TrainState]


def abstract_state(
    cfg: Architecture, compute: Compute, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> state.TrainState:
    """Shapes, dtypes and shardings of a stage's state."""
    return state.abstract_state(lambda key: model.init_params(key, cfg, compute), tx, model.logical_axes(cfg), mesh)


def fresh(cfg: Architecture, compute: Compute, tx: optax.GradientTransformation, seed: int) -> Start:
    """Begin with random parameters."""

    def start(like: state.TrainState) -> state.TrainState:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        init = jax.jit(lambda key: state.new_state(model.init_params(key, cfg, compute), tx), out_shardings=shardings)
        return init(jax.random.key(seed))

    return start


def from_stored(stored: StoredModel, tx: optax.GradientTransformation, *, with_optimizer: bool = False) -> Start:
    """Begin with stored parameters; with the optimizer's moments too, where wanted."""

    def start(like: state.TrainState) -> state.TrainState:
        mesh = jax.tree.leaves(like)[0].sharding.mesh
        there = abstract_state(stored.cfg, stored.trained_in, tx, mesh)
        wanted = {"params": there.params} | ({"opt_state": there.opt_state} if with_optimizer else {})
        found = stored.restore(wanted)
        params = _as_in(like.params, found["params"])
        if with_optimizer:
            opt_state = optim.restart_schedules(_as_in(like.opt_state, found["opt_state"]))
        else:
            opt_state = jax.jit(tx.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like.opt_state))(params)
        return state.TrainState(jax.device_put(np.int32(0), like.step.sharding), params, opt_state)

    return start


def _as_in(like: Any, tree: Any) -> Any:
    return jax.tree.map(lambda leaf, as_in: jax.device_put(leaf.astype(as_in.dtype), as_in.sharding), tree, like)
