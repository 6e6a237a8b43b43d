"""Pretrain a language model on prepared records.

One dial, --model.depth, sets width, heads, training length, batch, learning rates and weight decay, as nanochat's
scaling laws have it; every one of them can be set by hand. The same command run again goes on where it stopped.

    python -m train.pretrain --data runs/demo/data --run.out runs/demo/base --model.depth 4
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from nanochat_jax import model, optim, sharding, tokenizer
from nanochat_jax.config import (
    Horizon,
    ModelConfig,
    OptimConfig,
    flops_per_token,
    from_depth,
    horizon,
    param_counts,
)
from nanochat_jax.data import pretrain as records
from nanochat_jax.data.records import load_manifest
from nanochat_jax.errors import UserError
from nanochat_jax.eval.bpb import make_evaluator
from nanochat_jax.generate import Sampling, generate
from nanochat_jax.layers import Compute
from nanochat_jax.loop import Hook
from nanochat_jax.state import Batch, LossFn, TrainState
from train import cli
from train.stage import RunConfig, Stage, micro_batches, run_stage


@dataclass(frozen=True)
class ModelArgs:
    """The architecture, by its one dial; vocabulary and sequence length are those of the prepared data."""

    depth: int = 12
    """Layers; the width is 64 times as much."""
    head_dim: int = 128
    """Channels of an attention head."""
    window_pattern: str = "SSSL"
    """Attention window of the layers in turn: S(hort) is a quarter of the sequence, L(ong) all; the last is long."""


@dataclass(frozen=True)
class Config:
    data: Path
    """Folder made by train.prepare."""
    run: RunConfig
    model: ModelArgs = field(default_factory=ModelArgs)
    ratio: float = 12.0
    """Training tokens per scaling parameter: 12 is compute-optimal, 8 nanochat's speedrun."""
    steps: int | None = None
    """Optimizer steps, in place of what the ratio gives."""
    batch_tokens: int | None = None
    """Tokens of an optimizer step, in place of the scaling law's."""
    lr_scale: float | None = None
    """Factor of the learning rates, in place of sqrt(batch_tokens / 2^19); short runs of small batches want more."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval_rows: int = 0
    """Rows of the validation split to measure on during training; 0 for all."""
    prompts: tuple[str, ...] = ("The", "My fellow citizens", "In the year")
    """What samples begin with."""
    seed: int = 0
    """Of the initial parameters and of the order of the data."""


@dataclass(frozen=True)
class Result:
    state: TrainState
    cfg: ModelConfig
    length: Horizon


def main(config: Config) -> Result:
    """Pretrain, and return the final state."""
    manifest = load_manifest(config.data)
    tok = tokenizer.load(config.data / "tokenizer.model")
    arch = config.model
    cfg = from_depth(
        arch.depth,
        vocab_size=tok.vocab_size,
        sequence_len=manifest.sequence_len,
        head_dim=arch.head_dim,
        window_pattern=arch.window_pattern,
    )
    length = horizon(
        cfg, ratio=config.ratio, steps=config.steps, batch_tokens=config.batch_tokens, lr_scale=config.lr_scale
    )
    if length.batch_tokens % cfg.sequence_len:
        raise UserError(
            f"batch: {length.batch_tokens:,} tokens a step do not divide by the sequence length of {cfg.sequence_len}"
        )
    rows = length.batch_tokens // cfg.sequence_len
    compute = config.run.compute.resolve()
    train_records = records.open_split(config.data, "train", tokenizer_sha256=tok.sha256)
    val_records = records.open_split(config.data, "val", tokenizer_sha256=tok.sha256)
    _announce(cfg, length, len(train_records))

    def batches(step: int) -> Iterator[dict[str, np.ndarray]]:
        return records.batches(
            train_records, batch_size=rows, seed=config.seed, start_step=step,
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip

    def hooks(mesh: jax.sharding.Mesh) -> list[Hook]:
        return [
            validation_hook(
                config, cfg, val_records, tok, compute, mesh, rows // micro_batches(rows, config.run, mesh)
            ),
            sample_hook(config.run.sample_every, cfg, tok, compute, config.prompts),
        ]

    stage = Stage(
        name="pretrain",
        recipe={
            "architecture": "nanochat",
            "model": cfg,
            "horizon": length,
            "optim": config.optim,
            "seed": config.seed,
            "tokenizer": tok.sha256,
            "data": manifest.fingerprint,
            "compute_dtype": compute.dtype,
        },
        cfg=cfg,
        tokenizer=tok,
        tx=optim.make_optimizer(cfg, length, config.optim, compute.dtype),
        init_params=lambda key: model.init_params(key, cfg, compute),
        loss_fn=language_model_loss(cfg, compute),
        batches=batches,
        steps=length.steps,
        rows_per_step=rows,
        seed=config.seed,
        hooks=hooks,
    )
    final, _ = run_stage(stage, config.run, config)
    return Result(final, cfg, length)


def language_model_loss(cfg: model.Architecture, compute: Compute) -> LossFn:
    """Next-token cross-entropy, summed over the targets that count."""

    def loss(params: model.Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        nats_BT = model.token_nats(params, cfg, batch["tokens"], batch["targets"], compute=compute)
        return nats_BT.sum(), (batch["targets"] >= 0).sum()

    return loss


def validation_hook(
    config: Config,
    cfg: model.Architecture,
    val_records: records.Records,
    tok: tokenizer.Tokenizer,
    compute: Compute,
    mesh: jax.sharding.Mesh,
    rows: int,
) -> Hook:
    """Bits per byte of the validation split, in batches of as many rows as a micro-batch has."""
    evaluate = make_evaluator(cfg, tok.byte_lengths, compute)

    def run(step: int, state: TrainState) -> dict[str, float]:
        batches = records.validation_batches(
            val_records, rows, process_index=jax.process_index(), process_count=jax.process_count()
        )
        some = islice(batches, math.ceil(config.eval_rows / rows) or None)
        measured = evaluate(state.params, (sharding.put_batch(mesh, batch) for batch in some))
        return {"val_bpb": measured.bpb, "val_loss": measured.loss}

    return Hook(config.run.eval_every, run)


def sample_hook(
    every: int, cfg: model.Architecture, tok: tokenizer.Tokenizer, compute: Compute, prompts: tuple[str, ...]
) -> Hook:
    """Print how the model continues a few prompts."""

    def run(step: int, state: TrainState) -> dict[str, float]:
        rows = [[tok.bos, *tok.encode(prompt)] for prompt in prompts]
        samples = generate(
            state.params, cfg, rows, max_new_tokens=48, sampling=Sampling(temperature=0.8, top_k=50, seed=step),
            stop_tokens=tuple(tok.control.values()), compute=compute,
        )  # fmt: skip
        for prompt, sample in zip(prompts, samples, strict=True):
            tqdm.write(f"  {prompt}│{tok.decode(sample)}")
        return {}

    return Hook(every, run)


def _announce(cfg: model.Architecture, length: Horizon, records_count: int) -> None:
    tokens = length.steps * length.batch_tokens
    print(
        f"model: {cfg.n_layer} layers of width {cfg.n_embd}, {param_counts(cfg)['total']:,} parameters, "
        f"{flops_per_token(cfg):,} FLOPs a token\n"
        f"training: {length.steps:,} steps of {length.batch_tokens:,} tokens = {tokens:,} tokens, "
        f"{tokens / (records_count * cfg.sequence_len):.2f} epochs, "
        f"{tokens * flops_per_token(cfg):.3g} FLOPs"
    )


if __name__ == "__main__":
    cli.run(main, Config)
