from pathlib import Path

import pytest

from nanochat_jax.errors import UserError
from train import bench_loop, pretrain
from train.stage import RunConfig
from train.timing import Device


def test_a_run_is_compared_with_its_bare_step(tiny_data, tmp_path):
    out = tmp_path / "run"
    model = pretrain.ModelArgs(depth=1, head_dim=32)
    pretrain.main(
        pretrain.Config(
            data=tiny_data, run=RunConfig(out=out), model=model, steps=24, batch_tokens=512, lr_scale=0.5, prompts=()
        )
    )
    result = bench_loop.main(bench_loop.Config(run=out, device=Device(calls=2, repeats=1)))
    assert result["share_of_bare_speed"] == pytest.approx(
        result["bare_milliseconds"] / result["loop_milliseconds"], 1e-3
    )


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="holds no finished run"):
        bench_loop.main(bench_loop.Config(run=tmp_path))
