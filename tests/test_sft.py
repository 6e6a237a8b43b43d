"""Supervised fine-tuning: it learns to answer, inherits what it should, and goes on bitwise."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from nanochat_jax import optim, sharding
from nanochat_jax.chat import conversation
from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.config import Horizon, OptimConfig
from nanochat_jax.data.conversations import VAL_SHARE
from nanochat_jax.data.rows import is_held_out
from nanochat_jax.data.sft import pack_conversations
from nanochat_jax.errors import UserError
from nanochat_jax.layers import Compute
from nanochat_jax.load import load_model, open_model
from nanochat_jax.metrics import read_metrics
from nanochat_jax.muon import MuonState
from nanochat_jax.rollouts import Question, answer, make_engine
from nanochat_jax.sharding import MeshConfig
from nanochat_jax.tasks import open_task
from train import sft
from train.finetune import fine_tune, open_base
from train.pretrain import language_model_loss
from train.stage import RunConfig
from train.start import abstract_state, from_stored

STEPS = 8
COMPUTE = Compute("float32", "xla")


def config(base: Path, out: Path, **changes) -> sft.Config:
    run = {"out": out, "save_every": 4, "eval_every": 4, **changes.pop("run", {})}
    mix = "task:arithmetic#200,task:identity"
    return sft.Config(**{"checkpoint": base, "run": RunConfig(**run), "mix": mix, "steps": STEPS, **changes})


@pytest.fixture(scope="module")
def whole(tiny_base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sft")
    sft.main(config(tiny_base, out))
    return out


def losses(out: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(out) if "loss" in record]


def test_it_learns_and_measures(whole):
    measured = [record for record in read_metrics(whole) if "val_bpb" in record]
    assert [record["step"] for record in measured] == [4, 8]
    assert losses(whole)[-1][1] < losses(whole)[0][1] - 0.5
    assert measured[1]["val_bpb"] < measured[0]["val_bpb"]
    assert json.loads((whole / "config.json").read_text())["lr_fraction"] == 0.8


def test_it_goes_on_bitwise_and_leaves_a_finished_run_alone(tiny_base, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    sft.main(config(tiny_base, tmp_path / "run"))
    ours, theirs = (Checkpoints(out / "checkpoints").peek(STEPS) for out in (tmp_path / "run", whole))
    assert ours and theirs and ours.arrays == theirs.arrays
    assert losses(tmp_path / "run") == losses(whole)
    before = (whole / "metrics.jsonl").read_bytes()
    sft.main(config(tiny_base, whole))
    assert (whole / "metrics.jsonl").read_bytes() == before and "done" in capsys.readouterr().out


def test_the_mesh_does_not_change_the_losses(tiny_base, whole, tmp_path):
    sft.main(config(tiny_base, tmp_path, run={"mesh": MeshConfig(2, 2, 2)}))
    np.testing.assert_allclose([x for _, x in losses(tmp_path)], [x for _, x in losses(whole)], rtol=2e-4)


def test_rates_are_those_of_pretraining_with_its_scaling(tiny_base, whole):
    recipe, base = open_model(whole).recipe, open_model(tiny_base).recipe
    rates = recipe["optim"]
    for name, at_reference in (("embedding_lr", 0.3), ("unembedding_lr", 0.008), ("matrix_lr", 0.02)):
        assert rates[name] == pytest.approx(0.8 * at_reference)
    assert rates["final_lr_fraction"] == 0 and rates["warmdown_fraction"] == 0.5 and rates["warmup_steps"] == 0
    assert recipe["horizon"]["lr_scale"] == base["horizon"]["lr_scale"] == 0.5
    assert recipe["horizon"]["weight_decay"] == 0 < base["horizon"]["weight_decay"]
    assert recipe["pretrained"] == {name: base[name] for name in ("optim", "horizon")}
    # Twice the tokens a step: √2 of the scale; and a stage after this one inherits from pretraining, not from here.
    again = fine_tune(
        open_base(whole), sft.SCHEDULE, steps=5, batch_tokens=2048, lr_fraction=0.1, warm=False, compute=COMPUTE
    ).recipe
    assert again["horizon"].lr_scale == pytest.approx(0.5 * 2**0.5)
    assert again["optim"].matrix_lr == pytest.approx(0.1 * 0.02)


def test_the_optimizer_goes_on_and_its_schedules_start_anew(tiny_base):
    stored = open_model(tiny_base)
    tx = optim.make_optimizer(stored.cfg, Horizon(STEPS, 1024, 8192, 0.5, 0.0), OptimConfig(), "float32")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    like = abstract_state(stored.cfg, COMPUTE, tx, mesh)
    there = stored.restore({"params": like.params, "opt_state": like.opt_state})
    warm = from_stored(stored, tx, with_optimizer=True)(like)
    fresh = from_stored(stored, tx)(like)
    kinds = (optax.ScaleByAdamState, optax.ScaleByScheduleState, MuonState)

    def states(tree) -> list:
        return [x for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kinds)) if isinstance(x, kinds)]

    assert {type(state) for state in states(warm.opt_state)} == set(kinds)
    for before, after, anew in zip(*map(states, (there["opt_state"], warm.opt_state, fresh.opt_state)), strict=True):
        if isinstance(before, optax.ScaleByScheduleState):
            assert before.count == 2 and after.count == anew.count == 0
        elif isinstance(before, MuonState):
            assert before.updates == 2 and after.updates == 0
            jax.tree.map(np.testing.assert_array_equal, before.momentum, after.momentum)
            assert any(np.any(x) for x in jax.tree.leaves(after.momentum))
        else:
            assert before.count == after.count == 2 and anew.count == 0
            jax.tree.map(np.testing.assert_array_equal, before, after)
    jax.tree.map(np.testing.assert_array_equal, warm.params, fresh.params)
    assert warm.step == 0


def test_conversations_of_a_row_do_not_see_each_other(tiny_base):
    loaded = load_model(tiny_base)
    chats = [conversation("What is 3 + 4?", f"It is {n}.") for n in (7, 8, 9)]
    loss = language_model_loss(loaded.cfg, COMPUTE)

    def nats(conversations) -> float:
        rows = pack_conversations(conversations, loaded.tokenizer, loaded.cfg.sequence_len)
        assert len(rows) == 1
        batch = {name: array[None] for name, array in rows.row(0).items()}
        return float(loss(loaded.params, batch, jax.random.key(0))[0])

    assert nats(chats) == pytest.approx(sum(nats([chat]) for chat in chats), rel=1e-5)


def test_a_model_fine_tuned_on_one_answer_gives_it(tiny_base, tmp_path):
    chats = [conversation(f"What is {n} plus {n}?", "It is spelled a b c.") for n in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    sft.main(
        config(tiny_base, tmp_path / "run", mix=f"jsonl:{tmp_path}/chats.jsonl", steps=40, prompts=(), eval_rows=8)
    )
    loaded = load_model(tmp_path / "run")
    engine = make_engine(loaded.params, loaded.cfg, loaded.tokenizer, loaded.compute, slots=2)
    example = replace(open_task("arithmetic").examples("test")[0], conversation=chats[3])
    [[found]] = answer(engine, loaded.tokenizer, [Question(open_task("arithmetic"), example, 0)], max_new_tokens=32)
    assert found.text == "It is spelled a b c." and found.output.finish_reason == "stop"


def test_held_out_conversations_that_do_not_fit_leave_training_without_validation(tiny_base, tmp_path, capsys):
    asked = ["what is " * 80 if is_held_out(str(row), VAL_SHARE) else "What is it?" for row in range(40)]
    chats = [conversation(text, "It is a b c.") for text in asked]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    sft.main(config(tiny_base, tmp_path / "run", mix=f"jsonl:{tmp_path}/chats.jsonl", steps=1, prompts=()))
    assert "training without validation: of what is held out nothing fits (of " in capsys.readouterr().out
    assert not [record for record in read_metrics(tmp_path / "run") if "val_bpb" in record]


def test_a_checkpoint_without_optimizer_starts_with_a_fresh_one(tiny_base, tmp_path, capsys):
    stored = load_model(tiny_base)
    with Checkpoints(tmp_path / "bare" / "checkpoints") as checkpoints:
        meta, tokenizer = stored.stored.checkpoint.meta, stored.tokenizer.to_bytes()
        checkpoints.save(2, {"params": stored.params}, meta=meta, tokenizer=tokenizer)
    sft.main(config(tmp_path / "bare", tmp_path / "run", steps=1, prompts=()))
    assert "holds no optimizer" in capsys.readouterr().out
    assert open_model(tmp_path / "run").recipe["warm"] is False


def test_a_damaged_newest_checkpoint_is_passed_over(tiny_base, tmp_path):
    stored = load_model(tiny_base)
    meta, tokenizer = stored.stored.checkpoint.meta, stored.tokenizer.to_bytes()
    with Checkpoints(tmp_path / "base" / "checkpoints") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"params": stored.params}, meta=meta, tokenizer=tokenizer)
    shutil.rmtree(tmp_path / "base" / "checkpoints" / "2" / "state")
    sft.main(config(tmp_path / "base", tmp_path / "run", steps=1, prompts=()))
    good = open_model(tmp_path / "base", step=1)
    assert open_model(tmp_path / "run").recipe["start_from"] == good.fingerprint
    with pytest.raises(UserError, match=r"(?s)those of other steps may be good:.*step 2: state"):
        load_model(tmp_path / "base", step=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "--steps 0"),
        ({"epochs": 0.0}, "--epochs 0"),
        ({"lr_fraction": 0.0}, "--lr-fraction 0"),
        ({"batch_tokens": 200}, "200 tokens a step do not divide by the sequence length of 128"),
        ({"mix": "task:nonsense"}, "unknown task 'nonsense'"),
        ({"checkpoint": Path("/nowhere")}, "/nowhere holds no checkpoint"),
    ],
)
def test_bad_input_is_named(tiny_base, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        sft.main(config(tiny_base, tmp_path, **changes))


def test_another_recipe_is_refused(tiny_base, whole):
    with pytest.raises(UserError, match="data: "):
        sft.main(config(tiny_base, whole, mix="task:identity"))


def test_a_gpt2_is_refused(tmp_path, tiny_base, monkeypatch):
    stored = open_model(tiny_base)
    monkeypatch.setattr("train.finetune.open_undamaged", lambda folder: replace(stored, cfg=object()))
    with pytest.raises(UserError, match="holds a GPT-2"):
        sft.main(config(tiny_base, tmp_path))
