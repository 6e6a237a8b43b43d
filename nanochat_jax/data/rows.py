"""Rows of named fields from files, TFDS and the hub: what data sets for chat come as.

Specs: `jsonl:GLOB`, `parquet:GLOB`, `tfds:NAME#SPLIT` (NAME may be a prepared folder), `hub:OWNER/NAME#GLOB` (Parquet
or JSON lines within a data set of the Hugging Face hub).
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_jax.chat import Conversation, check_conversation
from nanochat_jax.data import hub
from nanochat_jax.data.formats import matching_files, open_stream, place_and_name
from nanochat_jax.data.sources import open_registered_tfds
from nanochat_jax.errors import UserError
from nanochat_jax.files import as_path, staged, telling


@dataclass(frozen=True)
class Lazy[T](Sequence[T]):
    """A sequence whose elements are made when asked for, the same each time."""

    length: int
    get: Callable[[int], T]

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> "Lazy[T]": ...
    def __getitem__(self, index: int | slice) -> "T | Lazy[T]":
        indices = range(self.length)[index]
        if isinstance(indices, int):
            return self.get(indices)
        return Lazy(len(indices), lambda i: self.get(indices[i]))


def concatenate[T](parts: Sequence[Sequence[T]]) -> Sequence[T]:
    """One sequence after the other."""
    ends = [0, *accumulate(len(part) for part in parts)]

    def get(index: int) -> T:
        part = bisect_right(ends, index) - 1
        return parts[part][index - ends[part]]

    return Lazy(ends[-1], get)


def is_held_out(key: str, share: float = 0.1) -> bool:
    """Whether the thing of this name is kept from training: a matter of its name alone, so the same everywhere."""
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


@dataclass(frozen=True)
class Row:
    """One row, and where it lies, for messages."""

    where: str
    values: dict[str, Any]

    def field[V](self, name: str, kind: type[V]) -> V:
        """A field of the row; UserError if it is missing or of another kind."""
        if name not in self.values:
            raise UserError(f"{self.where}: field {name!r} is missing; found {', '.join(self.values) or 'none'}")
        if not isinstance(value := self.values[name], kind) or isinstance(value, bool):
            raise UserError(f"{self.where}: field {name!r} is {type(value).__name__}, not {kind.__name__}")
        return value


def row_conversation(row: Row) -> Conversation:
    """The conversation in the field "messages", whatever the other fields are."""
    messages = row.values.get("messages")
    if isinstance(messages, dict):  # TFDS turns a list of objects into an object of lists
        messages = [dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=True)]
    if isinstance(messages, list):  # a table gives every message every column
        messages = [_without_empty(message) for message in messages]
    return check_conversation({"messages": messages}, row.where)


def _without_empty(value: Any) -> Any:
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def open_rows(spec: str) -> Sequence[Row]:
    """Find the rows that a spec names; they are parsed when asked for.

    Raises:
        UserError: if the spec is unknown, names nothing, cannot be read or, once asked for, is damaged.
    """
    kind, _, argument = spec.partition(":")
    if kind not in KINDS:
        raise UserError(f"unknown rows {spec!r}; kinds are {', '.join(f'{name}:' for name in KINDS)}")
    with telling(f"cannot read {spec}"):
        rows = KINDS[kind](argument)
    if not rows:
        raise UserError(f"{spec} holds no rows")
    return rows


def _jsonl(pattern: str) -> Sequence[Row]:
    return concatenate([_jsonl_file(path) for path in matching_files(pattern)])


def _jsonl_file(path: str) -> Sequence[Row]:
    with open_stream(path) as file:
        content = file.read()
    lines = [(n, line) for n, line in enumerate(content.split(b"\n"), 1) if line.strip()]

    def get(index: int) -> Row:
        number, line = lines[index]
        where = f"{path}, line {number:,}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON in UTF-8: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"{where}: an object was expected, not {type(values).__name__}")
        return Row(where, values)

    return Lazy(len(lines), get)


def _parquet(pattern: str) -> Sequence[Row]:
    return concatenate([_parquet_file(path) for path in matching_files(pattern)])


def _parquet_file(path: str) -> Sequence[Row]:
    try:
        table = pq.read_table(staged(as_path(path)))
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file (truncated?): {error}") from error
    return Lazy(len(table), lambda i: Row(f"{path}, row {i:,}", table.slice(i, 1).to_pylist()[0]))


def _hub(argument: str) -> Sequence[Row]:
    name, pattern = place_and_name("hub", argument, "GLOB")
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(hub.fetch, hub.list_files(name, pattern)))
    return concatenate([(_parquet_file if path.suffix == ".parquet" else _jsonl_file)(str(path)) for path in paths])


def _tfds(argument: str) -> Sequence[Row]:
    import tensorflow_datasets as tfds

    name, split = place_and_name("tfds", argument, "SPLIT")
    is_folder = (Path(name) / "features.json").is_file()
    builder = tfds.builder_from_directory(name) if is_folder else open_registered_tfds(name)
    if split not in builder.info.splits:
        raise UserError(f"tfds set {name}: no split {split!r}; found {', '.join(builder.info.splits)}")
    examples, features = builder.as_data_source(split), builder.info.features
    where = f"{name}#{split}, example"
    return Lazy(len(examples), lambda i: Row(f"{where} {i:,}", _plain(examples[i], features)))


def _plain(value: Any, feature: Any) -> Any:
    """What TFDS gives as plain values: text for bytes, names for classes, lists for arrays."""
    if hasattr(feature, "feature"):  # a sequence; of a dict, TFDS makes a dict of sequences
        inner = feature.feature
        if isinstance(value, dict):
            return {key: [_plain(item, inner[key]) for item in items] for key, items in value.items()}
        return [_plain(item, inner) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, feature[key]) for key, item in value.items()}
    if hasattr(feature, "int2str"):
        return feature.int2str(int(value))
    return value.decode() if isinstance(value, bytes) else value.tolist()


KINDS: dict[str, Callable[[str], Sequence[Row]]] = {"jsonl": _jsonl, "parquet": _parquet, "tfds": _tfds, "hub": _hub}
