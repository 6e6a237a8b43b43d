"""Sources: every document once, in stable order, and every fault named with its place."""

import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax.data import sources
from nanochat_jax.data.records import encode_example
from nanochat_jax.data.sources import open_source
from nanochat_jax.errors import UserError
from nanochat_jax.files import as_path, write_bytes


def read(spec: str, unit_bytes: int = sources.UNIT_BYTES) -> list[str]:
    source = open_source(spec, unit_bytes)
    return [text for unit in range(len(source.units)) for text in source.documents(unit)]


def write_jsonl(path: Path, count: int) -> list[str]:
    texts = [f"line {i} é" + "x" * (i * 37 % 90) for i in range(count)]
    path.write_text(
        "".join(json.dumps({"body": text, "n": 1}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts))
    )
    return texts


def test_sotu_is_whole_and_clean():
    source = open_source("sotu")
    documents = [list(source.documents(unit)) for unit in range(len(source.units))]
    assert sum(map(len, documents)) == 249 and len(documents) == 3
    assert documents[0][0].startswith("Fellow-Citizens of the Senate")
    text = "".join(text for unit in documents for text in unit)
    assert "[Laughter]" not in text and "[applause]" not in text and len(text) > 12_000_000


def test_chitchat_has_turns_as_lines_and_no_profanity():
    documents = list(open_source("chitchat").documents(0))
    assert len(documents) > 1000 and all("\n" in text for text in documents[:20])
    assert not any("fuck" in text.lower().split() for text in documents)


def test_a_file_whose_name_holds_brackets_is_found(tmp_path):
    (tmp_path / "runs [1]").mkdir()
    path = tmp_path / "runs [1]" / "my [draft].txt"
    path.write_text("Hello.")
    assert read(f"text:{path}") == ["Hello."]


