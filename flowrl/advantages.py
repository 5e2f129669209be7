"""From the rewards of finished images to one number per leaf; `flowrl.credit` takes it on to the edges of a tree.

    A_i = (r_i - mean of i's group) / (std + eps), clipped to [-clip, clip]

(Flow-GRPO, arXiv 2505.05470, eq. 4, and its released code). ``std`` is a population standard deviation: of all rewards
of the update (``"global"``, the released default; it contains the spread between prompts), of the group
(``"prompt"``), or absent (``"none"``).

Missing rewards are NaN. They enter no mean, no std and no count. A group with fewer than two rewards left is dropped
whole, and its one reward does not enter the global std either. A group of equal rewards gets exactly 0. An infinite
reward is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowrl.errors import UserError

Std = Literal["global", "prompt", "none"]


@dataclass(frozen=True)
class Advantages:
    """Advantages of n leaves in G groups; the counts are those of this process.

    Attributes:
        advantages: (n,) float32 in [-clip, clip]; 0 where ``valid`` is False.
        valid: (n,) bool; False for missing rewards and for leaves of dropped groups. Invalid leaves belong in no loss.
        groups: (G,) int64, the distinct group ids in rising order.
        group_means: (G,) float64, NaN for dropped groups.
        stds: (G,) float64, the std each group was divided by (before eps): one value for all with "global",
            1 with "none", NaN for dropped groups.
        missing: leaves whose reward is NaN.
        dropped_groups: groups with fewer than two valid rewards.
        zero_variance_groups: kept groups whose rewards are all equal; they teach nothing but stay valid (KL).
        clipped: valid leaves that the clip changed.
        dominated: scored leaves that are out because another one is better in every reward (`combine_advantages`).
    """

    advantages: Tensor
    valid: Tensor
    groups: Tensor
    group_means: Tensor
    stds: Tensor
    missing: int
    dropped_groups: int
    zero_variance_groups: int
    clipped: int
    dominated: int = 0


def group_advantages(
    values: Tensor,
    groups: Tensor,
    *,
    std: Std = "global",
    eps: float = 1e-4,
    clip: float | None = 5.0,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Advantages:
    """Advantages relative to the group mean (formula and rules: see the module).

    Args:
        values: (n,) rewards, any float dtype, NaN = missing.
        groups: (n,) integer group ids, in any order. A group must be whole on one process.
        std: what to divide by.
        eps: added to the std; not used with "none".
        clip: bound on the absolute advantage, or None.
        reduce: sums a (2,) float64 tensor over all processes and returns the sum. Called exactly twice with "global"
            and never otherwise, on every process, also one that has no leaf. None = this process is alone.

    All sums are float64, and the global std is a two-pass sum of squared deviations, so that the split over processes
    changes it by float64 rounding only.

    Raises:
        UserError: an infinite reward, unknown ``std``, mismatched shapes or non-integer groups.
    """
    if std not in ("global", "prompt", "none"):
        raise UserError(f"advantage std is {std!r}; expected 'global', 'prompt' or 'none'; set advantage.std to one.")
    if values.ndim != 1 or groups.shape != values.shape:
        raise UserError(
            f"advantages got rewards of shape {tuple(values.shape)} and group ids of shape {tuple(groups.shape)}; "
            "expected two vectors of one length; pass one group id for each image."
        )
    if groups.is_floating_point():  # ids of more than 24 bits would collide in float32
        raise UserError(f"group ids have dtype {groups.dtype}; expected integers; number the groups 0, 1, 2, ...")
    r = values.detach().to("cpu", torch.float64)
    infinite = torch.isinf(r).nonzero().flatten().tolist()
    if infinite:
        raise UserError(
            f"the reward of image {infinite[0]} is {r[infinite[0]].item()} ({len(infinite)} infinite in all); expected "
            "a finite number, or NaN where there is none; make the reward return NaN for images that it cannot score."
        )

    ids, index = torch.unique(groups.to("cpu"), return_inverse=True)
    n_groups = len(ids)
    scored = ~torch.isnan(r)
    kept = torch.zeros(n_groups, dtype=torch.int64).index_add_(0, index, scored.long()) >= 2
    valid = scored & kept[index]
    count = torch.zeros(n_groups, dtype=torch.float64).index_add_(0, index, valid.double())
    r = torch.where(valid, r, 0.0)

    means = torch.zeros_like(count).index_add_(0, index, r) / count  # 0 / 0 = NaN for dropped groups
    deviation = torch.where(valid, r - means[index], 0.0)
    # The mean of equal numbers may round away from them; "equal rewards give exactly 0" needs the comparison itself.
    low = torch.full_like(count, torch.inf).scatter_reduce(0, index[valid], r[valid], "amin")
    high = torch.full_like(count, -torch.inf).scatter_reduce(0, index[valid], r[valid], "amax")
    equal = kept & (low == high)
    deviation = torch.where(equal[index], 0.0, deviation)

    if std == "global":
        stds = _global_std(r, valid, reduce).expand(n_groups).clone()
    elif std == "prompt":
        stds = (torch.zeros_like(count).index_add_(0, index, deviation**2) / count).sqrt()
    else:
        stds = torch.ones_like(count)
    stds[~kept] = torch.nan

    scale = stds if std == "none" else stds + eps
    # A group of equal rewards has deviation 0; with eps = 0 its 0 / 0 must still be 0.
    raw = torch.where(deviation == 0, 0.0, deviation / scale[index])
    advantages = raw if clip is None else raw.clamp(-clip, clip)
    return Advantages(
        advantages=advantages.float(),
        valid=valid,
        groups=ids,
        group_means=means,
        stds=stds,
        missing=int((~scored).sum()),
        dropped_groups=int((~kept).sum()),
        zero_variance_groups=int(equal.sum()),
        clipped=int((advantages != raw).sum()),
    )


def _global_std(r: Tensor, valid: Tensor, reduce: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Population std of the valid rewards of all processes: sqrt(sum (r - mean)^2 / n), () float64; NaN when n = 0."""
    reduce = reduce or (lambda sums: sums)
    total, n = reduce(torch.stack([r.sum(), valid.double().sum()]))
    squares = torch.where(valid, (r - total / n) ** 2, 0.0).sum()
    return (reduce(torch.stack([squares, torch.zeros_like(squares)]))[0] / n).sqrt()
