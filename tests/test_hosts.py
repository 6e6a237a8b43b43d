"""Several processes are one run: real ones, with jax.distributed over gloo, eight devices in all."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import every_stage
import jax
import numpy as np
import pytest
from test_core import make_bundle
from test_state import largest_error

from nanochat_jax.chat import conversation
from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.config import OptimConfig
from nanochat_jax.data import prepare as preparing
from nanochat_jax.data.corpus import open_corpus
from nanochat_jax.load import load_model
from nanochat_jax.metrics import read_metrics
from nanochat_jax.sharding import MeshConfig
from train import pretrain, sft
from train.stage import RunConfig

ROOT = Path(__file__).parents[1]
STEPS = 10
TIMES = "second|mfu"


def launch(processes: int, *command: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "train.launch", "--processes", str(processes), "--", *command],
        env=os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // processes}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            **environment,
        },
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors[-6000:]
    return out, errors


def pretrain_command(data: Path, out: Path, *more: str) -> list[str]:
    return [
        "train.pretrain", "--data", str(data), "--run.out", str(out), "--run.save-every", "2", "--run.eval-every", "3",
        "--run.micro-batch", "1", "--run.mesh.data", "4", "--run.mesh.fsdp", "2",
        "--model.depth", "1", "--model.head-dim", "32", "--optim.warmup-steps", "2", "--steps", str(STEPS),
        "--batch-tokens", "512", "--prompts", "ab", "--seed", "3", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory) -> Path:
    """The run of one process with all eight devices."""
    out = tmp_path_factory.mktemp("single")
    pretrain.main(
        pretrain.Config(
            data=tiny_data,
            run=RunConfig(out=out, save_every=2, eval_every=3, micro_batch=1, mesh=MeshConfig(4, 2)),
            model=pretrain.ModelArgs(depth=1, head_dim=32),
            optim=OptimConfig(warmup_steps=2),
            steps=STEPS,
            batch_tokens=512,
            prompts=("ab",),
            seed=3,
        )
    )
    return out


def check_alike(out: Path, whole: Path) -> None:
    """All that is measured, and the parameters, in float32: sums over other links are added in another order."""
    check_close(read_metrics(out), read_metrics(whole))
    for name in ("loss", "val_bpb"):
        found, wanted = ([each[name] for each in read_metrics(run) if name in each] for run in (out, whole))
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    found, wanted = (jax.device_get(load_model(folder).params) for folder in (out, whole))
    assert largest_error(found, wanted) < 5e-5  # as on meshes of one process: Adam blows up a vanishing gradient's


def check_close(found: Any, wanted: Any) -> None:
    """The same JSON, but for how long things took, and the rounding of numbers."""
    if isinstance(wanted, dict):
        found, wanted = (
            {name: x for name, x in each.items() if not re.search(TIMES, name)} for each in (found, wanted)
        )
        assert found.keys() == wanted.keys()
        for name in wanted:
            check_close(found[name], wanted[name])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            check_close(one, other)
    else:
        assert found == (pytest.approx(wanted, rel=1e-4, abs=1e-6) if isinstance(wanted, float) else wanted)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_like_one(tiny_data, tmp_path, whole, processes):
    out, errors = finish(launch(processes, *pretrain_command(tiny_data, tmp_path)))
    check_alike(tmp_path, whole)
    assert out.count("starting at step 0 on 8") == out.count("  ab│") == 1  # the first process speaks, no other does
    assert len(re.findall(r"\[.*step/s", errors)) >= 1


def kill_when(process: subprocess.Popen, path: Path, number: int, child: int) -> None:
    """Send a signal to one of a launcher's processes, once a path exists."""
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.communicate()[1][-6000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[child]), number)


@pytest.mark.slow
def test_killed_stopped_and_resumed_by_fewer_processes(tiny_data, tmp_path, whole):
    """Four processes, of which one is killed; two, of which one is told to stop; one."""
    checkpoints = tmp_path / "checkpoints"
    command = pretrain_command(tiny_data, tmp_path)
    killed = launch(4, *command)
    kill_when(killed, checkpoints / "2", signal.SIGKILL, child=2)
    finish(killed, code=128 + signal.SIGKILL)
    newest = Checkpoints(checkpoints).newest()
    assert newest in (2, 4)
    stopped = launch(2, *command)
    kill_when(stopped, checkpoints / str(newest + 2), signal.SIGTERM, child=1)
    _, errors = finish(stopped, code=128 + signal.SIGTERM)
    assert errors.count("Run the same command to go on") == 1
    reached = Checkpoints(checkpoints).newest()
    assert reached is not None and newest + 2 <= reached < STEPS
    out, _ = finish(launch(1, *command))
    assert f"going on from step {reached}" in out
    check_alike(tmp_path, whole)


