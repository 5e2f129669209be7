"""Plans of published methods: counts by closed formulas and published tables, drawings, refusals."""

import math

import pytest
import torch

import samplers
from samplers import Cost, Window
from samplers.curricula import backward
from samplers.levels import by_split, constant, cosine_decay, linear_growth
from samplers.plans import sliding_tree, straight, tree
from samplers.recipes import coarse_tail, fork, leaf_groups, split_tree, trunk, windowed


def grid(steps):
    return samplers.linear_shift_sigmas(steps, 3.0)


def calls(plan, roots=1):
    cost = plan.cost() * roots
    return cost.sampling_calls / cost.images, cost.training_forwards / cost.images


# sampling calls and training forwards per image, from the published codes
def test_published_costs():
    mix = windowed(grid(25), Window(4, high=23).steps(60))
    assert calls(mix) == (25, 4) and mix.trained == tuple(3 <= i <= 6 for i in range(26))  # third position: steps 2..5
    flash = coarse_tail(mix, 0.4)
    assert calls(flash) == (6 + 8, 4)  # 19 steps after the window become round(7.6)
    assert calls(coarse_tail(windowed(grid(25), (0, 4)), 0.2)) == (4 + 4, 4)  # Flash*: 21 become round(4.2)
    temp = trunk(samplers.sd3_sigmas(10), range(9))
    assert temp.cost() == Cost(45 * 6 + 9, 9, 9, 54)
    assert trunk(samplers.sd3_sigmas(10), range(9), finish_trunk=True).cost() == Cost(45 * 6 + 10, 9, 9, 55)
    granular = trunk(grid(16), range(8), 12, strides=(1, 2))
    assert granular.cost().training_forwards == 8 and len(granular.leaves) == 8 * 12 * 2
    assert granular.trained_edges == 96  # 8 / 12 of a forward per trained edge
    roots, tmpo = split_tree(samplers.flux_sigmas(6, 1024), {1: 3, 2: 3, 3: 3}, level=0.7)
    assert tmpo.cost() * roots == Cost(72, 12, 12, 27)
    roots, tmpo = split_tree(samplers.sd3_sigmas(28), {7: 3, 14: 3, 21: 3}, level=by_split("cps", [0.4, 0.7, 1.0]))
    assert roots == 1 and calls(tmpo) == (254 / 27, 13 / 27)
    branch = fork(grid(20), backward(0, 100, 14, 20))
    assert branch.cost() == Cost(6 + 1 + 5 * 13, 1 + 5 * 12, 1 + 5 * 12, 5)


def test_tail_times():
    """At even positions of the old grid: on its points where they fall on them, between them else."""
    plan = coarse_tail(windowed([1.0, 0.9, 0.7, 0.6, 0.4, 0.3, 0.0], (0, 2)), 0.5)
    assert plan.s_next == (1.0, 0.9, 0.7, 0.4, 0.0)
    assert plan.kernel == ("ode", "flow", "flow", "ode2", "ode2")
    plan = coarse_tail(windowed([1.0, 0.8, 0.6, 0.4, 0.0], (0, 1)), 0.67)
    assert plan.s_next == pytest.approx((1.0, 0.8, 0.5, 0.0))
    same = coarse_tail(windowed(grid(9), (2, 4)), 1.0, "ode")
    assert same == windowed(grid(9), (2, 4))


def test_tail_of_a_tree_keeps_what_is_before_it():
    plan = trunk(grid(8), [1, 3], 2, strides=(1, 2), finish_trunk=True)
    coarse = coarse_tail(plan, 0.5)
    assert len(coarse.leaves) == len(plan.leaves) and coarse.cost().training_forwards == 2
    trained = {plan.paths[i] for i in range(len(plan)) if plan.trained[i]}
    assert trained == {coarse.paths[i] for i in range(len(coarse)) if coarse.trained[i]}
    for old, new in zip(plan.leaves, coarse.leaves, strict=True):
        assert plan.times(old)[0] == coarse.times(new)[0] == 1 and coarse.s_next[new] == 0
    ends = {coarse.kernel[leaf] for leaf in coarse.leaves}
    assert ends == {"ode2"}
    assert coarse_tail(straight(grid(6), last_step_noise=True, trained=[])) == straight(
        grid(6), last_step_noise=True, trained=[]
    )  # noise to the end: no tail


