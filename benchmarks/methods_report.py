"""`table.md`, `curves.png` and `report.html` of `benchmarks.methods`, all from its summary."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flowrl import charts
from flowrl.report import number, signed
from flowrl.runlog import duration
from flowrl.summary import write_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE, CURVES, PAGE = "table.md", "curves.png", "report.html"
# Distinct for most colour-blind people, legible on light and dark paper; the dashes tell a second round apart.
PALETTE = ("#1667c7", "#c2790a", "#2a9d6f", "#bd4a9a", "#7b6fd0", "#c8443a", "#7f8a96")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
SIZE = (10.0, 4.2)  # inches
AXES = ((1, "seconds of training"), (2, "model calls of training (sampling + update)"))  # column of a point, label

Row = Sequence[str]


def write(out: Path, summary: Mapping[str, Any], *, pictures: bool = True) -> None:
    """Write `summary.json` and, once a run is finished, the table, and with `pictures` the curves and the page."""
    write_summary(out, summary)
    if not summary["methods"]:
        return
    (out / TABLE).write_text(markdown(summary), encoding="utf-8")
    if pictures:
        write_picture(out / CURVES, summary)
        (out / PAGE).write_text(page(summary), encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------- words
def header(summary: Mapping[str, Any]) -> list[str]:
    """What the numbers were measured with, as sentences."""
    e, p = summary["eval"], summary["prompts"]
    at_once = " or ".join(map(str, summary["processes"])) or "0"
    tasks = f" ({', '.join(e['tasks'])})" if e["tasks"] else ""
    clock = {"wall": "on the wall", "cpu": "of CPU time of the run's process"}[summary["clock"]]
    lines = [
        f"Base model {summary['policy']} in {summary['dtype']}, torch {summary['torch']}; trained on {p['source']}"
        + (f", {p['limit']} prompts" if p["limit"] else "")
        + ".",
        f"Budget: {summary['budget_s']:g} s of training {clock}; evaluation, samples and checkpoints are not counted. "
        f"Threads of a run: {summary['threads']}; runs at once: {at_once}"
        + (", each pinned to CPU cores of its own." if summary["pinned"] else ", not pinned to CPU cores."),
        f"Score: mean over images of {summary['score']}, {summary['eval_prompts']} prompts of {e['prompts']}{tasks} x "
        f"{e['images_per_prompt']} images, {e['steps']} ODE steps, guidance {e['guidance']:g}; the same settings "
        "before, during (every "
        + (f"{e['every_s']:g} s" if e["every_s"] else f"{e['every']} updates")
        + ") and after training, and for one seed the same noise in all methods. Final: the evaluation after training. "
        "Task means: mean of the tasks' means, base to final.",
        f"Seeds {', '.join(map(str, summary['seeds']))}. {intervals(summary)} Other columns are medians over seeds.",
    ]
    if summary["short"]:
        lines.append(f"Ended by their number of updates before the budget was spent: {', '.join(summary['short'])}.")
    if summary["unfinished"]:
        lines.append(f"Not finished and not in these numbers: {', '.join(summary['unfinished'])}.")
    if summary["failed"]:
        codes = ", ".join(f"{name} with code {code}" for name, code in summary["failed"].items())
        lines.append(f"Failed: {codes}.")
    return lines


def intervals(summary: Mapping[str, Any]) -> str:
    """How the intervals were made."""
    kinds = {row["final"]["interval"] for row in summary["methods"].values()}
    said = {
        "t over seeds": "Student's t over seeds, which speaks of other seeds on the same prompts",
        "bootstrap over prompts": "with one seed the bootstrap over prompts, which says nothing of other seeds",
    }
    return f"95 % intervals: {'; '.join(said[kind] for kind in sorted(kinds, reverse=True))}."


def _interval(found: Mapping[str, Any] | None, write: Any = number) -> str:
    if found is None:
        return "–"
    low, high = found["ci95"]
    return write(found["mean"]) + ("" if low is None else f" [{write(low)}, {write(high)}]")


def _change(ends: Sequence[float | None]) -> str:
    return f"{number(ends[0])} → {number(ends[1])}"


def score_rows(summary: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Head and cells of the first table, best final score first."""
    head = ("method", "seeds", "base", "final", "median (min to max)", "gain", f"{summary['judge'] or 'judge'} gain",
            "task means", "updates", "images", "train s")  # fmt: skip
    rows: list[Row] = []
    for method, m in sorted(summary["methods"].items(), key=lambda item: -(item[1]["final"]["mean"] or 0)):
        f = m["final"]
        rows.append((
            method, str(len(m["seeds"])), number(m["base"]["mean"]), _interval(f),
            f"{number(f['median'])} ({number(f['min'])} to {number(f['max'])})", _interval(m["gain"], signed),
            _interval(m["judge_gain"], signed), _change(m["task_means"]), number(m["updates"], 0),
            number(m["images"], 0), number(m["train_s"], 0),
        ))  # fmt: skip
    return head, rows


