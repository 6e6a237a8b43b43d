"""The plan of the speedrun: what a scale shrinks, and where folders are looked for."""

import subprocess
from pathlib import Path

from train import speedrun

ROOT = Path(__file__).parents[1]


def test_a_scale_shrinks_the_counts_of_a_mixture_and_nothing_else():
    mix = "hub:o/n#data/train-*.parquet,task:smoltalk#460000,task:gsm8k#7473*4,jsonl:a/*.jsonl#90,task:identity*14"
    sft = next(
        stage for stage in speedrun.stages(speedrun.Config(scale=0.01, mix=mix), fp8=False) if stage.name == "sft"
    )
    shrunk = "hub:o/n#data/train-*.parquet,task:smoltalk#4600,task:gsm8k#75*4,jsonl:a/*.jsonl#60,task:identity*14"
    assert sft.command[sft.command.index("--mix") + 1] == shrunk


def test_folders_are_seen_from_where_the_user_stands(tmp_path):
    def plan(*options: str) -> str:
        command = ["bash", str(ROOT / "train/speedrun.sh"), "--plan", *options]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert f"--bundle {tmp_path}/b\n" in (printed := plan("--out=o", "--bundle", "b"))
    assert f"in {tmp_path}/o/speedrun" in printed and str(ROOT) not in printed
