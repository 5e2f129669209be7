"""Log-probability of a step, KL between two steps, and the identity of a log-probability.

<.> is the mean over the D latent elements of one sample (reduction="mean", the default) or their sum
(reduction="sum", the density in the strict sense). Clip ranges and KL weights are tuned to one choice and mean
nothing under another, so a rollout's tree carries the `Density` of its log-probs, and new ones are computed by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.kernels import DENSITIES, Number, get_kernel

REDUCTIONS = ("mean", "sum")
KL_FORMS = ("exact", "published")


def log_prob(x_next: Tensor, mean: Tensor, c: Number, reduction: str = "mean", density: str = "gaussian") -> Tensor:
    """Log-prob of `x_next` under N(mean, c^2): (N,) float32.

    gaussian   < -(x_next - mean)^2 / (2 c^2) - ln c - ln(2 pi) / 2 >
    unscaled   < -(x_next - mean)^2 >                (as released with CPS by flow_grpo: no 1/(2 c^2), no constants)

    x_next, mean: (N, ...). c: the step's std, float or (N,) float64, > 0; kept on the CPU it costs no device sync.
    Each row's bits are the same whatever the other rows and their number (on a CPU).
    Raises ValueError where c = 0: such a step carries no policy.
    """
    _check("reduction", reduction, REDUCTIONS)
    _check("density", density, DENSITIES)
    c = _positive_std(c)
    squares = _reduce((x_next - mean).square(), reduction)
    if density == "unscaled":
        return -squares
    elements = x_next[0].numel() if reduction == "sum" else 1
    scale = _like(1 / (2 * c * c), squares)
    offset = _like(elements * (c.log() + 0.5 * math.log(2 * math.pi)), squares)
    return -squares * scale - offset


def kl(
    v: Tensor,
    v_ref: Tensor,
    b: Number,
    c: Number,
    d: Number | None = None,
    form: str = "exact",
    reduction: str = "mean",
) -> Tensor:
    """KL(N(m, c^2) || N(m_ref, c^2)) of one step from the two velocities: (N,) float32.

    The state is shared, so m - m_ref = b (v - v_ref):
    exact       b^2 <(v - v_ref)^2> / (2 c^2)
    published   d times that, d = s - s_next (Flow-GRPO's code divides by the variance per unit time, c^2 / d)

    v, v_ref: (N, ...). b, c, d: floats or (N,) float64. Raises ValueError where c = 0, or "published" without d.
    """
    _check("form", form, KL_FORMS)
    _check("reduction", reduction, REDUCTIONS)
    c = _positive_std(c)
    b = torch.as_tensor(b, dtype=torch.float64).to(c.device)
    factor = b * b / (2 * c * c)
    if form == "published":
        if d is None:
            raise ValueError("kl(form='published') got no d; expected d = s - s_next. Pass d or use form='exact'.")
        factor = factor * torch.as_tensor(d, dtype=torch.float64).to(c.device)
    squares = _reduce((v - v_ref).square(), reduction)
    return squares * _like(factor, squares)


@dataclass(frozen=True)
class Density:
    """What makes two log-probs comparable: kernel, reduction ("mean" | "sum") and density ("gaussian" | "unscaled").

    Raises ValueError for an unknown name or a density that the kernel does not support.
    """

    kernel: str = "flow"
    reduction: str = "mean"
    density: str = "gaussian"

    def __post_init__(self) -> None:
        _check("reduction", self.reduction, REDUCTIONS)
        _check(f"density of kernel '{self.kernel}'", self.density, get_kernel(self.kernel).densities)

    def log_prob(self, x_next: Tensor, mean: Tensor, c: Number) -> Tensor:
        """`log_prob` with this reduction and density: (N,) float32."""
        return log_prob(x_next, mean, c, self.reduction, self.density)


def _reduce(t: Tensor, reduction: str) -> Tensor:
    """(N, ...) -> (N,). One dimension at a time, because a reduction to a single number is split among threads
    and would give N = 1 other bits than N = 2."""
    elements = t[0].numel() if reduction == "mean" and len(t) else 1
    while t.ndim > 1:
        t = t.sum(-1)
    return t / elements


def _positive_std(c: Number) -> Tensor:
    c = torch.as_tensor(c, dtype=torch.float64)
    if not bool((c > 0).all()):
        raise ValueError(
            f"log-prob or KL of a step with std c = {c.min().item()}; expected c > 0. A step without noise carries "
            "no policy: leave it out of the trained steps or raise its noise level."
        )
    return c


def _like(value: Tensor, like: Tensor) -> Tensor:
    return value.to(torch.float32).to(like.device, non_blocking=True)


def _check(what: str, got: str, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        raise ValueError(f"{what}: got '{got}'; expected one of {list(allowed)}. Check the spelling.")
