"""Before paying for TPUs: does a pretraining run fit a slice, how fast could it be, what would it cost.

Compiles the run's own train step, and generation, for the slice with libtpu (pip install -r requirements-tpu.txt); no
TPU is needed. Minutes for a deep model on a laptop: --layers 4 8 compiles two shallow models of the same width instead
and extends the line through them.

    python -m train.preflight --topology v5p:4x4x4 --model.depth 24
    python -m train.preflight --topology v6e:2x4 --model.depth 24 --mesh.fsdp 8 --micro-batch 8 --layers 4 8
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import optax

from nanochat_jax import optim, preflight, sharding, tpu
from nanochat_jax.capacity import choose_mesh
from nanochat_jax.config import Horizon, ModelConfig, OptimConfig, horizon, to_json, write_json
from nanochat_jax.errors import UserError
from nanochat_jax.preflight import Job, Numbers, Overflow
from nanochat_jax.sharding import MeshConfig
from train import cli
from train.microbatch import ENOUGH_TOKENS, divisors, micro_rows
from train.pretrain import ModelArgs, language_model_loss, rows_of
from train.stage import at_least
from train.start import abstract_state


@dataclass(frozen=True)
class Config:
    topology: str
    """Generation and shape of a slice: v4, v5e, v5p or v6e, as in v5e:2x4 or v5p:4x4x4."""
    slices: int = 1
    """Slices of this shape, with the data axis between them."""
    model: ModelArgs = field(default_factory=ModelArgs)
    sequence_len: int = 2048
    vocab_size: int = 32768
    mesh: MeshConfig = field(default_factory=MeshConfig)
    ratio: float = 12.0
    """Training tokens per scaling parameter: 12 is compute-optimal."""
    batch_tokens: int | None = None
    """Tokens of an optimizer step, in place of the scaling law's."""
    micro_batch: int = 0
    """Rows that one device computes at a time; 0 for the largest that fits, as training finds it."""
    layers: tuple[int, ...] = ()
    """Two numbers, multiples of the window pattern: compile models of so many layers, extend the line to the depth."""
    decode_rows: int = 8
    """Rows of generation; 0 leaves it out."""
    optimization_level: int | None = None
    """Of the compiler: 19 takes a third of the time, for a program that is slower."""
    dollars_per_chip_hour: float | None = None
    """In place of the list price on demand."""
    out: Path | None = None
    """File for everything as JSON."""

    def __post_init__(self) -> None:
        for name in ("sequence_len", "vocab_size", "slices"):
            at_least(name.replace("_", "-"), getattr(self, name), 1)
        at_least("micro-batch", self.micro_batch, 0)
        at_least("decode-rows", self.decode_rows, 0)
        pattern = len(self.model.window_pattern)
        if self.layers and (len(set(self.layers)) != 2 or any(count < 1 or count % pattern for count in self.layers)):
            raise UserError(f"--layers {' '.join(map(str, self.layers))} must be two different multiples of {pattern}")


