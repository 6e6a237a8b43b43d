"""The stages of train/speedrun.sh: what they run, how long that takes, and what came out.

    python -m train.speedrun                       the plan: stages, tokens, hours and cost, here and on known machines
    python -m train.speedrun --summary --run NAME  time, bits per byte and CORE of what has been run

Nothing is trained by this command: `bash train/speedrun.sh` runs the stages, with the same options.
"""

import json
import math
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from nanochat_jax.config import Horizon, ModelConfig, from_depth, horizon
from nanochat_jax.errors import UserError
from nanochat_jax.metrics import peak_flops
from train import cli
from train.runs import gather

BYTES_PER_TOKEN = 4.6  # of web text, at 32,768 tokens
SHARD_BYTES = 250e6  # of text, in a shard of ClimbMix
ENCODED_BYTES_PER_SECOND = 2e6  # and core, when preparing
MFU = 0.45  # of whole training runs, evaluations and saves in between included
FP8_GAIN = 1.2
CONVERSATION_TOKENS = 600
# Machines to compare with: name, devices, peak FLOP/s of each in bfloat16, cores, dollars an hour (list prices, 2026).
MACHINES = (
    ("8 × H100", 8, 989e12, 208, 24.0),
    ("1 × H100", 1, 989e12, 26, 3.0),
    ("TPU v5p-8", 4, 459e12, 208, 16.8),
    ("TPU v4-32", 16, 275e12, 480, 51.5),
)


@dataclass(frozen=True)
class Config:
    run: str = "speedrun"
    """Name of the run."""
    out: Path = Path("runs")
    """Folder that holds the runs."""
    scale: float = 1.0
    """Size of every stage: 1 is the recipe, less shrinks model, data and steps together."""
    depth: int = 24
    """Layers at scale 1."""
    ratio: float = 8.0
    """Training tokens per scaling parameter."""
    source: str = "hub:karpathy/climbmix-400b-shuffle[:SHARDS]#text"
    """Text to pretrain on; SHARDS becomes as many as the tokens take."""
    mix: str = (
        "task:smoltalk#460000,task:mmlu#99842*3,task:gsm8k#7473*4,task:identity*14,task:spelling#20000,task:refusals*8"
    )
    """Conversations to fine-tune on; numbers behind # are scaled."""
    tasks: str = "chatcore,spelling,identity"
    """Tasks to judge by."""
    rl_task: str = "gsm8k"
    """Task for preference pairs and reinforcement learning."""
    bundle: Path | None = None
    """Folder of the CORE tasks; default: downloaded."""
    dollars_per_hour: float | None = None
    """Price of this machine."""
    print_stages: bool = False
    """For speedrun.sh: seconds, number of stages and folder, then a line a stage."""
    summary: bool = False
    """Show what came out of a run instead of the plan."""

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1 or self.depth < 1 or self.ratio <= 0:
            raise UserError(
                f"scale={self.scale} must lie in (0, 1], depth={self.depth}, ratio={self.ratio} be positive"
            )

    @property
    def folder(self) -> Path:
        return self.out / self.run


@dataclass(frozen=True)
class Machine:
    name: str
    devices: int
    peak: float  # FLOP/s of a device
    cores: int
    dollars_per_hour: float | None
    fp8: bool


@dataclass(frozen=True)
class Planned:
    """A stage: what it does, what of, and what it costs."""

    name: str
    does: str
    command: tuple[str, ...]  # behind python -m
    tokens: float = 0.0  # trained on
    flops: float = 0.0
    text_bytes: float = 0.0  # to be tokenised

    def seconds(self, machine: Machine) -> int:
        computing = self.flops / (machine.peak * machine.devices * MFU * (FP8_GAIN if machine.fp8 else 1))
        return math.ceil(30 + computing + self.text_bytes / (ENCODED_BYTES_PER_SECOND * machine.cores))


def size(config: Config) -> tuple[ModelConfig, Horizon]:
    """The model at a scale, and how long it is trained."""
    edge = config.scale ** (1 / 3)
    cfg = from_depth(
        max(2, round(config.depth * edge)),
        vocab_size=max(1024, 1 << round(math.log2(32768 * edge))),
        sequence_len=max(256, 128 * round(16 * edge)),
        head_dim=128 if config.scale == 1 else 64,
    )
    if config.scale == 1:
        return cfg, horizon(cfg, ratio=config.ratio)
    length = horizon(cfg, ratio=config.ratio, batch_tokens=max(2048, 1 << round(math.log2(2**20 * config.scale))))
    return cfg, horizon(
        cfg, ratio=config.ratio, batch_tokens=length.batch_tokens, steps=max(20, round(length.steps * edge**2))
    )


