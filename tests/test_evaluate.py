"""Baselines on hand-worked cases, and the evaluation of a tiny run from start to end."""

import dataclasses
import functools
import json
import math
import random
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.checkpoint import Checkpoints
from nanochat_jax.data.prepare import split_document
from nanochat_jax.data.pretrain import open_split
from nanochat_jax.data.records import load_manifest
from nanochat_jax.errors import UserError
from nanochat_jax.eval import baselines
from nanochat_jax.eval.chat import CHATCORE, Evaluator
from nanochat_jax.load import load_model
from nanochat_jax.metrics import read_metrics
from train import evaluate, prepare, pretrain, suites, tokenizer
from train.stage import RunConfig

WORDS = ["ab", "Bürger", "state", "of", "the", "Union", "日本", "a|b", "year", "1867", "fellow", "citizens"]


@functools.cache
def make_run(basetemp: Path) -> Path:
    """A folder with everything that tokenizer, prepare and pretrain leave behind; made once for all tests."""
    run = basetemp / "tiny run" / "tiny"
    corpus = run.parent / "corpus"
    corpus.mkdir(parents=True)
    rng = random.Random(0)
    for number in range(150):
        (corpus / f"{number:03}.txt").write_text(" ".join(rng.choices(WORDS, k=rng.randint(20, 150))))
    model, source = run / "tokenizer" / "tokenizer.model", f"text:{corpus}/*.txt"
    tokenizer.main(tokenizer.Config(source=source, vocab_size=320, out=model, val_fraction=0.1))
    prepare.main(
        prepare.Config(
            source=source, tokenizer=model, out=run / "data", sequence_len=64, val_fraction=0.1, workers=1
        )
    )  # fmt: skip
    pretrain.main(
        pretrain.Config(
            data=run / "data",
            run=RunConfig(out=run / "base", eval_every=3),
            model=pretrain.ModelArgs(depth=1, head_dim=32),
            steps=6,
            batch_tokens=512,
            prompts=("the",),
        )
    )
    return run


@pytest.fixture
def run(tmp_path_factory, tmp_path) -> Path:
    """A copy of the tiny run that a test may do with as it likes."""
    return shutil.copytree(make_run(tmp_path_factory.getbasetemp()), tmp_path / "tiny")


def config(run: Path, **changes) -> evaluate.Config:
    return dataclasses.replace(evaluate.Config(checkpoint=run / "base", data=str(run / "data"), rows=1), **changes)


@pytest.mark.parametrize("program", ["gzip", "xz"])
def test_compressors_agree_with_the_commands(program):
    if not shutil.which(program):
        pytest.skip(f"no {program} here")
    data = " ".join(random.Random(0).choices(WORDS, k=20_000)).encode()
    command = subprocess.run([program, "-9", "-c"], input=data, capture_output=True, check=True)
    size = {"gzip": baselines.gzip_size, "xz": baselines.xz_size}[program](data)
    # The same to the byte with the usual libraries; zlib-ng and multi-threaded xz differ by a little.
    assert size == pytest.approx(len(command.stdout), rel=0.02, abs=64)


def test_unigram_by_hand():
    lengths_V = np.array([0, 1, 2, 1])  # a control token, then "a", "bc", "d"
    # Smoothed counts of the text tokens: 3, 1, 2 of 6; the control token is on neither side.
    nats = baselines.unigram_nats(np.array([9, 2, 0, 1]), np.array([5, 1, 1, 0]), lengths_V)
    assert nats == pytest.approx(math.log(2) + math.log(6))


def test_token_counts():
    rows = [np.array([1, 1, 2], np.uint16), np.array([3, 0, 0], np.uint16), np.array([2, 2, 2], np.uint16)]
    assert baselines.token_counts(rows, 5).tolist() == [2, 2, 4, 1, 0]
    assert baselines.token_counts(rows, 5, every=2).tolist() == [0, 2, 4, 0, 0]


def test_baselines_see_the_held_out_bytes_and_no_others(run, tmp_path_factory):
    corpus = make_run(tmp_path_factory.getbasetemp()).parent / "corpus"
    documents = [path.read_text() for path in corpus.iterdir()]
    held_out = [split_document(text, few_documents=False, val_fraction=0.1)[1] for text in documents]
    tok, records = tokenizers.load(run / "data" / "tokenizer.model"), open_split(run / "data", "val")
    text = baselines.held_out_bytes(records, tok)
    assert len(text) == load_manifest(run / "data").val.bytes
    assert Counter(text) == Counter("".join(held_out).encode())  # packing has cut and reordered the documents


