"""Measure speed: of the training step, and of decoding. Prints JSON, so that anyone can repeat it on their device.

    python -m train.bench train --model.depth 12 --batch 32
    python -m train.bench decode --model.depth 12 --batches 1 8 32 128
    python -m train.bench core --tokenizer runs/demo/tokenizer/tokenizer.model

Times are medians over repeats of several calls each, after warming up. Weights are random, and tokens too but for CORE.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from nanochat_jax import generate, model, optim, sharding, state
from nanochat_jax.config import Horizon, ModelConfig, OptimConfig, from_depth, to_json
from nanochat_jax.data.batches import Batch
from nanochat_jax.gradients import make_gradients
from nanochat_jax.layers import Compute
from nanochat_jax.metrics import peak_flops
from nanochat_jax.profile import kernels_by_time
from nanochat_jax.sampling import Sampling, SamplingArrays
from nanochat_jax.sharding import MeshConfig
from train import cli
from train.bench_core import Core, bench_core
from train.pretrain import ModelArgs, language_model_loss
from train.stage import ComputeConfig, at_least


@dataclass(frozen=True)
class Device:
    """What is measured on, and how often."""

    compute: ComputeConfig = field(default_factory=ComputeConfig)
    calls: int = 10
    """Calls in a repeat, dispatched one behind the other."""
    repeats: int = 3
    """The median of so many is given."""
    profile: Path | None = None
    """Folder for a trace, whose kernels are printed by time."""

    def __post_init__(self) -> None:
        at_least("device.calls", self.calls, 1)
        at_least("device.repeats", self.repeats, 1)


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
class Decode:
    """Generation: time to the first token of a prompt, and time of a step that gives every row a token."""

    model: ModelArgs = field(default_factory=ModelArgs)
    batches: tuple[int, ...] = (1, 8, 32, 128)
    """Rows decoded together, one after the other."""
    prompt: int = 512
    """Tokens of each prompt."""
    new_tokens: int = 128
    """Tokens written behind it."""
    vocab_size: int = 32768
    sequence_len: int = 2048
    device: Device = field(default_factory=Device)


def seconds_per_call(call: Callable[[], Any], device: Device) -> float:
    """Median time of a call, dispatched ahead as in a loop."""
    jax.block_until_ready(call())
    measured = []
    for _ in range(device.repeats):
        start = time.perf_counter()
        for _ in range(device.calls):
            result = call()
        jax.block_until_ready(result)
        measured.append((time.perf_counter() - start) / device.calls)
    return statistics.median(measured)


def architecture(config: Train | Decode) -> ModelConfig:
    return from_depth(
        config.model.depth,
        vocab_size=config.vocab_size,
        sequence_len=config.sequence_len,
        head_dim=config.model.head_dim,
        window_pattern=config.model.window_pattern,
    )


def bench_train(config: Train) -> dict[str, Any]:
    """Measure the training step on a mesh."""
    compute = config.model.training_compute(config.device.compute.resolve())
    cfg = architecture(config)
    mesh = sharding.make_mesh(config.mesh)
    rows = config.batch * config.accumulate * sharding.batch_devices(mesh)
    tokens = rows * cfg.sequence_len
    tx = optim.make_optimizer(cfg, Horizon(1000, tokens, 1000 * tokens, 1.0, 0.1), OptimConfig(), compute.dtype)
    like = state.abstract_state(lambda key: model.init_params(key, cfg, compute), tx, model.logical_axes(cfg), mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    init = jax.jit(lambda key: state.new_state(model.init_params(key, cfg, compute), tx), out_shardings=shardings)
    train_state = init(jax.random.key(0))
    loss_fn = language_model_loss(cfg, compute)
    batch = sharding.put_batch(mesh, random_batch(rows, cfg), config.accumulate)
    micro = jax.tree.map(lambda x: x[:1], batch)

    gradients = jax.jit(make_gradients(loss_fn, like.params, compute.dtype))
    _, grads = gradients(train_state.params, micro, jax.random.key(0))

    update = state.make_update(tx, like)

    def apply(now: state.TrainState, grads: model.Params) -> state.TrainState:
        params, opt_state, _ = update(grads, now.params, now.opt_state)
        return state.TrainState(now.step + 1, params, opt_state)

    optimizer = jax.jit(apply, donate_argnums=0, out_shardings=shardings)
    step = state.make_train_step(loss_fn, tx, like, 0, compute.dtype)
    start = time.perf_counter()
    compiled = step.lower(train_state, batch).compile()
    compile_seconds = time.perf_counter() - start

    def whole() -> jax.Array:
        nonlocal train_state
        train_state, metrics = compiled(train_state, batch)
        return metrics.loss

    def optimize() -> jax.Array:
        nonlocal train_state
        train_state = optimizer(train_state, grads)
        return train_state.step

    times = {
        "forward_backward": seconds_per_call(
            lambda: gradients(train_state.params, micro, jax.random.key(0)), config.device
        ),
        "optimizer": seconds_per_call(optimize, config.device),
        "step": seconds_per_call(whole, config.device),
    }
    peak, source = peak_flops(compute.dtype)
    micro_flops = config.batch * cfg.sequence_len * cfg.flops_per_token()  # of each device
    stats = jax.local_devices()[0].memory_stats() or {}
    result = {
        "milliseconds": {name: round(1e3 * value, 3) for name, value in times.items()},
        "tokens_per_second": {
            "forward_backward": tokens / config.accumulate / times["forward_backward"],
            "step": tokens / times["step"],
        },
        "mfu": {
            "forward_backward": micro_flops / times["forward_backward"] / peak,
            "step": config.accumulate * micro_flops / times["step"] / peak,
        },
        "peak_flops": [peak, source],
        "floor_milliseconds": floor(compiled, compute, config.accumulate * micro_flops),
        "peak_memory_gib": stats.get("peak_bytes_in_use", 0) / 2**30,
        "compile_seconds": compile_seconds,
        "parameters": cfg.param_counts()["total"],
    }
    if config.device.profile:
        with jax.profiler.trace(str(config.device.profile)):
            for _ in range(3):
                loss = whole()
            jax.block_until_ready(loss)
        result["kernels"] = kernels_by_time(config.device.profile, calls=3)
    return result


def random_batch(rows: int, cfg: ModelConfig) -> Batch:
    """Tokens without any order."""
    shape = rows // jax.process_count(), cfg.sequence_len + 1
    tokens = np.random.default_rng(jax.process_index()).integers(0, cfg.vocab_size, shape, np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def device_rates(dtype: str) -> tuple[float, float]:
    """FLOP/s of a large matrix product, and bytes/s of reading and writing, both measured here."""
    is_gpu = jax.default_backend() == "gpu"
    size = 8192 if is_gpu else 1024
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    big = jnp.zeros((2**28 if is_gpu else 2**24,), jnp.float32)
    product, copy, few = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1), Device(calls=5)
    product_seconds = seconds_per_call(lambda: product(x, x), few)
    return 2 * size**3 / product_seconds, 2 * big.nbytes / seconds_per_call(lambda: copy(big), few)


def floor(compiled: jax.stages.Compiled, compute: Compute, flops: float) -> dict[str, float]:
    """Milliseconds that a step's FLOPs and bytes would take alone, at rates measured on this device.

    The FLOPs are the model's by formula, since XLA does not count those of libraries; bytes are XLA's own count over
    its kernels, so that what it fused well is not in them.
    """
    bytes_accessed = (compiled.cost_analysis() or {}).get("bytes accessed", 0)
    matrix_rate, copy_rate = device_rates(compute.dtype)
    return {
        "matrix_products": 1e3 * flops / matrix_rate,
        "memory": 1e3 * bytes_accessed / copy_rate,
        "matrix_tflops_per_second": matrix_rate / 1e12,
        "copy_gb_per_second": copy_rate / 1e9,
    }


def bench_decode(config: Decode) -> dict[str, Any]:
    """Measure prefill and decoding at several batch sizes on one device."""
    compute = config.device.compute.resolve()
    cfg = architecture(config)
    init = jax.jit(lambda key: generate.in_dtype(model.init_params(key, cfg, compute), compute.dtype))
    params = init(jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    weight_bytes = sum(leaf.nbytes for path, leaf in leaves if path[-1].key not in TABLES)
    copy_rate = device_rates(compute.dtype)[1]
    rows = {batch: decode_row(config, cfg, params, batch, weight_bytes, copy_rate) for batch in config.batches}
    return {"by_batch": rows, "weight_gib": weight_bytes / 2**30, "copy_gb_per_second": copy_rate / 1e9}


def decode_row(
    config: Decode, cfg: ModelConfig, params: model.Params, batch: int, weight_bytes: int, copy_rate: float
) -> dict[str, float]:
    """What one batch size takes, beside the time that reading weights and cache once would."""
    compute = config.device.compute.resolve()
    prefill = jax.jit(partial(generate.prefill, cfg=cfg, compute=compute))
    decode = jax.jit(partial(generate.decode, cfg=cfg, compute=compute), donate_argnums=1)
    empty = generate.empty_slots(batch, cfg, compute, cfg.sequence_len)
    prompt_BT = jnp.asarray(random_batch(batch, cfg)["tokens"][:, : config.prompt])
    counts_B = jnp.full(batch, config.prompt, jnp.int32)
    first = seconds_per_call(lambda: prefill(params, empty.rows, prompt_BT, counts_B).logits_BV, config.device)
    how = jax.tree.map(jnp.asarray, SamplingArrays.of([Sampling(temperature=0.8, top_k=50)] * batch))
    slots = empty._replace(rows=prefill(params, empty.rows, prompt_BT, counts_B), how=how)
    forced_BT, limits_B = jnp.full((batch, config.new_tokens), -1, jnp.int32), jnp.full(batch, config.new_tokens)
    times = []
    for _ in range(config.device.repeats + 1):
        fresh = jax.block_until_ready(jax.tree.map(jnp.copy, slots))
        start = time.perf_counter()
        jax.block_until_ready(decode(params, fresh, forced_BT, limits_B)[1])
        times.append((time.perf_counter() - start) / config.new_tokens)
    step = statistics.median(times[1:])  # the first compiles
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves((slots.rows.cache.keys, slots.rows.cache.values)))
    forward_flops = batch * config.prompt * cfg.flops_per_token() / 3
    return {
        "prefill_milliseconds": 1e3 * first,
        "prefill_mfu": forward_flops / first / peak_flops(compute.dtype)[0],
        "step_milliseconds": 1e3 * step,
        "tokens_per_second": batch / step,
        "floor_milliseconds": 1e3 * (weight_bytes + cache_bytes) / copy_rate,
        "bandwidth_share": (weight_bytes + cache_bytes) / copy_rate / step,
    }


TABLES = ("wte", "value_embed")  # only looked up in


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Decode, tyro.conf.subcommand("decode")]
    | Annotated[Core, tyro.conf.subcommand("core")]
)
BENCHES: dict[type, Callable[[Any], dict[str, Any]]] = {Train: bench_train, Decode: bench_decode, Core: bench_core}


def main(config: Command) -> dict[str, Any]:
    """Measure, print and return."""
    measured = BENCHES[type(config)](config)
    device = jax.devices()[0]
    result = {
        "config": to_json(config),
        "hardware": f"{jax.device_count()} × {device.device_kind}",
        "versions": {"jax": jax.__version__},
        **measured,
    }
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    cli.run(main, Command)  # type: ignore[arg-type]
