"""Every stage after pretraining, as small as can be: test_hosts runs them in one process, and this program in several.

python -m train.launch --processes 2 -- every_stage BASE UNSURE BUNDLE OUT
"""

import json
import sys
from pathlib import Path
from unittest import mock

from nanochat_jax import hosts, tasks
from nanochat_jax.chat import conversation
from nanochat_jax.sharding import MeshConfig
from nanochat_jax.tasks import Example, Task
from train import dpo, evaluate, pairs, rl, sample, sft
from train.stage import RunConfig

STEPS = 2
QUICK, SLOW = ("pairs", "dpo", "measure"), ("sft", "rl")  # dpo takes the pairs, and its model is measured
ANSWERS = ("yes", "no")


def toy(argument: str) -> Task:
    """Only one of the answers that the model gives is right."""
    examples = [Example(conversation(f"Is it {n}?", ANSWERS[0]), None) for n in range(24)]
    return Task("toy", "generative", lambda split: examples, lambda example, text: text == ANSWERS[0])


def run(stage: str, base: Path, unsure: Path, bundle: Path, out: Path) -> None:
    """Run one of the stages, whose results go to `out`."""
    config = RunConfig(out=out / stage, save_every=1, eval_every=1, micro_batch=1, mesh=MeshConfig(2, 2, 2))
    tuning = {"steps": STEPS, "lr_fraction": 0.2}
    made = out / "pairs.jsonl"
    if stage == "pairs":
        pairs.main(pairs.Config(unsure, made, "toy", samples=8, per_question=2, max_new_tokens=6, slots=1))
    elif stage == "dpo":
        dpo.main(dpo.Config(unsure, config, f"jsonl:{made}", batch_pairs=8, **tuning))
    elif stage == "sft":
        mix = "task:identity#24,task:arithmetic#24"
        sft.main(sft.Config(base, config, mix, batch_tokens=1024, eval_rows=8, prompts=(), **tuning))
    elif stage == "rl":
        numbers = {"prompts_per_step": 4, "samples": 4, "max_new_tokens": 4, "slots": 4, "kl_weight": 0.1}
        evaluation = {"eval_examples": 4, "eval_samples": 2, "pass_k": 2}
        rl.main(rl.Config(unsure, config, "toy", **tuning, **numbers, **evaluation))
    else:
        measure(out / "dpo", str(base.parent / "data"), bundle, out / "measured.json")


def measure(checkpoint: Path, data: str, bundle: Path, out: Path) -> None:
    """Evaluate and sample: with rows shared by all devices, then by none."""
    sizes = {"rows": 1, "bundle": bundle, "tasks": "toy", "examples": 8, "max_new_tokens": 4, "slots": 1}
    results = {}
    for name, suite, mesh in (("data", "bpb,core,chat", MeshConfig()), ("tensor", "core", MeshConfig(1, 1, 8))):
        config = evaluate.Config(checkpoint, data, suite, force=True, mesh=mesh, **sizes)
        results[name] = evaluate.main(config)["suites"]
    results["texts"] = sample.main(sample.Config(checkpoint, ("Who are", "What"), max_new_tokens=8))
    if hosts.is_first():
        out.write_text(json.dumps(results))


def main(base: Path, unsure: Path, bundle: Path, out: Path, stages: tuple[str, ...]) -> None:
    """Run stages, one after the other."""
    with mock.patch.dict(tasks.TASKS, toy=toy):
        for stage in stages:
            run(stage, base, unsure, bundle, out)


if __name__ == "__main__":
    hosts.join()
    *folders, joined = sys.argv[1:]
    main(*map(Path, folders), tuple(joined.split(",")))
