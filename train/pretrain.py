"""Pretrain a language model on prepared records.

One dial, --model.depth, sets width, heads, training length, batch, learning rates and weight decay, as nanochat's
scaling laws have it; every one of them can be set by hand. The same command run again goes on where it stopped.

    python -m train.pretrain --data runs/demo/data --run.out runs/my/base --model.depth 3 --model.head-dim 64 \\
        --steps 500 --batch-tokens 4096 --lr-scale 0.55
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import optax
from tqdm import tqdm

from nanochat_jax import gpt2, model, optim, tokenizer
from nanochat_jax.config import Architecture, ModelConfig, OptimConfig, from_depth, horizon
from nanochat_jax.data.batches import Batch as Rows
from nanochat_jax.data.corpus import Corpus, open_corpus
from nanochat_jax.errors import UserError
from nanochat_jax.generate import continue_texts, usable_prompts
from nanochat_jax.layers import Compute
from nanochat_jax.load import open_undamaged
from nanochat_jax.loop import Hook
from nanochat_jax.sampling import Sampling
from nanochat_jax.sharding import HostShare
from nanochat_jax.state import Batch, LossFn, TrainState
from train import cli
from train.stage import RunConfig, Stage, at_least, run_stage, validation_hook
from train.start import fresh, from_stored


@dataclass(frozen=True)
class ModelArgs:
    """The nanochat architecture, by its one dial; vocabulary and sequence length are those of the prepared data."""

    depth: int = 12
    """Layers; the width is 64 times as much."""
    head_dim: int = 128
    """Channels of an attention head."""
    window_pattern: str = "SSSL"
    """Attention window of the layers in turn: S(hort) is a quarter of the sequence, L(ong) all; the last is long."""
    fp8: bool = False
    """Train with 8-bit operands in the blocks' products, on Hopper, Ada or newer; evaluation stays in bfloat16."""

    def architecture(self, vocab_size: int, sequence_len: int) -> ModelConfig:
        """The model that they come to."""
        return from_depth(
            self.depth,
            vocab_size=vocab_size,
            sequence_len=sequence_len,
            head_dim=self.head_dim,
            window_pattern=self.window_pattern,
        )

    def training_compute(self, compute: Compute) -> Compute:
        """How the training step computes, where everything else computes so.

        Raises:
            UserError: fp8 goes neither with the dtype nor with the device.
        """
        capability = getattr(jax.devices()[0], "compute_capability", None)  # None where there is no NVIDIA GPU
        if self.fp8 and (compute.dtype != "bfloat16" or (capability is not None and float(capability) < 8.9)):
            on = f"a GPU of compute capability {capability}" if capability else f"dtype={compute.dtype}"
            raise UserError(f"--model.fp8 is for bfloat16 on GPUs of compute capability 8.9 or more, not for {on}")
        return replace(compute, fp8=self.fp8)


@dataclass(frozen=True)
class Config:
    data: str
    """Folder made by train.prepare, on disk or in a bucket (gs://…); several with weights are mixed: FOLDER*3,FOLDER*1
    takes three of four rows from the first."""
    run: RunConfig
    preset: Literal["nanochat", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "char", "char-cpu"] = "nanochat"
    """nanochat is set by --model and --optim; the others are nanoGPT's runs: architecture, batch, steps and AdamW."""
    model: ModelArgs = field(default_factory=ModelArgs)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ratio: float = 12.0
    """Training tokens per scaling parameter of the nanochat preset: 12 is compute-optimal, 8 nanochat's speedrun."""
    steps: int | None = None
    """Optimizer steps, in place of what the ratio or the preset gives."""
    batch_tokens: int | None = None
    """Tokens of an optimizer step, in place of the scaling law's or the preset's."""
    lr_scale: float | None = None
    """Factor of the learning rates, in place of sqrt(batch_tokens / 2^19), or of the preset's 1; short runs of small
    batches want more than the square root."""
    init_from: Path | None = None
    """Run whose parameters to start from, such as a converted GPT-2 to fine-tune; its architecture is taken too."""
    eval_rows: int = 0
    """Rows of the validation split to measure on during training, evenly spaced; 0 for all."""
    prompts: tuple[str, ...] = ("The", "My fellow citizens", "In the year")
    """What samples begin with."""
    window_units: int = 0
    """Begin while train.prepare is still at work, as soon as so many of its work units are ready, and shuffle within
    such windows; 0 waits for all, and shuffles all."""
    seed: int = 0
    """Of the initial parameters and of the order of the data."""

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        at_least("batch-tokens", self.batch_tokens, 1)
        at_least("eval-rows", self.eval_rows, 0)
        at_least("seed", self.seed, 0)


