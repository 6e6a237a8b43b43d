"""Byte-pair encodings read from GPT-2's files and from nanochat's pickles."""

import base64
import json
import os
import pickle

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from nanochat_jax import bpe, tokenizer
from nanochat_jax.errors import UserError
from nanochat_jax.tokenizer import CONTROL_TOKENS

PATTERN = r"'(?i:[sdmt]|ll|ve|re)|\p{L}+|\p{N}{1,2}|\s+|[^\s\p{L}\p{N}]+"
UPSTREAM_SPECIAL = CONTROL_TOKENS[:9]  # nanochat has no system tokens
MERGES = [b"th", b"the", b"an", b"and", b"  ", "é".encode()]
BYTE_OF = bpe._byte_of_character()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def gpt2_text(token: bytes) -> str:
    return "".join(CHARACTER_OF[byte] for byte in token)


@pytest.fixture(scope="session")
def encoding():
    """As nanochat trains it: bytes, merges, then its nine special tokens."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {token: 256 + i for i, token in enumerate(MERGES)}
    special = {name: len(ranks) + i for i, name in enumerate(UPSTREAM_SPECIAL)}
    return tiktoken.Encoding("rustbpe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture
def pickled(encoding, tmp_path):
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(encoding))
    return path


@pytest.fixture
def gpt2_files(tmp_path):
    """A small tokenizer in GPT-2's two files: bytes in its odd order, merges, <|endoftext|>."""
    pairs = [(b"t", b"h"), (b"th", b"e"), (b" ", b"a"), (b"\xc3", b"\xa9"), (b"\n", b"\n")]
    tokens = [*(bytes([byte]) for byte in BYTE_OF.values()), *(left + right for left, right in pairs)]
    vocab = {gpt2_text(token): i for i, token in enumerate(tokens)} | {"<|endoftext|>": len(tokens)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(f"{gpt2_text(left)} {gpt2_text(right)}" for left, right in pairs)]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "vocab.json", tmp_path / "merges.txt"


def test_pickle_of_nanochat(pickled, encoding):
    tok = bpe.from_pickle(pickled)
    text = "the  théatre and 123 others' <|bos|>\n"
    assert tok.vocab_size == encoding.n_vocab
    assert tok.encode(text) == encoding.encode_ordinary(text)
    assert tok.decode(tok.encode(text)) == text
    assert set(tok.control) == set(UPSTREAM_SPECIAL)
    assert tok.bos == encoding.encode_single_token("<|bos|>")
    assert [int(tok.byte_lengths[i]) for i in (tok.bos, 256, 257, ord("a"))] == [0, 2, 3, 1]
    assert tok.byte_lengths.dtype == np.int32


def test_control_tokens_cannot_be_written(pickled):
    tok = bpe.from_pickle(pickled)
    assert not set(tok.encode("".join(CONTROL_TOKENS))) & set(tok.control.values())


def test_file_and_pickle_give_the_same_back(pickled, tmp_path):
    tok = bpe.from_pickle(pickled)
    tok.save(tmp_path / "tokenizer.model")
    loaded = tokenizer.load(tmp_path / "tokenizer.model")
    assert isinstance(loaded, bpe.TiktokenTokenizer)
    assert loaded.sha256 == tok.sha256
    theirs = pickle.loads(loaded.to_pickle())
    assert isinstance(theirs, tiktoken.Encoding)
    assert theirs.encode_ordinary("the and") == tok.encode("the and")
    (tmp_path / "again.pkl").write_bytes(loaded.to_pickle())
    assert bpe.from_pickle(tmp_path / "again.pkl").sha256 == tok.sha256


class Bomb:
    """Unpickling this would leave a file behind."""

    def __init__(self, path, call=os.system):
        self.path, self.call = path, call

    def __reduce__(self):
        return self.call, (f"touch {self.path}",)


