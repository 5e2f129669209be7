"""Plans and numbers that change from update to update: drawn steps and splits, the times' shift, ramps."""

from __future__ import annotations

import pytest
import torch
from gaussian_runs import config, evaluated

import samplers
from flowrl.errors import UserError
from flowrl.parts import make_objective
from flowrl.planning import make_plan
from flowrl.policies import GaussianPolicy
from flowrl.trainer import _old_decay, train
from samplers import curricula


def evenly(steps: int) -> list[float]:
    return [1 - i / steps for i in range(steps + 1)]


def trained(plan: samplers.Plan) -> list[int]:
    return sorted({plan.depths[i] - 1 for i in range(1, len(plan)) if plan.trained[i]})


def noisy(plan: samplers.Plan) -> list[int]:
    return sorted({plan.depths[i] - 1 for i in range(1, len(plan)) if plan.coefficients.c[i] > 0})


CPS = ["rollout.kernel=cps", "objective.measured_with.kernel=cps", "rollout.steps=12", "group_size=8"]
TMPO = [*CPS, "objective={name: tmpo, clip_range: 0.2, measured_with: {kernel: cps}}"]


@pytest.mark.parametrize("tree", ["null", "{at: [0, 3]}"])
def test_a_random_share_of_the_steps_is_trained(tmp_path, tree):
    """DanceGRPO: noise on all steps but the last, training on a subset that is a function of seed and update."""
    settings = config(
        tmp_path, "rollout={steps: 16, kernel: dance, train_fraction: 0.6, train_choice: random}",
        f"rollout.tree={tree}", "objective.measured_with.kernel=dance",
    )  # fmt: skip
    plans = [make_plan(settings, evenly(16), update) for update in range(6)]
    assert all(noisy(plan) == list(range(15)) for plan in plans)
    assert [trained(plan) for plan in plans] == [list(curricula.chosen_steps(i, 0, 9, 15)) for i in range(6)]
    assert len({tuple(trained(plan)) for plan in plans}) > 3


def test_the_shift_replaces_the_times_of_the_model(tmp_path):
    settings = config(tmp_path, "rollout={steps: 6, shift: 3.0}")
    plan = make_plan(settings, evenly(6), 0)
    assert plan.s_next == tuple(samplers.linear_shift_sigmas(6, 3.0).tolist())
    assert plan.s_next[3] == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))
    with pytest.raises(UserError, match=r"shift 3 for a model whose times begin at 0\.9000.*shift=null"):
        make_plan(settings, [0.9 * s for s in evenly(6)], 0)


def test_a_shift_that_the_model_does_not_take_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(GaussianPolicy, "sigmas", lambda self, steps, *size: 0.9 * torch.linspace(1, 0, steps + 1))
    with pytest.raises(UserError, match=r"shift 3 .*shift=null"):
        train(config(tmp_path, "rollout={steps: 6, shift: 3.0}", evaluated(tmp_path)), policy=GaussianPolicy())
    assert not list((tmp_path / "run").glob("*.jsonl*"))


def test_splits_drawn_around_moving_places(tmp_path):
    options = [*TMPO, "updates=400", "rollout.tree={at: [2, 5, 8], moves_to: [3, 6, 9], noise: splits, "
               "draw: {concentration: 40.0, low: 1}}"]  # fmt: skip
    settings = config(tmp_path, *options)
    found = [noisy(make_plan(settings, evenly(12), update)) for update in range(400)]
    for steps in found:
        assert len(steps) == 3 and 1 <= steps[0] and steps[2] <= 10
    early, late = (sum(sum(steps) for steps in part) / 100 for part in (found[:100], found[-100:]))
    assert early == pytest.approx(15 + 1 / 8 * 3, abs=0.6) and late == pytest.approx(15 + 7 / 8 * 3, abs=0.6)
    assert found[7] == noisy(make_plan(settings, evenly(12), 7)) and len({tuple(steps) for steps in found}) > 20


def test_splits_drawn_by_success(tmp_path):
    settings = config(
        tmp_path, *TMPO, "rollout.levels.reward_driven={}", "rollout.tree={at: [2, 4, 6], noise: splits, "
        "draw: {around: success, concentration: 4.0, low: 2, high: 10}}",
    )  # fmt: skip
    mean = {a: sum(sum(noisy(make_plan(settings, evenly(12), i, a))) for i in range(60)) / 60 for a in (0.0, 1.0)}
    assert mean[0.0] > mean[1.0] + 6  # late while rewards are low


def test_beta_and_the_old_policy_follow_their_ramps(tmp_path):
    tmpo = config(tmp_path, *TMPO, "rollout.tree={at: [2, 4, 6], noise: splits}", "updates=500",
                  "objective.tmpo={beta: 2.0, beta_from: 0.8, beta_over: 150}")  # fmt: skip
    assert [make_objective(tmpo, i).beta for i in (0, 75, 150, 499)] == pytest.approx([0.8, 1.4, 2.0, 2.0])
    whole = config(tmp_path, *TMPO, "rollout.tree={at: [2, 4, 6], noise: splits}", "updates=10",
                   "objective.tmpo={beta: 3.0, beta_from: 1.0}")  # fmt: skip
    assert make_objective(whole, 5).beta == pytest.approx(2.0)
    nft = config(tmp_path, "rollout.kernel=ode",
                 "objective={name: nft, nft: {decay_start: 75, decay_rate: 0.0075, decay_max: 0.999}}")  # fmt: skip
    assert [_old_decay(nft, i) for i in (0, 75, 77, 500)] == pytest.approx([0.0, 0.0, 0.015, 0.999])
    assert _old_decay(config(tmp_path, "rollout.kernel=ode", "objective.name=nft"), 100) == pytest.approx(0.1)


