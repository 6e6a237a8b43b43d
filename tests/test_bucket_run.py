"""A run whose folder is in a bucket, as on TPU slices."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.files import as_path
from nanochat_jax.load import load_model
from nanochat_jax.metrics import MetricsLog, read_metrics
from train import evaluate, pretrain
from train.pretrain import ModelArgs
from train.stage import RunConfig


@pytest.fixture
def folder(bucket, monkeypatch) -> Path:
    """As a command line gives it: pathlib makes one slash of two."""
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", os.environ["STORAGE_EMULATOR_HOST"])
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
    return Path(bucket) / "run"


def test_metrics_are_kept_and_forgotten_as_on_a_disk(folder):
    with MetricsLog(as_path(folder)) as log:
        for step in range(1, 6):
            log.write(step, {"loss": float(step)})
    with MetricsLog(as_path(folder), step=3) as log:
        log.write(4, {"loss": 40.0})
    assert [record["loss"] for record in read_metrics(as_path(folder))] == [1.0, 2.0, 3.0, 40.0]
    events = sorted((as_path(folder) / "tensorboard").iterdir())  # each opening has its own, also within a second
    assert [file.read_bytes().count(b"loss") for file in events] == [5, 1]


def test_a_run_is_the_same_as_on_a_disk_and_its_model_loads(tiny_data, folder, tmp_path):
    def config(out: Path, **changes) -> pretrain.Config:
        run = RunConfig(out=out, save_every=2, eval_every=4, keep_newest=1, **changes)
        return pretrain.Config(
            str(tiny_data), run, model=ModelArgs(depth=1, head_dim=64), steps=4, batch_tokens=256, prompts=()
        )

    whole = pretrain.main(config(tmp_path / "run")).state
    pretrain.main(config(folder))
    checkpoints = Checkpoints(folder / "checkpoints", keep_newest=1)
    assert checkpoints.steps() == [4]  # the earlier one is gone
    assert [r["step"] for r in read_metrics(as_path(folder)) if "loss" in r] == [1, 2, 3, 4]
    loaded = load_model(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, whole.params)
    evaluation = evaluate.main(evaluate.Config(folder, data=str(tiny_data), suite="bpb"))
    assert evaluate.main(evaluate.Config(folder, data=str(tiny_data), suite="bpb")) == evaluation  # found, not made
    assert (as_path(folder) / "evaluation.json").exists()
