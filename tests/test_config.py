import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import jax
import pytest

from nanochat_jax import model
from nanochat_jax.config import (
    Horizon,
    ModelConfig,
    OptimConfig,
    from_depth,
    from_json,
    horizon,
    to_json,
    write_json,
)
from nanochat_jax.errors import UserError


def test_parameters_are_counted_as_they_are_made():
    cfg = ModelConfig(sequence_len=64, vocab_size=300, n_layer=5, n_head=4, n_kv_head=2, n_embd=64)
    shapes = jax.eval_shape(lambda: model.init_params(jax.random.key(0), cfg))
    assert cfg.param_counts()["total"] == sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_layer_specs_tile_the_pattern_and_end_long():
    specs = from_depth(7, sequence_len=2048, window_pattern="SSL").layer_specs()
    assert [spec.window for spec in specs] == [512, 512, 2048, 512, 512, 2048, 2048]
    assert [spec.has_value_embed for spec in specs] == [True, False, True, False, True, False, True]


def test_a_short_window_never_exceeds_the_sequence():
    assert {spec.window for spec in from_depth(4, sequence_len=64).layer_specs()} == {64}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_embd": 100}, "n_embd=100"),
        ({"n_kv_head": 4}, "n_kv_head=4"),
        ({"n_layer": 0}, "n_layer=0"),
        ({"window_pattern": "SXL"}, "'SXL'"),
        ({"n_embd": 12, "n_head": 6}, "n_embd=12"),
    ],
)
def test_impossible_architectures_are_refused_with_the_number(changes, words):
    with pytest.raises(UserError, match=words):
        ModelConfig(**changes)


def test_horizon_can_be_set_by_hand():
    length = horizon(from_depth(4), steps=10, batch_tokens=2**17)
    assert (length.steps, length.batch_tokens, length.lr_scale) == (10, 2**17, 0.5)


@pytest.mark.parametrize(
    "bad",
    [{"ratio": 0.0}, {"ratio": math.nan}, {"lr_scale": math.inf}, {"steps": 0}, {"batch_tokens": -1}, {"ratio": 1e-6}],
)
def test_impossible_horizons_are_refused(bad):
    with pytest.raises(UserError):
        horizon(from_depth(4), **bad)


def test_optimizer_settings_are_checked():
    with pytest.raises(UserError, match="warmdown_fraction=2"):
        OptimConfig(warmdown_fraction=2)
    with pytest.raises(UserError, match="matrix_lr=nan"):
        OptimConfig(matrix_lr=math.nan)


@dataclass(frozen=True)
class Outer:
    path: Path
    inner: OptimConfig = field(default_factory=OptimConfig)
    steps: int | None = None
    words: tuple[str, ...] = ("a",)


def test_json_round_trip():
    outer = Outer(Path("x/y"), OptimConfig(matrix_lr=0.5), 7, ("b", "c"))
    assert from_json(Outer, json.loads(json.dumps(to_json(outer)))) == outer
    length = Horizon(1, 2, 3, 4.0, 5.0)
    assert from_json(Horizon, to_json(length)) == length


def test_json_with_unknown_or_missing_keys_is_refused():
    with pytest.raises(UserError, match=r"config\.inner: unknown key 'matrx_lr'"):
        from_json(Outer, {"path": "x", "inner": {"matrx_lr": 1.0}})
    with pytest.raises(UserError, match=r"config\.inner: None should be an object"):
        from_json(Outer, {"path": "x", "inner": None})
    with pytest.raises(UserError, match="'path' is missing"):
        from_json(Outer, {})
    with pytest.raises(UserError, match=r"config\.inner\.matrix_lr: 'high' should be of type float"):
        from_json(Outer, {"path": "x", "inner": {"matrix_lr": "high"}})


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    target = tmp_path / "config.json"
    write_json(target, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_json(target, {"a": 2})
    assert json.loads(target.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [target]
