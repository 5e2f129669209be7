"""Losses against closed forms and torch's own; the probability behind de-biased counts against integration."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from torch.nn.functional import cross_entropy as torch_cross_entropy
from torch.nn.functional import normalize

from reward_models.training.counts import Counted, pairs_of_counts, superiority
from reward_models.training.losses import bradley_terry, comparison_loss, cross_entropy, triplet, weighted_mean

NAN = math.nan
f64 = lambda *x: torch.tensor(x, dtype=torch.float64)  # noqa: E731


def test_bradley_terry_by_hand():
    assert bradley_terry(f64(math.log(3), math.log(3), 2), f64(1, 0, 0.5)).tolist() == pytest.approx(
        [math.log(4 / 3), math.log(4), 0.0]
    )


@given(st.lists(st.tuples(st.floats(-20, 20), st.floats(-20, 20), st.floats(0, 1)), min_size=1, max_size=6))
def test_cross_entropy_is_that_of_two_logits_less_its_least(rows):
    first, second, p = torch.tensor(rows, dtype=torch.float64).unbind(1)
    wanted = torch_cross_entropy(torch.stack([first, second], 1), torch.stack([p, 1 - p], 1), reduction="none")
    entropy = torch.distributions.Bernoulli(p).entropy()
    torch.testing.assert_close(cross_entropy(first - second, p), wanted - entropy, rtol=1e-9, atol=1e-9)


@given(st.floats(0.01, 0.99))
def test_cross_entropy_is_least_where_the_model_agrees_with_the_votes(p):
    gap = torch.logit(f64(p)).requires_grad_(True)
    loss = cross_entropy(gap, f64(p)).sum()
    (slope,) = torch.autograd.grad(loss, gap)
    assert abs(float(loss)) < 1e-12 and abs(float(slope)) < 1e-12


def test_hard_labels_make_the_two_losses_one():
    gap, label = torch.randn(9, dtype=torch.float64), f64(1, 0, 1, 0, 1, 0, 1, 0, 1)
    torch.testing.assert_close(cross_entropy(gap, label), bradley_terry(gap, label))


def test_triplet_is_half_the_hinge_on_squared_distances():
    draw = torch.Generator().manual_seed(0)
    a, p, n = (normalize(torch.randn(50, 6, generator=draw, dtype=torch.float64), dim=1) for _ in range(3))
    squared = ((a - p).square().sum(1) - (a - n).square().sum(1) + 0.4).clamp(min=0)
    gap = (a * p).sum(1) - (a * n).sum(1)
    torch.testing.assert_close(2 * triplet(gap, torch.ones_like(gap), 0.2), squared)
    torch.testing.assert_close(triplet(-gap, torch.zeros_like(gap), 0.2), triplet(gap, torch.ones_like(gap), 0.2))


def test_means_over_aspects_and_pairs():
    losses, labels = f64(1, 3, 5, 7).view(2, 2), f64(1, 1, 1, NAN).view(2, 2)
    assert weighted_mean(losses, labels, f64(1, 3)) == (2 * 1 + 5 * 3) / 4
    assert weighted_mean(losses, torch.full((2, 2), NAN, dtype=torch.float64), f64(1, 1)) == 0
    with pytest.raises(ValueError, match="bradley_terry"):
        comparison_loss("bt", losses, labels, f64(1, 1))


@pytest.mark.parametrize("name", ["bradley_terry", "triplet"])
def test_ties_are_left_out_of_the_mean(name):
    gap, labels = f64(0.5, -2.0, 3.0).view(3, 1), f64(1, 0.5, 0).view(3, 1)
    decided = comparison_loss(name, gap[[0, 2]], labels[[0, 2]], f64(1, 2))
    assert comparison_loss(name, gap, labels, f64(1, 5, 2)) == pytest.approx(float(decided))
    assert comparison_loss(name, gap[1:2], labels[1:2], f64(1)) == 0


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [((3, 10), (1, 30)), ((0, 5), (9, 5)), ((4, 100), (4, 100)), ((2.5, 7), (1, 2))])
def test_superiority_is_the_integral_over_both_rates(a, b):
    mean, strength = 0.2, 1.5
    x, y = (stats.gamma(strength + c, scale=1 / (strength / mean + e)) for c, e in (a, b))
    wanted = integrate.quad(lambda r: x.pdf(r) * y.cdf(r), 0, math.inf)[0]
    first, second = Counted("p", "a", *a), Counted("p", "b", *b)
    assert superiority(first, second, mean, strength) == pytest.approx(wanted, abs=1e-7)
    assert superiority(first, second, mean) + superiority(second, first, mean) == pytest.approx(1)


def test_exposure_takes_its_share_and_little_evidence_stays_near_the_mean():
    # picked up more often, but shown ten times as much
    often, rarely = Counted("p", "often", 20, 1000), Counted("p", "rarely", 10, 100)
    (pair,) = pairs_of_counts([often, rarely])
    assert (pair.first, pair.second) == ("often", "rarely") and pair.labels[""] < 0.01
    lucky, proven, usual = Counted("p", "a", 3, 3), Counted("p", "b", 300, 300), Counted("p", "c", 30, 300)
    assert superiority(lucky, usual, 0.1) < 0.99 < superiority(proven, usual, 0.1)


def test_pairs_stay_within_a_prompt_and_are_sure():
    rows = [
        Counted("p", "a", 50, 100),
        Counted("p", "b", 49, 100),
        Counted("p", "c", 5, 100),
        Counted("q", "d", 0, 100),
    ]
    found = pairs_of_counts(rows, confidence=0.9)
    assert {(p.first, p.second) for p in found} == {("a", "c"), ("b", "c")}
    assert len(pairs_of_counts(rows, confidence=0.9, most=1)) == 1
    assert pairs_of_counts(rows, confidence=0.9, most=1)[0].first == "a"  # the surest
    for wrong in ([Counted("p", "a", -1, 1)], [Counted("p", "a", 1, 0)], [Counted("p", "a", 0, 1)]):
        with pytest.raises(ValueError, match="exposure|picked up"):
            pairs_of_counts(wrong)