def test_promotion():
    """The first split's children become roots; the others keep their own steps and levels."""
    splits, levels = {1: 3, 2: 2, 4: 2}, by_split("cps", [0.3, 0.5, 0.9])
    roots, plan = split_tree(grid(6), splits, level=levels)
    assert roots == 3 and len(plan.leaves) == 4
    where = {(plan.s[i], plan.level[i]) for i in range(len(plan)) if plan.trained[i]}
    assert where == {(float(grid(6)[2]), 0.5), (float(grid(6)[4]), 0.9)}
    roots, plan = split_tree(grid(6), splits, level=levels, promote=None)
    assert roots == 1 and len(plan.leaves) == 12
    assert split_tree(grid(6), splits, level=levels, promote=0) == (1, plan)
    assert split_tree(grid(6), {0: 4})[0] == 1  # a single split stays: without it nothing would be trained


def test_trunk_levels_count_listed_steps():
    plan = trunk(grid(8), [1, 4, 6], 1, level=by_split("flow", [0.9, 0.6, 0.3]))
    assert [plan.level[i] for i in range(len(plan)) if plan.trained[i]] == [0.9, 0.6, 0.3]


def test_granular_grids():
    """From one branch: every time, and every second one; where both are the same way, one image."""
    plan = trunk([1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0], [0, 3, 4], 1, strides=(1, 2))
    ways = [plan.times(leaf) for leaf in plan.leaves]
    assert ways == [
        (1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0),
        (1.0, 0.9, 0.6, 0.2, 0.0),
        (1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0),
        (1.0, 0.9, 0.8, 0.6, 0.4, 0.0),
        (1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0),  # one time is left: both grids are this step
    ]
    assert leaf_groups(plan).tolist() == [0, 1, 2, 3, 4]


def test_leaf_groups():
    """Images to compare: same step, same grid."""
    plan = trunk(grid(8), [0, 2], 3, strides=(1, 3), finish_trunk=True)
    assert leaf_groups(plan).tolist() == [0, 1] * 3 + [2, 3] * 3 + [-1]
    for plan in (sliding_tree(grid(6), (1, 3)), fork(grid(6), 4), straight(grid(6)), tree(grid(6), {0: 2, 3: 3})):
        assert leaf_groups(plan).tolist() == [0] * len(plan.leaves)
    assert leaf_groups(straight(grid(4), "ode", 0.0)).tolist() == [-1]


def test_fork_trains_what_follows_it():
    plan = fork(grid(6), 4, branches=3)
    depths = [plan.depths[i] for i in range(len(plan)) if plan.trained[i]]
    assert depths == [3] * 3 + [4] * 3 + [5] * 3  # steps 2, 3, 4; 5 has no noise
    assert [plan.level[i] for i in range(1, 3)] == [1.0, 1.0] and plan.trained_kernel == "ddim"


def test_drawings():
    plan = trunk(grid(4), [0, 1], 2, strides=(1, 2))
    assert plan.describe().split("\n") == [
        "s 1.0000",
        "├─ 2 of flow 0.7* x1 → 0.9000",
        "│  ├─ ode x3 → 0.0000",
        "│  └─ ode x2 → 0.0000",
        "└─ ode x1 → 0.9000",
        "   └─ 2 of flow 0.7* x1 → 0.7500",
        "      ├─ ode x2 → 0.0000",
        "      └─ ode x1 → 0.0000",
        "1 root, 8 images, 2.00 calls per image",
        "sampling: 14 calls (28 as independent trajectories)",  # 2 of the trunk, 2 (1 + 2 + 1) and 2 (1 + 1 + 0)
        "training: 2 forwards for 4 edges (8 as independent trajectories)",
    ]
    flash = coarse_tail(windowed(grid(25), (0, 4), "dance"))
    assert flash.draw().split("\n") == ["s 1.0000", "── dance 0.3* x4 → 0.9403", "── ode2 x8 → 0.0000"]


