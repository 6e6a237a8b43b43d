"""Token records on disk: what a prepared folder holds, and how Grain and TFDS both come to open it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from nanochat_jax.config import from_json, to_json, write_json
from nanochat_jax.errors import UserError
from nanochat_jax.files import read_json, replacing

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Recipe:
    """All that the content of the records depends on."""

    source: str
    corpus: str  # fingerprint of the names and sizes of its parts
    tokenizer_sha256: str
    vocab_size: int
    sequence_len: int
    val_fraction: float
    unit_bytes: int

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.int32)


@dataclass(frozen=True)
class SplitStats:
    """What became of one split; tokens are those of the text, without bos."""

    documents: int
    bytes: int
    tokens: int
    records: int
    dropped_tokens: int


@dataclass(frozen=True)
class UnitStats:
    """What became of one work unit."""

    empty_documents: int
    train: SplitStats
    val: SplitStats
    sha256: str  # of the records


@dataclass(frozen=True)
class Manifest(Recipe):
    """Description of a finished folder: without it, the folder does not count as prepared."""

    units: int
    empty_documents: int
    train: SplitStats
    val: SplitStats
    dropped_share: float  # of the text tokens of the training split
    fingerprint: str  # of all records in order


def load_manifest(folder: Path) -> Manifest:
    """Read the description of a prepared folder.

    Raises:
        UserError: if the folder is missing or its preparation never finished.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        how = "wait for it, or begin with what is ready by --window-units" if begun_path(folder).is_file() else "run it"
        raise UserError(f"{folder} holds no finished records (no manifest.json) of `python -m train.prepare`: {how}")
    return from_json(Manifest, read_json(path), str(path))


def load_recipe(folder: Path) -> tuple[Recipe, int]:
    """What a folder is, or is being, prepared from, and in how many work units.

    Raises:
        UserError: if its preparation has not begun.
    """
    if (folder / "manifest.json").is_file() or not begun_path(folder).is_file():
        values = to_json(load_manifest(folder))
    else:
        values = read_json(begun_path(folder))
    names = [field.name for field in dataclasses.fields(Recipe)]
    return from_json(Recipe, {name: values.get(name) for name in names}, str(folder)), int(values["units"])


def finished_units(folder: Path, first: int) -> list[int]:
    """How many training records each work unit has, from the first on, as far as one after the other is finished."""
    if (folder / "manifest.json").is_file():
        splits = read_json(folder / "dataset_info.json")["splits"]
        return [int(length) for length in next(s for s in splits if s["name"] == "train")["shardLengths"][first:]]
    counts: list[int] = []
    while (path := unit_stats_path(folder, first + len(counts))).is_file():
        try:
            counts.append(from_json(UnitStats, read_json(path), str(path)).train.records)
        except UserError:  # the last unit is finished too, and these files are being removed
            break
    return counts


def begun_path(folder: Path) -> Path:
    """Where a preparation that has begun leaves its recipe and the number of its units, until it is finished."""
    return folder / ".work" / "recipe.json"


def unit_stats_path(folder: Path, unit: int) -> Path:
    """Where a finished unit leaves its UnitStats, until all are: the sign that its shards are whole."""
    return folder / ".work" / f"{unit:05d}.json"


def shard_path(folder: Path, split: str, unit: int, units: int) -> Path:
    """Name of a shard, in the form TFDS expects of a set called "records"."""
    return folder / f"records-{split}.array_record-{unit:05d}-of-{units:05d}"


@contextlib.contextmanager
def writing_shard(path: Path) -> Iterator[Callable[[bytes], None]]:
    """What appends a record to an ArrayRecord file, which appears when the block ends well.

    Groups of one record make random access cheap.
    """
    try:
        with replacing(path) as temporary:
            writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
            try:
                yield lambda record: writer.write(encode_example(record))
            finally:
                writer.close()
    except RuntimeError as error:  # how ArrayRecord reports a full disk
        raise UserError(f"cannot write {path}: {error}; free some space and run the same command again") from error


def encode_example(payload: bytes) -> bytes:
    """A tf.train.Example whose only feature, "tokens", is one byte string; the payload comes last.

    Source: protobuf's wire format; Example.features.feature["tokens"].bytes_list.value[0].
    """

    def field(number: int, content: bytes) -> bytes:
        size, varint = len(content), bytearray()
        while size > 127:
            varint.append(size & 127 | 128)
            size >>= 7
        return bytes([number << 3 | 2, *varint, size]) + content

    feature = field(1, field(1, payload))
    return field(1, field(1, field(1, b"tokens") + field(2, feature)))


def decode_example(example: bytes, payload_bytes: int) -> bytes:
    """The payload of `encode_example`."""
    return example[-payload_bytes:]


def write_tfds_description(folder: Path, recipe: Recipe, shard_lengths: dict[str, list[int]]) -> None:
    """Write features.json and dataset_info.json, with which `tfds.builder_from_directory(folder)` works."""
    record_len = recipe.sequence_len + 1
    package = "tensorflow_datasets.core.features"
    tokens = {
        "pythonClassName": f"{package}.tensor_feature.Tensor",
        "tensor": {"dtype": str(recipe.dtype), "encoding": "bytes", "shape": {"dimensions": [str(record_len)]}},
    }
    features = {
        "pythonClassName": f"{package}.features_dict.FeaturesDict",
        "featuresDict": {"features": {"tokens": tokens}},
    }
    splits = [
        {
            "name": split,
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "numBytes": str(sum(lengths) * record_len * recipe.dtype.itemsize),
            "shardLengths": [str(length) for length in lengths],
        }
        for split, lengths in shard_lengths.items()
    ]
    info = {"name": "records", "version": "1.0.0", "fileFormat": "array_record", "splits": splits}
    write_json(folder / "features.json", features)
    write_json(folder / "dataset_info.json", info)
