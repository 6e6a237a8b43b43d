"""Files of text, of any size, as documents: plain text, JSON lines, Parquet and ArrayRecord, on disk or in a bucket.

Text and JSON lines may be compressed (.gz, .bz2, .zst, .xz). Each format has a function that cuts files into chunks,
and returns what reads one. Reading holds one document and a small buffer in memory, however large the file is.
"""

import glob
import io
import json
import lzma
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePath
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_jax.errors import UserError
from nanochat_jax.files import as_path, is_remote, staged, telling

WHOLE = sys.maxsize  # as the end of a chunk: the end of the file
BATCH_BYTES = 4 << 20
_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_SLICE = re.compile(r"(.*)\[(\d*):(\d*)\]")


@dataclass(frozen=True)
class Chunk:
    """A stretch of one file; what start and stop count (bytes, row groups, examples) is up to the format."""

    path: str
    start: int
    stop: int
    size_bytes: int  # of text, where the format knows it, else as stored


type Reader = Callable[[Chunk], Iterator[str]]


def ranges(path: str, count: int, size_bytes: int, unit_bytes: int) -> list[Chunk]:
    """Equal stretches of `count` things that weigh `size_bytes` together, none much over a unit."""
    parts = min(max(1, math.ceil(size_bytes / unit_bytes)), max(1, count))
    bounds = [count * i // parts for i in range(parts + 1)]
    return [Chunk(path, a, b, size_bytes * (b - a) // max(1, count)) for a, b in pairwise(bounds)]


def sliced[T](pattern: str, match: Callable[[str], list[T]]) -> list[T]:
    """What matches a pattern, or of PATTERN[START:STOP] that slice of it.

    Raises:
        UserError: nothing matches, or less than the slice asks for.
    """
    if not (parts := _SLICE.fullmatch(pattern)):
        found = match(pattern)
    else:
        start, stop = (int(text) if text else None for text in parts.groups()[1:])
        everything = match(parts[1])
        if stop is not None and stop > len(everything):
            raise UserError(f"{pattern!r} asks for file number {stop:,}, and there are {len(everything):,}")
        found = everything[start:stop]
    if not found:
        raise UserError(f"no file matches {pattern!r} (looked from {Path.cwd()})")
    return found


def matching_files(pattern: str) -> list[str]:
    """Files that match, in order of name; PATTERN[:100] takes the first hundred of them."""
    return sliced(pattern, lambda place: sorted(_remote_files(place) if is_remote(place) else _local_files(place)))


def _local_files(pattern: str) -> list[str]:
    path = str(Path(pattern).expanduser())
    found = [path] if Path(path).is_file() else glob.glob(path, recursive=True)  # a name may hold brackets
    return [path for path in found if Path(path).is_file()]


def _remote_files(pattern: str) -> list[str]:
    parts = PurePath(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    root = as_path(PurePath(*parts[:fixed]))
    try:
        with telling(f"cannot list {root}"):
            return [str(path) for path in root.glob("/".join(parts[fixed:])) if not str(path).endswith("/")]
    except NotImplementedError as error:  # of **, which would list whole buckets
        raise UserError(f"{pattern!r}: {error}") from error


def stored_bytes(path: str) -> int:
    stat: Any = as_path(path).stat()
    return int(stat.length if is_remote(path) else stat.st_size)


def place_and_name(kind: str, argument: str, what: str) -> tuple[str, str]:
    place, mark, name = argument.rpartition("#")
    if not (mark and place and name):
        raise UserError(f"source '{kind}:{argument}' must say where the text lies: {kind}:WHERE#{what}")
    return place, name


def is_compressed(path: str) -> bool:
    return PurePath(path).suffix in (*_CODECS, ".xz")


def open_stream(path: str) -> IO[bytes]:
    """The bytes of a file, decompressed."""
    file, suffix = as_path(path).open("rb"), PurePath(path).suffix
    if suffix == ".xz":
        return cast(IO[bytes], lzma.open(file))
    if suffix in _CODECS:
        stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), _CODECS[suffix])
        return io.BufferedReader(cast(io.RawIOBase, stream), 1 << 20)
    return file


def _lines(chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) of the lines that begin inside a byte range."""
    with open_stream(chunk.path) as file:
        offset = chunk.start
        if offset:
            file.seek(offset - 1)
            offset += len(file.readline()) - 1
        while offset < chunk.stop and (line := file.readline()):
            yield offset, line
            offset += len(line)


def _line_chunks(pattern: str, unit_bytes: int) -> list[Chunk]:
    sizes = {path: stored_bytes(path) for path in matching_files(pattern)}
    whole = {path: [Chunk(path, 0, WHOLE, size)] for path, size in sizes.items() if is_compressed(path)}
    return [chunk for path, size in sizes.items() for chunk in whole.get(path) or ranges(path, size, size, unit_bytes)]


def text(argument: str, unit_bytes: int, clean: Callable[[str], str] = str) -> tuple[list[Chunk], Reader]:
    """Each file a document; a longer one several, of about a unit, cut at line ends."""
    return _line_chunks(argument, unit_bytes), partial(_read_text, most=unit_bytes, clean=clean)


def _read_text(chunk: Chunk, most: int, clean: Callable[[str], str]) -> Iterator[str]:
    lines: list[bytes] = []
    begin = size = 0

    def document() -> str:
        try:
            return clean(b"".join(lines).decode())
        except UnicodeDecodeError as error:
            at = begin + error.start
            message = f"{chunk.path}: byte {at:,} is not UTF-8; convert the file, for instance with iconv"
            raise UserError(message) from error

    for offset, line in _lines(chunk):
        if chunk.stop == WHOLE and lines and size + len(line) > most:
            yield document()
            lines, size = [], 0
        begin = begin if lines else offset
        lines.append(line)
        size += len(line)
    if lines or not chunk.start:  # without: one line that began earlier fills the whole range
        yield document()


def jsonl(argument: str, unit_bytes: int) -> tuple[list[Chunk], Reader]:
    """Each line an object, whose field is a document."""
    place, field = place_and_name("jsonl", argument, "field")
    return _line_chunks(place, unit_bytes), partial(read_jsonl, field=field)


def read_jsonl(chunk: Chunk, field: str) -> Iterator[str]:
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
    with open_stream(path) as file:
        return sum(file.read(min(1 << 20, stop - at)).count(b"\n") for at in range(0, stop, 1 << 20))


def parquet(argument: str, unit_bytes: int) -> tuple[list[Chunk], Reader]:
    """Each row a document; a chunk is a row group."""
    place, column = place_and_name("parquet", argument, "column")
    chunks = []
    for path in matching_files(place):
        with _open_parquet(path, column) as file:
            chunks += [Chunk(path, i, i + 1, _column_bytes(file, i, column)) for i in range(file.num_row_groups)]
    return chunks, partial(read_parquet, column=column)


def _open_parquet(path: str, column: str) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(
            as_path(path).open("rb") if is_remote(path) else path,
            buffer_size=1 << 20,  # otherwise a row group is read whole
            page_checksum_verification=True,
        )
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a readable parquet file (truncated?): {error}") from error
    schema = file.schema_arrow
    if column not in schema.names:
        raise UserError(f"{path}: no column {column!r}; found {', '.join(schema.names)}")
    if not (pa.types.is_string(kind := schema.field(column).type) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: column {column!r} holds {kind}, not text")
    return file


def _column_bytes(file: pq.ParquetFile, row_group: int, column: str) -> int:
    group = file.metadata.row_group(row_group)
    leaves = (group.column(leaf) for leaf in range(group.num_columns))
    return {leaf.path_in_schema: leaf.total_uncompressed_size for leaf in leaves}[column]


def read_parquet(chunk: Chunk, column: str) -> Iterator[str]:
    with _open_parquet(chunk.path, column) as file:
        row = sum(file.metadata.row_group(i).num_rows for i in range(chunk.start))
        for group in range(chunk.start, min(chunk.stop, file.num_row_groups)):
            mean_bytes = _column_bytes(file, group, column) / max(1, file.metadata.row_group(group).num_rows)
            rows = min(1024, max(1, int(BATCH_BYTES / max(1, mean_bytes))))
            try:
                for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=[column]):
                    for value in batch.column(0):
                        yield value.as_py() or ""
                        row += 1
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise UserError(f"{chunk.path}, row {row:,} (row group {group}): {error}") from error


def array_record(argument: str, unit_bytes: int) -> tuple[list[Chunk], Reader]:
    """Each record a document in UTF-8, or with #FEATURE a tf.train.Example that holds one."""
    place, _, feature = argument.partition("#")
    chunks = []
    for path in matching_files(place):
        size = stored_bytes(path)
        if is_remote(path):  # copied when its turn comes, and not to count what is in it
            chunks.append(Chunk(path, 0, WHOLE, size))
        else:
            chunks += ranges(path, _open_array_record(path).num_records(), size, unit_bytes)
    return chunks, partial(_read_array_record, feature=feature)


def _open_array_record(path: str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(staged(as_path(path))))  # its own I/O knows no buckets
    if not reader.num_records() and stored_bytes(path):  # how it takes a file without an end
        raise UserError(f"{path}: not a readable ArrayRecord file (truncated?)")
    return reader


def _read_array_record(chunk: Chunk, feature: str) -> Iterator[str]:
    reader = _open_array_record(chunk.path)
    parse = _example_parser(feature) if feature else bytes
    for i in range(chunk.start, min(chunk.stop, reader.num_records())):
        where = f"{chunk.path}, record {i:,}"
        try:
            yield parse(reader.read([i])[0]).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8; name the FEATURE of a tf.train.Example with #FEATURE") from error
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            raise UserError(f"{where}: {error}") from error


def _example_parser(feature: str) -> Callable[[bytes], bytes]:
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({feature: tfds.features.Text()})

    def parse(example: bytes) -> bytes:
        found = features.deserialize_example_np(example)[feature]
        if not isinstance(found, bytes):
            raise ValueError(f"no text feature {feature!r}")
        return found

    return parse
