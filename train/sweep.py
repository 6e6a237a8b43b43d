"""Train a series of models with the one dial, and see by which power law the loss falls with compute and size.

    python -m train.sweep --data runs/my/data --run.out runs/sweep --depths 8 10 12 14 --ratios 8 12

Every model is a run of train.pretrain of its own, in a folder of its own; the same command goes on where it stopped,
and trains only what a longer list adds. The result is sweep.json, and sweep.html and sweep.md with tables and plots.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from nanochat_jax.config import OptimConfig, write_json
from nanochat_jax.data.records import load_manifest
from nanochat_jax.errors import UserError
from nanochat_jax.eval import report as page
from nanochat_jax.eval.plots import Points
from nanochat_jax.eval.report import Block, Table, Text
from nanochat_jax.files import write_bytes
from nanochat_jax.metrics import read_metrics
from train import cli, pretrain
from train.stage import RunConfig, at_least


@dataclass(frozen=True)
class Config:
    data: Path
    """Folder made by train.prepare."""
    run: RunConfig
    """Its out is the folder of the series; each model lies in a folder within."""
    depths: tuple[int, ...] = (8, 10, 12, 14, 16)
    """Layers of the models; width, batch, rates and weight decay follow as in train.pretrain."""
    ratios: tuple[float, ...] = (12.0,)
    """Training tokens per scaling parameter; each depth is trained with each of them."""
    head_dim: int = 128
    """Channels of an attention head."""
    window_pattern: str = "SSSL"
    """Attention window of the layers in turn."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch_tokens: int | None = None
    """Tokens of an optimizer step, in place of the scaling law's."""
    lr_scale: float | None = None
    """Factor of the learning rates, in place of sqrt(batch_tokens / 2^19)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.depths or not self.ratios:
            raise UserError("--depths and --ratios need at least one number each")
        for depth in self.depths:
            at_least("depths", depth, 1)
        if min(self.ratios) <= 0:
            raise UserError(f"--ratios {min(self.ratios):g} must be positive")


@dataclass(frozen=True)
class Trained:
    """What one model of the series has come to."""

    depth: int
    ratio: float
    parameters: int
    scaling_parameters: int  # block matrices and lm_head: what the ratio counts
    tokens: int
    epochs: float
    flops: float
    bits_per_byte: float  # of the validation split, at the end
    hours: float  # of all steps


class PowerLaw(NamedTuple):
    """y = factor · x^exponent."""

    factor: float
    exponent: float
    r2: float  # share of the variance of log y that it explains


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """The straight line through logarithms, by least squares; through at least two different x."""
    log_x, log_y = np.log(x), np.log(y)
    exponent, intercept = np.polyfit(log_x, log_y, 1)
    residual = log_y - (exponent * log_x + intercept)
    spread = float(((log_y - log_y.mean()) ** 2).sum())
    r2 = 1.0 if spread == 0 else 1 - float((residual**2).sum()) / spread
    return PowerLaw(math.exp(intercept), float(exponent), r2)


def frontier(models: Sequence[Trained]) -> list[Trained]:
    """Those that no other model beats with as little compute or less."""
    best: list[Trained] = []
    for model in sorted(models, key=lambda model: (model.flops, model.bits_per_byte)):
        if not best or model.bits_per_byte < best[-1].bits_per_byte:
            best.append(model)
    return best


def main(config: Config) -> list[Trained]:
    """Train what is missing, write the page, and return what each model has come to."""
    names = [(depth, ratio) for ratio in sorted(set(config.ratios)) for depth in sorted(set(config.depths))]
    models = []
    for i, (depth, ratio) in enumerate(names, 1):
        print(f"\n[{i}/{len(names)}] depth {depth}, {ratio:g} tokens per parameter")
        models.append(train(config, depth, ratio))
    if jax.process_index() == 0:
        write(config.run.out, models)
    return models


def train(config: Config, depth: int, ratio: float) -> Trained:
    """One model of the series, as train.pretrain makes it."""
    out = config.run.out / f"d{depth}-r{ratio:g}"
    result = pretrain.main(
        pretrain.Config(
            data=str(config.data),
            run=replace(config.run, out=out),
            model=pretrain.ModelArgs(depth, config.head_dim, config.window_pattern),
            optim=config.optim,
            ratio=ratio,
            batch_tokens=config.batch_tokens,
            lr_scale=config.lr_scale,
            prompts=(),
            seed=config.seed,
        )
    )
    cfg, records = result.plan.cfg, read_metrics(out)
    tokens = result.plan.steps * result.plan.rows * cfg.sequence_len
    counts, manifest = cfg.param_counts(), load_manifest(config.data)
    return Trained(
        depth=depth,
        ratio=ratio,
        parameters=counts["total"],
        scaling_parameters=counts["transformer_matrices"] + counts["lm_head"],
        tokens=tokens,
        epochs=tokens / (manifest.train.records * cfg.sequence_len),
        flops=float(tokens * cfg.flops_per_token()),
        bits_per_byte=[record["val_bpb"] for record in records if record.get("val_bpb") is not None][-1],
        hours=sum(record.get("seconds_per_step") or 0.0 for record in records) / 3600,
    )


def laws(models: Sequence[Trained]) -> Iterator[tuple[str, str, list[Trained], PowerLaw]]:
    """(axis, of what, models, law): bits per byte by compute and by size for each ratio, and by compute at its best."""
    by_ratio = {ratio: [m for m in models if m.ratio == ratio] for ratio in sorted({m.ratio for m in models})}
    for axis in ("flops", "scaling_parameters"):
        groups = {f"ratio {ratio:g}": group for ratio, group in by_ratio.items()}
        if axis == "flops" and len(by_ratio) > 1:
            groups["best for its compute"] = frontier(models)
        for name, group in groups.items():
            x = [getattr(model, axis) for model in group]
            if len(set(x)) > 1:
                yield axis, name, group, fit_power_law(x, [model.bits_per_byte for model in group])


AXES = {"flops": "FLOPs of training", "scaling_parameters": "parameters in matrices and head"}


def plot(axis: str, models: Sequence[Trained]) -> Points:
    """Bits per byte over compute or size, and the laws found."""

    def of(group: Sequence[Trained]) -> list[float]:
        return [getattr(model, axis) for model in group]

    found = {name: law for of_axis, name, _, law in laws(models) if of_axis == axis}
    labels = {name: f"{name}: ∝ x^{law.exponent:.3f}" for name, law in found.items()}
    points = {}
    for ratio in sorted({model.ratio for model in models}):
        name, group = f"ratio {ratio:g}", [model for model in models if model.ratio == ratio]
        points[labels.get(name, name)] = (of(group), [model.bits_per_byte for model in group])
    lines = {}
    for name, law in found.items():
        x = np.geomspace(min(of(models)), max(of(models)), 50)
        lines[labels[name]] = (x.tolist(), (law.factor * x**law.exponent).tolist())
    return Points(f"Bits per byte by {AXES[axis]}", "sweep", (AXES[axis], "validation bits per byte"), points, lines)


def write(folder: Path, models: Sequence[Trained]) -> None:
    """sweep.json, sweep.html and sweep.md; the tables go to the terminal too."""
    header = ("model", "tokens per parameter", "parameters", "tokens", "epochs", "FLOPs", "bits per byte", "hours")
    rows = [
        (
            f"d{m.depth}", f"{m.ratio:g}", f"{m.parameters:,}", f"{m.tokens:,}", f"{m.epochs:.2f}", f"{m.flops:.3g}",
            f"{m.bits_per_byte:.4f}", f"{m.hours:.3g}",
        )
        for m in models
    ]  # fmt: skip
    fits = [
        (f"{AXES[axis]}, {name}", f"{len(group)}", f"{law.factor:.4g} · x^{law.exponent:.4f}", f"{law.r2:.4f}")
        for axis, name, group, law in laws(models)
    ]
    tables = [Table(rows, header, "numbers")]
    tables += [Table(fits, ("bits per byte by", "models", "power law", "R²"), "numbers")] if fits else []
    sections: dict[str, list[Block]] = {
        "Models": [tables[0]],
        "Power laws": [*tables[1:], Text(FITTED), *(plot(axis, models) for axis in AXES)],
    }
    title = f"nanochat-jax: {folder.resolve().name}"
    write_json(
        folder / "sweep.json", {"models": models, "laws": [(a, n, law._asdict()) for a, n, _, law in laws(models)]}
    )
    write_bytes(folder / "sweep.html", page.to_html(title, sections).encode())
    write_bytes(folder / "sweep.md", page.to_markdown(title, sections).encode())
    for table in tables:
        print(f"\n{table.plain()}")
    print(f"\n{folder / 'sweep.html'}, sweep.md, sweep.json")


FITTED = (
    "Straight lines through logarithms, by least squares. They hold between the models that they were fitted to; how "
    "far beyond, only a larger model tells."
)


if __name__ == "__main__":
    cli.run(main, Config)
