"""The HPSv2 benchmark: four styles of 800 prompts, one image each (Wu et al. 2023, arXiv 2306.09341).

A style's number is its mean score times 100, with the population standard deviation of the means of consecutive groups
of 80 images (of first ones, if there are more of a prompt); the average is the mean of all scores times 100. Images lie
in `<style>/<index:05d>.png` (the original writes .jpg, which is read, too). A missing image is an error here: the
original skips it, which shifts the groups.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.suites.sources import fetch
from benchmarks.suites.suite import Numbers, Suite, means
from flowrl import score_table as table
from flowrl.errors import UserError
from flowrl.prompts import Prompt
from flowrl.score_table import ScoreRow

STYLES = ("anime", "concept-art", "paintings", "photo")
GROUP = 80
SOURCE = "hub:zhwang/HPDv2/benchmark"


def prompts(source: str | None) -> list[Prompt]:
    """The prompts of each style, from `<source>/<style>.json` (a list of texts)."""
    found = []
    for style in STYLES:
        path = fetch(source or SOURCE, f"{style}.json")
        try:
            texts = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: {error}; expected a JSON list of prompts") from error
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{path}: expected a JSON list of prompts")
        for number, text in enumerate(map(str.strip, texts)):
            found.append(Prompt(text, {"prompt": text, "tag": style, "style": style, "number": number}))
    return found


def file(metadata: Mapping[str, Any], index: int) -> str:
    """Where an image lies; the benchmark has one of each prompt, further ones get a suffix."""
    extra = f"_{index}" if index else ""
    return f"{metadata['style']}/{metadata['number']:05d}{extra}.png"


def group_std(values: Sequence[float], size: int = GROUP) -> float:
    """Population std of the means of consecutive groups of `size` (the last may be smaller); NaN left out of a mean.

    Raises:
        ValueError: no value.
    """
    if not len(values):
        raise ValueError("got no scores, expected at least one; score the style first")
    groups = [np.asarray(values[start : start + size], dtype=np.float64) for start in range(0, len(values), size)]
    means = [float(np.nanmean(group)) for group in groups if not np.isnan(group).all()]
    return float(np.std(means)) if means else math.nan


def numbers(rows: Sequence[ScoreRow], column: str) -> Numbers:
    """100 x scores: overall, each style, and the std over groups of 80 of each style."""
    styles = list(dict.fromkeys(row["tag"] for row in rows))
    ordered = {
        style: sorted(
            (row for row in rows if row["tag"] == style and not row.get("seed_index")),
            key=lambda row: row["metadata"]["number"],
        )
        for style in styles
    }
    return {
        **means(rows, column, scale=100.0),
        "std_of_groups_of_80": {
            str(style): _finite(group_std([100 * table.number(row, column) for row in some]))
            for style, some in ordered.items()
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


SUITE = Suite("hpsv2", 1, prompts, file, numbers, "hpsv2.1", size=3200, headline="100 x mean of all scores")
