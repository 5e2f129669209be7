"""The pages of a benchmark: report.md and report.html from its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowrl.pages import card, render
from flowrl.score_table import ScoreRow, replace

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
    return [_text(value["mean"]), f"{_text(low)} to {_text(high)}", str(value["prompts"])]


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
    part = "" if summary["complete"] else " A part of the benchmark: not comparable with published numbers."
    return (
        f"{summary['prompts']} prompts, {summary['images_per_prompt']} images each; "
        f"{drawn or 'images from elsewhere'}. Intervals are bootstrap over prompts.{part}"
    )


def markdown(title: str, text: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A page with one table."""
    head = f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n"
    body = "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in rows)
    return f"# {title}\n\n{text}\n\n{head}{body}"


def write_pages(folder: Path, summary: Mapping[str, Any], rows: Sequence[ScoreRow]) -> None:
    """Write report.md and report.html, the latter with the best and the worst images of each column."""
    title, table = f"Benchmark {summary['benchmark']}", table_lines(summary)
    replace(folder / "report.md", markdown(title, lead(summary), HEADS, table))
    sections = []
    for column in summary["scores"]:
        scored = [row for row in rows if row["scores"][column] is not None]
        ranked = sorted(scored, key=lambda row: row["scores"][column] or 0.0)
        for name, some in ((f"{column}: lowest", ranked[:CARDS]), (f"{column}: highest", ranked[-CARDS:])):
            sections.append({"title": name, "cards": [_card(folder, row, column) for row in some]})
    html = render(title=title, lead=lead(summary), heads=HEADS, lines=table, sections=sections)
    replace(folder / "report.html", html)


def _card(folder: Path, row: ScoreRow, column: str) -> dict[str, Any]:
    said = [f"{row['image']}: {row['scores'][column]:.4f}"]
    if reason := row["reasons"].get(column):
        said.append(reason)
    return card(folder / row["image"], row["prompt"], said)


def brief(summary: Mapping[str, Any]) -> list[str]:
    """The headline and the tasks of each column, as lines for a terminal."""
    found = []
    for column, numbers in summary["scores"].items():
        found.append(f"{column}, {numbers['missing']} of {summary['images']} images without a score")
        for name, value in lines({"overall": numbers["overall"], **numbers["tasks"]}):
            mean, interval, _ = cells(value)
            found.append(f"  {name:<24}{mean}   95 % interval {interval}")
    return found
