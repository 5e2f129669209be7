"""Preference pairs out of images: rank pairs, then sift by points (UnifiedReward, arXiv 2503.05236).

For each prompt, N images are put into N / 2 random pairs and a judge names the better one of each. The winners are the
chosen list, the losers the rejected list; the winner with the highest pointwise score and the loser with the lowest one
become the pair, if the first score is higher.

Deviations. The released script compares scores as text, lets unreadable answers win for the first image and asks in one
order. Here scores are numbers, a pair without a verdict or with a tie is left out and counted, and both orders are
asked by default. Which images meet is a function of the seed and of their content, not of their order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..judges.pairwise import Order, PairJudge, coin, content_keys, judge_pairs
from ..protocol import Metadata, Reward, checked_score


@dataclass(frozen=True)
class Sifted:
    """What came of one prompt.

    chosen, rejected: numbers of images, None if there is no pair. reason: why there is none. scores: of all images,
    NaN = missing. compared: pairs that were asked about. ties, missing: how many of these had no winner, or no answer.
    """

    chosen: int | None
    rejected: int | None
    reason: str | None
    scores: list[float]
    compared: int
    ties: int
    missing: int


def meetings(keys: Sequence[str], seed: int) -> list[tuple[int, int]]:
    """Disjoint pairs of images: all of an even number, all but one of an odd one; a function of seed and content."""
    order = sorted(range(len(keys)), key=lambda i: (coin(seed, "meet", keys[i]), i))
    return [(order[i], order[i + 1]) for i in range(0, len(order) - 1, 2)]


def sift(
    images: Tensor,
    prompt: str,
    metadata: Sequence[Metadata],
    rank: PairJudge,
    score: Reward,
    *,
    order: Order = "both",
    seed: int = 0,
    least: float = 0.0,
) -> Sifted:
    """The preference pair of one prompt, if there is one (method: see the module).

    Args:
        images: (N, 3, H, W), N >= 2, all of the prompt. metadata: N dictionaries.
        rank: names the better of two. score: pointwise.
        order: in which images are shown, see ``judge_pairs``. seed: of the meetings.
        least: score difference above which a pair is kept.
    """
    keys = content_keys(images)
    judged = judge_pairs(
        rank, images, meetings(keys, seed), [prompt] * len(images), metadata, order=order, seed=seed, keys=keys
    )
    result = checked_score(score, images, [prompt] * len(images), list(metadata), all_missing="allow")
    scores = (result.values.double() * (1 if score.spec.higher_is_better else -1)).tolist()
    won: list[int] = []
    lost: list[int] = []
    for (i, j), preference in zip(judged.pairs, judged.preference.tolist(), strict=True):
        if preference > 0.5:
            won, lost = [*won, i], [*lost, j]
        elif preference < 0.5:  # NaN is neither
            won, lost = [*won, j], [*lost, i]
    ties, missing = int((judged.preference == 0.5).sum()), int(judged.preference.isnan().sum())

    def sifted(chosen: int | None, rejected: int | None, reason: str | None) -> Sifted:
        return Sifted(chosen, rejected, reason, result.values.tolist(), len(judged.pairs), ties, missing)

    won, lost = [i for i in won if not math.isnan(scores[i])], [i for i in lost if not math.isnan(scores[i])]
    if not won or not lost:
        return sifted(None, None, "no pair with a winner and scores")
    best, worst = max(won, key=lambda i: scores[i]), min(lost, key=lambda i: scores[i])
    if not scores[best] - scores[worst] > least:
        return sifted(None, None, "the best winner scores no higher than the worst loser")
    return sifted(best, worst, None)
