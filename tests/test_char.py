"""The character tokenizer behind the contract of all tokenizers."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax import tokenizer
from nanochat_jax.char import CharTokenizer
from nanochat_jax.errors import UserError
from nanochat_jax.tokenizer import CONTROL_TOKENS

DOCUMENTS = ["To be,\nor not", " to be: <|bos|> é€😀"]


@pytest.fixture
def tok():
    return CharTokenizer.train(DOCUMENTS)


def test_knows_exactly_the_characters_of_the_text(tok):
    assert tok.vocab_size == len(CONTROL_TOKENS) + len(set("".join(DOCUMENTS)))
    for document in DOCUMENTS:
        ids = tok.encode(document)
        assert len(ids) == len(document)
        assert tok.decode(ids) == document


def test_control_tokens_cannot_be_written(tok):
    assert set(tok.control) == set(CONTROL_TOKENS)
    assert tok.bos == tok.control["<|bos|>"]
    assert not set(tok.encode("<|bos|>")) & set(tok.control.values())
    assert tok.decode([tok.bos]) == ""


def test_byte_lengths(tok):
    assert tok.byte_lengths.dtype == np.int32
    assert [int(tok.byte_lengths[i]) for i in (tok.bos, *tok.encode("Té€😀"))] == [0, 1, 2, 3, 4]


def test_same_characters_give_the_same_tokenizer(tok):
    again = CharTokenizer.train(reversed(DOCUMENTS))
    assert again.to_bytes() == tok.to_bytes()
    assert again.sha256 == tok.sha256


def test_file(tok, tmp_path):
    tok.save(tmp_path / "tokenizer.model")
    loaded = tokenizer.load(tmp_path / "tokenizer.model")
    assert isinstance(loaded, CharTokenizer)
    assert loaded.sha256 == tok.sha256
    assert loaded.encode(DOCUMENTS[1]) == tok.encode(DOCUMENTS[1])


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_text_round_trips(text):
    tok = tokenizer.from_bytes(CharTokenizer.train([text]).to_bytes())
    assert tok.decode(tok.encode(text)) == text


def test_unknown_character_is_named(tok):
    with pytest.raises(UserError, match=r"character 3 of the text is 'Z' \(U\+005A\)"):
        tok.encode("To Z")


def test_bad_input():
    with pytest.raises(UserError, match="empty"):
        CharTokenizer.train([])
    with pytest.raises(UserError, match="lone surrogate"):
        CharTokenizer.train(["a\ud800"])
    with pytest.raises(UserError, match="characters"):
        tokenizer.from_bytes(json.dumps({"kind": "char"}).encode())
