"""The parts of train.bench that measure the training step: by itself, on more and more devices, and of what depth."""

import gc
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from nanochat_jax import hlo, memory, optim, sharding, state
from nanochat_jax.capacity import training_bytes
from nanochat_jax.config import Horizon, ModelConfig, OptimConfig, to_json
from nanochat_jax.data.batches import Batch
from nanochat_jax.errors import UserError
from nanochat_jax.gradients import make_gradients
from nanochat_jax.hosts import is_first
from nanochat_jax.layers import Compute
from nanochat_jax.memory import in_words
from nanochat_jax.metrics import peak_flops
from nanochat_jax.model import Params
from nanochat_jax.profile import kernels_by_time
from nanochat_jax.sharding import MeshConfig
from train.pretrain import ModelArgs, language_model_loss
from train.start import abstract_state, fresh
from train.timing import Device, device_rates, seconds_per_call


@dataclass(frozen=True)
class Train:
    """The training step: forward and backward of one micro-batch, the optimizer, and both."""

    model: ModelArgs = field(default_factory=ModelArgs)
    batch: int = 32
    """Rows that one device computes at a time."""
    accumulate: int = 1
    """Micro-batches of a whole step."""
    sequence_len: int = 2048
    vocab_size: int = 32768
    mesh: MeshConfig = field(default_factory=MeshConfig)
    device: Device = field(default_factory=Device)


@dataclass(frozen=True)
class Scaling(Train):
    """The whole training step on more and more devices, with as many rows on each; an axis of -1 grows with them."""

    devices: tuple[int, ...] = ()
    """How many devices, one after the other; default: 1, 2, 4, … up to all."""


@dataclass(frozen=True)
class Deepest(Train):
    """The deepest model that trains on these devices, parameters cut over all of them: it really makes a step."""

    batch: int = 1
    """Rows that one device computes at a time."""
    stride: int = 2
    """Depths tried are multiples of it."""
    memory_gib: float | None = None
    """Memory of a device to plan for, in GiB; default: what is usable of it."""


