"""GenEval from stored detections: no detector, no image, only the benchmark's results file and its decision.

Source: GenEval (arXiv 2310.11513). A results file has one JSON object per image: filename, tag, prompt, correct,
reason, metadata and details, the last two being JSON texts; details maps a class to its selected detections
``[x1, y1, x2, y2, score]``, best first. Official numbers come from files that the official detector wrote.

The official form does not say which colours were seen. Files written here have one more key, ``colors`` (JSON text:
class -> colours in the order of details, null where nobody looked), which other readers leave alone. Without it a row
that asks for a colour cannot be judged again, and says so; its stored ``correct`` still counts in ``summary``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .geneval import (
    Detection,
    Judgement,
    Options,
    check_metadata,
    image_and_prompt_shares,
    judge,
    range_of,
    record,
    result_of,
)
from .protocol import Metadata, RewardResult, RewardSpec

KINDS = ("geneval-stored", "geneval-stored-strict", "geneval-stored-soft")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
OFFICIAL = Options()
Row = dict[str, Any]


class _ColourNotStored(Exception):
    """A decision asked for a colour that the row does not hold."""


def row_of(
    filename: str, metadata: Mapping[str, Any], judgement: Judgement, colours: Mapping[Detection, str] | None = None
) -> Row:
    """One line of a results file: the official one and, if colours are given, ``colors``."""
    row = record(filename, metadata, judgement)
    if colours is not None:
        seen = {label: [colours.get(d) for d in judgement.objects[label]] for label in sorted(judgement.objects)}
        row["colors"] = json.dumps(seen)
    return row


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a results file, one JSON object per line."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: str | Path) -> list[Row]:
    """Read a results file.

    Raises:
        ValueError: no such file, or a line that is not one of a results file (named by its number).
    """
    rows: list[Row] = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"got results file {str(path)!r}, which cannot be read ({error}). Correct the path."
        ) from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            unpacked(row)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        rows.append(row)
    return rows


def unpacked(row: Mapping[str, Any]) -> tuple[dict[str, Any], list[Detection], dict[Detection, str] | None]:
    """Metadata, detections and colours (None: not stored) of a row, whose values may be JSON texts or what they say.

    Raises:
        ValueError: a key is absent or of another form.
    """

    def read(key: str) -> Any:
        return json.loads(row[key]) if isinstance(row[key], str) else row[key]

    try:
        metadata = dict(read("metadata")) if "metadata" in row else {k: v for k, v in row.items() if k != "details"}
        details = {label: [tuple(map(float, found)) for found in table] for label, table in read("details").items()}
        colours = read("colors") if "colors" in row else None
        found = {
            label: [Detection(label, (x1, y1, x2, y2), score) for x1, y1, x2, y2, score in table]
            for label, table in details.items()
        }
        metadata.setdefault("tag", row.get("tag"))
        seen = None
        if colours is not None:
            pairs = [(d, c) for label in found for d, c in zip(found[label], colours[label], strict=True)]
            seen = {d: c for d, c in pairs if c is not None}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"got a row of GenEval results that cannot be read ({type(error).__name__}: {error}), expected the keys "
            "metadata and details (class -> list of [x1, y1, x2, y2, score]), each an object or its JSON text. Give "
            "a line of a results.jsonl."
        ) from error
    return metadata, [d for table in found.values() for d in table], seen


def judge_row(row: Mapping[str, Any], options: Options = OFFICIAL) -> Judgement | str:
    """Decide again from the detections of a row, or say why that cannot be done.

    The detections were selected by the thresholds of the run that stored them; lower ones bring nothing back.

    Raises:
        ValueError: the row has another form.
    """
    metadata, detections, seen = unpacked(row)
    if fault := check_metadata(metadata):
        return fault

    def colours_of(objects: Sequence[Detection]) -> list[str]:
        if seen is None or any(found not in seen for found in objects):
            raise _ColourNotStored
        return [seen[found] for found in objects]

    try:
        return judge(detections, metadata, colours_of, options)
    except _ColourNotStored:
        return "the row does not hold the colours that were seen"


@dataclass(frozen=True)
class Summary:
    """GenEval's figures of a results file.

    Attributes:
        tasks: share of correct images for each task.
        overall: unweighted mean of the tasks.
        images, prompts: share of correct images; of prompts with at least one correct image.
        judged_again: of how many rows ``correct`` was decided again from the detections.
        changed: filenames of those whose decision differs from the stored one.
    """

    tasks: dict[str, float]
    overall: float
    images: float
    prompts: float
    judged_again: int
    changed: tuple[str, ...]


def summary(rows: Sequence[Mapping[str, Any]], options: Options | None = None) -> Summary:
    """GenEval's figures.

    Args:
        rows: of a results file.
        options: decide again with these, where the row allows it; None: take the stored ``correct``.

    Raises:
        ValueError: no rows, or one of another form.
    """
    if not rows:
        raise ValueError("got no rows, expected the lines of a results file. Generate and detect first.")
    correct: list[bool] = []
    changed: list[str] = []
    again = 0
    for row in rows:
        answer = None if options is None else judge_row(row, options)
        decided = answer.correct if isinstance(answer, Judgement) else bool(row["correct"])
        again += isinstance(answer, Judgement)
        if decided != bool(row["correct"]):
            changed.append(str(row.get("filename", "")))
        correct.append(decided)
    by_task: dict[str, list[bool]] = {}
    for row, right in zip(rows, correct, strict=True):
        by_task.setdefault(row["tag"], []).append(right)
    order = sorted(by_task, key=lambda tag: (TASKS.index(tag) if tag in TASKS else len(TASKS), tag))
    tasks = {tag: sum(by_task[tag]) / len(by_task[tag]) for tag in order}
    # the metadata is what identifies a prompt, as in the benchmark: two tasks may share the text
    images, prompts = image_and_prompt_shares([str(row["metadata"]) for row in rows], correct)
    return Summary(tasks, sum(tasks.values()) / len(tasks), images, prompts, again, tuple(changed))


class GenevalStoredReward:
    """GenEval's scores from detections that come with the metadata; images are not looked at.

    The metadata of an image is a row of a results file (see ``unpacked``), or GenEval metadata with ``details`` and
    perhaps ``colors``. An image without them, or one whose colours are not stored but asked for, is missing.

    Args:
        kind: "geneval-stored" (official decision), "geneval-stored-strict" or "geneval-stored-soft".
        flow_grpo_compat: the soft score as published, with its fault (see ``geneval.Options``).

    Raises:
        ValueError: unknown kind.
    """

    def __init__(self, kind: str = "geneval-stored", flow_grpo_compat: bool = False) -> None:
        self.kind, self.options = kind, Options(flow_grpo_compat=flow_grpo_compat)
        self.spec = RewardSpec(
            name=kind,
            version="1-compat" if flow_grpo_compat else "1",
            range=range_of(kind, KINDS, self.options),
            licence="Apache-2.0",
            preprocessing="none: detections come with the metadata",
        )

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; images and prompts are not read."""
        absent = "the metadata has no 'details' (stored detections)"
        answers = [judge_row(row, self.options) if "details" in row else absent for row in metadata]
        return result_of(answers, KINDS, self.kind)
