"""Statistics of sets of feature vectors: Frechet distance, kernel distance (KID, CMMD) and Vendi score.

Each statistic is prepared once for n vectors; then it gives the value of any subset, and the values of all n sets that
lack one vector at the price of about one value. All of it in float64, on the device of the features.

    Frechet (FID, Heusel et al. 2017)  |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)       covariances with n - 1
    KID (Binkowski et al. 2018)        mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean k(x_i, y_j)
    Vendi (Friedman & Dieng 2023)      exp(-sum l log l), l the eigenvalues of K / n, K the cosine kernel
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

Kernel = Callable[[Tensor, Tensor], Tensor]

BISECTIONS = 64
ELEMENTS = 1 << 23  # float64 numbers in one block of the bisection: 64 MiB


class Statistic(Protocol):
    """A number for a set of n feature vectors."""

    def value(self, index: Tensor | None = None) -> float:
        """Of the vectors with these numbers; None: of all."""
        ...

    def leave_one_out(self) -> Tensor:
        """(n,): entry i is the value without vector i."""
        ...


def downdated_eigenvalues(values: Tensor, weights: Tensor) -> Tensor:
    """Eigenvalues of ``diag(values) - v v^T`` for many v at once, without decomposing again.

    Root j lies between values[j + 1] and values[j]. For t between these two, ``det(diag(values) - t - v v^T)`` has the
    sign that says root j < t exactly if ``sum_k v_k^2 / (values_k - t) > 1`` (Sylvester's inertia); so we bisect.

    Args:
        values: (r,) float64, descending, positive.
        weights: (n, r), the squares v^2 of each of n vectors, such that no result is negative.

    Returns:
        (n, r), descending.
    """
    r = len(values)
    if not weights.numel():
        return weights.clone()
    low, high = torch.cat([values[1:], values.new_zeros(1)]), values
    blocks = []
    for block in weights.split(max(1, ELEMENTS // (r * r))):
        lo, hi = low.expand(len(block), r), high.expand(len(block), r)
        for _ in range(BISECTIONS):
            t = (lo + hi) / 2
            below = (block[:, None] / (values - t[:, :, None])).sum(2) > 1
            lo, hi = torch.where(below, lo, t), torch.where(below, t, hi)
        blocks.append((lo + hi) / 2)
    return torch.cat(blocks)


def _axes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Positive eigenvalues (r,) of ``rows^T rows``, descending, and the squares (n, r) of the rows along its axes."""
    u, singular, _ = torch.linalg.svd(rows, full_matrices=False)
    used = singular > 1e-12 * singular.sum()
    values = singular[used].square()
    return values, u[:, used].square() * values


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,), symmetric root (D, D) of the covariance, and its trace."""

    mean: Tensor
    root: Tensor
    trace: Tensor

    @staticmethod
    def of(features: Tensor | Iterable[Tensor]) -> Gaussian:
        """Moments of (n, D) features, or of parts of them, one in memory at a time (Chan et al. 1983).

        Raises:
            ValueError: fewer than two vectors.
        """
        parts = [features] if isinstance(features, Tensor) else features
        n, mean, scatter = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for part in parts:
            x = part.double()
            centred, move = x - x.mean(0), x.mean(0) - mean
            scatter = scatter + centred.T @ centred + torch.outer(move, move) * (n * len(x) / (n + len(x)))
            n += len(x)
            mean = mean + move * (len(x) / n)
        if n < 2:
            raise ValueError(f"got {n} reference vectors, expected at least 2. Add references.")
        values, axes = torch.linalg.eigh(scatter / (n - 1))
        values = values.clamp_min(0)  # rounding leaves tiny negative ones where the covariance is singular
        return Gaussian(mean, (axes * values.sqrt()) @ axes.T, values.sum())


class Frechet:
    """Squared Frechet distance of the Gaussian fitted to a set from that of the references; 0 is best.

    With centred rows X of the set, ``tr (S1 S2)^(1/2)`` is the sum of the singular values of ``X S2^(1/2)`` divided by
    ``sqrt(n - 1)``, which needs no root of a matrix that is not symmetric. A set of one has no spread: S1 = 0.

    Args:
        features: (n, D) of the set.
        reference: of the references.
    """

    def __init__(self, features: Tensor, reference: Gaussian) -> None:
        self.x = features.double() - reference.mean
        self.scaled = self.x @ reference.root
        self.reference = reference

    def value(self, index: Tensor | None = None) -> float:
        """See ``Statistic``; a set of at least 1."""
        x, scaled = (self.x, self.scaled) if index is None else (self.x[index], self.scaled[index])
        freedom = max(len(x) - 1, 1)
        spread = (x - x.mean(0)).square().sum() / freedom
        overlap = torch.linalg.svdvals(scaled - scaled.mean(0)).sum() / freedom**0.5
        return float(x.mean(0).square().sum() + spread + self.reference.trace - 2 * overlap)

    def leave_one_out(self) -> Tensor:
        """See ``Statistic``; a set of at least 2.

        With d_i = x_i - m the mean moves by ``-d_i / (n - 1)`` and the scatter loses ``n / (n - 1) d_i d_i^T``."""
        n, mean = len(self.x), self.x.mean(0)
        d, freedom = self.x - mean, max(n - 2, 1)
        norms = d.square().sum(1)
        spread = (norms.sum() - n / (n - 1) * norms) / freedom
        values, squares = _axes(self.scaled - self.scaled.mean(0))
        left = downdated_eigenvalues(values, n / (n - 1) * squares)
        overlap = left.clamp_min(0).sqrt().sum(1) / freedom**0.5
        return (mean - d / (n - 1)).square().sum(1) + spread + self.reference.trace - 2 * overlap


def cubic(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel ``(x . y / D + 1)^3``: (n, D), (m, D) -> (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """CMMD's kernel ``exp(-|x - y|^2 / (2 sigma^2))``, sigma = 10 (Jayasumana et al. 2024): (n, D), (m, D) -> (n, m).

    Meant for unit vectors. CMMD multiplies the result by 1000; we do not."""
    return torch.exp(-torch.cdist(x, y).square() / 200)


KERNELS: dict[str, Kernel] = {"cubic": cubic, "gaussian": gaussian}


class Mmd:
    """Unbiased squared kernel distance of a set from references; may be negative, 0 is expected of equal laws.

    Args:
        features: (n, D) of the set, n >= 2 (3 for leave-one-out).
        reference: (m, D), m >= 2.
        kernel: see ``KERNELS``.
    """

    def __init__(self, features: Tensor, reference: Tensor, kernel: Kernel = cubic) -> None:
        if len(reference) < 2:
            raise ValueError(f"got {len(reference)} reference vectors, expected at least 2. Add references.")
        x, y = features.double(), reference.double()
        m = len(y)
        kyy = kernel(y, y)
        self.own = (kyy.sum() - kyy.diagonal().sum()) / (m * (m - 1))
        self.across = kernel(x, y).mean(1)  # (n,)
        self.within = kernel(x, x)
        self.within.fill_diagonal_(0)

    def value(self, index: Tensor | None = None) -> float:
        """See ``Statistic``."""
        within, across = self.within, self.across
        if index is not None:
            within, across = within[index][:, index], across[index]
        n = len(across)
        return float(within.sum() / (n * (n - 1)) + self.own - 2 * across.mean())

    def leave_one_out(self) -> Tensor:
        """See ``Statistic``: sums of the kernel matrices less a row (and a column)."""
        n = len(self.across)
        within = (self.within.sum() - 2 * self.within.sum(1)) / ((n - 1) * (n - 2))
        return within + self.own - 2 * (self.across.sum() - self.across) / (n - 1)


def _vendi(eigenvalues: Tensor) -> Tensor:
    """(..., r) eigenvalues that sum to 1 -> (...): exponential of their entropy, with 0 log 0 = 0."""
    return torch.special.entr(eigenvalues).sum(-1).exp()


class Vendi:
    """Effective number of different vectors in a set, in [1, n]: n orthogonal ones count n, n equal ones count 1.

    Args:
        features: (n, D), made unit vectors here.
    """

    def __init__(self, features: Tensor) -> None:
        self.x = normalize(features.double(), dim=1)

    def value(self, index: Tensor | None = None) -> float:
        """See ``Statistic``; a set of at least 1."""
        x = self.x if index is None else self.x[index]
        return float(_vendi(torch.linalg.svdvals(x).square() / len(x)))

    def leave_one_out(self) -> Tensor:
        """See ``Statistic``; a set of at least 2."""
        return _vendi(downdated_eigenvalues(*_axes(self.x)).clamp_min(0) / (len(self.x) - 1))


def frechet(x: Tensor, y: Tensor) -> float:
    """Frechet distance of (n, D) and (m, D) features; FID if these are Inception's pool3."""
    return Frechet(x, Gaussian.of(y)).value()


