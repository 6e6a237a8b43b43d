"""Put what a run left behind on one page: report.html with curves, and report.md.

    python -m train.report --run runs/demo
    python -m train.report --run runs/demo --compare runs/quick --dollars-per-hour 0.4

Stages that were not run are left out; what is missing of one that was is named at the end of the page.
"""

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from nanochat_jax.chat import Conversation, content_parts, visible_text
from nanochat_jax.config import from_json
from nanochat_jax.errors import UserError
from nanochat_jax.eval import report as page
from nanochat_jax.eval.plots import Curves, save_png
from nanochat_jax.eval.report import Answer, Block, Code, Exchange, Table, Text, flat, side_by_side
from nanochat_jax.files import write_bytes
from train import cli, dpo, evaluate, prepare, pretrain, results, rl, sft, suites, tokenizer
from train.pairs import Config as PairsConfig
from train.runs import Run, StageRun, gather

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")

Plots = dict[str, dict[str, str]]  # title → pattern of metrics' names → label, which may refer to the pattern's groups

NORMS = "Norms of the gradient and of the update"
RATES: Plots = {
    NORMS: {"grad_norm": "gradient", "update_norm": "update"},
    "Throughput, tokens per second": {"tokens_per_second": ""},
    "MFU, share of the device's peak": {"mfu": ""},
}
LANGUAGE: Plots = {
    "Loss, nats per token": {"loss": "training", "val_loss": "validation"},
    "Validation bits per byte": {"val_bpb": "this model"},
    **RATES,
}
PREFERENCE: Plots = {
    "Loss": {"loss": "training", "val_loss": "validation"},
    "Margin of chosen over rejected, nats": {"margin": "training", "val_margin": "validation"},
    "Share of pairs in the right order": {"accuracy": "training", "val_accuracy": "validation"},
    "Chosen answers, nats per token": {"chosen_nats": "training", "val_chosen_nats": "validation"},
    **RATES,
}
REWARD: Plots = {
    "Reward, mean of the sampled answers": {"reward": ""},
    "Share of held-out questions answered rightly": {"val_accuracy": "greedy", r"val_pass_at_(\d+)": r"pass@\1"},
    "Share of questions with right and wrong answers": {"mixed": ""},
    "Length of the sampled answers, tokens": {"answer_tokens": ""},
    "Surprise, nats per sampled token": {"nats": ""},
    "Divergence from the start, nats per token": {"kl": ""},
    "Sampling, tokens per second": {"sampled_tokens_per_second": ""},
    **RATES,
}


class Program(NamedTuple):
    """What makes a stage, and what is drawn of it."""

    title: str
    module: str  # in train
    config: type
    plots: Plots


PROGRAMS = {
    "base": Program("Pretraining", "pretrain", pretrain.Config, LANGUAGE),
    "sft": Program("Supervised fine-tuning", "sft", sft.Config, LANGUAGE),
    "dpo": Program("Preference optimisation", "dpo", dpo.Config, PREFERENCE),
    "rl": Program("Reinforcement learning", "rl", rl.Config, REWARD),
}


@dataclass(frozen=True)
class Config:
    run: Path
    """Folder of the run, which holds any of tokenizer/, data/, base/, sft/, dpo/ and rl/."""
    compare: tuple[Path, ...] = ()
    """Other runs, to be set beside this one."""
    dollars_per_hour: float | None = None
    """Price of the machine, to estimate what the run cost."""
    image: Path | None = None
    """Draw loss and bits per byte of pretraining into this PNG file too."""

    def __post_init__(self) -> None:
        if self.dollars_per_hour is not None and self.dollars_per_hour <= 0:
            raise UserError(f"--dollars-per-hour {self.dollars_per_hour} must be positive")


def headline(run: Run, dollars_per_hour: float | None) -> list[Block]:
    """The first numbers, and the model beside simpler methods."""
    tiles = list(results.headline(run, dollars_per_hour).items())
    blocks: list[Block] = [Table(tiles, style="tiles")] if tiles else []
    for stage, found in run.stages.items():
        for name, text in found.texts.items():
            methods = {"this model": text.bits_per_byte, **text.baselines}
            rows = [(method, f"{bits:.4f}", f"{bits / text.bits_per_byte:.2f}×") for method, bits in methods.items()]
            size = f"{text.bytes:,} held-out bytes ({text.tokens:,} tokens) of {name}"
            interval = "; 95 % interval {:.4f} – {:.4f}".format(*text.interval) if text.interval else ""
            blocks.append(Text(f"{size}, measured on {stage}, step {found.evaluation['step']:,}{interval}:"))
            blocks.append(Table(rows, ("", "bits per byte", "against the model"), "numbers"))
    return blocks


