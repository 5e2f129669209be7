"""Several rewards as one advantage: by hand, against brute force, and through the trainer."""

from __future__ import annotations

import json
import math

import pytest
import torch
from gaussian_runs import config
from hypothesis import given
from hypothesis import strategies as st

from flowrl.advantages import group_advantages
from flowrl.combine_advantages import combined_advantages, non_dominated
from flowrl.errors import UserError
from flowrl.policies.gaussian import GaussianPolicy
from flowrl.trainer import train as run

NAN = math.nan
f64 = lambda *x: torch.tensor(x, dtype=torch.float64)  # noqa: E731
ids = lambda *x: torch.tensor(x)  # noqa: E731
BOTH = "reward={'gaussian_runs:quadratic': 1, 'gaussian_runs:flipped': -0.5}"


def test_the_sum_of_advantages_by_hand():
    # both parts have the z-scores +-1 in their group, whatever their scale; eps 0
    parts = torch.stack([f64(0, 2, 5, 5), f64(300, 100, 7, 9)])
    found = combined_advantages(parts, f64(2, 1), ids(0, 0, 1, 1), std="prompt", eps=0.0, clip=None)
    assert found.advantages.tolist() == [-1, 1, -1, 1] and found.zero_variance_groups == 0
    minimised = combined_advantages(parts, f64(2, -1), ids(0, 0, 1, 1), std="prompt", eps=0.0, clip=None)
    assert minimised.advantages.tolist() == [-3, 3, 1, -1]
    clipped = combined_advantages(parts, f64(2, -1), ids(0, 0, 1, 1), std="prompt", eps=0.0, clip=2.0)
    assert clipped.advantages.tolist() == [-2, 2, 1, -1] and clipped.clipped == 2
    # renormalise: the population std of (-3, 3, 1, -1) is sqrt 5
    again = combined_advantages(parts, f64(2, -1), ids(0, 0, 1, 1), std="prompt", eps=0.0, clip=None, renormalise=True)
    torch.testing.assert_close(again.advantages, torch.tensor([-3.0, 3.0, 1.0, -1.0]) / math.sqrt(5))


def test_one_reward_is_the_plain_advantage():
    r, g = torch.randn(12, generator=torch.Generator().manual_seed(0)), torch.arange(12) // 4
    for std in ("global", "prompt", "none"):
        torch.testing.assert_close(
            combined_advantages(r[None], f64(1), g, std=std).advantages, group_advantages(r, g, std=std).advantages
        )


