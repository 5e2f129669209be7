"""Scores of images as a table on disk: one row per image, one column per reward, resumable at any point.

The table is a JSON-lines file, one object per image, beside a `.meta.json` file with the spec of each column. Rows are
appended while a scorer runs and the last row of an image counts, so a killed run loses at most one batch; `finish`
rewrites the file in the order of the images. A column belongs to one spec for ever: numbers of two versions of a reward
never end up under one name.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from flowrl.errors import UserError
from flowrl.runlog import read_jsonl
from flowrl.statistics import Estimate, task_mean_ci

if TYPE_CHECKING:
    from reward_models.protocol import RewardSpec

Spec = dict[str, Any]


class ScoreRow(TypedDict):
    """One scored image. A score of null is missing, and then `reasons` says why.

    `metadata` is what came with the prompt; `parts` holds the raw pieces of each column's score.
    """

    image: str
    prompt: str
    prompt_id: int
    tag: str | None
    sha256: str | None  # of the file; null where it could not be read
    scores: dict[str, float | None]
    parts: dict[str, dict[str, float | None]]
    reasons: dict[str, str]
    metadata: dict[str, Any]
    seed_index: NotRequired[int]  # which image of its prompt, where the listing says so


def meta_path(path: Path) -> Path:
    """Where the specs of a table's columns are."""
    return path.with_suffix(".meta.json")


def spec_dict(spec: RewardSpec) -> Spec:
    """A spec as JSON values: an unbounded end of the range is null."""
    found = asdict(spec)
    found["range"] = [end if math.isfinite(end) else None for end in spec.range]
    return found


def read(path: str | Path) -> tuple[dict[str, Spec], list[ScoreRow]]:
    """The specs of the columns and the rows, the last one of each image; no file is an empty table."""
    path = Path(path)
    columns: dict[str, Spec] = {}
    if meta_path(path).is_file():
        try:
            columns = json.loads(meta_path(path).read_text(encoding="utf-8"))["columns"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{meta_path(path)} is damaged ({error}); expected the specs of the scores in {path.name}; "
                "restore it, or move both files away and score again"
            ) from error
    rows: dict[str, Any] = {row.get("image") or str(i): row for i, row in enumerate(read_jsonl(path))}
    for name, row in rows.items():
        if not isinstance(row.get("prompt"), str) or not isinstance(row.get("scores"), dict):
            raise UserError(
                f"{path}: the row of {name!r} has no 'prompt' and 'scores'; expected a file that `flowrl score` wrote; "
                "name another file"
            )
    return columns, list(rows.values())


def open_columns(path: Path, specs: Mapping[str, Spec]) -> None:
    """Add columns to a table before their scores are written.

    Raises:
        UserError: the table has a column of this name from another version of the reward.
    """
    columns, _ = read(path)
    for name, spec in specs.items():
        if columns.get(name, spec) != spec:
            changed = [key for key in spec if spec[key] != columns[name].get(key)]
            raise UserError(
                f"{path} has scores of {name!r} with another {', '.join(changed)} "
                f"({', '.join(f'{columns[name].get(key)!r} there, {spec[key]!r} now' for key in changed)}); expected "
                "the same reward, because such scores cannot be compared; name another --out, or move this file and "
                f"{meta_path(path).name} away"
            )
    if columns | dict(specs) != columns:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(meta_path(path), json.dumps({"columns": columns | dict(specs)}, indent=1) + "\n")


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows at the end, on disk when this returns."""
    text = "".join(_line(row) for row in rows).encode()
    with open(path, "ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size and (file.seek(size - 1), file.read(1))[1] != b"\n":  # a line that a killed run left unfinished
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def finish(path: Path, rows: Sequence[ScoreRow]) -> None:
    """Rewrite the table with each image once, in this order."""
    replace(path, "".join(map(_line, rows)))


def make_folder(folder: Path) -> None:
    """Make a folder to write results to.

    Raises:
        UserError: it cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}; choose another --out") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"the folder {folder} cannot be written to; choose another --out")


def replace(path: Path, text: str) -> None:
    """Write a file in one step: a reader sees the old one or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


# -------------------------------------------------------------------------------------------------------------- numbers
def names(rows: Iterable[ScoreRow]) -> list[str]:
    """The columns, in the order of first occurrence."""
    return list(dict.fromkeys(name for row in rows for name in row["scores"]))


def number(row: ScoreRow, column: str, part: str | None = None) -> float:
    """A score (or a part of it); NaN where it is missing."""
    found = row["scores"].get(column) if part is None else row["parts"].get(column, {}).get(part)
    return math.nan if found is None else float(found)


def by_prompt(rows: Iterable[ScoreRow]) -> list[list[ScoreRow]]:
    """The rows of each prompt, in order of first occurrence."""
    grouped: dict[int, list[ScoreRow]] = {}
    for row in rows:
        grouped.setdefault(row["prompt_id"], []).append(row)
    return list(grouped.values())


def estimate(
    rows: Iterable[ScoreRow], column: str, part: str | None = None, *, by_task: bool = True, scale: float = 1.0
) -> Estimate:
    """Mean with its interval over prompts; of the task means (`by_task`) where every row has a tag, else over images.

    scale: what every score is multiplied by first.
    """
    groups = by_prompt(rows)
    tags = [group[0].get("tag") for group in groups]
    tasks = [str(tag) for tag in tags] if by_task and all(tags) else [""] * len(tags)
    return task_mean_ci([[scale * number(row, column, part) for row in group] for group in groups], tasks)


def as_dict(found: Estimate) -> dict[str, Any]:
    """mean, ci95 and prompts as JSON values."""
    mean, low, high = (value if math.isfinite(value) else None for value in (found.mean, found.low, found.high))
    return {"mean": mean, "ci95": [low, high], "prompts": found.prompts}


# -------------------------------------------------------------------------------------------------------------- formats
def to_csv(rows: Sequence[ScoreRow]) -> str:
    """The table with the columns image, prompt, tag, sha256, each score, its parts (`score/part`) and its reason."""
    columns = names(rows)
    parts = {name: dict.fromkeys(part for row in rows for part in row["parts"].get(name, ())) for name in columns}
    heads = [(name, part) for name in columns for part in (None, *parts[name])]
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(
        ["image", "prompt", "tag", "sha256", *(name if part is None else f"{name}/{part}" for name, part in heads),
         *(f"{name}: reason" for name in columns)]
    )  # fmt: skip
    for row in rows:
        numbers = [number(row, name, part) for name, part in heads]
        table.writerow(
            [row["image"], row["prompt"], row["tag"] or "", row["sha256"] or "",
             *("" if math.isnan(value) else repr(value) for value in numbers),
             *(row["reasons"].get(name, "") for name in columns)]
        )  # fmt: skip
    return file.getvalue()


def to_json(columns: Mapping[str, Spec], rows: Sequence[ScoreRow]) -> str:
    """Specs, means with intervals, and all rows."""
    means = {name: as_dict(estimate(rows, name)) for name in names(rows)}
    content = {"columns": dict(columns), "means": means, "rows": list(rows)}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in rows)
