"""Credit: from the leaves of a tree to its edges.

An edge is named by the node n that it leads to; p is that node's parent. The prompt counts as the parent of the roots
of its trees. With V_n the mean of the valid leaves at or below n and k_n their number:

    rule            credit of the edge into n                               source
    leaf_mean       V_n                                                     TreeGRPO, arXiv 2512.08153 (code)
    sibling         V_n - V_p if p forks, else that of the edge above it    TreeRL, arXiv 2506.11902, eq. 3
    path            sum or mean of V_u - V_parent(u) over forks up to n     the sum: TreeRL, eq. 2
    depth_z_score   (V_n - mean) / std over the trained edges of its depth  BranchGRPO, arXiv 2509.06040, per tree;
                                                                            TempFlow-GRPO, 2508.04324, per prompt

Leaf values are rewards or leaf advantages, (R roots, L leaves), NaN = missing. A missing leaf is as if it had never
been drawn: it enters no mean, a node without valid leaves has weight 0, and a fork with one child left is none. Leaves
that a rule compares form a group (those of a prompt; with scope "tree" those of a tree); with fewer than two valid ones
it is dropped, weight 0. Equal values give exactly 0. Prompts are whole on one process.

Deviations. TreeRL compares with the root of the one tree, here it is the mean of all trees of the prompt; its sum of
eq. 2 and 3 over sqrt(k_n) is not taken. BranchGRPO sets a depth with a std below 1e-6 to zero; here `floor` is the
bound, 0 by default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flowrl.errors import UserError
from samplers.plans import Plan

EdgeWeight = Literal["share", "one"]


class Credit(NamedTuple):
    """Credit of the N nodes (an edge is named by its child node) of R roots, in the leaf values' dtype, on the CPU.

    advantages: (R, N), 0 where no valid leaf lies below.
    weights: (R, N) in [0, 1], see `edge_weights`; 0 = out of the loss.
    """

    advantages: Tensor
    weights: Tensor


# ------------------------------------------------------------------------------------------------------------- weights
def edge_weights(plan: Plan, leaves: Tensor, weights: EdgeWeight = "share") -> Tensor:
    """Weight of every edge in the loss, (R, N) float64, from the leaves (R, L) bool that count.

        "share"  w_n = k_n / L        "one"  w_n = 1 if k_n > 0 else 0        k_n = counted leaves at or below n

    With shares, sum_n w_n A_n grad log p_n at leaf-mean credit is (1/L) sum_l A_l sum over the path of l of grad log p:
    the gradient of the tree is that of independent paths to its counted leaves. "one" is as published by the tree
    papers; an edge then counts the same however many images depend on it.

    Pruning after credit (BranchGRPO's width pruning): ``credit._replace(weights=edge_weights(plan, valid & kept))``.
    """
    if weights not in ("share", "one"):
        raise UserError(f"edge weights are {weights!r}; expected 'share' or 'one'; set credit.weights to one.")
    count = leaves.double() @ plan.below.double().T
    return count / leaves.shape[1] if weights == "share" else (count > 0).double()


def step_weights(plan: Plan, steps: Literal["noise"] | Sequence[float], weights: EdgeWeight = "share") -> Tensor:
    """Weight of every trained edge by its step, (N,) float64 >= 0 with mean 1 over them; 0 on the others.

        lambda_n = f_n / (sum_m q_m f_m / sum_m q_m)    over trained edges m,    q = share of leaves, or 1

    f is the std c of the step with "noise" (TempFlow-GRPO, whose code has the constant 2.25 = 1 / mean c of Flow-SDE
    0.7 on SD3's ten steps), or ``steps[d - 1]`` for an edge to depth d: one number per step, the first step first.
    ``weights`` as in the credit that it goes with, so that the loss keeps its scale.

    Multiply ``credit.advantages`` by it, after their clip, to weigh the policy term alone (TempFlow-GRPO), or
    ``credit.weights`` to weigh the KL as well.
    """
    trained = torch.tensor(plan.trained)
    if not trained.any():
        raise UserError("step weights got a plan without trained edges; expected at least one; train some steps.")
    if isinstance(steps, str):
        if steps != "noise":
            raise UserError(f"step weights are {steps!r}; expected 'noise' or one number per step; use either.")
        factor = plan.coefficients.c
    else:
        by_step = torch.tensor([0.0, *steps], dtype=torch.float64)
        if len(steps) < plan.depth or not bool(((by_step >= 0) & by_step.isfinite()).all()):
            raise UserError(
                f"step weights are {list(steps)}; expected {plan.depth} finite numbers >= 0, one per step of the plan."
            )  # a coarser tail has fewer steps, none of them trained
        factor = by_step[torch.tensor(plan.depths)]
    q = (plan.share if weights == "share" else torch.ones_like(plan.share)) * trained
    mean = (q * factor).sum() / q.sum()
    if mean == 0:
        raise UserError(f"step weights {steps} leave no trained edge; expected one > 0 where the plan trains.")
    return factor * trained / mean


# --------------------------------------------------------------------------------------------------------------- rules
def leaf_mean(leaves: Tensor, plan: Plan, valid: Tensor | None = None, weights: EdgeWeight = "share") -> Credit:
    """Each edge gets the mean of the valid leaves below it: A_n = V_n (TreeGRPO's code; its text weighs by log-prob).

    It compares nothing, so the leaf values must be advantages; a straight plan keeps them as they are. TreeGRPO: leaf
    advantages with the prompt's std, eps 1e-8.

    Args:
        leaves: (R, L) leaf advantages, NaN = missing.
        valid: (R, L) bool, None = all that are not missing.
        weights: see `edge_weights`.

    Raises:
        UserError: shapes that do not fit the plan or each other, or an infinite value.
    """
    x, valid = _checked(leaves, plan, valid)
    value, _ = _node_means(x, valid, plan)
    return _credit(value, plan, valid, weights, leaves.dtype)


def sibling(
    leaves: Tensor, plan: Plan, groups: Tensor, valid: Tensor | None = None, weights: EdgeWeight = "share"
) -> Credit:
    """How much better the edge did than its parent, which siblings share (TreeRL, eq. 3).

        A_n = V_n - V_p   if p has two or more children with valid leaves,   else A_n = A_p

    Over the children c of a fork sum_c k_c A_c = 0, so with share weights a fork adds nothing but its differences. The
    roots of a prompt are children of one fork too, with V = mean of the prompt's valid leaves: edges above a tree's
    first fork get the difference of their tree to the prompt's other trees, and 0 where there is no other tree. One
    leaf per root: the value minus its group's mean.

    Args:
        leaves: (R, L) rewards or leaf advantages, NaN = missing. The credit has their unit.
        groups: (R,) integer ids, equal for trees of one prompt.
        valid, weights: as in `leaf_mean`. Raises as there.
    """
    x, valid, prompt = _grouped(leaves, plan, valid, groups)
    step, fork = _fork_steps(x, valid, plan, prompt)
    out = step.clone()
    for node, parent in enumerate(plan.parent[1:], start=1):  # parents come before their children
        out[:, node] = torch.where(fork[:, node], step[:, node], out[:, parent])
    return _credit(out, plan, valid, weights, leaves.dtype)


def path(
    leaves: Tensor,
    plan: Plan,
    groups: Tensor,
    valid: Tensor | None = None,
    weights: EdgeWeight = "share",
    *,
    average: bool = False,
) -> Credit:
    """What the forks on the way to the edge, its own included, have brought together.

        A_n = sum over edges u from the root to n that leave a fork of (V_u - V_parent(u))  =  V_n - V_prompt
        with `average`: that sum divided by the number of those edges (0 where there are none)

    The sum telescopes: it is the leaf mean, centred for the prompt (TreeRL, eq. 2, with all trees of the prompt in the
    place of one root). The average (ours) gives a late edge of a long good path no more than each of its forks earned.
    One leaf per root: the value minus its group's mean, both ways. Arguments and errors as in `sibling`.
    """
    x, valid, prompt = _grouped(leaves, plan, valid, groups)
    total, fork = _fork_steps(x, valid, plan, prompt)
    count = fork.double()
    for node, parent in enumerate(plan.parent[1:], start=1):
        total[:, node] += total[:, parent]
        count[:, node] += count[:, parent]
    return _credit(total / count.clamp(min=1) if average else total, plan, valid, weights, leaves.dtype)


def depth_z_score(
    leaves: Tensor,
    plan: Plan,
    groups: Tensor,
    valid: Tensor | None = None,
    weights: EdgeWeight = "share",
    *,
    scope: Literal["tree", "prompt"] = "tree",
    shrink: float = 0.0,
    floor: float = 0.0,
    ddof: Literal[0, 1] = 1,
    eps: float = 1e-8,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Credit:
    """Each edge against the other trained edges of its depth: m of them with values V, mean M.

        A_n = (V_n - M) / (max(std, floor) + eps),   std^2 = (sum (V - M)^2 + shrink s0^2) / (m - ddof + shrink)
        s0^2 = mean over all valid leaves of all processes of (leaf - mean of its tree or prompt)^2

    Raw (shrink = floor = 0) is BranchGRPO with its sample std; scope "prompt" with ddof 0 is TempFlow-GRPO's statistic
    per prompt and time step. Raw, two edges are always +-1 / sqrt(2), however small their difference (+-1 with ddof 0).
    `shrink` > 0 adds that many degrees of freedom at the leaves' std s0 to the m - ddof measured ones (the moderated
    variance of Smyth 2004), so a difference d of two edges gives +-(d / 2) sqrt((1 + shrink) / (d^2 / 2 + shrink
    s0^2)) with ddof 1: proportional to d where d is small. `floor` bounds the std from below in the unit of the leaf
    values.

    A depth with one edge gets 0. One leaf per root: with scope "prompt", ddof 0 the plain group advantage with the
    prompt's std; with scope "tree" nothing can be compared and all is dropped. Edges that are not trained get 0.

    Args:
        leaves, groups, valid, weights: as in `sibling`; the credit has no unit.
        scope: which trees are compared: each by itself, or all of a prompt.
        reduce: sums a (2,) float64 tensor over all processes. Called exactly once with shrink > 0 and never otherwise,
            on every process, also one that has no root. None = this process is alone.

    Raises:
        UserError: as in `leaf_mean`; an unknown scope, a negative shrink, floor or eps, a ddof other than 0 and 1.
    """
    usable = all(0 <= number < torch.inf for number in (shrink, floor, eps))
    if scope not in ("tree", "prompt") or ddof not in (0, 1) or not usable:
        raise UserError(
            f"depth z-score got scope {scope!r}, shrink {shrink}, floor {floor}, ddof {ddof}, eps {eps}; expected "
            "scope 'tree' or 'prompt', ddof 0 or 1 and finite numbers >= 0; change the one that is not."
        )
    x, valid, prompt = _grouped(leaves, plan, valid, torch.arange(len(leaves)) if scope == "tree" else groups)
    s0 = 0.0
    if shrink > 0:
        mean = _means(x.flatten(), valid.flatten(), prompt.repeat_interleave(x.shape[1]))[0].view_as(x)
        squares = torch.where(valid, (x - mean) ** 2, 0.0).sum()
        total, n = (reduce or (lambda sums: sums))(torch.stack([squares, valid.double().sum()])).tolist()
        s0 = (total / n) ** 0.5 if n else 0.0

    value, k = _node_means(x, valid, plan)
    depth = torch.tensor(plan.depths)
    place = (prompt[:, None] * (plan.depth + 1) + depth).flatten()  # one number per (group, depth)
    counted = ((k > 0) & torch.tensor(plan.trained)).flatten()
    mean, m = _means(value.flatten(), counted, place)
    deviation = torch.where(counted, value.flatten() - mean, 0.0)
    squares = _sums(deviation**2, place)
    std = ((squares + shrink * s0**2) / (m - ddof + shrink)).sqrt().clamp(min=floor)
    # One edge, or equal ones: their 0 / 0 must be 0.
    out = torch.where(deviation == 0, 0.0, deviation / (std + eps))
    return _credit(out.view_as(value), plan, valid, weights, leaves.dtype)


# --------------------------------------------------------------------------------------------------------------- parts
def _checked(leaves: Tensor, plan: Plan, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Leaf values as float64 with 0 for missing ones, and which are valid."""
    if leaves.ndim != 2 or leaves.shape[1] != len(plan.leaves) or (valid is not None and valid.shape != leaves.shape):
        raise UserError(
            f"credit got leaf values of shape {tuple(leaves.shape)}, valid of "
            f"{None if valid is None else tuple(valid.shape)} and a plan with {len(plan.leaves)} leaves; expected "
            "(roots, leaves) of one and the same tree."
        )
    x = leaves.detach().to("cpu", torch.float64)
    if x.isinf().any():
        root, leaf = x.isinf().nonzero()[0].tolist()
        raise UserError(
            f"the value of leaf {leaf} of root {root} is {x[root, leaf].item()}; expected a finite number, or NaN "
            "where there is none; make the reward return NaN for images that it cannot score."
        )
    valid = ~x.isnan() if valid is None else valid.cpu() & ~x.isnan()
    return torch.where(valid, x, 0.0), valid


def _grouped(leaves: Tensor, plan: Plan, valid: Tensor | None, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_checked`, without the leaves of groups with fewer than two valid ones, and each root's group as 0, 1, ..."""
    x, valid = _checked(leaves, plan, valid)
    if groups.shape != leaves.shape[:1] or groups.is_floating_point():
        raise UserError(
            f"credit got group ids of shape {tuple(groups.shape)} and dtype {groups.dtype} for {len(leaves)} roots; "
            "expected one integer per root; number the prompts 0, 1, 2, ..."
        )
    group = groups.cpu().unique(return_inverse=True)[1]
    enough = _sums(valid.sum(1).double(), group) >= 2
    return x, valid & enough[:, None], group


def _sums(x: Tensor, index: Tensor) -> Tensor:
    """(n,): for every entry the sum over all entries with its index."""
    size = int(index.max()) + 1 if len(index) else 0
    return x.new_zeros(size).index_add_(0, index, x)[index]


def _means(x: Tensor, counted: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(n,), (n,): for every entry the mean of the counted entries with its index (0 without any), and their number.

    Written as lowest + mean of the distances to it, so that the mean of equal numbers is that number to the bit.
    """
    size = int(index.max()) + 1 if len(index) else 0
    low = x.new_full((size,), torch.inf).scatter_reduce(0, index, torch.where(counted, x, torch.inf), "amin")[index]
    low = torch.where(low.isinf(), 0.0, low)
    count = _sums(counted.double(), index)
    return low + _sums(torch.where(counted, x - low, 0.0), index) / count.clamp(min=1), count


def _node_means(x: Tensor, valid: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """V and k of every node, (R, N) each; V is 0 where k is."""
    shape = (len(x), len(plan), x.shape[1])
    node = torch.arange(shape[0] * shape[1]).repeat_interleave(shape[2])
    mean, count = _means(x[:, None].expand(shape).flatten(), (valid[:, None] & plan.below).flatten(), node)
    return mean.view(shape)[..., 0], count.view(shape)[..., 0]


def _fork_steps(x: Tensor, valid: Tensor, plan: Plan, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """V_n - V_p where p forks, else 0, and where it forks; (R, N) each. The prompt is the parent of its roots."""
    value, k = _node_means(x, valid, plan)
    alive = (k > 0).double()
    whole = _means(x.flatten(), valid.flatten(), prompt.repeat_interleave(x.shape[1]))[0].view_as(x)[:, :1]
    parents = torch.tensor(plan.parent[1:])
    children = torch.zeros_like(alive).index_add_(1, parents, alive[:, 1:])
    siblings = torch.cat([_sums(alive[:, 0], prompt)[:, None], children[:, parents]], 1)
    fork = (alive > 0) & (siblings >= 2)
    return torch.where(fork, value - torch.cat([whole, value[:, parents]], 1), 0.0), fork


def _credit(advantages: Tensor, plan: Plan, valid: Tensor, weights: EdgeWeight, dtype: torch.dtype) -> Credit:
    """The credit in the caller's dtype, 0 where no valid leaf lies below."""
    w = edge_weights(plan, valid, weights)
    return Credit(torch.where(w > 0, advantages, 0.0).to(dtype), w.to(dtype))
