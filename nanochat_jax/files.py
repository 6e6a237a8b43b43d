"""Files that are either absent, or the old ones, or the whole new ones."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from nanochat_jax.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside the path, to write to; it takes the path's place when the block ends well.

    Raises:
        UserError: if the file cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; free some space or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)
