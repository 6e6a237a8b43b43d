"""Put what a run left behind on one page: report.html with curves, and report.md.

    python -m train.report --run runs/demo

Whatever is missing is left out, and named at the end of the page.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.config import from_json
from nanochat_jax.errors import UserError
from nanochat_jax.eval.report import Block, Code, Curves, Table, Text, series, to_html, to_markdown
from nanochat_jax.files import write_bytes
from nanochat_jax.metrics import read_metrics
from train import cli, evaluate, prepare, pretrain, tokenizer

CURVES = {
    "Loss, nats per token": {"loss": "training", "val_loss": "validation"},
    "Validation bits per byte": {"val_bpb": "this model"},
    "Gradient norm": {"grad_norm": ""},
    "Throughput, tokens per second": {"tokens_per_second": ""},
    "MFU, share of the device's peak": {"mfu": ""},
}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")

Run = dict[str, Any]  # by name in PARTS, what was found in the run's folder; {} for what was not


@dataclass(frozen=True)
class Config:
    run: Path
    """Folder of the run, which holds tokenizer/, data/ and base/."""


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else {}


PARTS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "tokenizer": ("tokenizer/tokenizer.report.json", _read_json),
    "tokenizer config": ("tokenizer/tokenizer.config.json", _read_json),
    "data": ("data/manifest.json", _read_json),
    "config": ("base/config.json", _read_json),
    "metrics": ("base/metrics.jsonl", lambda path: read_metrics(path.parent)),
    "checkpoint": ("base/checkpoints", lambda path: vars(found) if (found := Checkpoints(path).peek()) else {}),
    "evaluation": ("base/evaluation.json", _read_json),
}


def gather(folder: Path) -> tuple[Run, list[str]]:
    """What there is of a run, and a note on each part that is missing or cannot be read."""
    run, notes = {}, []
    for name, (path, read) in PARTS.items():
        try:
            run[name] = read(folder / path)
        except (OSError, ValueError, UserError) as error:
            run[name] = {}
            notes.append(f"{path} cannot be read: {error}")
        else:
            notes += [] if run[name] else [f"{path} is missing"]
    return run, notes


def headline(run: Run) -> list[Block]:
    """The numbers that one looks for first, and the model beside simpler methods."""
    tiles = []
    for label, name, reduce, scale in (
        ("bits per byte in validation", "val_bpb", lambda values: values[-1], 1),
        ("minutes of training", "seconds_per_step", np.sum, 1 / 60),
        ("tokens per second, median", "tokens_per_second", np.median, 1),
        ("MFU in %, median", "mfu", np.median, 100),
    ):
        if len(values := series(run["metrics"], name)[1]):
            tiles.append((label, _number(scale * float(reduce(values)), 4)))
    if checkpoint := run["checkpoint"]:
        arrays = [text.split()[0] for name, text in checkpoint["arrays"].items() if name.startswith("params/")]
        parameters = sum(math.prod(map(int, re.findall(r"\d+", text.partition("[")[2]))) for text in arrays)
        counts = {"parameters": parameters, "steps": checkpoint["step"]}
        if records := checkpoint["meta"].get("records"):  # not in converted models
            counts["tokens seen"] = records * checkpoint["meta"]["recipe"]["model"]["sequence_len"]
        tiles += [(label, _number(count)) for label, count in counts.items()]
    blocks: list[Block] = [Table(tiles, style="tiles")] if tiles else []
    if bpb := run["evaluation"].get("suites", {}).get("bpb"):
        model = next(iter(bpb["bits_per_byte"].values()))
        rows = [(name, f"{bits:.4f}", f"{bits / model:.2f}×") for name, bits in bpb["bits_per_byte"].items()]
        held_out = f"The same {bpb['bytes']:,} held-out bytes ({bpb['tokens']:,} tokens)"
        blocks.append(Text(f"{held_out}, measured at step {run['evaluation']['step']:,}:"))
        blocks.append(Table(rows, ("", "bits per byte", "against the model"), "numbers"))
    return blocks


def curves(run: Run) -> list[Block]:
    bits = run["evaluation"].get("suites", {}).get("bpb", {}).get("bits_per_byte", {})
    others = dict(list(bits.items())[1:])
    drawn = [
        Curves(title, run["metrics"], names, others if "val_bpb" in names else {}) for title, names in CURVES.items()
    ]
    return [block for block in drawn if any(len(series(block.records, name)[0]) for name in block.metrics)]


def samples(run: Run) -> list[Block]:
    found = run["evaluation"].get("suites", {}).get("sample", {}).get("samples", [])
    return [Code(sample["text"], prompt=sample["prompt"]) for sample in found]


def tables(*names: str) -> Callable[[Run], list[Block]]:
    return lambda run: [Table(flat(run[name])) for name in names if run[name]]


def architecture(run: Run) -> list[Block]:
    recipe = run["checkpoint"]["meta"]["recipe"] if run["checkpoint"] else {}
    rows = flat({name: recipe[name] for name in ("model", "horizon", "optim") if name in recipe})
    return [Table(rows)] if rows else []


def commands(folder: Path, run: Run) -> list[Block]:
    """The commands that made the run, from the configs that its stages left."""
    model, data = folder / "tokenizer" / "tokenizer.model", run["data"]
    learnt = {name: value for name, value in run["tokenizer config"].items() if name != "corpus"}
    prepared = {field.name: data[field.name] for field in fields(prepare.Config) if field.name in data}
    stages = (
        ("tokenizer", tokenizer.Config, learnt and {**learnt, "out": model}),
        ("prepare", prepare.Config, prepared and {**prepared, "tokenizer": model, "out": folder / "data"}),
        ("pretrain", pretrain.Config, run["config"]),
        ("evaluate", evaluate.Config, run["evaluation"].get("config")),
        ("report", Config, {"run": folder}),
    )
    return [Code(command_line(stage, cls, values)) for stage, cls, values in stages if values]


def command_line(stage: str, cls: type, values: dict[str, Any]) -> str:
    """The command that gives a stage these settings, without the flags that would repeat a default."""
    try:
        return shlex.join(["python", "-m", f"train.{stage}", *_flags(from_json(cls, values, stage), None, "")])
    except UserError as error:
        return f"# train.{stage} was of another version: {error}"


def _flags(config: Any, usual: Any, prefix: str) -> Iterator[str]:
    for field in fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        default = field.default if field.default_factory is MISSING else field.default_factory()
        default = default if usual in (None, MISSING) else getattr(usual, field.name)
        if is_dataclass(value):
            yield from _flags(value, default, f"{prefix}{name}.")
        elif isinstance(value, bool) and value != default:
            yield f"--{prefix}{'' if value else 'no-'}{name}"
        elif value != default:
            yield from (f"--{prefix}{name}", *map(str, value if isinstance(value, tuple) else [value]))


def environment(run: Run) -> list[Block]:
    """Of the machine that makes the report, which is mostly the one that trained."""
    rows = [("Python", platform.python_version())]
    rows += [(name, importlib.metadata.version(name)) for name in PACKAGES]
    try:
        device = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    except RuntimeError as error:  # a TPU serves one process at a time
        device = f"not to be had now: {error}"
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "not a git checkout"
    rows += [("device", device), ("CPU", f"{os.cpu_count()} × {cpu[1] if cpu else platform.machine()}")]
    return [Table([*rows, ("system", platform.platform()), ("git commit", commit)])]


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Rows (dotted name, value) of nested settings."""
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{name}.")
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            rows.append((prefix + name, _number(value) if number else str(value)))
    return rows


