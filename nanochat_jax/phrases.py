"""Phrases found in text, word by word: what the safety policy is written in.

A phrase is a sequence of items, each a word or something that stands for words:

    make          this word           make*      what begins with it           ####       a number of four digits
    make|build    one of several      <weapon>   a word or words of a list     [the]      it, or nothing
    _             any word            …          up to five words

No phrase reaches past the end of a sentence. Text is read without case, accents, styles and invisible characters, with
letters that only look Latin taken for Latin, and a word also as what it may be meant to be: k1ll, p@ssword, b-o-m-b.
Nothing here backtracks: a text takes a time proportional to its length, whatever the phrases.
"""

import itertools
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from nanochat_jax.errors import UserError

ANY, GAP, GAP_WORDS = "_", "…", 5
TAIL_WORDS = 2  # at the end of a stream, words that the next characters may still change

LETTER = r"[^\W_]"
WORDS = re.compile(
    rf"(?P<spelled>{LETTER}(?P<between>[^\w\n']{{1,2}}){LETTER}(?:(?P=between){LETTER}){{1,14}}(?!{LETTER}))"  # b-o-m-b
    rf"|[0-9]{{1,20}}(?:-[0-9]{{1,20}}){{1,4}}|{LETTER}{{1,40}}(?:['@$]{{1,3}}{LETTER}{{1,40}}){{0,3}}"
    rf"|[\W_]{{64}}"  # so that no text, however odd, is held back for long
)
SENTENCE_END = re.compile(r"""[.!?]["')\]]*\s|\n\s*\n""")
PHRASE_WORD = re.compile(rf"{LETTER}+\*?|#+(?:-#+)*")
LOOKALIKES = str.maketrans("авеікмнорстухѕјһԁѵɡɑαεικνορτυχı’‘ʼ`‐‑–—", "abeikmhopctyxsjhdvgaaeikvoptuxi''''----")  # noqa: RUF001
LEET = [str.maketrans("0134578@$", f"o{one}eastbas") for one in "il"]
DIGITS = str.maketrans("0123456789", "#" * 10)


class Word(NamedTuple):
    """A word of a text, as phrases see it."""

    start: int  # in characters of the text as it came
    end: int
    text: str
    readings: frozenset[str]  # "k1ll" may be kill, klll or k1ll; with none, only _ and … match it
    begins_sentence: bool