@pytest.mark.slow
def test_told_to_stop_while_waiting_for_data_all_save_and_stop(tiny_data, tmp_path, monkeypatch):
    """Preparation has stopped behind the first unit, of which a step wants all records; a whole job is told to stop."""
    real = preparing._prepare_unit

    def dying(job, tok, unit):
        if unit == 1:
            raise KeyboardInterrupt
        real(job, tok, unit)

    monkeypatch.setattr(preparing, "_prepare_unit", dying)
    source, tokenizer = f"text:{tiny_data.parent}/*.txt", tiny_data / "tokenizer.model"
    with pytest.raises(KeyboardInterrupt):
        preparing.prepare(
            preparing.PrepareConfig(source, tokenizer, tmp_path / "data", 32, 0.1, unit_bytes=20_000, workers=1)
        )
    rows = len(open_corpus(tmp_path / "data", window_units=1).train) // 8 * 8
    more = "--run.save-every", "0", "--window-units", "1", "--batch-tokens", str(32 * rows)
    process = launch(2, *pretrain_command(tmp_path / "data", tmp_path / "run", *more))
    while "waiting for more" not in process.stdout.readline():
        assert process.poll() is None, process.communicate()[1][-6000:]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for number in (*map(int, children), process.pid):  # whose signal reaches the children once more
        os.kill(number, signal.SIGTERM)
    _, errors = finish(process, code=128 + signal.SIGTERM)
    assert errors.count("stopped by SIGTERM after step 1; all is saved") == 1
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [1]


def test_processes_that_differ_are_told_once(tiny_data, tmp_path):
    """Each process is given its number as the seed."""
    program = tmp_path / "differ.py"
    program.write_text(
        "import os, runpy, sys\n"
        "sys.argv += ['--seed', os.environ['JAX_PROCESS_ID']]\n"
        "runpy.run_module('train.pretrain', run_name='__main__')\n"
    )
    command = pretrain_command(tiny_data, tmp_path / "run")
    process = launch(2, "differ", *command[1:-2], PYTHONPATH=f"{tmp_path}:{ROOT}")
    _, errors = finish(process, code=2)
    assert errors.count("error: ") == 1
    assert "config.seed: 0 of process 0, but 1 of process 1" in errors
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused_by_all(tiny_data, tmp_path):
    from nanochat_jax.files import locked

    with locked(tmp_path):
        _, errors = finish(launch(2, *pretrain_command(tiny_data, tmp_path)), code=2)
    assert errors.count("error: another process is at work") == 1


@pytest.fixture(scope="module")
def given(tiny_base, tmp_path_factory) -> tuple[Path, Path, Path]:
    """What every_stage starts from: a run, one that has learnt two answers to each question, and CORE's files."""
    folder = tmp_path_factory.mktemp("given")
    asked = [example.prompt["messages"][0]["content"] for example in every_stage.toy("").examples("train")]
    chats = [conversation(question, answer) for question in asked for answer in every_stage.ANSWERS]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    run, mix = RunConfig(out=folder / "unsure", save_every=0, eval_every=0), f"jsonl:{folder}/chats.jsonl"
    sft.main(sft.Config(tiny_base, run, mix, steps=60, batch_tokens=1024, prompts=(), eval_rows=8))
    return tiny_base, folder / "unsure", make_bundle(folder / "bundle")


@pytest.fixture(scope="module")
def in_two_and_one(given, tmp_path_factory) -> Callable[[tuple[str, ...]], tuple[Path, Path]]:
    """What stages make in two processes, and in one."""

    @cache
    def run(stages: tuple[str, ...]) -> tuple[Path, Path]:
        two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
        process = launch(2, "every_stage", *map(str, (*given, two)), ",".join(stages))
        every_stage.main(*given, one, stages)
        out, _ = finish(process)
        assert out.count("starting at step 0 on 8") == len({"sft", "dpo", "rl"} & {*stages})  # nothing is said twice
        return two, one

    return run


def test_several_processes_make_pairs_like_one(in_two_and_one):
    two, one = (folder / "pairs.jsonl" for folder in in_two_and_one(every_stage.QUICK))
    assert two.read_bytes() == one.read_bytes()


@pytest.mark.parametrize("stage", ["dpo", *(pytest.param(stage, marks=pytest.mark.slow) for stage in every_stage.SLOW)])
def test_several_processes_fine_tune_like_one_which_goes_on_from_theirs(given, in_two_and_one, tmp_path, stage):
    two, one = in_two_and_one(every_stage.QUICK if stage in every_stage.QUICK else every_stage.SLOW)
    check_alike(two / stage, one / stage)
    again = shutil.copytree(two, tmp_path / "again")
    shutil.rmtree(again / stage / "checkpoints" / str(every_stage.STEPS))
    every_stage.main(*given, again, (stage,))
    check_alike(again / stage, one / stage)


def test_several_processes_measure_and_sample_like_one(in_two_and_one):
    """With rows shared by the processes, and with each row computed by both."""
    folders = in_two_and_one(every_stage.QUICK)
    two, one = (json.loads((folder / "measured.json").read_text()) for folder in folders)
    check_close(two, one)
    check_close(two["tensor"]["core"], one["data"]["core"])
