"""Learn a vocabulary from text: SentencePiece byte-pair encoding that gives every text back byte for byte.

    python -m train.tokenizer --source sotu --vocab-size 4096 --out runs/demo/tokenizer/tokenizer.model

A larger vocabulary makes fewer tokens of the same text, but its tables cost parameters: 4,096 suits a model of a few
million parameters, 32,768 one of a hundred million and more. Documents held out for validation (as train.prepare
holds them out, given the same --val-fraction and --unit-bytes) are not trained on; how well they compress is
reported. Beside the tokenizer lie its configuration (.config.json) and that report (.report.json). Everything
downstream knows the tokenizer by its sha256: records and models made with one cannot be used with another.

With --kind char every character of the text is a token, as in nanoGPT's quick start.
"""

import random
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from nanochat_jax import tokenizer as tokenizers
from nanochat_jax.char import CharTokenizer
from nanochat_jax.config import to_json, write_json
from nanochat_jax.data.prepare import has_few_documents, split_document
from nanochat_jax.data.sources import UNIT_BYTES, Source, open_sources
from nanochat_jax.errors import UserError
from nanochat_jax.files import read_json
from train import cli

MAX_REPORT_BYTES = 10_000_000
MIN_KEEP = 1 / 8  # a sample is spread over at most this many times its size, so as not to read a whole large corpus


@dataclass(frozen=True)
class Config:
    source: str = "sotu"
    """Corpus as in train.prepare: sotu, chitchat, text:GLOB, jsonl:GLOB#field, hub:OWNER/NAME#column, …; several with
    weights, such as hub:…*3,text:…*1, give that share of max-bytes each."""
    vocab_size: int = 4096
    """Tokens in all, 11 control tokens, 256 bytes and the unknown token included."""
    out: Path = Path("runs/demo/tokenizer/tokenizer.model")
    """File for the tokenizer."""
    kind: Literal["sentencepiece", "char"] = "sentencepiece"
    """sentencepiece learns vocab-size tokens; char takes the characters that occur, and needs no size."""
    max_bytes: int = 200_000_000
    """Text to train on at most; documents are sampled from a larger corpus. All of it is held in memory."""
    seed: int = 0
    """Of the sampling."""
    val_fraction: float = 0.05
    """Share of documents held out, as in train.prepare."""
    unit_bytes: int = UNIT_BYTES
    """As in train.prepare: pieces of long text files are held out or not as they are cut."""
    character_coverage: float = 1.0
    """Share of the text whose characters become tokens, the rest being spelt in bytes; 0.9995 suits web text."""


def main(config: Config) -> tokenizers.Tokenizer:
    """Train, save and report; or open what the same configuration made before."""
    if config.max_bytes < 1 or not 0 < config.val_fraction < 1:
        raise UserError(
            f"max-bytes={config.max_bytes} must be positive, val-fraction={config.val_fraction} between 0 and 1"
        )
    sources = open_sources(config.source, config.unit_bytes)
    recipe = to_json(config) | {"corpus": ",".join(source.fingerprint for source, _ in sources)}
    del recipe["out"]
    config_path, report_path = config.out.with_suffix(".config.json"), config.out.with_suffix(".report.json")
    if config.out.exists():
        if not config_path.exists() or read_json(config_path) != recipe:
            raise UserError(f"{config.out} exists and was made otherwise: delete it, or choose another --out")
        print(f"{config.out} is there already, made by the same configuration")
        return tokenizers.load(config.out)

    started = time.perf_counter()
    held_out: list[str] = []
    budgets = [round(config.max_bytes * weight / sum(w for _, w in sources)) for _, weight in sources]
    sample = chain.from_iterable(
        _sample(source, budget, config, held_out) for (source, _), budget in zip(sources, budgets, strict=True)
    )
    if config.kind == "char":
        deque(sample, maxlen=0)  # for what it holds out; an alphabet must be whole, so all documents give theirs
        everything = (
            text for source, _ in sources for unit in range(len(source.units)) for text in source.documents(unit)
        )
        tokenizer: tokenizers.Tokenizer = CharTokenizer.train(everything)
    else:
        tokenizer = tokenizers.train(sample, config.vocab_size, character_coverage=config.character_coverage)
    seconds = time.perf_counter() - started
    report = {"sha256": tokenizer.sha256, "training_seconds": round(seconds, 1), **_compression(tokenizer, held_out)}
    write_json(config_path, recipe)
    write_json(report_path, report)
    tokenizer.save(config.out)  # last: its presence says that all is there
    print(f"{config.out}: {tokenizer.vocab_size:,} tokens, learnt in {seconds:.1f} s, sha256 {tokenizer.sha256}")
    print(
        f"held-out text: {report['documents']:,} documents, {report['bytes']:,} bytes, {report['tokens']:,} tokens, "
        f"{report['bytes_per_token']:.3f} bytes per token, encoded at {report['megabytes_per_second']:.1f} MB/s"
    )
    return tokenizer


def _sample(source: Source, max_bytes: int, config: Config, held_out: list[str]) -> Iterator[str]:
    """Documents of one source to train on; those passed on the way that are held out go to `held_out`."""
    few = has_few_documents(source)
    units = list(range(len(source.units)))
    rng = random.Random(config.seed)
    rng.shuffle(units)
    keep = max(MIN_KEEP, max_bytes / sum(map(source.size_bytes, units)))
    room, held_out_room = max_bytes, MAX_REPORT_BYTES
    for text in (text for unit in units for text in source.documents(unit)):
        part, held = split_document(text, few_documents=few, val_fraction=config.val_fraction)
        if held and held_out_room > 0:
            held_out.append(held)
            held_out_room -= len(held.encode())
        if part and rng.random() < keep:
            yield part
            room -= len(part.encode())
            if room <= 0:
                return


def _compression(tokenizer: tokenizers.Tokenizer, documents: list[str]) -> dict[str, Any]:
    started = time.perf_counter()
    tokens = sum(len(tokenizer.encode(document)) for document in documents)
    seconds = time.perf_counter() - started
    size = sum(len(document.encode()) for document in documents)
    return {
        "documents": len(documents),
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": size / max(1, tokens),
        "megabytes_per_second": size / 1e6 / max(seconds, 1e-9),
    }


if __name__ == "__main__":
    cli.run(main, Config)
