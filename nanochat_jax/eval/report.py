"""Pages of text, tables and curves, written twice: as one self-contained HTML file and as Markdown.

Curves are inline SVG whose colours are CSS variables, so that they follow the reader's light or dark theme; Markdown
does without them. All text is escaped: samples of a model may hold anything.
"""

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

MAX_POINTS = 800  # of a curve: a page should stay small however long the run

# Stand-ins that matplotlib accepts as colours, and the CSS variables that replace them in the finished SVG.
INK, GRID, FIRST, SECOND = "#010101", "#020202", "#030303", "#040404"
VARIABLES = {INK: "var(--ink)", GRID: "var(--line)", FIRST: "var(--first)", SECOND: "var(--second)"}
STYLE: Any = {
    "svg.fonttype": "none", "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID,
    "axes.grid": True, "axes.spines.top": False, "axes.spines.right": False, "grid.color": GRID, "grid.linewidth": 0.5,
    "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "legend.frameon": False,
}  # fmt: skip


class Block:
    """A piece of a page; what has no Markdown is left out there."""

    def html(self) -> str:
        raise NotImplementedError

    def markdown(self) -> str:
        return ""


@dataclass(frozen=True)
class Text(Block):
    text: str

    def html(self) -> str:
        return f"<p>{html.escape(self.text)}</p>"

    def markdown(self) -> str:
        return _plain(self.text)


@dataclass(frozen=True)
class Code(Block):
    """Text to be shown as it is: commands, or a sample behind the prompt that it continues."""

    text: str
    prompt: str = ""

    def html(self) -> str:
        return f"<pre><b>{html.escape(self.prompt)}</b>{html.escape(self.text)}</pre>"

    def markdown(self) -> str:
        text = self.prompt + self.text
        fence = "`" * max([2, *map(len, re.findall("`+", text))]) + "`"
        return f"{fence}text\n{text}\n{fence}"


@dataclass(frozen=True)
class Table(Block):
    rows: Sequence[tuple[str, ...]]
    header: tuple[str, ...] = ("", "")
    style: str = ""  # CSS class: numbers are aligned to the right, tiles make a headline of each row

    def html(self) -> str:
        rows = [*([self.header] if any(self.header) else []), *self.rows]
        lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        return f'<div class="wide"><table class="{self.style}">{"".join(lines)}</table></div>'

    def markdown(self) -> str:
        lines = [self.header, ("---",) * len(self.header), *(map(_plain, row) for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class Curves(Block):
    """Metrics over the steps of a run: those of every step raw and smoothed, occasional ones as dots."""

    title: str
    records: list[dict[str, Any]]  # of metrics.jsonl
    metrics: dict[str, str]  # name → label; at most two
    levels: dict[str, float]  # label → horizontal line to compare with

    def html(self) -> str:
        return f"<figure><figcaption>{html.escape(self.title)}</figcaption>{self._svg()}</figure>"

    def _svg(self) -> str:
        file = io.StringIO()
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": self.title}):  # ids of two plots on a page must differ
            figure = Figure(figsize=(4.6, 2.9), layout="constrained")
            axes = figure.subplots()
            axes.set_xlabel("step")
            for (name, label), colour in zip(self.metrics.items(), (FIRST, SECOND), strict=False):
                steps, values = series(self.records, name)
                if 2 * len(steps) < len(self.records):
                    axes.plot(steps, values, "o-", color=colour, label=label, markersize=3, linewidth=1.2)
                else:
                    thin = slice(None, None, len(steps) // MAX_POINTS + 1)
                    axes.plot(steps[thin], values[thin], color=colour, alpha=0.35, linewidth=0.8)
                    axes.plot(steps[thin], smooth(values)[thin], color=colour, label=label, linewidth=1.6)
            for i, (label, value) in enumerate(self.levels.items()):
                axes.axhline(value, color=INK, linestyle=("--", ":", "-.")[i % 3], linewidth=0.9, label=label)
            axes.set_xlim(left=0)
            if len(self.metrics) + len(self.levels) > 1:
                axes.legend(fontsize=8)
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        # Without width and height, the drawing takes those of the page.
        svg = re.sub(r'.*?<svg .*?(viewBox=".*?").*?>', r"<svg \1>", file.getvalue(), count=1, flags=re.DOTALL)
        for colour, variable in VARIABLES.items():
            svg = svg.replace(colour, variable)
        return svg


def series(records: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, where it was logged and finite."""
    found = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    steps, values = np.array(found, float).reshape(-1, 2).T
    return steps, values


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a fortieth of the curve, shorter at its ends."""
    half, here = len(values) // 80, np.arange(len(values))
    first, last = np.maximum(here - half, 0), np.minimum(here + half, len(values) - 1) + 1
    sums = np.cumsum(np.pad(values, (1, 0)))
    return (sums[last] - sums[first]) / (last - first)


def _plain(text: str) -> str:
    """Text in which neither Markdown nor HTML sees mark-up."""
    return html.escape(re.sub(r"([\\`*_|\[\]#~])", r"\\\1", " ".join(text.split())), quote=False)


def to_markdown(title: str, sections: dict[str, list[Block]]) -> str:
    parts = [f"# {_plain(title)}"]
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
    return PAGE.substitute(title=html.escape(title), body="\n".join(body))


# The policy forbids every script and every request, whatever the text may contain.
PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<style>
:root { --page: #fff; --box: #f4f5f7; --ink: #1c2024; --faint: #5d646c; --line: #d5d9de }
:root { --first: #1668c7; --second: #d4600c }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --box: #1e2328; --ink: #e4e7ea; --faint: #9aa2ab; --line: #3a4148 }
  :root { --first: #62a8f5; --second: #f59a52 }
}
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--page); color: var(--ink) }
body { font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
pre { background: var(--box); padding: .7rem .9rem; border-radius: .4rem; font-size: .85rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem }
td { padding: .25rem 1.2rem .25rem 0; vertical-align: top; border-bottom: 1px solid var(--line) }
td:first-child { color: var(--faint) }
td + td { overflow-wrap: anywhere }
.numbers td + td { text-align: right; font-variant-numeric: tabular-nums }
.tiles tbody { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(12rem, 45%), 1fr)); gap: .6rem }
.tiles, .tiles tbody { width: 100% }
.tiles tr { display: flex; flex-direction: column-reverse; justify-content: flex-end }
.tiles tr { background: var(--box); padding: .6rem .8rem; border-radius: .4rem }
.tiles td { border: 0; padding: 0 }
.tiles td + td { font-size: 1.4rem; font-weight: 600 }
figure { display: inline-block; width: 100%; max-width: 29rem; margin: .8rem .4rem 0 0 }
figcaption { font-weight: 600; font-size: .9rem }
svg { width: 100%; height: auto }
svg text { font-family: inherit !important }
</style></head><body><h1>$title</h1>
$body
</body></html>
""")
