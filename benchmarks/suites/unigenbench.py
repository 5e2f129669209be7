"""UniGenBench: test points of ten dimensions, each met or not (Wang et al. 2025, github.com/CodeGoat24/UniGenBench).

An image without a usable answer is left out, and the share of such images is reported beside every number. A
dimension's accuracy is micro: passed / asked over all images. The release defines no overall number: two are reported
here, the mean of the primary dimensions' accuracies and the micro average. Of a scorer that knows no test points, which
may stand beside, the mean over images is reported. Images lie in `<index>_<j>.png`.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.suites.suite import Numbers, Suite, means
from flowrl import score_table as table
from flowrl.errors import UserError
from flowrl.prompts import Prompt
from flowrl.score_table import ScoreRow
from flowrl.statistics import RESAMPLES, Estimate

FILE = "test_prompts_en.csv"
# Columns and keys of the English and of the Chinese files.
LANGUAGES = {
    "en": ("Testpoints", "Testpoint Description"),
    "zh": ("考点", "考点对应描述"),
}


def prompts(source: str | None) -> list[Prompt]:
    """Prompts with `testpoints` and `descriptions` from one of the released CSV files."""
    if source is None:
        raise UserError(
            f"unigenbench needs its prompt file; expected --prompts {FILE} (or _long, or _zh) from the repository "
            "CodeGoat24/UniGenBench"
        )
    path = Path(source)
    path = path / FILE if path.is_dir() else path
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}; expected one of UniGenBench's CSV files") from error
    return [_prompt(path, row) for row in rows]


def _prompt(path: Path, row: Mapping[str, str]) -> Prompt:
    for language, keys in LANGUAGES.items():
        text, points = (row.get(f"prompt_{language}") or "").strip(), row.get(f"sub_dims_{language}")
        if text and points:
            dims = _json(points, f"{path}, index {row.get('index')}")
            names, descriptions = ([str(entry).strip() for entry in dims.get(key, ())] for key in keys)
            if not names or len(names) != len(descriptions):
                raise UserError(f"{path}, index {row.get('index')}: expected as many test points as descriptions")
            if not str(row.get("index")).isdecimal():
                raise UserError(f"{path}: got the index {row.get('index')!r} of {text!r}; expected a whole number")
            metadata = {"prompt": text, "number": int(row["index"])}
            return Prompt(text, {**metadata, "testpoints": names, "descriptions": descriptions})
    raise UserError(f"{path} has the columns {', '.join(row)}; expected index, prompt_en and sub_dims_en (or _zh)")


def _json(text: str, where: str) -> dict[str, Any]:
    """The JSON of a cell. One row of the released long file lacks a comma between two strings; it is put back."""
    for attempt in (text, re.sub(r'"\s+"', '", "', text)):
        try:
            found = json.loads(attempt)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    raise UserError(f"{where}: the test points are no JSON object; restore the file")


def file(metadata: Mapping[str, Any], index: int) -> str:
    """Where an image lies."""
    return f"{metadata['number']}_{index}.png"


def primary(point: str) -> str:
    """The primary dimension of a test point: the text before its first hyphen."""
    return re.split(r"[-–]", point, maxsplit=1)[0].strip()


def verdicts(row: ScoreRow, column: str) -> dict[str, tuple[float, int]]:
    """(passed, asked) of an image: of each primary dimension and, where the scorer says them, of each test point.

    A scorer's parts are the shares that pass of each test point (a prompt may have one twice), or within each primary
    dimension; an image without a score has none.
    """
    found: dict[str, tuple[float, int]] = {}
    points = row["metadata"]["testpoints"]
    for dim in dict.fromkeys(map(primary, points)):
        asked = Counter(point for point in points if primary(point) == dim)
        shares = {point: table.number(row, column, point) for point in asked}
        if not any(map(math.isnan, shares.values())):
            found |= {point: (float(round(shares[point] * n)), n) for point, n in asked.items()}
            found[dim] = sum(found[point][0] for point in asked), asked.total()
        elif not math.isnan(share := table.number(row, column, dim)):
            found[dim] = float(round(share * asked.total())), asked.total()
    return found


def mean_of_accuracies(right: np.ndarray, total: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean over dimensions of (sum of right / sum of total), with the interval that resampling the prompts gives.

    right, total: (P, D) per prompt and dimension. Unlike tasks, dimensions share prompts, so prompts are drawn once for
    all of them. In a draw in which a dimension has no prompt, the mean is over the others.
    """
    used = total.sum(0) > 0
    if not used.any():
        return Estimate(math.nan, math.nan, math.nan)
    right, total = right[:, used], total[:, used]
    prompts = int((total.sum(1) > 0).sum())
    mean = float((right.sum(0) / total.sum(0)).mean())
    if prompts < 2:
        return Estimate(mean, math.nan, math.nan, prompts)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(right), np.full(len(right), 1 / len(right)), size=resamples)
    numbers = drawn @ total
    shares = np.divide(drawn @ right, numbers, out=np.full(numbers.shape, np.nan), where=numbers > 0)
    some = shares[~np.isnan(shares).all(1)]
    low, high = np.quantile(np.nanmean(some, axis=1), [0.025, 0.975])
    return Estimate(mean, float(low), float(high), prompts)


def numbers(rows: Sequence[ScoreRow], column: str) -> Numbers:
    """Mean of the primary dimensions, micro average, each primary dimension and test point; or a plain mean.

    Raises:
        UserError: not one image has a score.
    """
    found = [[verdicts(row, column) for row in group] for group in table.by_prompt(rows)]
    seen = sorted({name for images in found for image in images for name in image})
    if not seen and any(row["scores"][column] is not None for row in rows):
        return means(rows, column)
    if not seen:
        reason = next((text for row in rows if (text := row["reasons"].get(column))), None)
        raise UserError(
            f"{column!r} has no score of any image ({reason}); expected some; mend what stood in the way and run the "
            "step `score` again"
        )
    dims = [name for name in seen if primary(name) == name]

    def counts(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(P, names) passed and asked over the images of each prompt."""
        both = np.array([[[sum(image.get(name, (0, 0))[k] for image in images) for name in names] for images in found]
                         for k in (0, 1)], dtype=np.float64)  # fmt: skip
        return both[0], both[1]

    right, total = counts(dims)
    points = [name for name in seen if name not in dims]
    return {
        "overall": table.as_dict(mean_of_accuracies(right, total)),
        "micro": table.as_dict(mean_of_accuracies(right.sum(1, keepdims=True), total.sum(1, keepdims=True))),
        "tasks": {dim: table.as_dict(mean_of_accuracies(*counts([dim]))) for dim in dims},
        **({"test_points": {p: table.as_dict(mean_of_accuracies(*counts([p]))) for p in points}} if points else {}),
    }


SUITE = Suite(
    "unigenbench", 4, prompts, file, numbers, "unigenbench", size=600,
    headline="mean of the primary dimensions (of all images for a scorer without test points)",
)  # fmt: skip