def stages(config: Config, *, fp8: bool) -> Iterator[Planned]:
    """All stages after the set-up, in order."""
    cfg, length = size(config)
    small, folder = config.scale < 1, str(config.folder)
    flops, tokens = cfg.flops_per_token(), length.steps * length.batch_tokens
    need = tokens * BYTES_PER_TOKEN * 1.1
    source = config.source.replace("SHARDS", str(max(2, math.ceil(need / SHARD_BYTES))))

    def scaled(count: int, least: int) -> str:
        return str(max(least, round(count * config.scale)))

    mix = re.sub(r"(?<=#)[0-9]+(?=[*,]|$)", lambda count: scaled(int(count[0]), 60), config.mix)
    held_out = "0.05" if small else "0.005"
    every = ("--run.save-every", "10", "--run.eval-every", "10") if small else ("--eval-rows", "4096")
    tokenizer = f"{folder}/tokenizer/tokenizer.model"
    yield Planned(
        "tokenizer", f"learn {cfg.vocab_size:,} tokens",
        ("train.tokenizer", "--source", source, "--vocab-size", str(cfg.vocab_size), "--val-fraction", held_out,
         "--max-bytes", scaled(200_000_000, 2_000_000), "--character-coverage", "0.9995", "--out", tokenizer),
        text_bytes=200e6 * config.scale,
    )  # fmt: skip
    yield Planned(
        "prepare", f"{need / 1e9:,.3g} GB of text into records of {cfg.sequence_len:,} tokens",
        ("train.prepare", "--source", source, "--tokenizer", tokenizer, "--sequence-len", str(cfg.sequence_len),
         "--val-fraction", held_out, "--out", f"{folder}/data"),
        text_bytes=need,
    )  # fmt: skip
    sized = ("--steps", str(length.steps), "--batch-tokens", str(length.batch_tokens)) if small else ()
    yield Planned(
        "pretrain", f"{cfg.n_layer} layers, {length.steps:,} steps of {length.batch_tokens:,} tokens",
        ("train.pretrain", "--data", f"{folder}/data", "--run.out", f"{folder}/base", "--model.depth", str(cfg.n_layer),
         "--model.head-dim", str(cfg.head_dim), "--ratio", str(config.ratio), *sized, *every,
         *(("--model.fp8",) if fp8 else ())),
        tokens=tokens, flops=tokens * flops,
    )  # fmt: skip
    bundle = ("--bundle", str(config.bundle)) if config.bundle else ()
    few = ("--examples", "12") if small else ()
    yield Planned(
        "evaluate", "bits per byte, CORE, samples",
        ("train.evaluate", "--checkpoint", f"{folder}/base", "--data", f"{folder}/data", "--suite", "bpb,core,sample",
         *bundle, *few),
        flops=45e6 * config.scale * flops / 3,
    )  # fmt: skip
    conversations = 920_000 * config.scale
    yield Planned(
        "sft", "learn to answer, from conversations",
        ("train.sft", "--checkpoint", f"{folder}/base", "--run.out", f"{folder}/sft", "--mix", mix,
         *(("--steps", "60", *every) if small else ())),
        tokens=conversations * CONVERSATION_TOKENS, flops=conversations * CONVERSATION_TOKENS * flops,
    )  # fmt: skip

    def judge(name: str) -> Planned:
        limit = ("--examples", "4", "--max-new-tokens", "32") if small else ()
        command = ("train.evaluate", "--checkpoint", f"{folder}/{name}", "--tasks", config.tasks, *limit)
        return Planned(f"judge {name}", "held-out questions", command, flops=6e6 * config.scale * flops)

    yield judge("sft")
    short = ("--max-new-tokens", "48") if small else ("--max-new-tokens", "256")
    # What a rehearsal's model answers is never right: it learns its preferences and rewards from what it can do.
    pair_task, rl_task = ("identity", "identity") if small else (config.rl_task, config.rl_task)
    yield Planned(
        "pairs", "answers of the model's own, a right one and a wrong one to each question",
        ("train.pairs", "--checkpoint", f"{folder}/sft", "--tasks", pair_task, "--examples", scaled(7473, 80), *short,
         "--out", f"{folder}/pairs.jsonl"),
        flops=7.5e6 * config.scale * flops,
    )  # fmt: skip
    yield Planned(
        "dpo", "learn to prefer the right ones",
        ("train.dpo", "--checkpoint", f"{folder}/sft", "--run.out", f"{folder}/dpo",
         "--pairs", f"jsonl:{folder}/pairs.jsonl", *(("--steps", "5") if small else ())),
        flops=4e6 * config.scale * flops,
    )  # fmt: skip
    yield Planned(
        "rl", "learn from what earns a reward",
        ("train.rl", "--checkpoint", f"{folder}/dpo", "--run.out", f"{folder}/rl", "--task", rl_task, *short,
         *(("--steps", "2", "--prompts-per-step", "4", "--samples", "4", "--eval-examples", "8") if small else ())),
        flops=120e6 * config.scale * flops,
    )  # fmt: skip
    yield judge("rl")
    yield Planned(
        "chat", "talk with it",
        ("serve.cli", "--backend.checkpoint", f"{folder}/rl", "--prompt", "Who are you?", "Why is the sky blue?"),
    )  # fmt: skip
    yield Planned("report", "curves, numbers and samples on one page", ("train.report", "--run", folder))
    yield Planned(
        "summary", "time, bits per byte, CORE",
        ("train.speedrun", "--summary", "--run", config.run, "--out", str(config.out), "--scale", str(config.scale),
         "--depth", str(config.depth), *(("--dollars-per-hour", str(p)) if (p := config.dollars_per_hour) else ())),
    )  # fmt: skip


