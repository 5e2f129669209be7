"""Noised leaves: what objectives on finished images train on (DiffusionNFT, arXiv 2509.16117).

Every leaf is noised again, x_s = (1 - s) x0 + s e, at times of the rollout's own schedule. A row is one leaf at one
time; its weight is 1. The noise and the choice of times are functions of the leaf's key (or, with `shared_noise`, of
its group's), so that nothing depends on micro-batches or processes. Predictions are those without guidance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

import samplers
from flowrl.objectives import LeafObjective, LeafScalars, LeafVelocities
from samplers.kernels import per_row

if TYPE_CHECKING:
    from flowrl.policies import Policy
    from flowrl.update import Batch, UpdateSettings


def leaf_times(plan: samplers.Plan, fraction: float = 1.0) -> tuple[float, ...]:
    """The times at which a plan's steps start, from noise on: the first int(fraction times their number), or one."""
    times = sorted(set(plan.s[1:]), reverse=True)
    return tuple(times[: max(1, int(len(times) * fraction))])


def leaf_rows(batch: Batch, part: int, objective: LeafObjective, epoch: int = 0) -> Tensor:
    """(n, 3) long: root, leaf and number of the time (in `leaf_times`) of every row of an inner update."""
    tree, (count, strata) = batch.tree, _strata(batch, objective)
    edges, shared = [count * i // strata for i in range(strata + 1)], objective.shared_noise
    rows = [
        (root, leaf, _key(tree, root, leaf, "leaf time", epoch * strata + i, shared).integer(edges[i], edges[i + 1]))
        for root, leaf in _leaves(batch, part).tolist()
        for i in range(strata)
    ]
    return torch.tensor(rows, dtype=torch.long).view(-1, 3)


def leaf_count(batch: Batch, part: int, objective: LeafObjective) -> int:
    """Number of rows of an inner update on this process."""
    return len(_leaves(batch, part)) * _strata(batch, objective)[1]


def leaf_scalars(
    policy: Policy, batch: Batch, rows: Tensor, objective: LeafObjective, settings: UpdateSettings
) -> LeafScalars:
    """The scalars of these rows of `leaf_rows`, with gradient if enabled."""
    tree, (root, leaf, step) = batch.tree, rows.unbind(1)
    device = tree.leaves.device
    times = leaf_times(tree.plan, objective.time_fraction)
    first, shared = settings.epoch * len(times), objective.shared_noise
    keys = [_key(tree, i, j, "leaf noise", first + k, shared) for i, j, k in rows.tolist()]
    x0 = tree.leaves[root.to(device), leaf.to(device)]
    s = torch.tensor(times, dtype=torch.float32)[step].to(device)
    x = per_row(1 - s, x0) * x0 + per_row(s, x0) * samplers.noise(keys, x0.shape[1:]).to(device)
    cond = batch.cond[root]
    v = v_old = policy.predict(x, s, cond)
    v_ref = None
    with torch.no_grad():
        if not settings.on_policy:
            with policy.weights("old"):
                v_old = policy.predict(x, s, cond)
        if "reference" in objective.needs:
            with policy.weights("reference"):
                v_ref = policy.predict(x, s, cond)
    return LeafScalars(
        **objective.measure(LeafVelocities(x0, x, s, v, v_old.detach(), v_ref)),
        advantage=batch.given("leaf_advantage")[root, leaf].to(device),
        weight=torch.ones(len(rows), device=device),
        group=batch.group[root].to(device),
        root=root.to(device),
    )


def _leaves(batch: Batch, part: int) -> Tensor:
    """(n, 2) long: root and leaf of those that are in the loss."""
    mine = batch.given("root_part") == part
    return (~batch.given("leaf_advantage").isnan() & mine[:, None]).nonzero()


def _strata(batch: Batch, objective: LeafObjective) -> tuple[int, int]:
    """How many times there are, and how many of them each leaf gets."""
    count = len(leaf_times(batch.tree.plan, objective.time_fraction))
    return count, count if objective.times is None else min(objective.times, count)


def _key(tree: samplers.Tree, root: int, leaf: int, purpose: str, step: int, shared: bool) -> samplers.Key:
    """Key of a leaf, or of its prompt's group where that shares its times and noise."""
    key = tree.keys[root]._replace(purpose=purpose, step=step)
    if shared:
        return key._replace(root=None, path=())
    return key._replace(path=tree.plan.paths[int(tree.leaf_nodes[leaf])])
