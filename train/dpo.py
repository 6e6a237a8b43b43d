"""Direct preference optimisation: of two answers to the same prompt, the chosen one becomes likelier than the other.

How likely the model that is started from holds each answer is computed once, and kept in reference.npz. The same
command run again goes on where it stopped. `python -m train.pairs` makes pairs of the model's own answers.

    python -m train.dpo --checkpoint runs/my/sft --run.out runs/my/dpo --pairs jsonl:runs/my/pairs.jsonl
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanochat_jax import hosts, model, sharding
from nanochat_jax.config import Architecture
from nanochat_jax.data.batches import Batch, batches, validation_batches
from nanochat_jax.data.preference import PairRows, render_pairs, split_pairs
from nanochat_jax.errors import UserError
from nanochat_jax.files import as_path, replacing
from nanochat_jax.layers import Compute
from nanochat_jax.load import load_model
from nanochat_jax.loop import Hook
from nanochat_jax.losses import dpo_loss
from nanochat_jax.sharding import HostShare
from nanochat_jax.state import Batch as DeviceBatch
from nanochat_jax.state import LossFn, TrainState
from train import cli
from train.finetune import Schedule, fine_tune, open_base, rows_held_out
from train.microbatch import micro_rows
from train.stage import RunConfig, Stage, at_least, run_stage, stage_mesh

WARMUP_STEPS = 5


@dataclass(frozen=True)
class Config:
    checkpoint: Path
    """Folder of the run to start from; its newest good checkpoint is taken."""
    run: RunConfig
    pairs: str
    """Rows with the fields prompt, chosen and rejected: jsonl:GLOB, parquet:GLOB, tfds:NAME#SPLIT or
    hub:OWNER/NAME#GLOB, with commas between."""
    val_pairs: str = ""
    """Held-out pairs; default: those of a tenth of the prompts."""
    eval_pairs: int = 0
    """Held-out pairs to measure on during training, the first; 0 for all."""
    epochs: float = 1.0
    """How often each pair is learnt from."""
    steps: int | None = None
    """Optimizer steps, in place of what the epochs give."""
    batch_pairs: int = 32
    """Pairs of an optimizer step."""
    lr_fraction: float = 0.05
    """Learning rates as a fraction of pretraining's, its scaling by the batch included."""
    warm: bool = False
    """Go on with the optimizer's moments, where the checkpoint holds them."""
    beta: float = 0.1
    """How much a nat counts: the larger, the closer the model stays to what it was."""
    label_smoothing: float = 0.0
    """Share of the pairs that are thought to be the wrong way round."""
    length_normalize: bool = False
    """Compare mean log-probabilities of tokens, not their sums, so that length does not count; wants a larger beta."""
    nll_weight: float = 0.0
    """Of the chosen answers' loss per token, which keeps them likely."""
    seed: int = 0
    """Of the order of the pairs."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_pairs", 1), ("eval_pairs", 0), ("seed", 0)):
            at_least(name.replace("_", "-"), getattr(self, name), least)
        if self.epochs <= 0 or self.beta <= 0 or self.nll_weight < 0:
            raise UserError(
                f"--epochs {self.epochs} and --beta {self.beta} must be positive, --nll-weight {self.nll_weight} not "
                "negative"
            )
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--label-smoothing {self.label_smoothing} must be from 0 to below 0.5")


def main(config: Config) -> TrainState:
    """Learn to prefer, and return the final state."""
    compute = config.run.compute.resolve()
    opened = open_base(config.checkpoint)
    base, _, horizon = opened
    cfg, tok = base.cfg, base.tokenizer
    train, held_out = split_pairs(config.pairs, config.val_pairs)
    held_out = held_out[: config.eval_pairs or None]
    rows = [render_pairs(train, tok, cfg.sequence_len)]
    if held_out and (val_rows := rows_held_out(lambda: render_pairs(held_out, tok, cfg.sequence_len))):
        rows.append(val_rows)
    steps = config.steps or max(1, round(config.epochs * len(rows[0]) / config.batch_pairs))
    tuned = fine_tune(  # as many tokens as before: a step's progress is not a matter of its tokens
        opened,
        Schedule(min(WARMUP_STEPS, steps), warmdown_fraction=1.0, momentum=(0.95, 0.95), momentum_warmup_steps=0),
        steps=steps, batch_tokens=horizon.batch_tokens, lr_fraction=config.lr_fraction, warm=config.warm,
        compute=compute,
    )  # fmt: skip
    print(
        f"{len(rows[0]):,} pairs, {len(held_out):,} held out, {sum(part.too_long for part in rows):,} left out for "
        f"not fitting {cfg.sequence_len:,} tokens\ntraining: {steps:,} steps of {config.batch_pairs:,} pairs, "
        f"{steps * config.batch_pairs / len(rows[0]):.2f} epochs"
    )
    mesh = stage_mesh(config.run, cfg, compute, tuned.tx, config.batch_pairs)
    pairs_at_a_time = micro_rows(config.batch_pairs, config.run.micro_batch, mesh, most=8)
    score = make_scorer(cfg, compute, mesh, pairs_at_a_time * sharding.batch_devices(mesh))

    @cache
    def with_reference() -> list[PairRows]:
        """The rows with what the start thinks of them; to be called once the run's folder is ours."""

        def compute_them() -> list[np.ndarray]:
            params = load_model(config.checkpoint, step=base.checkpoint.step, mesh=mesh).params
            return [score(params, part) for part in rows]

        made_of = [base.fingerprint, compute, *(part.fingerprint for part in rows)]
        scores = stored_scores(as_path(config.run.out) / "reference.npz", made_of, compute_them)
        return [replace(part, reference_P2=found_P2) for part, found_P2 in zip(rows, scores, strict=True)]

    def feed(step: int, share: HostShare) -> Iterator[Batch]:
        return batches(
            with_reference()[0], batch_size=config.batch_pairs, seed=config.seed, start_step=step, **share._asdict()
        )

    numbers = ("batch_pairs", "beta", "label_smoothing", "length_normalize", "nll_weight", "seed")
    stage = Stage(
        name="dpo",
        recipe={
            **tuned.recipe,
            **{name: getattr(config, name) for name in numbers},
            "pairs": rows[0].fingerprint,
        },
        cfg=cfg,
        tokenizer=tok,
        tx=tuned.tx,
        start=tuned.start,
        loss_fn=preference_loss(config, cfg, compute),
        batches=feed,
        steps=steps,
        rows_per_step=config.batch_pairs,
        row=replace(rows[0], reference_P2=np.zeros((len(rows[0]), 2), np.float32)).row(0),
        seed=config.seed,
        compute=compute,
        measure=lambda *_: [preference_hook(config, score, part) for part in with_reference()[1:]],
        look=[],
    )
    return run_stage(stage, config.run, config)[0]


