"""From settings to plans: every structure, its curriculum, and what is refused before a model is loaded."""

from __future__ import annotations

import pytest
from gaussian_runs import config

from flowrl.commands.check import check
from flowrl.errors import UserError
from flowrl.planning import make_plan


def evenly(steps: int) -> list[float]:
    return [1 - i / steps for i in range(steps + 1)]


def noisy(plan) -> list[int]:
    """Steps (depth - 1) at which the plan has noise."""
    return sorted({plan.depths[i] - 1 for i in range(1, len(plan)) if plan.coefficients.c[i] > 0})


def trained(plan) -> list[int]:
    return sorted({plan.depths[i] - 1 for i in range(1, len(plan)) if plan.trained[i]})


def test_plan_with_noise_on_all_steps_but_the_last(tmp_path):
    plan = make_plan(config(tmp_path, "rollout.steps=5"), evenly(5), 3)
    assert plan.trained == (False, True, True, True, True, False)
    assert (plan.coefficients.c[1:] > 0).tolist() == [True] * 4 + [False]
    assert plan.s_next == (1.0, pytest.approx(0.8), pytest.approx(0.6), pytest.approx(0.4), pytest.approx(0.2), 0.0)
    part = make_plan(config(tmp_path, "rollout={steps: 5, train_fraction: 0.5}"), evenly(5), 3)
    assert part.trained == (False, True, True, False, False, False)
    assert (part.coefficients.c[1:] > 0).tolist() == [True] * 4 + [False]  # noise also where nothing is trained


def test_plan_with_a_random_window(tmp_path):
    """Noise and training in two consecutive steps, ODE elsewhere; each start in [0, steps / 2 - 2] equally often."""
    settings = config(tmp_path, "rollout={steps: 12, window: {size: 2}}")
    starts = []
    for update in range(200):
        plan = make_plan(settings, evenly(12), update)
        inside = [i for i, trained in enumerate(plan.trained[1:]) if trained]
        assert inside == [inside[0], inside[0] + 1]
        assert [i for i, c in enumerate(plan.coefficients.c[1:].tolist()) if c > 0] == inside
        starts.append(inside[0])
    counts = [starts.count(start) for start in range(5)]
    assert sum(counts) == 200 and min(counts) > 20  # 40 expected of each, standard deviation 6
    assert make_plan(settings, evenly(12), 7) == make_plan(settings, evenly(12), 7)
    other = config(tmp_path, "rollout={steps: 12, window: {size: 2}}", "seed=1")
    assert [make_plan(other, evenly(12), u).trained for u in range(9)] != [
        make_plan(settings, evenly(12), u).trained for u in range(9)
    ]


def test_a_tree_over_a_window(tmp_path):
    settings = config(
        tmp_path, "rollout={steps: 8, window: {size: 2, low: 2, high: 4}, tree: {branch: [4, 2]}}", "group_size=16"
    )
    plan = make_plan(settings, evenly(8), 0)
    assert len(plan.leaves) == 8 and plan.roots(16) == 2
    assert noisy(plan) == trained(plan) == [2, 3]
    cost = plan.cost()  # 2 steps to the first split, 1 + 4 parents, then 8 paths of 4 steps
    assert (cost.sampling_calls, cost.training_forwards) == (2 + 1 + 4 + 8 * 4, 5)


def test_a_tree_that_splits_at_listed_steps(tmp_path):
    """BranchGRPO: noise everywhere but on the last step; TMPO: at the splits only, the first of them promoted."""
    everywhere = make_plan(config(tmp_path, "rollout={steps: 8, tree: {at: [0, 3]}}"), evenly(8), 0)
    assert noisy(everywhere) == trained(everywhere) == list(range(7)) and len(everywhere.leaves) == 4
    splits = "rollout={steps: 8, kernel: cps, tree: {at: [1, 3, 5], noise: splits, promote: 1}}"
    promoted = make_plan(config(tmp_path, splits, "objective.measured_with.kernel=cps"), evenly(8), 0)
    assert noisy(promoted) == trained(promoted) == [3, 5] and len(promoted.leaves) == 4


