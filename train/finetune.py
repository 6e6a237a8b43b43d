"""What the stages after pretraining have in common: a checkpoint to start from, whose rates they inherit."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import optax

from nanochat_jax import optim
from nanochat_jax.config import (
    LEARNING_RATES,
    REFERENCE_BATCH_TOKENS,
    Horizon,
    ModelConfig,
    OptimConfig,
    from_json,
)
from nanochat_jax.data.batches import NothingFitsError
from nanochat_jax.errors import UserError
from nanochat_jax.layers import Compute
from nanochat_jax.load import StoredModel, open_undamaged
from nanochat_jax.tokenizer import Tokenizer
from train.start import Start, from_stored


@dataclass(frozen=True)
class Schedule:
    """How rates and Muon's momentum run over a stage; weight decay of the matrices is off in all of them."""

    warmup_steps: int
    warmdown_fraction: float  # of all steps, to zero
    momentum: tuple[float, float]  # from, to
    momentum_warmup_steps: int


@dataclass(frozen=True)
class FineTune:
    """A model to train on, and the optimizer to do it with."""

    cfg: ModelConfig
    tokenizer: Tokenizer
    recipe: dict[str, Any]  # the part of the stage's that is decided here
    tx: optax.GradientTransformation
    start: Start


class Base(NamedTuple):
    """A model to start from, and the rates and the batch that it was pretrained with."""

    stored: StoredModel
    rates: OptimConfig
    horizon: Horizon


def open_base(folder: Path) -> Base:
    """The newest undamaged checkpoint of a run, to start from.

    Raises:
        UserError: if there is none, or none that fine-tuning knows.
    """
    stored = open_undamaged(folder)
    if not isinstance(stored.cfg, ModelConfig):
        raise UserError(f"{folder} holds a GPT-2; fine-tuning is for the nanochat architecture")
    pretrained = stored.recipe.get("pretrained", stored.recipe)  # a checkpoint of fine-tuning passes them on
    if "horizon" not in pretrained:  # converted from elsewhere
        return Base(stored, OptimConfig(), Horizon(0, REFERENCE_BATCH_TOKENS, 0, 1.0, 0.0))
    return Base(stored, from_json(OptimConfig, pretrained["optim"]), from_json(Horizon, pretrained["horizon"]))


def rows_held_out[T](make: Callable[[], T]) -> T | None:
    """Rows to validate on; None, with a word on why, if nothing that is held out fits."""
    try:
        return make()
    except NothingFitsError as error:
        print(f"training without validation: of what is held out nothing fits ({error})")
        return None


def fine_tune(
    base: Base, schedule: Schedule, *, steps: int, batch_tokens: int, lr_fraction: float, warm: bool, compute: Compute
) -> FineTune:
    """Make the optimizer of a stage.

    Args:
        base: as opened.
        schedule: of the stage.
        steps: of the stage.
        batch_tokens: tokens a step.
        lr_fraction: of the rates in pretraining, which are scaled by the square root of what a step now has more of.
        warm: go on with the optimizer's moments, if they are stored.
        compute: dtype and attention backend.
    """
    if lr_fraction <= 0:
        raise UserError(f"--lr-fraction {lr_fraction} must be positive")
    stored, rates, horizon = base
    assert isinstance(stored.cfg, ModelConfig)
    numbers = replace(
        rates,
        **{name: getattr(rates, name) * lr_fraction for name in LEARNING_RATES},
        warmup_steps=schedule.warmup_steps,
        warmdown_fraction=schedule.warmdown_fraction,
        final_lr_fraction=0.0,
        momentum=(*schedule.momentum, schedule.momentum[1]),
        momentum_warmup_steps=schedule.momentum_warmup_steps,
    )
    scale = horizon.lr_scale * math.sqrt(batch_tokens / horizon.batch_tokens)
    length = Horizon(steps, batch_tokens, steps * batch_tokens, scale, weight_decay=0.0)
    tx = optim.make_optimizer(stored.cfg, length, numbers, compute.dtype)
    if warm and not stored.has("opt_state"):
        print(f"{stored.folder} holds no optimizer: starting with a fresh one")
        warm = False
    recipe = {
        "model": stored.cfg,
        "horizon": length,
        "optim": numbers,
        "pretrained": {"optim": rates, "horizon": horizon},
        "warm": warm,
        "start_from": stored.fingerprint,
        "tokenizer": stored.tokenizer.sha256,
        "compute_dtype": compute.dtype,
    }
    return FineTune(stored.cfg, stored.tokenizer, recipe, tx, from_stored(stored, tx, with_optimizer=warm))
