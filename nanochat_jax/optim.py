"""MuonAdamW: which parameter is trained by what, at which rate, on which schedule."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from nanochat_jax.config import Horizon, ModelConfig, OptimConfig
from nanochat_jax.muon import MuonState, Schedule, muon

REFERENCE_WIDTH = 768  # Adam's rates for the tables shrink as width**-0.5 from here

GROUP_OF_LEAF = {
    "wte": "wte",
    "lm_head": "lm_head",
    "value_embed": "value_embeds",
    "resid_lambdas": "resid_lambdas",
    "x0_lambdas": "x0_lambdas",
    "smear_gate": "smear",
    "smear_lambda": "smear",
    "backout_lambda": "smear",
}  # all other parameters are matrices of the blocks, and Muon's


def lr_multiplier(steps: int, cfg: OptimConfig) -> Schedule:
    """Linear warm-up, flat, linear warm-down to a fraction: a factor for every learning rate."""
    warmdown_steps = round(cfg.warmdown_fraction * steps)

    def multiplier(step: jax.Array) -> jax.Array:
        rising = (step + 1) / max(cfg.warmup_steps, 1)
        left = (steps - step) / max(warmdown_steps, 1)
        falling = left + (1 - left) * cfg.final_lr_fraction
        return jnp.where(step < cfg.warmup_steps, rising, jnp.where(step > steps - warmdown_steps, falling, 1.0))

    return multiplier


def muon_momentum(steps: int, cfg: OptimConfig) -> Schedule:
    """From the first to the second value over the warm-up, then flat, then to the third across the warm-down."""
    first, flat, last = cfg.momentum
    warmdown_steps = round(cfg.warmdown_fraction * steps)

    def momentum(step: jax.Array) -> jax.Array:
        warmup = step / max(cfg.momentum_warmup_steps, 1)
        progress = (step - (steps - warmdown_steps)) / max(warmdown_steps, 1)
        late = jnp.where(step >= steps - warmdown_steps, flat + progress * (last - flat), flat)
        return jnp.where(step < cfg.momentum_warmup_steps, (1 - warmup) * first + warmup * flat, late)

    return momentum


def muon_weight_decay(steps: int, initial: float) -> Schedule:
    """Half a cosine from the initial decay to zero."""
    return lambda step: initial * 0.5 * (1 + jnp.cos(jnp.pi * step / steps))


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Run a transformation in float32 while its state is stored in each parameter's own dtype."""

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, new_state = inner.update(widen(grads), widen(state), widen(params))
        return updates, jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)

    return optax.GradientTransformation(inner.init, update)


def parameter_groups(params: Any) -> Any:
    """The name of each parameter's group, in a tree like the parameters'."""
    return jax.tree_util.tree_map_with_path(lambda path, _: GROUP_OF_LEAF.get(path[-1].key, "matrices"), params)


def make_optimizer(
    model: ModelConfig, length: Horizon, cfg: OptimConfig, compute_dtype: str
) -> optax.GradientTransformation:
    """MuonAdamW for a model and training length.

    Args:
        model: the architecture (its width scales Adam's rates).
        length: steps, rate scale and Muon's weight decay.
        cfg: base rates and schedule.
        compute_dtype: Muon's iterations run in it.

    Source: nanochat/gpt.py setup_optimizer, scripts/base_train.py.
    """
    batch, width = length.lr_scale, (model.n_embd / REFERENCE_WIDTH) ** -0.5
    multiplier = lr_multiplier(length.steps, cfg)

    def rate(base: float) -> Schedule:
        return lambda step: base * multiplier(step)

    def adamw(base: float, b1: float, b2: float, weight_decay: float) -> optax.GradientTransformation:
        return in_float32(optax.adamw(rate(base), b1, b2, eps=1e-10, weight_decay=weight_decay))

    groups = {
        "lm_head": adamw(cfg.unembedding_lr * batch * width, 0.8, 0.96, 0.01),
        "wte": adamw(cfg.embedding_lr * batch * width, 0.8, 0.995, 0.001),
        "value_embeds": adamw(0.5 * cfg.embedding_lr * batch * width, 0.8, 0.995, 0.01),
        "resid_lambdas": adamw(0.01 * cfg.scalar_lr * batch, 0.8, 0.95, 0.05),
        "x0_lambdas": adamw(cfg.scalar_lr * batch, 0.96, 0.95, 0.0),
        "smear": adamw(cfg.smear_lr, 0.8, 0.95, 0.0),
        "matrices": muon(
            rate(cfg.matrix_lr * batch),
            muon_momentum(length.steps, cfg),
            muon_weight_decay(length.steps, length.weight_decay),
            compute_dtype,
        ),
    }
    return optax.partition(groups, parameter_groups, mask_compatible_extra_args=True)


def restart_schedules(opt_state: Any) -> Any:
    """An optimizer's state as another training stage begins with it: the moments go on, the schedules start anew."""

    def restart(node: Any) -> Any:
        if isinstance(node, optax.ScaleByScheduleState):
            return node._replace(count=jnp.zeros_like(node.count))
        return node._replace(updates=jnp.zeros_like(node.updates)) if isinstance(node, MuonState) else node

    kinds = (optax.ScaleByScheduleState, MuonState)
    return jax.tree.map(restart, opt_state, is_leaf=lambda node: isinstance(node, kinds))
