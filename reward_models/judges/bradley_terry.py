"""Strengths from pairwise preferences: ``P(i better than j) = sigmoid(t_i - t_j)`` (Bradley and Terry, 1952)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STEPS = 100  # of Newton's method; a dozen are enough unless the prior is very weak


def fit(
    n: int, pairs: Sequence[tuple[int, int]], preference: Tensor, weights: Tensor | None = None, *, prior: float = 0.1
) -> Tensor:
    """Most probable log-strengths under a Gaussian prior.

    Maximises ``sum_m w_m [p_m log s_m + (1 - p_m) log(1 - s_m)] - prior / 2 sum_i t_i^2`` with
    ``s_m = sigmoid(t_i - t_j)`` for pair m = (i, j). The objective is concave, so the answer is unique; its gradient
    sums to ``-prior sum_i t_i``, so strengths that are linked by pairs sum to 0. The prior keeps those of images that
    won or lost every comparison finite.

    Args:
        n: number of images.
        pairs: M pairs of image numbers.
        preference: (M,) 1 if the first of the pair won, 0 if the second did, 0.5 for a tie; NaN is left out.
        weights: (M,) weights of the pairs, at least 0, or None for 1.
        prior: precision of the prior, above 0.

    Returns:
        (n,) float64; NaN for images without a valid pair.

    Raises:
        ValueError: the prior is not above 0.
    """
    if not prior > 0:
        raise ValueError(
            f"got prior {prior}, expected one above 0: without it an image that wins every comparison has no finite "
            "strength. Give a small one, such as 0.01."
        )
    p = preference.double()
    w = torch.ones_like(p) if weights is None else weights.double()
    used = p.isfinite() & (w > 0)
    i, j = torch.as_tensor(pairs, dtype=torch.long).reshape(-1, 2)[used].T
    p, w = p[used], w[used]

    def objective(t: Tensor) -> Tensor:
        gap = t[i] - t[j]
        log = torch.nn.functional.logsigmoid
        return (w * (p * log(gap) + (1 - p) * log(-gap))).sum() - prior / 2 * t.square().sum()

    t = torch.zeros(n, dtype=torch.float64)
    for _ in range(STEPS):
        s = (t[i] - t[j]).sigmoid()
        pull, curve = w * (p - s), w * s * (1 - s)
        gradient = (-prior * t).index_add(0, i, pull).index_add(0, j, -pull)
        if bool((gradient.abs() < 1e-10).all()):
            break
        hessian = prior * torch.eye(n, dtype=torch.float64)
        for a, b, sign in ((i, i, 1), (j, j, 1), (i, j, -1), (j, i, -1)):
            hessian.index_put_((a, b), sign * curve, accumulate=True)
        step = torch.linalg.solve(hessian, gradient)
        size = 1.0
        while objective(t + size * step) < objective(t) and size > 1e-6:
            size /= 2
        t = t + size * step
    linked = torch.zeros(n, dtype=torch.bool)
    linked[i], linked[j] = True, True
    return t.masked_fill(~linked, torch.nan)


def expected_win_rates(strengths: Tensor) -> Tensor:
    """Mean over the other images of ``sigmoid(t_i - t_j)``, in [0, 1]: (n,) -> (n,).

    On a full round the fit without a prior gives back the observed win rates; on a partial one it corrects for the
    strength of the opponents met. NaN for images without a strength, and if no other has one.
    """
    valid = strengths.isfinite()
    beats = (strengths[:, None] - strengths[None, :]).sigmoid()
    others = valid[:, None] & valid[None, :] & ~torch.eye(len(strengths), dtype=torch.bool)
    return torch.where(others, beats, 0).sum(1) / others.sum(1)  # 0 / 0 is NaN
