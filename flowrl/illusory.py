"""Illusory advantages (Pref-GRPO, arXiv 2508.20751): differences between rewards that are hardly there, made large.

A pointwise scorer gives the images of one prompt nearly the same number. Divided by their small standard deviation the
differences, noise included, become advantages of the usual size. Three numbers show it, for a group with rewards r:

    spread         sigma = std(r), its mean over the groups
    narrow groups  share of the groups with sigma below a floor
    amplification  mean over the groups of  sum |A| / sum |r - mean(r)|,  which is 1 / sigma for z-scores
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TENTH = 0.1  # of the standard deviation of all rewards of the update: the floor where none is set


def illusory(
    rewards: Tensor, advantages: Tensor, groups: Tensor, floor: float | None, reduce: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """The three numbers, over the groups of all processes with at least two scored images.

    Args:
        rewards: (N,), NaN = missing. advantages: (N,). groups: (N,) integers.
        floor: in units of the reward; None: a tenth of the standard deviation of all rewards.
        reduce: sums a tensor over all processes; called twice.

    Returns:
        spread, narrow_groups (0 to 1), amplification; NaN where there is no such group.
    """
    r, a, g = (x.detach().cpu().flatten() for x in (rewards.double(), advantages.double(), groups))
    known = ~r.isnan()
    r, a, g = r[known], a[known], g[known]
    count, total, squares = reduce(torch.stack([torch.tensor(float(len(r))).double(), r.sum(), r.square().sum()]))
    if floor is None:
        mean = total / count.clamp_min(1)
        floor = TENTH * float((squares / count.clamp_min(1) - mean**2).clamp_min(0).sqrt())
    _, index = g.unique(return_inverse=True)
    size = index.bincount().double()
    deviation = r - (torch.zeros_like(size).index_add_(0, index, r) / size)[index]
    sigma = (torch.zeros_like(size).index_add_(0, index, deviation.square()) / size).sqrt()
    apart = torch.zeros_like(size).index_add_(0, index, deviation.abs())
    pushed = torch.zeros_like(size).index_add_(0, index, a.abs())
    several = size > 1
    differs = several & (apart > 0)
    sums = torch.stack([
        several.sum().double(), sigma[several].sum(), (sigma[several] < floor).sum().double(),
        differs.sum().double(), (pushed / apart)[differs].sum(),
    ])  # fmt: skip
    n, spread, narrow, m, amplification = reduce(sums).tolist()
    return {
        "spread": spread / n if n else float("nan"),
        "narrow_groups": narrow / n if n else float("nan"),
        "amplification": amplification / m if m else float("nan"),
    }
