"""The part of train.bench that measures CORE: batches beside one example a call."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from nanochat_jax import model, sharding, tokenizer
from nanochat_jax.eval import core
from nanochat_jax.eval.bundle import find_bundle, open_bundle
from nanochat_jax.eval.prompts import Choices
from nanochat_jax.eval.score import SHAPES, Plan, Scorer, Shape, plan
from train.pretrain import ModelArgs
from train.stage import ComputeConfig, at_least


@dataclass(frozen=True)
class Core:
    """CORE's examples per second on one device, in batches and with one example a call, both in the same lengths."""

    tokenizer: Path
    """Tokenizer file, as train.tokenizer makes it."""
    bundle: Path | None = None
    """Folder of the tasks' files, as unzipped; default: downloaded once."""
    model: ModelArgs = field(default_factory=ModelArgs)
    examples: int = 0
    """Of each task, the first; 0 for all."""
    alone: int = 400
    """So many of the examples, evenly spread, are measured with one a call; 0 for all."""
    rows: int = 8
    """Sequences of sequence-len tokens that are computed at a time; of shorter ones more."""
    vocab_size: int = 32768
    """Of the model; at least the tokenizer's."""
    sequence_len: int = 2048
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        for name in ("examples", "alone"):
            at_least(name, getattr(self, name), 0)
        at_least("rows", self.rows, 1)


def bench_core(config: Core) -> dict[str, Any]:
    """Examples per second in batches whose choices share their prefix, and of one example a call, each choice a row."""
    compute, tok = config.compute.resolve(), tokenizer.load(config.tokenizer)
    cfg = config.model.architecture(max(config.vocab_size, tok.vocab_size), config.sequence_len)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    params = jax.device_put(model.init_params(jax.random.key(0), cfg, compute), sharding.replicated(mesh))
    tasks = open_bundle(find_bundle(config.bundle))
    rendered = core.render_all(core.Rendering(tasks, config.examples, tok.to_bytes(), core.longest_prompt(cfg)))
    items = [item for group in rendered for item in group]
    some = items[:: max(1, len(items) // config.alone)] if config.alone else items

    def examples_per_second(tokens: int, calls: Sequence[tuple[list[Choices], Plan]]) -> tuple[float, int]:
        scorer = Scorer(params, cfg, compute, mesh, tokens)
        for is_warm in (False, True):
            started = time.perf_counter()
            for group, rows in calls:
                scorer.score(group, rows)
            if is_warm:
                seconds = time.perf_counter() - started
        return sum(len(group) for group, _ in calls) / seconds, scorer.compilations

    batches, compilations = examples_per_second(config.rows * cfg.sequence_len, [(items, plan(items))])
    alone, _ = examples_per_second(0, [([item], plan([item], unshared(item))) for item in some])
    shared, _ = examples_per_second(0, [([item], plan([item])) for item in some])
    return {
        "examples": {task.name: len(group) for task, group in zip(tasks, rendered, strict=True)},
        "examples_per_second": {"batches": batches, "one_a_call": alone, "one_a_call_with_shared_prefix": shared},
        "ratio": batches / alone,
        "compilations": compilations,
        "rows_by_shape": {str(tuple(shape)): len(rows) for shape, rows in plan(items).items()},
    }


def unshared(item: Choices) -> list[Shape]:
    """Shapes whose rows hold all sequences of an item, each of them whole."""
    return [shape._replace(branches=len(item.tails)) for shape in SHAPES if not shape.prefix]