def conversations(run: Run) -> list[Block]:
    """Answers of the last stage that was asked, right and wrong."""
    name, found = next(((name, stage) for name, stage in reversed(run.stages.items()) if stage.tasks), ("", None))
    if found is None:
        return []
    shown = [
        Exchange(task, verdict.question, (Answer(verdict.answer, "right" if is_right else "wrong", is_right),))
        for task, result in found.tasks.items()
        for verdict in result.samples
        for is_right in [verdict.is_right]
    ]
    return [Text(f"After {name}, of each task the first right answer and the first wrong one:"), *shown]


def pairs(run: Run) -> list[Block]:
    """How many pairs there are of each task, and the first of them."""
    blocks: list[Block] = [Table([(task, f"{count:,}") for task, (count, _) in run.pairs.items()], style="numbers")]
    for task, (_, pair) in run.pairs.items():
        answers = (Answer(_said(pair.chosen), "chosen", True), Answer(_said(pair.rejected), "rejected", False))
        blocks.append(Exchange(task, visible_text(content_parts(pair.prompt["messages"][-1])), answers))
    return blocks if run.pairs else []


def _said(conversation: Conversation) -> str:
    """The last message, with its calls of tools and what came of them."""
    forms = {"text": "{}", "python": "⟨{}⟩", "python_output": " = {}\n"}
    return "".join(forms[part["type"]].format(part["text"]) for part in content_parts(conversation["messages"][-1]))


def plots(name: str, stage: StageRun) -> list[Curves]:
    """Curves of what a stage logged, and of its learning rate."""
    logged = sorted({metric for record in stage.metrics for metric, value in record.items() if value is not None})
    drawn = []
    for title, patterns in PROGRAMS[name].plots.items():
        found = [(re.fullmatch(pattern, metric), label) for pattern, label in patterns.items() for metric in logged]
        metrics = {match[0]: match.expand(label) for match, label in found if match}
        levels = stage.baselines if "val_bpb" in metrics else {}
        drawn += [Curves(title, name, stage.metrics, metrics, levels, is_log=title == NORMS)] if metrics else []
    rates = results.learning_rates(stage) if stage.metrics else []
    return drawn + ([Curves("Learning rate of the matrices", name, rates, {"rate": ""}, {})] if rates else [])


def stage_section(name: str, stage: StageRun) -> list[Block]:
    """What a stage logged, and what it writes."""
    samples = stage.suites.get("sample", {}).get("samples", [])
    return [*plots(name, stage), *(Code(sample["text"], prompt=sample["prompt"]) for sample in samples)]


def beside(runs: list[Run], dollars_per_hour: float | None) -> list[Block]:
    """Runs side by side: their numbers, and their bits per byte in one plot."""
    curves = {str(run.folder): run.stages["base"].metrics for run in runs if "base" in run.stages}
    records = [
        {"step": record["step"], name: record["val_bpb"]}
        for name, metrics in curves.items()
        for record in metrics
        if record.get("val_bpb") is not None
    ]
    titles = {name: name for name in curves if any(name in record for record in records)}
    plot = [Curves("Validation bits per byte", "compare", records, titles, {})] if titles else []
    return [results.compare(runs, dollars_per_hour), *plot]


def settings(run: Run) -> dict[str, list[Block]]:
    """Tables of what was chosen and of what that came to, stage beside stage."""
    parts = ("model", "horizon", "optim")
    recipes = {
        name: flat({part: stage.recipe[part] for part in parts if part in stage.recipe})
        for name, stage in run.stages.items()
    }
    configs = {name: flat(stage.config) for name, stage in run.stages.items()}
    return {
        "Model and horizon": [side_by_side(recipes)] if any(recipes.values()) else [],
        "Configuration": [side_by_side(configs)] if any(configs.values()) else [],
        "Data": [Table(list(flat(run.data).items()))] if run.data else [],
        "Tokenizer": [Table(list(flat(run.tokenizer).items()))] if run.tokenizer else [],
    }


