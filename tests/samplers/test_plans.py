"""Plans: shape, checks, drawing, and model calls against hand counts and published tables."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import samplers
from samplers import Cost, Plan, PlanBuilder
from samplers.levels import constant
from samplers.plans import sliding_tree, straight, tree

steps_and_branches = st.integers(1, 8).flatmap(
    lambda steps: st.tuples(st.just(steps), st.dictionaries(st.integers(0, steps - 1), st.integers(1, 3), max_size=3))
)


def grid(steps):
    return samplers.linear_shift_sigmas(steps, 3.0)


def test_flow_grpo_trains_nine_of_ten():
    plan = straight(samplers.sd3_sigmas(10))
    assert plan.cost() == Cost(sampling_calls=10, training_forwards=9, training_backwards=9, images=1)
    assert plan.group_size(24) == 24 and plan.cost() * 24 == Cost(240, 216, 216, 24)
    assert plan.cost().guided() == Cost(20, 18, 18, 1) and plan.cost().calls_per_image == 19
    assert plan.trained == (False, *[True] * 9, False) and plan.level[-1] == 0  # node i is the end of step i - 1


def test_binary_tree_of_depth_four():
    plan = sliding_tree(grid(10), (0, 4))
    cost = plan.cost()
    assert cost.images == 16
    assert cost.training_forwards == 15  # one per parent node, shared by its edges
    assert plan.trained_edges == 30  # one per edge
    assert plan.independent_cost().training_forwards == 64  # 16 paths over the window
    assert (straight(samplers.sd3_sigmas(10)).cost() * 16).training_forwards == 144  # Flow-GRPO's nine steps
    assert plan.independent_cost() == Cost(160, 64, 64, 16) and plan.roots(48) == 3


# sampling calls and training forwards per image, from the published codes
@pytest.mark.parametrize(
    ("plan", "sampling", "training"),
    [
        (straight(samplers.sd3_sigmas(10)), 10, 9),
        (straight(grid(16), "dance", 0.3, trained=[0, 2, 3, 5, 6, 8, 9, 11, 14]), 16, 9),  # 60 % of 15
        (straight(grid(25), noisy=range(3, 7)), 25, 4),  # MixGRPO, w = 4
        (sliding_tree(grid(25), (0, 4), growth=0.5), 351 / 16, 15 / 16),  # Dynamic-TreeRPO
        (tree(samplers.sd3_sigmas(28), {7: 3, 14: 3, 21: 3}, "cps", noisy=[7, 14, 21]), 254 / 27, 13 / 27),  # TMPO, SD3
    ],
)
def test_published_costs(plan, sampling, training):
    cost = plan.cost()
    assert cost.sampling_calls / cost.images == sampling and cost.training_forwards / cost.images == training


@pytest.mark.parametrize(("start", "calls"), enumerate([6.94, 6.0, 5.06, 4.13, 3.19, 2.25]))
def test_tree_grpo_costs_by_window(start, calls):
    cost = sliding_tree(samplers.sd3_sigmas(10), (start, start + 4)).cost()
    assert cost.sampling_calls / cost.images == pytest.approx(calls, abs=0.0051)
    assert cost.training_forwards / cost.images == 15 / 16


def test_branch_grpo_costs():
    plan = tree(grid(20), {0: 2, 3: 2, 6: 2, 9: 2}, "dance", 0.3, trained=range(20), last_step_noise=True)
    assert plan.cost() == Cost(203, 203, 203, 16) and sum(plan.trained) == 218


def test_tmpo_flux_starts_as_three_roots():
    plan = tree(samplers.flux_sigmas(6, 1024), {2: 3, 3: 3}, "cps", noisy=[2, 3])
    assert plan.group_size(3) == 27 and (plan.cost() * 3) == Cost(72, 12, 12, 27)


def temp_flow(sigmas, branches=6):
    """An ODE trunk; at each of its states SDE branches that finish by ODE (TempFlow-GRPO)."""
    times = sigmas.tolist()
    builder, trunk = PlanBuilder(times[0]), 0
    for step in range(len(times) - 2):  # a branch at the last step would carry noise into the image
        for _ in range(branches):
            node = builder.add(trunk, times[step + 1], "flow", 0.7, trained=True)
            for s in times[step + 2 :]:
                node = builder.add(node, s)
        trunk = builder.add(trunk, times[step + 1])
    builder.add(trunk, times[-1])
    return builder.build()


def test_temp_flow_costs():
    # 45 x 6 calls finish the branches of all ten steps, of which the last needs none; 10 trunk calls
    plan = temp_flow(samplers.sd3_sigmas(10))
    assert plan.cost() == Cost(45 * 6 + 10, 9, 9, 9 * 6 + 1)


def test_siblings_on_different_grids():
    """Granular-GRPO: from one state, a fine and a coarse way to the end."""
    builder = PlanBuilder()
    for path in ([0.75, 0.5, 0.25, 0.0], [0.75, 0.25, 0.0]):
        node = builder.add(0, path[0], "flow", 0.7, trained=True)
        for s in path[1:]:
            node = builder.add(node, s)
    plan = builder.build()
    assert plan.cost() == Cost(6, 1, 1, 2) and plan.depth == 4
    assert [len(front.parents) for front in plan.frontiers] == [1, 2, 2, 1]


@settings(max_examples=60)
@given(steps_and_branches)
def test_counts_follow_from_the_branchings(given_plan):
    steps, branch_at = given_plan
    plan = tree(grid(steps), branch_at, last_step_noise=True)
    width = [math.prod(branch_at.get(i, 1) for i in range(step)) for step in range(steps + 1)]  # nodes at a depth
    cost = plan.cost()
    assert len(plan) == sum(width) and len(plan.leaves) == width[-1] == cost.images
    assert cost.sampling_calls == sum(width[:-1]) and cost.training_forwards == sum(width[:-2])
    assert [len(front.parents) for front in plan.frontiers] == width[:-1]
    assert plan.depth == steps and {plan.depths[leaf] for leaf in plan.leaves} == {steps}
    assert plan.group_size(5) == 5 * width[-1]


@settings(max_examples=60)
@given(steps_and_branches)
def test_structure_laws(given_plan):
    steps, branch_at = given_plan
    plan = tree(grid(steps), branch_at, last_step_noise=True)
    assert len(set(plan.paths)) == len(plan)  # so every node has its own noise
    for node in range(len(plan)):
        children = plan.children(node)
        assert all(plan.parent[child] == node for child in children)
        if children:
            assert torch.equal(plan.below[node], plan.below[list(children)].any(0))
            assert plan.share[node] == pytest.approx(float(plan.share[list(children)].sum()))
    for depth in range(steps + 1):  # shares sum to 1 across every depth
        assert float(plan.share[[d == depth for d in plan.depths]].sum()) == pytest.approx(1)
    for column, leaf in enumerate(plan.leaves):
        branch = plan.branch(leaf)
        assert branch.leaves == (steps,) and branch.paths[-1] == plan.paths[leaf]
        assert float(plan.below[leaf].sum()) == 1 and plan.below[leaf, column]
    sampled, written = len(plan.leaves), plan.draw()
    assert written.count("→ 0.0000") == sampled


@settings(max_examples=40)
@given(steps_and_branches, st.data())
def test_a_broken_plan_is_refused(given_plan, data):
    """Every single-field damage that makes it something else than a tree of falling times is caught."""
    steps, branch_at = given_plan
    plan = tree(grid(steps), branch_at, last_step_noise=True)
    node = data.draw(st.integers(1, len(plan) - 1))
    field, value = data.draw(
        st.sampled_from(
            [
                ("parent", node),
                ("parent", -1),
                ("s_next", 1.5),
                ("s_next", -0.1),
                ("s", 0.123),
                ("level", -1.0),
                ("level", math.nan),
                ("kernel", "unknown"),
            ]
        )  # fmt: skip
    )
    values = list(getattr(plan, field))
    values[node] = value
    with pytest.raises(ValueError, match="expected"):
        dataclasses.replace(plan, **{field: tuple(values)})


def test_messages_of_bad_plans():
    sigmas = grid(4)
    cases = [
        (lambda: straight(sigmas, trained=[3]), "without noise; expected noise on trained edges"),
        (lambda: straight(sigmas, level=0.0, trained=[0]), "without noise; expected noise on trained edges"),
        (lambda: straight(sigmas, trained=[4]), r"trained steps \[4\]; expected steps 0..3"),
        (lambda: straight(sigmas, noisy=[-1]), r"noisy steps \[-1\]"),
        (lambda: tree(sigmas, {9: 2}), r"branch_at steps \[9\]"),
        (lambda: tree(sigmas, {1: 0}), "0 children at step 1; expected at least 1"),
        (
            lambda: tree(sigmas, {1: 2}, noisy=[0]),
            r"equal children without noise below node 1 \(kernel 'ode', s = 0.9000 to 0.7500\)",
        ),
        (lambda: tree(sigmas, {3: 2}, "cps", last_step_noise=True), r"kernel 'cps', s = 0.5000 to 0.0000"),
        (lambda: tree(grid(40), dict.fromkeys(range(30), 2)), "1073741824 leaves per root .* at most 1024"),
        (lambda: sliding_tree(sigmas, (0, 3), max_leaves=7), "8 leaves per root .* at most 7.* raise max_leaves"),
        (lambda: straight(sigmas, level=constant("cps")), "levels for kernel 'cps'; expected levels for 'flow'"),
        (lambda: straight(sigmas, solver="ode3"), "solver 'ode3'; expected one of"),
        (lambda: straight(sigmas, "ode2", trained=[0]), "without noise; expected noise on trained edges"),
        (lambda: sliding_tree(sigmas, (0, 3), level=constant("flow"), growth=1), "growth 1 beside a level function"),
        (lambda: sliding_tree(sigmas, (0, 2)).roots(6), "group size 6; expected a multiple of 4"),
        (lambda: sliding_tree(sigmas, (0, 2)).roots(0), "group size 0; expected a multiple of 4"),
        (lambda: sliding_tree(sigmas, (2, 6)), r"window \(2, 6\); expected 0 <= start < end <= 4"),
        (lambda: straight(sigmas, "flwo"), "got kernel 'flwo'"),
        (lambda: straight(sigmas, "cps", 1.5), "kernel 'cps' got noise level"),
        (lambda: straight(sigmas.flip(0)), "expected an untrained root|expected 1 >= s"),
        (lambda: straight([1.0]), "1 sigmas; expected at least 2"),
        (lambda: PlanBuilder().build(), "at least one edge"),
        (lambda: PlanBuilder().add(3, 0.5), "parent 3; expected one of 0..0"),
        (lambda: straight(sigmas).branch(2), "node 2; expected a leaf"),
        (
            lambda: Plan((-1, 0), (1.0, 1.0), (1.0, 0.0), (0.0,), ("ode", "ode"), (False, False), (0, 0)),
            "1 entries in level",
        ),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()


def test_mixed_kernels_siblings_and_ends_are_refused():
    def build(*edges):
        builder = PlanBuilder()
        for edge in edges:
            builder.add(*edge)
        return builder.build()

    with pytest.raises(ValueError, match="one kernel"):
        build((0, 0.5, "flow", 0.7, True), (1, 0.2, "cps", 0.8, True), (2, 0.0))
    with pytest.raises(ValueError, match="one common end"):
        build((0, 0.5, "flow", 0.7), (0, 0.4, "flow", 0.7))
    plan = build((0, 0.5, "flow", 0.7), (0, 0.5, "flow", 0.7))
    with pytest.raises(ValueError, match="distinct numbers"):
        dataclasses.replace(plan, sibling=(0, 1, 1))


def test_levels():
    plan = sliding_tree(grid(8), (2, 6), level=0.6, growth=0.5)
    assert [plan.level[front.children[0]] for front in plan.frontiers] == pytest.approx(
        [0, 0, 0.6, 0.675, 0.75, 0.825, 0, 0]
    )
    seen = []
    tree(grid(4), {0: 2, 2: 1}, level=lambda step, depth: seen.append((step, depth)) or 0.5, last_step_noise=True)
    assert seen == [(0, 0), (1, 1), (2, 1), (3, 2)]
    tree(grid(4), {0: 2, 2: 1}, level=lambda step, depth: seen.append((step, depth)) or 0.5, noisy=[0, 2], trained=[0])
    assert seen[4:] == [(0, 0), (2, 1)]  # asked for noisy steps only
    assert straight(grid(4), "cps").level[1] == 0.8  # the kernel's default


def test_drawing():
    plan = tree([1.0, 0.75, 0.5, 0.25, 0.0], {1: 2}, level=0.5, trained=[1])
    assert plan.draw().split("\n") == [
        "s 1.0000",
        "── flow 0.5 x1 → 0.7500",
        "├─ flow 0.5* x1 → 0.5000",
        "│  ── flow 0.5 x1 → 0.2500",
        "│  ── ode x1 → 0.0000",
        "└─ flow 0.5* x1 → 0.5000",
        "   ── flow 0.5 x1 → 0.2500",
        "   ── ode x1 → 0.0000",
    ]
    assert straight(samplers.sd3_sigmas(10)).draw().split("\n")[1] == "── flow 0.7* x9 → 0.0089"


def test_compact_drawing_and_cost():
    plan = sliding_tree(samplers.sd3_sigmas(10), (1, 3), branch=3, level=0.5, growth=1.0)
    assert plan.describe(2).split("\n") == [
        "s 1.0000",
        "── ode x1 → 0.9601",
        "└─ 3 of flow 0.5* x1 → 0.9133",
        "   └─ 3 of flow 0.75* x1 → 0.8577",
        "      ── ode x7 → 0.0000",
        "2 roots, 18 images, 8.00 calls per image",  # 2 (1 + 1 + 3 + 7 x 9) = 136 and 2 (1 + 3) = 8
        "sampling: 136 calls (180 as independent trajectories)",
        "training: 8 forwards for 24 edges (36 as independent trajectories)",
    ]
    alone = straight(samplers.sd3_sigmas(4), "ode2", 0.0)
    assert alone.describe().split("\n")[1:] == [
        "── ode2 x4 → 0.0000",
        "1 root, 1 image, 4.00 calls per image",
        "sampling: 4 calls",
        "training: 0 forwards for 0 edges",
    ]


def test_plans_are_values():
    assert straight(grid(4)) == straight(grid(4)) and hash(straight(grid(4))) == hash(straight(grid(4)))
    assert straight(grid(4)) != straight(grid(4), level=0.8)
