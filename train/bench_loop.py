"""How much of the bare training step's speed is left of it in a whole run: loader, logging and loop take the rest.

    python -m train.pretrain --data runs/demo/data --run.out runs/loop --model.depth 12 --steps 60 …
    python -m train.bench_loop --run runs/loop

Reads the run's metrics, and times the same step on random tokens on the same devices, which should be as quiet now as
they were then.
"""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_jax import sharding
from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.config import from_json
from nanochat_jax.errors import UserError
from nanochat_jax.files import read_json
from nanochat_jax.metrics import read_metrics
from train import cli, pretrain
from train.bench_train import Train, bench_train
from train.timing import Device


@dataclass(frozen=True)
class Config:
    run: Path
    """Folder of a finished train.pretrain of nanochat's architecture."""
    device: Device = field(default_factory=Device)
    """How often the bare step is measured; it computes as the run did."""


def main(config: Config) -> dict[str, Any]:
    """Compare, print and return.

    Raises:
        UserError: there is no such run, or too little of it.
    """
    checkpoint = Checkpoints(config.run / "checkpoints").peek()
    if checkpoint is None:
        raise UserError(
            f"{config.run} holds no finished run: python -m train.pretrain --run.out {config.run} makes one"
        )
    recipe = checkpoint.meta["recipe"]
    stored = from_json(pretrain.Config, read_json(config.run / "config.json"))
    if stored.preset != "nanochat" or not isinstance(stored.run.micro_batch, int):
        raise UserError(f"{config.run} is of the preset {stored.preset}; this is for nanochat's")
    laps = [record["seconds_per_step"] for record in read_metrics(config.run) if "seconds_per_step" in record]
    if len(laps) < 20:
        raise UserError(f"{config.run} has {len(laps)} timed steps; 20 at least say something")
    mesh = sharding.make_mesh(stored.run.mesh)
    device = Device(stored.run.compute, config.device.calls, config.device.repeats)
    bare = bench_train(
        Train(
            model=stored.model,
            batch=stored.run.micro_batch,
            accumulate=recipe["rows"] // (stored.run.micro_batch * sharding.batch_devices(mesh)),
            sequence_len=recipe["model"]["sequence_len"],
            vocab_size=recipe["model"]["vocab_size"],
            mesh=stored.run.mesh,
            device=device,
        )
    )["milliseconds"]["step"]
    loop = 1e3 * statistics.median(laps[len(laps) // 2 :])  # the first ones warm up
    result = {"loop_milliseconds": round(loop, 3), "bare_milliseconds": bare, "share_of_bare_speed": bare / loop}
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    cli.run(main, Config)
