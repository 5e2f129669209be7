"""Credit of an update: from the rewards of its images to advantages of leaves and of edges.

The parts are pure functions (`advantages`, `credit`, `selection`, `samplers.pruning`); here the settings choose them.
Leaves that share a prompt are compared where they differ in noise only (`recipes.leaf_groups`): all of them in a
trajectory or a tree, those of one step and grid in a trunk with branches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from flowrl import credit as rules
from flowrl.advantages import Advantages, group_advantages
from flowrl.combine_advantages import combined_advantages
from flowrl.config import Config
from flowrl.credit import Credit, edge_weights
from flowrl.selection import PromptHistory, best_and_worst, branch_sets
from samplers import pruning, recipes
from samplers.plans import Plan

Reduce = Callable[[Tensor], Tensor]
HISTORY_BOUND = 5.0  # of |z| where advantage.clip is null


class Assigned(NamedTuple):
    """What an update learns from.

    advantages: of all leaves, (R L,), with their counts. leaves: (R, L) float64, NaN = out of the loss. credit: of the
    edges. history: scores of earlier updates with this one added; None unless it is asked for.
    """

    advantages: Advantages
    leaves: Tensor
    credit: Credit
    history: PromptHistory | None


def assign(
    config: Config, plan: Plan, values: Tensor, groups: Tensor, *, prompts: Tensor, rows: Tensor, total: int,
    history: PromptHistory | None, reduce: Reduce, parts: Tensor | None = None, weights: Tensor | None = None,
) -> Assigned:  # fmt: skip
    """Advantages and credit as the settings say.

    Args:
        plan: of the R roots. values: (R, L) rewards, NaN = missing. groups: (R,) place of each root's prompt in the
            update. prompts: (R,) number of the prompt. rows: (R,) place of each root among the `total` of all
            processes. history: of earlier updates; it is left as it is.
        reduce: sums over all processes; called equally often on each.
        parts, weights: (K, R, L) raw rewards and (K,) numbers that `values` is the weighted sum of; needed unless
            `advantage.combine` is sum.
    """
    advantages, history = _leaf_advantages(
        config, plan, values, groups, prompts, rows, total, history, reduce, parts, weights
    )
    leaves = advantages.advantages.view(values.shape).double()
    valid = advantages.valid.view(values.shape)
    leaves = leaves.where(valid, torch.nan)
    c = config.credit
    keep = _selected(config, plan, leaves, groups)
    if c.select == "branch_best_worst":  # learn as if the others had not been drawn
        valid = valid & keep
    credit = _credit(config, leaves, plan, groups, valid, reduce)
    if c.select is not None and c.select != "branch_best_worst":  # the others stay in the statistics
        counted = credit.weights > 0  # what the rule dropped stays out
        credit = credit._replace(weights=edge_weights(plan, valid & keep, c.weights) * counted)
    if c.steps is not None:
        by_step = rules.step_weights(plan, c.steps, c.weights)
        credit = credit._replace(advantages=credit.advantages * by_step)
    return Assigned(advantages, leaves.where(keep, torch.nan), credit, history)


def _leaf_advantages(
    config: Config, plan: Plan, values: Tensor, groups: Tensor, prompts: Tensor, rows: Tensor, total: int,
    history: PromptHistory | None, reduce: Reduce, parts: Tensor | None, weights: Tensor | None,
) -> tuple[Advantages, PromptHistory | None]:  # fmt: skip
    a = config.advantage
    kind = recipes.leaf_groups(plan)  # (L,), -1: nothing above that leaf is trained, so it is compared with nothing
    if not plan.trained_edges:
        kind = torch.zeros_like(kind)
    compared = (kind >= 0).expand(values.shape)
    ids = groups[:, None] * (int(kind.max()) + 1) + kind
    if a.combine != "sum" and a.std != "history":
        assert parts is not None and weights is not None  # the config check asks for a weighted sum
        found = combined_advantages(
            parts[:, compared], weights, ids[compared], std=a.std, eps=a.eps, clip=a.clip, renormalise=a.renormalise,
            front=a.combine == "pareto", reduce=reduce,
        )  # fmt: skip
    else:
        found = group_advantages(
            values[compared], ids[compared], std="none" if a.std == "history" else a.std, eps=a.eps,
            clip=None if a.std == "history" else a.clip, reduce=reduce,
        )  # fmt: skip
    everything, valid = torch.zeros(values.shape), torch.zeros(values.shape, dtype=torch.bool)
    everything[compared], valid[compared] = found.advantages, found.valid
    if a.std == "history":
        history = PromptHistory(a.updates) if history is None else copy.deepcopy(history)
        z = history.standardise(values, prompts, rows, total, eps=a.eps, reduce=reduce)
        valid = ~z.isnan()  # a prompt that was seen before needs no second image now
        bound = a.clip or HISTORY_BOUND
        everything = z.where(valid, 0.0).clamp(-bound, bound).float()
    return replace(found, advantages=everything.flatten(), valid=valid.flatten()), history


def _selected(config: Config, plan: Plan, leaves: Tensor, groups: Tensor) -> Tensor:
    """(R, L) bool: the leaves whose paths are trained."""
    c = config.credit
    if c.select is None:
        return torch.ones_like(leaves, dtype=torch.bool)
    if c.select == "better_half":
        return pruning.better_half(leaves, plan)
    if c.select == "extremes":
        return pruning.extremes(leaves, c.fraction)
    if c.select == "top_bottom":
        count = max(1, round(c.fraction * config.group_size))
        return best_and_worst(leaves, groups[:, None].expand(leaves.shape), count, count)
    sets = branch_sets(plan, len(leaves))
    return best_and_worst(leaves, sets, 1, 1, at_least=c.threshold, less_than=-c.threshold)


def _credit(config: Config, leaves: Tensor, plan: Plan, groups: Tensor, valid: Tensor, reduce: Reduce) -> Credit:
    c = config.credit
    if c.rule == "leaf_mean":
        return rules.leaf_mean(leaves, plan, valid, c.weights)
    if c.rule == "sibling":
        return rules.sibling(leaves, plan, groups, valid, c.weights)
    if c.rule == "depth_z_score":
        return rules.depth_z_score(
            leaves, plan, groups, valid, c.weights, scope=c.scope, shrink=c.shrink, floor=c.floor, ddof=c.ddof,
            reduce=reduce,
        )  # fmt: skip
    return rules.path(leaves, plan, groups, valid, c.weights, average=c.rule == "path_average")