def test_finished_images_may_come_from_either_solver(tmp_path):
    for solver in ("ode", "ode2"):
        settings = config(tmp_path, f"rollout={{steps: 5, kernel: ode, solver: {solver}}}", "objective.name=nft")
        plan = make_plan(settings, evenly(5), 0)
        assert set(plan.kernel[1:]) == {solver} and not plan.trained_edges and not noisy(plan)


def test_the_solver_of_a_trunk_and_its_branches(tmp_path):
    found = {}
    for solver in ("ode", "ode2"):
        trunk = f"rollout={{steps: 6, solver: {solver}, trunk: {{at: [1, 3], branches: 4}}}}"
        plan = make_plan(config(tmp_path, trunk), evenly(6), 0)
        assert {k for k, c in zip(plan.kernel, plan.coefficients.c.tolist(), strict=True) if c == 0} <= {"ode", solver}
        found[solver] = sum(k != 0 for k in plan.memory)
    # of second order: the trunk's third step, which does not follow one from s = 1, and of four branches the second and
    # third of the four steps after the noise; the last one, to s = 0, has no memory
    assert found == {"ode": 0, "ode2": 1 + 4 * 2}


def test_validate_draws_the_plan(tmp_path):
    tree = "rollout={steps: 8, window: {size: 2, low: 2, high: 4}, tree: {branch: 2}}"
    said = list(check(config(tmp_path, tree)))
    at = said.index("a group of the first update, drawn on even times instead of the model's own:")
    drawing = make_plan(config(tmp_path, tree), evenly(8), 0).describe(2).splitlines()
    assert said[at + 1 : at + 1 + len(drawing)] == [f"  {line}" for line in drawing]
    assert any("2 roots, 8 images" in line for line in drawing)
    assert "a group of the first update:" in list(check(config(tmp_path, "rollout.shift=3.0")))


def test_moving_structures_move(tmp_path):
    moving = config(
        tmp_path, "updates=10", "objective.measured_with.kernel=cps",
        "rollout={steps: 8, kernel: cps, tree: {at: [1, 2], moves_to: [3, 6], noise: splits}}",
    )  # fmt: skip
    assert [noisy(make_plan(moving, evenly(8), u)) for u in (0, 5, 10)] == [[1, 2], [2, 4], [3, 6]]
    fork = config(tmp_path, "updates=6", "group_size=4", "rollout={steps: 8, fork: {branches: 2, first: 3, last: 5}}")
    assert [trained(make_plan(fork, evenly(8), u)) for u in (0, 2, 5)] == [[5, 6], [4, 5, 6], [3, 4, 5, 6]]
    window = config(tmp_path, "rollout={steps: 8, window: {size: 2, high: 4, move: progressive, every: 3}}")
    assert [trained(make_plan(window, evenly(8), u)) for u in (0, 2, 3, 6, 9)] == [
        [0, 1],
        [0, 1],
        [1, 2],
        [2, 3],
        [0, 1],
    ]
    depths = "tree: {at: [0, 2], untrained_depths: [6, 7], depths_every: 2, depths_stop: 5}"
    pruned = config(tmp_path, f"rollout={{steps: 8, {depths}}}")
    assert [trained(make_plan(pruned, evenly(8), u))[-3:] for u in (0, 2, 9)] == [[2, 3, 4], [2, 3, 6], [2, 3, 6]]


def test_the_budget_of_a_promoted_split_is_not_counted(tmp_path):
    """Splits at 0, 1, 3, the first becomes roots: two noisy steps of equal level share the constant's budget."""
    settings = config(
        tmp_path, "rollout={steps: 8, level: 0.7, tree: {at: [0, 1, 3], noise: splits, promote: 1}, "
        "levels: {shape: splits, values: [0.9, 0.3, 0.3], equal_budget: true}}",
    )  # fmt: skip
    plan = make_plan(settings, evenly(8), 0)
    found = [plan.level[i] for i in range(len(plan)) if plan.trained[i]]
    assert found == pytest.approx([0.7] * 6)  # 2 children, 4 grandchildren


