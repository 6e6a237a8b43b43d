"""Reinforcement learning: the model answers questions of a task, and what was right becomes likelier.

GRPO in nanochat's simplified form: of every question several answers are sampled; an answer's advantage is how much
better it was judged than the others to the same question; one update is made from them, so that nothing needs
clipping. The same command run again goes on where it stopped.

    python -m train.rl --checkpoint runs/my/sft --run.out runs/my/rl --task arithmetic --prompts-per-step 8 \\
        --samples 8 --steps 30 --lr-fraction 0.15 --max-new-tokens 32
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from tqdm import tqdm

from nanochat_jax import model, sharding
from nanochat_jax.chat import content_parts, visible_text
from nanochat_jax.config import Architecture
from nanochat_jax.data.batches import Batch, batches
from nanochat_jax.data.rl import Questions, advantages, answer_rows, open_questions
from nanochat_jax.engine import Engine
from nanochat_jax.errors import UserError
from nanochat_jax.eval.chat import wilson
from nanochat_jax.layers import Compute
from nanochat_jax.load import load_model
from nanochat_jax.loop import Hook
from nanochat_jax.losses import policy_gradient_loss
from nanochat_jax.rollouts import GREEDY, answer, make_engine
from nanochat_jax.sampling import Sampling
from nanochat_jax.sharding import HostShare
from nanochat_jax.state import Batch as DeviceBatch
from nanochat_jax.state import LossFn, TrainState
from nanochat_jax.tokenizer import Tokenizer
from train import cli
from train.finetune import Schedule, fine_tune, open_base
from train.microbatch import micro_rows
from train.stage import Rollout, RunConfig, Stage, at_least, run_stage, stage_mesh

# Source: nanochat, scripts/chat_rl.py.
SCHEDULE = Schedule(warmup_steps=0, warmdown_fraction=1.0, momentum=(0.95, 0.95), momentum_warmup_steps=0)
SHOWN = 3  # answers printed at each evaluation


@dataclass(frozen=True)
class Config:
    checkpoint: Path
    """Folder of the run to start from; its newest good checkpoint is taken."""
    run: RunConfig
    task: str = "gsm8k"
    """Tasks to answer, with commas between: NAME or NAME=SOURCE; learnt from is their train split."""
    prompts_per_step: int = 16
    """Questions of an optimizer step."""
    samples: int = 16
    """Answers sampled of each question."""
    epochs: float = 1.0
    """How often each question is asked."""
    steps: int | None = None
    """Optimizer steps, in place of what the epochs give."""
    lr_fraction: float = 0.05
    """Learning rates as a fraction of pretraining's, its scaling by the batch included; small models want more."""
    advantage: Literal["mean", "zscore"] = "mean"
    """An answer's reward less the mean of its question's; zscore divides this by their standard deviation."""
    kl_weight: float = 0.0
    """Of the divergence from the model that is started from; 0 leaves the model free, and saves a forward pass."""
    temperature: float = 1.0
    """Of sampling."""
    top_k: int = 50
    """Sample from the likeliest so many tokens; 0 for all."""
    max_new_tokens: int = 256
    """Of an answer, a tool's outputs included."""
    slots: int = 64
    """Answers that one device samples at a time."""
    eval_examples: int = 400
    """Held-out questions of each task to measure on, before, during and after; 0 for all."""
    eval_samples: int = 8
    """Answers to each of them to estimate pass@1 and pass@K from, beside the greedy one; 0 for none."""
    pass_k: int = 8
    """K."""
    seed: int = 0
    """Of the order of the questions, and of sampling."""

    def __post_init__(self) -> None:
        for name, least in (("prompts_per_step", 1), ("samples", 2), ("steps", 1), ("max_new_tokens", 1)):
            at_least(name.replace("_", "-"), getattr(self, name), least)
        for name, least in (("slots", 1), ("pass_k", 1), ("eval_examples", 0), ("eval_samples", 0), ("seed", 0)):
            at_least(name.replace("_", "-"), getattr(self, name), least)
        if 0 < self.eval_samples < self.pass_k:
            raise UserError(f"--pass-k {self.pass_k} cannot be estimated from --eval-samples {self.eval_samples}")
        if self.epochs <= 0 or self.temperature <= 0 or self.kl_weight < 0:
            raise UserError(
                f"--epochs {self.epochs} and --temperature {self.temperature} must be positive, "
                f"--kl-weight {self.kl_weight} not negative"
            )


