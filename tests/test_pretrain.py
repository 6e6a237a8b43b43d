import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from nanochat_jax import sharding
from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.config import OptimConfig
from nanochat_jax.data import corpus as corpora
from nanochat_jax.data import prepare as preparing
from nanochat_jax.errors import UserError
from nanochat_jax.files import locked
from nanochat_jax.layers import Compute
from nanochat_jax.load import load_model
from nanochat_jax.metrics import read_metrics
from nanochat_jax.sampling import Sampling
from nanochat_jax.sharding import MeshConfig
from train import pretrain, sample
from train.stage import ComputeConfig, RunConfig, _steps

STEPS = 12


def config(data: Path, out: Path, **changes) -> pretrain.Config:
    run = {"out": out, "save_every": 4, "eval_every": 6, **changes.pop("run", {})}
    return pretrain.Config(
        data=data,
        run=RunConfig(**run),
        optim=OptimConfig(warmup_steps=2),
        **{
            "model": pretrain.ModelArgs(depth=1, head_dim=32),
            "steps": STEPS,
            "batch_tokens": 512,
            "prompts": ("ab",),
            "seed": 3,
            **changes,
        },
    )


def command(data: Path, out: Path) -> list[str]:
    """The same as config(), as a command line."""
    return [
        sys.executable, "-m", "train.pretrain", "--data", str(data), "--run.out", str(out), "--run.save-every", "4",
        "--run.eval-every", "6", "--model.depth", "1", "--model.head-dim", "32", "--steps", str(STEPS),
        "--batch-tokens", "512", "--optim.warmup-steps", "2", "--prompts", "ab", "--seed", "3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    return os.environ | {
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla")),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory, environment) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    done = subprocess.run(command(tiny_data, out), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def losses(out: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(out) if "loss" in record]


def final_arrays(out: Path):
    checkpoint = Checkpoints(out / "checkpoints").peek(STEPS)
    assert checkpoint is not None
    return checkpoint.arrays  # each with a fingerprint of all its bits


def test_it_learns_and_leaves_everything_behind(whole):
    first, last = losses(whole)[0][1], losses(whole)[-1][1]
    assert last < first - 0.2
    measured = [record for record in read_metrics(whole) if "val_bpb" in record]
    assert [record["step"] for record in measured] == [6, 12]
    assert measured[-1]["val_bpb"] < measured[0]["val_bpb"]
    stored = json.loads((whole / "config.json").read_text())
    assert stored["model"]["depth"] == 1 and stored["seed"] == 3


def kill_when(process: subprocess.Popen, folder: Path, pattern: str, number: int) -> None:
    os.setpriority(os.PRIO_PROCESS, process.pid, 19)  # who looks has to see in time what passes quickly
    deadline = time.monotonic() + 300
    while not list(folder.glob(pattern)):
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline, f"no {pattern} within five minutes"
        time.sleep(0.0005)
    process.send_signal(number)


def test_killed_in_mid_save_and_run_again_it_ends_bitwise_the_same(tiny_data, tmp_path, environment, whole):
    process = subprocess.Popen(command(tiny_data, tmp_path), env=environment, stderr=subprocess.DEVNULL)
    kill_when(process, tmp_path / "checkpoints", "8.orbax-checkpoint-tmp*", signal.SIGKILL)
    process.wait()
    assert 8 not in Checkpoints(tmp_path / "checkpoints").steps()
    assert Checkpoints(tmp_path / "checkpoints").newest() == 4
    subprocess.run(command(tiny_data, tmp_path), env=environment, check=True, capture_output=True)
    assert final_arrays(tmp_path) == final_arrays(whole)
    assert losses(tmp_path) == losses(whole)


def test_sigterm_saves_and_the_same_command_goes_on_bitwise(tiny_data, tmp_path, environment, whole):
    process = subprocess.Popen(command(tiny_data, tmp_path), env=environment, stderr=subprocess.PIPE, text=True)
    kill_when(process, tmp_path / "checkpoints", "4", signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "Run the same command to go on" in errors
    assert 4 < (Checkpoints(tmp_path / "checkpoints").newest() or 0) < STEPS
    subprocess.run(command(tiny_data, tmp_path), env=environment, check=True, capture_output=True)
    assert final_arrays(tmp_path) == final_arrays(whole)
    assert losses(tmp_path) == losses(whole)


def test_a_damaged_newest_checkpoint_is_stepped_back_from(tiny_data, tmp_path, environment, whole):
    shutil.copytree(whole, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / str(STEPS)
    shutil.rmtree(newest / "state")
    done = subprocess.run(
        command(tiny_data, tmp_path / "run"), env=environment, check=True, capture_output=True, text=True
    )
    assert "damaged" in done.stderr
    assert final_arrays(tmp_path / "run") == final_arrays(whole)


def test_a_finished_run_is_left_as_it_is(tiny_data, whole, environment):
    before = (whole / "metrics.jsonl").read_bytes()
    subprocess.run(command(tiny_data, whole), env=environment, check=True, capture_output=True)
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_the_mesh_and_the_micro_batch_do_not_change_the_losses(tiny_data, tmp_path, whole):
    one = pretrain.main(config(tiny_data, tmp_path / "a", run={"mesh": MeshConfig(2, 2, 2)}))
    np.testing.assert_allclose(
        [loss for _, loss in losses(tmp_path / "a")], [loss for _, loss in losses(whole)], rtol=2e-4
    )
    assert int(one.state.step) == STEPS


def test_a_checkpoint_of_another_recipe_is_refused(tiny_data, whole):
    with pytest.raises(UserError, match=r"optim\.matrix_lr: 0\.02 there, 0\.5 here"):
        pretrain.main(
            pretrain.Config(
                data=tiny_data,
                run=RunConfig(out=whole),
                model=pretrain.ModelArgs(depth=1, head_dim=32),
                optim=OptimConfig(warmup_steps=2, matrix_lr=0.5),
                steps=STEPS,
                batch_tokens=512,
                seed=3,
            )
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_tokens": 500}, "500 tokens a step do not divide by the sequence length of 32"),
        ({"batch_tokens": 32 * 9}, "9 rows a step do not divide by 8 data-parallel devices"),
        ({"run": {"micro_batch": 3}}, "do not divide by micro-batch=3"),
        ({"batch_tokens": 2**20}, "less than one batch"),
        ({"run": {"mesh": MeshConfig(data=3)}}, "does not use 8 devices"),
        ({"run": {"mesh": MeshConfig(fsdp=0)}}, "fsdp=0"),
        ({"run": {"micro_batch": -2}}, "--run.micro-batch -2"),
        ({"run": {"keep_newest": 0}}, "--run.keep-newest 0"),
        ({"steps": 0}, "--steps 0"),
        ({"seed": -1}, "--seed -1"),
        ({"run": {"compute": ComputeConfig("float32", "cudnn")}}, "cudnn goes neither"),
    ],
)
def test_batches_that_do_not_divide_are_refused(tiny_data, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        pretrain.main(config(tiny_data, tmp_path, **changes))


def test_an_old_gpu_takes_no_bfloat16(monkeypatch):
    t4 = SimpleNamespace(platform="gpu", compute_capability="7.5")
    monkeypatch.setattr(jax, "devices", lambda: [t4])
    assert ComputeConfig().resolve() == Compute("float32", "xla")
    with pytest.raises(UserError, match="use float32"):
        ComputeConfig("bfloat16").resolve()


def test_the_flag_of_deterministic_runs_is_set_once(monkeypatch):
    jax.devices()  # which read the real flags before
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    for _ in range(2):
        ComputeConfig(deterministic=True).resolve()
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false --xla_gpu_deterministic_ops=true"


def test_prompts_that_the_tokenizer_cannot_write_do_not_end_a_run(tiny_data, tmp_path, caplog):
    pretrain.main(config(tiny_data, tmp_path, steps=2, prompts=("ab" * 40, "ab")))
    assert Checkpoints(tmp_path / "checkpoints").newest() == 2
    assert "no sample for the prompt" in caplog.text


def test_starting_anew_leaves_nothing_to_step_back_to(tiny_data, tmp_path):
    pretrain.main(config(tiny_data, tmp_path, steps=4, run={"save_every": 2}))
    pretrain.main(config(tiny_data, tmp_path, steps=2, seed=4, run={"resume": "never"}))
    assert Checkpoints(tmp_path / "checkpoints").steps() == [2]
    assert len(list((tmp_path / "checkpoints").glob("set-aside-*"))) == 2


def test_a_folder_in_which_another_run_is_at_work_is_refused(tiny_data, tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="another process is at work"):
        pretrain.main(config(tiny_data, tmp_path))


def test_a_batch_that_is_there_is_not_held_back_by_the_next():
    def one_after_the_other(start, share):
        for step in range(start, 5):
            yield {"tokens": np.full((8, 4), step, np.int32)}
        yield {}
        pytest.fail("waits for what is perhaps never prepared")

    stage = SimpleNamespace(rollout=None, batches=one_after_the_other)
    _, found = _steps(stage, None, sharding.make_mesh(), 2, 1)
    assert [int(next(found)["tokens"][0, 0, 0]) for _ in range(3)] == [2, 3, 4]


def test_a_batch_larger_than_what_is_ready_is_waited_for(tiny_data, tmp_path, monkeypatch):
    """Preparation has finished one unit when training starts, and goes on meanwhile."""
    monkeypatch.setattr(corpora, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(pretrain, "run_stage", lambda stage, *_: (stage.rows_per_step, None))
    paused, go_on, real = threading.Event(), threading.Event(), preparing._prepare_unit

    def slow(job, tok, unit):
        if unit == 1:
            paused.set()
            go_on.wait()
        real(job, tok, unit)

    monkeypatch.setattr(preparing, "_prepare_unit", slow)
    source = f"text:{tiny_data.parent}/*.txt"
    arguments = preparing.PrepareConfig(
        source, tiny_data / "tokenizer.model", tmp_path / "data", 32, 0.1, unit_bytes=20_000, workers=1
    )
    preparation = threading.Thread(target=preparing.prepare, args=(arguments,))
    preparation.start()
    paused.wait()
    corpus = corpora.open_corpus(tmp_path / "data", window_units=1)
    rows = len(corpus.train) // 8 * 8 + 8
    threading.Timer(0.2, go_on.set).start()
    settings = config(tmp_path / "data", tmp_path / "run", window_units=1, batch_tokens=32 * rows)
    assert pretrain.main(settings).state == rows
    preparation.join()


def test_dials_of_nanochat_are_refused_by_other_presets(tiny_data, tmp_path):
    for changes in ({"ratio": 8.0}, {"optim": OptimConfig(matrix_lr=0.5)}, {"model": pretrain.ModelArgs(depth=3)}):
        settings = replace(pretrain.Config(tiny_data, RunConfig(tmp_path), "char-cpu"), **changes)
        with pytest.raises(UserError, match="--model, --optim and --ratio are nanochat's dials"):
            pretrain.main(settings)


def test_a_folder_that_was_never_prepared_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"train\.prepare"):
        pretrain.main(config(tmp_path, tmp_path))


def test_unknown_flags_and_bad_input_exit_with_2_and_no_traceback(tiny_data, tmp_path, environment):
    for arguments in (["--no-such-flag", "1"], ["--model.depth", "0"]):
        done = subprocess.run(
            [*command(tiny_data, tmp_path), *arguments], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_the_trained_model_loads_and_writes(whole, capsys):
    loaded = load_model(whole)
    assert loaded.step == STEPS and loaded.stored.checkpoint.meta["stage"] == "pretrain"
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {np.dtype(np.float32)}
    samples = sample.main(sample.Config(checkpoint=whole, prompt=("ab", "cd"), max_new_tokens=8, n=2))
    assert [text[:2] for text in samples] == ["ab", "ab", "cd", "cd"]
    assert samples[0] != samples[1]
    loud = sample.Config(checkpoint=whole, sampling=Sampling(repetition_penalty=50.0), max_new_tokens=24)
    [text] = sample.main(loud)
    assert [text] != sample.main(replace(loud, sampling=Sampling()))
    assert "ab" in capsys.readouterr().out


def test_sampling_without_a_checkpoint_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"train\.pretrain"):
        load_model(tmp_path)


def test_fp8_trains_in_bfloat16_alone(tiny_data, tmp_path):
    fp8 = pretrain.ModelArgs(depth=1, head_dim=32, fp8=True)
    with pytest.raises(UserError, match="not for dtype=float32"):
        pretrain.main(config(tiny_data, tmp_path / "a", model=fp8))
    bfloat16 = {"compute": ComputeConfig(dtype="bfloat16", attention="xla")}
    pretrain.main(config(tiny_data, tmp_path / "b", model=fp8, run=bfloat16))
    losses = [record["loss"] for record in read_metrics(tmp_path / "b") if "loss" in record]
    assert losses[-1] < losses[0]
