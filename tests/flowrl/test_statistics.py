"""Intervals against scipy's bootstrap, closed forms and a coverage simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flowrl.statistics import Estimate, mean_ci, paired_diff_ci, task_mean_ci


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_image_per_prompt_agrees_with_scipy(seed):
    values = np.random.default_rng(seed).normal(3, 2, size=60)
    ours = mean_ci([[v] for v in values], resamples=20_000, seed=seed)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(seed + 100)
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean(), abs=1e-12)
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)  # both carry Monte Carlo error
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_clusters_agree_with_scipy_on_the_means_of_prompts():
    # With the same number of images everywhere, resampling prompts is an ordinary bootstrap of the prompt means.
    rng = np.random.default_rng(5)
    scores = rng.normal(size=(40, 1)) + 0.1 * rng.normal(size=(40, 8))
    ours = mean_ci(list(scores), resamples=20_000)
    theirs = stats.bootstrap((scores.mean(1),), np.mean, n_resamples=20_000, method="percentile", rng=rng)
    interval = theirs.confidence_interval
    assert ours.high - ours.low == pytest.approx(interval.high - interval.low, rel=0.03)
    independent = stats.bootstrap((scores.reshape(-1),), np.mean, n_resamples=2000, method="percentile", rng=rng)
    naive = independent.confidence_interval
    assert ours.high - ours.low > 2 * (naive.high - naive.low)  # the images of a prompt are no 8 independent ones


def test_width_has_the_closed_form_of_the_normal_limit():
    # The bootstrap variance of a mean of P prompt means is their variance (divided by P, not P - 1) over P.
    values = np.random.default_rng(3).normal(size=200)
    ours = mean_ci([[v] for v in values], resamples=40_000)
    assert ours.high - ours.low == pytest.approx(2 * 1.959964 * values.std() / math.sqrt(200), rel=0.03)


def test_unequal_groups_and_missing_scores_by_hand():
    estimate = mean_ci([[1.0, 0.0, math.nan], [1.0], [math.nan]])
    assert estimate.mean == pytest.approx(2 / 3)  # three scores count, not five and not two prompt means
    assert estimate.prompts == 2  # the third has no score
    assert estimate.low == pytest.approx(0.5)  # drawing the first prompt twice
    assert estimate.high == pytest.approx(1.0)  # drawing the second prompt twice


def test_task_mean_by_hand():
    scores = [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0]]
    estimate = task_mean_ci(scores, ["easy", "easy", "easy", "hard"])
    assert estimate.mean == pytest.approx((1.0 + 0.25) / 2)  # images alone would give 13 / 16
    assert (estimate.low, estimate.high) == (pytest.approx(0.625), pytest.approx(0.625))


def test_task_interval_resamples_within_tasks():
    # Var(mean of two independent task means) = (var_a + var_b) / 4, whatever the sizes of the tasks.
    rng = np.random.default_rng(7)
    a, b = rng.normal(0, 1, 150), rng.normal(5, 2, 50)
    estimate = task_mean_ci([[v] for v in np.concatenate([a, b])], ["a"] * 150 + ["b"] * 50, resamples=40_000)
    std = math.sqrt((a.var() / 150 + b.var() / 50) / 4)
    assert estimate.mean == pytest.approx((a.mean() + b.mean()) / 2)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.959964 * std, rel=0.03)


def test_pairing_removes_what_both_sides_share():
    rng = np.random.default_rng(11)
    before = rng.normal(0, 5, size=(30, 4))
    after = before + 0.5 + 0.01 * rng.normal(size=(30, 4))
    paired = paired_diff_ci(list(before), list(after))
    assert paired.mean == pytest.approx((after - before).mean())
    assert paired.high - paired.low < 0.02
    assert paired.excludes(0)
    assert not Estimate(0.1, -0.1, 0.3).excludes(0)
    assert not Estimate(0.1, math.nan, math.nan).excludes(0)


def test_a_pair_with_a_missing_half_is_left_out():
    estimate = paired_diff_ci([[0.0, math.nan], [0.0, 1.0]], [[1.0, 1.0], [math.nan, 1.0]])
    assert estimate.mean == pytest.approx(0.5)  # pairs (0, 1) and (1, 1)


def test_paired_task_means():
    before, after = [[0.0], [0.0], [0.0]], [[1.0], [1.0], [0.0]]
    assert paired_diff_ci(before, after).mean == pytest.approx(2 / 3)
    assert paired_diff_ci(before, after, ["a", "a", "b"]).mean == pytest.approx(1 / 2)


@pytest.mark.parametrize("seed", [0, 17])
def test_coverage_on_clustered_binary_scores(seed):
    # A prompt's success rate is Beta(1, 1), its images Bernoulli: the true mean is 1/2. 95 % of the intervals hold it;
    # with 300 trials the share has a standard error of 1.3 %, and the percentile interval is slightly short (P = 50).
    rng = np.random.default_rng(seed)
    hits = 0
    for trial in range(300):
        scores = rng.random((50, 4)) < rng.random((50, 1))
        estimate = mean_ci(list(scores.astype(float)), resamples=400, seed=trial)
        hits += estimate.low <= 0.5 <= estimate.high
    assert 0.89 <= hits / 300 <= 0.985


def test_seeded():
    scores = list(np.random.default_rng(0).random((20, 3)))
    assert mean_ci(scores, seed=1) == mean_ci(scores, seed=1)
    assert mean_ci(scores, seed=1) != mean_ci(scores, seed=2)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=4), min_size=2, max_size=8), st.floats(-3, 3))
def test_shifting_all_scores_shifts_the_estimate(scores, shift):
    plain = mean_ci(scores, resamples=50)
    moved = mean_ci([[v + shift for v in row] for row in scores], resamples=50)
    assert moved.mean == pytest.approx(plain.mean + shift, abs=1e-9)
    assert moved.low == pytest.approx(plain.low + shift, abs=1e-9)
    assert plain.low - 1e-9 <= plain.high


def test_nothing_to_estimate():
    assert math.isnan(mean_ci([]).mean)
    assert math.isnan(mean_ci([[math.nan]]).mean)
    one = mean_ci([[0.0, 1.0]])
    assert one.mean == 0.5 and math.isnan(one.low) and math.isnan(one.high)


def test_errors_name_the_trouble():
    with pytest.raises(ValueError, match="prompt 1 has an infinite score"):
        mean_ci([[1.0], [math.inf]])
    with pytest.raises(ValueError, match="got 1 tasks for 2 prompts"):
        task_mean_ci([[1.0], [1.0]], ["a"])
    with pytest.raises(ValueError, match="got 1 prompts before and 2 after"):
        paired_diff_ci([[1.0]], [[1.0], [1.0]])
    with pytest.raises(ValueError, match="prompt 0 has 1 scores before and 2 after"):
        paired_diff_ci([[1.0]], [[1.0, 1.0]])
    with pytest.raises(ValueError, match="level=95"):
        mean_ci([[1.0], [1.0]], level=95)
    with pytest.raises(ValueError, match="resamples=0"):
        mean_ci([[1.0], [1.0]], resamples=0)
