"""Plans as text: `Plan.draw` and `Plan.describe`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from samplers.kernels import SOLVERS

if TYPE_CHECKING:
    from samplers.plans import Plan


def draw(plan: Plan, compact: bool) -> str:
    """See `Plan.draw`."""
    looks = [_look(plan, node) for node in range(len(plan))]
    shapes = _shapes(plan, looks)
    lines = [f"s {plan.s_next[0]:.4f}"]

    def walk(node: int, indent: str) -> None:
        groups: list[list[int]] = []
        for child in plan.children(node):
            if compact and groups and shapes[groups[-1][0]] == shapes[child]:
                groups[-1].append(child)
            else:
                groups.append([child])
        for group in groups:
            end, run = group[0], 1
            while len(plan.children(end)) == 1 and looks[plan.children(end)[0]] == looks[end]:
                run, end = run + 1, plan.children(end)[0]
            single, last = len(plan.children(node)) == 1, group is groups[-1]
            mark = "─" if single else "└" if last else "├"
            count = f"{len(group)} of " if len(group) > 1 else ""
            lines.append(f"{indent}{mark}─ {count}{looks[end]} x{run} → {plan.s_next[end]:.4f}")
            # a single continuation stays on the same margin, so that long trajectories do not drift to the right
            walk(end, indent + ("" if single else "   " if last else "│  "))

    walk(0, "")
    return "\n".join(lines)


def describe(plan: Plan, roots: int) -> str:
    """See `Plan.describe`."""
    cost, alone = plan.cost() * roots, plan.independent_cost() * roots

    def shared(calls: int, separate: int) -> str:
        return f" ({separate} as independent trajectories)" if separate != calls else ""

    calls, forwards = cost.sampling_calls, cost.training_forwards
    edges = _count(plan.trained_edges * roots, "edge")
    lines = (
        draw(plan, compact=True),
        f"{_count(roots, 'root')}, {_count(cost.images, 'image')}, {cost.calls_per_image:.2f} calls per image",
        f"sampling: {_count(calls, 'call')}{shared(calls, alone.sampling_calls)}",
        f"training: {_count(forwards, 'forward')} for {edges}{shared(forwards, alone.training_forwards)}",
    )
    return "\n".join(lines)


def _look(plan: Plan, node: int) -> str:
    """What the step into a node is: its kernel and level where it has noise, else its solver; a star when trained."""
    silent = plan.kernel[node] if plan.kernel[node] in SOLVERS else "ode"
    name = f"{plan.kernel[node]} {plan.level[node]:.4g}" if plan.coefficients.c[node] > 0 else silent
    return name + "*" * plan.trained[node]


def _shapes(plan: Plan, looks: list[str]) -> list[int]:
    """One number per node, equal where the edge into it and all below it are equal."""
    numbers: dict[tuple, int] = {}
    shapes = [0] * len(plan)
    for i in reversed(range(len(plan))):
        key = (looks[i], plan.level[i], plan.s_next[i], *(shapes[child] for child in plan.children(i)))
        shapes[i] = numbers.setdefault(key, len(numbers))
    return shapes


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)
