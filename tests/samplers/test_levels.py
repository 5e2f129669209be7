"""Noise levels: their formulas, their ranges, and equal budgets."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import samplers
from samplers import levels
from samplers.levels import (
    budget,
    by_split,
    constant,
    cosine_decay,
    equal_budget,
    linear_growth,
    noisy_steps,
    reward_driven,
)
from samplers.plans import sliding_tree, tree

GRID = samplers.linear_shift_sigmas(8, 3.0)


def test_values_by_hand():
    assert constant("cps")(3, 1) == 0.8 and constant("flow", 0.5)(0, 0) == 0.5
    growth = linear_growth("flow", growth=0.5, depth=4, level=0.6)  # Dynamic-TreeRPO
    assert [growth(9, k) for k in range(4)] == pytest.approx([0.6, 0.675, 0.75, 0.825])
    decay = cosine_decay("dance", high=1.0, low=0.2, steps=4, start=2)  # HiCoGen
    root = math.sqrt(0.5)
    assert [decay(i, 0) for i in range(2, 6)] == pytest.approx([1.0, 0.6 + 0.4 * root, 0.6, 0.6 - 0.4 * root])
    listed = by_split("cps", [0.4, 0.7, 1.0])  # TMPO
    assert [listed(7 * (k + 1), k) for k in range(3)] == [0.4, 0.7, 1.0]
    # TMPO's scale 1 + 0.3 (1 - a) - 0.2 a, clipped to [0.2, 1]
    assert [reward_driven(listed, a)(7, 0) for a in (0.0, 0.5, 1.0)] == pytest.approx([0.52, 0.42, 0.32])
    assert reward_driven(listed, 0.0)(21, 2) == 1.0 and reward_driven(constant("cps", 0.1), 1.0)(0, 0) == 0.2


def test_levels_reach_the_plan():
    plan = sliding_tree(GRID, (2, 5), level=linear_growth("flow", 0.5, 3, 0.6))
    assert plan == sliding_tree(GRID, (2, 5), level=0.6, growth=0.5)
    plan = tree(GRID, {1: 3, 4: 3}, "cps", by_split("cps", [0.4, 0.9]), noisy=[1, 4])
    assert {(plan.s[i], plan.level[i]) for i in range(1, len(plan)) if plan.level[i]} == {
        (float(GRID[1]), 0.4),
        (float(GRID[4]), 0.9),
    }


@given(
    st.sampled_from(["flow", "dance", "precise"]),
    st.sets(st.integers(0, 9), min_size=1),
    st.sets(st.integers(0, 9)),
    st.floats(0.01, 2),
    st.floats(-0.9, 3),
)
def test_equal_budget(kernel, noisy, splits, level, growth):
    at = noisy_steps(noisy, splits)
    reference = cosine_decay(kernel, 1.0, 0.1, 10)
    schedule = linear_growth(kernel, growth, max(1, len(splits)), level)
    scaled = equal_budget(schedule, reference, at)
    assert budget(scaled, at) == pytest.approx(budget(reference, at))
    ratios = [scaled(i, k) / schedule(i, k) for i, k in at]
    assert max(ratios) == pytest.approx(min(ratios))  # the shape stays
    again = equal_budget(reference, reference, at)
    assert [again(i, k) for i, k in at] == [reference(i, k) for i, k in at]


@given(st.sets(st.integers(0, 9), min_size=1), st.sets(st.integers(0, 9)))
def test_noisy_steps_are_those_of_the_tree(noisy, splits):
    """(step, depth) is what a plan asks a level function for."""
    asked = []
    branch_at = dict.fromkeys(splits, 1)
    grid = samplers.linear_shift_sigmas(10, 3.0)
    tree(grid, branch_at, level=lambda step, depth: asked.append((step, depth)) or 0.5, noisy=noisy, trained=[])
    assert asked == noisy_steps(noisy, splits)


def test_the_budget_of_a_plan():
    """Along every path of the plan, not only by the formula."""
    at = noisy_steps(range(2, 5), range(2, 5))
    scaled = equal_budget(linear_growth("flow", 1.0, 3), constant("flow", 0.7), at)
    plan = sliding_tree(GRID, (2, 5), level=scaled)
    for leaf in plan.leaves:
        assert math.fsum(h * h for h in plan.branch(leaf).level) == pytest.approx(3 * 0.49)


def test_refused_with_the_numbers():
    cases = [
        (lambda: constant("cps", 1.2), r"kernel 'cps' got noise level 1.2; expected .*\[0.0, 1.0\]"),
        (lambda: constant("ode", 0.1), "kernel 'ode' got noise level 0.1"),
        (lambda: linear_growth("cps", 1.0, 4, 0.7), r"level 1.2\d* at step 0, depth 3; expected"),
        (lambda: linear_growth("flow", -2.0, 2, 0.7)(0, 2), "level -0.7 at step 0, depth 2"),
        (lambda: linear_growth("flow", 1.0, 0), "depth of 0; expected at least 1"),
        (lambda: cosine_decay("ddim", 1.5, 0.1, 4), "kernel 'ddim' got noise level 1.5"),
        (lambda: cosine_decay("flow", 1.0, 0.1, 0), "0 steps; expected at least 1"),
        (lambda: cosine_decay("flow", 1.0, 0.1, 4, start=2)(6, 0), r"got step 6; expected one of 2\.\.5"),
        (lambda: by_split("cps", [0.4, 7.0]), "level 7;"),
        (lambda: by_split("cps", [0.4, 0.7])(9, 2), r"2 levels \[0.4, 0.7\] and asked for number 3 at step 9"),
        (lambda: reward_driven(constant("cps"), 1.5), r"success 1.5; expected a number in \[0, 1\]"),
        (lambda: reward_driven(constant("cps"), math.nan), "success nan"),
        (lambda: reward_driven(constant("cps"), 0.5, low=0.9, high=0.3), "low 0.9 and high 0.3"),
        (lambda: reward_driven(constant("cps"), 0.5, high=1.4), "kernel 'cps' got noise level 1.4"),
        (lambda: equal_budget(constant("cps"), constant("flow"), [(0, 0)]), "levels of 'cps' and .* of 'flow'"),
        (lambda: equal_budget(constant("cps", 0.0), constant("cps"), [(0, 0)]), "sum of squares of 0 over 1 steps"),
        (
            lambda: equal_budget(linear_growth("cps", -0.9, 2, 0.5), constant("cps", 1.0), [(0, 0), (1, 1)]),
            "kernel 'cps' got noise level 1.2.* at step 0, depth 0",
        ),
        (lambda: sliding_tree(GRID, (0, 3), 2, "cps", 0.7, growth=1.0), "level 1.1.* at step 0, depth 2"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()


def test_deeper_counts_the_splits_taken_away():
    listed = by_split("cps", [0.1, 0.2, 0.3])
    assert levels.deeper(listed, 1)(5, 1) == 0.3
    assert levels.deeper(lambda step, depth: 10 * step + depth, 2)(1, 1) == 13
    assert levels.deeper(0.5, 1) == 0.5 and levels.deeper(None, 1) is None


def test_growth_moves_noise_late_and_decay_early():
    """With one budget, std by std on the grid: what the two schedules disagree about."""
    at = noisy_steps(range(4), range(4))
    growing = equal_budget(linear_growth("flow", 1.0, 4), constant("flow", 0.7), at)
    falling = equal_budget(cosine_decay("flow", 1.0, 0.2, 4), constant("flow", 0.7), at)
    late, early = (sliding_tree(GRID, (0, 4), 1, level=h).coefficients.c[1:5] for h in (growing, falling))
    assert bool((late.diff() - early.diff() > 0).all()) and early[0] > 0.7 > late[0]
    assert isinstance(late, torch.Tensor)
