"""Means with confidence intervals for scores of images that come in groups of one prompt.

Images of one prompt share its difficulty, so they are not independent. The bootstrap therefore resamples *prompts*,
keeps all images of a drawn prompt together (cluster bootstrap; Davison & Hinkley 1997, section 3.8) and takes the
percentile interval. Everything is seeded: the same scores give the same interval.

Scores come as one sequence of numbers per prompt; the sequences may differ in length, and NaN is a missing score: it is
left out of sums and of denominators. Where a task has a single prompt, that task adds no width to the interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
Scores = Sequence[Sequence[float] | np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval; NaN where there is nothing to estimate (no score, or an interval from one prompt).

    `prompts`: how many prompts had a score; with fewer than six no interval means much (a sign test of five equal signs
    still has p = 2 / 32 > 0.05).
    """

    mean: float
    low: float
    high: float
    prompts: int = 0

    def excludes(self, value: float) -> bool:
        """Whether the interval lies wholly above or wholly below `value` (False for a NaN interval)."""
        return self.low > value or self.high < value


def mean_ci(scores: Scores, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean over all images, with the interval that resampling the prompts gives.

    `scores`: one sequence of image scores per prompt, any units. Statistic: sum of scores / number of scores.
    """
    return task_mean_ci(scores, [""] * len(scores), level=level, resamples=resamples, seed=seed)


def task_mean_ci(
    scores: Scores, tasks: Sequence[str], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """GenEval's headline: the mean over images within each task, then the plain mean over tasks.

    `tasks`: the task of each prompt, as long as `scores`. Prompts are resampled within their task, so every task keeps
    its share. A task without any score is left out. Source: Ghosh et al. 2023 (GenEval), the "overall score".
    """
    _check(scores, tasks, level, resamples)
    sums, counts = _totals(scores)
    labels = np.asarray(tasks)
    rng = np.random.default_rng(seed)
    means, draws = [], []
    widest = used = 0
    for task in sorted(set(tasks)):
        rows = np.flatnonzero((labels == task) & (counts > 0))  # a prompt without a score is no unit of the sample
        if not len(rows):
            continue
        widest, used = max(widest, len(rows)), used + len(rows)
        # A bootstrap sample only matters through how often each prompt was drawn: (resamples, prompts of the task).
        drawn = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=resamples)
        means.append(sums[rows].sum() / counts[rows].sum())
        draws.append((drawn @ sums[rows]) / (drawn @ counts[rows]))
    if not means:
        return Estimate(math.nan, math.nan, math.nan)
    mean = float(np.mean(means))
    if widest < 2:
        return Estimate(mean, math.nan, math.nan, used)  # one prompt says nothing about other prompts
    tail = (1 - level) / 2
    low, high = np.quantile(np.mean(draws, axis=0), [tail, 1 - tail])
    return Estimate(mean, float(low), float(high), used)


def paired_diff_ci(
    before: Scores,
    after: Scores,
    tasks: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of `after - before`, image by image, with the interval over prompts.

    `before[p][k]` and `after[p][k]` must be the same prompt from the same noise, so that what the two have in common
    cancels. A pair with a missing half is left out. With `tasks` the statistic is the mean of the task means.
    """
    if len(before) != len(after):
        raise ValueError(
            f"got {len(before)} prompts before and {len(after)} after, expected the same prompts in both; "
            "pass only the prompts that were scored both times"
        )
    differences = []
    for prompt, (old, new) in enumerate(zip(before, after, strict=True)):
        if len(old) != len(new):
            raise ValueError(
                f"prompt {prompt} has {len(old)} scores before and {len(new)} after, expected pairs; "
                "pass one score per (prompt, seed) on both sides, NaN where one is missing"
            )
        differences.append(np.asarray(new, dtype=np.float64) - np.asarray(old, dtype=np.float64))
    labels = [""] * len(differences) if tasks is None else tasks
    return task_mean_ci(differences, labels, level=level, resamples=resamples, seed=seed)


def _totals(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the scores of each prompt, NaN left out: two float64 vectors (P,)."""
    sums, counts = np.zeros(len(scores)), np.zeros(len(scores))
    for prompt, values in enumerate(scores):
        array = np.asarray(values, dtype=np.float64).reshape(-1)
        if np.isinf(array).any():
            raise ValueError(
                f"prompt {prompt} has an infinite score, expected numbers (NaN for a missing one); mend the reward"
            )
        sums[prompt] = np.nansum(array)
        counts[prompt] = np.count_nonzero(~np.isnan(array))
    return sums, counts


def _check(scores: Scores, tasks: Sequence[str], level: float, resamples: int) -> None:
    if len(tasks) != len(scores):
        raise ValueError(f"got {len(tasks)} tasks for {len(scores)} prompts, expected one task per prompt")
    if not 0 < level < 1:
        raise ValueError(f"got level={level}, expected a share between 0 and 1; use 0.95 for a 95 % interval")
    if resamples < 1:
        raise ValueError(f"got resamples={resamples}, expected at least 1; {RESAMPLES} is the usual number")