def test_main_measures_stores_and_prints(run, capsys):
    capsys.readouterr()
    result = evaluate.main(config(run))
    assert json.loads((run / "base" / "evaluation.json").read_text()) == result
    assert result["step"] == 6
    manifest = load_manifest(run / "data")
    bpb, sample = result["suites"]["bpb"], result["suites"]["sample"]
    assert list(bpb["texts"]) == [str(run / "data")]
    text = bpb["texts"][str(run / "data")]
    assert text["fingerprint"] == manifest.fingerprint
    assert (text["bytes"], text["tokens"]) == (manifest.val.bytes, manifest.val.tokens)
    assert list(text["baselines"]) == ["unigram tokens", "gzip -9", "xz -9"]
    assert all(0 < bits < 10 for bits in [text["bits_per_byte"], *text["baselines"].values()])
    logged = [record["val_bpb"] for record in read_metrics(run / "base") if "val_bpb" in record]
    assert text["bits_per_byte"] == pytest.approx(logged[-1], rel=1e-5)
    low, high = text["interval"]
    assert low < text["bits_per_byte"] < high < low + 1
    assert [entry["prompt"] for entry in sample["samples"]] == list(suites.PROMPTS)
    assert bpb["seconds"] > 0
    printed = capsys.readouterr().out
    assert f"{text['baselines']['gzip -9']:.4f}" in printed and f"{low:.4f} – {high:.4f}" in printed
    assert "the model does not beat" in printed or "the model beats all" in printed


def test_reuses_what_was_measured_on_the_same_checkpoint_and_data(run, monkeypatch, capsys):
    first = evaluate.main(config(run, suite="bpb"))

    def fail(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(suites, "make_evaluator", fail)
    both = evaluate.main(config(run))
    assert both["suites"]["bpb"] == first["suites"]["bpb"]
    assert "sample" in both["suites"]
    assert "measured before" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="measured again"):
        evaluate.main(config(run, force=True))
    assert set(evaluate.main(config(run, suite="sample", force=True))["suites"]) == {"bpb", "sample"}
    texts = {name: {**text, "fingerprint": "other"} for name, text in both["suites"]["bpb"]["texts"].items()}
    other_data = {**both, "suites": {"bpb": {**both["suites"]["bpb"], "texts": texts}}}
    for spoilt in (
        json.dumps(both | {"step": 5}),
        json.dumps(both | {"fingerprint": "0"}),
        json.dumps(other_data),
        "?",
        "null",
    ):
        (run / "base" / "evaluation.json").write_text(spoilt)
        with pytest.raises(AssertionError, match="measured again"):
            evaluate.main(config(run))


def test_results_of_another_step_are_kept_apart(run):
    loaded = load_model(run / "base")
    with Checkpoints(run / "base" / "checkpoints") as checkpoints:
        meta, tok = loaded.stored.checkpoint.meta, loaded.tokenizer.to_bytes()
        checkpoints.save(7, {"params": loaded.params}, meta=meta, tokenizer=tok)
    newest = evaluate.main(config(run, suite="sample"))
    earlier = evaluate.main(config(run, suite="sample", step=6))
    assert (newest["step"], earlier["step"]) == (7, 6)
    for name, result in (("evaluation.json", newest), ("evaluation-6.json", earlier)):
        assert json.loads((run / "base" / name).read_text()) == result


