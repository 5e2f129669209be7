"""Several rewards as one advantage, without ever adding their raw values.

    A_i = sum_k w_k A_i^(k)          A^(k): `group_advantages` of reward k alone

(DanceGRPO, arXiv 2505.07818; Pref-GRPO, arXiv 2508.20751.) Each reward is normalised first, so its scale and its spread
have no say, only its weight. With ``renormalise`` the sum is divided by its own standard deviation over the update (the
second normalisation of GDPO, as Pref-GRPO's code offers it). With ``front`` only the non-dominated images of a group
count (Parrot, arXiv 2401.05675): the others leave the loss and its denominator, as Parrot's 1 / n(P) does.

An image that lacks one of the rewards is out of the statistics of all, so that all A^(k) compare the same images.

Deviations. DanceGRPO divides by the sample standard deviation, here it is the population one: a factor that is the same
for every reward of a whole group. Parrot multiplies raw rewards; here dominance is decided on raw rewards, and what
counts is the sum above, with statistics over the whole group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flowrl.advantages import Advantages, Std, group_advantages
from flowrl.errors import UserError


def combined_advantages(
    parts: Tensor,
    weights: Tensor,
    groups: Tensor,
    *,
    std: Std = "prompt",
    eps: float = 1e-4,
    clip: float | None = 5.0,
    renormalise: bool = False,
    front: bool = False,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Advantages:
    """Weighted sum of the advantages of K rewards (formula and rules: see the module).

    Args:
        parts: (K, n) raw rewards, NaN = missing. weights: (K,) other than 0; a negative one minimises.
        groups, std, eps, reduce: as for `group_advantages`. clip: of the sum.
        renormalise: divide the sum by its population std over all processes, plus eps.
        front: keep the non-dominated images only.

    Returns:
        Advantages of the sum. ``group_means`` and ``stds`` are those of the sum of advantages before ``renormalise``;
        ``zero_variance_groups`` counts groups whose images are equal in every reward.

    Raises:
        UserError: shapes that differ, no parts, a weight of 0; what `group_advantages` raises.
    """
    if parts.ndim != 2 or weights.shape != parts.shape[:1] or not len(parts) or bool((weights == 0).any()):
        raise UserError(
            f"combined advantages got parts of shape {tuple(parts.shape)} and weights {weights.tolist()}; expected "
            "(rewards, images) with at least one reward, and one weight other than 0 for each."
        )
    r = parts.detach().to("cpu", torch.float64)
    r = torch.where(r.isnan().any(0), torch.nan, r)
    each = [group_advantages(part, groups, std=std, eps=eps, clip=None, reduce=reduce) for part in r]
    w = weights.to("cpu", torch.float64)
    total = (w[:, None] * torch.stack([found.advantages.double() for found in each])).sum(0)
    scored = total.where(each[0].valid, torch.nan)
    again: Std = "global" if renormalise else "none"
    final = group_advantages(scored, groups, std=again, eps=eps, clip=clip, reduce=reduce)  # centred already
    uneven = torch.stack([one.advantages.bool() for one in each]).any(0)  # differs from its group in some reward
    equal = len(groups[final.valid].unique()) - len(groups[uneven].unique())
    found = replace(final, missing=each[0].missing, zero_variance_groups=equal)
    if not front:
        return found
    best = non_dominated(r * w.sign()[:, None], groups)
    return replace(
        found,
        advantages=found.advantages.where(best, 0.0),
        valid=found.valid & best,
        dominated=int((found.valid & ~best).sum()),
    )


def non_dominated(values: Tensor, groups: Tensor) -> Tensor:
    """(n,) bool: images that no other image of their group dominates.

    a dominates b if it is at least as good in every reward and better in one; equal images do not dominate each other.

    Args:
        values: (K, n), more is better; an image with NaN is not in the set and dominates nothing. groups: (n,)
        integers.
    """
    v, g = values.cpu(), groups.cpu()
    known = ~v.isnan().any(0)
    best = known.clone()
    for group in g.unique():
        rows = ((g == group) & known).nonzero().flatten()
        own = v[:, rows]
        no_worse = (own[:, :, None] >= own[:, None, :]).all(0)  # [a, b]: a is at least as good as b
        better = (own[:, :, None] > own[:, None, :]).any(0)
        best[rows] = ~(no_worse & better).any(0)
    return best