def test_the_scale_of_a_reward_has_no_say():
    r = torch.randn(2, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    g = torch.arange(12) // 4
    one = combined_advantages(r, f64(1, 1), g, eps=0.0).advantages
    other = combined_advantages(r * f64(1000, 0.01)[:, None] + 7, f64(1, 1), g, eps=0.0).advantages
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_an_image_without_one_of_the_rewards_is_as_if_never_drawn():
    parts = torch.stack([f64(1, 2, NAN, 4, 9), f64(3, NAN, 5, 1, 8)])
    found = combined_advantages(parts, f64(1, 1), ids(0, 0, 0, 0, 0))
    alone = combined_advantages(parts[:, [0, 3, 4]], f64(1, 1), ids(0, 0, 0))
    assert found.valid.tolist() == [True, False, False, True, True] and found.missing == 2
    assert torch.equal(found.advantages[[0, 3, 4]], alone.advantages)
    lonely = combined_advantages(parts[:, :2], f64(1, 1), ids(0, 0))
    assert not lonely.valid.any() and (lonely.missing, lonely.dropped_groups) == (1, 1)


def test_groups_that_are_equal_in_every_reward_teach_nothing():
    parts = torch.stack([f64(1, 1, 2, 2), f64(5, 5, 3, 4)])
    found = combined_advantages(parts, f64(1, 1), ids(0, 0, 1, 1))
    assert found.zero_variance_groups == 1 and found.advantages[:2].tolist() == [0, 0] and found.valid.all()


def test_wrong_shapes():
    for parts, weights in ((torch.zeros(3), f64(1)), (torch.zeros(2, 3), f64(1)), (torch.zeros(1, 3), f64(0))):
        with pytest.raises(UserError, match="one weight other than 0"):
            combined_advantages(parts, weights, ids(0, 0, 0))


# --- Pareto -----------------------------------------------------------------------------------------------------------


def dominated_brute_force(rows):
    def beats(a, b):
        return all(x >= y for x, y in zip(a, b, strict=True)) and a != b

    known = [not any(math.isnan(x) for x in row) for row in rows]
    return [
        not known[i] or any(known[j] and beats(rows[j], rows[i]) for j in range(len(rows))) for i in range(len(rows))
    ]


values = st.one_of(st.integers(0, 3).map(float), st.just(NAN))


@given(
    st.integers(1, 3).flatmap(lambda k: st.lists(st.tuples(st.integers(0, 2), *[values] * k), min_size=1, max_size=12))
)
def test_the_front_against_brute_force(rows):
    groups, table = torch.tensor([row[0] for row in rows]), torch.tensor([row[1:] for row in rows]).T
    found = non_dominated(table, groups).tolist()
    for group in set(groups.tolist()):
        mine = [i for i, row in enumerate(rows) if row[0] == group]
        wanted = dominated_brute_force([rows[i][1:] for i in mine])
        assert [found[i] for i in mine] == [not out for out in wanted]


def test_only_the_front_counts_and_keeps_its_advantage():
    parts = torch.stack([f64(3, 2, 1, 1), f64(1, 2, 1, 3)])  # image 2 is beaten by 1
    plain = combined_advantages(parts, f64(1, 1), ids(0, 0, 0, 0))
    front = combined_advantages(parts, f64(1, 1), ids(0, 0, 0, 0), front=True)
    assert front.valid.tolist() == [True, True, False, True] and front.dominated == 1 and front.missing == 0
    assert torch.equal(front.advantages[front.valid], plain.advantages[front.valid]) and front.advantages[2] == 0
    turned = combined_advantages(parts, f64(1, -1), ids(0, 0, 0, 0), front=True)  # less of the second is better
    assert turned.valid.tolist() == [True, False, False, False]


# --- the trainer ------------------------------------------------------------------------------------------------------


def train(config, **options):
    return run(config, policy=GaussianPolicy(), **options)


def metrics(folder):
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("combine", ["advantages", "pareto"])
def test_a_run_combines_and_resumes_bit_for_bit(tmp_path, combine):
    chosen = (BOTH, f"advantage.combine={combine}", "advantage.std=prompt", "advantage.renormalise=true", "updates=3")
    whole = config(tmp_path / "whole", *chosen)
    train(whole)
    rows = [row for row in metrics(tmp_path / "whole") if "reward/mean" in row]
    for row in rows:  # the raw breakdown: flipped is minus quadratic, so the sum is 1.5 of it
        raw = row["reward/gaussian_runs:quadratic/mean"]
        assert row["reward/gaussian_runs:flipped/mean"] == pytest.approx(-raw, rel=1e-5)
        assert row["reward/mean"] == pytest.approx(1.5 * raw, rel=1e-5)
        assert (row["advantage/dominated"] > 0) == (combine == "pareto")  # one order only: the best one is the front
    cut = config(tmp_path / "cut", *chosen[:-1], "updates=2", "checkpoint.every=1")
    train(cut)
    train(config(tmp_path / "cut", *chosen, "checkpoint.every=1"), resume=True)
    again = [row for row in metrics(tmp_path / "cut") if "reward/mean" in row]
    assert [row["reward/mean"] for row in again] == [row["reward/mean"] for row in rows]


def test_both_ways_teach_the_same_where_one_reward_is_the_other(tmp_path):
    """quadratic and minus flipped are one reward: with z-scores, the sum of advantages is twice the advantage."""
    shared = "std: prompt, clip: null, eps: 0.0"
    twice = config(
        tmp_path / "a",
        "reward={'gaussian_runs:quadratic': 1, 'gaussian_runs:flipped': -1}",
        f"advantage={{combine: advantages, renormalise: true, {shared}}}",
        "updates=2",
    )
    once = config(tmp_path / "b", "reward={'gaussian_runs:quadratic': 2}", f"advantage={{{shared}}}", "updates=2")
    train(twice)
    train(once)
    a, b = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert [x["reward/gaussian_runs:quadratic/mean"] for x in a if "reward/mean" in x] == pytest.approx(
        [x["reward/gaussian_runs:quadratic/mean"] for x in b if "reward/mean" in x], rel=1e-4
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["advantage.combine=pareto"], "no weighted sum of at least two"),
        (["advantage.combine=advantages", "reward={'gaussian_runs:quadratic': 1, jpeg: 0}"], "no weighted sum"),
        (["advantage.combine=advantages", BOTH, "advantage.std=history"], "remembers one number"),
        (["advantage.renormalise=true"], "normalises once"),
        (["advantage.combine=paretto"], "pareto"),
        (["reward={combine: minimum, of: {jpeg: 1, shaps: 1}}"], "did you mean shapes"),
        (["reward={transform: par, of: jpeg, temprature: 2}"], "Did you mean 'temperature'"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, overrides, said):
    with pytest.raises(UserError, match=said):
        config(tmp_path, *overrides)


def test_a_threshold_follows_the_update(tmp_path):
    """The threshold is out of reach in the first two updates and below everything from the third on."""
    rising = "{updates: [0, 2], values: [1000000.0, -1000000.0]}"
    train(config(tmp_path, f"reward={{transform: threshold, least: {rising}, of: 'gaussian_runs:quadratic'}}"))
    assert [row["reward/mean"] for row in metrics(tmp_path) if "reward/mean" in row] == [0, 0, 1, 1]