def main(config: Config) -> dict[str, Any]:
    """Compile, print, write and return."""
    jax.config.update("jax_platforms", "cpu")
    where = tpu.describe(config.topology, config.slices)
    cfg = config.model.architecture(config.vocab_size, config.sequence_len)
    length = horizon(cfg, ratio=config.ratio, batch_tokens=config.batch_tokens)
    rows = rows_of(length.batch_tokens, cfg)

    def make_optimizer(cfg: ModelConfig) -> optax.GradientTransformation:
        return optim.make_optimizer(cfg, length, OptimConfig(), preflight.COMPUTE.dtype)

    mesh = choose_mesh(
        config.mesh, cfg, rows, lambda mesh: abstract_state(cfg, preflight.COMPUTE, make_optimizer(cfg), mesh),
        list(where.devices), int(where.chip.memory_gib * preflight.GIB),
    )  # fmt: skip
    if config.micro_batch:
        sizes = [micro_rows(rows, config.micro_batch, mesh)]
    else:
        sizes = [size for size in divisors(rows, mesh)[::-1] if size * cfg.sequence_len <= ENOUGH_TOKENS] or [1]
    job = Job(
        cfg, where, mesh, sizes[0], rows // sharding.batch_devices(mesh) // sizes[0], language_model_loss,
        make_optimizer, {} if config.optimization_level is None else {"optimization_level": config.optimization_level},
    )  # fmt: skip
    _announce(config, job, length)
    try:
        job, numbers = preflight.largest_that_fits(job, sizes, lambda job: _at_depth(config, job, preflight.train_step))
    except Overflow as overflow:
        raise UserError(_too_large(overflow, job)) from None
    result = {
        "config": to_json(config),
        "chips": mesh.size,
        "device": where.chip.kind,
        "accelerator": where.accelerator,
        "mesh": dict(mesh.shape),
        "micro_batch": job.micro_batch,
        "accumulate": job.accumulate,
        "steps": length.steps,
        "tokens_per_step": job.tokens_per_step,
        "measured_of_the_program": numbers,
        "estimated": (estimated := preflight.estimate(job, numbers)),
        "run": _run(config, job, length, estimated),
    }
    _show(result, job)
    if config.decode_rows:
        decoding = _at_depth(config, job, lambda job: preflight.decode_step(job, config.decode_rows))
        result["decode"] = decoding
        _show_decode(decoding, config.decode_rows, where.chip)
    print(
        "\nMeasured: memory, FLOPs, bytes sent, by compiling. Estimated: everything in seconds, from XLA's cycles and "
        f"rooflines.\nMFU {preflight.known_errors()}. No TPU ran any of this: docs/tpu.md."
    )
    if config.out is not None:
        write_json(config.out, result)
    return result


def _at_depth(config: Config, job: Job, measure: Callable[[Job], Numbers]) -> Numbers:
    """A program's numbers, compiled as it is or from two shallow ones."""
    if not config.layers:
        return measure(job)
    shallow = {count: measure(replace(job, cfg=replace(_nanochat(job), n_layer=count))) for count in config.layers}
    numbers = preflight.extrapolate(shallow, job.cfg.n_layer)
    needed, limit = numbers["memory_gib"]["all"], job.slice.chip.memory_gib
    if needed > limit:
        raise Overflow(job.micro_batch, needed, limit)
    return numbers


def _nanochat(job: Job) -> ModelConfig:
    assert isinstance(job.cfg, ModelConfig)
    return job.cfg


def _run(config: Config, job: Job, length: Horizon, estimated: Numbers) -> dict[str, float]:
    """The whole run, by the predicted step."""
    price = job.slice.chip.dollars_per_hour if config.dollars_per_chip_hour is None else config.dollars_per_chip_hour
    hours = length.steps * estimated["step_seconds"]["predicted"] / 3600
    return {"hours": hours, "dollars_per_chip_hour": price, "dollars": hours * job.mesh.size * price}


def _too_large(overflow: Overflow, job: Job) -> str:
    """What is missing, and what would fit."""
    state_gib, mesh = preflight.state_gib(job), job.mesh
    remedies = []
    if (rows := overflow.fitting_rows(state_gib)) >= 1:
        remedies.append(f"about --micro-batch {rows} would fit")
    further = [size for size in range(mesh.shape["fsdp"] + 1, mesh.size + 1) if mesh.size % size == 0]
    if further:
        remedies.append(f"--mesh.fsdp {further[0]} cuts the {state_gib:.2f} GiB of parameters and moments further")
    if chips := [name for name, chip in tpu.CHIPS.items() if chip.memory_gib > overflow.needed_gib]:
        remedies.append(f"a chip of {' or '.join(chips)} would hold it as it is")
    return (
        f"{job.cfg.n_layer} layers of width {job.cfg.n_embd} at micro-batch {overflow.micro_batch} need "
        f"{overflow.needed_gib:.2f} GiB of a chip, {job.slice.name} has {overflow.limit_gib:.2f}: "
        + ("; ".join(remedies) or "it takes a larger slice, or a smaller model")
    )