def kid(x: Tensor, y: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """KID as it is reported: mean and standard deviation over random subsets of both sets.

    Args:
        x, y: (n, D) and (m, D).
        subsets: how many; 0 for one value over everything (its deviation is 0).
        size: vectors of a subset, at most as many as there are.
        seed: of the subsets.
    """
    if not subsets:
        return Mmd(x, y).value(), 0.0
    size = min(size, len(x), len(y))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        a, b = (torch.randperm(len(z), generator=generator)[:size].to(z.device) for z in (x, y))
        values.append(Mmd(x[a], y[b]).value())
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std(correction=0))


def vendi(x: Tensor) -> float:
    """Vendi score of (n, D) features."""
    return Vendi(x).value()


def greedy_swap(statistic: Statistic, pairs: Tensor, *, maximise: bool, sweeps: int = 10) -> Tensor:
    """DRAGON's split of pairs of images into a good and a bad set of the same prompts.

    Starts from the better of the two sets ``pairs[:, 0]`` and ``pairs[:, 1]`` and exchanges the images of a pair
    wherever that makes the good set better, pair by pair, until a whole sweep exchanges nothing. (The authors' own
    construction could not be read; this is ours, arXiv 2504.15217 describes it in words.)

    Args:
        statistic: of all the images.
        pairs: (P, 2) numbers of images; both of a row have the same prompt, none occurs twice.
        maximise: whether more is better.
        sweeps: at most.

    Returns:
        (P,) column of the image that belongs to the good set, 0 or 1.
    """
    rows, sign = torch.arange(len(pairs)), 1.0 if maximise else -1.0

    def good(columns: Tensor) -> float:
        return sign * statistic.value(pairs[rows, columns])

    columns = torch.zeros(len(pairs), dtype=torch.long)
    best, other = good(columns), good(1 - columns)
    if other > best:
        columns, best = 1 - columns, other
    for _ in range(sweeps):
        before = columns.clone()
        for i in range(len(pairs)):
            trial = columns.clone()
            trial[i] = 1 - trial[i]
            if (value := good(trial)) > best:
                columns, best = trial, value
        if torch.equal(columns, before):
            break
    return columns