def test_a_run_with_drawn_steps_and_a_rising_beta(tmp_path, monkeypatch):
    monkeypatch.setattr("flowrl.report.write_report", lambda folder: folder / "report.html")
    seen = []

    def recorded(settings, update=0):
        seen.append(update)
        return make_objective(settings, update)

    monkeypatch.setattr("flowrl.trainer.make_objective", recorded)
    summary = train(
        config(
            tmp_path, *TMPO, "updates=3", "rollout={steps: 6, shift: 3.0, kernel: cps, density: unscaled}",
            "objective.measured_with.density=unscaled", "rollout.levels.reward_driven={}",
            "rollout.tree={at: [1, 2, 3], noise: splits, draw: {around: success, concentration: 4.0}, promote: 1}",
            "objective.tmpo={beta: 2.0, beta_from: 1.0}",
        ),
        policy=GaussianPolicy(),
    )  # fmt: skip
    assert summary["updates"] == 3 and seen == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.train_choice=random"], ("trains all 4 steps", "train_fraction=0.6")),
        (["rollout={train_choice: random, train_fraction: 0.5, window: {size: 2, high: 2}}"], ("rollout.window",)),
        (["rollout={train_choice: random, train_fraction: 0.5, tree: {at: [0, 1], untrained_depths: [3]}}"],
         ("untrained_depths",)),
        (["rollout={train_choice: random, train_fraction: 0.5, kernel: ode}", "objective.name=nft"], ("images",)),
        (["rollout={train_choice: random, train_fraction: 0.5, steps: 5}", "credit.steps=[0.0, 0.0, 1.0, 1.0, 1.0]"],
         ("2 zeros and 2 random steps",)),
        (["rollout.window={size: 2, high: 4, least: 3}"], ("move progressive",)),
        (["rollout.window={size: 2, high: 4, move: progressive, every: 5, least: 6}"], ("least 6", "1 to 5")),
        (["rollout.window={size: 2, high: 4, move: progressive, least: 6, decay: 0.1}"], ("one of the two",)),
        (["rollout={steps: 8, window: {size: 2}, tree: {draw: {}}}"], ("needs rollout.tree.at",)),
        (["rollout={steps: 8, tree: {at: [1, 2, 3], draw: {gap: 3}}}"], ("3 splits at least 3 apart", "1 to 6")),
        (["rollout={steps: 8, tree: {at: [1, 2, 3], draw: {high: 7}}}"], ("at most step 6",)),
        (["rollout={steps: 8, tree: {at: [1, 2, 3], draw: {around: success}}}"], ("reward_driven={}",)),
        (["rollout={steps: 8, tree: {at: [1, 2], moves_to: [2, 3], draw: {around: success}},"
          " levels: {reward_driven: {}}}"], ("remove moves_to",)),
        (["rollout={steps: 5, tree: {at: [1, 2], draw: {}, noise: splits}}", "credit.steps=[1, 0, 1, 1, 1]"],
         ("credit.steps has zeros",)),
        (["group_size=4", "rollout={steps: 8, tree: {at: [1, 2, 3], draw: {}, promote: 1, noise: splits}}"],
         ("group_size 4", "multiple of 8")),
        (["objective.name=tmpo", "objective.tmpo.beta_over=5"], ("without beta_from",)),
        (["rollout.kernel=ode", "objective={name: nft, nft: {decay_start: 5, decay_rate: 0.0}}"], ("nothing ever",)),
        (["rollout.shift=0.0"], ("rollout.shift",)),
        ([*CPS, "updates=300", "rollout.level=0.65", "rollout.levels={shape: cosine, equal_budget: true}",
          "rollout.tree={at: [2, 5, 8], noise: splits, draw: {}}"], ("'cps' got noise level 1.",)),
        (["rollout={steps: 8, tree: {at: [0, 3, 5], draw: {}}}"], ("splits around [0, 3, 5]", "[1, 6]")),
        (["rollout={steps: 8, tree: {at: [1, 3], draw: {}, noise: splits, untrained_depths: [2]}}"],
         ("hold all drawn splits",)),
        (["rollout.window={size: 2, high: 4, decay: 0.1}"], ("decay is 0.1", "expected move progressive")),
        (["rollout.levels.growth=1.0"], ("rollout.levels.growth is 1.0", "expected shape growth")),
        (["rollout.tree={at: [0, 1], moves_over: 3}"], ("rollout.tree.moves_over is 3", "expected moves_to a value")),
        (["group_size=4", "rollout={steps: 8, train_fraction: 0.5, fork: {branches: 2, first: 3, last: 5}}"],
         ("train_fraction is 0.5 beside rollout.fork",)),
        (["credit.fraction=0.1"], ("credit.fraction is 0.1", "extremes or top_bottom")),
        (["group_size=4", "rollout={steps: 8, train_fraction: 0.5, tree: {at: [5, 6]}}"], ("in common", "4 images")),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused(tmp_path, overrides, words):
    with pytest.raises(UserError) as error:
        config(tmp_path, *overrides)
    assert all(word in str(error.value) for word in words), str(error.value)
