"""Files: whole or absent, on disk and in a bucket alike."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat_jax import files
from nanochat_jax.errors import UserError
from nanochat_jax.files import as_path, is_remote, locked, read_json, replacing, require_network, staged, write_bytes

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path) -> Path:
    return as_path(request.getfixturevalue("bucket")) if request.param == "bucket" else tmp_path / "folder"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_written_is_read_back(folder):
    write_bytes(folder / "a.json", b'{"a": 1}')
    assert read_json(folder / "a.json") == {"a": 1} and (folder / "a.json").is_file()
    write_bytes(folder / "a.json", b'{"a": 2}')
    assert read_json(folder / "a.json") == {"a": 2} and names(folder) == {"a.json"}
    assert [path.name for path in folder.glob("*.json")] == ["a.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(folder):
    write_bytes(folder / "a", b"old")
    with (
        pytest.raises(UserError, match=r"cannot write .*folder.*|cannot write gs://.*"),
        replacing(folder / "a") as new,
    ):
        new.write_bytes(b"ne")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (folder / "a").read_bytes() == b"old" and names(folder) == {"a"}


def test_what_is_not_there_or_no_json(folder):
    with pytest.raises(UserError, match=r"cannot read .*nothing\.json"):
        read_json(folder / "nothing.json")
    for content, reason in ((b"{", "not JSON"), (b"[]", "not a JSON object")):
        write_bytes(folder / "bad.json", content)
        with pytest.raises(UserError, match=reason):
            read_json(folder / "bad.json")


def test_one_process_at_a_time(folder):
    with locked(folder), pytest.raises(UserError, match="another process is at work"), locked(folder):
        pass
    with locked(folder):
        pass


def test_paths_of_a_bucket_survive_pathlib(bucket):
    assert is_remote(Path("gs://bucket/x")) and not is_remote(Path("/gs/x"))
    assert str(as_path(Path("gs://bucket/x") / "y")) == "gs://bucket/x/y"
    assert as_path("~/x") == Path.home() / "x"


def test_staged_copies_once_and_follows_changes(bucket, tmp_path):
    path = as_path(bucket) / "shard"
    write_bytes(path, b"x" * 100_000)
    copy = staged(path)
    written = copy.stat().st_mtime_ns
    assert copy.read_bytes() == b"x" * 100_000 and staged(path).stat().st_mtime_ns == written
    write_bytes(path, b"y" * 100_001)
    assert staged(path).read_bytes() == b"y" * 100_001
    assert staged(tmp_path / "local") == tmp_path / "local"


def test_a_copy_that_comes_short_is_not_kept(bucket, monkeypatch):
    path = as_path(bucket) / "shard"
    write_bytes(path, b"x" * 1000)
    real = files.shutil.copyfileobj
    monkeypatch.setattr(files.shutil, "copyfileobj", lambda source, target, size: target.write(source.read(10)))
    with pytest.raises(UserError, match=r"10 of 1,000 bytes came"):
        staged(path)
    monkeypatch.setattr(files.shutil, "copyfileobj", real)
    assert staged(path).stat().st_size == 1000


def test_missing_bucket_is_told(bucket):
    with pytest.raises(UserError, match="cannot read gs://no-such-bucket/a"):
        read_json(as_path("gs://no-such-bucket/a"))


def test_no_network_is_told_within_seconds():
    started = time.monotonic()
    with pytest.raises(UserError, match=r"there is no network: 127\.0\.0\.1:9 does not answer"):
        require_network("http://127.0.0.1:9")
    code = "from nanochat_jax.files import as_path; as_path('gs://bucket/x')"
    env = {key: value for key, value in os.environ.items() if key != "STORAGE_EMULATOR_HOST"}
    env |= {"https_proxy": "http://127.0.0.1:9", "no_proxy": ""}  # a way out that leads nowhere
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert "UserError: there is no network: 127.0.0.1:9" in run.stderr
    assert time.monotonic() - started < 15
