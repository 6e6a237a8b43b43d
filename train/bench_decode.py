"""The part of train.bench that measures generation."""

import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import generate, model
from nanochat_jax.config import ModelConfig
from nanochat_jax.metrics import peak_flops
from nanochat_jax.sampling import Sampling, SamplingArrays
from train.pretrain import ModelArgs
from train.timing import Device, device_rates, seconds_per_call

TABLES = ("wte", "value_embed")  # only looked up in


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


def bench_decode(config: Decode) -> dict[str, Any]:
    """Measure prefill and decoding at several batch sizes on one device."""
    compute = config.device.compute.resolve()
    cfg = config.model.architecture(config.vocab_size, config.sequence_len)
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
    """What one batch size takes, beside the time that reading weights and the filled part of the cache once would."""
    compute = config.device.compute.resolve()
    begin = jax.jit(partial(generate.begin, cfg=cfg, compute=compute))
    decode = jax.jit(partial(generate.decode, cfg=cfg, compute=compute), donate_argnums=1)
    empty = generate.empty_slots(batch, cfg, compute, cfg.sequence_len)
    prompt_BT = jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, config.prompt), np.int32))
    counts_B = jnp.full(batch, config.prompt, jnp.int32)
    first = seconds_per_call(lambda: begin(params, empty.rows, prompt_BT, counts_B).logits_BV, config.device)
    how = jax.tree.map(jnp.asarray, SamplingArrays.of([Sampling(temperature=0.8, top_k=50)] * batch))
    slots = empty._replace(rows=begin(params, empty.rows, prompt_BT, counts_B), how=how)
    forced_BT, limits_B = jnp.full((batch, config.new_tokens), -1, jnp.int32), jnp.full(batch, config.new_tokens)
    times = []
    for _ in range(config.device.repeats + 1):
        fresh = jax.block_until_ready(jax.tree.map(jnp.copy, slots))
        start = time.perf_counter()
        jax.block_until_ready(decode(params, fresh, forced_BT, limits_B)[1])
        times.append((time.perf_counter() - start) / config.new_tokens)
    step = statistics.median(times[1:])  # the first compiles
    cache, filled = slots.rows.cache, config.prompt + config.new_tokens // 2  # on average
    cache_bytes = sum(x.nbytes // x.shape[2] * min(x.shape[2], filled) for x in (*cache.keys, *cache.values))
    forward_flops = batch * config.prompt * cfg.flops_per_token() / 3
    return {
        "prefill_milliseconds": 1e3 * first,
        "prefill_mfu": forward_flops / first / peak_flops(compute.dtype)[0],
        "step_milliseconds": 1e3 * step,
        "tokens_per_second": batch / step,
        "floor_milliseconds": 1e3 * (weight_bytes + cache_bytes) / copy_rate,
        "bandwidth_share": (weight_bytes + cache_bytes) / copy_rate / step,
    }
