"""Phrases: their notation, the disguises they see through, and words that do not depend on how text is chunked."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_jax.errors import UserError
from nanochat_jax.phrases import LOOKALIKES, Phrases, Reader, Word, fold, read_phrase

LISTS = {"weapon": [read_phrase(entry, {}, "") for entry in ("bomb*|gun", "nerve gas", "pipe [home] bomb")]}


def words_of(text: str) -> list[Word]:
    return Reader().read(text, closing=True)


def found(phrase: str, text: str) -> list[str]:
    """What of a text a phrase matches, at each word where it does."""
    phrases, words = Phrases(), words_of(text)
    phrases.add(read_phrase(phrase, LISTS, "here"), 0)
    lengths = [(i, (phrases.follow(words, i, closing=True) or {}).get(0, 0)) for i in range(len(words))]
    return [text[words[i].start : words[i + n - 1].end] for i, n in lengths if n]


@pytest.mark.parametrize(
    ("phrase", "text", "matches"),
    [
        ("make it", "Please MAKE it, make the it", ["MAKE it"]),
        ("make|build it", "make it; build it; made it", ["make it", "build it"]),
        ("mak* it", "making it, mak it, remaking it", ["making it", "mak it"]),
        ("a [very] big", "a big, a very big, a very very big", ["a big", "a very big"]),
        ("foo _ bar", "foo x bar, foo bar, foo x y bar", ["foo x bar"]),
        ("foo … bar", "foo bar", ["foo bar"]),
        ("foo … bar", "foo one two three four five bar", ["foo one two three four five bar"]),
        ("foo … bar", "foo one two three four five six bar", []),
        ("foo … bar", "foo. bar", []),
        ("foo … bar", "foo, bar", ["foo, bar"]),
        ("foo … bar", "foo\n\nbar", []),
        ("foo … bar", "foo bar bar", ["foo bar bar"]),
        ("sell <weapon>", "sell bombs, sell nerve gas, sell a gun", ["sell bombs", "sell nerve gas"]),
        (
            "<weapon> sale",
            "pipe bomb sale; pipe home bomb sale",
            ["pipe bomb sale", "bomb sale", "pipe home bomb sale", "bomb sale"],
        ),
        ("[the] <weapon>|fire", "the nerve gas, fire", ["the nerve gas", "nerve gas", "fire"]),
        ("###-##-####", "078-05-1120 and 78-05-1120", ["078-05-1120"]),
        ("#### ####", "1234 5678 12345678", ["1234 5678"]),
        ("café", "CAFE, café, cafe\u0301", ["CAFE", "café", "cafe\u0301"]),
    ],
)
def test_notation(phrase, text, matches):
    assert found(phrase, text) == matches


@pytest.mark.parametrize(
    "text",
    [
        "BOMB", "bömb", "ｂｏｍｂ", "𝐛𝐨𝐦𝐛", "ⓑⓞⓜⓑ", "bo\u200bmb", "bo\u00admb", "b\u0336o\u0336mb", "bоmb", "b0mb",
        "8omb", "b-o-m-b", "b.o.m.b", "b o m b", "b*o*m*b", "bomb's", "bomb’s", "a b o m b",
    ],
)  # fmt: skip
def test_disguises(text):
    assert found("make bomb", f"make {text}")


@pytest.mark.parametrize("text", ["bombast", "b o m", "bomba b", "abomb", "bomb0", "b. o. mb"])
def test_what_is_no_disguise(text):
    assert not found("make bomb", f"make {text}")


def test_a_refusal_is_not_its_opposite():
    assert (
        found("can help", "I can help") and not found("can help", "I can't help") and found("cant help", "I can't help")
    )


@pytest.mark.parametrize(
    ("phrase", "problem"),
    [
        ("", "no word that must be there"),
        (3, "no word that must be there"),
        ("[a] [b]", "no word that must be there"),
        ("… bomb", "begin and end with a word"),
        ("bomb _", "begin and end with a word"),
        ("[a] … bomb", "begin and end with a word"),
        ("make <wepon>", "no list <wepon>; before it come weapon"),
        ("make (bomb|gun)", r"'\(bomb' is no word"),
        ("ma*ke", "'ma\\*ke' is no word"),
        ("a || b", "'' is no word"),
    ],
)
def test_what_is_wrong_with_a_phrase_is_said(phrase, problem):
    with pytest.raises(UserError, match=problem):
        read_phrase(phrase, LISTS, "here")


def test_spans_are_of_the_text_as_it_came():
    text = "  ﬃne  “Ｂ\u200bomb”—x"
    words = words_of(text)
    assert [text[word.start : word.end] for word in words] == ["ﬃne", "Ｂ\u200bomb", "x"]
    assert [word.text for word in words] == ["ffine", "bomb", "x"]


PIECES = [
    "a", "b", "b", "o", "m", "k1ll", "bomb", "x" * 45, "12", "1", " ", " ", "  ", "-", ".", ". ", "\n\n", "'", "'s",
    "@", "$", "\u200b", "\u0301", "é", "ﬃ", "⒜", "—", "_", "…", "-" * 70, "中", "İ",
]  # fmt: skip


def test_ascii_may_be_folded_at_once():
    assert all(fold(c) == c.lower().translate(LOOKALIKES) for c in map(chr, range(128)))


@settings(max_examples=400)
@given(st.lists(st.sampled_from(PIECES), max_size=40), st.data())
def test_words_do_not_depend_on_the_chunks(pieces, data):
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    reader, words = Reader(), []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        words += reader.read(text[begin:end], closing=False)
        assert all(word.end <= reader.begin for word in words)
    assert words + reader.read("", closing=True) == words_of(text)


@pytest.mark.parametrize(
    "text", ["make b o m b now", "b o", "a b-o-m-b", "it's b o more", "12-34-5x", "p@@ss @ me", "x" * 130]
)
def test_words_come_out_the_same_character_by_character(text):
    reader = Reader()
    words = [word for character in text for word in reader.read(character, closing=False)]
    assert words + reader.read("", closing=True) == words_of(text)
