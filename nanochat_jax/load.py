"""Open a finished model: parameters, architecture and tokenizer from the folder of a run."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from nanochat_jax import model, sharding, tokenizer
from nanochat_jax.checkpoint import Checkpoint, Checkpoints
from nanochat_jax.config import Architecture
from nanochat_jax.errors import UserError
from nanochat_jax.layers import Compute, default_compute


@dataclass(frozen=True)
class StoredModel:
    """What a checkpoint says of its model; its arrays are still on disk."""

    folder: Path
    checkpoint: Checkpoint
    cfg: Architecture
    tokenizer: tokenizer.Tokenizer

    @property
    def recipe(self) -> dict[str, Any]:
        return self.checkpoint.meta["recipe"]

    @property
    def trained_in(self) -> Compute:
        """The dtype that the embedding tables are stored in."""
        return Compute(dtype=self.recipe["compute_dtype"])

    @property
    def fingerprint(self) -> str:
        """Of all stored arrays together."""
        return hashlib.sha256(json.dumps(self.checkpoint.arrays, sort_keys=True).encode()).hexdigest()

    def has(self, field: str) -> bool:
        """Whether arrays of a field of the training state are stored."""
        return any(name.split("/")[0] == field for name in self.checkpoint.arrays)

    def restore(self, like: Any) -> Any:
        """Some fields of the training state, as {"params": …}; see `Checkpoints.restore`."""
        restored = Checkpoints(self.folder / "checkpoints").restore(like, step=self.checkpoint.step)
        assert restored is not None
        return restored[0]


@dataclass(frozen=True)
class LoadedModel:
    """A model to work with."""

    params: model.Params
    stored: StoredModel
    compute: Compute

    @property
    def cfg(self) -> Architecture:
        return self.stored.cfg

    @property
    def tokenizer(self) -> tokenizer.Tokenizer:
        return self.stored.tokenizer

    @property
    def step(self) -> int:
        return self.stored.checkpoint.step


def open_model(folder: Path, *, step: int | None = None) -> StoredModel:
    """Find the newest good checkpoint of a run, or that of a step, and read what it says of itself.

    Raises:
        UserError: there is no checkpoint, or none is good.
    """
    found = Checkpoints(folder / "checkpoints").peek(step)
    if found is None:
        raise UserError(f"{folder} holds no checkpoint; make one with python -m train.pretrain --run.out {folder}")
    cfg = model.config_from_json(found.meta["recipe"]["model"])
    return StoredModel(folder, found, cfg, tokenizer.from_bytes(found.tokenizer))


def open_undamaged(folder: Path) -> StoredModel:
    """As open_model, but parameters are read once, too: for what must know its checkpoint long before it loads it."""
    return load_model(folder, mesh=sharding.make_mesh(sharding.MeshConfig(fsdp=jax.device_count()))).stored


def load_model(
    folder: Path, *, step: int | None = None, mesh: jax.sharding.Mesh | None = None, compute: Compute | None = None
) -> LoadedModel:
    """Load a checkpoint's parameters, the newest good ones or those of a step, onto a mesh (default: one device).

    The embedding tables keep the dtype that they were trained in; everything is computed in `compute`'s.

    Raises:
        UserError: there is no checkpoint, or none is undamaged.
    """
    mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
    stored = open_model(folder, step=step)
    shapes = jax.eval_shape(lambda key: model.init_params(key, stored.cfg, stored.trained_in), jax.random.key(0))
    placed = sharding.param_shardings(mesh, model.logical_axes(stored.cfg), shapes)
    like = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, placed)
    restored = Checkpoints(folder / "checkpoints").restore({"params": like}, step=step)
    assert restored is not None
    state, checkpoint = restored  # an older one, if the newest is damaged
    return LoadedModel(state["params"], replace(stored, checkpoint=checkpoint), compute or default_compute())