def _announce(config: Config, job: Job, length: Horizon) -> None:
    cfg, mesh = job.cfg, job.mesh
    print(
        f"{config.slices} × {job.slice.name} ({job.slice.accelerator}): {mesh.size} chips, "
        f"data × fsdp × tensor = {' × '.join(str(size) for size in mesh.shape.values())}\n"
        f"model: {cfg.n_layer} layers of width {cfg.n_embd}, {cfg.param_counts()['total']:,} parameters, "
        f"{cfg.flops_per_token():,} FLOPs a token\n"
        f"training: {length.steps:,} steps of {length.batch_tokens:,} tokens"
        + (
            f"; compiling {' and '.join(map(str, config.layers))} layers for a line" if config.layers else "; compiling"
        ),
        flush=True,
    )
    params = job.like().params
    if split := sharding.split_tiles(
        jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), params, sharding.moment_shardings(params)
        )
    ):
        print(
            f"careful: this mesh cuts the moments of {len(split)} matrices through tiles, such as {split[0]}: "
            "the compiler may add up whole matrices to scatter and to gather them",
            flush=True,
        )


def _show(result: dict[str, Any], job: Job) -> None:
    numbers, estimated, run = result["measured_of_the_program"], result["estimated"], result["run"]
    chip, memory = job.slice.chip, numbers["memory_gib"]
    print(f"compiled in {numbers['compile_seconds']:.0f} s: micro-batch {job.micro_batch} × {job.accumulate} a step\n")
    print(f"memory of a chip, GiB (limit {chip.memory_gib})")
    for name, gib in memory.items():
        print(f"  {name:38}{gib:9.2f}")
    print("\ncomputation, share of its estimated time")
    for kind, share in sorted(estimated["share_of_compute"].items(), key=lambda item: -item[1]):
        print(f"  {kind:38}{100 * share:8.1f} %")
    if numbers["rematerialized_seconds"]:
        again = numbers["rematerialized_seconds"] / estimated["step_seconds"]["ceiling"]
        print(f"  {'of it computed anew, to save memory':38}{100 * again:8.1f} %")
    for operation, count in numbers["without_estimate"].items():
        print(f"  {operation:38}{'no estimate':>11}: {count:.0f} operations")
    print("\ncommunication of a chip and step       count        MiB   milliseconds")
    for kind, moved in numbers["communication"].items():
        print(f"  {kind:34}{moved['count']:9.0f}{moved['bytes'] / 2**20:11.1f}{1e3 * moved['seconds']:15.2f}")
    waiting = numbers["waiting_seconds"] / estimated["step_seconds"]["predicted"]
    print(f"  waited for, hidden behind no computation: {100 * waiting:.1f} % of the step")
    print(f"\nFLOPs of products, to the formula's {100 * estimated['program_flops_to_model_flops']:>10.1f} %")
    print("estimated                     step, ms      MFU")
    for name, seconds in estimated["step_seconds"].items():
        print(f"  {name:24}{1e3 * seconds:12.1f}{100 * estimated['mfu'][name]:8.1f} %")
    print(
        f"{estimated['tokens_per_second']:,.0f} tokens/s; {result['steps']:,} steps in {run['hours']:.2f} hours, "
        f"${run['dollars']:,.0f} at ${run['dollars_per_chip_hour']:.2f} a chip and hour"
    )


def _show_decode(numbers: Numbers, rows: int, chip: tpu.Chip) -> None:
    memory = numbers["memory_gib"]
    read = memory["parameters"] * preflight.GIB / chip.memory_bytes_per_second
    step = max(numbers["elapsed_seconds"], read)
    print(
        f"\ngeneration, {rows} rows, parameters as in training: {memory['all']:.2f} GiB a chip; a token of each row "
        f"takes about {1e3 * step:.2f} ms"
    )


if __name__ == "__main__":
    cli.run(main, Config)
