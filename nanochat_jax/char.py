"""A token a character: nanoGPT's quick start, on any text."""

import json
from collections.abc import Iterable, Iterator

from nanochat_jax.errors import UserError
from nanochat_jax.tokenizer import CONTROL_TOKENS, Tokenizer, check_encodable


class CharTokenizer(Tokenizer):
    """Ids are the control tokens, then the characters in the order of their code points."""

    kind = "char"

    def __init__(self, characters: Iterable[str]) -> None:
        self._characters = "".join(sorted(set(characters)))
        if not self._characters:
            raise UserError("there is no text to take characters from: the corpus is empty")
        check_encodable(self._characters)
        self.control = {name: i for i, name in enumerate(CONTROL_TOKENS)}
        self.pieces = (b"",) * len(CONTROL_TOKENS) + tuple(c.encode() for c in self._characters)
        self._ids = {c: i for i, c in enumerate(self._characters, len(CONTROL_TOKENS))}

    @classmethod
    def train(cls, documents: Iterable[str]) -> "CharTokenizer":
        """A tokenizer that knows every character of these documents."""
        characters: set[str] = set()
        for document in documents:
            characters.update(document)
        return cls(characters)

    @classmethod
    def from_bytes(cls, data: bytes) -> "CharTokenizer":
        characters = json.loads(data).get("characters")
        if not isinstance(characters, str):
            raise UserError('the character tokenizer has no "characters"')
        return cls(characters)

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise UserError(
                f"character {text.index(character)} of the text is {character!r} (U+{ord(character):04X}), which was "
                f"not in the text that this tokenizer's {len(self._characters)} characters were taken from; remove "
                "it, or make a tokenizer from text that has it"
            ) from error

    def segments(self, text: str) -> Iterator[str]:
        size = 1 << 16  # every cut is one between tokens
        return (text[begin : begin + size] for begin in range(0, max(1, len(text)), size))

    def to_bytes(self) -> bytes:
        return json.dumps({"kind": self.kind, "characters": self._characters}).encode()
