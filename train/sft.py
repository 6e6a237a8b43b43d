"""Fine-tune a pretrained model on conversations, so that it answers.

Conversations are packed into rows and each sees only itself; the loss counts only what the assistant writes. The same
command run again goes on where it stopped. `python -m train.chat_show` shows a mix as the model sees it.

    python -m train.sft --checkpoint runs/demo/base --run.out runs/my/sft --mix 'task:identity*8,chitchat*0.3'
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
from tqdm import tqdm

from nanochat_jax.chat import conversation, parse, render_prompt, visible_text
from nanochat_jax.config import Architecture
from nanochat_jax.data.batches import Batch, batches
from nanochat_jax.data.conversations import join_turns, open_mixture
from nanochat_jax.data.sft import pack_conversations
from nanochat_jax.engine import Engine, Request
from nanochat_jax.errors import UserError
from nanochat_jax.layers import Compute
from nanochat_jax.loop import Hook
from nanochat_jax.rollouts import make_engine
from nanochat_jax.sampling import Sampling
from nanochat_jax.sharding import HostShare
from nanochat_jax.state import TrainState
from nanochat_jax.tokenizer import Tokenizer
from train import cli
from train.finetune import Schedule, fine_tune, open_base, rows_held_out
from train.pretrain import language_model_loss, rows_of
from train.stage import RunConfig, Stage, at_least, run_stage, validation_hook

# Source: nanochat, scripts/chat_sft.py.
SCHEDULE = Schedule(warmup_steps=0, warmdown_fraction=0.5, momentum=(0.85, 0.95), momentum_warmup_steps=300)
DEFAULT_MIX = (
    "task:spelling#4000,task:counting#4000,task:arithmetic#4000,task:identity*8,task:refusals*4,chatterbot,chitchat*0.3"
)
ANSWER_TOKENS = 64  # of the answers that are shown


@dataclass(frozen=True)
class Config:
    checkpoint: Path
    """Folder of the run to start from; its newest good checkpoint is taken."""
    run: RunConfig
    mix: str = DEFAULT_MIX
    """Conversations, with commas between: task:NAME, chitchat, chatterbot, jsonl:GLOB, hub:OWNER/NAME#GLOB, …;
    SOURCE#N takes the first N, SOURCE*W takes each W times."""
    turns: int = 3
    """Questions of one turn are asked one after the other, up to so many in a conversation; 1 leaves them alone."""
    epochs: float = 1.0
    """How often each conversation is learnt from."""
    steps: int | None = None
    """Optimizer steps, in place of what the epochs give."""
    batch_tokens: int | None = None
    """Tokens of an optimizer step; default: as many as in pretraining."""
    lr_fraction: float = 0.8
    """Learning rates as a fraction of pretraining's, its scaling by the batch included."""
    warm: bool = True
    """Go on with the optimizer's moments, where the checkpoint holds them."""
    eval_rows: int = 0
    """Rows of held-out conversations to measure on during training, evenly spaced; 0 for all."""
    prompts: tuple[str, ...] = ("Who are you?", "Spell the word garden.", "What is 12 times 7?")
    """Questions whose answers are shown."""
    seed: int = 0
    """Of the order of the conversations."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "turns"):
            at_least(name.replace("_", "-"), getattr(self, name), 1)
        for name in ("eval_rows", "seed"):
            at_least(name.replace("_", "-"), getattr(self, name), 0)
        if self.epochs <= 0:
            raise UserError(f"--epochs {self.epochs} must be positive")


def main(config: Config) -> TrainState:
    """Fine-tune, and return the final state."""
    compute = config.run.compute.resolve()
    opened = open_base(config.checkpoint)
    base, _, horizon = opened
    cfg, tok = base.cfg, base.tokenizer
    chats = join_turns(open_mixture(config.mix, seed=config.seed), config.turns, config.seed)
    train_rows = pack_conversations(chats, tok, cfg.sequence_len)
    held_out = open_mixture(config.mix, "val", seed=config.seed)
    val_rows = rows_held_out(lambda: pack_conversations(held_out, tok, cfg.sequence_len)) if held_out else None
    batch_tokens = config.batch_tokens or horizon.batch_tokens
    rows = rows_of(batch_tokens, cfg)
    steps = config.steps or max(1, round(config.epochs * len(train_rows) / rows))
    tuned = fine_tune(
        opened, SCHEDULE, steps=steps, batch_tokens=batch_tokens, lr_fraction=config.lr_fraction,
        warm=config.warm, compute=compute,
    )  # fmt: skip
    stats = train_rows.stats
    print(
        f"{stats.conversations:,} conversations, {stats.shortened:,} shortened and {stats.dropped:,} dropped to fit "
        f"{cfg.sequence_len:,} tokens: {stats.rows:,} rows, {stats.supervised_tokens:,} supervised tokens, "
        f"{stats.padding_share:.1%} padding; {len(held_out):,} held out\n"
        f"training: {steps:,} steps of {batch_tokens:,} tokens, {steps * rows / len(train_rows):.2f} epochs"
    )

    def feed(step: int, share: HostShare) -> Iterator[Batch]:
        return batches(train_rows, batch_size=rows, seed=config.seed, start_step=step, **share._asdict())

    def measure(mesh: jax.sharding.Mesh, rows: int) -> list[Hook]:
        if val_rows is None:
            return []
        every, limit = config.run.eval_every, config.eval_rows
        return [validation_hook(every, val_rows, rows, limit=limit, model=(cfg, tok, compute), mesh=mesh)]

    stage = Stage(
        name="sft",
        recipe={**tuned.recipe, "data": train_rows.fingerprint, "seed": config.seed},
        cfg=cfg,
        tokenizer=tok,
        tx=tuned.tx,
        start=tuned.start,
        loss_fn=language_model_loss(cfg, compute),
        batches=feed,
        steps=steps,
        rows_per_step=rows,
        row=train_rows.row(0),
        seed=config.seed,
        compute=compute,
        measure=measure,
        look=[answer_hook(config.run.sample_every, cfg, tok, compute, config.prompts)] if config.prompts else [],
    )
    return run_stage(stage, config.run, config)[0]


def answer_hook(every: int, cfg: Architecture, tok: Tokenizer, compute: Compute, prompts: tuple[str, ...]) -> Hook:
    """Print how the model answers a few questions."""
    end = [tok.control["<|assistant_end|>"]]
    requests = [
        Request(render_prompt(conversation(p), tok), ANSWER_TOKENS, Sampling(temperature=0.0), end, use_tools=True)
        for p in prompts
    ]
    engine: Engine | None = None

    def run(step: int, state: TrainState) -> dict[str, float]:
        nonlocal engine
        if engine is None:
            engine = make_engine(state.params, cfg, tok, compute, slots=len(prompts))
        engine.set_params(state.params)
        for prompt, output in zip(prompts, engine.run(requests), strict=True):
            tqdm.write(f"  {prompt} │ {visible_text(parse(output.tokens, tok))}")
        return {}

    return Hook(every, run)


if __name__ == "__main__":
    cli.run(main, Config)
