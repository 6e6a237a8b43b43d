"""Pages of text, tables, plots and conversations, written twice: as one self-contained HTML file and as Markdown.

Markdown does without the plots, which are in plots.py. All text is escaped: samples of a model may hold anything.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

THEMES = {  # colours by what they are for
    "light": {
        "page": "#fff", "box": "#f4f5f7", "ink": "#1c2024", "faint": "#5d646c", "line": "#d5d9de",
        "first": "#1668c7", "second": "#d4600c", "third": "#7a3db8", "fourth": "#1a7f37", "fifth": "#a8325f",
        "good": "#1a7f37", "bad": "#c62828",
    },
    "dark": {
        "page": "#14171a", "box": "#1e2328", "ink": "#e4e7ea", "faint": "#9aa2ab", "line": "#3a4148",
        "first": "#62a8f5", "second": "#f59a52", "third": "#c495f5", "fourth": "#57c271", "fifth": "#f08bb0",
        "good": "#57c271", "bad": "#ff7b72",
    },
}  # fmt: skip


class Block:
    """A piece of a page; what has no Markdown, or nothing for a terminal, is left out there."""

    def html(self) -> str:
        raise NotImplementedError

    def markdown(self) -> str:
        return ""

    def plain(self) -> str:
        return ""


@dataclass(frozen=True)
class Text(Block):
    text: str

    def html(self) -> str:
        return f"<p>{html.escape(self.text)}</p>"

    def markdown(self) -> str:
        return _escaped(self.text)

    def plain(self) -> str:
        return self.text


@dataclass(frozen=True)
class Code(Block):
    """Text to be shown as it is: commands, or a sample behind the prompt that it continues."""

    text: str
    prompt: str = ""

    def html(self) -> str:
        return f"<pre><b>{html.escape(self.prompt)}</b>{html.escape(self.text)}</pre>"

    def markdown(self) -> str:
        return _fenced(self.prompt + self.text)


@dataclass(frozen=True)
class Answer:
    """What was said, the word for what became of it, and whether that is good."""

    text: str
    mark: str
    is_good: bool


@dataclass(frozen=True)
class Exchange(Block):
    """A question and answers to it."""

    title: str
    question: str
    answers: tuple[Answer, ...]

    def html(self) -> str:
        lines = [f"<small>{html.escape(self.title)}</small><p>{html.escape(self.question)}</p>"]
        for answer in self.answers:
            mark = f"<b>{html.escape(answer.mark)}</b> "
            lines.append(f'<p class="{"good" if answer.is_good else "bad"}">{mark}{html.escape(answer.text)}</p>')
        return f'<div class="exchange">{"".join(lines)}</div>'

    def markdown(self) -> str:
        lines = [f"{self.title}: {self.question}", *(f"{answer.mark}: {answer.text}" for answer in self.answers)]
        return _fenced("\n".join(lines))


@dataclass(frozen=True)
class Table(Block):
    rows: Sequence[tuple[str, ...]]
    header: tuple[str, ...] = ("", "")
    style: str = ""  # CSS class: numbers are aligned to the right, tiles make a headline of each row

    def html(self) -> str:
        lines = [_row("th", self.header)] if any(self.header) else []
        lines += [_row("td", row) for row in self.rows]
        return f'<div class="wide"><table class="{self.style}">{"".join(lines)}</table></div>'

    def markdown(self) -> str:
        lines = [map(_escaped, self.header), ["---"] * len(self.header), *(map(_escaped, row) for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def plain(self) -> str:
        rows = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *line[1:]]) for row, line in zip(rows, padded, strict=True)
        )


def side_by_side(columns: dict[str, dict[str, str]], style: str = "") -> Table:
    """A table with a row for each name that any of the columns has; cells without a value stay empty."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [(name, *(column.get(name, "") for column in columns.values())) for name in names]
    return Table(rows, ("", *columns), style)


def _escaped(text: str) -> str:
    """Text in which neither Markdown nor HTML sees mark-up."""
    return html.escape(re.sub(r"([\\`*_|\[\]#~])", r"\\\1", " ".join(text.split())), quote=False)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings by their dotted names, as text."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            found[prefix + name] = number(value) if is_number else str(value)
    return found


def number(value: float, digits: int = 6) -> str:
    """Integers and what is as large in full, others to a few digits."""
    whole = isinstance(value, int) or abs(value) >= 10 ** (digits - 1) or value.is_integer()
    return f"{value:,.0f}" if whole else f"{value:,.{digits}g}"


def _fenced(text: str) -> str:
    fence = "`" * max([2, *map(len, re.findall("`+", text))]) + "`"
    return f"{fence}text\n{text}\n{fence}"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def to_markdown(title: str, sections: dict[str, list[Block]]) -> str:
    parts = [f"# {_escaped(title)}"]
    for name, blocks in sections.items():
        texts = [text for block in blocks if (text := block.markdown())]
        parts += [f"## {name}", *texts] if texts else []
    return "\n\n".join(parts) + "\n"


def to_html(title: str, sections: dict[str, list[Block]]) -> str:
    body = [
        f"<h2>{html.escape(name)}</h2>\n" + "\n".join(block.html() for block in blocks)
        for name, blocks in sections.items()
        if blocks
    ]
    themes = {name: "; ".join(f"--{key}: {value}" for key, value in theme.items()) for name, theme in THEMES.items()}
    return PAGE.substitute(title=html.escape(title), body="\n".join(body), **themes)


# The policy forbids every script and every request, whatever the text may contain.
PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<style>
:root { $light }
@media (prefers-color-scheme: dark) { :root { $dark } }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--page); color: var(--ink) }
body { font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
pre { background: var(--box); padding: .7rem .9rem; border-radius: .4rem; font-size: .85rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem }
td, th { padding: .25rem 1.2rem .25rem 0; vertical-align: top; border-bottom: 1px solid var(--line) }
th { font-weight: 600; text-align: left }
td:first-child { color: var(--faint) }
.numbers td:first-child { white-space: nowrap }
td + td { overflow-wrap: anywhere; min-width: 6rem }
.numbers td + td, .numbers th + th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.tiles tbody { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(12rem, 45%), 1fr)); gap: .6rem }
.tiles, .tiles tbody { width: 100% }
.tiles tr { display: flex; flex-direction: column-reverse; justify-content: flex-end }
.tiles tr { background: var(--box); padding: .6rem .8rem; border-radius: .4rem }
.tiles td { border: 0; padding: 0 }
.tiles td + td { font-size: 1.4rem; font-weight: 600 }
.exchange { background: var(--box); padding: .5rem .9rem; border-radius: .4rem; margin: .6rem 0 }
.exchange p { margin: .15rem 0; white-space: pre-wrap; overflow-wrap: anywhere }
.exchange small { color: var(--faint) }
.good { border-left: 3px solid var(--good); padding-left: .6rem }
.bad { border-left: 3px solid var(--bad); padding-left: .6rem }
.good b { color: var(--good) }
.bad b { color: var(--bad) }
figure { display: inline-block; width: 100%; max-width: 29rem; margin: .8rem .4rem 0 0 }
figcaption { font-weight: 600; font-size: .9rem }
svg { width: 100%; height: auto }
svg text { font-family: inherit !important }
</style></head><body><h1>$title</h1>
$body
</body></html>
""")
