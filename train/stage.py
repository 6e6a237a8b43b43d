"""What every training stage does around its loss: open the run folder, resume, fit, save."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import jax
import optax

from nanochat_jax import hosts, sharding, state
from nanochat_jax.capacity import choose_mesh
from nanochat_jax.checkpoint import Checkpoint, Checkpoints
from nanochat_jax.config import Architecture, differences, to_json, write_json
from nanochat_jax.data.batches import Batch, Rows, validation_batches
from nanochat_jax.errors import UserError
from nanochat_jax.eval.bpb import make_evaluator
from nanochat_jax.files import as_path, locked
from nanochat_jax.layers import Compute, default_compute
from nanochat_jax.loop import Hook, StopSignal, Units, fit
from nanochat_jax.memory import explained
from nanochat_jax.metrics import MetricsLog, NoLog, peak_flops
from nanochat_jax.sharding import HostShare, MeshConfig
from nanochat_jax.tokenizer import Tokenizer
from train.microbatch import SPREAD, MicroBatch, Sized, micro_rows, size_step, unsized
from train.start import Start, abstract_state


def at_least(flag: str, value: int | None, least: int) -> None:
    """UserError for a number below what makes sense."""
    if value is not None and value < least:
        raise UserError(f"--{flag} {value} must be at least {least}")


@dataclass(frozen=True)
class ComputeConfig:
    """How to compute; auto is what suits the device."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations and of the token and value embeddings."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention kernel: cudnn needs an NVIDIA GPU of Ampere's generation or newer, splash a TPU. With cudnn go the
    kernels for norms, RoPE and sampling."""

    deterministic: bool = False
    """Bitwise the same result each time on a GPU too, at the cost of speed; a CPU always is."""

    def resolve(self) -> Compute:
        """What to compute with; must come before the first use of a device, which reads the flag set here."""
        flags, repeatable = os.environ.get("XLA_FLAGS", ""), "--xla_gpu_deterministic_ops=true"
        if self.deterministic and repeatable not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {repeatable}".strip()
        chosen = default_compute()
        dtype = chosen.dtype if self.dtype == "auto" else self.dtype
        if jax.devices()[0].platform == "gpu" and dtype == "bfloat16" and chosen.dtype != dtype:
            raise UserError("compute: dtype=bfloat16 wants an NVIDIA GPU of Ampere's generation or newer; use float32")
        # cuDNN's attention takes no float32, and its backward pass adds up in any order.
        without_cudnn = dtype == "float32" or self.deterministic
        if self.attention == "cudnn" and without_cudnn:
            raise UserError(f"compute: attention=cudnn goes neither with dtype={dtype} nor with deterministic; use xla")
        if self.attention == "splash" and jax.default_backend() != "tpu":
            raise UserError("compute: attention=splash needs a TPU; leave it out for what suits the device")
        if self.attention != "auto":
            return Compute(dtype, self.attention)
        return Compute(dtype, "xla" if without_cudnn and chosen.attention == "cudnn" else chosen.attention)


@dataclass(frozen=True)
class RunConfig:
    """Where a run lies, how it is computed and looked after: its result depends on this by rounding alone.

    With dropout, the micro-batch also decides which units are dropped.
    """

    out: Path
    """Folder of the run: config.json, metrics.jsonl, tensorboard/ and checkpoints/ go here."""
    micro_batch: MicroBatch = "auto"
    """Rows that one device computes at a time; auto finds the most that fit its memory."""
    memory_gib: float | None = None
    """Memory of a device to plan for, in GiB; default: what is usable of it."""
    eval_every: int = 250
    """Steps between two measurements on what is held out; 0 for the end only."""
    sample_every: int = 0
    """Steps between two looks at samples; 0 for the end only."""
    save_every: int = 500
    """Steps between two checkpoints; 0 for the end only."""
    keep_newest: int = 2
    """Checkpoints kept beside the best one."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest good checkpoint in the folder; never starts anew."""
    wandb: str = ""
    """Log to this Weights & Biases project too."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        for name in ("eval_every", "sample_every", "save_every"):
            at_least(f"run.{name.replace('_', '-')}", getattr(self, name), 0)
        if self.micro_batch != "auto":
            at_least("run.micro-batch", self.micro_batch, 1)
        at_least("run.keep-newest", self.keep_newest, 1)


# (state, what to try) → (rows to learn from, what to log of them)
Rollout = Callable[[state.TrainState, Batch], tuple[Batch, dict[str, float]]]


@dataclass(frozen=True)
class Stage:
    """One training stage: what it trains, on what, towards what.

    `recipe` is all that determines the result: a checkpoint made by another recipe is not gone on from.
    """

    name: str
    recipe: dict[str, Any]
    cfg: Architecture
    tokenizer: Tokenizer
    tx: optax.GradientTransformation
    start: Start
    loss_fn: state.LossFn
    # From a step on, a host's share of them, without end; {} while the next one is waited for.
    batches: Callable[[int, HostShare], Iterator[Batch]]
    steps: int
    rows_per_step: int
    seed: int
    compute: Compute
    # Before a checkpoint is saved, which keeps what they find: the mesh, and rows that it computes at a time → hooks.
    measure: Callable[[jax.sharding.Mesh, int], list[Hook]]
    look: list[Hook]  # after it
    row: Batch | None = None  # one that is learnt from, for its shapes, if all have the same
    rollout: Rollout | None = None  # turns what `batches` gives into what is learnt from; no rates are logged then


def stage_mesh(
    run: RunConfig, cfg: Architecture, compute: Compute, tx: optax.GradientTransformation, rows_per_step: int
) -> jax.sharding.Mesh:
    """The mesh that is asked for, or that fits; see choose_mesh."""
    return choose_mesh(run.mesh, cfg, rows_per_step, lambda mesh: abstract_state(cfg, compute, tx, mesh))


def run_stage(stage: Stage, run: RunConfig, command: Any) -> tuple[state.TrainState, jax.sharding.Mesh]:
    """Train a stage to its end, going on from where an earlier run of it stopped.

    Args:
        stage: what to train.
        run: where and how.
        command: the stage's whole config, for config.json.

    Returns:
        The final state and the mesh that it lies on.
    """
    recipe, out = to_json(stage.recipe), as_path(run.out)
    hosts.agree(config=command, recipe=recipe, tokenizer=stage.tokenizer.sha256)
    mesh = stage_mesh(run, stage.cfg, stage.compute, stage.tx, stage.rows_per_step)
    micro_rows(stage.rows_per_step, run.micro_batch, mesh)  # if it cannot be shared, say so before anything is done
    like = abstract_state(stage.cfg, stage.compute, stage.tx, mesh)
    with (
        sharding.on(mesh),
        hosts.first_holds(locked(out)),
        explained(SPREAD),
        StopSignal().listening() as stop,  # the outer one: a signal must not cut the last save short
        Checkpoints(out / "checkpoints", keep_newest=run.keep_newest) as checkpoints,
    ):
        if run.resume == "never":
            hosts.first(lambda: checkpoints.set_aside(checkpoints.steps()))
        train_state = _restore(checkpoints, like, recipe)
        if train_state is None:
            train_state = stage.start(like)
        start = int(train_state.step)
        if start >= stage.steps:
            print(f"{run.out} is at step {start:,} already, and done")
            return train_state, mesh
        sized = _size(stage, run, like, mesh)
        command = replace(command, run=replace(run, micro_batch=sized.rows))
        hosts.first(lambda: write_json(out / "config.json", command))
        if not all(hosts.gather((out / "config.json").exists())):
            raise UserError(f"{run.out} is not the same folder for all processes: it must be shared, or in a bucket")
        measured: dict[int, dict[str, float]] = {}  # by step: a checkpoint claims only what was measured on it

        def remember(hook: Hook) -> Hook:
            def run_hook(step: int, train_state: state.TrainState) -> dict[str, float]:
                values = hook.run(step, train_state)
                measured.setdefault(step, {}).update(values)
                return values

            return replace(hook, run=run_hook)

        def save(step: int, train_state: state.TrainState) -> dict[str, float]:
            meta = {"stage": stage.name, "recipe": recipe, "records": step * stage.rows_per_step}
            tokenizer = stage.tokenizer.to_bytes()
            checkpoints.save(step, train_state, meta=meta, tokenizer=tokenizer, metrics=measured.get(step))
            return {}

        units = None if stage.row is None else _units(stage, stage.row)
        wandb = {"project": run.wandb, "name": run.out.name, "config": to_json(command)} if run.wandb else None
        device = mesh.devices.flat[0].device_kind
        print(f"{'going on from' if start else 'starting at'} step {start:,} on {mesh.size} × {device}")
        rows = sized.rows * sharding.batch_devices(mesh)
        train_step, batches = _steps(stage, sized.step, mesh, start, stage.rows_per_step // rows)
        log_of = MetricsLog if hosts.is_first() else NoLog
        with (
            explained(sized.advice),
            log_of(out, step=start or -1, wandb=wandb) as log,  # what is measured at step 0 is measured anew
        ):
            train_state = fit(
                train_state,
                train_step,
                batches,
                steps=stage.steps,
                hooks=[*map(remember, stage.measure(mesh, rows)), Hook(run.save_every, save), *stage.look],
                save=save,
                log=log,
                units=units,
                stop=stop,
            )
    return train_state, mesh


def _units(stage: Stage, row: Batch) -> Units:
    peak, _ = peak_flops(stage.compute.dtype)
    tokens = stage.rows_per_step * row["tokens"].size
    return Units(tokens, tokens * stage.cfg.flops_per_token(), peak * jax.device_count())


def validation_hook(
    every: int,
    rows: Rows,
    batch_size: int,
    *,
    limit: int,
    model: tuple[Architecture, Tokenizer, Compute],
    mesh: jax.sharding.Mesh,
) -> Hook:
    """Bits per byte of held-out rows (`limit` of them; 0 for all), in batches of as many as a micro-batch has."""
    cfg, tokenizer, compute = model
    evaluate = make_evaluator(cfg, tokenizer.byte_lengths, compute, mesh)

    def run(step: int, train_state: state.TrainState) -> dict[str, float]:
        some = validation_batches(rows, batch_size, limit=limit, **sharding.host_share(mesh)._asdict())
        measured = evaluate(train_state.params, (sharding.put_batch(mesh, batch) for batch in some))
        return {"val_bpb": measured.bpb, "val_loss": measured.loss}

    return Hook(every, run)


def _size(stage: Stage, run: RunConfig, like: state.TrainState, mesh: jax.sharding.Mesh) -> Sized:
    """The train step, with micro-batches that fit."""
    train_step = state.make_train_step(stage.loss_fn, stage.tx, like, stage.seed, stage.compute.dtype)
    if stage.row is None:
        return unsized(train_step, micro_rows(stage.rows_per_step, run.micro_batch, mesh))
    return size_step(
        train_step, like, stage.row, stage.rows_per_step, run.micro_batch, mesh,
        model=(stage.cfg, stage.compute), memory_gib=run.memory_gib,
    )  # fmt: skip


def _steps(
    stage: Stage, train_step: Callable[..., Any], mesh: jax.sharding.Mesh, start: int, accumulate: int
) -> tuple[Callable[..., tuple[state.TrainState, state.StepMetrics]], Iterator[Any]]:
    """The whole step, and what to feed it from a step on."""
    rollout = stage.rollout
    if rollout is None:
        return train_step, _on_device(stage.batches(start, sharding.host_share(mesh)), mesh, accumulate)

    whole = HostShare(0, 1)  # every process asks the same, and answers with the others

    def try_and_learn(train_state: state.TrainState, what: Batch) -> tuple[state.TrainState, state.StepMetrics]:
        rows, means = rollout(train_state, what)
        batch = sharding.put_batch(mesh, sharding.host_rows(mesh, rows), accumulate)
        train_state, metrics = train_step(train_state, batch)
        return train_state, metrics._replace(means={**metrics.means, **means})

    return try_and_learn, stage.batches(start, whole)


def _on_device(batches: Iterator[Batch], mesh: jax.sharding.Mesh, accumulate: int) -> Iterator[state.Batch]:
    """Batches on the mesh, one ahead of what is used, so that transfer overlaps compute; {} as it comes."""
    return (batch for batch, _ in pairwise(sharding.put_batch(mesh, batch, accumulate) for batch in batches))


def _restore(checkpoints: Checkpoints, like: state.TrainState, recipe: dict[str, Any]) -> state.TrainState | None:
    """The newest good state, or None; a checkpoint of another recipe is an error that names the difference."""
    if (newest := checkpoints.peek()) is None:
        return None
    _check_recipe(newest, recipe)  # before the arrays, whose shapes would be a poorer message
    if (restored := checkpoints.restore(like)) is None:
        return None
    train_state, found = restored
    _check_recipe(found, recipe)  # which may be an older one
    return train_state


def _check_recipe(checkpoint: Checkpoint, recipe: dict[str, Any]) -> None:
    if found := list(differences(checkpoint.meta["recipe"], recipe)):
        raise UserError(
            f"{checkpoint.path} is of a run with another configuration:\n  "
            + "\n  ".join(f"{name}: {there} there, {here} here" for name, there, here in found)
            + "\nChoose another --run.out, or --run.resume never to start anew there"
        )
