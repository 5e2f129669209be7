"""Plans of published methods, each a function of a schedule and a few numbers.

    method                       arXiv         plan
    Flow-GRPO                    2505.05470    plans.straight(sigmas)
    Flow-GRPO-Fast (its code)                  windowed, at random places (curricula.Window)
    DanceGRPO                    2505.07818    plans.straight(sigmas, "dance", 0.3), one initial noise per group
    MixGRPO                      2507.21802    windowed, sliding (curricula.Window)
    MixGRPO-Flash, Flash*        2507.21802    coarse_tail of the same, 0.4; frozen window, 0.2
    TreeGRPO                     2512.08153    plans.sliding_tree, sliding
    Dynamic-TreeRPO              2509.23352    plans.sliding_tree with growth
    BranchGRPO                   2509.06040    plans.tree(sigmas, {0: 2, 3: 2, 6: 2, 9: 2}, "dance"); pruning: `pruning`
    TMPO                         2605.10983    split_tree with promotion; splits: curricula.moving_steps
    TempFlow-GRPO                2508.04324    trunk
    Granular-GRPO                2510.01982    trunk with strides (1, 2)
    B2-DiffuRL                   2503.11240    fork; its interval: curricula.backward
    HiCoGen                      2511.19965    plans.straight with levels.cosine_decay

`print(plan.describe(roots))` shows any of them with its cost.

Where these differ from the published codes. Split children are drawn with the std of their log-prob (BranchGRPO scales
split noise by another factor than its density). The last step has no noise and is not trained, so TempFlow's trunk
branches at all steps but the last. Where Granular's grids coincide, near the end, one is kept instead of scoring
one image twice. TMPO's promoted split keeps the other splits' own levels and times. Flash's new grid has
round(fraction n) steps for n old ones, at evenly spaced positions of the old grid (published: even in unshifted time,
one step fewer), and its first step is of first order, having no history on the ODE's path (published: with Flow-SDE it
takes the window's last prediction).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from samplers.levels import Level, deeper
from samplers.plans import MAX_LEAVES, Plan, PlanBuilder, bad_plan, check_leaves, check_solver, sliding_tree, tree


def windowed(
    sigmas: Tensor | Sequence[float],
    window: tuple[int, int],
    kernel: str = "flow",
    level: Level | None = None,
    solver: str = "ode",
) -> Plan:
    """One trajectory with noise and training in the steps [start, end) only (MixGRPO, Flow-GRPO-Fast).

    T calls and 1 image per root, end - start training forwards.
    """
    return sliding_tree(sigmas, window, 1, kernel, level, solver=solver)


def coarse_tail(plan: Plan, fraction: float = 0.4, solver: str = "ode2") -> Plan:
    """The same plan with a coarser, higher-order way from the last noise to the data (MixGRPO-Flash).

    The n steps without noise that end a path become max(1, round(fraction n)) steps of `solver`. What is before them,
    noise keys included, stays as it was. fraction in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise bad_plan(f"a tail fraction of {fraction}", "a number in (0, 1]", "1 keeps the grid.")
    check_solver(solver)
    noisy = (plan.coefficients.c > 0).tolist()
    in_tail = [False] * len(plan)  # the edge into the node, and all below it, is a noise-free run to one leaf
    for i in reversed(range(1, len(plan))):
        below = plan.children(i)
        in_tail[i] = not noisy[i] and len(below) <= 1 and all(in_tail[child] for child in below)
    builder, new = PlanBuilder(plan.s_next[0]), {0: 0}
    for i in range(1, len(plan)):
        parent = plan.parent[i]
        if not in_tail[i]:
            edge = (plan.s_next[i], plan.kernel[i], plan.level[i], plan.trained[i])
            new[i] = builder.add(new[parent], *edge, sibling=plan.sibling[i])
        elif not in_tail[parent]:
            times, node = [plan.s[i]], i
            while True:
                times.append(plan.s_next[node])
                if not plan.children(node):
                    break
                (node,) = plan.children(node)
            end, number = new[parent], plan.sibling[i]
            for s in _coarser(times, fraction):
                end, number = builder.add(end, s, solver, sibling=number), 0
    return builder.build()


def _coarser(times: Sequence[float], fraction: float) -> list[float]:
    """Fewer times after times[0], at even positions of the old grid, between whose points one interpolates."""
    old = len(times) - 1
    new = max(1, math.floor(fraction * old + 0.5))
    chosen = []
    for j in range(1, new + 1):
        whole, rest = divmod(j * old, new)
        s = times[whole]
        chosen.append(s + (times[whole + 1] - s) * rest / new if rest else s)
    return chosen


