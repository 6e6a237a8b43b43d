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
from nanochat_jax.metrics import read_metrics
from train import evaluate, prepare, pretrain, tokenizer
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
    return dataclasses.replace(evaluate.Config(checkpoint=run / "base", data=run / "data", rows=1), **changes)


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
    assert result["data"] == manifest.fingerprint
    bpb, sample = result["suites"]["bpb"], result["suites"]["sample"]
    assert (bpb["bytes"], bpb["tokens"]) == (manifest.val.bytes, manifest.val.tokens)
    assert list(bpb["bits_per_byte"]) == ["this model", "unigram tokens", "gzip -9", "xz -9"]
    assert all(0 < bits < 10 for bits in bpb["bits_per_byte"].values())
    logged = [record["val_bpb"] for record in read_metrics(run / "base") if "val_bpb" in record]
    assert bpb["bits_per_byte"]["this model"] == pytest.approx(logged[-1], rel=1e-5)
    assert [entry["prompt"] for entry in sample["samples"]] == list(evaluate.PROMPTS)
    assert bpb["seconds"] > 0
    printed = capsys.readouterr().out
    assert f"{bpb['bits_per_byte']['gzip -9']:.4f}" in printed
    assert "the model does not beat" in printed or "the model beats all" in printed


def test_reuses_what_was_measured_on_the_same_checkpoint_and_data(run, monkeypatch, capsys):
    first = evaluate.main(config(run, suite="bpb"))

    def fail(_):
        raise AssertionError("measured again")

    monkeypatch.setitem(evaluate.SUITES, "bpb", evaluate.SUITES["bpb"]._replace(measure=fail))
    both = evaluate.main(config(run))
    assert both["suites"]["bpb"] == first["suites"]["bpb"]
    assert "sample" in both["suites"]
    assert "measured before" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="measured again"):
        evaluate.main(config(run, force=True))
    assert set(evaluate.main(config(run, suite="sample", force=True))["suites"]) == {"bpb", "sample"}
    for spoilt in (json.dumps(both | {"step": 5}), json.dumps(both | {"data": "other"}), "{}", "not JSON"):
        (run / "base" / "evaluation.json").write_text(spoilt)
        with pytest.raises(AssertionError, match="measured again"):
            evaluate.main(config(run))


def test_refuses_what_does_not_fit(run, tiny_data):
    with pytest.raises(UserError, match="tokenizer sha256"):
        evaluate.main(config(run, data=tiny_data))
    with pytest.raises(UserError, match=r"unknown suite 'sing'; choose from bpb, sample"):
        evaluate.main(config(run, suite="bpb,sing"))
    with pytest.raises(UserError, match="rows=0"):
        evaluate.main(config(run, rows=0))
    with pytest.raises(UserError, match="no checkpoint"):
        evaluate.main(config(run, checkpoint=run / "data"))
    assert Checkpoints(run / "base" / "checkpoints").newest() == 6
