"""A series of models: trained by the one dial, gone on with, fitted by a law that is found where it holds."""

import json

import numpy as np
import pytest

from nanochat_jax.errors import UserError
from train import pretrain, sweep
from train.stage import RunConfig
from train.sweep import Trained, fit_power_law, frontier, laws


def trained(depth: int, ratio: float, flops: float, bits: float, size: int = 0) -> Trained:
    return Trained(depth, ratio, 2 * depth, size or depth, int(flops), 1.0, flops, bits, 0.1)


def test_a_power_law_is_found_where_it_holds():
    x = np.array([1e12, 1e13, 3e14])
    law = fit_power_law(x, 7.5 * x**-0.06)
    assert law == pytest.approx((7.5, -0.06, 1.0), rel=1e-6)
    noisy = fit_power_law([1, 10, 100, 1000], [8.0, 4.4, 1.8, 1.1])
    log_x, log_y = np.arange(4), np.log10([8.0, 4.4, 1.8, 1.1])
    assert noisy.exponent == pytest.approx(np.cov(log_x, log_y)[0, 1] / np.var(log_x, ddof=1))
    assert noisy.r2 == pytest.approx(np.corrcoef(log_x, log_y)[0, 1] ** 2)


def test_the_frontier_by_hand():
    a, b, c, d = trained(1, 1, 10, 3.0), trained(2, 1, 20, 3.1), trained(2, 2, 40, 2.5), trained(3, 1, 40, 2.6)
    assert frontier([d, c, b, a]) == [a, c]


def test_laws_of_each_ratio_and_of_the_best():
    models = [trained(n, ratio, 10.0 * n * ratio, 4 * (n * ratio) ** -0.1) for ratio in (1, 2) for n in (1, 2, 4)]
    found = {(axis, name): law.exponent for axis, name, _, law in laws(models)}
    assert set(found) == {
        ("flops", "ratio 1"), ("flops", "ratio 2"), ("flops", "best for its compute"),
        ("scaling_parameters", "ratio 1"), ("scaling_parameters", "ratio 2"),
    }  # fmt: skip
    assert list(found.values()) == pytest.approx([-0.1] * 5)
    assert not list(laws(models[:1])), "one model makes no law"


def test_main_trains_what_is_missing_and_writes_a_page(tiny_data, tmp_path, capsys, monkeypatch):
    def config(*depths: int) -> sweep.Config:
        run = RunConfig(out=tmp_path / "sweep")
        return sweep.Config(tiny_data, run, depths, ratios=(0.01,), head_dim=32, batch_tokens=256, lr_scale=0.1)

    [first] = sweep.main(config(1))
    assert first.depth == 1 and first.tokens == 256 * (int(0.01 * first.scaling_parameters) // 256)
    steps: list[int] = []
    real = pretrain.run_stage

    def spy(stage, *rest):
        steps.append(stage.cfg.n_layer)
        return real(stage, *rest)

    monkeypatch.setattr(pretrain, "run_stage", spy)
    models = sweep.main(config(2, 1))
    assert models[0] == first and [model.depth for model in models] == [1, 2]
    assert "d1-r0.01 is at step" in capsys.readouterr().out, "the first one was not trained again"
    stored = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [model["bits_per_byte"] for model in stored["models"]] == [model.bits_per_byte for model in models]
    assert stored["laws"][0][2]["exponent"] == pytest.approx(
        np.log(models[1].bits_per_byte / first.bits_per_byte) / np.log(models[1].flops / first.flops)
    )
    page, markdown = ((tmp_path / "sweep" / f"sweep.{kind}").read_text() for kind in ("html", "md"))
    assert page.count("<svg") == 2 and "∝ x^" in page
    assert f"{models[1].bits_per_byte:.4f}" in markdown and "R²" in markdown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": ()}, "at least one number"),
        ({"depths": (0, 2)}, "--depths 0 must be at least 1"),
        ({"ratios": (0.0,)}, "--ratios 0 must be positive"),
    ],
)
def test_refuses_what_makes_no_sense(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        sweep.Config(tmp_path, RunConfig(out=tmp_path), **changes)
