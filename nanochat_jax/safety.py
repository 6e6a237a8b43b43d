"""A readable policy of what not to answer, and a filter that keeps it while text streams.

    policy = load_policy()
    if (finding := policy.check(question)) and finding.action == "refuse":
        return finding.say
    stream = StreamFilter(policy)
    shown = [stream.feed(piece) for piece in answer] + [stream.close()]

A policy is a TOML file of phrases; safety_policy.toml beside this file explains the notation. A phrase is a sequence of
words and not a regular expression: text is read word by word, and the length of the longest match is known beforehand,
so that no policy and no text can hang a server, and a word is shown as soon as no phrase can begin there any more.
docs/safety.md says how well this works, and what it is not.
"""

import logging
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nanochat_jax.config import from_json
from nanochat_jax.errors import UserError
from nanochat_jax.phrases import TAIL_WORDS, Lists, Phrases, Reader, Word, read_phrase

log = logging.getLogger(__name__)

Role = Literal["user", "assistant"]
DEFAULT_POLICY = Path(__file__).with_name("safety_policy.toml")
ACTIONS = ("refuse", "mask", "warn", "log")  # the strongest first


@dataclass(frozen=True)
class Category:
    """One [[category]] of a policy file."""

    name: str
    action: str
    say: str = ""  # is shown instead of the answer (refuse), instead of the match (mask), after the answer (warn)
    both: tuple[str, ...] = ()  # phrases looked for in what users and assistant write
    user: tuple[str, ...] = ()
    assistant: tuple[str, ...] = ()
    check: str = ""  # the name of a test that the matched words must pass as well


@dataclass(frozen=True)
class Finding:
    """A phrase of the policy in a text."""

    category: str
    action: str
    say: str
    span: tuple[int, int]  # first character of the text, and the one after the last


def luhn(text: str) -> bool:
    """The check sum of payment card numbers."""
    digits = [int(c) for c in reversed(text) if c in "0123456789"]
    return (sum(digits[::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])) % 10 == 0


CHECKS: dict[str, Callable[[str], bool]] = {"": lambda text: True, "luhn": luhn}


class Policy:
    """What is looked for, and what is done about it; one without categories lets everything pass."""

    def __init__(self, categories: Sequence[Category] = (), *, log_text: bool = False) -> None:
        self.categories, self.log_text = categories, log_text
        self.phrases = {"user": Phrases(), "assistant": Phrases()}
        self.benign = Phrases()

    @property
    def words_held(self) -> int:
        """The most words that a StreamFilter holds back, a benign phrase counted as one."""
        return self.phrases["assistant"].longest + self.benign.longest + TAIL_WORDS

    def find(self, text: str, role: Role = "user") -> list[Finding]:
        """All findings in a text, in its order, up to the first that is refused."""
        return _Scanner(self, role).scan(text, closing=True)

    def check(self, text: str, role: Role = "user") -> Finding | None:
        """The finding in a message that calls for the strongest action, the first of several; it is logged."""
        findings = self.find(text, role)
        self.note(findings, text, role)
        return min(findings, key=lambda finding: ACTIONS.index(finding.action), default=None)

    def note(self, findings: Sequence[Finding], text: str, role: Role) -> None:
        """Log what was found, once a category; the text itself only if the policy has log_text = true."""
        for category, action in dict.fromkeys((finding.category, finding.action) for finding in findings):
            said = f": {text!r}" if self.log_text else ""
            log.warning("safety: %s, %s, %s, %d characters%s", action, category, role, len(text), said)


class _Scanner:
    """Looks for a policy's phrases in a stream of characters."""

    def __init__(self, policy: Policy, role: Role) -> None:
        self._benign, self._phrases, self._categories = policy.benign, policy.phrases[role], policy.categories
        self._reader = Reader()
        self._words: list[Word] = []  # as they were written
        self._plain: list[Word] = []  # with each benign phrase as one word that no other phrase knows
        self.begin = 0  # nothing before this character can be part of a finding to come

    def scan(self, text: str, closing: bool) -> list[Finding]:
        self._words += self._reader.read(text, closing)
        i = 0
        while i < len(self._words) and (found := self._benign.follow(self._words, i, closing)) is not None:
            first, length = self._words[i], max(found.values(), default=1)
            last = self._words[i + length - 1]
            self._plain.append(first._replace(end=last.end, readings=frozenset()) if found else first)
            i += length
        del self._words[:i]
        findings, i = list[Finding](), 0
        while i < len(self._plain) and (found := self._phrases.follow(self._plain, i, closing)) is not None:
            if found:
                findings += self._findings(found, i)
            i += 1
            if findings and findings[-1].action == "refuse":
                break
        del self._plain[:i]
        waiting = [*self._plain[:1], *self._words[:1]]
        self.begin = waiting[0].start if waiting else self._reader.begin
        return findings

    def _findings(self, found: dict[int, int], begin: int) -> list[Finding]:
        """What begins at a word: one refusal, or else one finding for each category, in the policy's order."""
        findings = []
        for number, length in sorted(found.items()):
            category, words = self._categories[number], self._plain[begin : begin + length]
            finding = Finding(category.name, category.action, category.say, (words[0].start, words[-1].end))
            if CHECKS[category.check](" ".join(word.text for word in words)):
                findings.append(finding)
        return [finding for finding in findings if finding.action == "refuse"][:1] or findings