def test_level_functions_in_recipes():
    decay = cosine_decay("dance", 1.0, 0.1, 15)  # HiCoGen
    plan = straight(grid(16), "dance", decay)
    assert list(plan.level[1:16]) == [decay(i, 0) for i in range(15)]
    assert windowed(grid(8), (1, 3), level=linear_growth("flow", 1.0, 2)).level[2:4] == pytest.approx((0.7, 1.05))
    assert trunk(grid(8), [1], level=constant("flow", 0.4)).level[1] == 0.0


def test_bad_plans_are_refused_with_the_numbers():
    cases = [
        (lambda: windowed(grid(8), (6, 9)), r"window \(6, 9\); expected 0 <= start < end <= 8"),
        (lambda: windowed(grid(8), (3, 3)), r"window \(3, 3\)"),
        (
            lambda: windowed(grid(8), (7, 8), "cps"),
            r"a trained edge \(kernel 'cps', s = 0.3000 to 0.0000\) without noise",
        ),
        (lambda: coarse_tail(straight(grid(8)), 0.0), r"fraction of 0.0; expected a number in \(0, 1\]"),
        (lambda: coarse_tail(straight(grid(8), "ode", 0.0), 0.5, "euler"), "solver 'euler'; expected one of"),
        (lambda: coarse_tail(trunk(grid(4), [1], 1, strides=(1, 2)), 0.5), "equal children without noise below node"),
        (lambda: split_tree(grid(8), {}), "at least one step that splits"),
        (lambda: split_tree(grid(8), {0: 0, 3: 2}), "0 children at step 0"),
        (lambda: split_tree(grid(8), {9: 3}), r"steps \[9\]; expected steps 0..7"),
        (lambda: split_tree(grid(8), {7: 3}), "kernel 'cps', s = 0.3000 to 0.0000"),
        (lambda: split_tree(grid(8), {0: 30, 3: 40}), "1200 leaves per root .* at most 1024"),
        (lambda: trunk(grid(8), []), r"branches at steps \[\]; expected some of the steps 0..7"),
        (lambda: trunk(grid(8), [8]), r"branches at steps \[8\]"),
        (lambda: trunk(grid(8), [7], kernel="precise"), "kernel 'precise', s = 0.3000 to 0.0000"),
        (lambda: trunk(grid(8), [0], 0), "0 branches"),
        (lambda: trunk(grid(8), [0], strides=(0,)), r"strides \[0\]"),
        (lambda: trunk(grid(8), [0, 1], 600), "1200 leaves per root from 600 branches at 2 steps.* at most 1024"),
        (lambda: trunk(grid(8), [0], kernel="cps", level=1.5), "kernel 'cps' got noise level 1.5"),
        (lambda: trunk(grid(8), [0], kernel="ode"), "without noise; expected noise on trained edges"),
        (lambda: fork(grid(8), 1), r"an interval of 1 steps; expected 2\.\.8"),
        (lambda: fork(grid(8), 9), "an interval of 9 steps"),
        (lambda: fork(grid(8), 4, 20, max_leaves=16), "20 leaves per root .* at most 16"),
        (lambda: fork(grid(8), 4, kernel="ddim", level=2.0), "kernel 'ddim' got noise level"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()


def test_window_of_every_update_fits_its_plan():
    """A curriculum that runs past its end still gives plans of the same cost."""
    window = Window(3, high=9, every=2, stride=2)
    costs = {windowed(grid(10), window.steps(update)).cost() for update in range(50)}
    assert costs == {Cost(10, 3, 3, 1)}
    shares = torch.stack([sliding_tree(grid(10), window.steps(u)).share.sum() for u in range(0, 8, 2)])
    assert bool((shares == 11).all()) and math.isclose(float(shares[0]), 11)  # one per depth, whatever the window
