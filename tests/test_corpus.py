"""What pretraining reads: mixtures by weight, sets still in preparation, and one order for any number of hosts."""

import json
import random
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.data import corpus as corpora
from nanochat_jax.data import prepare as preparing
from nanochat_jax.data.batches import batches
from nanochat_jax.data.corpus import Corpus, open_corpus
from nanochat_jax.data.prepare import PrepareConfig, prepare
from nanochat_jax.data.records import load_manifest, unit_stats_path
from nanochat_jax.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Two prepared sets of some units each, the larger one first, and a tokenizer for both."""
    folder = tmp_path_factory.mktemp("sets")
    rng = random.Random(0)
    texts = {name: [" ".join(str(rng.randrange(10**6)) for _ in range(60)) for _ in range(count)]
             for name, count in (("large", 400), ("small", 150))}  # fmt: skip
    tokenizers.train(texts["large"], 300).save(folder / "tokenizer.model")
    for name, documents in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        prepare(make_config(folder, name))
    return folder


def make_config(folder: Path, name: str, **changes) -> PrepareConfig:
    return PrepareConfig(
        **{
            "source": f"jsonl:{folder}/{name}.jsonl#text",
            "tokenizer": folder / "tokenizer.model",
            "out": folder / name,
            "sequence_len": 32,
            "unit_bytes": 20_000,
            "val_fraction": 0.2,
            "workers": 1,
            **changes,
        }
    )


def read(corpus: Corpus, steps: int, *, start: int = 0, host: int = 0, hosts: int = 1, seed: int = 5) -> np.ndarray:
    """Tokens of some batches of 8 rows, (steps, rows, T)."""
    found = corpus.batches(batch_size=8, seed=seed, start_step=start, process_index=host, process_count=hosts)
    return np.stack([batch["tokens"] for batch in islice(filter(None, found), steps)])


def as_set(rows: np.ndarray) -> list[tuple[int, ...]]:
    return sorted(map(tuple, rows.reshape(-1, rows.shape[-1]).tolist()))


def all_rows(corpus: Corpus) -> list[tuple[int, ...]]:
    return as_set(np.stack([corpus.train.row(i)["tokens"] for i in range(len(corpus.train))]))


def test_one_set_is_read_as_ever(sets):
    corpus = open_corpus(str(sets / "large"))
    manifest = load_manifest(sets / "large")
    assert corpus.fingerprint == manifest.fingerprint and len(corpus.train) == manifest.train.records
    plain = np.stack([b["tokens"] for b in islice(batches(corpus.train, batch_size=8, seed=5), 9)])
    np.testing.assert_array_equal(read(corpus, 9), plain)
    assert corpus.epochs(2 * manifest.train.records) == {str(sets / "large"): 2.0}


def test_weights_are_shares_of_the_rows(sets):
    corpus = open_corpus(f"{sets}/large*3,{sets}/small*1")
    counts = [load_manifest(sets / name).train.records for name in ("large", "small")]
    assert len(corpus.train) == sum(counts) and len(corpus.val) == sum(
        load_manifest(sets / name).val.records for name in ("large", "small")
    )
    order = corpus.order(5)
    drawn = np.array([order[i] for i in range(4 * counts[1])])
    assert ((drawn >= counts[0]).reshape(-1, 4).sum(1) == 1).all()  # one of every four
    assert sorted(drawn[drawn >= counts[0]]) == list(range(counts[0], sum(counts)))  # each once in its epoch
    epochs = corpus.epochs(4 * counts[1])
    assert epochs == {f"{sets}/large": 3 * counts[1] / counts[0], f"{sets}/small": 1.0}


def test_mixtures_are_told_apart(sets):
    specs = [f"{sets}/large*3,{sets}/small*1", f"{sets}/large*1,{sets}/small*1", f"{sets}/large", f"{sets}/small"]
    assert len({open_corpus(spec).fingerprint for spec in specs}) == 4
    assert open_corpus(f"{sets}/large*6,{sets}/small*2").fingerprint == open_corpus(specs[0]).fingerprint


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{sets}/large*0,{sets}/small", "weights must be positive"),
        ("{sets}/large,{sets}/large", "each set be named once"),
        ("{sets}/large,{sets}/nothing", "nothing holds no finished records"),
    ],
)
def test_mixtures_that_make_no_sense(sets, spec, message):
    with pytest.raises(UserError, match=message):
        open_corpus(spec.format(sets=sets))
    with pytest.raises(UserError, match=r"window-units=2 .* one set alone"):
        open_corpus(f"{sets}/large,{sets}/small", window_units=2)


def test_two_tokenizers_or_lengths_are_not_mixed(sets, tmp_path):
    tokenizers.train(["another text for another tokenizer"] * 9, 300).save(tmp_path / "other.model")
    prepare(make_config(sets, "small", out=tmp_path / "other", tokenizer=tmp_path / "other.model"))
    with pytest.raises(UserError, match="made by two tokenizers, sha256 "):
        open_corpus(f"{sets}/large,{tmp_path}/other")
    prepare(make_config(sets, "small", out=tmp_path / "short", sequence_len=16))
    with pytest.raises(UserError, match=r"sequence-len=32, .*short 16"):
        open_corpus(f"{sets}/large,{tmp_path}/short")


HOST = """
import json, sys
from nanochat_jax.data.corpus import open_corpus
from tests.test_corpus import read
spec, window, parts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
corpus = open_corpus(spec, window_units=window)
found = [read(corpus, steps, start=start, host=host, hosts=hosts).tolist() for start, steps, host, hosts in parts]
print(json.dumps(found))
"""


@pytest.mark.parametrize("window", [0, 2])
def test_hosts_as_processes_read_one_sequence_also_when_their_number_changes(sets, window):
    """Steps 0 to 2 on one host, 3 to 7 on four, 8 to 39 on two: four processes, the last two of which leave early."""
    spec = str(sets / "small") if window else f"{sets}/large*2,{sets}/small*1"
    plan = [(0, 3, 1), (3, 5, 4), (8, 32, 2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, spec, str(window),
             json.dumps([(start, steps, host, hosts) for start, steps, hosts in plan if host < hosts])],
            stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for host in range(4)
    ]  # fmt: skip
    outputs = [json.loads(process.communicate()[0]) for process in processes]
    found = []
    for host_parts in (
        [outputs[0][0]],
        [out[-2 if len(out) > 1 else 0] for out in outputs],
        [o[-1] for o in outputs[:2]],
    ):
        found.append(np.concatenate([np.array(part) for part in host_parts], axis=1))
    np.testing.assert_array_equal(np.concatenate(found), read(open_corpus(spec, window_units=window), 40))


def test_windows_have_every_row_once_an_epoch(sets):
    corpus = open_corpus(str(sets / "large"), window_units=2)
    count = load_manifest(sets / "large").train.records
    corpus.wait_for(count)
    order = corpus.order(5)
    first, second = ([order[i] for i in range(k * count, (k + 1) * count)] for k in range(2))
    assert sorted(first) == sorted(second) == list(range(count)) and first != second
    window = corpus.train.bounds(1)
    assert sorted(first[slice(*window)]) == list(range(*window)) != first[slice(*window)]
    assert len(corpus.val) < len(open_corpus(str(sets / "large")).val)


def test_training_begins_on_what_is_ready(sets, tmp_path, monkeypatch):
    """Slow preparation in a thread: reading starts before it ends, and reads what a finished set gives."""
    monkeypatch.setattr(corpora, "POLL_SECONDS", 0.02)
    gate, real = threading.Semaphore(0), preparing._prepare_unit

    def slow(*args):
        gate.acquire()
        real(*args)

    monkeypatch.setattr(preparing, "_prepare_unit", slow)
    config = make_config(sets, "large", out=tmp_path / "set")
    thread = threading.Thread(target=prepare, args=(config,), daemon=True)
    thread.start()
    while not (tmp_path / "set" / "tokenizer.model").exists():
        time.sleep(0.02)
    units = load_manifest(sets / "large").units
    with pytest.raises(UserError, match="--window-units"):
        open_corpus(str(tmp_path / "set"))
    for _ in range(2):
        gate.release()
    corpus = open_corpus(str(tmp_path / "set"), window_units=2)
    ready = len(corpus.train)
    begun = read(corpus, ready // 8)
    assert not unit_stats_path(tmp_path / "set", 2).exists() and thread.is_alive()
    for _ in range(units):
        gate.release()
    rest = read(corpus, ready // 8 + 60)
    thread.join()
    finished = open_corpus(str(sets / "large"), window_units=2)
    np.testing.assert_array_equal(rest, read(finished, ready // 8 + 60))
    np.testing.assert_array_equal(begun, rest[: ready // 8])
    corpus.wait_for(10**9)
    assert all_rows(corpus) == all_rows(open_corpus(str(sets / "large")))
    again = open_corpus(str(tmp_path / "set"), window_units=2)
    assert again.fingerprint == corpus.fingerprint != open_corpus(str(tmp_path / "set")).fingerprint
    assert len(again.val) == len(corpus.val)


def test_a_preparation_that_nobody_goes_on_with_is_told(sets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpora, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(corpora, "STALLED_SECONDS", 0.2)
    real = preparing._prepare_unit

    def dying(job, tokenizer, unit):
        if unit == 3:
            raise KeyboardInterrupt
        real(job, tokenizer, unit)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparing, "_prepare_unit", dying)
        prepare(make_config(sets, "large", out=tmp_path / "set"))
    corpus = open_corpus(str(tmp_path / "set"), window_units=2)
    read(corpus, len(corpus.train) // 8)
    with pytest.raises(UserError, match=r"3 of .* units of .* are prepared, and nobody is at work"):
        read(corpus, len(corpus.train) // 8 + 1)
    assert "waiting for more" in capsys.readouterr().out


def test_a_window_without_anything_held_out_is_refused(sets, tmp_path):
    prepare(make_config(sets, "large", out=tmp_path / "set", val_fraction=0.01, unit_bytes=2_000))
    assert load_manifest(tmp_path / "set").val.records
    with pytest.raises(UserError, match=r"first 1 work units of .* no record to validate on: .*--window-units"):
        open_corpus(str(tmp_path / "set"), window_units=1)


def test_a_set_in_a_bucket(sets, bucket, tmp_path):
    config = make_config(sets, "small", out=Path(bucket) / "set", workers=2)
    manifest = prepare(config)
    assert manifest == load_manifest(sets / "small") and prepare(config) == manifest
    here, there = open_corpus(str(sets / "small")), open_corpus(f"{bucket}/set")
    assert there.fingerprint == here.fingerprint
    np.testing.assert_array_equal(read(there, 9), read(here, 9))
    np.testing.assert_array_equal(read(open_corpus(f"{bucket}/set", window_units=2), 9),
                                  read(open_corpus(str(sets / "small"), window_units=2), 9))  # fmt: skip
    assert list((tmp_path / "cache").rglob("records-train*"))
    with pytest.raises(UserError, match="sequence_len: 32 there, 16 here"):
        prepare(make_config(sets, "small", out=Path(bucket) / "set", sequence_len=16))
