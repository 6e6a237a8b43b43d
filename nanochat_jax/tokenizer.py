"""Text to token ids and back, losslessly: SentencePiece byte-pair encoding, and a door for other kinds."""

import hashlib
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import batched
from pathlib import Path

import numpy as np
import sentencepiece

from nanochat_jax.errors import UserError
from nanochat_jax.files import as_path, telling, write_bytes

CONTROL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
    "<|system_start|>",
    "<|system_end|>",
)

_SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character, so a literal one must never reach it
_UNKNOWN_MARK = "\u2585"  # a sentence that holds this one is left out of training without a word
_DELIMITER = "\ue000"  # between pre-tokens: private use, so that real text hardly ever holds it

# The GPT-4 split with numbers in groups of one or two digits, in the words of `re` ([^\W\d_] are letters).
# Runs are bounded because SentencePiece silently skips a training sentence longer than its limit.
_SPLIT = re.compile(
    r"'(?i:[sdmt]|ll|ve|re)"
    r"|(?:_|[^\w\r\n])?+[^\W\d_]{1,64}+"
    r"|\d{1,2}"
    r"| ?(?:_|[^\w\s]){1,64}+[\r\n]{0,64}"
    r"|\s{0,64}[\r\n]"
    r"|\s{1,64}(?!\S)"
    r"|\s{1,64}"
)
_CUT = re.compile(r"[^\W\d_](?=\s)")
_SEGMENT_CHARACTERS = 1 << 12
_MAX_SEGMENT_CHARACTERS = 1 << 20
_MAX_SENTENCE_BYTES = 1 << 22
_PRETOKENS_PER_SENTENCE = 1 << 12  # at most 130 characters of 4 bytes each, and a delimiter: below the limit


class Tokenizer(ABC):
    """What the rest of the program knows of a tokenizer, whatever its kind.

    Attributes:
        kind: name of the kind, as in KINDS.
        control: id of each control token by name; encode never yields one of these ids.
        pieces: the bytes each token stands for, empty for control tokens; its length is the vocabulary size.
    """

    kind: str
    control: Mapping[str, int]
    pieces: tuple[bytes, ...]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text, none of them a control token; UserError for a lone surrogate."""

    def segments(self, text: str) -> Iterable[str]:
        """A text cut where it makes no difference to the ids; pieces are short where that saves time or memory."""
        return (text,)

    def encode_array(self, text: str, dtype: np.dtype) -> np.ndarray:
        """Token ids of a text, (length,); takes little more memory than text and ids do, however long it is."""
        return np.concatenate([np.array(self.encode(segment), dtype) for segment in self.segments(text)])

    @abstractmethod
    def to_bytes(self) -> bytes:
        """The tokenizer as `from_bytes` reads it."""

    @property
    def vocab_size(self) -> int:
        """Tokens there are, control tokens included."""
        return len(self.pieces)

    @property
    def bos(self) -> int:
        """Id of the token that every document begins with."""
        return self.control["<|bos|>"]

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """Bytes each token stands for, int32 (V,); 0 for control tokens, which bits per byte leaves out."""
        return np.array([len(piece) for piece in self.pieces], np.int32)

    @cached_property
    def sha256(self) -> str:
        """What identifies this tokenizer in records and checkpoints."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """What the ids stand for, which need not be whole UTF-8; control tokens stand for nothing."""
        return b"".join(self.pieces[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 (a model may emit any) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, path: Path) -> None:
        """Write the file that `load` reads."""
        write_bytes(path, self.to_bytes())


def check_encodable(text: str) -> None:
    """UserError if a text holds a lone surrogate, the one thing that Python's strings can and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"character {error.start} of the text is the lone surrogate U+{ord(text[error.start]):04X}, which "
            "has no UTF-8 form; was the text decoded with errors='surrogateescape'?"
        ) from error


class SentencePieceTokenizer(Tokenizer):
    """Byte-pair encoding with byte fallback; ids are unknown (never emitted), control tokens, bytes, pieces."""

    kind = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = _load_processor(model)
        names = [self._processor.id_to_piece(i) for i in range(self._processor.vocab_size())]
        self.control = {name: names.index(name) for name in CONTROL_TOKENS}
        self.pieces = tuple(self._piece_bytes(i, name) for i, name in enumerate(names))
        self._spans_words = any(_CUT.search(piece.decode(errors="replace")) for piece in self.pieces)
        self._space_mark_ids = [names.index(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]

    def _piece_bytes(self, token: int, name: str) -> bytes:
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        if self._processor.is_byte(token):
            return bytes([int(name[3:-1], 16)])
        return name.replace(_SPACE_MARK, " ").encode()

    def encode(self, text: str) -> list[int]:
        check_encodable(text)
        ids = []
        for segment in self.segments(text):
            first, *rest = segment.split(_SPACE_MARK)
            ids += self._processor.encode(first)
            for part in rest:
                ids += self._space_mark_ids
                ids += self._processor.encode(part)
        return ids

    def segments(self, text: str) -> Iterator[str]:
        """Stretches of some thousand characters: SentencePiece takes three times as long for a byte of a long text.

        The cuts lie between a letter and white space, which no token spans; a million characters without such a place
        are cut anywhere.
        """
        begin = 0
        while len(text) - begin > _SEGMENT_CHARACTERS and not self._spans_words:
            cut = _CUT.search(text, begin + _SEGMENT_CHARACTERS, begin + _MAX_SEGMENT_CHARACTERS)
            end = cut.end() if cut else begin + _MAX_SEGMENT_CHARACTERS
            yield text[begin:end]
            begin = end
        yield text[begin:]

    def to_bytes(self) -> bytes:
        return self._model


def _load_processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model or b"empty")
    except RuntimeError as error:
        raise UserError(f"these {len(model):,} bytes are not a SentencePiece model") from error
    for name in (*CONTROL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))):
        if processor.piece_to_id(name) == processor.unk_id():
            raise UserError(f"the SentencePiece model has no token {name}: train one with `python -m train.tokenizer`")
    return processor