def answer_logps(params: model.Params, batch: DeviceBatch, *, cfg: Architecture, compute: Compute) -> jax.Array:
    """Log-probability of each answer of a batch of pairs, (P, 2) float32 nats."""
    P, _, T = batch["tokens"].shape
    tokens_BT, targets_BT = (batch[name].reshape(2 * P, T) for name in ("tokens", "targets"))
    return -model.token_nats(params, cfg, tokens_BT, targets_BT, compute=compute).sum(axis=-1).reshape(P, 2)


def preference_terms(
    config: Config, logps_P2: jax.Array, reference_P2: jax.Array, lengths_P2: jax.Array
) -> dict[str, jax.Array]:
    """What is descended, and what is worth knowing, of each pair (P,)."""
    lengths = lengths_P2 if config.length_normalize else None
    loss_P, margin_P, accuracy_P = dpo_loss(
        logps_P2, reference_P2, beta=config.beta, label_smoothing=config.label_smoothing, lengths_P2=lengths
    )
    chosen_nats_P = -logps_P2[:, 0] / lengths_P2[:, 0]  # per token: if it rises, both answers become unlikely
    loss_P += config.nll_weight * chosen_nats_P  # Source: arXiv:2404.19733, equation 1
    return {"loss": loss_P, "margin": margin_P, "accuracy": accuracy_P, "chosen_nats": chosen_nats_P}


def preference_loss(config: Config, cfg: Architecture, compute: Compute) -> LossFn:
    """The loss of a batch of pairs, over all of them."""

    def loss(params: model.Params, batch: DeviceBatch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        lengths_P2 = (batch["targets"] >= 0).sum(axis=-1)
        logps_P2 = answer_logps(params, batch, cfg=cfg, compute=compute)
        terms = preference_terms(config, logps_P2, batch["reference"], lengths_P2)
        sums = {name: term_P.sum() for name, term_P in terms.items()}
        return sums.pop("loss"), sums | {"count": jnp.int32(len(lengths_P2))}

    return loss


Scorer = Callable[[model.Params, PairRows], np.ndarray]


def make_scorer(cfg: Architecture, compute: Compute, mesh: jax.sharding.Mesh, batch_size: int) -> Scorer:
    """A function that gives the log-probability of each answer of pairs, (pairs, 2).

    The reference and the measurements come from it alike: before the first step they agree to the last bit.
    """
    logps = jax.jit(partial(answer_logps, cfg=cfg, compute=compute), out_shardings=sharding.replicated(mesh))

    def score(params: model.Params, rows: PairRows) -> np.ndarray:
        everything = validation_batches(
            replace(rows, reference_P2=None), batch_size, **sharding.host_share(mesh)._asdict()
        )
        return np.concatenate([logps(params, sharding.put_batch(mesh, batch)) for batch in everything])[: len(rows)]

    return score


def stored_scores(path: Path, made_of: object, compute: Callable[[], list[np.ndarray]]) -> list[np.ndarray]:
    """What is in the file, if it was made of the same; otherwise computed, and kept there."""
    fingerprint = hashlib.sha256(json.dumps(made_of, default=str).encode()).hexdigest()
    if stored := hosts.first(lambda: _read_scores(path, fingerprint)):
        return [np.array(part, np.float32) for part in stored]
    scores = compute()
    if hosts.is_first():
        with replacing(path) as temporary, temporary.open("wb") as file:
            arrays: dict[str, Any] = {f"scores_{number}": part for number, part in enumerate(scores)}
            np.savez(file, fingerprint=fingerprint, **arrays)
    return scores


def _read_scores(path: Path, fingerprint: str) -> list[list[list[float]]]:
    try:
        with path.open("rb") as file, np.load(file) as stored:
            if str(stored["fingerprint"]) == fingerprint:
                return [stored[f"scores_{number}"].tolist() for number in range(len(stored) - 1)]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # there is none, or it is damaged
    return []


def preference_hook(config: Config, score: Scorer, rows: PairRows) -> Hook:
    """Loss, margin and accuracy on held-out pairs; the accuracy is 0.5 before the first step."""

    def run(step: int, state: TrainState) -> dict[str, float]:
        logps_P2, lengths_P2 = jnp.asarray(score(state.params, rows)), jnp.asarray(rows.lengths_P2)
        terms = preference_terms(config, logps_P2, jnp.asarray(rows.reference_P2), lengths_P2)
        return {f"val_{name}": float(np.asarray(term_P).mean(dtype=np.float64)) for name, term_P in terms.items()}

    return Hook(config.run.eval_every, run, at_start=True)


if __name__ == "__main__":
    cli.run(main, Config)
