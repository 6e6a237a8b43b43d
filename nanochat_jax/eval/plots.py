"""Plots of a page: inline SVG whose colours are CSS variables, so that they follow the reader's light or dark theme."""

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from nanochat_jax.eval.report import THEMES, Block
from nanochat_jax.files import write_bytes

MAX_POINTS = 800  # of a curve: a page should stay small however long the run
FEW_POINTS = 20  # of a curve: drawn as dots, of which even one is seen
INKS = ("ink", "line", "first", "second", "third", "fourth", "fifth")
# Colours that matplotlib accepts, and that the CSS variables take the place of in the finished SVG.
STAND_INS = {ink: f"#{i:02x}{i:02x}{i:02x}" for i, ink in enumerate(INKS, 1)}

Palette = Mapping[str, str]  # colours by the names of INKS


def style(palette: Palette) -> Any:
    """Of a figure, as matplotlib names its settings."""
    ink, line = palette["ink"], palette["line"]
    return {
        "svg.fonttype": "none", "font.size": 9, "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": line,
        "axes.grid": True, "axes.spines.top": False, "axes.spines.right": False, "grid.color": line,
        "grid.linewidth": 0.5, "xtick.color": line, "ytick.color": line, "xtick.labelcolor": ink,
        "ytick.labelcolor": ink, "legend.frameon": False, "text.parse_math": False,
    }  # fmt: skip


@dataclass(frozen=True)
class Plot(Block):
    """Something drawn on axes."""

    title: str
    stage: str  # tells it from another stage's plot of this title

    legend_columns: ClassVar[int] = 4

    def draw(self, axes: Axes, palette: Palette) -> bool:
        """Draw, and return whether a legend is needed."""
        raise NotImplementedError

    def html(self) -> str:
        return f"<figure><figcaption>{html.escape(self.title)}</figcaption>{self._svg()}</figure>"

    def _svg(self) -> str:
        file = io.StringIO()
        salt = f"{self.stage}: {self.title}"  # ids of two plots on a page must differ
        with matplotlib.rc_context(style(STAND_INS) | {"svg.hashsalt": salt}):
            figure = Figure(figsize=(4.6, 2.9), layout="constrained")
            if self.draw(figure.subplots(), STAND_INS):
                figure.legend(loc="outside upper left", ncols=self.legend_columns, fontsize=8)
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        # Without width and height, the drawing takes those of the page.
        svg = re.sub(r'.*?<svg .*?(viewBox=".*?").*?>', r"<svg \1>", file.getvalue(), count=1, flags=re.DOTALL)
        for ink, colour in STAND_INS.items():
            svg = svg.replace(colour, f"var(--{ink})")
        return svg


def save_png(plots: Sequence[Plot], path: Path) -> None:
    """Plots side by side in one image, in the light theme."""
    file, light = io.BytesIO(), THEMES["light"]
    with matplotlib.rc_context(style(light)):
        figure = Figure(figsize=(4.6 * len(plots), 3.2), layout="constrained")
        for plot, axes in zip(plots, np.atleast_1d(figure.subplots(1, len(plots))), strict=True):
            axes.set_title(plot.title, fontsize=10, loc="left")
            if plot.draw(axes, light):
                axes.legend(fontsize=8)
        figure.savefig(file, format="png", dpi=150)
    write_bytes(path, file.getvalue())


@dataclass(frozen=True)
class Curves(Plot):
    """Metrics over the steps of a run: those of every step raw and smoothed, occasional ones as dots.

    A metric with others of its name and _low and _high is drawn with these as its interval.
    """

    records: list[dict[str, Any]]  # of metrics.jsonl
    metrics: dict[str, str]  # name → label
    levels: dict[str, float]  # label → horizontal line to compare with
    is_log: bool = False

    def draw(self, axes: Axes, palette: Palette) -> bool:
        axes.set_xlabel("step")
        for (name, label), ink in zip(self.metrics.items(), cycle(INKS[2:]), strict=False):
            steps, values = series(self.records, name)
            low, high = (series(self.records, name + bound)[1] for bound in ("_low", "_high"))
            if 2 * len(steps) < len(self.records) or len(steps) < FEW_POINTS:
                axes.plot(steps, values, "o-", color=palette[ink], label=label, markersize=3, linewidth=1.2)
            else:
                thin = slice(None, None, len(steps) // MAX_POINTS + 1)
                axes.plot(steps[thin], values[thin], color=palette[ink], alpha=0.35, linewidth=0.8)
                axes.plot(steps[thin], smooth(values)[thin], color=palette[ink], label=label, linewidth=1.6)
            if len(low) == len(high) == len(values):
                axes.vlines(steps, low, high, color=palette[ink], alpha=0.6, linewidth=2.5)
        for i, (label, value) in enumerate(self.levels.items()):
            axes.axhline(value, color=palette["ink"], linestyle=("--", ":", "-.")[i % 3], linewidth=0.9, label=label)
        last = max(record["step"] for record in self.records)
        axes.set_xlim(-last / 50, last * 51 / 50)
        if self.is_log:
            axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.6g}")
        return len(self.metrics) + len(self.levels) > 1


@dataclass(frozen=True)
class Points(Plot):
    """Points on logarithmic axes, and lines through them: those of a group of points in its colour."""

    labels: tuple[str, str]  # of the axes
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]]  # label → x and y
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]

    legend_columns = 2  # labels are long

    def draw(self, axes: Axes, palette: Palette) -> bool:
        axes.set(xscale="log", yscale="log", xlabel=self.labels[0], ylabel=self.labels[1])
        inks = dict(zip(self.points, cycle(INKS[2:]), strict=False))
        for label, ink in inks.items():
            axes.plot(*self.points[label], "o", color=palette[ink], label=label, markersize=5)
        for label, line in self.lines.items():
            name = "_" if label in inks else label  # matplotlib's sign for no entry in the legend
            axes.plot(*line, "--", color=palette[inks.get(label, "ink")], label=name, linewidth=1)
        low, high = axes.get_xlim()  # between two powers of ten there may be no third
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
        axes.xaxis.set_major_formatter("{x:.0e}")
        axes.xaxis.set_minor_formatter("")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which("{x:,.4g}")
        axes.tick_params(axis="y", which="minor", labelsize=8)
        return True


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
