"""Win rates within a group as its reward (Pref-GRPO, arXiv 2508.20751), and -Flex's mix of overall and category wins.

``w_i = mean over opponents j of [1 if i is better than j, 0.5 for a tie, 0 if not]``, in [0, 1].
Over a full round without missing verdicts the rates of n images sum to n / 2, so their mean is always 0.5 and a curve
of it says nothing about progress: log an absolute scorer beside it (weight 0 is enough).

Differences of the defaults from the released code, which ``compat="pref_grpo"`` brings back:

* it asks once, always lower index first, so position bias becomes reward; here both orders, or one at random;
* it takes an unparsable answer for a tie; here such a pair leaves the denominator;
* an image alone in its group gets 0 there, and no reward here;
* it rounds to 3 decimals.

Never reproduced: it takes the first prompt for all images and the images of a GPU for one group.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..protocol import Metadata, RewardResult, RewardSpec, preflight
from . import bradley_terry
from .pairwise import Judged, Order, PairJudge, Pairs, coin, content_keys, index, judge_pairs


def schedule(keys: Sequence[str], opponents: int | None = None, seed: int = 0) -> list[tuple[int, int]]:
    """Who meets whom in one group.

    Args:
        keys: n strings, equal only for equal images; what is drawn depends on them and not on the images' order.
        opponents: None for a full round of ``n (n - 1) / 2`` pairs. k: the images stand in a random circle and meet
            their k nearest, half of them on either side, so everybody has k opponents and the pairs hang together
            (k + 1 opponents if both k and n are odd, as n k / 2 is then no number of pairs).
        seed: of the circle.

    Returns:
        Pairs (i, j) with i < j, each once.
    """
    n = len(keys)
    if opponents is None or opponents >= n - 1:
        return [(i, j) for i in range(n) for j in range(i + 1, n)]
    circle = sorted(range(n), key=lambda i: (coin(seed, "circle", keys[i]), i))
    steps = list(range(1, opponents // 2 + 1))
    if opponents % 2:
        steps.append(n // 2 if n % 2 == 0 else opponents // 2 + 1)  # the one opposite is one more opponent
    met = {tuple(sorted((circle[at], circle[(at + step) % n]))) for at in range(n) for step in steps}
    return sorted((i, j) for i, j in met)


def win_rates(
    n: int, pairs: Pairs, preference: Tensor, weights: Tensor | None = None, digits: int | None = None
) -> Tensor:
    """``w_i = sum_m w_m p_m / sum_m w_m`` over the valid pairs of each image, p_m its preference over the other.

    Args:
        n: number of images.
        pairs: M pairs of image numbers.
        preference: (M,) for the first over the second, in [0, 1]; NaN is left out.
        weights: (M,) at least 0, or None for 1.
        digits: decimals to round to, or None.

    Returns:
        (n,) float64 in [0, 1]; NaN for an image without a valid pair.
    """
    first, second = index(pairs)
    valid = ~preference.isnan()
    w = valid.double() if weights is None else torch.where(valid, weights.double(), 0)
    p = torch.where(valid, preference.double(), 0)
    zero = torch.zeros(n, dtype=torch.float64)
    won = zero.index_add(0, first, w * p).index_add(0, second, w * (1 - p))
    met = zero.index_add(0, first, w).index_add(0, second, w)
    rates = won / met  # 0 / 0 is NaN
    return rates if digits is None else rounded(rates, digits)


def rounded(values: Tensor, digits: int) -> Tensor:
    """Python's rounding of each value, to ``digits`` decimals; NaN stays."""
    return torch.tensor([round(v, digits) if v == v else v for v in values.tolist()], dtype=torch.float64)


def flex_rewards(
    n: int,
    pairs: Pairs,
    overall: Tensor,
    categories: Mapping[str, Tensor],
    *,
    weights: Tensor | None = None,
    category_weights: Mapping[str, float] | None = None,
    overall_weight: float = 1.0,
    category_weight: float = 1.0,
    digits: int | None = None,
) -> Tensor:
    """``(w_o overall + w_d dims) / (w_o + w_d)``, dims the weighted mean of an image's category win rates.

    Only the overall win rate counts for an image without any category verdict, and only the categories for one
    without a valid overall verdict.

    Args:
        n: number of images.
        pairs: M pairs.
        overall: (M,) preferences of the first image.
        categories: name -> (M,) preferences in that category, NaN where there is none.
        weights: (M,) trust in the verdicts, or None.
        category_weights: name -> weight, 1 where none is given.
        overall_weight: w_o.
        category_weight: w_d.
        digits: decimals to which each step is rounded, or None (the released code: 3).

    Returns:
        (n,) float64 in [0, 1]; NaN for an image without any verdict.
    """
    total = win_rates(n, pairs, overall, weights, digits)
    top, bottom = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for name, column in categories.items():
        rates = win_rates(n, pairs, column, weights, digits)
        w = (category_weights or {}).get(name, 1.0)
        top, bottom = top + w * rates.nan_to_num(0.0), bottom + w * (~rates.isnan()).double()
    dims = top / bottom
    dims = dims if digits is None else rounded(dims, digits)
    both = (overall_weight * total + category_weight * dims) / (overall_weight + category_weight)
    mixed = torch.where(dims.isnan(), total, torch.where(total.isnan(), dims, both))
    return mixed if digits is None else rounded(mixed, digits)