def test_raw_text_gives_what_the_same_text_gives_prepared(run, tmp_path_factory):
    """The validation split's text, written to files: packed the same way, it is the same rows."""
    corpus = run / "corpus"
    corpus.mkdir()
    documents = [
        path.read_text() for path in sorted((make_run(tmp_path_factory.getbasetemp()).parent / "corpus").iterdir())
    ]
    held_out = [split_document(text, few_documents=False, val_fraction=0.1)[1] for text in documents]
    for number, text in enumerate(filter(None, held_out)):
        (corpus / f"{number:03}.txt").write_text(text)
    prepared = evaluate.main(config(run, suite="bpb"))["suites"]["bpb"]["texts"][str(run / "data")]
    raw = evaluate.main(config(run, suite="bpb", data=f"text:{corpus}/*.txt"))["suites"]["bpb"]["texts"]
    assert list(raw) == [str(run / "data"), f"text:{corpus}/*.txt"], "the one measured before is kept"
    found = raw[f"text:{corpus}/*.txt"]
    assert (found["bytes"], found["tokens"]) == (prepared["bytes"], prepared["tokens"])
    assert found["bits_per_byte"] == pytest.approx(prepared["bits_per_byte"], rel=1e-6)
    assert found["interval"] == pytest.approx(prepared["interval"], rel=1e-6)
    assert found["baselines"]["gzip -9"] == pytest.approx(prepared["baselines"]["gzip -9"])
    one = corpus / "000.txt"
    single = evaluate.main(config(run, suite="bpb", data=str(one)))["suites"]["bpb"]["texts"][str(one)]
    assert single["bytes"] == len(one.read_bytes()) and list(single["baselines"]) == ["gzip -9", "xz -9"]
    with pytest.raises(UserError, match=r"'nowhere' is neither a folder that train.prepare made, nor a text file"):
        evaluate.main(config(run, suite="bpb", data="nowhere"))
    (run / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"empty\.jsonl#text holds no text to measure on"):
        evaluate.main(config(run, suite="bpb", data=f"jsonl:{run}/empty.jsonl#text"))


