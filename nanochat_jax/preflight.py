"""Compile a training run ahead of time for TPUs that are not there: does it fit, and how fast could it be.

Compiled is what would be trained: the same step, optimizer, mesh and kernels. Memory, FLOPs, XLA's cycles and what the
devices send each other are read off the program. Seconds are estimates: XLA's cycles by the clock of the chip, Pallas
kernels and communication by rooflines. No chip has run anything here.
"""

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanochat_jax import generate, hlo, model, sharding, splash, state
from nanochat_jax.config import Architecture
from nanochat_jax.layers import Compute
from nanochat_jax.sharding import BATCH_AXES
from nanochat_jax.tpu import Slice

COMPUTE = Compute("bfloat16", "splash")
# Assumed of the splash kernels, whose cycles XLA does not estimate: this share of the peak, and a time for each block.
KERNEL_EFFICIENCY = 0.5
BLOCK_SECONDS = 0.35e-6
PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}  # of matrices, by kernel, for each block that is not skipped
SLICE_LINK_BYTES_PER_SECOND = 6.25e9  # of a chip, over the network between slices
# Runs of other ports whose MFU is public: as measured, and as estimated here by python -m tests.public_figures.
PUBLIC_FIGURES = {"164 M parameters on one v6e": (0.483, 0.382), "depth 24 on v6e-8": (0.237, 0.334)}
GIB = 2**30

Numbers = dict[str, Any]  # nested; leaves are numbers that grow by the layer


@dataclass(frozen=True)
class Overflow(Exception):
    """The compiler found no way to fit a program into a chip's memory."""

    micro_batch: int
    needed_gib: float
    limit_gib: float

    def fitting_rows(self, fixed_gib: float) -> int:
        """Rows at a time that would fit, if all but so much memory grew with them; below 1 where none would."""
        return int(self.micro_batch * (self.limit_gib - fixed_gib) / (self.needed_gib - fixed_gib))


@dataclass(frozen=True)
class Job:
    """What is compiled: a model on a mesh over slices, and how many rows at a time."""

    cfg: Architecture
    slice: Slice
    mesh: Mesh
    micro_batch: int  # rows that one device computes at a time
    accumulate: int  # micro-batches of a step
    make_loss: Callable[[Architecture, Compute], state.LossFn]
    make_optimizer: Callable[[Any], optax.GradientTransformation]
    options: dict[str, Any]  # of the compiler

    @property
    def tokens_per_step(self) -> int:
        rows = self.micro_batch * self.accumulate * sharding.batch_devices(self.mesh)
        return rows * self.cfg.sequence_len

    def like(self) -> state.TrainState:
        init = partial(model.init_params, cfg=self.cfg, compute=COMPUTE)
        return state.abstract_state(init, self.make_optimizer(self.cfg), model.logical_axes(self.cfg), self.mesh)


def train_step(job: Job) -> Numbers:
    """Compile the train step, and read what it needs and does.

    Raises:
        Overflow: it does not fit.
    """
    like = job.like()
    loss_fn, tx = job.make_loss(job.cfg, COMPUTE), job.make_optimizer(job.cfg)
    step = state.make_train_step(loss_fn, tx, like, seed=0, gather_dtype=COMPUTE.dtype)
    rows = job.micro_batch * sharding.batch_devices(job.mesh)
    shape = (job.accumulate, rows, job.cfg.sequence_len)
    cut = NamedSharding(job.mesh, PartitionSpec(None, BATCH_AXES))
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=cut)
    compiled, seconds = _compile(step.lower(like, {"tokens": tokens, "targets": tokens}), job)
    done = hlo.read(compiled.as_text() or "", _rates(job))
    return {
        "compile_seconds": seconds,
        "memory_gib": {
            "parameters": _gib_of_a_device(like.params),
            "optimizer": _gib_of_a_device(like.opt_state),
            **_memory(compiled, arguments=like),
        },
        **_numbers(done),
        "attention_flops": attention_flops(job.cfg, job.micro_batch) * job.accumulate / job.mesh.shape["tensor"],
    }