def split_tree(
    sigmas: Tensor | Sequence[float],
    splits: Mapping[int, int],
    kernel: str = "cps",
    level: Level | None = None,
    promote: int | None = 1,
    solver: str = "ode",
    max_leaves: int = MAX_LEAVES,
) -> tuple[int, Plan]:
    """(roots, plan): a tree with noise, branches and training at the split steps only, ODE between them (TMPO).

    splits: {step: children}. When the first split is at step `promote` or before it (None: never), its children become
    roots with initial noise of their own, which costs as much and differs more: roots is then their number, else 1.
    level as a function still counts the promoted split: depth 1 is the second of `splits`.
    """
    first = min(splits, default=None)
    promoted = first is not None and promote is not None and first <= promote and len(splits) > 1
    roots = splits[first] if promoted and first is not None else 1
    rest = {step: count for step, count in splits.items() if not (promoted and step == first)}
    if roots < 1:
        raise bad_plan(f"{roots} children at step {first}", "at least 1", "Use 1, or leave the step out.")
    if not rest:
        raise bad_plan(f"splits {dict(splits)}", "at least one step that splits", "Use a straight plan instead.")
    check_leaves(math.prod(splits.values()), max_leaves, f"splits {dict(splits)}")
    level = deeper(level, 1) if promoted else level
    return roots, tree(sigmas, rest, kernel, level, rest, rest, solver=solver, max_leaves=max_leaves)


def trunk(
    sigmas: Tensor | Sequence[float],
    steps: Iterable[int],
    branches: int = 6,
    kernel: str = "flow",
    level: Level | None = None,
    strides: Sequence[int] = (1,),
    finish_trunk: bool = False,
    max_leaves: int = MAX_LEAVES,
    solver: str = "ode",
) -> Plan:
    """An ODE trunk that hangs `branches` one-step SDE branches at each of `steps`; branches end by ODE (TempFlow).

    strides: each branch is finished once per stride, on every stride-th remaining time (Granular-GRPO: 1 and 2); grids
    that coincide count once. finish_trunk: lead the trunk itself to the data, one image more without training. level:
    a number or a function (step, depth) with depth the number of listed steps before this one. solver: of the steps
    without noise, "ode" or "ode2" (see `kernels`). The branches are trained: one forward per listed step serves all
    that leave it. `leaf_groups` tells which images to compare.
    """
    times, chosen = [float(s) for s in sigmas], sorted(set(steps))
    total = len(times) - 1
    if not chosen or chosen[0] < 0 or chosen[-1] >= total:
        raise bad_plan(f"branches at steps {chosen}", f"some of the steps 0..{total - 1}", "Count steps from 0.")
    if branches < 1 or not strides or min(strides) < 1:
        got = f"{branches} branches, strides {list(strides)}"
        raise bad_plan(got, "at least 1 of each", "Strides skip times; 1 takes every one.")
    grids = {step: _grids(times[step + 1 :], strides) for step in chosen}
    leaves = branches * sum(len(grid) for grid in grids.values()) + finish_trunk
    check_leaves(leaves, max_leaves, f"{branches} branches at {len(chosen)} steps, strides {list(strides)}")
    check_solver(solver)
    # the levels are those of the straight plan with noise at these steps, which also checks them
    levels = tree(times, dict.fromkeys(chosen, 1), kernel, level, noisy=chosen, trained=chosen).level
    builder, node = PlanBuilder(times[0]), 0
    for step in range(total if finish_trunk else chosen[-1] + 1):
        for _ in range(branches if step in grids else 0):
            branch = builder.add(node, times[step + 1], kernel, levels[step + 1], trained=True)
            for grid in grids[step]:
                end = branch
                for s in grid:
                    end = builder.add(end, s, solver)
        if finish_trunk or step < chosen[-1]:
            node = builder.add(node, times[step + 1], solver)
    return builder.build()


def _grids(times: Sequence[float], strides: Sequence[int]) -> list[tuple[float, ...]]:
    """Per stride every stride-th of the times after the first, and always the last one; equal grids once."""
    last = len(times) - 1
    grids = [tuple(times[min(i, last)] for i in range(stride, last + stride, stride)) for stride in strides]
    return list(dict.fromkeys(grids))


def fork(
    sigmas: Tensor | Sequence[float],
    interval: int,
    branches: int = 5,
    kernel: str = "ddim",
    level: Level | None = None,
    max_leaves: int = MAX_LEAVES,
) -> Plan:
    """One fork where the last `interval` steps begin, of which all but the last are trained (B2-DiffuRL).

    Noise on all steps but the last, as the policy samples. What the branches have in common before the fork does not
    tell them apart, so comparing them judges the interval's policy. The interval's length grows: `curricula.backward`.
    """
    total = len(sigmas) - 1
    if not 2 <= interval <= total:
        raise bad_plan(
            f"an interval of {interval} steps", f"2..{total}", "The last step has no noise, so 1 trains none."
        )
    start = total - interval
    return tree(sigmas, {start: branches}, kernel, level, None, range(start, total - 1), max_leaves=max_leaves)


def leaf_groups(plan: Plan) -> Tensor:
    """(L,) long: leaves with the same number differ in noise only, and so may be compared for credit.

    They left the noise at the same time, on the same grid of times since: in `trunk` one group per listed step and
    stride, in a tree over a window a single one. A leaf with no trained edge above it is in no group: -1.
    """
    numbers: dict[tuple[float, ...], int] = {}
    groups = []
    for leaf in plan.leaves:
        times, node = [plan.s_next[leaf]], leaf
        while node > 0 and not plan.trained[node]:
            node = plan.parent[node]
            times.append(plan.s_next[node])
        groups.append(-1 if node == 0 else numbers.setdefault((*times, plan.s[node]), len(numbers)))
    return torch.tensor(groups)
