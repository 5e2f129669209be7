"""The numbers of `benchmarks.methods`: what each run reached at which cost, and how soon methods reach a target.

Score: the mean over all images of the evaluation, before, during and after training with the same settings and the
same noise, so that all points of a curve are one quantity. It is *not* the mean of the task means, which weighs tasks
with few prompts more; that is given beside it for the start and the end.

Intervals hold 95 %. One seed: bootstrap over prompts. Several seeds: mean +- t_{0.975, n-1} s / sqrt(n) of the n
values, which speaks of other seeds on these prompts.

Time to a target: the first evaluation at or above it, without interpolation; its median over seeds counts a run that
never gets there as infinitely late.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

import flowrl
from benchmarks.runs import SESSIONS
from benchmarks.shapes import finite
from flowrl.config import Config
from flowrl.errors import UserError
from flowrl.runlog import METRICS, TIMINGS, read_jsonl
from flowrl.schema import EvalConfig
from flowrl.statistics import Estimate, mean_ci, paired_diff_ci
from flowrl.summary import EvalRow, by_prompt, headline, names, pair_rows, read_rows, value

ENDS = 5  # updates averaged at each end of training for the diversity within groups
SAMPLING, TRAINING, IMAGES = "total/sampling_calls", "total/training_calls", "total/images"  # of metrics.jsonl


class Point(NamedTuple):
    """One evaluation: updates, seconds and model calls of training before it, and its score."""

    update: int
    seconds: float
    calls: int
    score: float


# -------------------------------------------------------------------------------------------------------------- one run
def score_name(section: EvalConfig) -> str | None:
    """Name of the score that methods are compared by: the first of eval.rewards; None if that is a bare name."""
    return None if isinstance(section.rewards, str) else next(iter(section.rewards))


def newest_score(metrics: Sequence[Mapping[str, Any]], section: EvalConfig) -> float | None:
    """The last evaluation in the log, or None."""
    key = f"eval/{score_name(section) or section.rewards}"
    return next((row[key] for row in reversed(metrics) if row.get(key) is not None), None)


def mean(rows: Sequence[EvalRow], kind: str, name: str) -> Estimate:
    """Mean over images, as the evaluations during training log it, with the bootstrap over prompts."""
    return mean_ci([[value(row, kind, name) for row in group] for group in by_prompt(rows).values()])


def gain(before: Sequence[EvalRow], after: Sequence[EvalRow], kind: str, name: str) -> Estimate:
    """Mean of after - before over the images that both have, from the same prompt and noise."""
    pairs = pair_rows(before, after)
    new = {id(old): row for old, row in pairs}
    groups = list(by_prompt(old for old, _ in pairs).values())
    return paired_diff_ci(
        [[value(row, kind, name) for row in group] for group in groups],
        [[value(new[id(row)], kind, name) for row in group] for group in groups],
    )


def read_run(folder: Path) -> dict[str, Any]:
    """The numbers of a finished run, from the files of its folder. UserError where they lack something."""
    metrics = read_jsonl(folder / METRICS)
    seconds: dict[int, Any] = {
        row["update"]: row.get("train_s") for row in read_jsonl(folder / TIMINGS)
    }  # last attempts
    before, after = (read_rows(folder, stage) for stage in ("before", "after"))
    metrics = [row for row in metrics if row["update"] > 0]
    if not metrics or not before or not after:
        raise UserError(
            f"{folder} ended without an update or an evaluation; expected both; enlarge --budget, in a new --out"
        )
    last = metrics[-1]
    absent = [key for key in (SAMPLING, TRAINING, IMAGES) if last.get(key) is None]
    absent += ["train_s"] if seconds.get(last["update"]) is None else []
    if absent:
        raise UserError(
            f"the log in {folder} lacks {', '.join(absent)}; expected the counters that this version of flowrl writes; "
            "run it again in a new --out"
        )

    def point(row: Mapping[str, Any], score: float | None) -> Point:
        calls = row[SAMPLING] + row[TRAINING]
        return Point(row["update"], seconds[row["update"]], calls, math.nan if score is None else score)

    name = names(before, "scores")[0]
    judge = next(iter(names(before, "judge")), None)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    base, final = mean(before, "scores", name), mean(after, "scores", name)
    points = [Point(0, 0.0, 0, base.mean)]
    points += [point(row, row[f"eval/{name}"]) for row in metrics[:-1] if f"eval/{name}" in row]
    points.append(point(last, final.mean))  # the last weights are measured after training
    _, train_s, calls, _ = points[-1]
    diversity = [row["images/diversity"] for row in metrics if row.get("images/diversity") is not None]
    return {
        "seed": summary["seed"],
        "score": name,
        "base": base,
        "final": final,
        "gain": gain(before, after, "scores", name),
        "judge": judge,
        "judge_gain": None if judge is None else gain(before, after, "judge", judge),
        "task_means": [headline(rows, "scores", name).mean for rows in (before, after)],
        "eval_diversity": [mean(rows, "stats", "diversity").mean for rows in (before, after)],
        "train_diversity": [_mean(diversity[:ENDS]), _mean(diversity[-ENDS:])],
        "updates": last["update"],
        "images": last[IMAGES],
        "calls": calls,
        "calls_per_image": calls / last[IMAGES],
        "train_s": train_s,
        "images_per_s": last[IMAGES] / train_s if train_s else math.nan,
        "wall_s": summary["wall_s"],
        "peak_rss_mb": summary["peak_rss_mb"],
        "prompts": len(by_prompt(before)),
        "alarms": summary["alarms"],
        "points": points,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


# ----------------------------------------------------------------------------------------------------------- over seeds
def over_seeds(estimates: Sequence[Estimate]) -> dict[str, Any]:
    """Mean, median, range and interval of the seeds' means; with one seed its own interval over prompts."""
    values = [estimate.mean for estimate in estimates]
    n, centre = len(values), statistics.fmean(values)
    if n == 1:
        low, high = estimates[0].low, estimates[0].high
    else:
        reach = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
        low, high = centre - reach, centre + reach
    return {
        "mean": centre, "ci95": [low, high], "median": statistics.median(values), "min": min(values),
        "max": max(values), "seeds": n, "interval": "bootstrap over prompts" if n == 1 else "t over seeds",
    }  # fmt: skip


