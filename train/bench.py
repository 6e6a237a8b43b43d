"""Measure speed and size: of the training step, of decoding, of CORE. Prints JSON, so that anyone can repeat it.

    python -m train.bench train --model.depth 12 --batch 32
    python -m train.bench scaling --model.depth 12 --batch 32 --devices 1 2 4 8
    python -m train.bench deepest --sequence-len 2048
    python -m train.bench decode --model.depth 12 --batches 1 8 32 128
    python -m train.bench core --tokenizer runs/demo/tokenizer/tokenizer.model

Times are medians over repeats of several calls each, after warming up. Weights are random, and tokens too but for CORE.
"""

import json
from collections.abc import Callable
from typing import Annotated, Any

import jax
import tyro

from nanochat_jax.config import to_json
from nanochat_jax.hosts import is_first
from train import cli
from train.bench_core import Core, bench_core
from train.bench_decode import Decode, bench_decode
from train.bench_train import Deepest, Scaling, Train, bench_deepest, bench_scaling, bench_train

Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Scaling, tyro.conf.subcommand("scaling")]
    | Annotated[Deepest, tyro.conf.subcommand("deepest")]
    | Annotated[Decode, tyro.conf.subcommand("decode")]
    | Annotated[Core, tyro.conf.subcommand("core")]
)
BENCHES: dict[type, Callable[[Any], dict[str, Any]]] = {
    Train: bench_train,
    Scaling: bench_scaling,
    Deepest: bench_deepest,
    Decode: bench_decode,
    Core: bench_core,
}


def main(config: Command) -> dict[str, Any]:
    """Measure, print and return."""
    measured = BENCHES[type(config)](config)
    result = {
        "config": to_json(config),
        "hardware": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "versions": {"jax": jax.__version__},
        **measured,
    }
    if is_first():
        print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    cli.run(main, Command)  # type: ignore[arg-type]