@dataclass(frozen=True)
class Plan:
    """What the preset and the dials come to."""

    cfg: Architecture
    steps: int
    rows: int
    numbers: dict[str, Any]  # all that the optimizer is made of
    tx: optax.GradientTransformation


@dataclass(frozen=True)
class Result:
    state: TrainState
    plan: Plan


def main(config: Config) -> Result:
    """Pretrain, and return the final state."""
    compute = config.run.compute.resolve()
    corpus = open_corpus(config.data, window_units=config.window_units)
    tok = corpus.tokenizer
    start = None if config.init_from is None else open_undamaged(config.init_from)
    if start is not None and start.tokenizer.sha256 != tok.sha256:
        raise UserError(f"{config.init_from} has another tokenizer than {config.data}; prepare the data with its own")
    make_plan = plan_nanochat if config.preset == "nanochat" else plan_gpt2
    plan = make_plan(config, tok.vocab_size, corpus.sequence_len, start.cfg if start else None, compute.dtype)
    cfg, rows = plan.cfg, plan.rows
    corpus.wait_for(rows)
    if len(corpus.train) < rows:
        raise UserError(
            f"there are {len(corpus.train):,} train records in {config.data}, less than one batch of {rows:,} rows: "
            "give more text, a smaller --batch-tokens or a shorter --sequence-len"
        )
    _announce(plan, corpus)

    def feed(step: int, share: HostShare) -> Iterator[Rows]:
        return corpus.batches(batch_size=rows, seed=config.seed, start_step=step, **share._asdict())

    def measure(mesh: jax.sharding.Mesh, micro_rows: int) -> list[Hook]:
        every, limit = config.run.eval_every, config.eval_rows
        validate = validation_hook(every, corpus.val, micro_rows, limit=limit, model=(cfg, tok, compute), mesh=mesh)
        count = Hook(every, lambda step, _: {f"epochs of {k}": v for k, v in corpus.epochs(step * rows).items()})
        return [validate, count] if len(corpus.sets) > 1 else [validate]

    stage = Stage(
        name="pretrain",
        recipe={
            "model": cfg,
            "steps": plan.steps,
            "rows": rows,
            **plan.numbers,
            "seed": config.seed,
            "tokenizer": tok.sha256,
            "data": corpus.fingerprint,
            "compute_dtype": compute.dtype,
            "fp8": config.model.fp8,
            "init_from": start.fingerprint if start else None,
        },
        cfg=cfg,
        tokenizer=tok,
        tx=plan.tx,
        start=from_stored(start, plan.tx) if start else fresh(cfg, compute, plan.tx, config.seed),
        loss_fn=language_model_loss(cfg, config.model.training_compute(compute)),
        batches=feed,
        steps=plan.steps,
        rows_per_step=rows,
        row=corpus.train.row(0),
        seed=config.seed,
        compute=compute,
        measure=measure,
        look=[sample_hook(config.run.sample_every, cfg, tok, compute, config.prompts)],
    )
    final, _ = run_stage(stage, config.run, config)
    return Result(final, plan)


def plan_nanochat(config: Config, vocab_size: int, sequence_len: int, start: Architecture | None, dtype: str) -> Plan:
    """nanochat's architecture and optimizer, from the one dial."""
    cfg = config.model.architecture(vocab_size, sequence_len)
    if start is not None:
        if not isinstance(start, ModelConfig):
            raise UserError("--init-from holds a GPT-2: choose one of the gpt2 presets for its optimizer")
        if replace(config.model, fp8=False) != ModelArgs():
            raise UserError("--model sets a new architecture, --init-from takes the one it finds: give one of them")
        cfg = replace(start, sequence_len=sequence_len)
    length = horizon(
        cfg, ratio=config.ratio, steps=config.steps, batch_tokens=config.batch_tokens, lr_scale=config.lr_scale
    )
    tx = optim.make_optimizer(cfg, length, config.optim, dtype)
    numbers = {"horizon": length, "optim": config.optim}
    return Plan(cfg, length.steps, rows_of(length.batch_tokens, cfg), numbers, tx)


