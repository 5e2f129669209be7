"""Credit rules against numbers worked out by hand, a slow reference that walks the tree, and their laws."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from thread_ranks import Reduce, in_ranks

import samplers
from flowrl.advantages import group_advantages
from flowrl.credit import Credit, depth_z_score, edge_weights, leaf_mean, path, sibling, step_weights
from flowrl.errors import UserError
from samplers import Plan, PlanBuilder

NAN = float("nan")
RULES = {
    "leaf_mean": lambda x, plan, groups, valid=None, weights="share": leaf_mean(x, plan, valid, weights),
    "sibling": sibling,
    "path": path,
    "path, average": partial(path, average=True),
    "z per tree": depth_z_score,
    "z per prompt": partial(depth_z_score, scope="prompt", ddof=0),
    "z, shrunk": partial(depth_z_score, shrink=1.0, floor=0.05),
    "z per prompt, shrunk": partial(depth_z_score, scope="prompt", shrink=2.5),
}
CENTRED = {name: rule for name, rule in RULES.items() if name != "leaf_mean"}
z_rules = pytest.mark.parametrize("name", [name for name in RULES if name.startswith("z")])


def grow(*counts: list[int], trained: bool = True) -> Plan:
    """A plan of one step per list; its numbers are the children of each node of that depth, left to right."""
    builder, front = PlanBuilder(1.0), [0]
    for step, row in enumerate(counts, start=1):
        s = 1 - step / len(counts)
        front = [
            builder.add(node, s, "flow", 0.7, trained)
            for node, m in zip(front, row, strict=True)
            for _ in range(m)
        ]  # fmt: skip
    return builder.build()


# A root (0) that splits in 1 and 2; 1 splits in the leaves 3 and 4, 2 ends in the leaf 5.
TREE = grow([2], [2, 1])
LEAVES = torch.tensor([[1.0, 2.0, -3.0], [4.0, 0.0, 5.0]])
ONE_PROMPT = torch.tensor([7, 7])


def close(actual: torch.Tensor, expected: object, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(
        actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )


# --- by hand ------------------------------------------------------------------------------------------------------


def test_leaf_mean_by_hand():
    out = leaf_mean(LEAVES, TREE)
    close(out.advantages, [[0, 1.5, -3, 1, 2, -3], [3, 2, 5, 4, 0, 5]])
    close(out.weights, [[1, 2 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3]] * 2)
    assert out.advantages.dtype == out.weights.dtype == torch.float32


def test_leaf_mean_skips_missing_leaves():
    for leaves, valid in [([1.0, NAN, -3.0], None), ([1.0, 9.0, -3.0], torch.tensor([[True, False, True]]))]:
        out = leaf_mean(torch.tensor([leaves]), TREE, valid)
        close(out.advantages, [[-1, 1, -3, 1, 0, -3]])
        close(out.weights, [[2 / 3, 1 / 3, 1 / 3, 1 / 3, 0, 1 / 3]])


def test_a_straight_path_gets_its_leafs_advantage_with_weight_one():
    out = leaf_mean(torch.tensor([[2.0], [-1.0]]), grow([1], [1], [1]))
    assert out.advantages.tolist() == [[2.0] * 4, [-1.0] * 4] and (out.weights == 1).all()


def test_sibling_by_hand():
    # means of the nodes: 0 | 1.5 -3 | 1 2 -3 and 3 | 2 5 | 4 0 5; of the prompt: 9 / 6 = 1.5
    out = sibling(LEAVES, TREE, ONE_PROMPT)
    # 5 is the only child of 2 and inherits; the roots differ from their prompt by -1.5 and 1.5
    close(out.advantages, [[-1.5, 1.5, -3, -0.5, 0.5, -3], [1.5, -1, 2, 2, -2, 2]])
    alone = sibling(LEAVES, TREE, torch.tensor([0, 1]))
    close(alone.advantages[:, 0], [0, 0])
    close(alone.advantages[:, 1:], out.advantages[:, 1:].tolist())


def test_edges_above_the_first_fork_compare_trees():
    plan = grow([1], [1], [2])  # 0 - 1 - 2 < 3, 4
    out = sibling(torch.tensor([[1.0, 3.0], [6.0, 6.0]]), plan, ONE_PROMPT)  # means 2, 6; prompt 4
    close(out.advantages, [[-2, -2, -2, -1, 1], [2, 2, 2, 0, 0]])


def test_path_by_hand():
    out = path(LEAVES, TREE, ONE_PROMPT)
    close(out.advantages, [[-1.5, 0, -4.5, -0.5, 0.5, -4.5], [1.5, 0.5, 3.5, 2.5, -1.5, 3.5]])  # node means - 1.5
    # forks passed, the prompt's own included: 1 | 2 2 | 3 3 2
    out = path(LEAVES, TREE, ONE_PROMPT, average=True)
    close(out.advantages, [[-1.5, 0, -2.25, -0.5 / 3, 0.5 / 3, -2.25], [1.5, 0.25, 1.75, 2.5 / 3, -0.5, 1.75]])


def test_depth_z_score_by_hand():
    # depth 1: 1.5 -3 and 2 5, half differences 2.25 and 1.5, sample stds 4.5 / sqrt 2 and 3 / sqrt 2
    # depth 2: 1 2 -3 and 4 0 5, means 0 and 3, sums of squares 14 and 14, sample std sqrt 7
    h, s = math.sqrt(0.5), math.sqrt(7)
    out = depth_z_score(LEAVES, TREE, ONE_PROMPT, eps=0)
    close(out.advantages, [[0, h, -h, 1 / s, 2 / s, -3 / s], [0, -h, h, 1 / s, -3 / s, 2 / s]])
    # population: two nodes are +-1
    close(depth_z_score(LEAVES, TREE, ONE_PROMPT, eps=0, ddof=0).advantages[:, 1:3], [[1, -1], [-1, 1]])


def test_depth_z_score_over_all_trees_by_hand():
    # depth 1: 1.5 -3 2 5, mean 1.375, squares 0.015625 + 19.140625 + 0.390625 + 13.140625 = 32.6875
    # depth 2: 1 2 -3 4 0 5, mean 1.5, squares 0.25 + 0.25 + 20.25 + 6.25 + 2.25 + 12.25 = 41.5
    out = depth_z_score(LEAVES, TREE, ONE_PROMPT, scope="prompt", ddof=0, eps=0)
    a, b = math.sqrt(32.6875 / 4), math.sqrt(41.5 / 6)
    close(out.advantages[0], [0, 0.125 / a, -4.375 / a, -0.5 / b, 0.5 / b, -4.5 / b])
    close(out.advantages[1], [0, 0.625 / a, 3.625 / a, 2.5 / b, -1.5 / b, 3.5 / b])


def test_shrinking_by_hand():
    # leaves about their tree's mean: 14 + 14 over 6 leaves, s0^2 = 14 / 3
    # depth 1, shrink 1: (2 * 2.25^2 + 14 / 3) / (2 - 1 + 1) = 7.395833; (2 * 1.5^2 + 14 / 3) / 2 = 4.583333
    out = depth_z_score(LEAVES, TREE, ONE_PROMPT, shrink=1.0, eps=0)
    close(out.advantages[0, 1:3], [2.25 / math.sqrt(7.3958333), -2.25 / math.sqrt(7.3958333)])
    close(out.advantages[1, 1:3], [-1.5 / math.sqrt(4.5833333), 1.5 / math.sqrt(4.5833333)])
    # depth 2: (14 + 14 / 3) / (3 - 1 + 1) = 56 / 9
    close(out.advantages[0, 3:], [x / math.sqrt(56 / 9) for x in (1, 2, -3)])
    # a floor of 4 is above all of them
    close(depth_z_score(LEAVES, TREE, ONE_PROMPT, floor=4.0, eps=0).advantages[0, 1:3], [2.25 / 4, -2.25 / 4])


def test_two_nodes_tell_a_small_difference_from_a_large_one_when_shrunk():
    plan, groups = grow([2]), torch.arange(3)
    for d in (1e-3, 1e-2, 1.0):
        leaves = torch.tensor([[d, 0.0], [1.0, -1.0], [3.0, 1.0]], dtype=torch.float64)
        s0 = math.sqrt((2 * (d / 2) ** 2 + 4) / 6)
        raw = depth_z_score(leaves, plan, groups).advantages[0, 1]
        shrunk = depth_z_score(leaves, plan, groups, shrink=1.0).advantages[0, 1]
        close(raw, math.sqrt(0.5), 1e-4)  # whatever the difference
        close(shrunk, d / 2 * math.sqrt(2 / (d**2 / 2 + s0**2)))
    floored = depth_z_score(torch.tensor([[1e-3, 0.0]]), plan, groups[:1], floor=0.1, eps=0).advantages[0, 1]
    close(floored, 5e-4 / 0.1)


def test_edge_weights_by_hand():
    kept = torch.tensor([[True, False, False], [True, True, True]])
    close(edge_weights(TREE, kept), [[1 / 3, 1 / 3, 0, 1 / 3, 0, 0], [1, 2 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3]])
    close(edge_weights(TREE, kept, "one"), [[1, 1, 0, 1, 0, 0], [1] * 6])


def test_only_trained_edges_are_compared_in_a_depth():
    # TempFlow-GRPO: an ODE trunk; two trained branches leave it at each of two steps and end by ODE
    b = PlanBuilder(1.0)
    early = [b.add(0, 0.5, "flow", 0.7, trained=True) for _ in range(2)]
    trunk = b.add(0, 0.5)
    for node in early:
        b.add(node, 0.0)
    late = [b.add(trunk, 0.0, "flow", 0.7, trained=True) for _ in range(2)]
    leaves = torch.tensor([[1.0, 3.0, 10.0, 20.0], [5.0, 7.0, 30.0, 40.0]])
    out = depth_z_score(leaves, b.build(), ONE_PROMPT, scope="prompt", ddof=0, eps=0).advantages
    # per step: 1 3 5 7 has mean 4 and std sqrt 5, 10 20 30 40 mean 25 and std sqrt 125
    close(out[:, early], [[-3 / math.sqrt(5), -1 / math.sqrt(5)], [1 / math.sqrt(5), 3 / math.sqrt(5)]])
    close(out[:, late], [[-15 / math.sqrt(125), -5 / math.sqrt(125)], [5 / math.sqrt(125), 15 / math.sqrt(125)]])
    others = [i for i in range(len(b.build())) if i not in (*early, *late)]
    assert (out[:, others] == 0).all()


# --- step weights -------------------------------------------------------------------------------------------------


def test_noise_weights_are_tempflows_constant_on_its_schedule():
    plan = samplers.plans.straight(samplers.sd3_sigmas(10), "flow", 0.7)
    w, c = step_weights(plan, "noise"), plan.coefficients.c
    # c of Flow-SDE 0.7 at the nine trained steps, to 4 digits
    stds = [0.7000, 0.7430, 0.5362, 0.4459, 0.3918, 0.3528, 0.3191, 0.2820, 0.2254]
    close(w[1:10], [x * 9 / sum(stds) for x in stds], 2e-4)
    close(w[1:10] / c[1:10], [2.25] * 9, 2e-3)
    assert w[0] == w[10] == 0


def test_weights_given_by_step():
    plan = grow([2], [2, 1])
    # shares sum to 1 at each depth: mean over steps (1 + 3) / 2; over the 5 edges (1 + 1 + 3 + 3 + 3) / 5 = 11 / 5
    close(step_weights(plan, [1, 3]), [0, 0.5, 0.5, 1.5, 1.5, 1.5])
    close(step_weights(plan, [1, 3], "one"), [0, *(x * 5 / 11 for x in (1, 1, 3, 3, 3))])
    close(step_weights(plan, [2, 0]), [0, 2, 2, 0, 0, 0])


# --- a slow reference ---------------------------------------------------------------------------------------------


def reference(leaves: list[list[float]], plan: Plan, groups: list[int], average: bool = False) -> dict[str, list]:
    """V, sibling and path credit by walking the tree with Python floats; None where no scored leaf lies below."""

    def scored(root: int, node: int) -> list[float]:
        if not plan.children(node):
            value = leaves[root][plan.leaves.index(node)]
            return [] if math.isnan(value) else [value]
        return [x for child in plan.children(node) for x in scored(root, child)]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    out = {name: [[None] * len(plan) for _ in leaves] for name in ("mean", "sibling", "path", "average")}
    for root, group in enumerate(groups):
        trees = [r for r, g in enumerate(groups) if g == group and scored(r, 0)]
        everything = [x for r in trees for x in scored(r, 0)]

        def walk(node, above, others, inherited, total, forks, root=root):
            here = scored(root, node)
            if not here:
                return
            value = mean(here)
            if others > 1:
                inherited, total, forks = value - above, total + value - above, forks + 1
            for name, x in zip(out, (value, inherited, total, total / max(forks, 1)), strict=True):
                out[name][root][node] = x
            alive = [child for child in plan.children(node) if scored(root, child)]
            for child in alive:
                walk(child, value, len(alive), inherited, total, forks)

        if len(everything) > 1:
            walk(0, mean(everything), len(trees), 0.0, 0.0, 0)
    return out


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """One to three steps, up to three children per node, at most twelve leaves."""
    counts, width = [], 1
    for _ in range(draw(st.integers(1, 3))):
        row = []
        for _ in range(width):
            row.append(draw(st.integers(1, 3 if width < 5 else 1)))
        counts.append(row)
        width = sum(row)
    return grow(*counts)


@st.composite
def forests(draw: st.DrawFn, missing: bool = True) -> tuple[Plan, torch.Tensor, torch.Tensor]:
    """(plan, leaf values (R, L), group ids (R,)); values on a grid of 1/8, so that equal ones occur."""
    plan, groups = draw(plans()), draw(st.lists(st.sampled_from([3, 5, 8]), min_size=1, max_size=4))
    values = st.integers(-20, 20).map(lambda i: i / 8)
    values = st.one_of(values, values, st.just(NAN)) if missing else values
    rows = draw(st.lists(st.lists(values, min_size=len(plan.leaves), max_size=len(plan.leaves)),
                         min_size=len(groups), max_size=len(groups)))  # fmt: skip
    return plan, torch.tensor(rows, dtype=torch.float64), torch.tensor(groups)


@given(forests())
def test_rules_agree_with_a_walk_over_the_tree(forest):
    plan, leaves, groups = forest
    expected = reference(leaves.tolist(), plan, groups.tolist())
    found = {
        "sibling": sibling(leaves, plan, groups),
        "path": path(leaves, plan, groups),
        "average": path(leaves, plan, groups, average=True),
    }
    for name, out in found.items():
        rows = [[x or 0.0 for x in row] for row in expected[name]]
        close(out.advantages, rows, 1e-12)
        assert [[x is not None for x in row] for row in expected[name]] == (out.weights > 0).tolist()


@given(forests(), st.sampled_from(["tree", "prompt"]), st.sampled_from([0, 1]), st.sampled_from([0.0, 0.5, 3.0]))
def test_z_scores_agree_with_python_loops(forest, scope, ddof, shrink):
    plan, leaves, groups = forest
    out = depth_z_score(leaves, plan, groups, scope=scope, ddof=ddof, shrink=shrink, floor=0.1)
    of = list(range(len(groups))) if scope == "tree" else groups.tolist()
    means = reference(leaves.tolist(), plan, [0] * len(groups))["mean"]
    members = {g: [r for r, other in enumerate(of) if other == g] for g in of}
    scored = {g: leaves[rows][~leaves[rows].isnan()] for g, rows in members.items()}
    kept = {g for g in members if len(scored[g]) > 1}
    s0 = 0.0
    if kept:
        every = torch.cat([scored[g] - scored[g].mean() for g in sorted(kept)])
        s0 = float((every**2).mean())
    for r, g in enumerate(of):
        for node in range(len(plan)):
            mates = [means[q][m] for q in members[g] for m in range(len(plan)) if plan.depths[m] == plan.depths[node]]
            mates = [v for v in mates if v is not None] if g in kept else []
            here = means[r][node] if g in kept else None
            expected = 0.0
            if here is not None and node > 0 and len(mates) > 1:
                centre = sum(mates) / len(mates)
                variance = (sum((v - centre) ** 2 for v in mates) + shrink * s0) / (len(mates) - ddof + shrink)
                expected = (here - centre) / (max(math.sqrt(variance), 0.1) + 1e-8)
            assert float(out.advantages[r, node]) == pytest.approx(expected, abs=1e-9)
            assert (out.weights[r, node] > 0) == (here is not None)


# --- laws ---------------------------------------------------------------------------------------------------------


@given(forests())
def test_leaf_weighted_sums_over_siblings_are_zero(forest):
    plan, leaves, groups = forest
    out = sibling(leaves, plan, groups)
    w = out.weights  # proportional to the number of valid leaves
    for node in range(len(plan)):
        children = list(plan.children(node))
        alive = (w[:, children] > 0).sum(1) if children else torch.zeros(len(leaves))
        total = (w * out.advantages)[:, children].sum(1)
        assert (total[alive > 1].abs() < 1e-12).all()
    for group in groups.unique():
        mine = groups == group
        if (w[mine, 0] > 0).sum() > 1:
            assert abs((w * out.advantages)[mine, 0].sum()) < 1e-12


@given(forests(), st.sampled_from(sorted(RULES)), st.sampled_from(["share", "one"]), st.randoms())
def test_renumbering_siblings_and_roots_renumbers_the_credit(forest, name, weights, random):
    plan, leaves, groups = forest
    order, open_nodes = [], [0]  # any order with parents first
    while open_nodes:
        order.append(open_nodes.pop(random.randrange(len(open_nodes))))
        open_nodes += plan.children(order[-1])
    new = {old: i for i, old in enumerate(order)} | {-1: -1}
    rest = {f.name: tuple(getattr(plan, f.name)[i] for i in order) for f in fields(plan)}
    rest["parent"] = tuple(new[p] for p in rest["parent"])
    other = Plan(**rest)
    columns = [plan.leaves.index(order[leaf]) for leaf in other.leaves]
    roots = random.sample(range(len(groups)), len(groups))
    a = RULES[name](leaves, plan, groups, None, weights)
    b = RULES[name](leaves[roots][:, columns], other, 10 - groups[roots], None, weights)
    torch.testing.assert_close(b.advantages, a.advantages[roots][:, order], rtol=1e-9, atol=1e-9)
    assert torch.equal(b.weights, a.weights[roots][:, order])


@given(forests(), st.randoms())
def test_share_weights_give_the_gradient_of_independent_paths(forest, random):
    plan, leaves, groups = forest
    grad = torch.tensor([random.uniform(-2, 2) for _ in range(len(plan) * len(groups))]).double().view(len(groups), -1)
    grad[:, 0] = 0  # the root is no edge

    def paths(values: torch.Tensor) -> float:
        """(1 / L) sum over roots and leaves of value x sum of grad along the path."""
        return sum(
            float(values[r, i]) * float(sum(grad[r, n] for n in range(len(plan)) if plan.below[n, i]))
            for r in range(len(groups))
            for i in range(len(plan.leaves))
            if not math.isnan(values[r, i])
        ) / len(plan.leaves)

    out = leaf_mean(leaves, plan)
    assert float((out.weights * out.advantages * grad).sum()) == pytest.approx(paths(leaves), abs=1e-9)
    # the path rule is the same with the prompt's mean taken off; groups of one leaf are dropped
    centred = leaves.clone()
    for group in groups.unique():
        mine = leaves[groups == group]
        scored = mine[~mine.isnan()]
        centred[groups == group] = mine - scored.mean() if len(scored) > 1 else NAN
    out = path(leaves, plan, groups)
    assert float((out.weights * out.advantages * grad).sum()) == pytest.approx(paths(centred), abs=1e-9)


@given(forests(missing=False), st.sampled_from(sorted(RULES)), st.data())
def test_missing_leaves_are_as_if_never_drawn(forest, name, data):
    """Every tree loses the same leaves: the credit is that of the plan without them."""
    plan, leaves, groups = forest
    kept = data.draw(st.lists(st.integers(0, len(plan.leaves) - 1), min_size=1, unique=True).map(sorted))
    nodes = [n for n in range(len(plan)) if plan.below[n, kept].any()]
    new = {old: i for i, old in enumerate(nodes)} | {-1: -1}
    rest = {f.name: tuple(getattr(plan, f.name)[i] for i in nodes) for f in fields(plan)}
    rest["parent"] = tuple(new[p] for p in rest["parent"])
    holes = torch.full_like(leaves, NAN)
    holes[:, kept] = leaves[:, kept]
    a = RULES[name](holes, plan, groups)
    b = RULES[name](leaves[:, kept], Plan(**rest), groups)
    torch.testing.assert_close(a.advantages[:, nodes], b.advantages, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.weights[:, nodes] * len(plan.leaves), b.weights * len(kept))
    gone = [n for n in range(len(plan)) if n not in nodes]
    assert (a.advantages[:, gone] == 0).all() and (a.weights[:, gone] == 0).all()


@given(forests(), st.sampled_from(sorted(CENTRED)), st.floats(-1e6, 1e6))
@example((TREE, LEAVES.double(), ONE_PROMPT), "sibling", 0.1)
@example((TREE, LEAVES.double(), ONE_PROMPT), "z per tree", 0.1)
def test_equal_values_give_exactly_zero(forest, name, value):
    plan, leaves, groups = forest
    per_group = torch.where(leaves.isnan(), NAN, value + 0.3 * groups.double()[:, None])
    out = CENTRED[name](per_group, plan, groups)
    assert (out.advantages == 0).all()
    for group in groups.unique():  # they teach nothing but stay, unless there is nothing to compare
        mine = groups == group
        enough = int((~leaves[mine].isnan()).sum()) > 1
        if name in ("sibling", "path", "path, average") or "prompt" in name:
            assert ((out.weights[mine] > 0).any(1) == (enough & (~leaves[mine].isnan()).any(1))).all()


@given(forests(), st.sampled_from(sorted(CENTRED)), st.integers(-9, 9), st.sampled_from([0.5, 4.0]))
def test_only_differences_matter(forest, name, shift, scale):
    plan, leaves, groups = forest
    # z-scores have no unit, apart from their floor and eps
    rule = partial(CENTRED[name], floor=0.0, eps=0.0) if name.startswith("z") else CENTRED[name]
    a = rule(leaves, plan, groups)
    b = rule(leaves * scale + shift, plan, groups)
    # two means that are equal but for rounding would be blown up to +-0.7 without a floor: leave those out
    if name.startswith("z"):
        values = leaf_mean(leaves, plan).advantages
        gaps = (values[:, :, None] - values.flatten()).abs()
        if ((gaps > 0) & (gaps < 1e-9)).any():
            return
    torch.testing.assert_close(
        b.advantages, a.advantages * (1 if name.startswith("z") else scale), rtol=1e-6, atol=1e-6
    )
    assert torch.equal(a.weights, b.weights)


@given(
    st.lists(st.tuples(st.sampled_from([1, 4]), st.one_of(st.integers(-9, 9), st.just(NAN))), min_size=1, max_size=9)
)
def test_one_leaf_per_root_is_the_plain_group_advantage(rows):
    plan = grow([1], [1], [1])
    groups, values = torch.tensor([g for g, _ in rows]), torch.tensor([float(x) for _, x in rows]).double()
    plain = group_advantages(values, groups, std="none", clip=None)
    scored = group_advantages(values, groups, std="prompt", eps=1e-4, clip=None)
    leaves = values[:, None]
    mean = leaf_mean(plain.advantages[:, None], plan, plain.valid[:, None])
    z = depth_z_score(leaves, plan, groups, scope="prompt", ddof=0, eps=1e-4)
    for out, expected, nodes in [
        (mean, plain, slice(0, 4)),
        (sibling(leaves, plan, groups), plain, slice(0, 4)),
        (path(leaves, plan, groups), plain, slice(0, 4)),
        (path(leaves, plan, groups, average=True), plain, slice(0, 4)),
        (z, scored, slice(1, 4)),
    ]:
        got = out.advantages[:, nodes].double()
        torch.testing.assert_close(got, expected.advantages[:, None].double().expand_as(got), rtol=1e-6, atol=1e-6)
        assert torch.equal(out.weights > 0, expected.valid[:, None].expand(-1, 4))
    alone = depth_z_score(leaves, plan, groups)  # per tree there is nothing to compare
    assert (alone.advantages == 0).all() and (alone.weights == 0).all()


FOREST = (
    TREE,
    torch.tensor([[1, 2, -3], [4, 0, 5], [7, 7.5, 1], [0, NAN, 2]], dtype=torch.float64),
    torch.tensor([3, 3, 8, 8]),
)


@given(forests(), st.integers(1, 4), st.sampled_from(sorted(RULES)))
@example(FOREST, 2, "z, shrunk")
@example(FOREST, 3, "z per prompt, shrunk")
def test_any_split_over_processes_gives_the_same_credit(forest, ranks, name):
    plan, leaves, groups = forest
    whole = RULES[name](leaves, plan, groups)
    rank_of = groups % ranks  # prompts stay whole; some processes may hold none

    def part(rank: int, reduce: Reduce) -> Credit:
        rule = partial(RULES[name], reduce=reduce) if name.startswith("z") else RULES[name]
        return rule(leaves[rank_of == rank], plan, groups[rank_of == rank])

    for rank, (found, calls) in enumerate(in_ranks(ranks, part)):
        torch.testing.assert_close(found.advantages, whole.advantages[rank_of == rank], rtol=1e-12, atol=1e-12)
        assert torch.equal(found.weights, whole.weights[rank_of == rank])
        assert calls == ("shrunk" in name)


@given(plans(), st.lists(st.floats(0, 5), min_size=3, max_size=3), st.sampled_from(["share", "one"]))
def test_step_weights_have_mean_one_over_the_trained_edges(plan, steps, weights):
    q = edge_weights(plan, torch.ones(1, len(plan.leaves), dtype=torch.bool), weights)[0]
    for given_steps in ("noise", steps[: plan.depth]):
        if given_steps != "noise" and sum(given_steps) == 0:
            continue
        w = step_weights(plan, given_steps, weights)
        assert w[0] == 0 and (w >= 0).all()
        assert float((q * w)[1:].sum() / q[1:].sum()) == pytest.approx(1)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_wrong_shapes_and_infinities_are_refused(name):
    rule, groups = RULES[name], torch.tensor([0, 0])
    with pytest.raises(UserError, match="same tree"):
        rule(torch.zeros(2, 4), TREE, groups)
    with pytest.raises(UserError, match="same tree"):
        rule(torch.zeros(2, 3), TREE, groups, torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(UserError, match="leaf 2 of root 1 is -inf"):
        rule(torch.tensor([[0.0, 0, 0], [0, 0, -math.inf]]), TREE, groups)
    with pytest.raises(UserError, match="credit.weights"):
        rule(LEAVES, TREE, groups, None, "shares")


def test_wrong_groups_and_options_are_refused():
    with pytest.raises(UserError, match="one integer per root"):
        sibling(LEAVES, TREE, torch.tensor([0.0, 1.0]))
    with pytest.raises(UserError, match="one integer per root"):
        path(LEAVES, TREE, torch.tensor([0, 1, 2]))
    for bad in ({"scope": "all"}, {"shrink": -1.0}, {"floor": -0.1}, {"eps": NAN}, {"ddof": 2}):
        with pytest.raises(UserError, match="depth z-score got"):
            depth_z_score(LEAVES, TREE, ONE_PROMPT, **bad)
    for bad in ("noisy", [1.0], [1.0, -1.0], [1.0, NAN]):
        with pytest.raises(UserError, match="step weights are"):
            step_weights(TREE, bad)
    with pytest.raises(UserError, match="no trained edge"):
        step_weights(TREE, [0, 0])
    with pytest.raises(UserError, match="without trained edges"):
        step_weights(grow([2], trained=False), "noise")


def test_no_roots_are_no_error():
    empty = torch.zeros(0, 3)
    for rule in RULES.values():
        out = rule(empty, TREE, torch.zeros(0, dtype=torch.long))
        assert isinstance(out, Credit) and out.advantages.shape == out.weights.shape == (0, 6)
