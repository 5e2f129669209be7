"""Statistics of sets: verified numbers, scipy, brute force, and closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from reward_models.distributions import (
    Frechet,
    Gaussian,
    Mmd,
    Vendi,
    cubic,
    downdated_eigenvalues,
    frechet,
    gaussian,
    greedy_swap,
    kid,
    vendi,
)


@pytest.fixture(scope="module")
def verified():
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.normal(size=(500, 16))), torch.from_numpy(1.3 * rng.normal(size=(400, 16)) + 0.2)


def draws(seed, n, d, spread=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


def every(statistic, n):
    """Values without each vector, by brute force."""
    rest = torch.arange(n)
    return torch.tensor([statistic.value(rest[rest != i]) for i in range(n)], dtype=torch.float64)


def test_verified_values(verified):
    x, y = verified
    assert frechet(x, y) == pytest.approx(2.5931352601649, rel=1e-12)
    assert vendi(x) == pytest.approx(15.7727, abs=5e-5)


def test_frechet_is_the_textbook_formula(verified):
    x, y = (z[:60].numpy() for z in verified)
    s1, s2 = np.cov(x.T), np.cov(y.T)
    want = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert frechet(*(torch.from_numpy(z) for z in (x, y))) == pytest.approx(want, rel=1e-10)


def test_moments_of_a_stream_are_those_of_the_whole():
    x = draws(1, 50, 4, 2.0, 100.0)
    whole, parts = Gaussian.of(x), Gaussian.of(iter(x.split([1, 7, 42])))
    assert torch.allclose(parts.mean, whole.mean, rtol=1e-12) and torch.allclose(parts.root, whole.root, rtol=1e-9)
    assert torch.allclose(whole.root @ whole.root, x.T.cov(), rtol=1e-9)


def test_frechet_of_gaussians_in_closed_form():
    """In one dimension it is (m1 - m2)^2 + (s1 - s2)^2; of a set with itself 0, also where S is singular."""
    x, y = draws(1, 50, 1), draws(2, 40, 1, 3.0, 2.0)
    want = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert frechet(x, y) == pytest.approx(float(want), rel=1e-12)
    few = draws(3, 5, 12)
    assert abs(frechet(few, few)) < 1e-6


@pytest.mark.parametrize(("n", "d"), [(40, 6), (7, 12), (2, 3), (3, 1)])
def test_frechet_leave_one_out_is_brute_force(n, d):
    statistic = Frechet(draws(n, n, d, 2.0), Gaussian.of(draws(9, 30, d)))
    assert torch.allclose(statistic.leave_one_out(), every(statistic, n), atol=1e-6, rtol=1e-9)


def test_frechet_leave_one_out_with_repeated_vectors():
    x = draws(5, 6, 4).repeat(2, 1)
    statistic = Frechet(x, Gaussian.of(draws(9, 30, 4)))
    assert torch.allclose(statistic.leave_one_out(), every(statistic, 12), atol=1e-6)


@pytest.mark.parametrize("kernel", [cubic, gaussian])
def test_kernel_distance_is_the_double_sum(kernel):
    x, y = draws(1, 6, 4), draws(2, 5, 4, 1.5, 0.5)
    k = lambda a, b: float(kernel(a[None], b[None]))  # noqa: E731
    within = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    own = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    across = np.mean([k(a, b) for a in x for b in y])
    statistic = Mmd(x, y, kernel)
    assert statistic.value() == pytest.approx(within + own - 2 * across, rel=1e-10)
    assert torch.allclose(statistic.leave_one_out(), every(statistic, 6), rtol=1e-10, atol=1e-12)


def test_cubic_kernel_by_hand():
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    assert float(cubic(x, 2 * x)) == pytest.approx(27.0)  # (4 / 2 + 1)^3


def test_kid_is_unbiased_and_finds_a_shift():
    same = [kid(draws(2 * s, 40, 3), draws(2 * s + 1, 40, 3), subsets=0)[0] for s in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 200**0.5
    assert kid(draws(0, 40, 3), draws(1, 40, 3, shift=1.0), subsets=10, size=30)[0] > 0.5


def test_kid_of_subsets_is_seeded_and_equals_the_whole_when_they_are_everything():
    x, y = draws(0, 20, 3), draws(1, 20, 3, 1.2)
    assert kid(x, y, subsets=5, size=8, seed=3) == kid(x, y, subsets=5, size=8, seed=3)
    assert kid(x, y, subsets=5, size=8, seed=3) != kid(x, y, subsets=5, size=8, seed=4)
    mean, deviation = kid(x, y, subsets=3, size=100)
    assert mean == pytest.approx(kid(x, y, subsets=0)[0], rel=1e-9) and deviation < 1e-12


@given(st.integers(1, 12))
def test_vendi_counts_orthogonal_vectors_and_not_copies(n):
    assert vendi(torch.eye(n)) == pytest.approx(n, rel=1e-9)
    assert vendi(torch.ones(n, 5)) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(30, 5), (6, 20), (2, 3)])
def test_vendi_leave_one_out_is_brute_force(n, d):
    statistic = Vendi(draws(n, n, d))
    assert torch.allclose(statistic.leave_one_out(), every(statistic, n), atol=1e-8)


@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 9))
def test_downdated_eigenvalues_are_those_of_the_matrix(seed, r, n):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, r, generator=generator, dtype=torch.float64).round(decimals=1)  # some equal, some zero
    matrix = rows.T @ rows + 0.1 * torch.eye(r, dtype=torch.float64)
    values, axes = torch.linalg.eigh(matrix)
    values, axes = values.flip(0), axes.flip(1)
    got = downdated_eigenvalues(values, (rows @ axes).square())
    want = torch.linalg.eigvalsh(matrix - rows[:, :, None] * rows[:, None]).flip(1)
    assert torch.allclose(got, want, atol=1e-10 * float(values[0]))


class Sum:
    """A set's sum of given numbers."""

    def __init__(self, numbers):
        self.numbers = torch.tensor(numbers, dtype=torch.float64)

    def value(self, index=None):
        return float((self.numbers if index is None else self.numbers[index]).sum())

    def leave_one_out(self):
        return self.numbers.sum() - self.numbers


def test_greedy_swap_finds_the_best_split_where_credit_is_additive():
    statistic = Sum([1.0, 5.0, 2.0, 0.0, 3.0, 3.5])
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5]])
    assert greedy_swap(statistic, pairs, maximise=True).tolist() == [1, 0, 1]
    assert greedy_swap(statistic, pairs, maximise=False).tolist() == [0, 1, 0]


def test_greedy_swap_ends_where_no_single_swap_helps():
    x = draws(4, 16, 3, 2.0)
    statistic = Frechet(x, Gaussian.of(draws(5, 50, 3)))
    pairs = torch.arange(16).reshape(8, 2)
    columns = greedy_swap(statistic, pairs, maximise=False, sweeps=50)
    good = statistic.value(pairs[torch.arange(8), columns])
    assert good <= min(statistic.value(pairs[:, 0]), statistic.value(pairs[:, 1]))
    for i in range(8):
        trial = columns.clone()
        trial[i] = 1 - trial[i]
        assert statistic.value(pairs[torch.arange(8), trial]) >= good


def test_too_few_references_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        Gaussian.of(torch.ones(1, 3))
    with pytest.raises(ValueError, match="at least 2"):
        Mmd(torch.ones(3, 3), torch.ones(1, 3))