class StreamFilter:
    """Passes an answer on in pieces, without what the policy refuses or masks; one for each answer.

    Args:
        policy: what to look for.
        role: whose words these are.
    """

    def __init__(self, policy: Policy, role: Role = "assistant") -> None:
        self._policy, self._role, self._scanner = policy, role, _Scanner(policy, role)
        self._text, self._shown = "", 0  # all that came; how many characters of it were shown, masked or left out
        self._masks: list[Finding] = []
        self.findings: list[Finding] = []
        self.refused = False  # from here on nothing is shown; an app may show the refusal alone

    def feed(self, chunk: str) -> str:
        """Take the next piece, and return what can be shown by now."""
        return self._take(chunk, closing=False)

    def close(self) -> str:
        """Return what was held back, and the notes of warnings, when the answer has ended."""
        rest = self._take("", closing=True)
        if not self.refused:
            self._policy.note(self.findings, self._text, self._role)
            notes = dict.fromkeys(finding.say for finding in self.findings if finding.action == "warn")
            rest += "".join(f"\n\n{note}" for note in notes)
        return rest

    def _take(self, chunk: str, closing: bool) -> str:
        if self.refused:
            return ""
        self._text += chunk
        findings = self._scanner.scan(chunk, closing)
        self.findings += findings
        self._masks += [finding for finding in findings if finding.action == "mask"]
        if findings and findings[-1].action == "refuse":
            self.refused, refusal = True, findings[-1]
            self._policy.note(self.findings, self._text, self._role)
            shown = self._release(refusal.span[0])
            return shown + ("\n\n" if self._text[: refusal.span[0]].strip() else "") + refusal.say
        return self._release(len(self._text) if closing else self._scanner.begin)

    def _release(self, end: int) -> str:
        shown = []
        while self._masks and self._masks[0].span[0] < end:
            mask = self._masks.pop(0)
            if mask.span[0] >= self._shown:  # one that overlaps the mask before it is hidden with it
                shown += [self._text[self._shown : mask.span[0]], mask.say]
            self._shown = max(self._shown, mask.span[1])
        shown.append(self._text[self._shown : max(self._shown, end)])
        self._shown = max(self._shown, end)
        return "".join(shown)


@dataclass(frozen=True)
class _File:
    category: tuple[Any, ...]
    benign: tuple[Any, ...] = ()
    lists: dict[str, Any] = field(default_factory=dict)
    log_text: bool = False


def load_policy(path: Path | None = None) -> Policy:
    """Read a policy file, or the default one.

    Raises:
        UserError: that names the file, and the category and phrase at fault.
    """
    path = path or DEFAULT_POLICY
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read a safety policy from {path}: {error}") from error
    file, lists = from_json(_File, data, str(path)), Lists()
    tables, benign = _array(file.category, dict, f"{path}: category"), _array(file.benign, str, f"{path}: benign")
    if not isinstance(file.lists, dict):
        raise UserError(f"{path}: lists must be a table of arrays")
    for name, entries in file.lists.items():
        where = f"{path}, list {name}"
        lists[name] = [read_phrase(entry, lists, where) for entry in _array(entries, str, where)]
    categories = [_category(table, f"{path}, category {number}") for number, table in enumerate(tables, 1)]
    policy = Policy(categories, log_text=file.log_text)
    for number, category in enumerate(policy.categories):
        where = f"{path}, category {category.name}"
        for role, phrases in policy.phrases.items():
            for phrase in (*category.both, *getattr(category, role)):
                phrases.add(read_phrase(phrase, lists, where), number)
    for phrase in benign:
        policy.benign.add(read_phrase(phrase, lists, f"{path}, benign"), 0)
    return policy


def _category(table: dict[str, Any], where: str) -> Category:
    category = from_json(Category, table, where)
    where = f"{where} ({category.name})"
    for key in ("both", "user", "assistant"):
        _array(getattr(category, key), str, f"{where}: {key}")
    for key, known in (("action", ACTIONS), ("check", tuple(CHECKS))):
        if getattr(category, key) not in known:
            raise UserError(f"{where}: {key} = {getattr(category, key)!r} is none of {', '.join(filter(None, known))}")
    if not category.say and category.action != "log":
        raise UserError(f"{where}: say, the text to show, is missing")
    if category.action == "mask" and (category.both or category.user):
        raise UserError(f"{where}: mask is for what the assistant writes; put its phrases under assistant")
    return category


def _array[T](values: Any, kind: type[T], where: str) -> Sequence[T]:
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, kind) for value in values):
        raise UserError(f"{where} must be an array of {'texts' if kind is str else 'tables'}")
    return values