class WinRate:
    """The win rate of each image among those of its prompt, as a judge sees them.

    ``parts``: ``win_rate``, ``valid_pairs`` and ``missing_pairs`` (numbers), ``ties`` (share of the valid pairs),
    ``position_bias`` and ``flip_rate`` (see ``Judged``; means over the image's pairs), ``strength`` with
    Bradley-Terry, ``category/<name>`` for judges with categories, ``agreement`` with a listener.

    Args:
        judge: whom to ask.
        opponents: "all" for a full round, or how many of the group each image meets.
        order: "both" (default), "random" or "given", see ``judge_pairs``.
        aggregate: "win_rate"; "bradley_terry": expected win rate of the fitted strengths, which does not depend on
            how strong the opponents were that an image happened to meet; "flex": overall and category wins.
        seed: of the circle of opponents and of the random orders.
        prior: precision of the prior on strengths, see ``bradley_terry.fit``.
        category_weights, overall_weight, category_weight: of "flex", see ``flex_rewards``.
        compat: "pref_grpo" for the released behaviour (see the head of the module); the judge has a switch of its own.

    Raises:
        ValueError: settings that exclude each other.
    """

    def __init__(
        self,
        judge: PairJudge,
        *,
        opponents: Literal["all"] | int = "all",
        order: Order | None = None,
        aggregate: Literal["win_rate", "bradley_terry", "flex"] = "win_rate",
        seed: int = 0,
        prior: float = 0.1,
        category_weights: Mapping[str, float] | None = None,
        overall_weight: float = 1.0,
        category_weight: float = 1.0,
        compat: Literal["pref_grpo"] | None = None,
    ) -> None:
        for name, value, allowed in (
            ("order", order, (None, "both", "random", "given")),
            ("aggregate", aggregate, ("win_rate", "bradley_terry", "flex")),
            ("compat", compat, (None, "pref_grpo")),
        ):
            if value not in allowed:
                raise ValueError(f"got {name} {value!r}, expected one of {', '.join(map(str, allowed))}. Correct it.")
        if opponents != "all" and (isinstance(opponents, bool) or not isinstance(opponents, int) or opponents < 1):
            raise ValueError(f"got opponents {opponents!r}, expected 'all' or a number from 1. Correct it.")
        if compat and (opponents != "all" or order not in (None, "given") or aggregate == "bradley_terry"):
            raise ValueError(
                f"got compat 'pref_grpo' with opponents {opponents!r}, order {order!r} and aggregate {aggregate!r}; "
                "the released code has a full round in the given order, without a fit. Leave these out, or compat."
            )
        if not (overall_weight >= 0 and category_weight >= 0 and overall_weight + category_weight > 0):
            raise ValueError(
                f"got overall_weight {overall_weight} and category_weight {category_weight}, expected numbers from 0 "
                "with a sum above 0. Correct them."
            )
        self.judge, self.opponents, self.aggregate = judge, opponents, aggregate
        self.order: Order = order or ("given" if compat else "both")
        self.seed, self.prior, self.compat = seed, prior, compat
        self.flex: dict[str, Any] = {
            "category_weights": category_weights,
            "overall_weight": overall_weight,
            "category_weight": category_weight,
        }
        mix = {"flex": f" {self.flex}", "bradley_terry": f" prior {prior:g}"}.get(aggregate, "")
        settings = f"{opponents} {self.order} {aggregate}{mix} seed {seed}" + (f" {compat}" if compat else "")
        self.spec = RewardSpec(
            name=f"win rate by {judge.spec.name}",
            version=f"{judge.spec.version}; {settings}",
            scope="group",
            range=(0.0, 1.0),
            licence=judge.spec.licence,
            preprocessing=judge.spec.preprocessing,
        )

    def preflight(self) -> None:
        """That of the judge, if it has one."""
        preflight(self.judge)

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``. Without groups, images with the same prompt are one.

        Raises:
            ValueError: images of one group have different prompts.
        """
        members = _groups(prompts, groups)
        keys = content_keys(images)
        pairs: list[tuple[int, int]] = []
        for group in members:
            opponents = None if self.opponents == "all" else int(self.opponents)
            met = schedule([keys[i] for i in group], opponents, self.seed)
            pairs += [(group[i], group[j]) for i, j in met]
        judged = judge_pairs(self.judge, images, pairs, prompts, metadata, order=self.order, seed=self.seed, keys=keys)
        values, parts = self._aggregate(len(images), members, judged)
        if self.compat:  # an image alone in its group
            alone = torch.tensor([i for group in members if len(group) == 1 for i in group], dtype=torch.long)
            values[alone] = 0.0
        reasons = _reasons(values, judged)
        return RewardResult(values.float(), {name: part.float() for name, part in parts.items()}, reasons)

    def _aggregate(self, n: int, members: list[list[int]], judged: Judged) -> tuple[Tensor, dict[str, Tensor]]:
        digits = 3 if self.compat else None
        rates = win_rates(n, judged.pairs, judged.preference, judged.weights, digits)
        parts = {"win_rate": rates, **_pair_parts(n, judged)}
        if self.aggregate == "flex":
            return (
                flex_rewards(
                    n,
                    judged.pairs,
                    judged.preference,
                    judged.categories,
                    weights=judged.weights,
                    digits=digits,
                    **self.flex,
                ),
                parts,
            )
        if self.aggregate == "win_rate":
            return rates.clone(), parts
        values = torch.full((n,), torch.nan, dtype=torch.float64)
        parts["strength"] = values.clone()
        strengths = bradley_terry.fit(n, judged.pairs, judged.preference, judged.weights, prior=self.prior)
        for group in members:
            values[group] = bradley_terry.expected_win_rates(strengths[group])
        parts["strength"] = strengths
        return values, parts


def _groups(prompts: Sequence[str], groups: Tensor | None) -> list[list[int]]:
    """Numbers of the images of each group."""
    members: dict[Any, list[int]] = {}
    for i, key in enumerate(prompts if groups is None else groups.tolist()):
        members.setdefault(key, []).append(i)
    for key, group in members.items():
        if len({prompts[i] for i in group}) > 1:
            raise ValueError(
                f"got different prompts in group {key}, such as {prompts[group[0]]!r}, expected one: images are "
                "compared under a prompt. Give the images of each prompt a number of their own."
            )
    return list(members.values())


def _pair_parts(n: int, judged: Judged) -> dict[str, Tensor]:
    """Numbers about the pairs of each image, (n,) each."""
    first, second = index(judged.pairs)

    def mean(values: Tensor) -> Tensor:
        """Over the image's pairs in which the value is known."""
        known = ~values.isnan()
        ones, zero = known.double(), torch.zeros(n, dtype=torch.float64)
        total = zero.index_add(0, first, values.nan_to_num(0.0)).index_add(0, second, values.nan_to_num(0.0))
        return total / zero.index_add(0, first, ones).index_add(0, second, ones)

    missing = judged.preference.isnan()
    count = torch.bincount(torch.cat([first[~missing], second[~missing]]), minlength=n).double()
    lost = torch.bincount(torch.cat([first[missing], second[missing]]), minlength=n).double()
    ties = torch.where(missing, torch.nan, (judged.preference == 0.5).double())
    parts = {
        "valid_pairs": count,
        "missing_pairs": lost,
        "ties": mean(ties),
        "position_bias": mean(judged.bias),
        "flip_rate": mean(judged.flips),
    }
    if bool((judged.weights != 1).any()):
        parts["agreement"] = mean(judged.weights.masked_fill(missing, torch.nan))
    for name, column in judged.categories.items():
        parts[f"category/{name}"] = win_rates(n, judged.pairs, column, judged.weights)
    return parts


def _reasons(values: Tensor, judged: Judged) -> list[str | None]:
    """Why an image has no reward: what its pairs say most often."""
    said: list[Counter[str]] = [Counter() for _ in values]
    for pair, reason in zip(judged.pairs, judged.reasons, strict=True):
        for i in pair:
            said[i].update([reason or "its valid verdicts have weight 0"])
    reasons: list[str | None] = []
    for value, counted in zip(values.tolist(), said, strict=True):
        if not math.isnan(value):
            reasons.append(None)
        elif counted:
            reasons.append(f"no valid comparison; most often: {counted.most_common(1)[0][0]}")
        else:
            reasons.append("no other image of its prompt to compare with")
    return reasons
