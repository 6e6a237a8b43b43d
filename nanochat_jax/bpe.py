"""Byte-pair encodings of other programs, applied by tiktoken: GPT-2's files and nanochat's pickled tokenizers."""

import base64
import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiktoken

from nanochat_jax.errors import UserError
from nanochat_jax.tokenizer import CONTROL_TOKENS, Tokenizer, check_encodable

# As tiktoken writes it: possessive, so that long runs do not exhaust the stack. Source: tiktoken_ext/openai_public.py
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
GPT2_BOS = "<|endoftext|>"


class TiktokenTokenizer(Tokenizer):
    """Byte-pair encoding by ranks: the id of a token is its rank, and lower ranks are merged first.

    Args:
        pattern: regular expression that splits a text before merging.
        tokens: the bytes of each token, by rank.
        special: ids of further tokens by name, right behind the others; control tokens are those of them that
            CONTROL_TOKENS names (nanochat has no system tokens), and GPT-2's <|endoftext|>, which serves as <|bos|>.
    """

    kind = "tiktoken"

    def __init__(self, pattern: str, tokens: tuple[bytes, ...], special: Mapping[str, int]) -> None:
        if sorted(special.values()) != list(range(len(tokens), len(tokens) + len(special))):
            raise UserError(f"the special tokens' ids do not follow the {len(tokens):,} others without a gap")
        names = {"<|bos|>" if name == GPT2_BOS else name: i for name, i in special.items()}
        if "<|bos|>" not in names:
            raise UserError(f"the tokenizer has neither <|bos|> nor {GPT2_BOS}, one of which must begin documents")
        self.control = {name: names[name] for name in CONTROL_TOKENS if name in names}
        self.pieces = tokens + (b"",) * len(special)
        self._pattern, self._tokens, self._special = pattern, tokens, dict(special)
        try:
            self._encoding = tiktoken.Encoding(
                self.kind,
                pat_str=pattern,
                mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
                special_tokens=self._special,
            )
        except ValueError as error:
            raise UserError(f"the tokenizer's split pattern or tokens are unusable: {error}") from error

    def encode(self, text: str) -> list[int]:
        check_encodable(text)
        return self._encoding.encode_ordinary(text)

    def to_bytes(self) -> bytes:
        tokens = [base64.b64encode(token).decode() for token in self._tokens]
        return json.dumps(
            {"kind": self.kind, "pattern": self._pattern, "special": self._special, "tokens": tokens}
        ).encode()

    def to_pickle(self) -> bytes:
        """The tokenizer as nanochat stores it: a pickled tiktoken.Encoding."""
        return pickle.dumps(self._encoding)

    @classmethod
    def from_bytes(cls, data: bytes) -> "TiktokenTokenizer":
        values = json.loads(data)
        try:
            tokens = tuple(base64.b64decode(token, validate=True) for token in values["tokens"])
            return cls(values["pattern"], tokens, values["special"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the tiktoken tokenizer is damaged: {type(error).__name__}: {error}") from error


def from_ranks(pattern: str, ranks: Mapping[bytes, int], special: Mapping[str, int]) -> TiktokenTokenizer:
    """A tokenizer from tiktoken's own description of one.

    Raises:
        UserError: if a rank is missing, or one of the 256 bytes has no token.
    """
    tokens = tuple(sorted(ranks, key=ranks.__getitem__))
    if [ranks[token] for token in tokens] != list(range(len(tokens))):
        raise UserError(f"the ranks of the {len(tokens):,} tokens are not 0 to {len(tokens) - 1:,}")
    if missing := {bytes([byte]) for byte in range(256)} - set(tokens):
        raise UserError(f"no token for the byte 0x{min(missing).hex()}: not every text could be written")
    return TiktokenTokenizer(pattern, tokens, special)


# GPT-2's files


def from_gpt2_files(vocab: Path, merges: Path) -> TiktokenTokenizer:
    """GPT-2's tokenizer from vocab.json and merges.txt; the control tokens other than <|bos|> get new ids behind it.

    Raises:
        UserError: if a file is missing or damaged, or the two do not belong together.
    """
    try:
        ids: dict[str, int] = json.loads(vocab.read_text("utf-8"))
        lines = merges.read_text("utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{vocab} or {merges} is damaged: {error}") from error
    byte_of = _byte_of_character()
    # Merged last first: the order of ids must be that of the merges, which tiktoken takes for priority.
    characters = sorted((c for c in byte_of if c in ids), key=ids.__getitem__)
    merged = [line.replace(" ", "") for line in lines if line and not line.startswith("#version")]
    expected = [*characters, *merged, GPT2_BOS]
    for i, token in enumerate(expected):
        if ids.get(token) != i:
            raise UserError(f"{vocab}: token {token!r} has id {ids.get(token)}; by {merges} it should be {i}")
    if len(ids) != len(expected):
        raise UserError(f"{vocab} has {len(ids):,} tokens, {merges} makes {len(expected):,}")
    ranks = {bytes(byte_of[c] for c in token): i for i, token in enumerate(expected[:-1])}
    rest = [name for name in CONTROL_TOKENS if name != "<|bos|>"]
    return from_ranks(GPT2_PATTERN, ranks, {name: len(ranks) + i for i, name in enumerate([GPT2_BOS, *rest])})


def _byte_of_character() -> dict[str, int]:
    """GPT-2's files write bytes that are no visible Latin-1 character as U+0100, U+0101, …"""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


# nanochat's pickle


class _State:
    """Stands for tiktoken.core.Encoding while a pickle is read: keeps what it is given, does nothing."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    """Builds plain values only: the one class that a pickle may name is replaced by an inert one."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return type("Encoding", (_State,), {})
        raise UserError(f"it asks for {module}.{name}, which no tokenizer needs; nothing of it was run")


def from_pickle(path: Path) -> TiktokenTokenizer:
    """Read nanochat's tokenizer.pkl, a pickled tiktoken.Encoding, without running anything that it holds.

    Raises:
        UserError: if the file is missing, truncated, or holds anything else.
    """
    try:
        state = _Reader(io.BytesIO(path.read_bytes())).load().state
        pattern, ranks, special = state["pat_str"], state["mergeable_ranks"], state["special_tokens"]
        _check_types(pattern, ranks, special)
        return from_ranks(pattern, ranks, special)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(f"{path} is no pickled tokenizer of nanochat, or damaged ({type(error).__name__})") from error


def _check_types(pattern: Any, ranks: Any, special: Any) -> None:
    def is_table(table: Any, key: type) -> bool:
        return type(table) is dict and all(type(k) is key and type(v) is int for k, v in table.items())

    if not (type(pattern) is str and is_table(ranks, bytes) and is_table(special, str)):
        raise UserError("its pattern, merges or special tokens are not of the types that tiktoken has")