def test_levels_follow_depth_budget_and_success(tmp_path):
    def levels(text: str, success: float = 0.5) -> list[float]:
        window = "window: {size: 3, low: 1, high: 4}, tree: {branch: 2}, level: 0.4"
        plan = make_plan(config(tmp_path, f"rollout={{steps: 8, {window}, levels: {text}}}"), evenly(8), 0, success)
        return sorted({plan.level[i] for i in range(1, len(plan)) if plan.trained[i]})

    assert levels("{shape: growth, growth: 0.75}") == pytest.approx([0.4, 0.5, 0.6])
    assert levels("{shape: splits, values: [0.3, 0.4, 0.5]}") == pytest.approx([0.3, 0.4, 0.5])
    fair = levels("{shape: growth, growth: 1.5, equal_budget: true}")
    assert sum(h * h for h in fair) == pytest.approx(3 * 0.4**2) and fair[2] == pytest.approx(2 * fair[0])
    assert levels("{reward_driven: {}}", 0.0) == pytest.approx([0.4 * 1.3])
    assert levels("{reward_driven: {}}", 1.0) == pytest.approx([0.4 * 0.8])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout={steps: 8, tree: {at: [0, 3], branch: 3}}", "group_size=8"], ("group size 8", "9")),
        (["rollout={steps: 8, tree: {at: [9]}}"], ("[9]", "0..7")),
        (["rollout={steps: 8, tree: {at: [7]}}"], ("without noise",)),
        (["rollout={steps: 8, tree: {at: [0], branch: 2000}}", "group_size=2000"], ("2000", "1024")),
        (["rollout={steps: 8, window: {size: 2, high: 4}, tree: {branch: [2]}}"], ("1 numbers", "2 splits")),
        (["rollout={steps: 8, tree: {}}"], ("rollout.window",)),
        (["rollout={steps: 8, tree: {at: [1]}, fork: {first: 2, last: 3}}"], ("tree and fork",)),
        (["rollout={steps: 8, fork: {first: 2, last: 9}}", "updates=10", "group_size=5"], ("2..8",)),
        (["rollout={steps: 8, trunk: {at: [2, 8]}}", "group_size=12"], ("[2, 8]", "0..7")),
        (["rollout={steps: 8, levels: {shape: splits}}"], ("rollout.levels.shape", "values")),
        (["rollout={steps: 8, kernel: cps, level: 0.9, levels: {shape: growth, growth: 9.0}, tree: {at: [1, 2]}}",
          "objective.measured_with.kernel=cps"], ("level", "cps")),
        (["objective.nft={}"], ("objective.name",)),
        (["objective={name: nft, layer_tuning: {}}"], ("layer_tuning",)),
        (["credit.rule=depth_z_score"], ("scope",)),
        (["credit.steps=[1.0, 2.0]"], ("one per step",)),
        (["credit.steps=[1.0, -1.0, 1.0, 1.0, 1.0]"], ("finite numbers >= 0",)),
        (["credit.steps=[1, 1, 0, 1, 1]", "rollout.window={size: 1, high: 4, move: progressive, every: 1}"],
         ("leave no trained edge",)),
        (["rollout={steps: 5, fork: {branches: 4, first: 3, last: 9}}", "updates=20000"], ("2..5",)),
        (["rollout.tree={at: [0, 1], moves_to: [1, 30], noise: splits}", "updates=100000"], ("noisy steps", "0..4")),
        (["rollout.trunk={at: [0, 1], branches: 1}", "group_size=2"], ("only 1", "compared")),
        (["rollout={fork: {first: 2, last: 3}, levels: {reward_driven: {}}}", "group_size=5"], ("one level",)),
        (["rollout.levels={equal_budget: true, reward_driven: {}}"], ("undo",)),
        (["rollout.tree={at: [0, 1], noise: splits}", "rollout.window={size: 2}"], ("rollout.window=null",)),
        (["rollout.tree={at: [0, 1], noise: splits, promote: 1}", "rollout.shared_noise=true"], ("starts differ",)),
        (["rollout={tree: {at: [0, 1]}, levels: {shape: splits, values: [0.3, 0.4, 0.5]}}"], ("3 levels for 2",)),
    ],
)  # fmt: skip
def test_bad_plans_are_refused_with_the_numbers(tmp_path, overrides, words):
    with pytest.raises(UserError) as error:
        config(tmp_path, *overrides)
    assert all(word in str(error.value) for word in words), str(error.value)
