"""Files of data sets on the Hugging Face hub: listed, downloaded one by one when wanted, resumed, and checked."""

import hashlib
import os
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from nanochat_jax import files
from nanochat_jax.config import from_json, write_json
from nanochat_jax.data.formats import sliced
from nanochat_jax.errors import UserError


@dataclass(frozen=True)
class HubFile:
    """A file of a data set at one commit."""

    repo: str
    commit: str
    path: str
    size_bytes: int
    sha256: str  # empty for the small files that the hub does not know it of

    def __str__(self) -> str:
        return f"hub:{self.repo}/{self.path}"


def list_files(name: str, pattern: str) -> list[HubFile]:
    """Files of a data set in order of path.

    Without a network the listing is the last one that was seen here.

    Args:
        name: OWNER/NAME, or OWNER/NAME@REVISION.
        pattern: of paths; PATTERN[:100] takes the first hundred that match.

    Raises:
        UserError: there is no such data set or file, or no network and no earlier listing.
    """
    seen = files.CACHE / "hub" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
    try:
        everything = _ask(name)
        write_json(seen, {"files": everything})
    except UserError as error:
        if not seen.exists():
            raise
        print(f"{error}\ngoing on with the listing of {name} that was seen here before")
        everything = [from_json(HubFile, file, str(seen)) for file in files.read_json(seen)["files"]]
    try:
        return sliced(pattern, lambda place: [file for file in everything if fnmatch(file.path, place)])
    except UserError as error:
        raise UserError(f"the hub's data set {name!r}: {error}") from error


def _ask(name: str) -> list[HubFile]:
    from huggingface_hub import HfApi, constants

    repo, _, revision = name.partition("@")
    try:
        files.require_network(constants.ENDPOINT)
        info = HfApi().dataset_info(repo, revision=revision or None, files_metadata=True, timeout=30)
    except Exception as error:  # of the hub's, of the HTTP client that it happens to use, of a name that can be none
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot list the hub's data set {name!r} ({reason}). Where there is a network, run\n"
            f"  hf download {repo} --repo-type dataset\n"
            "and name the files that it brings: jsonl:GLOB or parquet:GLOB"
        ) from error
    return sorted(
        (
            HubFile(repo, info.sha or "", file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else "")
            for file in info.siblings or ()
        ),
        key=lambda file: file.path,
    )


def fetch(file: HubFile) -> Path:
    """The file on disk, downloaded unless it is there already; a download that broke off goes on.

    Raises:
        UserError: it cannot be had, or is not what the hub says it is, even when downloaded again.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    where = file.repo, file.path
    for _ in range(2):
        try:
            if not isinstance(try_to_load_from_cache(*where, revision=file.commit, repo_type="dataset"), str):
                files.require_network(constants.ENDPOINT)
            local = Path(hf_hub_download(*where, revision=file.commit, repo_type="dataset"))
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"cannot download {file} ({reason}); run the same command again to go on") from error
        if local.stat().st_size == file.size_bytes and file.sha256 in ("", _sha256(local)):
            return local
        Path(os.path.realpath(local)).unlink()
        local.unlink(missing_ok=True)
    raise UserError(f"{file} arrives damaged, twice: its sha256 is not the {file.sha256} that the hub gives")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