def this_machine(config: Config) -> Machine:
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "0")
    fp8 = device.platform == "gpu" and float(capability) >= 9.0
    peak, _ = peak_flops("float32" if device.platform == "cpu" else "bfloat16")
    count, cores = jax.device_count(), os.cpu_count() or 1
    return Machine(f"{count} × {device.device_kind}", count, peak, cores, config.dollars_per_hour, fp8)


def print_plan(config: Config, machine: Machine) -> None:
    planned = list(stages(config, fp8=machine.fp8))
    print(f"{'stage':12}{'tokens':>10}{'FLOPs':>10}{'here':>12}   on {machine.name}{', fp8' if machine.fp8 else ''}")
    for stage in planned:
        hours = stage.seconds(machine) / 3600
        print(f"{stage.name:12}{stage.tokens:10.3g}{stage.flops:10.2g}{hours:10.2f} h   {stage.does}")
        print(f"{'':14}python -m {shlex.join(stage.command)}")
    print(f"\n{'machine':24}{'hours':>12}{'$ an hour':>12}{'$':>12}")
    known = (Machine(n, d, p, c, price, "H100" in n) for n, d, p, c, price in MACHINES)
    for other in (machine, *known):
        hours = sum(stage.seconds(other) for stage in stages(config, fp8=other.fp8)) / 3600
        price = other.dollars_per_hour
        cost = f"{price:12.2f}{price * hours:12.2f}" if price else f"{'?':>12}{'?':>12}"
        print(f"{other.name:24}{hours:12.2f}{cost}")
    print(f"\nestimates at {MFU:.0%} of the peak, without downloads, --scale {config.scale:g}; in {config.folder}")


def print_summary(config: Config) -> None:
    """One line, as a leaderboard has it."""
    run, timings = gather(config.folder), config.folder / "timings.tsv"
    lines = [line.split("\t") for line in timings.read_text().splitlines()] if timings.exists() else []
    seconds = {name: sum(int(s) for n, s in lines if n == name) for name in dict.fromkeys(n for n, _ in lines)}
    base = run.stages.get("base")
    if base is None:
        raise UserError(f"{config.folder} holds no pretrained model yet: run bash train/speedrun.sh")
    core = base.suites.get("core", {})
    hours, bpb = sum(seconds.values()) / 3600, base.bits_per_byte
    score = core.get("core", None)
    result = {
        "run": config.run,
        "depth": base.config.get("model", {}).get("depth"),
        "pretraining_hours": round(seconds.get("pretrain", 0) / 3600, 3),
        "hours": round(hours, 3),
        "dollars": round(hours * config.dollars_per_hour, 2) if config.dollars_per_hour else None,
        "val_bpb": None if bpb is None else round(bpb, 5),
        "core": score,
        "core_of_a_part": core.get("mean_centred") if score is None else None,  # fewer tasks or examples
        "gpt2_core": 0.256525,
    }
    print("".join(f"{name:>18}" for name in result))
    print("".join(f"{'-' if value is None else value!s:.16}".rjust(18) for value in result.values()))
    (config.folder / "summary.json").write_text(json.dumps(result | {"seconds": seconds}, indent=2) + "\n")


def main(config: Config) -> None:
    """Print the plan, the stages for the shell, or the summary."""
    if config.summary:
        return print_summary(config)
    machine = this_machine(config)
    if not config.print_stages:
        return print_plan(config, machine)
    planned = list(stages(config, fp8=machine.fp8))
    print(120 + sum(stage.seconds(machine) for stage in planned), 1 + len(planned), config.folder)
    for stage in planned:
        print(stage.name, stage.seconds(machine), stage.does, shlex.join(stage.command), sep="\t")
    return None


if __name__ == "__main__":
    cli.run(main, Config)