def commands(run: Run, config: Config) -> list[Block]:
    """The commands that made the run, from the configs that its stages left."""
    model, data = run.folder / "tokenizer" / "tokenizer.model", run.data
    learnt = {name: value for name, value in run.tokenizer_config.items() if name != "corpus"}
    prepared = {field.name: data[field.name] for field in fields(prepare.Config) if field.name in data}
    made: list[tuple[str, type, dict[str, Any]]] = [
        ("tokenizer", tokenizer.Config, learnt and {**learnt, "out": model}),
        ("prepare", prepare.Config, prepared and {**prepared, "tokenizer": model, "out": run.folder / "data"}),
    ]
    for name, stage in run.stages.items():
        if name == "dpo":
            made.append(("pairs", PairsConfig, run.pairs_config))
        made.append((PROGRAMS[name].module, PROGRAMS[name].config, stage.config))
        made.append(("evaluate", evaluate.Config, stage.evaluation.get("config", {})))
    made.append(("report", Config, {field.name: getattr(config, field.name) for field in fields(config)}))
    return [Code(command_line(stage, cls, values)) for stage, cls, values in made if values]


def command_line(stage: str, cls: type, values: dict[str, Any]) -> str:
    """The command that gives a stage these settings, without the flags that would repeat a default."""
    try:
        return shlex.join(["python", "-m", f"train.{stage}", *_flags(from_json(cls, values, stage), None, "")])
    except UserError as error:
        return f"# train.{stage} was of another version: {error}"


def _flags(config: Any, usual: Any, prefix: str) -> Iterator[str]:
    for field in fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        default = field.default if field.default_factory is MISSING else field.default_factory()
        default = default if usual in (None, MISSING) else getattr(usual, field.name)
        if is_dataclass(value):
            yield from _flags(value, default, f"{prefix}{name}.")
        elif isinstance(value, bool) and value != default:
            yield f"--{prefix}{'' if value else 'no-'}{name}"
        elif value != default:
            yield from (f"--{prefix}{name}", *map(str, value if isinstance(value, tuple) else [value]))


def environment() -> list[Block]:
    """Of the machine that makes the report, which is mostly the one that trained."""
    rows = [("Python", platform.python_version())]
    rows += [(name, importlib.metadata.version(name)) for name in PACKAGES]
    try:
        device = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    except RuntimeError as error:  # a TPU serves one process at a time
        device = f"not to be had now: {error}"
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "not a git checkout"
    rows += [("device", device), ("CPU", f"{os.cpu_count()} × {cpu[1] if cpu else platform.machine()}")]
    return [Table([*rows, ("system", platform.platform()), ("git commit", commit)])]


def main(config: Config) -> dict[str, Path]:
    """Write both files; returns their paths by kind."""
    run, others = gather(config.run), [gather(folder) for folder in config.compare]
    asked, core = results.task_table(run), results.core_table(run)
    notes = run.notes + [f"{other.folder}: {note}" for other in others for note in other.notes]
    sections: dict[str, list[Block]] = {
        "Results": headline(run, config.dollars_per_hour),
        "CORE": [Text(IN_CONTEXT), core] if core else [],
        "Tasks": [Text(ASKED), asked] if asked else [],
        "Beside other runs": beside([run, *others], config.dollars_per_hour) if others else [],
        "Conversations": conversations(run),
        **{f"{PROGRAMS[name].title} ({name})": stage_section(name, stage) for name, stage in run.stages.items()},
        "Preference pairs": pairs(run),
        "Time": [results.times(run, config.dollars_per_hour), Text(UNCOUNTED)] if run.stages else [],
        **settings(run),
        "Environment": environment(),
        "Commands": commands(run, config),
        "Missing": [Text(note) for note in notes],
    }
    title = f"nanochat-jax: {config.run.resolve().name}"
    paths = {"html": config.run / "report.html", "md": config.run / "report.md"}
    write_bytes(paths["html"], page.to_html(title, sections).encode(errors="replace"))
    write_bytes(paths["md"], page.to_markdown(title, sections).encode(errors="replace"))
    if config.image is not None:
        if not (drawn := plots("base", run.stages["base"])[:2] if "base" in run.stages else []):
            raise UserError(f"--image {config.image}: {config.run} has no metrics of pretraining to draw")
        save_png(drawn, config.image)
    for note in notes:
        print(f"note: {note}")
    for stage in run.stages.values():
        for name, result in stage.suites.items():
            if name != "chat":
                suites.SUITES[name].show(result)
    for block in sections["Tasks"] + sections["Beside other runs"]:
        print(f"\n{block.plain()}".rstrip())
    print("report: " + ", ".join(map(str, paths.values())))
    return paths


IN_CONTEXT = "Items answered rightly in the tasks of CORE, with 95 % intervals:"
ASKED = "Held-out questions answered rightly, with 95 % intervals:"
UNCOUNTED = "Compilation, saving and what is measured during training come on top: no log has their time."


if __name__ == "__main__":
    cli.run(main, Config)
