"""Charts of the report as inline SVG that takes its colours from the page, so that it suits light and dark.

matplotlib draws with stand-in colours, which are then replaced by CSS variables; text stays text.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from flowrl.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

# Stand-in colour -> what the page calls it.
_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--soft)",
    "#030303": "var(--line)",
    "#040404": "var(--before)",
    "#050505": "var(--after)",
    "#060606": "var(--third)",
    "#070707": "var(--fourth)",
    "#080808": "var(--paper)",
}
INK, SOFT, LINE, BEFORE, AFTER, THIRD, FOURTH, PAPER = _COLOURS
CYCLE = (AFTER, THIRD, FOURTH, BEFORE, INK)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flowrl",  # the same data give the same file
    "text.parse_math": False,  # names of users may hold a dollar sign
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.linewidth": 0.8,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 5),
}


@dataclass(frozen=True)
class Series:
    """One curve: `y` (NaN = missing) over `x`, with an optional band of `y +- spread`."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None


def line_chart(series: Sequence[Series], *, smooth_over: int = 40) -> Markup:
    """Curves over updates; long ones are drawn faintly with a smoothed line on top."""
    with new_figure(3.4, 1.75) as figure:
        axes = figure.add_subplot()
        for colour, curve in zip(_cycled(len(series)), series, strict=True):
            x, y = np.asarray(curve.x, dtype=float), np.asarray(curve.y, dtype=float)
            if curve.spread is not None:
                spread = np.asarray(curve.spread, dtype=float)
                axes.fill_between(x, y - spread, y + spread, color=colour, alpha=0.14, linewidth=0)
            smooth = len(y) >= smooth_over
            marker = "o" if np.count_nonzero(np.isfinite(y)) < 8 else None
            axes.plot(x, y, color=colour, linewidth=0.7 if smooth else 1.3, alpha=0.4 if smooth else 1, marker=marker,
                      markersize=3, label=None if smooth else curve.name)  # fmt: skip
            if smooth:
                axes.plot(x, _smoothed(y, len(y) // 12), color=colour, linewidth=1.6, label=curve.name)
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(_ticks(6, integer=True))
        axes.yaxis.set_major_locator(_ticks(4))
        if len(series) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(0, 1.22), ncols=3, frameon=False, fontsize=7, handlelength=1,
                        columnspacing=1, borderpad=0)  # fmt: skip
        return svg(figure, ", ".join(curve.name for curve in series))


def interval_chart(rows: Sequence[tuple[str, Estimate, str]], *, zero: bool = False) -> Markup:
    """One line per stage: a dot at the mean, a bar over the interval. `rows`: (label, estimate, colour).

    zero: mark it, as for differences.
    """
    with new_figure(4.6, 0.35 + 0.26 * len(rows)) as figure:
        axes = figure.add_subplot()
        if zero:
            axes.axvline(0, color=SOFT, linewidth=1)
        for y, (_, estimate, colour) in enumerate(reversed(rows)):
            _interval(axes, estimate, y, colour, size=5.5)
        _horizontal(axes, [label for label, _, _ in reversed(rows)])
        return svg(figure, "; ".join(f"{label} {estimate.mean:.3f}" for label, estimate, _ in rows))


def task_chart(tasks: Sequence[tuple[str, Estimate, Estimate | None]]) -> Markup:
    """Per task: before and after with their intervals, one above the other. `tasks`: (name, before, after or None)."""
    with new_figure(8.4, 0.4 + 0.32 * len(tasks)) as figure:
        axes = figure.add_subplot()
        for y, (_, before, after) in enumerate(reversed(tasks)):
            _interval(axes, before, y + (0.13 if after else 0), BEFORE, size=4.5)
            if after:
                _interval(axes, after, y - 0.13, AFTER, size=4.5)
        _horizontal(axes, [name for name, _, _ in reversed(tasks)])
        return svg(figure, "score per task before and after")


def _interval(axes: Axes, estimate: Estimate, y: float, colour: str, size: float) -> None:
    if math.isfinite(estimate.low):
        axes.plot([estimate.low, estimate.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
    if math.isfinite(estimate.mean):
        axes.plot([estimate.mean], [y], "o", color=colour, markersize=size, markeredgecolor=PAPER, markeredgewidth=0.8)


def _horizontal(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.xaxis.set_major_locator(_ticks(4))
    for text in axes.get_yticklabels():
        text.set_color(INK)


def _ticks(count: int, integer: bool = False) -> MaxNLocator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=count, integer=integer, steps=[1, 2, 2.5, 5, 10])


def _cycled(count: int) -> Iterator[str]:
    return (CYCLE[index % len(CYCLE)] for index in range(count))


def _smoothed(y: np.ndarray, reach: int) -> np.ndarray:
    """At each point the straight line fitted to `reach` points on either side, NaN left out.

    In the middle that is the running mean; towards the ends, where one side is short, the mean would lag behind.
    """
    out = np.full(len(y), np.nan)
    for i in range(len(y)):
        at = np.arange(max(0, i - reach), min(len(y), i + reach + 1))
        at = at[np.isfinite(y[at])]
        if len(at):
            x, values = at - at.mean(), y[at]
            slope = (x @ values) / (x @ x) if len(at) > 1 else 0.0
            out[i] = values.mean() + slope * (i - at.mean())
    return out


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure, description: str) -> Markup:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # text stays text, and the reader's typeface draws it
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)  # would apply to the whole page
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # ids that every chart would repeat
    text = re.sub(r" font-family: [^;\"]*;?", "", text)  # the page chooses the typeface
    for stand_in, variable in _COLOURS.items():
        text = text.replace(stand_in, variable)
    text = re.sub(r'<svg ([^>]*?)width="[\d.]+pt" height="[\d.]+pt"|<svg ', r"<svg \1", text, count=1)
    label = Markup.escape(description)
    return Markup(text.replace("<svg ", f'<svg class="chart" role="img" aria-label="{label}" ', 1))
