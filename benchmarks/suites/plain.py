"""Suites that are prompts and nothing else: PartiPrompts, DrawBench, and any prompt source.

They have no metric of their own: any scorer, its mean over images and the mean of each category, with intervals.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.suites.suite import Numbers, Suite, grouped, means
from flowrl.errors import UserError
from flowrl.prompts import Prompt, load_prompts
from flowrl.score_table import ScoreRow


def parti(source: str | None) -> list[Prompt]:
    """PartiPrompts.tsv: 1,632 prompts of 12 categories and 11 challenges. No quoting: prompts hold bare quotes."""
    if source is None:
        raise UserError(
            "parti needs its prompts; expected --prompts PartiPrompts.tsv, from the repository google-research/parti"
        )
    path = Path(source) / "PartiPrompts.tsv" if Path(source).is_dir() else Path(source)
    rows = _table(path, delimiter="\t", quoting=csv.QUOTE_NONE, wanted=("Prompt", "Category", "Challenge"))
    return [
        _numbered(n, row["Prompt"], {"tag": row["Category"], "challenge": row["Challenge"]})
        for n, row in enumerate(rows)
    ]


def drawbench(source: str | None) -> list[Prompt]:
    """DrawBench's 200 prompts: a CSV with Prompts and Category, or a text file; repeated lines count once."""
    if source is None:
        raise UserError(
            "drawbench needs its prompt file, which carries no licence and so is not in the box; expected --prompts "
            "drawbench.csv (columns Prompts, Category) or a text file with one prompt per line"
        )
    if Path(source).suffix == ".csv":
        rows = _table(Path(source), delimiter=",", quoting=csv.QUOTE_MINIMAL, wanted=("Prompts", "Category"))
        pairs = [(row["Prompts"].strip(), {"tag": row["Category"].strip()}) for row in rows]
    else:
        pairs = [(prompt.text, {}) for prompt in load_prompts(source)]
    return [_numbered(n, text, more) for n, (text, more) in enumerate(dict(pairs).items())]


def any_source(source: str | None) -> list[Prompt]:
    """Any prompt source of flowrl; a key or column `tag` or `category` names the category."""
    if source is None:
        raise UserError("prompts needs a source; expected --prompts FILE, shapes:test or hub:dataset#column")
    found = []
    for number, prompt in enumerate(load_prompts(source)):
        tag = prompt.metadata.get("tag", prompt.metadata.get("category"))
        found.append(_numbered(number, prompt.text, {**prompt.metadata, **({} if tag is None else {"tag": tag})}))
    return found


def _numbered(number: int, text: str, more: Mapping[str, Any]) -> Prompt:
    return Prompt(text.strip(), {**more, "prompt": text.strip(), "number": number})


def _table(path: Path, *, delimiter: str, quoting: Any, wanted: Sequence[str]) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter=delimiter, quoting=quoting))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}; expected a table with {', '.join(wanted)}") from error
    if not rows or any(name not in rows[0] for name in wanted):
        raise UserError(
            f"{path} has the columns {', '.join(map(str, rows[0] if rows else ()))}; expected {', '.join(wanted)}"
        )
    for number, row in enumerate(rows, start=1):
        if not all((row[name] or "").strip() for name in wanted):
            raise UserError(f"{path}, row {number}: got {row}; expected a text under each of {', '.join(wanted)}")
    return rows


def file(metadata: Mapping[str, Any], index: int) -> str:
    """Where an image lies."""
    return f"{metadata['number']:05d}_{index:02d}.png"


def numbers(rows: Sequence[ScoreRow], column: str) -> Numbers:
    """Mean over images, of each category and, where prompts have one, of each challenge."""
    challenges = grouped(rows, column, [row["metadata"].get("challenge") for row in rows])
    return means(rows, column) | ({"challenges": challenges} if challenges else {})


PARTI_SUITE = Suite("parti", 1, parti, file, numbers, size=1632)
DRAWBENCH = Suite("drawbench", 4, drawbench, file, numbers, size=200)
PROMPTS = Suite("prompts", 4, any_source, file, numbers)