@lru_cache(maxsize=1 << 14)
def fold(character: str) -> str:
    """A character without case, accents and style; nothing for an invisible one."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())
    return "".join(c for c in plain if unicodedata.category(c) not in ("Mn", "Me", "Cf")).translate(LOOKALIKES)


@lru_cache(maxsize=1 << 14)
def readings(word: str, spelled: bool = False) -> frozenset[str]:
    """What a folded word may be meant to be."""
    letters = re.sub(r"[\W_]", "", word)
    forms = {letters, word} | ({letters[1:]} if spelled else set())  # "a b o m b"
    if "'" in word and not word.endswith("'t"):
        forms.add(word.partition("'")[0])
    leet = {form.translate(table) for form in forms for table in LEET if not letters.isdigit()}
    return frozenset(forms | leet) - {""}


class Reader:
    """Cuts a stream of characters into words, the same ones however it is chunked."""

    def __init__(self) -> None:
        self._folded, self._at, self._length = "", list[int](), 0  # what follows the last word, and where it came from
        self._end = 0  # of the last word that was given
        self.begin = 0  # of the first word that was not

    def read(self, text: str, closing: bool) -> list[Word]:
        if text.isascii():  # folded, each character stands for itself, and most texts can be folded at once
            self._folded += text.lower().translate(LOOKALIKES)
            self._at += range(self._length, self._length + len(text))
        else:
            folded = [fold(c) for c in text]
            self._folded += "".join(folded)
            self._at += [i for i, plain in enumerate(folded, self._length) for _ in plain]
        self._length += len(text)
        matches = list(WORDS.finditer(self._folded))
        n_sure = len(matches) if closing else max(0, len(matches) - TAIL_WORDS)
        words, cut = list[Word](), 0
        for match in matches[:n_sure]:
            first = SENTENCE_END.search(self._folded, cut, match.start()) is not None
            cut = match.end()
            start = max(self._end, self._at[match.start()])  # a character may stand for several, as ⒜ for (a)
            self._end = max(self._at[cut] if cut < len(self._at) else self._length, self._at[cut - 1] + 1)
            what = readings(match[0], match["spelled"] is not None)
            words.append(Word(start, self._end, match[0], what, first))
        self.begin = self._length
        if n_sure < len(matches):
            self.begin = max(self._end, self._at[matches[n_sure].start()])
        self._folded, self._at = self._folded[cut:], self._at[cut:]
        return words


class Item(NamedTuple):
    """One item of a phrase, and what it stands for: words, or phrases in their turn."""

    text: str
    optional: bool
    options: "list[str | list[Item]]"


Lists = dict[str, list[list[Item]]]


class Phrases:
    """Phrases as an automaton over words: all are followed at once, and those that begin alike share states."""

    def __init__(self) -> None:
        self._edges: list[dict[str, set[int]]] = [{}]
        self._ends: list[set[int]] = [set()]  # numbers of the phrases that are complete in a state
        self._known: dict[tuple[frozenset[int], str], int] = {}
        self._words: set[str] = set()  # on any edge
        self._step = lru_cache(maxsize=1 << 12)(self._new_step)  # few of the possible sets of states ever come up
        self._tests = lru_cache(maxsize=1 << 12)(self._new_tests)
        self.longest = 0  # words that a match can have

    def add(self, phrase: list[Item], number: int) -> None:
        """Add a phrase, as read_phrase gives it, before the first text; several may have the same number."""
        states = frozenset({0})
        for item in phrase:
            if (states, item.text) not in self._known:
                self._known[states, item.text] = self._new_state()
                self._connect(states, item, self._known[states, item.text])
            states = frozenset({self._known[states, item.text]}) | (states if item.optional else frozenset())
        for state in states:
            self._ends[state].add(number)
        self.longest = max(self.longest, _longest(phrase))

    def _new_state(self) -> int:
        self._edges.append({})
        self._ends.append(set())
        return len(self._edges) - 1

    def _connect(self, begins: frozenset[int], item: Item, end: int) -> None:
        for option in item.options:
            if isinstance(option, str):
                self._words.add(option)
                for begin in begins:
                    self._edges[begin].setdefault(option, set()).add(end)
                continue
            states = begins
            for i, inner in enumerate(option):
                if all(later.optional for later in option[i + 1 :]):
                    self._connect(states, inner, end)
                if i + 1 < len(option):
                    between = self._new_state()
                    self._connect(states, inner, between)
                    states = frozenset({between}) | (states if inner.optional else frozenset())

    def _new_tests(self, forms: frozenset[str]) -> frozenset[str]:
        """The words on edges that a word with these readings may follow."""
        numbers = {form.translate(DIGITS) for form in forms}
        stems = {f"{form[:n]}*" for form in forms for n in range(1, len(form) + 1)}
        return frozenset(self._words & (forms | numbers | stems | {ANY}))

    def _new_step(self, states: frozenset[int], tests: frozenset[str]) -> tuple[frozenset[int], frozenset[int], bool]:
        to = frozenset(end for state in states for test in tests for end in self._edges[state].get(test, ()))
        return to, frozenset().union(*(self._ends[state] for state in to)), any(self._edges[state] for state in to)

    def follow(self, words: Sequence[Word], begin: int, closing: bool) -> dict[int, int] | None:
        """Phrases that begin at a word, each with its longest match in words; None: later words must tell."""
        states, found = frozenset({0}), dict[int, int]()
        for i in range(begin, len(words)):
            if i > begin and words[i].begins_sentence:
                return found
            states, ended, going_on = self._step(states, self._tests(words[i].readings))
            if ended:
                found |= dict.fromkeys(ended, i + 1 - begin)
            if not going_on:
                return found
        return found if closing else None


def read_phrase(text: Any, lists: Lists, where: str) -> list[Item]:
    """The items of a phrase; UserError if the text is none."""
    where = f"{where}: phrase {text!r}"
    words = text.replace(GAP, f" [{ANY}]" * GAP_WORDS).split() if isinstance(text, str) else []
    phrase = [_read_item(word, lists, where) for word in words]
    if all(item.optional for item in phrase):
        raise UserError(f"{where} has no word that must be there")
    for items in (phrase, phrase[::-1]):
        edge = itertools.takewhile(lambda item: item.optional, items)
        if any(ANY in item.options for item in (*edge, next(item for item in items if not item.optional))):
            raise UserError(f"{where} must begin and end with a word; {GAP} and {ANY} are for between")
    return phrase


def _read_item(text: str, lists: Lists, where: str) -> Item:
    optional = text.startswith("[") and text.endswith("]")
    item = Item(text, optional, [])
    for option in (text[1:-1] if optional else text).split("|"):
        word, name = "".join(map(fold, option)), option[1:-1]
        if option.startswith("<") and option.endswith(">"):
            if name not in lists:
                raise UserError(f"{where}: no list {option}; before it come {', '.join(lists) or 'none'}")
            item.options.extend(lists[name])
        elif word == ANY or PHRASE_WORD.fullmatch(word):
            item.options.append(word)
        else:
            raise UserError(f"{where}: {option!r} is no word, stem*, ####, <list>, [optional], {ANY} or {GAP}")
    return item


def _longest(phrase: list[Item]) -> int:
    return sum(max(1 if isinstance(o, str) else _longest(o) for o in item.options) for item in phrase)
