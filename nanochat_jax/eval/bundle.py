"""The bundle of files that the CORE tasks come in: found or downloaded, checked, and read."""

import contextlib
import csv
import hashlib
import json
import random
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from tqdm import tqdm

from nanochat_jax.errors import UserError
from nanochat_jax.files import CACHE, require_network

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
CORE_TASKS = 22
LIST, BASELINES, DATA = "core.yaml", "eval_meta_data.csv", "eval_data"  # what a bundle's folder holds
KINDS = ("multiple_choice", "schema", "language_modeling")
ORDER_SEED = 1337

type Item = dict[str, Any]


@dataclass(frozen=True)
class CoreTask:
    """A task as the bundle describes it."""

    name: str
    kind: str
    path: Path
    shots: int  # solved examples before each item
    delimiter: str
    baseline: float  # accuracy of guessing, from 0 to 1

    @property
    def fingerprint(self) -> str:
        """Changes with the items and with how they are asked."""
        settings = (self.kind, self.shots, self.delimiter, self.baseline)
        return hashlib.sha256(repr(settings).encode() + self.path.read_bytes()).hexdigest()


def find_bundle(folder: Path | None = None) -> Path:
    """The folder given, or the downloaded bundle; downloads it the first time.

    Raises:
        UserError: it is not there, and cannot be downloaded.
    """
    if folder is not None:
        inner = folder / "eval_bundle"
        return inner if inner.is_dir() and not (folder / LIST).is_file() else folder
    cached = CACHE / "eval_bundle"
    if not (cached / LIST).is_file():
        _download(cached)
    return cached


def _download(folder: Path) -> None:
    print(f"downloading the CORE tasks from {URL}")
    try:
        require_network(URL)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            archive = Path(temporary) / "bundle.zip"
            with httpx.stream("GET", URL, timeout=20, follow_redirects=True) as response, archive.open("wb") as file:
                response.raise_for_status()
                size = int(response.headers.get("content-length", 0)) or None
                with tqdm(total=size, unit="B", unit_scale=True, desc="bundle", disable=None) as bar:
                    for part in response.iter_bytes():
                        file.write(part)
                        bar.update(len(part))
            with zipfile.ZipFile(archive) as bundle:
                bundle.extractall(temporary)
            with contextlib.suppress(OSError):  # another process may have been faster
                (Path(temporary) / "eval_bundle").rename(folder)
            open_bundle(folder)
    except (UserError, httpx.HTTPError, OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"cannot download the CORE tasks: {error or type(error).__name__}. Where there is a network, run\n"
            f"  curl -O {URL} && unzip eval_bundle.zip\n"
            "then copy the folder eval_bundle here and name it with --bundle"
        ) from error


def open_bundle(folder: Path) -> list[CoreTask]:
    """The tasks that a bundle lists, in its order.

    Raises:
        UserError: a file is missing or damaged, which the message names.
    """
    listed, baselines = folder / LIST, _baselines(folder / BASELINES)
    try:
        entries = yaml.safe_load(listed.read_text())["icl_tasks"]
        tasks = [_task(folder, entry, baselines) for entry in entries]
        if not tasks or len({task.name for task in tasks}) < len(tasks):
            raise ValueError("it lists no tasks, or two of one name")
    except OSError as error:
        raise UserError(f"cannot read {listed}: {error.strerror}; --bundle names the folder that holds it") from error
    except (yaml.YAMLError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{listed} is damaged: {type(error).__name__} {error}; get the bundle again") from error
    for task in tasks:
        if not task.path.is_file():
            raise UserError(f"the bundle lacks {task.path}, the items of task {task.name}; get it again from {URL}")
    return tasks


def _task(folder: Path, entry: dict[str, Any], baselines: dict[str, float]) -> CoreTask:
    name, kind = str(entry["label"]), str(entry["icl_task_type"])
    if kind not in KINDS:
        raise ValueError(f"task {name} is of kind {kind!r}, not {', '.join(KINDS)}")
    if name not in baselines:
        raise UserError(f"{folder / BASELINES} has no baseline for task {name}; get the bundle again from {URL}")
    if (shots := int(entry["num_fewshot"][0])) < 0 or not 0 <= baselines[name] < 1:
        raise ValueError(f"task {name} has {shots} solved examples and a baseline of {baselines[name]:.0%}")
    return CoreTask(
        name=name,
        kind=kind,
        path=folder / DATA / entry["dataset_uri"],
        shots=shots,
        delimiter=str(entry.get("continuation_delimiter", " ")),
        baseline=baselines[name],
    )


def _baselines(path: Path) -> dict[str, float]:
    """By task the accuracy of guessing, which the file has in percent."""
    try:
        with path.open(newline="") as file:
            return {row["Eval Task"]: 0.01 * float(row["Random baseline"]) for row in csv.DictReader(file)}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; --bundle names the folder that holds it") from error
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}; get the bundle again") from error


FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}


def read_items(task: CoreTask, limit: int = 0) -> list[Item]:
    """A task's items in CORE's order, the first so many of them (0 for all).

    A limit also shrinks what the solved examples are drawn from, as in nanochat.

    Raises:
        UserError: a line is damaged, which the message names, or there are fewer items than the examples need.
    """
    items = []
    for number, line in enumerate(task.path.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                items.append(_item(task.kind, json.loads(line)))
            except (ValueError, TypeError, KeyError, IndexError) as error:
                why = f"no field {error}" if isinstance(error, KeyError) else str(error)
                raise UserError(f"{task.path}, line {number:,}: not an item of a {task.kind} task: {why}") from error
    random.Random(ORDER_SEED).shuffle(items)
    items = items[: limit or None]
    if len(items) <= task.shots:
        raise UserError(
            f"task {task.name} shows {task.shots} solved examples before each item and so needs at least "
            f"{task.shots + 1} items: there are {len(items)}; raise --examples, or get the bundle again"
        )
    return items


def _item(kind: str, values: Any) -> Item:
    """The fields that matter, as text; numbers are written out."""
    if not isinstance(values, dict):
        raise ValueError(f"an object was expected, not {type(values).__name__}")
    item: Item = {}
    for name in FIELDS[kind]:
        value = values[name]
        if name == "gold":
            item[name] = int(value)
        elif name in ("choices", "context_options"):
            if not isinstance(value, list) or not 0 <= int(values["gold"]) < len(value):
                raise ValueError(f"gold={values['gold']!r} is none of the {name}")
            item[name] = [_text(name, option) for option in value]
        else:
            item[name] = _text(name, value)
    return item


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str | int | float):
        raise ValueError(f"field {name!r} holds {type(value).__name__}, not text")
    return str(value)
