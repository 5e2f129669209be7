"""Strengths: recovered, invariant, and in agreement with what they were fitted to."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reward_models.judges.bradley_terry import expected_win_rates, fit

ROUNDS = st.integers(2, 7).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(
            st.tuples(st.integers(0, n - 1), st.integers(0, n - 1), st.sampled_from([0.0, 0.5, 1.0])).filter(
                lambda row: row[0] != row[1]
            ),
            min_size=1,
            max_size=30,
        ),
    )
)


def unpack(rows):
    return [(i, j) for i, j, _ in rows], torch.tensor([p for *_, p in rows], dtype=torch.float64)


def test_exact_probabilities_give_back_the_strengths():
    truth = torch.tensor([1.5, 0.25, -0.5, -1.25], dtype=torch.float64)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    p = torch.stack([(truth[i] - truth[j]).sigmoid() for i, j in pairs])
    assert fit(4, pairs, p, prior=1e-9) == pytest.approx(truth, abs=1e-6)


def test_many_games_give_back_the_strengths():
    truth = torch.tensor([1.0, 0.5, 0.0, -0.3, -1.2], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(0, 5, (20_000, 2), generator=generator)
    ends = ends[ends[:, 0] != ends[:, 1]]
    p = (truth[ends[:, 0]] - truth[ends[:, 1]]).sigmoid()
    won = (torch.rand(len(p), generator=generator, dtype=torch.float64) < p).double()
    assert fit(5, [tuple(e) for e in ends.tolist()], won) == pytest.approx(truth, abs=0.12)


def test_two_images_by_hand():
    """Three wins in four games, without a prior: the log-odds are log 3."""
    t = fit(2, [(0, 1)] * 4, torch.tensor([1.0, 1.0, 1.0, 0.0]), prior=1e-12)
    assert float(t[0] - t[1]) == pytest.approx(math.log(3), abs=1e-6)


@given(ROUNDS)
def test_the_fit_is_a_stationary_point_and_centred(drawn):
    """Gradient zero: wins minus expected wins is the prior's pull."""
    n, rows = drawn
    pairs, p = unpack(rows)
    t = fit(n, pairs, p, prior=0.1).nan_to_num(0.0)
    pull = torch.zeros(n, dtype=torch.float64)
    for (i, j), won in zip(pairs, p.tolist(), strict=True):
        expected = 1 / (1 + math.exp(float(t[j] - t[i])))
        pull[i] += won - expected
        pull[j] -= won - expected
    assert pull == pytest.approx(0.1 * t, abs=1e-7)
    assert float(t.sum()) == pytest.approx(0, abs=1e-6)


@given(ROUNDS, st.randoms(use_true_random=False))
def test_names_order_and_sides_do_not_matter(drawn, rng):
    n, rows = drawn
    pairs, p = unpack(rows)
    new = list(range(n))
    rng.shuffle(new)
    turned = [(new[j], new[i], 1 - won) if rng.random() < 0.5 else (new[i], new[j], won) for i, j, won in rows]
    rng.shuffle(turned)
    other = fit(n, *unpack(turned))
    assert other[torch.tensor(new)] == pytest.approx(fit(n, pairs, p), abs=1e-7, nan_ok=True)


def test_weights_count_as_repetitions_and_missing_ones_not_at_all():
    pairs, p = [(0, 1), (1, 2), (0, 2)], torch.tensor([1.0, 1.0, 0.0])
    weighted = fit(3, pairs, p, torch.tensor([2.0, 1.0, 0.0]))
    assert weighted == pytest.approx(fit(3, [(0, 1), (0, 1), (1, 2)], torch.ones(3)), abs=1e-9)
    assert fit(3, pairs, torch.tensor([1.0, 1.0, math.nan])) == pytest.approx(fit(3, pairs[:2], torch.ones(2)))
    assert fit(3, [(0, 1)], torch.ones(1)).isnan().tolist() == [False, False, True]


def test_an_undefeated_image_has_a_finite_strength():
    t = fit(3, [(0, 1), (0, 2), (1, 2)], torch.ones(3), prior=0.01)
    assert bool(t.isfinite().all()) and t[0] > t[1] > t[2]
    with pytest.raises(ValueError, match="above 0"):
        fit(2, [(0, 1)], torch.ones(1), prior=0.0)


@given(st.integers(2, 6), st.randoms(use_true_random=False))
def test_on_a_full_round_the_expected_win_rate_is_the_observed_one(n, rng):
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    p = torch.tensor([rng.uniform(0.1, 0.9) for _ in pairs], dtype=torch.float64)
    observed = torch.zeros(n, dtype=torch.float64)
    for (i, j), won in zip(pairs, p.tolist(), strict=True):
        observed[i] += won / (n - 1)
        observed[j] += (1 - won) / (n - 1)
    assert expected_win_rates(fit(n, pairs, p, prior=1e-9)) == pytest.approx(observed, abs=1e-6)


def test_expected_win_rates_leave_out_the_unknown():
    rates = expected_win_rates(torch.tensor([0.0, math.log(3), math.nan], dtype=torch.float64))
    assert rates[:2] == pytest.approx([0.25, 0.75]) and bool(rates[2].isnan())
    assert bool(expected_win_rates(torch.zeros(1)).isnan().all())