def cost_rows(summary: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Head and cells of the second table: diversity and what an image costs."""
    head = ("method", "diversity, evaluation", "diversity, training groups", "calls", "calls per image", "images per s",
            "wall with evaluation")  # fmt: skip
    rows: list[Row] = [
        (
            method, _change(m["eval_diversity"]), _change(m["train_diversity"]), number(m["calls"], 0),
            number(m["calls_per_image"], 2), number(m["images_per_s"], 2), duration(m["wall_s"]),
        )
        for method, m in summary["methods"].items()
    ]  # fmt: skip
    return head, rows


def target_rows(found: Mapping[str, Any], baseline: str) -> tuple[Row, list[Row]]:
    """Head and cells of a time-to-target table: the baseline itself first, then the soonest."""
    head = ("method", "reached", "seconds", "of its budget", "of its own time", "calls", "of its calls",
            "of its own calls")  # fmt: skip

    def order(item: tuple[str, Mapping[str, Any]]) -> tuple[bool, bool, float]:
        return item[0] != baseline, item[1]["seconds"] is None, item[1]["seconds"] or 0.0

    rows: list[Row] = []
    for method, m in sorted(found["methods"].items(), key=order):
        cells = [method, f"{m['reached']} of {m['of']}"]
        for what in ("seconds", "calls"):
            if m[what] is None:
                cells += ["not reached", "–", "–"]
            else:
                cells += [number(m[what], 0), _times(m[f"{what}_of_budget"]), _times(m[f"{what}_of_own"])]
        rows.append(tuple(cells))
    return head, rows


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f} x"


def target_note(found: Mapping[str, Any], baseline: str) -> str:
    """What a time-to-target table means."""
    return (
        f"Target {number(found['target'])}: the mean over seeds of {baseline}'s final scores. Time is that of the "
        "first evaluation at or above it, nothing interpolated; medians over seeds, a run that never reaches it "
        f"counting as infinitely late. Parts of {baseline}'s whole budget, and of the time (calls) after which "
        f"{baseline} itself was first there."
    )


def markdown(summary: Mapping[str, Any]) -> str:
    """`table.md`."""
    parts = ["# Methods side by side", "\n".join(f"* {line}" for line in header(summary))]
    parts += [_markdown_table(*score_rows(summary)), _markdown_table(*cost_rows(summary))]
    for baseline, found in summary["targets"].items():
        parts += [f"## Time to {baseline}'s final score", target_note(found, baseline)]
        parts.append(_markdown_table(*target_rows(found, baseline)))
    return "\n\n".join(parts) + "\n"


def _markdown_table(head: Row, rows: Sequence[Row]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


# -------------------------------------------------------------------------------------------------------------- picture
def curve(runs: Sequence[Mapping[str, Any]], column: int) -> tuple[np.ndarray, np.ndarray]:
    """(x, scores of each seed at x): x are all places where a seed was evaluated, as far as all seeds got.

    Between two evaluations a seed's score lies on the line that joins them; that is for the eye, no table uses it.
    """
    found = [np.array([p for p in run["points"] if p[3] is not None], dtype=float) for run in runs]
    x = np.unique(np.concatenate([points[:, column] for points in found]))
    x = x[x <= min(points[-1, column] for points in found)]
    return x, np.stack([np.interp(x, points[:, column], points[:, 3]) for points in found])


def draw(figure: Figure, summary: Mapping[str, Any], soft: str, line: str) -> None:
    """Score against seconds and against calls: the mean over seeds, from the lowest to the highest of them as a band.

    soft, line: colours of notes and of the grid.
    """
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (column, label) in zip(panels, AXES, strict=True):
        for i, (method, m) in enumerate(summary["methods"].items()):
            colour, dash = PALETTE[i % len(PALETTE)], DASHES[i // len(PALETTE) % len(DASHES)]
            x, scores = curve(m["runs"], column)
            axes.plot(x, scores.mean(0), color=colour, linestyle=dash, linewidth=1.6, label=method)
            if len(scores) > 1:
                axes.fill_between(x, scores.min(0), scores.max(0), color=colour, alpha=0.13, linewidth=0)
        highest = max((found["target"] for found in summary["targets"].values()), default=0.0)
        for i, (baseline, found) in enumerate(summary["targets"].items()):
            above = found["target"] == highest  # the others are written below their lines, as targets may be close
            axes.axhline(found["target"], color=soft, linewidth=0.8, linestyle=DASHES[1 + i % 2])
            axes.annotate(f"final {baseline}", (0, found["target"]), xytext=(3, 2 if above else -2), fontsize=6.5,
                          textcoords="offset points", va="bottom" if above else "top", color=soft)  # fmt: skip
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.grid(axis="y", color=line, linewidth=0.6)
        axes.set_axisbelow(True)
    panels[0].set_ylabel(f"score ({summary['score']})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)


def write_picture(path: Path, summary: Mapping[str, Any]) -> None:
    """`curves.png`, on white."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    plain: dict[Any, Any] = {
        "font.size": 8,
        "text.parse_math": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(plain):
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure, summary, soft="#68727e", line="#dfe3e8")
        figure.savefig(path, dpi=150)