Scorer = Callable[[Batch], np.ndarray]


@dataclass(frozen=True)
class Policy:
    """What turns parameters into answers."""

    cfg: Architecture
    tokenizer: Tokenizer
    compute: Compute
    engine: Callable[[model.Params], Engine]  # ready to sample with these parameters


def main(config: Config) -> TrainState:
    """Learn from answers, and return the final state."""
    compute = config.run.compute.resolve()
    opened = open_base(config.checkpoint)
    base, _, horizon = opened
    cfg, tok = base.cfg, base.tokenizer
    questions = open_questions(config.task, "train", tok, cfg.sequence_len)
    held_out = open_questions(config.task, "test", tok, cfg.sequence_len, limit=config.eval_examples or None)
    steps = config.steps or max(1, round(config.epochs * len(questions) / config.prompts_per_step))
    tuned = fine_tune(  # as many tokens as before, for answers are no measure of how far to go
        opened, SCHEDULE, steps=steps, batch_tokens=horizon.batch_tokens, lr_fraction=config.lr_fraction,
        warm=False, compute=compute,
    )  # fmt: skip
    mesh = stage_mesh(config.run, cfg, compute, tuned.tx, config.prompts_per_step * config.samples)
    policy = Policy(cfg, tok, compute, engine_of(cfg, tok, compute, config.slots * sharding.batch_devices(mesh)))
    print(
        f"{len(questions):,} questions, {questions.too_long:,} left out for filling the context; {len(held_out):,} "
        f"held out\ntraining: {steps:,} steps of {config.prompts_per_step:,} questions with {config.samples:,} "
        f"answers each, {steps * config.prompts_per_step / len(questions):.2f} epochs"
    )

    def feed(step: int, share: HostShare) -> Iterator[Batch]:
        return batches(
            questions, batch_size=config.prompts_per_step, seed=config.seed, start_step=step, **share._asdict()
        )

    numbers = ("task", "prompts_per_step", "samples", "advantage", "kl_weight", "temperature", "top_k", "seed")
    stage = Stage(
        name="rl",
        recipe={
            **tuned.recipe,
            **{name: getattr(config, name) for name in (*numbers, "max_new_tokens")},
            "questions": questions.fingerprint,
        },
        cfg=cfg,
        tokenizer=tok,
        tx=tuned.tx,
        start=tuned.start,
        loss_fn=reinforcement_loss(cfg, compute, config.kl_weight),
        batches=feed,
        steps=steps,
        rows_per_step=config.prompts_per_step * config.samples,
        seed=config.seed,
        compute=compute,
        measure=lambda *_: [accuracy_hook(config, policy, held_out)],
        look=[],
        rollout=make_rollout(config, policy, questions, make_scorer(config, policy, mesh, base.checkpoint.step)),
    )
    return run_stage(stage, config.run, config)[0]


def engine_of(cfg: Architecture, tok: Tokenizer, compute: Compute, slots: int) -> Callable[[model.Params], Engine]:
    """One engine for all parameters, made with the first."""
    engine: Engine | None = None

    def ready(params: model.Params) -> Engine:
        nonlocal engine
        if engine is None:
            engine = make_engine(params, cfg, tok, compute, slots)
        engine.set_params(params)
        return engine

    return ready


