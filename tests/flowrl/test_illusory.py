"""Spread, narrow groups and amplification, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from thread_ranks import in_ranks

from flowrl.advantages import group_advantages
from flowrl.illusory import illusory


def alone(x: torch.Tensor) -> torch.Tensor:
    return x


def test_by_hand() -> None:
    # sigma 1 and 0.01; |A| = 1 everywhere, |r - mean| = 1 and 0.01; a third group has one image, a fourth no spread
    r = torch.tensor([1.0, 3.0, 0.50, 0.52, math.nan, 7.0, 2.0, 2.0])
    a = torch.tensor([-1.0, 1.0, -1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    g = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    found = illusory(r, a, g, 0.05, alone)
    assert found["spread"] == pytest.approx((1 + 0.01 + 0) / 3, rel=1e-5)
    assert found["narrow_groups"] == pytest.approx(2 / 3)
    assert found["amplification"] == pytest.approx((1 + 100) / 2, rel=1e-4)


def test_without_a_floor_it_is_a_tenth_of_the_spread_of_all() -> None:
    r = torch.tensor([0.0, 2.0, 0.9, 1.1])  # std of all 0.7106, sigma 1 and 0.1
    found = illusory(r, r, torch.tensor([0, 0, 1, 1]), None, alone)
    assert found["narrow_groups"] == 0
    assert (
        illusory(r * torch.tensor([1, 1, 0.5, 0.5]), r, torch.tensor([0, 0, 1, 1]), None, alone)["narrow_groups"] == 0.5
    )


def test_nothing_to_compare() -> None:
    found = illusory(torch.tensor([1.0, math.nan]), torch.zeros(2), torch.tensor([0, 1]), None, alone)
    assert all(math.isnan(value) for value in found.values())


@given(st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=5), min_size=2, max_size=5))
def test_z_scores_amplify_by_one_over_sigma_whatever_the_processes(groups: list[list[float]]) -> None:
    r = torch.tensor([value for group in groups for value in group])
    g = torch.tensor([i for i, group in enumerate(groups) for _ in group])
    a = group_advantages(r, g, std="prompt", eps=0.0, clip=None).advantages
    whole = illusory(r, a, g, None, alone)
    sigma = torch.stack([r[g == i].double().std(correction=0) for i in g.unique()])
    assert whole["spread"] == pytest.approx(float(sigma.mean()), abs=1e-6)
    if bool((sigma > 1e-3).all()):
        assert whole["amplification"] == pytest.approx(float((1 / sigma).mean()), rel=1e-3)
    ranks = in_ranks(
        2, lambda rank, reduce: illusory(r[g % 2 == rank], a[g % 2 == rank], g[g % 2 == rank], None, reduce)
    )
    for found, calls in ranks:
        assert calls == 2
        assert found == pytest.approx(whole, nan_ok=True, rel=1e-9)