class Work(NamedTuple):
    """A model, and how it is trained on a mesh."""

    cfg: ModelConfig
    compute: Compute
    mesh: jax.sharding.Mesh
    tx: optax.GradientTransformation
    like: state.TrainState
    rows: int  # of a step
    accumulate: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.rows * self.cfg.sequence_len

    @property
    def flops(self) -> float:
        """Of a step, on each device."""
        return self.tokens * self.cfg.flops_per_token() / self.mesh.size

    def loss(self) -> state.LossFn:
        return language_model_loss(self.cfg, self.compute)

    def step(self) -> jax.stages.Wrapped:
        return state.make_train_step(self.loss(), self.tx, self.like, 0, self.compute.dtype)

    def start(self) -> state.TrainState:
        return fresh(self.cfg, self.compute, self.tx, seed=0)(self.like)

    def batch(self) -> dict[str, jax.Array]:
        rows = random_batch(self.rows // sharding.host_share(self.mesh).process_count, self.cfg)
        return sharding.put_batch(self.mesh, rows, self.accumulate)


def lay_out(config: Train, devices: Sequence[jax.Device]) -> Work:
    """What a config asks for, on these devices."""
    compute = config.model.training_compute(config.device.compute.resolve())
    cfg = config.model.architecture(config.vocab_size, config.sequence_len)
    mesh = sharding.make_mesh(config.mesh, devices)
    rows = config.batch * config.accumulate * sharding.batch_devices(mesh)
    tokens = rows * cfg.sequence_len
    tx = optim.make_optimizer(cfg, Horizon(1000, tokens, 1000 * tokens, 1.0, 0.1), OptimConfig(), compute.dtype)
    return Work(cfg, compute, mesh, tx, abstract_state(cfg, compute, tx, mesh), rows, config.accumulate)


def random_batch(rows: int, cfg: ModelConfig) -> Batch:
    """Tokens without any order."""
    tokens = np.random.default_rng(jax.process_index()).integers(0, cfg.vocab_size, (rows, cfg.sequence_len + 1))
    return {"tokens": tokens[:, :-1].astype(np.int32), "targets": tokens[:, 1:].astype(np.int32)}


def bench_train(config: Train) -> dict[str, Any]:
    """Measure the training step on all devices."""
    work = lay_out(config, jax.devices())
    train_state, batch = work.start(), work.batch()
    micro = jax.tree.map(lambda x: x[:1], batch)
    gradients = state.jit_for_training(make_gradients(work.loss(), work.like.params, work.compute.dtype), work.like)
    _, grads = gradients(train_state.params, micro, jax.random.key(0))
    update = state.make_update(work.tx, work.like)

    def apply(now: state.TrainState, grads: Params) -> state.TrainState:
        params, opt_state, _ = update(grads, now.params, now.opt_state)
        return state.TrainState(now.step + 1, params, opt_state)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, work.like)
    optimizer = state.jit_for_training(apply, work.like, donate_argnums=0, out_shardings=shardings)

    def optimize() -> jax.Array:
        nonlocal train_state
        train_state = optimizer(train_state, grads)
        return train_state.step

    times = {
        "forward_backward": seconds_per_call(
            lambda: gradients(train_state.params, micro, jax.random.key(0)), config.device
        ),
        "optimizer": seconds_per_call(optimize, config.device),
    }
    step = measure_step(work, train_state, batch, config.device)
    peak, source = peak_flops(work.compute.dtype)
    micro_flops, seconds = work.flops / work.accumulate, times["forward_backward"]
    return {
        "milliseconds": {name: round(1e3 * value, 3) for name, value in times.items()}
        | {"step": step.pop("milliseconds")},
        "tokens_per_second": {
            "forward_backward": work.tokens / work.accumulate / seconds,
            "step": step.pop("tokens_per_second"),
        },
        "mfu": {"forward_backward": micro_flops / seconds / peak, "step": step.pop("mfu")},
        "peak_flops": [peak, source],
        "floor_milliseconds": floor(step.pop("bytes_accessed"), work.compute, work.flops),
        "parameters": work.cfg.param_counts()["total"],
        **step,
    }


def measure_step(
    work: Work, train_state: state.TrainState, batch: dict[str, jax.Array], device: Device
) -> dict[str, Any]:
    """Time whole steps, and count what devices say to each other in one; the state's buffers are used up."""
    start = time.perf_counter()
    compiled = work.step().lower(work.like, batch).compile()
    compile_seconds = time.perf_counter() - start

    def step() -> jax.Array:
        nonlocal train_state
        train_state, metrics = compiled(train_state, batch)
        return metrics.loss

    seconds = seconds_per_call(step, device)
    sizes = dict(work.mesh.shape)
    said = hlo.read(compiled.as_text() or "", hlo.Rates(1.0, lambda *_: 0.0, 1.0, lambda _: 1.0, sizes)).traffic
    stats = jax.local_devices()[0].memory_stats() or {}
    measured = {
        "milliseconds": round(1e3 * seconds, 3),
        "tokens_per_second": work.tokens / seconds,
        "mfu": work.flops / seconds / peak_flops(work.compute.dtype)[0],
        "peak_memory_gib": stats.get("peak_bytes_in_use", 0) / 2**30,  # since the process began
        "sent_mib": {kind: round(moved.bytes / 2**20, 3) for kind, moved in said.items()},  # by each device
        "compile_seconds": compile_seconds,
        "bytes_accessed": (compiled.cost_analysis() or {}).get("bytes accessed", 0),
    }
    if device.profile:
        with jax.profiler.trace(str(device.profile)):
            for _ in range(3):
                loss = step()
            jax.block_until_ready(loss)
        measured["kernels"] = kernels_by_time(device.profile, calls=3)
    return measured


