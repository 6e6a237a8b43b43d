"""Files that are either absent, or the old ones, or the whole new ones, on disks and in buckets (gs://…) alike.

`as_path` is the one door to buckets: what it returns has pathlib's methods, by etils.epath on top of gcsfs.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from nanochat_jax.errors import UserError

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nanochat_jax"
CONNECT_SECONDS = 5.0


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path on disk, or in a bucket: gs://BUCKET/… (also as pathlib writes it, with one slash).

    Raises:
        UserError: a bucket, and there is no network.
    """
    text = re.sub(r"^gs:/+", "gs://", os.fspath(path))
    if not is_remote(text):
        return Path(text).expanduser()
    import fsspec
    from etils import epath

    for protocol in ("gs", "gcs"):  # what other processes write must be seen
        fsspec.config.conf[protocol] = {"use_listings_cache": False, **fsspec.config.conf.get(protocol, {})}
    require_network(os.environ.get("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com"))
    found: Path = epath.Path(text)
    return found


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path lies in a bucket."""
    return os.fspath(path).startswith("gs:/")


@cache
def require_network(url: str) -> None:
    """UserError within seconds if nobody answers there: clients would go on trying for half a minute and more."""
    server = urllib.parse.urlsplit(url)
    if not urllib.request.proxy_bypass(server.hostname or ""):
        server = urllib.parse.urlsplit(urllib.request.getproxies().get(server.scheme, url))
    port = server.port or (443 if server.scheme == "https" else 80)
    try:
        socket.create_connection((server.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(f"there is no network: {server.hostname}:{port} does not answer ({error})") from error


@contextlib.contextmanager
def telling(what: str, remedy: str = "") -> Iterator[None]:
    """Turn whatever a disk or a bucket fails with into a UserError: what failed, why, and what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        module = type(error).__module__.partition(".")[0]
        if not isinstance(error, (OSError, EOFError)) and module not in ("gcsfs", "google", "aiohttp", "_lzma"):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{what}: {reason}{remedy}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name on disk, to write to; the file takes the path's place when the block ends well.

    Raises:
        UserError: if the file cannot be written; nothing is left behind.
    """
    remedy = "; free some space or choose another folder"
    with telling(f"cannot write {path}", remedy), contextlib.ExitStack() as stack:
        if is_remote(path):
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory())) / path.name
        else:
            temporary = path.with_name(f".{path.name}.tmp")
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.callback(_remove, temporary)
        yield temporary
        if is_remote(path):
            with temporary.open("rb") as source, path.open("wb") as target:  # an object appears when it is whole
                shutil.copyfileobj(source, target, 1 << 22)
        else:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it, if it is there."""
    if is_remote(path):
        folder: Any = path
        folder.rmtree(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; UserError if there is none."""
    with telling(f"cannot read {path}"):
        text = path.read_bytes()
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is damaged: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: not a JSON object")
    return values


def staged(path: Path, version: str = "") -> Path:
    """A file on disk with the content of one that may lie in a bucket, for libraries that know only disks.

    Copies are kept in the cache, one for each path, size and version.
    """
    if not is_remote(path):
        return path
    with telling(f"cannot copy {path} to {CACHE}"):
        stat: Any = path.stat()
        key = hashlib.sha256(f"{path} {stat.length} {version or stat.mtime}".encode()).hexdigest()[:32]
        copy = CACHE / "staged" / key / path.name
        with locked(copy.parent, wait=True):
            if not copy.exists():
                with replacing(copy) as temporary, path.open("rb") as source, temporary.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 22)
                    if target.tell() != stat.length:
                        raise OSError(f"{target.tell():,} of {stat.length:,} bytes came")
    return copy


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder for this process; the lock goes with the process, however that ends.

    A folder in a bucket is held on this machine alone: there are no locks in buckets.

    Args:
        folder: made if need be.
        wait: for another process to let it go.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    name = hashlib.sha256(os.fspath(folder).encode()).hexdigest()[:32]
    place = CACHE / "locks" / name if is_remote(folder) else folder
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = (place / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to {place}: {error.strerror}; choose another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is at work in {folder}: wait for it, or choose another folder") from error
        yield