def pickled_encoding(**values):
    """A pickle of the right class, with a state of our choice."""
    state = {"name": "x", "pat_str": "a", "mergeable_ranks": {b"a": 0}, "special_tokens": {"<|bos|>": 1}, **values}
    encoding = tiktoken.Encoding.__new__(tiktoken.Encoding)
    encoding.__dict__ = {name if name == "name" else f"_{name}": value for name, value in state.items()}
    return pickle.dumps(encoding)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: pickle.dumps(Bomb(path)),
        lambda path: pickle.dumps({"pat_str": Bomb(path)}),
        lambda path: pickle.dumps(Bomb(path, eval)),
        lambda path: pickle.dumps(Bomb(path, exec), protocol=0),
        lambda path: pickled_encoding(special_tokens={"<|bos|>": Bomb(path)}),
    ],
    ids=["os.system", "nested", "eval", "exec", "hidden"],
)
def test_malicious_pickle_runs_nothing(make, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "tokenizer.pkl"
    path.write_bytes(make(marker))
    with pytest.raises(UserError, match=r"asks for .*nothing of it was run"):
        bpe.from_pickle(path)
    assert not marker.exists()


@pytest.mark.parametrize("module", ["tiktoken.core.Encoding", "tiktoken.load", "builtins", "nanochat_jax.bpe"])
def test_no_other_class_is_found(module, tmp_path):
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(f"c{module}\nEncoding\n)\x81.".encode("latin-1"))
    with pytest.raises(UserError, match="asks for"):
        bpe.from_pickle(path)


def test_pickle_of_something_else_or_damaged(pickled, tmp_path):
    whole = pickled.read_bytes()
    for data in (b"", b"\x80", whole[: len(whole) // 2], whole[:-1], pickle.dumps({"pat_str": "a"}), pickle.dumps(3)):
        pickled.write_bytes(data)
        with pytest.raises(UserError, match=r"tokenizer\.pkl"):
            bpe.from_pickle(pickled)
    with pytest.raises(UserError, match="cannot read"):
        bpe.from_pickle(tmp_path / "absent.pkl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mergeable_ranks": {b"a": 0}}, "no token for the byte 0x00"),
        ({"mergeable_ranks": {b"a": 1}}, "ranks"),
        ({"mergeable_ranks": {"a": 0}}, "types"),
        ({"special_tokens": {}}, "neither"),
        ({"special_tokens": {"<|bos|>": 5}}, "special tokens"),
        ({"special_tokens": {"<|bos|>": "5"}}, "types"),
        ({"pat_str": "("}, "pattern"),
    ],
)
def test_pickle_with_wrong_values(encoding, change, message, tmp_path):
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickled_encoding(**{**encoding.__getstate__(), **change}))
    with pytest.raises(UserError, match=message):
        bpe.from_pickle(path)


def test_gpt2_files(gpt2_files):
    tok = bpe.from_gpt2_files(*gpt2_files)
    assert tok.encode("the") == [257]
    assert tok.encode(" a") == [258]
    assert tok.encode("é") == [259]
    assert tok.encode("!") == [0], "GPT-2's first byte"
    assert tok.bos == 261
    assert tok.control == {name: 261 + i for i, name in enumerate(CONTROL_TOKENS)}
    assert tok.vocab_size == 272
    assert not set(tok.encode("<|endoftext|><|user_start|>")) & set(tok.control.values())
    assert tokenizer.from_bytes(tok.to_bytes()).encode("the é") == tok.encode("the é")


def test_gpt2_pattern_is_tiktokens():
    from tiktoken_ext import openai_public

    assert openai_public.r50k_pat_str == bpe.GPT2_PATTERN


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(text):
    ranks = {bytes([byte]): byte for byte in range(256)} | {token: 256 + i for i, token in enumerate(MERGES)}
    tok = bpe.from_ranks(bpe.GPT2_PATTERN, ranks, {"<|bos|>": len(ranks)})
    assert tok.decode(tok.encode(text)) == text


def test_gpt2_files_that_do_not_belong_together(gpt2_files):
    vocab, merges = gpt2_files
    lines = merges.read_text("utf-8").splitlines()
    merges.write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]), encoding="utf-8")
    with pytest.raises(UserError, match=r"vocab\.json: token 'the' has id 257; by .*merges\.txt it should be 256"):
        bpe.from_gpt2_files(vocab, merges)
    merges.write_text("\n".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(UserError, match="endoftext"):
        bpe.from_gpt2_files(vocab, merges)


def test_gpt2_files_missing_or_damaged(gpt2_files, tmp_path):
    vocab, merges = gpt2_files
    with pytest.raises(UserError, match=r"cannot read .*absent\.txt"):
        bpe.from_gpt2_files(vocab, tmp_path / "absent.txt")
    vocab.write_bytes(vocab.read_bytes()[:100])
    with pytest.raises(UserError, match=r"vocab\.json.* damaged"):
        bpe.from_gpt2_files(vocab, merges)
    vocab.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="damaged"):
        bpe.from_gpt2_files(vocab, merges)


def test_lone_surrogate(pickled):
    with pytest.raises(UserError, match="lone surrogate"):
        bpe.from_pickle(pickled).encode("a\ud800")


def test_damaged_file(pickled):
    values = json.loads(bpe.from_pickle(pickled).to_bytes())
    for key in ("pattern", "special", "tokens"):
        with pytest.raises(UserError, match="damaged"):
            tokenizer.from_bytes(json.dumps({k: v for k, v in values.items() if k != key}).encode())
    bad = values | {"tokens": ["*", *values["tokens"][1:]]}
    with pytest.raises(UserError, match="damaged"):
        tokenizer.from_bytes(json.dumps(bad).encode())
    assert base64.b64decode(values["tokens"][97]) == b"a"


@pytest.mark.torch
def test_gpt2_files_live(gpt2_files):
    """Against transformers' reader of the same files."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Tokenizer(*map(str, gpt2_files))
    ours = bpe.from_gpt2_files(*gpt2_files)
    for text in ("the  three thé\n\n\n a aa'll 123", "  \t é€😀 x", "the" * 50):
        assert ours.encode(text) == theirs.encode(text)
