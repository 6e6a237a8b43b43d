"""Our training step beside the same model in PyTorch, eager and compiled, on this CPU: tokens/s and ratios, as JSON.

Each is timed in a process of its own, in turn, round after round; the median of the rounds counts. PyTorch may live in
another environment, of any Python from 3.11 on: `python3 -m venv /tmp/torch && /tmp/torch/bin/pip install torch numpy`
(compiling needs a C++ compiler too).

    python -m tests.compare_torch --torch-python /tmp/torch/bin/python
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Config:
    torch_python: str = sys.executable
    """Python that has torch."""
    layers: int = 4
    """The width is 64 times as much."""
    head_dim: int = 64
    sequence_len: int = 512
    vocab_size: int = 4096
    batch: int = 8
    """Rows of a step."""
    calls: int = 3
    """Steps in a repeat."""
    repeats: int = 3
    """The median of so many is a round's figure."""
    rounds: int = 2
    """How often the three take their turn."""


def tokens_per_second(command: list[str], cache: str) -> float:
    """What a benchmark's JSON says of the whole step."""
    # A cache of this run's own: what a killed compilation leaves behind would fail the next.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)["tokens_per_second"]
    return found["step"] if isinstance(found, dict) else found


def main(config: Config) -> None:
    """Time all three in turn, and print."""

    def flags(**values: int) -> list[str]:
        return [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]

    shared = flags(sequence_len=config.sequence_len, vocab_size=config.vocab_size, batch=config.batch)
    ours = [
        sys.executable, "-m", "train.bench", "train", *shared, "--model.depth", str(config.layers),
        "--model.head-dim", str(config.head_dim), "--device.calls", str(config.calls), "--device.repeats",
        str(config.repeats),
    ]  # fmt: skip
    theirs = [
        config.torch_python, "tests/torch_reference.py", *shared,
        *flags(layers=config.layers, width=64 * config.layers, head_dim=config.head_dim),
        *flags(steps=config.calls, repeats=config.repeats),
    ]  # fmt: skip
    commands = {"jax": ours, "torch_eager": theirs, "torch_compiled": [*theirs, "--compile"]}
    with tempfile.TemporaryDirectory() as cache:
        rounds = [
            {name: tokens_per_second(command, cache) for name, command in commands.items()}
            for _ in range(config.rounds)
        ]
    median = {name: statistics.median(one[name] for one in rounds) for name in commands}
    ratios = {f"jax_over_{name}": round(median["jax"] / median[name], 3) for name in ("torch_eager", "torch_compiled")}
    print(json.dumps({"tokens_per_second": median, **ratios, "rounds": rounds}, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