def _number(value: float, digits: int = 6) -> str:
    """Integers and what is as large in full, others to a few digits."""
    whole = isinstance(value, int) or abs(value) >= 10 ** (digits - 1) or value.is_integer()
    return f"{value:,.0f}" if whole else f"{value:,.{digits}g}"


SECTIONS: dict[str, Callable[[Run], list[Block]]] = {
    "Results": headline,
    "Training": curves,
    "Samples": samples,
    "Model and horizon": architecture,
    "Data": tables("data"),
    "Tokenizer": tables("tokenizer"),
    "Configuration of pretraining": tables("config"),
    "Environment": environment,
}


def main(config: Config) -> dict[str, Path]:
    """Write both files; returns their paths by kind."""
    run, notes = gather(config.run)
    if not any(run.values()):
        raise UserError(f"{config.run} holds nothing of a run ({', '.join(path for path, _ in PARTS.values())})")
    sections = {name: section(run) for name, section in SECTIONS.items()}
    sections["Commands"] = commands(config.run, run)
    sections["Missing"] = [Text(note) for note in notes]
    title = f"nanochat-jax: {config.run.resolve().name}"
    paths = {"html": config.run / "report.html", "md": config.run / "report.md"}
    write_bytes(paths["html"], to_html(title, sections).encode())
    write_bytes(paths["md"], to_markdown(title, sections).encode())
    for note in notes:
        print(f"left out: {note}")
    for name, result in run["evaluation"].get("suites", {}).items():
        evaluate.SUITES[name].show(result)
    print("report: " + ", ".join(map(str, paths.values())))
    return paths


if __name__ == "__main__":
    cli.run(main, Config)
