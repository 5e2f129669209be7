"""Agreement of scorers with human preferences: the rule of each data set, and every number that is reported.

A record is what people said about the images of one prompt. The rules are pure functions from labels and scores to
credits; credits of one prompt are dependent, so every interval resamples prompts. A pair of which an image has no score
is invalid: left out, and its share reported. Rules that differ between two releases of one data set are both reported,
by name; the headline (`accuracy`) is the one of the data set's own authors:

    imagereward  micro: right pairs / pairs with different ranks; a predicted tie is wrong (Xu et al. 2023). `macro`,
                 the mean over prompts, is what the code of HPSv2 computes on the same data.
    hpdv2        mean over prompts of 1 - inversions / (n (n - 1) / 2); a tie of the labels is no inversion (Wu et al.
                 2023). The released code ranks by sorting, so equal scores fall into either order by chance; here they
                 count as half an inversion, which is what that gives on average.
    pickapic     p = softmax of the two scores, |p1 - p0| <= t is a predicted tie; 1 if prediction and label agree, 0.5
                 if exactly one of them is a tie, else 0; t of {0, 0.1, ..., 1} from validation data (Kirstain et al.
                 2023).
    genai        GenAI-Bench of TIGER-Lab: votes for left, right, both good, both bad. For a judge that was asked the
                 four-way question the headline is the share of votes that it meets (Jiang et al. 2024), and
                 `invalid_wrong` counts unusable answers as wrong, as they do. Other judges and scores cannot say "both
                 good": their headline leaves ties out, and `ties_wrong` counts them as wrong.
    genai-cmu    GenAI-Bench of CMU: mean human scores; pairs of a prompt with ties at the threshold that maximises the
                 accuracy (Deutsch et al. 2023), Kendall's tau-b and Pearson's correlation over all images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from flowrl import score_table as table
from flowrl.errors import UserError
from flowrl.statistics import Estimate, mean_ci

THRESHOLDS = tuple(step / 10 for step in range(11))
VOTES = {"leftvote": (1.0, 0.0), "rightvote": (0.0, 1.0), "tievote": (1.0, 1.0), "bothbad_vote": (0.0, 0.0)}


@dataclass(frozen=True)
class Record:
    """The images of one prompt, and for each a label of which more is better (equal labels: a tie)."""

    prompt: str
    images: tuple[str, ...]
    labels: tuple[float, ...]


# ---------------------------------------------------------------------------------------------------------------- rules
def strict_pairs(labels: Sequence[float], scores: Sequence[float]) -> list[float]:
    """1 or 0 for each pair of different labels: whether the scores order it in the same way; a tie is wrong.

    NaN for a pair with a missing score.
    """
    return [
        math.nan if math.isnan(a + b) else float((a - b) * (x - y) > 0)
        for (x, a), (y, b) in combinations(zip(labels, scores, strict=True), 2)
        if x != y
    ]


def ranking_score(labels: Sequence[float], scores: Sequence[float]) -> float:
    """1 - inversions / pairs over the images that have a score; NaN with fewer than two of them.

    An inversion is a pair that both sides order strictly, and oppositely; half a one, a pair that people order and the
    scores do not.
    """
    known = [(x, a) for x, a in zip(labels, scores, strict=True) if not math.isnan(a)]
    pairs = list(combinations(known, 2))
    if not pairs:
        return math.nan
    inverted = [0.0 if x == y else 0.5 if a == b else float((a - b) * (x - y) < 0) for (x, a), (y, b) in pairs]
    return 1 - sum(inverted) / len(pairs)


def preference(scores: Sequence[float], scale: float = 1.0) -> float:
    """p1 - p0 of the softmax of two scores (times `scale`): tanh(scale (s1 - s0) / 2), in [-1, 1]."""
    first, second = scores
    return math.tanh(scale * (second - first) / 2)


def half_credit(labels: Sequence[float], difference: float, threshold: float) -> float:
    """1 if prediction and label agree, 0.5 if exactly one of them is a tie, else 0; NaN stays NaN.

    difference: p1 - p0; up to `threshold` in size it is a predicted tie.
    """
    if math.isnan(difference):
        return math.nan
    said = 0.0 if abs(difference) <= threshold else math.copysign(1.0, difference)
    true = float(np.sign(labels[1] - labels[0]))
    return 1.0 if said == true else 0.5 if 0.0 in (said, true) else 0.0


def best_threshold(labels: Sequence[Sequence[float]], differences: Sequence[float]) -> float:
    """The first of THRESHOLDS at which `half_credit` is greatest on average."""

    def accuracy(threshold: float) -> float:
        pairs = zip(labels, differences, strict=True)
        return float(np.nanmean([half_credit(label, difference, threshold) for label, difference in pairs]))

    return max(THRESHOLDS, key=accuracy)


def four_way(labels: Sequence[float], preference: float, good: float) -> float:
    """1 if a judge meets a vote of GenAI-Bench, 0 if not, NaN without a verdict.

    labels: see VOTES. preference: of the judge for the first image. good: of a tie: 1 both good, 0 both bad, and
    anything else if it contradicts itself, which meets no vote.
    """
    if math.isnan(preference):
        return math.nan
    if labels[0] == labels[1]:
        return float(preference == 0.5 and good == labels[0])
    return float((preference - 0.5) * (labels[0] - labels[1]) > 0)


def tie_pairs(labels: Sequence[float], scores: Sequence[float]) -> list[tuple[float, float]]:
    """(difference of the labels, difference of the scores) of each pair; a missing score leaves its pairs out."""
    known = [(x, a) for x, a in zip(labels, scores, strict=True) if not math.isnan(a)]
    return [(x - y, a - b) for (x, a), (y, b) in combinations(known, 2)]


def tie_credit(pair: tuple[float, float], threshold: float) -> float:
    """1 if label and score agree on better, worse or tie; score differences up to `threshold` are ties."""
    label, score = pair
    return float(np.sign(label) == (0 if abs(score) <= threshold else np.sign(score)))


def best_tie_threshold(pairs: Sequence[tuple[float, float]]) -> float:
    """The least threshold (0, or a size that occurs) with the greatest mean `tie_credit` (Deutsch et al. 2023, 5).

    Sorted by size, moving the threshold past a pair makes it a tie: right if its labels are equal, wrong if not.
    """
    sizes = np.abs([score for _, score in pairs])
    order = np.argsort(sizes, kind="stable")
    label, score = (np.array(column)[order] for column in zip(*pairs, strict=True))
    gain = (label == 0).astype(float) - (np.sign(label) == np.sign(score))  # where scores are equal: no change, or 0
    total = np.cumsum(gain)
    ends = np.flatnonzero(np.append(np.diff(sizes[order]) > 0, True))  # pairs of one size become ties together
    candidates = [(0.0, 0.0), *((sizes[order][end], total[end]) for end in ends)]
    return float(max(candidates, key=lambda candidate: (candidate[1], -candidate[0]))[0])


# -------------------------------------------------------------------------------------------------------------- numbers
def numbers(
    form: str, records: Sequence[Record], scores: Sequence[Sequence[float]], *, threshold: float = 0.0,
    scale: float = 1.0,
) -> dict[str, Any]:  # fmt: skip
    """Everything about one scorer: `accuracy` is the headline of the data set; estimates have intervals over prompts.

    scores: for each record the scores of its images, more is better, NaN where missing.
    threshold, scale: of pickapic.
    """
    found: dict[str, Any] = {"rule": RULES[form], **_shares(records, scores)}
    if form == "hpdv2":
        whole = [[ranking_score(r.labels, s)] for r, s in zip(records, scores, strict=True)]
        found["accuracy"] = _estimate(records, whole)
    elif form == "pickapic":
        halves = [
            [half_credit(r.labels, preference(s, scale), threshold)] for r, s in zip(records, scores, strict=True)
        ]
        found |= {"accuracy": _estimate(records, halves), "threshold": threshold, "scale": scale}
    elif form == "genai-cmu":
        found |= _correlations(records, scores)
    credits = [strict_pairs(r.labels, s) for r, s in zip(records, scores, strict=True)]
    found |= {"micro": _estimate(records, credits), "macro": _macro(records, credits)}
    if form == "genai":
        with_ties = [
            credit or ([math.nan] if any(map(math.isnan, s)) else [0.0])
            for credit, s in zip(credits, scores, strict=True)
        ]
        found["ties_wrong"] = _estimate(records, with_ties)
    found.setdefault("accuracy", found["micro"])
    return found


RULES = {
    "imagereward": "right pairs / pairs with different ranks, over all prompts; a predicted tie is wrong",
    "hpdv2": "mean over prompts of 1 - inversions / pairs; a tie of the labels is none, a predicted one half",
    "pickapic": "half credit for a tie on one side; threshold from validation data",
    "genai": "right pairs / pairs with a vote for one image; a predicted tie is wrong",
    "genai-cmu": "pairs of a prompt, ties included, at the best threshold",
}
FOUR_WAY = "votes that the judge meets: left, right, both good or both bad"


def _by_prompt(records: Sequence[Record], credits: Sequence[Sequence[float]]) -> list[list[float]]:
    found: dict[str, list[float]] = {}
    for record, credit in zip(records, credits, strict=True):
        found.setdefault(record.prompt, []).extend(credit)
    return list(found.values())


def _estimate(records: Sequence[Record], credits: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean of all credits with its interval; records of one prompt are drawn together."""
    return table.as_dict(mean_ci(_by_prompt(records, credits)))


