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

STEPS = 4
STAGES = ("sft", "dpo", "rl")  # those that train
ANSWERS = ("yes", "no")


def toy(argument: str) -> Task:
    """Only one of the answers that the model gives is right."""
    examples = [Example(conversation(f"Is it {n}?", ANSWERS[0]), None) for n in range(24)]
    return Task("toy", "generative", lambda split: examples, lambda example, text: text == ANSWERS[0])


def tune(stage: str, base: Path, unsure: Path, out: Path) -> None:
    """Run a stage that trains into a folder of its own."""
    run = RunConfig(
        out=out / stage, save_every=2, eval_every=2, sample_every=2, micro_batch=1, mesh=MeshConfig(2, 2, 2)
    )
    if stage == "sft":
        mix = "task:identity#24,task:arithmetic#24"
        sft.main(
            sft.Config(
                base, run, mix=mix, steps=STEPS, batch_tokens=1024, lr_fraction=0.2, eval_rows=8, prompts=("Who?",)
            )
        )
    elif stage == "dpo":
        dpo.main(dpo.Config(unsure, run, f"jsonl:{out}/pairs.jsonl", steps=STEPS, batch_pairs=8, lr_fraction=0.2))
    else:
        numbers = {"prompts_per_step": 4, "samples": 4, "max_new_tokens": 4, "slots": 4, "kl_weight": 0.1}
        evaluation = {"eval_examples": 4, "eval_samples": 2, "pass_k": 2}
        with mock.patch.dict(tasks.TASKS, toy=toy):
            rl.main(rl.Config(unsure, run, "toy", steps=STEPS, lr_fraction=0.2, **numbers, **evaluation))


def main(base: Path, unsure: Path, bundle: Path, out: Path) -> None:
    """Run every stage, what it makes under `out`; what is not written by itself goes to results.json."""
    with mock.patch.dict(tasks.TASKS, toy=toy):
        pairs.main(
            pairs.Config(unsure, out / "pairs.jsonl", "toy", samples=8, per_question=2, max_new_tokens=6, slots=1)
        )
    for stage in STAGES:
        tune(stage, base, unsure, out)
    measure = {"rows": 1, "bundle": bundle, "tasks": "identity", "examples": 8, "max_new_tokens": 4, "slots": 1}
    results = {}
    for name, suite, mesh in (("data", "bpb,core,chat,sample", MeshConfig()), ("tensor", "bpb,core", MeshConfig(1, 1, 8))):
        evaluated = evaluate.Config(out / "sft", str(base.parent / "data"), suite, force=True, mesh=mesh, **measure)
        results[name] = evaluate.main(evaluated)["suites"]
    results["texts"] = sample.main(sample.Config(out / "sft", ("Who are", "What"), max_new_tokens=8))
    if hosts.is_first():
        (out / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    hosts.join()
    main(*map(Path, sys.argv[1:]))