def method_row(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One method over its seeds: intervals of scores, medians of all else."""

    def medians(key: str) -> list[float]:
        return [statistics.median(run[key][end] for run in found) for end in (0, 1)]

    def median(key: str) -> float:
        return statistics.median(run[key] for run in found)

    judged = [run["judge_gain"] for run in found if run["judge_gain"] is not None]
    return {
        "seeds": [run["seed"] for run in found],
        "base": over_seeds([run["base"] for run in found]),
        "final": over_seeds([run["final"] for run in found]),
        "gain": over_seeds([run["gain"] for run in found]),
        "judge_gain": over_seeds(judged) if judged else None,
        **{key: medians(key) for key in ("task_means", "eval_diversity", "train_diversity")},
        **{
            key: median(key)
            for key in ("updates", "images", "calls", "calls_per_image", "train_s", "images_per_s", "wall_s")
        },
        "runs": [
            {key: _plain(item) for key, item in run.items() if key not in ("score", "judge", "prompts")}
            for run in found
        ],
    }


def _plain(item: Any) -> Any:
    """Estimates and points as JSON has them."""
    if isinstance(item, Estimate):
        return {"mean": item.mean, "ci95": [item.low, item.high]}
    return [_plain(part) for part in item] if isinstance(item, list | Point) else item


# ----------------------------------------------------------------------------------------------------- time to a target
def first_at(points: Sequence[Point], target: float) -> Point | None:
    """The first evaluation at or above the target; a missing score is below any."""
    return next((point for point in points if point.score >= target), None)


def time_to_target(found: Mapping[str, Sequence[Mapping[str, Any]]], baseline: str) -> dict[str, Any]:
    """How soon every method reaches the mean final score of the baseline, and at what part of the baseline's cost.

    `of_budget`: over the seconds (calls) that the baseline was given; `of_own`: over those after which the baseline
    itself was first there. All are medians over seeds; None: not reached by half of the seeds.
    """
    target = statistics.fmean(run["final"].mean for run in found[baseline])
    first = {m: [first_at(run["points"], target) for run in group] for m, group in found.items()}
    rows = {}
    for method, group in found.items():
        row: dict[str, Any] = {
            "reached": sum(point is not None for point in first[method]),
            "of": len(group),
            "runs": [
                {"seed": run["seed"], **({} if point is None else point._asdict()), "reached": point is not None}
                for run, point in zip(group, first[method], strict=True)
            ],
        }
        for what in ("seconds", "calls"):
            spent = _median(first[method], what)
            budget = statistics.median(getattr(run["points"][-1], what) for run in found[baseline])
            own = _median(first[baseline], what)
            row[what] = spent if math.isfinite(spent) else None
            row[f"{what}_of_budget"] = _ratio(spent, budget)
            row[f"{what}_of_own"] = _ratio(spent, own)
        rows[method] = row
    return {"target": target, "seeds": [run["seed"] for run in found[baseline]], "methods": rows}


def _median(points: Sequence[Point | None], what: str) -> float:
    return statistics.median(math.inf if point is None else getattr(point, what) for point in points)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if math.isfinite(part) and math.isfinite(whole) and whole > 0 else None


# ---------------------------------------------------------------------------------------------------------- everything
def summarise(
    jobs: Sequence[tuple[str, str, Config]], out: Path, baselines: Sequence[str], failed: Mapping[str, int]
) -> dict[str, Any]:
    """All of `summary.json`, from the runs that are finished.

    jobs: (name, method, config) of each run. failed: exit codes of runs that did not end well.
    """
    import torch

    found: dict[str, list[dict[str, Any]]] = {}
    for _, method, config in jobs:
        if (Path(config.output_dir) / "summary.json").exists():
            found.setdefault(method, []).append(read_run(Path(config.output_dir)))
    config = jobs[0][2]
    e = config.eval
    assert e is not None  # `methods.jobs` sees to it
    wanted = {name for name, _, _ in jobs}
    sessions = [row for row in read_jsonl(out / SESSIONS) if row["run"] in wanted]
    some = next(iter(found.values()), [None])[0]
    summary = {
        "flowrl": flowrl.__version__,
        "benchmark": "methods",
        "policy": config.policy.path,
        "dtype": config.policy.dtype,
        "torch": torch.__version__,
        "budget_s": config.budget_s,
        "clock": config.clock,
        "threads": config.threads,
        "processes": sorted({row["processes"] for row in sessions}),
        "pinned": all(row["pinned"] for row in sessions),
        "prompts": config.prompts.model_dump(),
        "eval": e.model_dump(),
        "eval_prompts": some and some["prompts"],
        "score": some and some["score"],
        "judge": some and some["judge"],
        "seeds": sorted({config.seed for _, _, config in jobs}),
        "short": [
            f"{method}-{run['seed']}"
            for method, group in found.items()
            for run in group
            if run["train_s"] < (config.budget_s or 0)
        ],
        "unfinished": [name for name, _, c in jobs if not (Path(c.output_dir) / "summary.json").exists()],
        "failed": dict(failed),
        "methods": {method: method_row(group) for method, group in found.items()},
        "targets": {baseline: time_to_target(found, baseline) for baseline in baselines if baseline in found},
    }
    return finite(summary)
