"""Preferences out of implicit feedback: how often an image was picked up, per chance to be picked up.

Social Reward (arXiv 2402.09872) learns from how often members of a community reused an image, cleaned of captions that
are popular by themselves, of time on show and of the author's followers. Here:

* images are compared within a prompt, so a popular subject favours neither;
* ``exposure`` is the number of chances (impressions; or days on show times followers), and what counts is the rate
  count / exposure, with a Gamma prior, so that three of three is no better evidence than it is;
* the label of a pair is the probability that the first rate is the higher one, and pairs of which that is unsure are
  left out.

    rate_i ~ Gamma(a + count_i, b + exposure_i),    a / b = mean rate of all images, a = `strength`
    P(rate_i > rate_j) = 1 - I_x(a + count_i, a + count_j),    x = (b + exposure_i) / (2 b + exposure_i + exposure_j)

with I the regularised incomplete beta function: a ratio of Gamma variables is Beta distributed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .manifest import Pair


@dataclass(frozen=True)
class Counted:
    """An image with how often it was picked up and how many chances it had."""

    prompt: str
    image: str
    count: float
    exposure: float = 1.0


def superiority(first: Counted, second: Counted, mean: float, strength: float = 1.0) -> float:
    """P(rate of the first > rate of the second), in [0, 1] (formula: see the module)."""
    from scipy.special import betainc

    a, b = strength, strength / mean
    x = (b + first.exposure) / (2 * b + first.exposure + second.exposure)
    return float(1 - betainc(a + first.count, a + second.count, x))


def pairs_of_counts(
    rows: Sequence[Counted], *, confidence: float = 0.8, strength: float = 1.0, most: int | None = None
) -> list[Pair]:
    """Pairs of images of one prompt, labelled by how probably the first is the better one.

    Args:
        rows: in any order; counts >= 0, exposures > 0.
        confidence: least probability, of one order or the other, of a pair that is kept; in [0.5, 1).
        strength: of the prior, in counts.
        most: pairs kept per prompt, the surest first; None: all.

    Raises:
        ValueError: numbers out of range, or nothing was ever picked up.
    """
    if not 0.5 <= confidence < 1 or not strength > 0:
        raise ValueError(
            f"got confidence {confidence} and strength {strength}, expected [0.5, 1) and a number above 0. Mend them."
        )
    for row in rows:
        if not (0 <= row.count < math.inf and 0 < row.exposure < math.inf):
            raise ValueError(
                f"got count {row.count} and exposure {row.exposure} for {row.image!r}, expected a count >= 0 and an "
                "exposure above 0. Correct the line, or leave the image out."
            )
    total, chances = sum(row.count for row in rows), sum(row.exposure for row in rows)
    if not total:
        raise ValueError("got no image that was ever picked up, expected some counts above 0. Give more data.")
    by_prompt: dict[str, list[Counted]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt, []).append(row)
    found: list[Pair] = []
    for prompt, images in by_prompt.items():
        own = [
            Pair(prompt, a.image, b.image, {"": p})
            for i, a in enumerate(images)
            for b in images[i + 1 :]
            if max(p := superiority(a, b, total / chances, strength), 1 - p) >= confidence
        ]
        found += sorted(own, key=lambda pair: -abs(pair.labels[""] - 0.5))[:most]
    return found
