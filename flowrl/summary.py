"""`summary.json`: the numbers of a run under stable keys, so that people and scripts can compare runs.

They are computed from evaluation rows, one per image, as written to `eval_before.jsonl`, `eval_before_guided.jsonl` and
`eval_after.jsonl` (see `EvalRow`). A headline is the mean of the task means where every row names its task (`tag`), as
GenEval defines it, and the mean over images otherwise; intervals are bootstrap over prompts, gains are paired on
(prompt, seed). What was not measured is null; no key ever disappears.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from flowrl.runlog import read_jsonl
from flowrl.statistics import Estimate, paired_diff_ci, task_mean_ci

FILE = "summary.json"
ROW_FILES = {stage: f"eval_{stage}.jsonl" for stage in ("before", "before_guided", "after")}


class EvalRow(TypedDict):
    """One evaluated image. `scores` are the rewards of `eval.rewards`, `judge` the held-out ones, null = missing."""

    prompt: str
    prompt_id: int | str
    tag: str | None
    seed_index: int
    scores: dict[str, float | None]
    judge: dict[str, float | None]
    path: str | None  # the saved PNG, relative to the run folder
    stats: NotRequired[dict[str, float | None]]  # saturation, sharpness, dark_fraction, diversity (that of its prompt)


class Cost(TypedDict):
    """Model calls of the training (one latent through the model once; guidance counts 2) and what they made."""

    images: int
    sampling_calls: int
    training_forwards: int
    training_backwards: int


def build_summary(
    *,
    method: str,
    policy: str,
    seed: int,
    updates: int,
    wall_s: float,
    peak_rss_mb: float,
    cost: Cost,
    eval_settings: Mapping[str, Any] | None,
    before: Sequence[EvalRow] = (),
    before_guided: Sequence[EvalRow] = (),
    after: Sequence[EvalRow] = (),
    on_policy_ratio_max_dev: float | None = None,
    alarms: Sequence[str] = (),
) -> dict[str, Any]:
    """All of `summary.json` as plain JSON values.

    `eval_settings`: `split`, `steps` and `guidance` of the evaluation, or None if there was none. `updates`: updates
    done. `alarms`: sentences. Empty rows (a run that stopped early, no guided baseline) give null.
    """
    from flowrl import __version__

    calls = cost["sampling_calls"] + cost["training_forwards"]
    return _jsonable(
        {
            "flowrl": __version__,
            "method": method,
            "policy": policy,
            "seed": seed,
            "updates": updates,
            "wall_s": round(wall_s, 1),
            "peak_rss_mb": round(peak_rss_mb),
            "cost": {**cost, "calls_per_image": calls / cost["images"] if cost["images"] else None},
            "eval": None if eval_settings is None else _evaluation(eval_settings, before, before_guided, after),
            "on_policy_ratio_max_dev": on_policy_ratio_max_dev,
            "alarms": list(alarms),
        }
    )


def _evaluation(
    settings: Mapping[str, Any], before: Sequence[EvalRow], guided: Sequence[EvalRow], after: Sequence[EvalRow]
) -> dict[str, Any]:
    rows = before or after
    prompts = {row["prompt_id"] for row in rows}
    return {
        "split": settings["split"],
        "prompts": len(prompts),
        "images_per_prompt": max((row["seed_index"] for row in rows), default=-1) + 1,
        "steps": settings["steps"],
        "guidance": settings["guidance"],
        "before": measure(before),
        "before_guided": measure(guided),
        "after": measure(after),
        "paired": gains(before, after),
    }


def measure(rows: Sequence[EvalRow]) -> dict[str, Any] | None:
    """Mean and interval of every score and judge, and the diversity: one stage of the evaluation. No rows: None."""
    if not rows:
        return None
    return {
        **{name: _as_dict(headline(rows, "scores", name), "mean") for name in names(rows, "scores")},
        "held_out": {name: _as_dict(headline(rows, "judge", name), "mean") for name in names(rows, "judge")},
        "diversity": headline(rows, "stats", "diversity").mean,
    }


def gains(before: Sequence[EvalRow], after: Sequence[EvalRow]) -> dict[str, Any] | None:
    """Paired differences (after - before) of every score and judge that both stages have. One stage missing: None."""
    if not before or not after:
        return None

    def of(kind: str) -> dict[str, Any]:
        common = [name for name in names(before, kind) if name in names(after, kind)]
        return {name: _as_dict(paired(before, after, kind, name), "mean_diff") for name in common}

    return {**of("scores"), "held_out": of("judge")}


def names(rows: Iterable[EvalRow], kind: str) -> list[str]:
    """Names that occur under `kind` ("scores", "judge", "stats"), in the order of first occurrence."""
    return list(dict.fromkeys(name for row in rows for name in _part(row, kind)))


def value(row: EvalRow, kind: str, name: str) -> float:
    """One number of a row; NaN where it is missing."""
    number = _part(row, kind).get(name)
    return math.nan if number is None else float(number)


def by_prompt(rows: Iterable[EvalRow]) -> dict[int | str, list[EvalRow]]:
    """The rows of each prompt, in order of first occurrence."""
    grouped: dict[int | str, list[EvalRow]] = {}
    for row in rows:
        grouped.setdefault(row["prompt_id"], []).append(row)
    return grouped


def headline(rows: Sequence[EvalRow], kind: str, name: str) -> Estimate:
    """Mean of the task means (mean over images if any row has no task) with its interval over prompts."""
    groups = list(by_prompt(rows).values())
    return task_mean_ci([[value(row, kind, name) for row in group] for group in groups], _tasks(groups))


def paired(before: Sequence[EvalRow], after: Sequence[EvalRow], kind: str, name: str) -> Estimate:
    """Paired gain of one score over the (prompt, seed) pairs that both stages have, weighted as `headline`."""
    pairs = pair_rows(before, after)
    groups = list(by_prompt(old for old, _ in pairs).values())
    new = {_key(row): row for _, row in pairs}
    return paired_diff_ci(
        [[value(row, kind, name) for row in group] for group in groups],
        [[value(new[_key(row)], kind, name) for row in group] for group in groups],
        _tasks(groups),
    )


def pair_rows(before: Sequence[EvalRow], after: Sequence[EvalRow]) -> list[tuple[EvalRow, EvalRow]]:
    """(before, after) of every (prompt, seed) that occurs in both, in the order of `before`."""
    new = {_key(row): row for row in after}
    return [(row, new[_key(row)]) for row in before if _key(row) in new]


def read_rows(folder: str | Path, stage: str) -> list[EvalRow]:
    """The evaluation rows of a run folder; `stage` is "before", "before_guided" or "after"; no file is no rows."""
    return read_jsonl(Path(folder) / ROW_FILES[stage])  # type: ignore[return-value]


def write_summary(folder: str | Path, summary: Mapping[str, Any]) -> Path:
    """Write `summary.json` in one step: a reader sees the old file or the new one, never half of it."""
    path = Path(folder) / FILE
    part = path.with_suffix(".part")
    part.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path


def _part(row: EvalRow, kind: str) -> Mapping[str, float | None]:
    return cast(Mapping[str, Any], row).get(kind) or {}


def _key(row: EvalRow) -> tuple[int | str, int]:
    return row["prompt_id"], row["seed_index"]


def _tasks(groups: Sequence[Sequence[EvalRow]]) -> list[str]:
    tags = [group[0].get("tag") for group in groups]
    return [str(tag) for tag in tags] if all(tags) else [""] * len(tags)


def _as_dict(estimate: Estimate, label: str) -> dict[str, Any]:
    return {label: estimate.mean, "ci95": [estimate.low, estimate.high]}


def _jsonable(item: Any) -> Any:
    """NaN and infinity become null: strict JSON has neither."""
    if isinstance(item, Mapping):
        return {key: _jsonable(part) for key, part in item.items()}
    if isinstance(item, list | tuple):
        return [_jsonable(part) for part in item]
    return None if isinstance(item, float) and not math.isfinite(item) else item
