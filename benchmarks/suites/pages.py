"""The pages of a benchmark: report.md and report.html from its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from flowrl.score_table import ScoreRow, markdown, replace

CARDS = 24  # pictures in each section
HEADS = ("score", "what", "mean", "95 % interval", "prompts")


def lines(numbers: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any] | float | None]]:
    """All numbers of one column, flat, the headline first."""
    found: list[tuple[str, Mapping[str, Any] | float | None]] = []
    for name, value in numbers.items():
        if isinstance(value, Mapping) and "ci95" not in value:
            found += [(f"{name}: {inner}", number) for inner, number in value.items()]
        else:
            found.append((name, value))
    return found


def cells(value: Mapping[str, Any] | float | None) -> list[str]:
    """mean, interval and number of prompts as text."""
    if not isinstance(value, Mapping):
        return [_text(value), "", ""]
    low, high = value["ci95"]
    return [_text(value["mean"]), "–" if low is None else f"{_text(low)} to {_text(high)}", str(value["prompts"])]


def _text(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def table_lines(summary: Mapping[str, Any]) -> list[list[str]]:
    """One line per number of every column."""
    return [
        [column, name, *cells(value)] for column, numbers in summary["scores"].items() for name, value in lines(numbers)
    ]


def lead(summary: Mapping[str, Any]) -> str:
    """What was measured, in a sentence or two."""
    drawn = ", ".join(f"{key} {value}" for key, value in summary["drawn"].items() if value is not None)
    part = (
        ""
        if summary["complete"]
        else (
            " Other prompts, or fewer prompts or images, than the benchmark has: not comparable with published numbers."
        )
    )
    return (
        f"{summary['prompts']} prompts, {summary['images_per_prompt']} images each; "
        f"{drawn or 'images from elsewhere'}. Overall is the {summary['headline']}; intervals are bootstrap over "
        f"prompts.{part}"
    )


def write_pages(folder: Path, summary: Mapping[str, Any], rows: Sequence[ScoreRow]) -> None:
    """Write report.md and report.html, the latter with charts and with low and high images of each task."""
    from flowrl.pages import means_chart, render

    title, table = f"Benchmark {summary['benchmark']}", table_lines(summary)
    replace(folder / "report.md", f"# {title}\n\n{lead(summary)}\n\n{markdown(HEADS, table)}")
    sections, charts = [], []
    for column, numbers in summary["scores"].items():
        charts.append((column, means_chart({"overall": numbers["overall"], **numbers["tasks"]})))
        scored = [row for row in rows if row["scores"][column] is not None]
        low = first_of_each_task(scored, column)
        high = first_of_each_task([row for row in scored if row not in low], column, highest=True)
        for name, some in (("lowest", low), ("highest", high)):
            if some:
                cards = [_card(folder, row, column) for row in some]
                sections.append({"title": f"{column}: {name} of each task", "cards": cards})
    html = render(title=title, lead=lead(summary), heads=HEADS, lines=table, charts=charts, sections=sections)
    replace(folder / "report.html", html)


def first_of_each_task(rows: Sequence[ScoreRow], column: str, *, highest: bool = False) -> list[ScoreRow]:
    """At most CARDS rows, from the lowest score (or the highest) on, the tasks in turn: equal scores are common."""
    by_task: dict[str | None, list[ScoreRow]] = {}
    for row in rows:
        by_task.setdefault(row["tag"], []).append(row)
    ranked = [sorted(some, key=lambda row: row["scores"][column] or 0.0, reverse=highest) for some in by_task.values()]
    return [row for turn in zip_longest(*ranked) for row in turn if row is not None][:CARDS]


def _card(folder: Path, row: ScoreRow, column: str) -> dict[str, Any]:
    from flowrl.pages import card

    said = [row["tag"] or "", f"{row['image']}: {row['scores'][column]:.4f}", row["reasons"].get(column) or ""]
    return card(row["prompt"], (folder / row["image"], [line for line in said if line]))


def brief(summary: Mapping[str, Any]) -> list[str]:
    """The headline and the tasks of each column, as lines for a terminal."""
    found = []
    for column, numbers in summary["scores"].items():
        found.append(f"{column}, {numbers['missing']} of {summary['images']} images without a score")
        for name, value in lines({"overall": numbers["overall"], **numbers["tasks"]}):
            mean, interval, _ = cells(value)
            found.append(f"  {name:<24}{mean}   95 % interval {interval}")
    return found