def decode_step(job: Job, rows: int) -> Numbers:
    """Compile generation as training's samples use it: parameters lie as in training; a step gives each row a token."""
    cfg, whole = job.cfg, sharding.replicated(job.mesh)

    def on_mesh[T](tree: T) -> T:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)

    slots = on_mesh(jax.eval_shape(lambda: generate.empty_slots(rows, cfg, COMPUTE, cfg.sequence_len)))
    forced_BT = jax.ShapeDtypeStruct((rows, cfg.sequence_len // 2), jnp.int32, sharding=whole)
    limits_B = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=whole)
    decode = jax.jit(partial(generate.decode, cfg=cfg, compute=COMPUTE), donate_argnums=1)
    like = job.like().params
    compiled, seconds = _compile(decode.lower(like, slots, forced_BT, limits_B), job)
    once = hlo.loop_body(compiled.as_text() or "", _rates(job))
    memory = {"parameters": _gib_of_a_device(like), **_memory(compiled, arguments=like)}
    return {"compile_seconds": seconds, "memory_gib": memory, **_numbers(once)}


def attention_flops(cfg: Architecture, rows: int) -> float:
    """What the splash kernels compute for some rows, forward and backward."""
    area = sum(splash.computed_area(cfg.sequence_len, spec.window) for spec in cfg.layer_specs())
    return 2.0 * sum(PRODUCTS.values()) * rows * cfg.n_head * cfg.head_dim * area


def extrapolate(at: dict[int, Numbers], layers: int) -> Numbers:
    """Numbers of a deep model on the line through those of two shallow ones of its width."""
    (few, low), (many, high) = sorted(at.items())
    share = (layers - few) / (many - few)

    def line(a: Any, b: Any) -> Any:
        if isinstance(b, dict):
            return {name: line(a.get(name, 0), value) for name, value in b.items()}
        return a + share * (b - a)

    return line(low, high)


def largest_that_fits(job: Job, candidates: list[int], compiles: Callable[[Job], Numbers]) -> tuple[Job, Numbers]:
    """The first of the micro-batches, largest first, whose program fits; what is missing says how many to pass over.

    Raises:
        Overflow: not even the smallest fits.
    """
    rows = job.micro_batch * job.accumulate
    fixed_gib = state_gib(job)
    while True:
        job = replace(job, micro_batch=candidates[0], accumulate=rows // candidates[0])
        try:
            return job, compiles(job)
        except Overflow as overflow:
            if len(candidates) == 1:
                raise
            most = overflow.fitting_rows(fixed_gib)
            candidates = [size for size in candidates[1:] if size <= most] or candidates[-1:]


def estimate(job: Job, numbers: Numbers) -> Numbers:
    """Seconds of a step, model-FLOPs utilisation and rates that follow from a program's numbers."""
    chip, devices = job.slice.chip, job.mesh.size
    model_flops = job.tokens_per_step * job.cfg.flops_per_token() / devices
    compute = sum(numbers["seconds"].values())
    everything = compute + sum(moved["seconds"] for moved in numbers["communication"].values())
    step = {"ceiling": compute, "predicted": numbers["elapsed_seconds"], "nothing hidden": everything}
    return {
        "model_tflops_per_device": model_flops / 1e12,
        "step_seconds": step,
        "mfu": {name: model_flops / chip.peak_flops / seconds for name, seconds in step.items()},
        "tokens_per_second": job.tokens_per_step / step["predicted"],
        "share_of_compute": {kind: seconds / compute for kind, seconds in numbers["seconds"].items()},
        "outside_matrix_products": 1
        - (numbers["seconds"]["matrix products"] + numbers["seconds"].get("attention", 0)) / compute,
        "program_flops_to_model_flops": (numbers["matrix_flops"] + numbers["attention_flops"]) / model_flops,
    }


def known_errors() -> str:
    """How far off estimates were, in words."""
    errors = (f"{estimated / measured - 1:+.0%} ({run})" for run, (measured, estimated) in PUBLIC_FIGURES.items())
    return f"of runs whose speed is public, it was off by {', '.join(errors)}"


def state_gib(job: Job) -> float:
    """Parameters and moments of a chip."""
    return _gib_of_a_device(job.like())


def _compile(lowered: jax.stages.Lowered, job: Job) -> tuple[jax.stages.Compiled, float]:
    start = time.perf_counter()
    cached = jax.config.jax_enable_compilation_cache
    _use_compilation_cache(False)  # it cannot hold programs for devices that are not there
    try:
        return lowered.compile(compiler_options=job.options), time.perf_counter() - start
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        size = r"\(?([\d.]+)([KMGT])\)?"
        used = re.search(rf"Used {size} of {size} hbm|temporaries {size} exceeds available HBM {size}", str(error))
        if used is None:
            raise
        scale = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2**10}
        number, unit, limit_number, limit_unit = [group for group in used.groups() if group]
        needed, limit = float(number) * scale[unit], float(limit_number) * scale[limit_unit]
        raise Overflow(job.micro_batch, needed, limit) from error
    finally:
        _use_compilation_cache(cached)


def _use_compilation_cache(used: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", used)
    compilation_cache.reset_cache()  # jax asks only once


def _memory(compiled: jax.stages.Compiled, arguments: Any) -> dict[str, float]:
    found = compiled.memory_analysis()
    assert found is not None
    inputs = found.argument_size_in_bytes / GIB
    results = (found.output_size_in_bytes - found.alias_size_in_bytes) / GIB
    temporary, program = found.temp_size_in_bytes / GIB, found.generated_code_size_in_bytes / GIB
    return {
        "other arguments and results": inputs - _gib_of_a_device(arguments) + results,
        "activations, gradients and the like": temporary,
        "program": program,
        "all": inputs + results + temporary + program,
    }


def _gib_of_a_device(tree: Any) -> float:
    return sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)) / GIB


