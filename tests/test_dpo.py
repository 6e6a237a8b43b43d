"""Preference optimisation: it learns what is preferred, from where it starts, and goes on bitwise."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from nanochat_jax import model
from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.data.preference import open_pairs, render_pairs, split_pairs
from nanochat_jax.errors import UserError
from nanochat_jax.load import load_model, open_model
from nanochat_jax.metrics import read_metrics
from nanochat_jax.sharding import MeshConfig
from train import dpo
from train.stage import RunConfig

STEPS = 8


def write_pairs(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """Short answers are preferred; of each prompt two pairs."""
    rows = [
        {"prompt": f"What is {n} plus {m}?", "chosen": f"The answer is {n}.", "rejected": f"It is spelled {n} {m} {k}."}
        for n in range(8)
        for m in range(6)
        for k in "ab"
    ]
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def config(base: Path, pairs: str, out: Path, **changes) -> dpo.Config:
    run = RunConfig(**{"out": out, "save_every": 4, "eval_every": 4, **changes.pop("run", {})})
    numbers = {"steps": STEPS, "batch_pairs": 16, "lr_fraction": 0.2, "nll_weight": 0.1, **changes}
    return dpo.Config(checkpoint=base, run=run, pairs=pairs, **numbers)


@pytest.fixture(scope="module")
def whole(tiny_base, pairs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dpo")
    dpo.main(config(tiny_base, pairs, out))
    return out


def logged(out: Path, name: str) -> list[tuple[int, float]]:
    return [(record["step"], record[name]) for record in read_metrics(out) if name in record]


def final_arrays(out: Path) -> dict:
    checkpoint = Checkpoints(out / "checkpoints").peek(STEPS)
    assert checkpoint is not None
    return checkpoint.arrays


def test_it_learns_what_is_preferred(whole):
    accuracy, margin = logged(whole, "val_accuracy"), logged(whole, "val_margin")
    assert accuracy[0] == (0, 0.5) and margin[0] == (0, 0.0)  # exactly: nothing is preferred before the first step
    assert logged(whole, "val_loss")[0][1] == pytest.approx(
        np.log(2) + 0.1 * logged(whole, "val_chosen_nats")[0][1], rel=1e-6
    )
    assert [step for step, _ in accuracy] == [0, 4, 8] and accuracy[-1][1] >= 0.9
    assert margin[-1][1] > margin[1][1] > 0
    assert logged(whole, "margin")[-1][1] > 0 and logged(whole, "accuracy")[-1][1] >= 0.9
    [*_, last] = [record for record in read_metrics(whole) if "tokens_per_second" in record]
    assert last["tokens_per_second"] * last["seconds_per_step"] == pytest.approx(16 * 2 * 64)


def test_the_stored_reference_is_what_the_start_thinks(tiny_base, pairs, whole):
    loaded = load_model(tiny_base)
    forward = jax.jit(lambda tokens_BT: model.forward(loaded.params, loaded.cfg, tokens_BT, compute=loaded.compute))
    with np.load(whole / "reference.npz") as stored:
        found = [stored["scores_0"], stored["scores_1"]]
    for part, scores_P2 in zip(split_pairs(pairs), found, strict=True):
        rows = render_pairs(part, loaded.tokenizer, 128)
        assert scores_P2.shape == (len(rows), 2)
        logps_BTV = jax.nn.log_softmax(forward(rows.tokens_P2T[:3].reshape(6, -1)))
        for logps_TV, targets_T, score in zip(
            logps_BTV, rows.targets_P2T.reshape(-1, 64), scores_P2.flat, strict=False
        ):
            at = np.flatnonzero(targets_T >= 0)
            assert score == pytest.approx(float(logps_TV[at, targets_T[at]].sum()), rel=1e-5)


def test_it_goes_on_bitwise_and_leaves_a_finished_run_alone(tiny_base, pairs, whole, tmp_path, capsys, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    with monkeypatch.context() as patched:
        patched.delattr(dpo, "load_model")  # the reference is read, not computed
        dpo.main(config(tiny_base, pairs, tmp_path / "run"))
    assert final_arrays(tmp_path / "run") == final_arrays(whole)
    for name in ("loss", "margin", "val_margin"):
        assert logged(tmp_path / "run", name) == logged(whole, name)
    before = (whole / "metrics.jsonl").read_bytes()
    dpo.main(config(tiny_base, pairs, whole))
    assert (whole / "metrics.jsonl").read_bytes() == before and "done" in capsys.readouterr().out


def test_a_reference_that_is_lost_damaged_or_of_something_else_is_computed_anew(tmp_path):
    path, computed = tmp_path / "reference.npz", []

    def compute() -> list[np.ndarray]:
        computed.append(1)
        return [np.arange(6, dtype=np.float32).reshape(3, 2), np.zeros((1, 2), np.float32)]

    for made_of in (["a"], ["a"], ["b"], ["b"]):
        scores = dpo.stored_scores(path, made_of, compute)
        assert len(scores) == 2
        np.testing.assert_array_equal(scores[0], compute()[0])
        computed.pop()
    assert len(computed) == 2
    path.write_bytes(path.read_bytes()[:-40])
    dpo.stored_scores(path, ["b"], compute)
    path.write_bytes(b"")
    dpo.stored_scores(path, ["b"], compute)
    assert len(computed) == 4 and [entry.name for entry in tmp_path.iterdir()] == ["reference.npz"]


def test_mesh_and_micro_batch_do_not_change_what_is_learnt(tiny_base, pairs, whole, tmp_path):
    dpo.main(config(tiny_base, pairs, tmp_path, run={"mesh": MeshConfig(2, 2, 2), "micro_batch": 2}))
    for name in ("loss", "margin", "val_margin", "val_loss"):
        (_, ours), (_, theirs) = (zip(*logged(out, name), strict=True) for out in (tmp_path, whole))
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4)


def test_held_out_pairs_share_no_prompt_with_those_learnt_from(pairs, tmp_path):
    train, held_out = split_pairs(pairs)
    keys = [{pair.prompt_key for pair in part} for part in (train, held_out)]
    assert len(train) + len(held_out) == 96 and keys[0].isdisjoint(keys[1])
    assert all(len(part) == 2 * len(prompts) for part, prompts in zip((train, held_out), keys, strict=True))
    assert split_pairs(pairs)[1] == held_out
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is 3 plus 4?"}]}]
    given = write_pairs(tmp_path / "val.jsonl", [{"prompt": parts, "chosen": "7", "rejected": "8"}])
    train, held_out = split_pairs(pairs, given)
    assert len(train) == 94 and len(held_out) == 1
    assert all(pair.prompt["messages"][0]["content"] != "What is 3 plus 4?" for pair in train)
    with pytest.raises(UserError, match="the prompts of all 1 pairs are held out"):
        split_pairs(given, given)


def test_pairs_from_several_sources_and_in_the_shapes_of_tables(tmp_path):
    turns = {"role": ["user", "assistant"], "content": ["a", "b"]}
    table = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "c", "name": None}]
    one = write_pairs(tmp_path / "one.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    two = write_pairs(tmp_path / "two.jsonl", [{"prompt": "a", "chosen": turns, "rejected": table}])
    first, second = open_pairs(f"{one}, {two}")
    assert first == second


def test_identical_answers_are_refused_with_file_and_line(tiny_base, tmp_path):
    said = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rows = [{"prompt": "x", "chosen": "a", "rejected": "b"}, {"prompt": "x", "chosen": "ab", "rejected": said}]
    with pytest.raises(UserError, match=r"pairs\.jsonl, line 2: chosen and rejected are the same answer"):
        dpo.main(config(tiny_base, write_pairs(tmp_path / "pairs.jsonl", rows), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_pairs_that_do_not_fit_are_refused(tiny_base, tmp_path):
    rows = [{"prompt": f"{n} what is " * 80, "chosen": "a", "rejected": "b"} for n in range(20)]
    with pytest.raises(UserError, match=r"pairs none fits into sequence-len=128"):
        dpo.main(config(tiny_base, write_pairs(tmp_path / "pairs.jsonl", rows), tmp_path / "run"))


def test_held_out_pairs_that_do_not_fit_leave_training_without_validation(tiny_base, pairs, tmp_path, capsys):
    val = write_pairs(tmp_path / "val.jsonl", [{"prompt": "what is " * 80, "chosen": "a", "rejected": "b"}])
    dpo.main(config(tiny_base, pairs, tmp_path / "run", val_pairs=val, steps=1))
    assert "training without validation: of what is held out nothing fits (of 1 pairs" in capsys.readouterr().out
    assert not logged(tmp_path / "run", "val_loss")


def test_what_makes_the_result_is_in_the_recipe(tiny_base, pairs, whole):
    recipe = open_model(whole).recipe
    assert recipe["beta"] == 0.1 and recipe["start_from"] == open_model(tiny_base).fingerprint
    assert recipe["horizon"]["lr_scale"] == open_model(tiny_base).recipe["horizon"]["lr_scale"]
    assert recipe["optim"]["matrix_lr"] == pytest.approx(0.2 * 0.02) and recipe["optim"]["final_lr_fraction"] == 0
    changed = config(tiny_base, pairs, whole, beta=0.2, length_normalize=True)
    with pytest.raises(UserError, match=r"beta: 0\.1 there, 0\.2 here\n  length_normalize: False there, True here"):
        dpo.main(changed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "--steps 0"),
        ({"batch_pairs": 0}, "--batch-pairs 0"),
        ({"beta": 0.0}, "--beta 0"),
        ({"nll_weight": -1.0}, "--nll-weight -1"),
        ({"label_smoothing": 0.5}, "--label-smoothing 0.5"),
        ({"lr_fraction": 0.0}, "--lr-fraction 0"),
        ({"batch_pairs": 9}, "9 rows a step do not divide by 8 data-parallel devices"),
        ({"pairs": "csv:x"}, "unknown rows 'csv:x'"),
    ],
)
def test_bad_input_is_named(tiny_base, pairs, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        dpo.main(config(tiny_base, changes.pop("pairs", pairs), tmp_path, **changes))


def test_a_gpt2_is_refused(tiny_base, pairs, tmp_path, monkeypatch):
    stored = open_model(tiny_base)
    monkeypatch.setattr("train.finetune.open_undamaged", lambda folder: replace(stored, cfg=object()))
    with pytest.raises(UserError, match="holds a GPT-2"):
        dpo.main(config(tiny_base, pairs, tmp_path))
