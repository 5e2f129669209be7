"""Train less of a tree than was sampled (BranchGRPO, arXiv 2509.06040): rollouts, images and rewards stay as they are.

    depth   prune_depth(plan, depths)                  known before the rollout: a property of the plan
    width   tree.prune(keep), keep (R, L) from         known after the rewards: other leaves in each root
            better_half(values, plan) or extremes(values)

Costs of the pruned plan and of the pruned tree count what is left. `prune_width` is the width of a plan, for leaves
chosen without rewards. Where these differ from the published code: a node that keeps any trained edge costs one forward
whatever their number; missing rewards are never kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from samplers.plans import Plan, bad_plan


def prune_depth(plan: Plan, depths: Iterable[int]) -> Plan:
    """The plan without training on edges that lead to these depths (1 is the first step's end)."""
    chosen = set(depths)
    outside = sorted(chosen - set(range(1, plan.depth + 1)))
    if outside:
        raise bad_plan(f"depths {outside}", f"depths 1..{plan.depth}", "Depth 1 is the end of the first step.")
    return _with_trained(plan, [depth not in chosen for depth in plan.depths], f"depths {sorted(chosen)}")


def prune_width(plan: Plan, leaves: Iterable[int]) -> Plan:
    """The plan with training only on edges above these leaves, given by their positions in `plan.leaves`."""
    kept = sorted(set(leaves))
    if not kept or kept[0] < 0 or kept[-1] >= len(plan.leaves):
        raise bad_plan(f"leaves {kept}", f"some of the positions 0..{len(plan.leaves) - 1}", "Keep a leaf.")
    return _with_trained(plan, plan.below[:, kept].any(1).tolist(), f"all leaves but {kept}")


def better_half(values: Tensor, plan: Plan) -> Tensor:
    """(R, L) bool: the better half of the leaves below each node of the last split, one of 2 or 3, two of 4, ...

    values: (R, L) rewards of the leaves of R roots, NaN where missing. Of equals the first is kept.
    """
    keep = torch.zeros_like(values, dtype=torch.bool)
    for family in _families(plan):
        keep[:, family] = _best(values[:, family], max(1, len(family) // 2))
    return keep


def extremes(values: Tensor, fraction: float = 0.25) -> Tensor:
    """(R, L) bool: the best and the worst `fraction` of each root's leaves, at least one of each.

    values: (R, L), NaN where missing. fraction in (0, 0.5].
    """
    if not 0 < fraction <= 0.5:
        raise bad_plan(f"a fraction of {fraction}", "a number in (0, 0.5]", "0.5 keeps every leaf.")
    count = max(1, math.floor(fraction * values.shape[1] + 0.5))
    return _best(values, count) | _best(-values, count)


def _best(values: Tensor, count: int) -> Tensor:
    """(R, L) bool: the `count` largest of each row that are numbers; of equals the first."""
    order = values.nan_to_num(nan=-math.inf).argsort(dim=1, descending=True, stable=True)
    keep = torch.zeros_like(values, dtype=torch.bool).scatter(1, order[:, :count], True)
    return keep & ~values.isnan()


def _families(plan: Plan) -> list[list[int]]:
    """Positions of the leaves, by the last node above each of them that branches (the root, where none does)."""
    families: dict[int, list[int]] = {}
    for position, leaf in enumerate(plan.leaves):
        node = plan.parent[leaf]
        while node > 0 and len(plan.children(node)) == 1:
            node = plan.parent[node]
        families.setdefault(node, []).append(position)
    return list(families.values())


def _with_trained(plan: Plan, keep: list[bool], what: str) -> Plan:
    pruned = replace(plan, trained=tuple(a and b for a, b in zip(plan.trained, keep, strict=True)))
    if plan.trained_edges and not pruned.trained_edges:
        raise bad_plan(f"pruned {what}", "some of the trained edges to stay", "Prune less.")
    return pruned