def test_text_files_are_documents_in_order_of_name(tmp_path):
    for name in ("b", "a", "sub/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(f"text of {name}\r\n".encode())
    assert read(f"text:{tmp_path}/**") == ["text of a\r\n", "text of b\r\n", "text of sub/c\r\n"]


@pytest.mark.parametrize("unit_bytes", [1, 7, 64, 1000, 1 << 20])
def test_cut_text_file_loses_nothing(tmp_path, unit_bytes):
    text = "".join(f"line {i} " + "é" * (i % 50) + "\n" for i in range(60)) + "no newline at the end"
    (tmp_path / "big.txt").write_text(text)
    assert "".join(read(f"text:{tmp_path}/big.txt", unit_bytes)) == text


@pytest.mark.parametrize("unit_bytes", [1, 100, 1000, 1 << 20])
def test_jsonl_is_the_same_for_any_unit_size(tmp_path, unit_bytes):
    texts = write_jsonl(tmp_path / "a.jsonl", 50)
    assert read(f"jsonl:{tmp_path}/*.jsonl#body", unit_bytes) == texts


def test_units_are_of_even_size(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", 1000)
    source = open_source(f"jsonl:{tmp_path}/*.jsonl#body", 10_000)
    sizes = [source.size_bytes(unit) for unit in range(len(source.units))]
    assert max(sizes) <= 10_000 < 1.5 * min(sizes) and sum(sizes) == pytest.approx(
        os.path.getsize(tmp_path / "a.jsonl"), abs=20
    )


def test_parquet(tmp_path):
    texts = [f"row {i}" for i in range(100)] + ["", None]
    pq.write_table(pa.table({"body": texts, "n": range(102)}), tmp_path / "a.parquet", row_group_size=30)
    assert read(f"parquet:{tmp_path}/a.parquet#body", 100) == [*texts[:101], ""]
    assert len(open_source(f"parquet:{tmp_path}/a.parquet#body", 100).units) > 1


def test_an_empty_file_among_others_is_an_empty_document(tmp_path):
    for name, text in (("a", ""), ("b", "text"), ("c", "")):
        (tmp_path / name).write_text(text)
    source = open_source(f"text:{tmp_path}/*")
    assert len(source.units) == 1 and list(source.documents(0)) == ["", "text", ""]


def test_blank_lines_and_nulls_are_empty_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n\n{"body": null}\n{"body": ""}')
    assert read(f"jsonl:{tmp_path}/a.jsonl#body") == ["x", "", "", ""]


@pytest.mark.parametrize(
    ("content", "place", "reason"),
    [
        (b'{"body": "x"}\n{"body": "y"\n', "line 2", "delimiter"),
        (b'{"body": "x"}\n\n{"other": "y"}\n', "line 3", "no field 'body'; found other"),
        (b'{"body": "x"}\n["y"]\n', "line 2", "found list"),
        (b'{"body": 5}\n', "line 1", "holds int, not text"),
        (b'{"body": "x"}\n{"body": "\xff"}\n', "line 2", "utf-8"),
        (b'{"body": "\\ud800"}\n', "line 1", "surrogates not allowed"),
    ],
)
def test_faults_in_jsonl_name_the_line(tmp_path, content, place, reason):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        read(f"jsonl:{tmp_path}/a.jsonl#body", 10)
    assert f"a.jsonl, {place} " in str(caught.value)


def test_non_utf8_text_names_the_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n" * 10 + b"bad \xe9\n" + b"good\n" * 10)
    for unit_bytes in (20, 1000):
        with pytest.raises(UserError, match=r"a\.txt: byte 54 is not UTF-8"):
            read(f"text:{tmp_path}/a.txt", unit_bytes)


def test_faults_in_parquet_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": [f"row {i}" for i in range(1000)], "n": range(1000)}), path, row_group_size=100)
    with pytest.raises(UserError, match="no column 'text'; found body, n"):
        read(f"parquet:{path}#text")
    with pytest.raises(UserError, match="'n' holds int64, not text"):
        read(f"parquet:{path}#n")
    data = path.read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[:-100])
    with pytest.raises(UserError, match=r"cut\.parquet: not a readable parquet file"):
        read(f"parquet:{tmp_path}/cut.parquet#body")
    broken = bytearray(data)
    middle = pq.ParquetFile(path).metadata.row_group(5).column(0).data_page_offset
    broken[middle : middle + 40] = b"\xff" * 40
    (tmp_path / "broken.parquet").write_bytes(broken)
    with pytest.raises(UserError, match=r"broken\.parquet, row 500 \(row group 5\)"):
        read(f"parquet:{tmp_path}/broken.parquet#body")


def test_non_utf8_parquet_names_the_row(tmp_path):
    strings = pa.array([b"good", b"b\xffd"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"body": strings}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 1 "):
        read(f"parquet:{tmp_path}/a.parquet#body")


def write_tfds_set(folder: Path, texts: list[bytes]) -> None:
    """A TFDS set with one Text feature, built without TensorFlow."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir()
    writer = ArrayRecordWriter(str(folder / "tiny-train.array_record-00000-of-00001"), "group_size:1")
    for text in texts:
        writer.write(encode_example(text).replace(b"\x06tokens", b"\x06speech"))
    writer.close()
    split = {
        "name": "train",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "numBytes": str(sum(map(len, texts))),
        "shardLengths": [str(len(texts))],
    }
    info = {"name": "tiny", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    package = "tensorflow_datasets.core.features"
    speech = {"pythonClassName": f"{package}.text_feature.Text", "text": {}}
    features = {
        "pythonClassName": f"{package}.features_dict.FeaturesDict",
        "featuresDict": {"features": {"speech": speech}},
    }
    (folder / "features.json").write_text(json.dumps(features))


def test_tfds_folder(tmp_path):
    texts = [f"speech {i} é" for i in range(20)]
    write_tfds_set(tmp_path / "tiny", [text.encode() for text in texts])
    assert read(f"tfds:{tmp_path}/tiny#speech") == texts
    assert read(f"tfds:{tmp_path}/tiny#speech", 50) == texts
    with pytest.raises(UserError, match="no text feature 'text' in a train split"):
        read(f"tfds:{tmp_path}/tiny#text")
    write_tfds_set(tmp_path / "bad", [b"good", b"\xff"])
    with pytest.raises(UserError, match="example 1: feature 'speech' is not UTF-8"):
        read(f"tfds:{tmp_path}/bad#speech")


def test_tfds_set_that_is_not_there_fails_fast(monkeypatch, tmp_path):
    def offline(url):
        raise UserError("no network")

    monkeypatch.setattr(sources, "require_network", offline)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"ag_news_subset.*no network"):
        open_source("tfds:ag_news_subset#description")
    with pytest.raises(UserError, match="neither a prepared folder"):
        open_source("tfds:no_such_set#text")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("books", "unknown source 'books'.*text, jsonl"),
        ("text:{tmp}/nothing*.txt", "no file matches"),
        ("text:{tmp}/empty.txt", "holds no text"),
        ("jsonl:{tmp}/empty.txt", "must say where the text lies"),
        ("jsonl:{tmp}/empty.txt#", "must say where the text lies"),
        ("sotu:1790", "without '1790'"),
    ],
)
def test_specs_that_name_nothing(tmp_path, spec, message):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=message):
        open_source(spec.format(tmp=tmp_path))


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install chitchat-dataset"):
        open_source("chitchat")


def test_file_that_vanishes_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    source = open_source(f"text:{tmp_path}/a.txt")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"cannot read .*a\.txt"):
        list(source.documents(0))


def test_fingerprint_follows_the_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    before = open_source(f"text:{tmp_path}/*.txt").fingerprint
    assert open_source(f"text:{tmp_path}/*.txt").fingerprint == before
    (tmp_path / "b.txt").write_text("y")
    assert open_source(f"text:{tmp_path}/*.txt").fingerprint != before


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix == ".xz":
        return lzma.compress(data)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}[suffix]) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_compressed_lines(tmp_path, suffix):
    texts = write_jsonl(tmp_path / "a.jsonl", 5000)
    data = compressed((tmp_path / "a.jsonl").read_bytes(), suffix)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(data)
    assert read(f"jsonl:{tmp_path}/a.jsonl{suffix}#body", 100) == texts
    (tmp_path / f"cut.jsonl{suffix}").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=rf"cannot read .*cut\.jsonl{suffix}"):
        read(f"jsonl:{tmp_path}/cut.jsonl{suffix}#body")
    (tmp_path / f"none.jsonl{suffix}").write_bytes(b"not compressed at all" * 100)
    with pytest.raises(UserError, match=rf"cannot read .*none\.jsonl{suffix}"):
        read(f"jsonl:{tmp_path}/none.jsonl{suffix}#body")


def test_faults_in_compressed_lines_name_the_line(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(compressed(b'{"body": "x"}\n\n{"other": "y"}\n', ".gz"))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz, line 3 \(byte 15\)"):
        read(f"jsonl:{tmp_path}/a.jsonl.gz#body")


def test_compressed_text_is_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i} é\n" for i in range(1000))
    (tmp_path / "a.txt.zst").write_bytes(compressed(text.encode(), ".zst"))
    documents = read(f"text:{tmp_path}/*.zst", 1000)
    assert "".join(documents) == text and len(documents) > 10 and all(len(d.encode()) <= 1000 for d in documents)
    assert read(f"text:{tmp_path}/*.zst") == [text]


def write_array_record(path: Path, records: list[bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_array_records(tmp_path):
    texts = [f"text {i} é" for i in range(50)]
    write_array_record(tmp_path / "plain", [text.encode() for text in texts])
    assert read(f"arrayrecord:{tmp_path}/plain") == read(f"arrayrecord:{tmp_path}/plain", 100) == texts
    write_array_record(tmp_path / "examples", [encode_example(text.encode()) for text in texts])
    assert read(f"arrayrecord:{tmp_path}/examples#tokens", 100) == texts
    with pytest.raises(UserError, match=r"examples, record 0.*body"):
        read(f"arrayrecord:{tmp_path}/examples#body")
    write_array_record(tmp_path / "bad", [b"good", b"\xff"])
    with pytest.raises(UserError, match="bad, record 1 is not UTF-8"):
        read(f"arrayrecord:{tmp_path}/bad")
    whole = (tmp_path / "plain").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut: not a readable ArrayRecord file"):
        read(f"arrayrecord:{tmp_path}/cut")


def test_a_slice_of_the_files(tmp_path):
    for name in "cab":
        (tmp_path / f"{name}.txt").write_text(name)
    assert read(f"text:{tmp_path}/*.txt[:2]") == ["a", "b"] and read(f"text:{tmp_path}/*.txt[1:]") == ["b", "c"]
    assert read(f"text:{tmp_path}/[ab].txt") == ["a", "b"]
    with pytest.raises(UserError, match="asks for file number 4, and there are 3"):
        read(f"text:{tmp_path}/*.txt[:4]")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_bucket_reads_as_a_disk(bucket, tmp_path, suffix):
    texts = write_jsonl(tmp_path / "a.jsonl", 300)
    remote = as_path(bucket)
    data = (tmp_path / "a.jsonl").read_bytes()
    write_bytes(remote / f"a.jsonl{suffix}", compressed(data, ".gz") if suffix else data)
    assert read(f"jsonl:{bucket}/*.jsonl{suffix}#body", 2000) == texts
    write_bytes(remote / f"a.txt{suffix}", compressed(data, ".gz") if suffix else data)
    assert "".join(read(f"text:{bucket}/a.txt{suffix}", 2000)).encode() == data
    if not suffix:
        pq.write_table(pa.table({"body": texts}), tmp_path / "a.parquet", row_group_size=100)
        write_array_record(tmp_path / "a.array_record", [text.encode() for text in texts])
        for name in ("a.parquet", "a.array_record"):
            write_bytes(remote / name, (tmp_path / name).read_bytes())
        assert read(f"parquet:{bucket}/*.parquet#body", 2000) == texts
        assert len(open_source(f"parquet:{bucket}/*.parquet#body", 2000).units) == 3
        assert read(f"arrayrecord:{bucket}/a.array_record", 2000) == texts
    with pytest.raises(UserError, match=f"no file matches '{bucket}/nothing"):
        read(f"text:{bucket}/nothing*")
    with pytest.raises(UserError, match=r"\*\*"):
        read(f"text:{bucket}/**/a.txt")