def _numbers(done: hlo.Execution) -> Numbers:
    return {
        "elapsed_seconds": done.seconds,
        "waiting_seconds": done.waiting_seconds,
        "seconds": dict(done.kinds),
        "rematerialized_seconds": done.rematerialized_seconds,
        "communication": {kind: asdict(moved) for kind, moved in done.traffic.items()},
        "matrix_flops": done.matrix_flops,
        "without_estimate": dict(done.without_estimate),
    }


def _rates(job: Job) -> hlo.Rates:
    chip, mesh, cfg = job.slice.chip, job.mesh, job.cfg
    T, windows = cfg.sequence_len, [spec.window for spec in cfg.layer_specs()]

    def kernel_seconds(name: str, elements: int) -> float:
        """Of an average layer; elements are those of the last result, (rows, heads, T, head_dim)."""
        products = next((count for phase, count in PRODUCTS.items() if phase in name), 2)
        rows = elements / (T * cfg.head_dim * (cfg.n_kv_head if "dkv" in name else cfg.n_head))
        seconds = 0.0
        for window in windows:
            blocks = T // splash.block_size(T, window)
            steps = blocks * min(blocks, 1 + -(-window * blocks // T))
            flops = 2.0 * products * cfg.head_dim * splash.computed_area(T, window)
            seconds += flops / (KERNEL_EFFICIENCY * chip.peak_flops) + steps * BLOCK_SECONDS
        return rows * cfg.n_head * seconds / len(windows)

    def link_bytes_per_second(axes: frozenset[str]) -> float:
        names = axes or frozenset(mesh.axis_names)
        group = mesh.devices[tuple(slice(None) if name in names else 0 for name in mesh.axis_names)].flatten()
        if len({getattr(device, "slice_index", 0) for device in group}) > 1:
            return SLICE_LINK_BYTES_PER_SECOND
        return job.slice.link_bytes_per_second(list(group))

    return hlo.Rates(
        chip.clock_hz, kernel_seconds, chip.memory_bytes_per_second, link_bytes_per_second, dict(mesh.shape)
    )
