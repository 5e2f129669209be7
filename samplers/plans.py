"""Plans: where a rollout branches, where noise enters, and which steps are trained.

A plan is the template of one root's tree, built before the run. Node 0 is the root (initial noise); node i > 0 stands
for the edge from `parent[i]` to it, one denoising step. A plan without branches is an ordinary trajectory, so every
sampler is a forest of plans: Flow-GRPO is K roots that never branch, a tree with L leaves gives K = roots x L images.

A plan checks itself when it is made, draws itself with its cost (`print(plan.describe())`) and counts its model calls
(`plan.cost()`). Steps without noise are Euler steps (kernel `ode`) or steps of DPM-Solver++ 2M (`ode2`, whose history
is `Plan.memory`). Plans of published methods are in `recipes`, noise levels in `levels`, plans that change from update
to update in `curricula`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from samplers import drawing
from samplers.kernels import SOLVERS, Coefficients, get_kernel, second_order
from samplers.levels import Level, Levels, linear_growth

MAX_LEAVES = 1024  # of one root, unless a builder is told otherwise: a typing error must not fill the memory


@dataclass(frozen=True)
class Cost:
    """Model calls of a rollout and its update. A call is one latent through the model once.

    sampling_calls: one per inner node. training_forwards, training_backwards: one per node that trained edges leave,
    however many they are. images: leaves. Costs add (`+`) and multiply by a number of roots (`*`).
    """

    sampling_calls: int = 0
    training_forwards: int = 0
    training_backwards: int = 0
    images: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, roots: int) -> Cost:
        return Cost(*(getattr(self, f.name) * roots for f in fields(self)))

    def guided(self) -> Cost:
        """The same with classifier-free guidance: every call counts twice, images stay."""
        return replace(self * 2, images=self.images)

    @property
    def calls_per_image(self) -> float:
        """Sampling calls plus training forwards, per image."""
        return (self.sampling_calls + self.training_forwards) / self.images


@dataclass(frozen=True)
class Frontier:
    """All inner nodes of one depth and the nodes that their edges lead to, in parent order."""

    parents: tuple[int, ...]
    children: tuple[int, ...]
    parent_at: tuple[int, ...]  # per child: position of its parent in `parents`


@dataclass(frozen=True)
class Plan:
    """Template tree of one root, as one tuple per field over its N nodes.

    parent: index of the parent, smaller than the node's own; -1 for the root. s, s_next: times of the edge into the
    node (1 noise, 0 data); the node's state lives at s_next; the root has s = s_next = its time. level: noise level.
    kernel: kernel name. trained: whether the edge enters the loss. sibling: number of the edge among those that leave
    its parent; it enters the noise key.

    Raises ValueError when the fields do not describe a tree, times do not fall, a trained edge has no noise, trained
    edges use more than one kernel, siblings without noise coincide, or leaves end at different times.
    """

    parent: tuple[int, ...]
    s: tuple[float, ...]
    s_next: tuple[float, ...]
    level: tuple[float, ...]
    kernel: tuple[str, ...]
    trained: tuple[bool, ...]
    sibling: tuple[int, ...]

    def __post_init__(self) -> None:
        self.validate()

    def __len__(self) -> int:
        """Number of nodes, the root included."""
        return len(self.parent)

    # ---- shape of the tree

    @cached_property
    def _children(self) -> tuple[tuple[int, ...], ...]:
        lists: list[list[int]] = [[] for _ in self.parent]
        for node, parent in enumerate(self.parent[1:], start=1):
            lists[parent].append(node)
        return tuple(map(tuple, lists))

    def children(self, node: int) -> tuple[int, ...]:
        """Nodes that the edges leaving `node` lead to."""
        return self._children[node]

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Nodes without children, in node order: the images of one root."""
        return tuple(node for node in range(len(self)) if not self._children[node])

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Number of edges from the root, per node."""
        depths = [0]
        for parent in self.parent[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """Edges on the longest path."""
        return max(self.depths)

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """Sibling numbers of the edges from the root, per node: the path of its noise key."""
        paths: list[tuple[int, ...]] = [()]
        for node in range(1, len(self)):
            paths.append((*paths[self.parent[node]], self.sibling[node]))
        return tuple(paths)

    @cached_property
    def below(self) -> Tensor:
        """(N, L) bool: which leaves lie at or below each node."""
        below = torch.zeros(len(self), len(self.leaves), dtype=torch.bool)
        for column, leaf in enumerate(self.leaves):
            node = leaf
            while node >= 0:
                below[node, column] = True
                node = self.parent[node]
        return below

    @cached_property
    def share(self) -> Tensor:
        """(N,) float64: share of the root's leaves at or below each node, in (0, 1].

        With these weights the sum over edges of weight x term is the mean over leaves of the sum along the leaf's
        path: the gradient of a tree equals that of independent paths."""
        return self.below.double().mean(1)

    @cached_property
    def frontiers(self) -> tuple[Frontier, ...]:
        """The tree by depth, as the rollout walks it."""
        frontiers, parents = [], (0,)
        while parents:
            pairs = [(child, at) for at, parent in enumerate(parents) for child in self._children[parent]]
            children, parent_at = zip(*pairs, strict=True)
            frontiers.append(Frontier(parents, children, parent_at))
            parents = tuple(child for child in children if self._children[child])
        return tuple(frontiers)

    @cached_property
    def coefficients(self) -> Coefficients:
        """a, b, c of every edge: three (N,) float64 tensors; (1, 0, 0) for the root."""
        a, b, c = torch.ones(len(self)).double(), torch.zeros(len(self)).double(), torch.zeros(len(self)).double()
        columns = [torch.tensor(t, dtype=torch.float64) for t in (self.s, self.s_next, self.level)]
        for name in sorted(set(self.kernel[1:])):
            rows = torch.tensor([i for i in range(1, len(self)) if self.kernel[i] == name])
            a[rows], b[rows], c[rows] = get_kernel(name).coefficients(*(t[rows] for t in columns))
        return Coefficients(a, b, c)

    @cached_property
    def memory(self) -> tuple[float, ...]:
        """k of every edge, x_next = a x + b v + c noise + k (x0_hat - x0_hat of the step before).

        Not 0 only where an `ode2` edge follows another one: DPM-Solver++ 2M, see `kernels`."""
        rows = [i for i, p in enumerate(self.parent) if p > 0 and self.kernel[i] == self.kernel[p] == "ode2"]
        times = [(self.s[self.parent[i]], self.s[i], self.s_next[i]) for i in rows]
        k = torch.zeros(len(self), dtype=torch.float64)
        k[rows] = second_order(*torch.tensor(times, dtype=torch.float64).view(-1, 3).T)
        return tuple(k.tolist())

    @cached_property
    def remembered(self) -> frozenset[int]:
        """Nodes whose x0_hat a step further down needs again (see `memory`)."""
        return frozenset(self.parent[self.parent[i]] for i in range(len(self)) if self.memory[i] != 0)

    @property
    def trained_kernel(self) -> str | None:
        """The kernel of the trained edges; None when there are none."""
        return next((k for k, trained in zip(self.kernel, self.trained, strict=True) if trained), None)

    # ---- what one wants to know

    def group_size(self, roots: int) -> int:
        """Images of `roots` trees."""
        return roots * len(self.leaves)

    def roots(self, group_size: int) -> int:
        """How many roots make a group of `group_size` images; ValueError when it does not come out even."""
        roots, rest = divmod(group_size, len(self.leaves))
        if rest or roots < 1:
            n = len(self.leaves)
            raise bad_plan(
                f"group size {group_size}", f"a multiple of {n}, the leaves of a root", "Change one of the two."
            )
        return roots

    def cost(self) -> Cost:
        """Model calls of one root, without guidance."""
        trained_parents = {self.parent[i] for i in range(1, len(self)) if self.trained[i]}
        inner, trained, images = len(self) - len(self.leaves), len(trained_parents), len(self.leaves)
        return Cost(inner, trained, trained, images)

    @property
    def trained_edges(self) -> int:
        """Edges that enter the loss: training forwards of one root if siblings did not share theirs."""
        return sum(self.trained)

    def independent_cost(self) -> Cost:
        """Model calls if each leaf of one root were a trajectory of its own over the same steps."""
        leaves = self.below.sum(1).tolist()
        trained = sum(leaves[i] for i in range(len(self)) if self.trained[i])
        return Cost(sum(self.depths[leaf] for leaf in self.leaves), trained, trained, len(self.leaves))

    def times(self, node: int) -> tuple[float, ...]:
        """The times on the path from the root to a node, both included."""
        times: list[float] = []
        while node >= 0:
            times.append(self.s_next[node])
            node = self.parent[node]
        return tuple(reversed(times))

    def branch(self, leaf: int) -> Plan:
        """The straight plan of one leaf. It keeps the sibling numbers and so draws the same noise: one image of a
        tree, replayed alone."""
        if leaf not in self.leaves:
            raise ValueError(f"got node {leaf}; expected a leaf, one of {self.leaves}. Choose a node without children.")
        nodes, node = [leaf], self.parent[leaf]
        while node >= 0:
            nodes.append(node)
            node = self.parent[node]
        nodes.reverse()
        rest = {f.name: tuple(getattr(self, f.name)[i] for i in nodes) for f in fields(self) if f.name != "parent"}
        return Plan(parent=tuple(range(-1, len(nodes) - 1)), **rest)

    def draw(self, compact: bool = False) -> str:
        """The tree as text. Runs of equal steps share a line; a star marks trained steps.

        compact: siblings that are alike with all that lies below them are drawn once, as "2 of"."""
        return drawing.draw(self, compact)

    def describe(self, roots: int = 1) -> str:
        """The compact drawing of one root and, below it, what `roots` of them cost (without guidance)."""
        return drawing.describe(self, roots)

    # ---- checks

    def validate(self) -> None:
        """Raise ValueError where the plan breaks a rule of the class docstring."""
        n = len(self.parent)
        for f in fields(self):
            count = len(getattr(self, f.name))
            if count != n:
                raise bad_plan(f"{count} entries in {f.name}", f"{n}, one per node", "Fill every field.")
        if n < 2 or self.parent[0] != -1:
            raise bad_plan(f"parents {self.parent[:4]}", "-1 for node 0 and at least one edge", "Start at the root.")
        if self.trained[0] or not 0 < self.s_next[0] <= 1 or self.s[0] != self.s_next[0]:
            raise bad_plan(
                f"root at s = {self.s_next[0]}", "an untrained root in (0, 1]", "Begin the sigmas at the prior."
            )
        for i, parent in enumerate(self.parent[1:], start=1):
            if not 0 <= parent < i:
                raise bad_plan(f"parent {parent} of node {i}", f"one of 0..{i - 1}", "Put parents before children.")
            if self.s[i] != self.s_next[parent]:
                fix = "An edge starts where its parent ended."
                raise bad_plan(f"edge into node {i} from s = {self.s[i]}", f"s = {self.s_next[parent]}", fix)
        noisy = (self.coefficients.c > 0).tolist()  # the coefficients check kernels, levels and that times fall
        for i in range(1, n):
            if self.trained[i] and not noisy[i]:
                fix = "Give it a level > 0 or leave it out of the trained steps."
                step = f"kernel '{self.kernel[i]}', s = {self.s[i]:.4f} to {self.s_next[i]:.4f}"
                raise bad_plan(f"a trained edge ({step}) without noise", "noise on trained edges", fix)
        kernels = sorted({self.kernel[i] for i in range(n) if self.trained[i]})
        if len(kernels) > 1:
            raise bad_plan(f"trained edges of kernels {kernels}", "one kernel", "Their log-probs are not comparable.")
        for node, children in enumerate(self._children):
            numbers = [self.sibling[i] for i in children]
            if len(set(numbers)) < len(numbers):
                fix = "Equal numbers would share noise."
                raise bad_plan(f"sibling numbers {numbers} below node {node}", "distinct numbers", fix)
            silent = [self.s_next[i] for i in children if not noisy[i]]
            if len(set(silent)) < len(silent):
                i = next(i for i in children if not noisy[i])
                where = f"below node {node} (kernel '{self.kernel[i]}', s = {self.s[i]:.4f} to {self.s_next[i]:.4f})"
                fix = "Give the branching step a level > 0 and a kernel that has noise there."
                raise bad_plan(f"equal children without noise {where}", "noise where a plan branches", fix)
        ends = sorted({self.s_next[i] for i in self.leaves})
        if len(ends) > 1:
            raise bad_plan(f"leaves at s = {ends}", "one common end", "Continue every path to the same time.")


class PlanBuilder:
    """Grow a plan edge by edge, parents first; for trees that the builders below do not cover.

    builder = PlanBuilder(1.0); node = builder.add(0, 0.5, "flow", 0.7, trained=True); ...; plan = builder.build()
    """

    def __init__(self, s: float = 1.0) -> None:
        self._rows: list[tuple[int, float, float, float, str, bool, int]] = [(-1, s, s, 0.0, "ode", False, 0)]
        self._fan: dict[int, int] = {}

    def add(
        self,
        parent: int,
        s_next: float,
        kernel: str = "ode",
        level: float = 0.0,
        trained: bool = False,
        sibling: int | None = None,
    ) -> int:
        """Add an edge from node `parent` to time `s_next`; returns the new node.

        At level 0 it is an ODE step: of second order for kernel "ode2", else of first order. sibling: its number in
        noise keys; default the number of edges that leave the parent already."""
        if not 0 <= parent < len(self._rows):
            raise bad_plan(f"parent {parent}", f"one of 0..{len(self._rows) - 1}", "Add the parent first.")
        number = self._fan.get(parent, 0) if sibling is None else sibling
        self._fan[parent] = self._fan.get(parent, 0) + 1
        kernel = kernel if level != 0 or kernel in SOLVERS else "ode"
        self._rows.append((parent, self._rows[parent][2], s_next, float(level), kernel, trained, number))
        return len(self._rows) - 1

    def build(self) -> Plan:
        """The plan; raises ValueError if it breaks a rule (see `Plan`)."""
        return Plan(*zip(*self._rows, strict=True))


def straight(
    sigmas: Tensor | Sequence[float],
    kernel: str = "flow",
    level: Level | None = None,
    trained: Iterable[int] | None = None,
    noisy: Iterable[int] | None = None,
    last_step_noise: bool = False,
    solver: str = "ode",
) -> Plan:
    """One trajectory over `sigmas` (T + 1 times from noise to data); T steps, numbered from 0.

    noisy: steps with noise, the others are ODE steps; default all but the last (all with `last_step_noise`).
    trained: steps that enter the loss; default the noisy ones but the last. level: default that of the kernel; 0 gives
    a plain ODE plan. solver: of the steps without noise, "ode" or "ode2" (see `kernels`).
    """
    return tree(sigmas, {}, kernel, level, noisy, trained, last_step_noise, solver)


def tree(
    sigmas: Tensor | Sequence[float],
    branch_at: Mapping[int, int],
    kernel: str = "flow",
    level: Level | None = None,
    noisy: Iterable[int] | None = None,
    trained: Iterable[int] | None = None,
    last_step_noise: bool = False,
    solver: str = "ode",
    max_leaves: int = MAX_LEAVES,
) -> Plan:
    """A tree over `sigmas` (T + 1 times) that splits every node of step i into `branch_at[i]` children.

    level: a number, or a function (step, depth) -> level of the noisy steps, see `levels`; depth is the number of
    steps in `branch_at` before this one. Default: that of the kernel. noisy, trained, solver: as in `straight`, for
    all nodes of those steps; a step that branches must be noisy. max_leaves: more of them are refused.
    """
    times = [float(s) for s in sigmas]
    steps = len(times) - 1
    if steps < 1:
        raise bad_plan(f"{len(times)} sigmas", "at least 2", "Ask for at least one step.")
    with_noise = _steps("noisy", noisy, steps, range(steps if last_step_noise else steps - 1))
    in_loss = _steps("trained", trained, steps, with_noise - {steps - 1})
    _steps("branch_at", branch_at, steps, ())
    for step, count in branch_at.items():
        if count < 1:
            raise bad_plan(f"{count} children at step {step}", "at least 1", "Use 1, or leave the step out.")
    check_leaves(math.prod(branch_at.values()), max_leaves, f"splits {dict(branch_at)}")
    if isinstance(level, Levels) and level.kernel != kernel:
        fix = "Levels of different kernels are different amounts of noise."
        raise bad_plan(f"levels for kernel '{level.kernel}'", f"levels for '{kernel}', the kernel of the tree", fix)
    check_solver(solver)
    if kernel in SOLVERS:
        solver = kernel
    default_level = get_kernel(kernel).default_level
    builder, front, depth = PlanBuilder(times[0]), [0], 0
    for step in range(steps):
        h = 0.0
        if step in with_noise:
            h = level(step, depth) if callable(level) else default_level if level is None else level
        # level 0 trains nothing by default; asked for by name it is an error
        train = step in in_loss and (h != 0 or trained is not None)
        edge = (times[step + 1], kernel if h != 0 else solver, h, train)
        front = [builder.add(node, *edge) for node in front for _ in range(branch_at.get(step, 1))]
        depth += step in branch_at
    return builder.build()


def sliding_tree(
    sigmas: Tensor | Sequence[float],
    window: tuple[int, int],
    branch: int = 2,
    kernel: str = "flow",
    level: Level | None = None,
    growth: float = 0.0,
    solver: str = "ode",
    max_leaves: int = MAX_LEAVES,
) -> Plan:
    """A tree that branches at, puts noise on and trains exactly the steps [start, end) of `window`; ODE elsewhere.

    branch ** (end - start) leaves; with branch 1 one trajectory with a window of noise. level: as in `tree`. growth:
    makes a single level grow linearly with depth, level * (1 + growth * depth / (end - start)).
    """
    start, end = window
    steps = len(sigmas) - 1
    if not 0 <= start < end <= steps:
        raise bad_plan(f"window {tuple(window)}", f"0 <= start < end <= {steps}", "Move the window inside the steps.")
    if growth != 0:
        if callable(level):
            raise bad_plan(
                f"growth {growth} beside a level function", "one of the two", "Put the growth into the function."
            )
        level = linear_growth(kernel, growth, end - start, level)
    inside = range(start, end)
    splits = {step: branch for step in inside}
    return tree(sigmas, splits, kernel, level, inside, inside, solver=solver, max_leaves=max_leaves)


def check_solver(solver: str) -> None:
    """ValueError for a kernel that does not solve steps without noise."""
    if solver not in SOLVERS:
        raise bad_plan(f"solver '{solver}'", f"one of {list(SOLVERS)}", "Check the spelling.")


def check_leaves(leaves: int, most: int, what: str) -> None:
    """ValueError when one root would have more leaves than `most`."""
    if leaves > most:
        fix = "Branch less, or raise max_leaves if memory and reward can take it."
        raise bad_plan(f"{leaves} leaves per root from {what}", f"at most {most}", fix)


def _steps(name: str, given: Iterable[int] | None, steps: int, default: Iterable[int]) -> set[int]:
    chosen = set(default if given is None else given)
    outside = sorted(chosen - set(range(steps)))
    if outside:
        raise bad_plan(f"{name} steps {outside}", f"steps 0..{steps - 1}", "Count steps from 0.")
    return chosen


def bad_plan(got: str, expected: str, fix: str) -> ValueError:
    """The error of a plan that cannot be, for all that build plans."""
    return ValueError(f"plan: got {got}; expected {expected}. {fix}")
