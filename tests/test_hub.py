"""The hub, against a server of its interface on the loopback: resumed, checked, quickly told when it is not there."""

import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_jax import files
from nanochat_jax.data import hub
from nanochat_jax.data.rows import open_rows
from nanochat_jax.data.sources import open_source
from nanochat_jax.errors import UserError
from tests import hub_server

TEXTS = [[f"shard {shard}, document {i} " + f"{(i + 1) ** 5} " * 60 for i in range(300)] for shard in range(3)]


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A data set of three shards and a file of conversations."""
    folder = tmp_path / "served" / "someone" / "texts"
    folder.mkdir(parents=True)
    for number, texts in enumerate(TEXTS):
        table = pa.table({"text": texts})
        pq.write_table(table, folder / f"shard_{number:05}.parquet", row_group_size=100, compression="none")
    (folder / "chats").mkdir()
    (folder / "chats" / "train-0.jsonl").write_text('{"messages": []}\n')
    with hub_server.serve(tmp_path / "served") as running:
        use(monkeypatch, running.endpoint, tmp_path)
        yield running


def use(monkeypatch, endpoint: str, cache: Path) -> None:
    """Let the client know the endpoint, which it has read from HF_ENDPOINT when it was imported."""
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # the client goes on from the last whole one
    monkeypatch.setattr(files, "CACHE", cache / "cache")


def read(spec: str) -> list[str]:
    source = open_source(spec, 100_000)
    return [text for unit in range(len(source.units)) for text in source.documents(unit)]


def test_shards_are_downloaded_when_read_and_once(server):
    source = open_source("hub:someone/texts#text", 100_000)
    assert len(source.units) == 3 and not server.sent
    assert list(source.documents(1)) == TEXTS[1] and set(server.sent) == {"shard_00001.parquet"}
    assert list(source.documents(1)) == TEXTS[1]
    assert server.sent["shard_00001.parquet"] == source.size_bytes(1)
    assert read("hub:someone/texts#text") == [text for texts in TEXTS for text in texts]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("hub:someone/texts[:2]#text", TEXTS[0] + TEXTS[1]),
        ("hub:someone/texts[2:]#text", TEXTS[2]),
        ("hub:someone/texts/shard_0000[12].parquet#text", TEXTS[1] + TEXTS[2]),
        ("hub:someone/texts@main/*.parquet[1:2]#text", TEXTS[1]),
    ],
)
def test_some_of_the_files(server, spec, expected):
    assert read(spec) == expected


def test_a_download_that_breaks_off_goes_on_from_there(server):
    size = (server.folder / "someone/texts/shard_00000.parquet").stat().st_size
    server.break_off_at["shard_00000.parquet"] = [size // 2, size // 4]
    assert read("hub:someone/texts[:1]#text") == TEXTS[0]
    assert size <= server.sent["shard_00000.parquet"] < size + 3 * 4096
    ranges = [asked for method, path, asked in server.requests if method == "GET" and path.endswith("00000.parquet")]
    assert len(ranges) == 3 and ranges[0] == "" and all(asked.startswith("bytes=") for asked in ranges[1:])


def test_network_gone_in_mid_download_is_told_and_taken_up_again(server, monkeypatch, tmp_path):
    size = (server.folder / "someone/texts/shard_00000.parquet").stat().st_size
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own tries
    server.break_off_at["shard_00001.parquet"] = [size // 2, *[0] * 20]
    with pytest.raises(UserError, match=r"cannot download hub:someone/texts/shard_00001\.parquet .*go on"):
        read("hub:someone/texts#text")
    assert not list((tmp_path / "hub").rglob("*.incomplete"))
    server.break_off_at.clear()
    assert read("hub:someone/texts#text") == [text for texts in TEXTS for text in texts]
    assert server.sent["shard_00000.parquet"] == size  # what had come before is not asked for again


def test_wrong_checksum_is_told_and_nothing_of_it_kept(server):
    server.damaged.add("shard_00000.parquet")
    with pytest.raises(UserError, match=r"shard_00000\.parquet arrives damaged, twice: its sha256"):
        read("hub:someone/texts[:1]#text")
    size = (server.folder / "someone/texts/shard_00000.parquet").stat().st_size
    assert server.sent["shard_00000.parquet"] == 2 * size
    server.damaged.clear()
    assert read("hub:someone/texts[:1]#text") == TEXTS[0]


def test_what_is_not_there_is_told(server):
    with pytest.raises(UserError, match=r"cannot list .*'someone/else'"):
        read("hub:someone/else#text")
    with pytest.raises(UserError, match="no file matches"):
        read("hub:someone/texts/*.csv#text")
    with pytest.raises(UserError, match="asks for file number 9, and there are 3"):
        read("hub:someone/texts[:9]#text")
    with pytest.raises(UserError, match=r"shard_00000\.parquet: no column 'body'"):
        read("hub:someone/texts#body")


def test_without_a_network_what_was_seen_goes_on_and_the_rest_is_told_at_once(server, monkeypatch, tmp_path, capsys):
    assert read("hub:someone/texts[:1]#text") == TEXTS[0]
    use(monkeypatch, "http://127.0.0.1:9", tmp_path)
    started = time.monotonic()
    source = open_source("hub:someone/texts[:2]#text", 100_000)
    assert "seen here before" in capsys.readouterr().out and list(source.documents(0)) == TEXTS[0]
    with pytest.raises(UserError, match=r"cannot download .*shard_00001\.parquet .*no network"):
        list(source.documents(1))
    with pytest.raises(UserError, match=r"cannot list .*no network.*\n  hf download other/texts"):
        open_source("hub:other/texts#text")
    assert time.monotonic() - started < 10


def test_rows_of_conversations(server):
    assert [row.values for row in open_rows("hub:someone/texts#chats/train-*.jsonl")] == [{"messages": []}]
    assert hub.list_files("someone/texts", "chats/*")[0].path == "chats/train-0.jsonl"