def make_rollout(config: Config, policy: Policy, questions: Questions, score: Scorer) -> Rollout:
    """Answers to the questions of a step, judged, as rows to learn from; they depend on seed and step alone."""

    def rollout(state: TrainState, what: Batch) -> tuple[Batch, dict[str, float]]:
        asked = [questions.all[number] for number in what["question"]]
        seed = int(np.random.SeedSequence((config.seed, int(state.step))).generate_state(1)[0])
        sampling = Sampling(temperature=config.temperature, top_k=config.top_k, seed=seed)
        started = time.perf_counter()
        answers = answer(
            policy.engine(state.params), policy.tokenizer, asked,
            samples=config.samples, sampling=sampling, max_new_tokens=config.max_new_tokens,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        rewards_QS = np.array([[one.is_right for one in samples] for samples in answers], np.float32)
        flat = [one for samples in answers for one in samples]
        advantages_B = advantages(rewards_QS, config.advantage).reshape(-1)
        rows = answer_rows(flat, advantages_B, policy.tokenizer.bos, policy.cfg.sequence_len)
        if config.kl_weight:
            rows["reference_nats"] = score(rows)
        lengths_B = [len(one.output.tokens) for one in flat]
        return rows, {
            "reward": float(rewards_QS.mean()),
            "mixed": float((rewards_QS.std(axis=1) > 0).mean()),  # share of the questions that teach something
            "answer_tokens": float(np.mean(lengths_B)),
            "sampled_tokens_per_second": sum(lengths_B) / seconds,
        }

    return rollout


def make_scorer(config: Config, policy: Policy, mesh: jax.sharding.Mesh, step: int) -> Scorer:
    """A function that gives the nats of rows' targets under the model that the stage starts from, once it is asked."""
    cfg, compute = policy.cfg, policy.compute
    rows_per_step = config.prompts_per_step * config.samples
    micro_batch = micro_rows(rows_per_step, config.run.micro_batch, mesh) * sharding.batch_devices(mesh)

    @cache
    def reference() -> model.Params:
        return load_model(config.checkpoint, step=step, mesh=mesh).params

    @partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def nats(params: model.Params, micro: DeviceBatch) -> jax.Array:
        return model.token_nats(params, cfg, micro["tokens"], micro["targets"], compute=compute)

    def score(rows: Batch) -> np.ndarray:
        starts = range(0, rows_per_step, micro_batch)
        pieces = ({name: rows[name][i : i + micro_batch] for name in rows} for i in starts)
        placed = (sharding.put_batch(mesh, sharding.host_rows(mesh, piece)) for piece in pieces)
        return np.concatenate([nats(reference(), micro) for micro in placed])

    return score


def reinforcement_loss(cfg: Architecture, compute: Compute, kl_weight: float) -> LossFn:
    """The policy gradient's loss, over all tokens that were sampled in the step."""

    def loss(params: model.Params, batch: DeviceBatch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        nats_BT = model.token_nats(params, cfg, batch["tokens"], batch["targets"], compute=compute)
        loss_BT, kl_BT = policy_gradient_loss(nats_BT, batch["advantages"], batch.get("reference_nats"), kl_weight)
        sums = {"count": (batch["targets"] >= 0).sum(), "nats": nats_BT.sum()}
        return loss_BT.sum(), sums | ({"kl": kl_BT.sum()} if kl_weight else {})

    return loss


def accuracy_hook(config: Config, policy: Policy, held_out: Questions) -> Hook:
    """Measure on held-out questions: greedy accuracy, pass@1 and pass@K, each with the bounds of a 95 % interval."""
    sampled = Sampling(temperature=config.temperature, top_k=config.top_k, seed=config.seed)

    def run(step: int, state: TrainState) -> dict[str, float]:
        engine = policy.engine(state.params)
        ask = partial(answer, engine, policy.tokenizer, held_out.all, max_new_tokens=config.max_new_tokens)
        greedy = ask(sampling=GREEDY)
        for question, (one,) in zip(held_out.all[:SHOWN], greedy[:SHOWN], strict=True):
            asked = visible_text(content_parts(question.example.prompt["messages"][-1]))
            tqdm.write(f"  {'right' if one.is_right else 'wrong'}: {asked} │ {one.text}")
        found = {"val_accuracy": [float(one.is_right) for (one,) in greedy]}
        if config.eval_samples:
            answers = ask(samples=config.eval_samples, sampling=sampled)
            rights = [sum(one.is_right for one in samples) for samples in answers]
            for k in sorted({1, config.pass_k}):
                found[f"val_pass_at_{k}"] = [pass_at_k(right, config.eval_samples, k) for right in rights]
        return {name + suffix: x for name, values in found.items() for suffix, x in mean_and_bounds(values).items()}

    return Hook(config.run.eval_every, run, at_start=True)


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, where `right` of `samples` were.

    Source: arXiv:2107.03374, section 2.1.
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def mean_and_bounds(values: Sequence[float]) -> dict[str, float]:
    """Mean over questions of what lies between 0 and 1, and its 95 % interval.

    The interval is a proportion's: values between 0 and 1 spread less, and theirs is narrower still.
    """
    low, high = wilson(sum(values), len(values))
    return {"": float(np.mean(values)), "_low": low, "_high": high}


if __name__ == "__main__":
    cli.run(main, Config)