def plan_gpt2(config: Config, vocab_size: int, sequence_len: int, start: Architecture | None, dtype: str) -> Plan:
    """nanoGPT's architecture and optimizer, from a preset."""
    if (config.model, config.optim, config.ratio) != (ModelArgs(), OptimConfig(), Config.ratio):
        raise UserError(
            f"--model, --optim and --ratio are nanochat's dials: they say nothing to --preset {config.preset}"
        )
    preset = gpt2.PRESETS[config.preset]
    cfg = start or replace(preset.model, vocab_size=vocab_size, sequence_len=sequence_len)
    if not isinstance(cfg, gpt2.GPT2Config):
        raise UserError(f"--init-from holds a nanochat model, which --preset {config.preset} does not train")
    if sequence_len != cfg.sequence_len:
        raise UserError(f"the records have sequence-len={sequence_len}, the model to start from {cfg.sequence_len}")
    steps = preset.steps if config.steps is None else config.steps
    numbers = replace(
        preset.optim,
        learning_rate=preset.optim.learning_rate * (1.0 if config.lr_scale is None else config.lr_scale),
        warmup_steps=min(preset.optim.warmup_steps, steps // 10),
    )
    rows = rows_of(config.batch_tokens or preset.batch_size * sequence_len, cfg)
    return Plan(cfg, steps, rows, {"optim": numbers}, gpt2.make_gpt2_optimizer(numbers, steps))


def rows_of(batch_tokens: int, cfg: Architecture) -> int:
    """Rows of a step; UserError if the tokens do not divide."""
    if batch_tokens % cfg.sequence_len:
        raise UserError(
            f"batch: {batch_tokens:,} tokens a step do not divide by the sequence length of {cfg.sequence_len}"
        )
    return batch_tokens // cfg.sequence_len


def language_model_loss(cfg: Architecture, compute: Compute) -> LossFn:
    """Next-token cross-entropy, summed over the targets that count."""

    def loss(params: model.Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        options = {"segment_ids_BT": batch.get("segment_ids"), "compute": compute, "dropout_key": key}
        nats_BT = model.token_nats(params, cfg, batch["tokens"], batch["targets"], **options)
        return nats_BT.sum(), {"count": (batch["targets"] >= 0).sum()}

    return loss


def sample_hook(
    every: int, cfg: Architecture, tok: tokenizer.Tokenizer, compute: Compute, prompts: tuple[str, ...]
) -> Hook:
    """Print how the model continues a few prompts."""
    usable = usable_prompts(cfg, tok, prompts)

    def run(step: int, state: TrainState) -> dict[str, float]:
        how = Sampling(temperature=0.8, top_k=50, seed=step)
        texts = continue_texts(state.params, cfg, tok, usable, max_new_tokens=48, sampling=how, compute=compute)
        for prompt, text in zip(usable, texts, strict=True):
            tqdm.write(f"  {prompt}│{text}")
        return {}

    return Hook(every, run)


def _announce(plan: Plan, corpus: Corpus) -> None:
    cfg, rows = plan.cfg, plan.steps * plan.rows
    tokens = rows * cfg.sequence_len
    print(
        f"model: {cfg.n_layer} layers of width {cfg.n_embd}, {cfg.param_counts()['total']:,} parameters, "
        f"{cfg.flops_per_token():,} FLOPs a token\n"
        f"training: {plan.steps:,} steps of {plan.rows * cfg.sequence_len:,} tokens = {tokens:,} tokens, "
        f"{tokens * cfg.flops_per_token():.3g} FLOPs"
    )
    for name, epochs in corpus.epochs(rows).items():
        print(f"data: {name}, {corpus.sets[name][0]:.1%} of the rows, {epochs:.2f} epochs")


if __name__ == "__main__":
    cli.run(main, Config)