@pytest.fixture
def chat(tiny_base, tmp_path) -> Path:
    """A copy of a run that can be asked, and rows of ARC beside it."""
    rows = [
        {"question": f"Why {n}?", "choices": {"text": ["so", "thus"], "label": ["A", "B"]}, "answerKey": "AB"[n % 2]}
        for n in range(12)
    ]
    (tmp_path / "arc_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return shutil.copytree(tiny_base, tmp_path / "sft", ignore=shutil.ignore_patterns("evaluation.json"))


def asked(run: Path, tasks: str, **changes) -> evaluate.Config:
    sizes = {"rows": 1, "slots": 1, "examples": 5, "max_new_tokens": 4}
    return evaluate.Config(
        run, tasks=tasks.replace("ARC", f"arc-easy=jsonl:{run.parent}/arc_{{split}}.jsonl"), **sizes | changes
    )


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Names of the tasks that a model really answers."""
    names: list[str] = []
    real = Evaluator.evaluate

    def spy(self, task, *args):
        names.append(task.name)
        return real(self, task, *args)

    monkeypatch.setattr(Evaluator, "evaluate", spy)
    return names


def test_chat_measures_what_is_missing_and_keeps_the_rest(chat, measured, capsys):
    first = evaluate.main(asked(chat, "arithmetic,ARC"))["suites"]["chat"]
    assert measured == ["arithmetic", "arc-easy"]
    assert {name: (task["kind"], task["examples"]) for name, task in first["tasks"].items()} == {
        "arithmetic": ("generative", 5), "arc-easy": ("categorical", 5),
    }  # fmt: skip
    arc = first["tasks"]["arc-easy"]
    assert arc["centred"] == pytest.approx((arc["right"] / 5 - 0.25) / 0.75)
    assert first["chatcore"] is None and first["compilations"] == {"categorical": 1, "engine": 3}
    printed = capsys.readouterr().out
    assert f"arc-easy       categorical {arc['accuracy']:9.1%}" in printed and "1 to choose letters, 3 to" in printed

    second = evaluate.main(asked(chat, "ARC,identity,arithmetic"))["suites"]["chat"]
    assert measured[2:] == ["identity"]
    assert second["tasks"].items() > first["tasks"].items()
    assert second["mean_centred"] == pytest.approx(np.mean([task["centred"] for task in second["tasks"].values()]))
    assert second["seconds"] == pytest.approx(sum(task["seconds"] for task in second["tasks"].values()), abs=0.01)
    again = evaluate.main(asked(chat, "identity,ARC"))
    assert measured[3:] == [] and again["suites"]["chat"] == second
    assert json.loads((chat / "evaluation.json").read_text()) == again
    assert "measured before" in capsys.readouterr().out
    evaluate.main(asked(chat, "ARC", examples=6))
    evaluate.main(asked(chat, "ARC", examples=6, force=True))
    assert measured[3:] == ["arc-easy", "arc-easy"]
    kept = json.loads((chat / "evaluation.json").read_text())["suites"]["chat"]["tasks"]
    assert kept["arc-easy"]["examples"] == 6 and kept["identity"] == second["tasks"]["identity"]


def test_what_another_command_measures_meanwhile_is_kept(chat, monkeypatch):
    real, meanwhile = Evaluator.evaluate, [asked(chat, "identity")]

    def evaluate_both(self, task, *args):
        while meanwhile:
            evaluate.main(meanwhile.pop())
        return real(self, task, *args)

    monkeypatch.setattr(Evaluator, "evaluate", evaluate_both)
    result = evaluate.main(asked(chat, "ARC"))["suites"]["chat"]
    assert set(result["tasks"]) == {"identity", "arc-easy"}
    assert result["mean_centred"] == pytest.approx(np.mean([task["centred"] for task in result["tasks"].values()]))


def test_no_score_is_called_chatcore_that_a_part_of_the_examples_gave(chat, monkeypatch):
    monkeypatch.setattr("nanochat_jax.eval.chat.CHATCORE", ("arc-easy",))
    part, whole = (evaluate.main(asked(chat, "ARC", examples=n))["suites"]["chat"] for n in (11, 0))
    assert part["chatcore"] is None and part["tasks"]["arc-easy"]["examples"] == 11
    assert whole["chatcore"] == whole["tasks"]["arc-easy"]["centred"] and whole["tasks"]["arc-easy"]["examples"] == 12


def test_tasks_without_data_are_named_and_left_out(chat, capsys):
    missing = f"gsm8k=jsonl:{chat}/nothing_{{split}}.jsonl"
    result = evaluate.main(asked(chat, f"{missing},ARC"))
    assert list(result["suites"]["chat"]["tasks"]) == ["arc-easy"]
    assert "gsm8k is left out: task gsm8k, split test: no file matches" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of the tasks could be measured: gsm8k"):
        evaluate.main(asked(chat, missing))
    assert json.loads((chat / "evaluation.json").read_text()) == result


def test_an_interruption_keeps_the_tasks_that_were_done(chat, measured, monkeypatch):
    real = Evaluator.evaluate

    def interrupted(self, task, *args):
        if task.name == "identity":
            raise KeyboardInterrupt
        return real(self, task, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Evaluator, "evaluate", interrupted)
        evaluate.main(asked(chat, "ARC,identity"))
    evaluate.main(asked(chat, "ARC,identity"))
    assert measured == ["arc-easy", "identity"]


def test_names_of_tasks():
    assert suites.task_specs("chatcore,spelling,mmlu=jsonl:a_{split}") == {
        **{name: name for name in CHATCORE}, "mmlu": "mmlu=jsonl:a_{split}", "spelling": "spelling",
    }  # fmt: skip


def test_chatcore_is_shown_where_there_is_one(capsys):
    task = {
        "kind": "generative",
        "accuracy": 0.5,
        "interval": [0.4, 0.6],
        "baseline": 0.0,
        "examples": 2000,
        "seconds": 1.0,
    }
    shown = {
        "tasks": {"gsm8k": task | {"too_long": 3}}, "chatcore": 0.25, "mean_centred": 0.5,
        "compilations": {"categorical": 0, "engine": 4},
    }  # fmt: skip
    suites.show_chat(shown)
    printed = capsys.readouterr().out
    assert "ChatCORE 0.2500; mean of 1 tasks" in printed and "3 prompts fill the context" in printed
    suites.show_chat(shown | {"chatcore": None})
    assert "ChatCORE" not in capsys.readouterr().out


def test_suites_follow_from_the_data():
    assert evaluate.Config(Path("x")).suites == ["chat"]
    assert evaluate.Config(Path("x"), data="y").suites == ["bpb", "sample"]
    assert evaluate.Config(Path("x"), data="y", suite="bpb,chat").suites == ["bpb", "chat"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "bpb,sing"}, "unknown suite 'sing'; choose from core, bpb, sample, chat"),
        ({"suite": "chat,bpb", "data": None}, "suite bpb .* add --data"),
        ({"rows": 0}, "--rows 0 must be at least 1"),
        ({"slots": 0}, "--slots 0"),
        ({"examples": -1}, "--examples -1"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
    ],
)
def test_refuses_what_makes_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        config(Path("x"), **changes)


def test_refuses_what_does_not_fit(run, chat, tiny_data):
    with pytest.raises(UserError, match="tokenizer sha256"):
        evaluate.main(config(run, data=str(tiny_data)))
    with pytest.raises(UserError, match="no checkpoint"):
        evaluate.main(config(run, checkpoint=run / "data"))
    with pytest.raises(UserError, match="unknown task 'chess'"):
        evaluate.main(asked(chat, "ARC,chess"))
    assert not (chat / "evaluation.json").exists()
    assert Checkpoints(run / "base" / "checkpoints").newest() == 6