def chart(summary: Mapping[str, Any]) -> Markup:
    """The same as inline SVG in the colours of the page."""
    with charts.new_figure(*SIZE) as figure:
        draw(figure, summary, soft=charts.SOFT, line=charts.LINE)
        return charts.svg(figure, f"score against seconds and calls: {', '.join(summary['methods'])}")


# ----------------------------------------------------------------------------------------------------------------- page
PAGE_SOURCE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Methods side by side: flowrl</title>
{{ style }}
</head>
<body>
<h1>Methods side by side</h1>
<p class="meta">{{ methods }} method{{ 's' if methods != 1 }} on {{ policy }}, {{ budget }} of training each</p>
{% macro table(content) %}<div class="card scroll" style="margin-top: 12px"><table>
<tr>{% for cell in content[0] %}<th class="{{ 'n' if not loop.first }}">{{ cell }}</th>{% endfor %}</tr>
{% for row in content[1] %}
<tr>{% for cell in row %}<td class="{{ 'n' if not loop.first }}">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endmacro %}
{% if missing %}
<div class="banner alarm"><b>Not complete.</b> Not finished: {{ missing | join(', ') }}.</div>
{% endif %}
<h2>Result</h2>
{{ table(scores) }}
<h2>Curves</h2>
<p class="lead">Mean over seeds; the band goes from the lowest to the highest seed. Level lines: the targets below.</p>
<div class="card">{{ chart }}</div>
{% for baseline, note, content in targets %}
<h2>Time to {{ baseline }}'s final score</h2>
<p class="lead">{{ note }}</p>
{{ table(content) }}
{% endfor %}
<h2>Cost and diversity</h2>
<p class="lead">A call is one latent through the model once. Diversity: that of the images of one prompt in the judge's
features, at the start → at the end of training.</p>
{{ table(costs) }}
<h2>How it was measured</h2>
<ul>{% for line in facts %}<li>{{ line }}</li>{% endfor %}</ul>
{% if alarms %}
<h2>Alarms</h2>
<ul>{% for run, text in alarms %}<li><b>{{ run }}</b>: {{ text }}</li>{% endfor %}</ul>
{% endif %}
<footer>Made by <code>flowrl bench methods</code>; every run has a report of its own in its folder.</footer>
</body>
</html>
"""


def page(summary: Mapping[str, Any]) -> str:
    """`report.html`: one self-contained page; all text from outside is escaped by the template."""
    loader = PackageLoader("flowrl")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    run_page, _, _ = loader.get_source(pages, "report.html.j2")  # its style is the house's
    style = re.search(r"<style>.*?</style>", run_page, re.DOTALL)
    assert style is not None
    return pages.from_string(PAGE_SOURCE).render(
        style=Markup(pages.from_string(style[0]).render(small_pictures=False)),
        methods=len(summary["methods"]),
        policy=summary["policy"],
        budget=duration(summary["budget_s"]),
        missing=summary["unfinished"],
        scores=score_rows(summary),
        costs=cost_rows(summary),
        chart=chart(summary),
        targets=[(b, target_note(found, b), target_rows(found, b)) for b, found in summary["targets"].items()],
        facts=header(summary),
        alarms=[
            (f"{method}-{run['seed']}", text)
            for method, m in summary["methods"].items()
            for run in m["runs"]
            for text in run["alarms"]
        ],
    )  # fmt: skip