def _macro(records: Sequence[Record], credits: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean over prompts of the mean of their credits."""
    means = [[float(np.nanmean(each))] for each in _by_prompt(records, credits) if not np.isnan(each).all()]
    return table.as_dict(mean_ci(means))


def _shares(records: Sequence[Record], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How many pairs there are, and how many of them people call ties, the scorer calls ties, or are invalid."""
    labels = [x == y for record in records for x, y in combinations(record.labels, 2)]
    pairs = [(a, b) for each in scores for a, b in combinations(each, 2)]
    return {
        "records": len(records),
        "pairs": len(pairs),
        "label_ties": sum(labels) / len(labels) if labels else None,
        "predicted_ties": sum(a == b for a, b in pairs) / len(pairs) if pairs else None,
        "invalid": sum(math.isnan(a + b) for a, b in pairs) / len(pairs) if pairs else None,
    }


def _correlations(records: Sequence[Record], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    from scipy import stats

    pairs = [tie_pairs(record.labels, each) for record, each in zip(records, scores, strict=True)]
    if not (everything := [pair for each in pairs for pair in each]):
        raise UserError("no prompt has two scored images; expected pairs; see the reasons in scores.jsonl")
    threshold = best_tie_threshold(everything)
    known = [
        [(x, a) for x, a in zip(record.labels, each, strict=True) if not math.isnan(a)]
        for record, each in zip(records, scores, strict=True)
    ]
    return {
        "accuracy": _estimate(records, [[tie_credit(pair, threshold) for pair in each] for each in pairs]),
        "threshold": threshold,
        "kendall_tau_b": table.as_dict(clustered(known, lambda x, a: stats.kendalltau(x, a).statistic)),
        "pearson": table.as_dict(clustered(known, lambda x, a: stats.pearsonr(x, a).statistic)),
    }


def clustered(
    groups: Sequence[Sequence[tuple[float, float]]], statistic: Callable[[np.ndarray, np.ndarray], float], *,
    resamples: int = 200, seed: int = 0,
) -> Estimate:  # fmt: skip
    """A statistic of all (label, score) of some prompts, with the 95 % interval that resampling prompts gives."""
    used = [np.array(group, dtype=np.float64) for group in groups if len(group)]
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        drawn = np.concatenate([used[at] for at in rng.integers(len(used), size=len(used))])
        if min(map(np.ptp, drawn.T)) > 0:  # a constant has no correlation
            draws.append(float(statistic(*drawn.T)))
    low, high = np.quantile(draws, [0.025, 0.975]) if draws and len(used) > 1 else (math.nan, math.nan)
    return Estimate(float(statistic(*np.concatenate(used).T)), float(low), float(high), len(used))


# --------------------------------------------------------------------------------------------------------------- judges
@dataclass(frozen=True)
class Verdicts:
    """What a judge said of the pairs of a record, in the order of `combinations`; NaN: nothing usable.

    Attributes:
        preference: for the first image of each pair, in [0, 1]; 0.5 is a tie.
        flips: 1 if the verdict changed with the order of the images, 0 if not.
        bias: mean of 2 p - 1 for the image that was shown first: 0 is fair.
        good: of ties: 1 both good, 0 both bad, NaN otherwise; None where the judge was not asked.
    """

    preference: tuple[float, ...]
    flips: tuple[float, ...]
    bias: tuple[float, ...]
    good: tuple[float, ...] | None = None


def numbers_of_judge(form: str, records: Sequence[Record], verdicts: Sequence[Verdicts]) -> dict[str, Any]:
    """As `numbers`, for a judge that compares: its ties need no threshold. With the share of verdicts that flip."""
    pairs = [list(combinations(record.labels, 2)) for record in records]
    said = [[(p, 1 - p) for p in verdict.preference] for verdict in verdicts]
    strict = [
        [credit for labels, scores in zip(*both, strict=True) for credit in strict_pairs(labels, scores)]
        for both in zip(pairs, said, strict=True)
    ]
    every = [p for verdict in verdicts for p in verdict.preference]
    found: dict[str, Any] = {
        "rule": RULES[form],
        "records": len(records),
        "pairs": len(every),
        "label_ties": sum(x == y for each in pairs for x, y in each) / len(every),
        "predicted_ties": sum(p == 0.5 for p in every) / len(every),
        "invalid": sum(map(math.isnan, every)) / len(every),
        "flipped": _estimate(records, [verdict.flips for verdict in verdicts]),
        "position_bias": _estimate(records, [verdict.bias for verdict in verdicts]),
        "micro": _estimate(records, strict),
        "macro": _macro(records, strict),
    }
    if form == "hpdv2":
        whole = [
            [ranking_score(x, s) for x, s in zip(*both, strict=True) if not math.isnan(s[0])]
            for both in zip(pairs, said, strict=True)
        ]
        found["accuracy"] = _estimate(records, [[sum(each) / len(each)] if each else [] for each in whole])
    elif form == "pickapic":
        found["accuracy"] = _estimate(
            records, [[half_credit(record.labels, s[1] - s[0], 0.0) for s in each]
                      for record, each in zip(records, said, strict=True)],
        )  # fmt: skip
    elif form == "genai-cmu":
        found["accuracy"] = _estimate(records, [
            [tie_credit((x - y, 2 * p - 1), 0.0) if not math.isnan(p) else p
             for (x, y), (p, _) in zip(*both, strict=True)]
            for both in zip(pairs, said, strict=True)
        ])  # fmt: skip
    elif form == "genai" and any(verdict.good is not None for verdict in verdicts):
        met = [
            [four_way(record.labels, p, good) for p, good in zip(v.preference, v.good or (math.nan,), strict=True)]
            for record, v in zip(records, verdicts, strict=True)
        ]
        found |= {"rule": FOUR_WAY, "accuracy": _estimate(records, met)}
        found["invalid_wrong"] = _estimate(records, np.nan_to_num(met).tolist())
    elif form == "genai":
        found["ties_wrong"] = _estimate(
            records, [credit or [p * 0 for p in v.preference] for credit, v in zip(strict, verdicts, strict=True)]
        )
    return {**found, "accuracy": found.get("accuracy", found["micro"])}
