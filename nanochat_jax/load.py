"""Open a finished model: parameters, architecture and tokenizer from the folder of a run."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from nanochat_jax import model, sharding, tokenizer
from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.config import Architecture
from nanochat_jax.errors import UserError
from nanochat_jax.layers import Compute, default_compute


@dataclass(frozen=True)
class LoadedModel:
    params: model.Params
    cfg: Architecture
    tokenizer: tokenizer.Tokenizer
    compute: Compute
    step: int
    fingerprint: str  # of all stored arrays together
    meta: dict[str, Any]  # of the checkpoint: stage, recipe, data position
    metrics: dict[str, float]  # measured when it was saved


def load_model(
    folder: Path, *, step: int | None = None, mesh: jax.sharding.Mesh | None = None, compute: Compute | None = None
) -> LoadedModel:
    """Load the newest good checkpoint of a run, or that of a step, onto a mesh (default: one device).

    The embedding tables keep the dtype that they were trained in; everything is computed in `compute`'s.

    Raises:
        UserError: there is no checkpoint, or none is undamaged.
    """
    checkpoints = Checkpoints(folder / "checkpoints")
    found = checkpoints.peek(step)
    if found is None:
        raise UserError(f"{folder} holds no checkpoint; make one with python -m train.pretrain --run.out {folder}")
    cfg = model.config_from_json(found.meta["recipe"]["model"])
    stored = Compute(dtype=found.meta["recipe"]["compute_dtype"])
    shapes = jax.eval_shape(lambda key: model.init_params(key, cfg, stored), jax.random.key(0))
    mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
    placed = sharding.param_shardings(mesh, model.logical_axes(cfg), shapes)
    like = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, placed)
    restored = checkpoints.restore({"params": like}, step=step)
    assert restored is not None
    state, found = restored
    return LoadedModel(
        params=state["params"],
        cfg=cfg,
        tokenizer=tokenizer.from_bytes(found.tokenizer),
        compute=compute or default_compute(),
        step=found.step,
        fingerprint=hashlib.sha256(json.dumps(found.arrays, sort_keys=True).encode()).hexdigest(),
        meta=found.meta,
        metrics=found.metrics,
    )