def floor(bytes_accessed: float, compute: Compute, flops: float) -> dict[str, float]:
    """Milliseconds that a step's FLOPs and bytes would take alone, at rates measured on this device.

    The FLOPs are the model's by formula, since XLA does not count those of libraries; bytes are XLA's own count over
    its kernels, so that what it fused well is not in them.
    """
    matrix_rate, copy_rate = device_rates(compute.dtype)
    return {
        "matrix_products": 1e3 * flops / matrix_rate,
        "memory": 1e3 * bytes_accessed / copy_rate,
        "matrix_tflops_per_second": matrix_rate / 1e12,
        "copy_gb_per_second": copy_rate / 1e9,
    }


def bench_scaling(config: Scaling) -> dict[str, Any]:
    """Measure the whole step on the first so many devices, against so many times the speed of the first measurement."""
    every = jax.devices()
    counts = config.devices or tuple(takewhile(lambda n: n <= len(every), (2**i for i in range(32))))
    if max(counts) > len(every) or min(counts) < 1:
        raise UserError(f"--devices {' '.join(map(str, counts))}: there are {len(every)}")
    if jax.process_count() > 1 and set(counts) != {len(every)}:
        raise UserError(f"several processes measure all their devices: --devices {len(every)}; one process, any number")
    measured: dict[str, Any] = {}
    for count in counts:
        work = lay_out(config, every[:count])
        measured[str(count)] = found = measure_step(work, work.start(), work.batch(), config.device)
        found["mesh"] = dict(work.mesh.shape)
        first = measured[str(counts[0])]
        found["efficiency"] = found["tokens_per_second"] / count / (first["tokens_per_second"] / counts[0])
        del work
        gc.collect()  # the next one wants the memory
    return {"by_devices": measured}


def bench_deepest(config: Deepest) -> dict[str, Any]:
    """Find the deepest model of which a step runs: from the depth that should fit, up or down.

    Depths estimated to need a tenth more than there is are not tried: on GPUs the estimate falls short by 2 to 9 %.
    """
    devices = jax.devices()
    tensor = max(1, config.mesh.tensor)
    mesh = MeshConfig(data=1, fsdp=len(devices) // tensor, tensor=tensor)
    limit = memory.usable_bytes(devices[0]) if config.memory_gib is None else config.memory_gib * 2**30

    def at(depth: int) -> Train:
        return replace(config, mesh=mesh, model=replace(config.model, depth=depth))

    def should_fit(depth: int, share: float = 1.0) -> bool:
        work = lay_out(at(depth), devices)
        row = memory.activation_bytes(work.cfg, work.compute, work.cfg.sequence_len)
        return share * (training_bytes(work.like) + config.batch * row) <= limit

    def say(text: str) -> None:
        if is_first():
            print(text, file=sys.stderr)

    def trained(depth: int) -> dict[str, Any] | None:
        say(f"depth {depth}: compiling, which takes minutes for the deepest")
        work = lay_out(at(depth), devices)
        try:
            compiled = work.step().lower(work.like, work.batch()).compile()
            needed = float(memory.program_bytes(compiled))
            if needed <= limit:
                _, metrics = compiled(work.start(), work.batch())
                loss = float(metrics.loss)
        except jax.errors.JaxRuntimeError as error:
            if not memory.is_exhausted(error):
                raise
            needed = math.inf
        finally:
            gc.collect()
        fits = "trains" if needed <= limit else "does not fit"
        say(f"depth {depth}: {in_words(needed)} of {in_words(limit)} a device: {fits}")
        if needed > limit:
            return None
        parameters = work.cfg.param_counts()["total"]
        return {"depth": depth, "parameters": parameters, "gib_a_device": needed / 2**30, "loss": loss}

    depth = stride = config.stride
    while should_fit(depth + stride):
        depth += stride
    best = trained(depth)
    while best and should_fit(depth + stride, share=0.9) and (found := trained(depth + stride)):
        best, depth = found, depth + stride
    while not best and depth > stride:
        depth -= stride
        best = trained(depth)
    if best is None:
        raise UserError(f"not even depth {stride} fits {in_words(limit)}: a shorter --sequence-len needs less")
    return {"deepest": best, "mesh": to_json(mesh), "usable_gib": limit / 2**30}