def _open_char(data: bytes) -> Tokenizer:
    from nanochat_jax.char import CharTokenizer

    return CharTokenizer.from_bytes(data)


def _open_tiktoken(data: bytes) -> Tokenizer:
    from nanochat_jax.bpe import TiktokenTokenizer

    return TiktokenTokenizer.from_bytes(data)


KINDS: dict[str, Callable[[bytes], Tokenizer]]
KINDS = {SentencePieceTokenizer.kind: SentencePieceTokenizer, "char": _open_char, "tiktoken": _open_tiktoken}


def from_bytes(data: bytes) -> Tokenizer:
    """Open a serialised tokenizer: a SentencePiece model, or a JSON object that names its kind; else UserError."""
    kind = SentencePieceTokenizer.kind
    if data.startswith(b"{"):
        try:
            kind = json.loads(data)["kind"]
        except (ValueError, KeyError) as error:
            raise UserError('the tokenizer is a JSON file without a "kind"') from error
    if kind not in KINDS:
        raise UserError(f"unknown kind of tokenizer {kind!r}; known: {', '.join(KINDS)}")
    return KINDS[kind](data)


def load(path: Path) -> Tokenizer:
    """Open a tokenizer file, on disk or in a bucket; UserError if it is missing, unreadable or not a tokenizer."""
    with telling(f"cannot read tokenizer {path}", "; make one with `train.tokenizer`"):
        data = as_path(path).read_bytes()
    try:
        return from_bytes(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def train(documents: Iterable[str], vocab_size: int, *, character_coverage: float = 1.0) -> SentencePieceTokenizer:
    """Learn a vocabulary; the same documents in the same order give the same bytes.

    Args:
        documents: whole texts; how they are split before merging is decided here.
        vocab_size: tokens in all, the 11 control tokens, 256 bytes and the unknown token included.
        character_coverage: share of the text whose characters get tokens of their own; the others are spelt in
            bytes. Lower it a little (0.9995) for web text, whose thousands of rare characters eat the vocabulary.

    Raises:
        UserError: if there is no text, or too little or too varied text for this vocabulary size.
    """
    if vocab_size < 1 or not 0.98 <= character_coverage <= 1:
        raise UserError(
            f"vocab-size={vocab_size} must be positive, character-coverage={character_coverage} from 0.98 to 1"
        )
    failures: list[Exception] = []
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(documents, failures),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            control_symbols=list(CONTROL_TOKENS),  # user_defined_symbols would match inside user text
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            byte_fallback=True,
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            pretokenization_delimiter=_DELIMITER,
            split_by_unicode_script=False,  # the split pattern decides alone
            split_by_number=False,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            num_threads=1,  # the model records this number: fixed, so that the bytes do not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise failures[0] if failures else _explain(error, vocab_size) from error
    return SentencePieceTokenizer(model.getvalue())


def _sentences(documents: Iterable[str], failures: list[Exception]) -> Iterator[str]:
    """Pre-tokens joined by the delimiter; an exception is kept, because SentencePiece hides its type."""
    try:
        for document in documents:
            text = document.replace(_SPACE_MARK, _DELIMITER).replace(_UNKNOWN_MARK, _DELIMITER)
            pretokens = (match[0] for match in _SPLIT.finditer(text))
            for sentence in batched(pretokens, _PRETOKENS_PER_SENTENCE):
                yield _DELIMITER.join(sentence)
    except Exception as error:
        failures.append(error)
        raise


def _explain(error: RuntimeError, vocab_size: int) -> Exception:
    message = str(error)
    if limit := re.search(r"value <= (\d+)", message):
        return UserError(
            f"vocab-size={vocab_size:,} is more than this text supports: at most {int(limit[1]):,}; "
            "choose a smaller vocabulary or give more text"
        )
    if limit := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"vocab-size={vocab_size:,} is too small: control tokens, bytes and the characters of this text "
            f"need at least {int(limit[1]):,}"
        )
    if "sentences_.empty()" in message:
        return UserError("there is no text to train the tokenizer on: the corpus is empty")
    return error
