"""Step kernels: one denoising step from time `s` to `s_next < s` as a Gaussian.

Time runs from s = 1 (noise) to s = 0 (data): x_s = (1 - s) x0 + s e. The model predicts v = e - x0, hence
x0_hat = x - s v and e_hat = x + (1 - s) v. With d = s - s_next every kernel here is affine in state and velocity,

    x_next = a x + b v + c noise,    a = 1 + g,    b = -d + g (1 - s),

where c is the standard deviation of the step (it already contains sqrt(d)) and g is what the kernel adds to e_hat:

    score form   g = -c^2 / (2 s)                       mean = ODE step + c^2/2 * score, score = -e_hat / s
    exact form   g = sqrt(s_next^2 - c^2) - s_next      mean = (1 - s_next) x0_hat + sqrt(s_next^2 - c^2) e_hat

    kernel          form    c at noise level h                                              levels       default
    ode, ode2       -       0                                                               0            0
    flow            score   h sqrt(d s / (1 - s))          Flow-GRPO                        [0, inf)     0.7
    dance           score   h sqrt(d)                      DanceGRPO                        [0, inf)     0.3
    cps             exact   s_next sin(h pi / 2)           coefficient-preserving sampling  [0, 1]       0.8
    precise         exact   s_next sqrt(1 - r^(h^2)), r = s_next (1 - s) / (s (1 - s_next))    [0, inf)     1.5
    dance_precise   exact   s_next sqrt(1 - exp(-h^2 (1/s_next - 1/s)))    (Dance noise, integrated)    [0, inf)  0.3
    ddim            exact   h s_next sqrt(1 - r^2)         DDIM with eta = h                [0, 1]       1
    consistency     exact   h s_next                       LCM re-noising at h = 1          [0, 1]       1

At level 0 each of them is the ODE step x - d v, bit for bit. Coefficients are float64 on the CPU.

At the two ends of the schedule:

    kernel          c at s = 1                              c at s_next = 0
    flow            h, whatever the step length             h s / sqrt(1 - s): stays in the image
    dance           h sqrt(d)                               h sqrt(s): stays in the image
    cps             s_next sin(h pi / 2)                    0
    precise         s_next, for every h > 0                 0
    dance_precise   s_next sqrt(1 - exp(-h^2 d / s_next))   0
    ddim            h s_next                                0
    consistency     h s_next                                0

flow's s / (1 - s) diverges at s = 1, so 1 - s_next stands in for 1 - s there, as published; hence c = h. Where c = 0 at
s_next = 0 the step is x0_hat, carries no policy and cannot be trained. For a model that is the exact velocity, every
kernel's marginals converge to the flow's as steps are added, except those of cps and consistency, whose noise per step
does not shrink with the step: they narrow the data's spread. consistency is exact instead, at h = 1 and for any number
of steps, when x0_hat is a consistency function (the end of the ODE through x) and not a mean.

Every kernel with noise has the density `gaussian`, N(mean, c^2), and `unscaled`, its exponent without 1 / (2 c^2) and
constants (as published with cps); see `log_prob`. A level is part of the density: noise scaled by another number than
the c of the log-prob, as some published trees do, is not possible here.

`ode2` is DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2) for steps without noise. It adds to the ODE step

    k (x0_hat - x0_hat_prev),   k = d / (2 s) * (lambda(s_next) - lambda(s)) / (lambda(s) - lambda(s_prev)),

lambda(s) = ln((1 - s) / s), where x0_hat_prev is the prediction one step earlier, at s_prev. By the method's definition
k = 0, the ODE step: on the first step of a segment, which has no earlier prediction (a step with noise before it gives
none, as it leaves the ODE's path); on the step to s_next = 0; and in the limit s_prev = 1. `Plan.memory` holds k.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Number = float | Tensor
DENSITIES = ("gaussian", "unscaled")
SOLVERS = ("ode", "ode2")  # kernels of steps without noise
_START = 1 - 1e-6  # from here on s counts as the pure-noise end, where s / (1 - s) diverges


class Coefficients(NamedTuple):
    """x_next = a x + b v + c noise; three float64 CPU tensors of one shape."""

    a: Tensor
    b: Tensor
    c: Tensor


@dataclass(frozen=True)
class Kernel:
    """A step kernel (see the module's table).

    name: its name. level_range: (low, high), both allowed. default_level: the level of the paper that introduced it.
    densities: the log-prob densities it supports; empty where a step carries no policy.
    """

    name: str
    level_range: tuple[float, float]
    default_level: float
    densities: tuple[str, ...]
    std: Callable[[Tensor, Tensor, Tensor], Tensor] = field(repr=False)
    exact: bool = field(repr=False)

    def check_level(self, level: Number, where: str = "") -> None:
        """Raise ValueError for a level outside `level_range` (or one that is not a number). where: for the message."""
        low, high = self.level_range
        values = torch.as_tensor(level, dtype=torch.float64).flatten()
        good = (values >= low) & (values <= high) & values.isfinite()
        if not bool(good.all()):
            bad = ", ".join(f"{value:g}" for value in values[~good].unique().tolist())
            raise ValueError(
                f"kernel '{self.name}' got noise level {bad}{where}; expected a finite value in [{low}, {high}]. "
                "Change the level or choose another kernel."
            )

    def coefficients(self, s: Number, s_next: Number, level: Number | None = None) -> Coefficients:
        """The step s -> s_next at a noise level; floats or tensors, broadcast together.

        s in (0, 1], s_next in [0, s), level in `level_range` (None: the default level). Returns float64 (a, b, c).
        Raises ValueError for times or levels out of range.
        """
        level = self.default_level if level is None else level
        self.check_level(level)
        t, u, h = torch.broadcast_tensors(*(torch.as_tensor(x, dtype=torch.float64) for x in (s, s_next, level)))
        if not bool(((t <= 1) & (u >= 0) & (u < t)).all()):
            raise ValueError(
                f"a step got s = {t.tolist()}, s_next = {u.tolist()}; expected 1 >= s > s_next >= 0. "
                "Time falls from 1 (noise) to 0 (data): check the order of the sigmas."
            )
        c = self.std(t, u, h)
        # at c = 0 the square root of u * u is u itself, so that g is exactly 0
        g = ((u - c) * (u + c)).clamp_min(0).sqrt() - u if self.exact else -c * c / (2 * t)
        return Coefficients(1 + g, g * (1 - t) - (t - u), c)


def second_order(s_prev: Number, s: Number, s_next: Number) -> Tensor:
    """k of an `ode2` step from s to s_next after one from s_prev to s (see the module); float64, broadcast.

    1 >= s_prev > s > s_next >= 0. Raises ValueError for other times.
    """
    r, t, u = torch.broadcast_tensors(*(torch.as_tensor(x, dtype=torch.float64) for x in (s_prev, s, s_next)))
    if not bool(((r <= 1) & (t < r) & (u < t) & (u >= 0)).all()):
        raise ValueError(
            f"an ode2 step got s_prev = {r.tolist()}, s = {t.tolist()}, s_next = {u.tolist()}; expected "
            "1 >= s_prev > s > s_next >= 0. Time falls from 1 (noise) to 0 (data): check the order of the sigmas."
        )
    before = torch.special.logit(r) - torch.special.logit(t)  # lambda = -logit; infinite at s_prev = 1, so k = 0
    after = torch.special.logit(t) - torch.special.logit(u.where(u > 0, t))  # to s_next = 0: 0, so k = 0
    return (t - u) / (2 * t) * after / before


def affine(x: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Mean of the step, a x + b v, in float32.

    x, v: (N, ...) float32. a, b: (N,) or () float64. The one place where coefficients meet latents: rollout and
    update both call it, so that the same x and v always give the same bits.
    """
    return per_row(a, x) * x + per_row(b, x) * v


def per_row(value: Number, like: Tensor) -> Tensor:
    """`value` (N,) or () as float32 on the device of `like` (N, ...), shaped to multiply its rows."""
    value = torch.as_tensor(value).to(torch.float32).to(like.device, non_blocking=True)
    return value.reshape(value.shape + (1,) * (like.ndim - 1)) if value.ndim else value


def _ode(s: Tensor, s_next: Tensor, h: Tensor) -> Tensor:
    return torch.zeros_like(s)


def _flow(s: Tensor, s_next: Tensor, h: Tensor) -> Tensor:
    # at s = 1 the schedule's next point stands in for s inside 1 - s (as flow_grpo does)
    return h * ((s - s_next) * s / (1 - torch.where(s >= _START, s_next, s))).sqrt()


def _dance(s: Tensor, s_next: Tensor, h: Tensor) -> Tensor:
    return h * (s - s_next).sqrt()


def _cps(s: Tensor, s_next: Tensor, h: Tensor) -> Tensor:
    return s_next * torch.sin(h * (math.pi / 2))


def _ratio(s: Tensor, s_next: Tensor) -> Tensor:
    return s_next * (1 - s) / (s * (1 - s_next))  # odds of s_next over odds of s, in [0, 1)


def _precise(s: Tensor, s_next: Tensor, h: Tensor) -> Tensor:
    return s_next * (1 - _ratio(s, s_next).pow(h * h)).sqrt()  # 0^0 = 1: no noise at h = 0


def _dance_precise(s: Tensor, s_next: Tensor, h: Tensor) -> Tensor:
    gap = torch.where(s_next > 0, (s - s_next) / (s * s_next), 0.0)  # 1/s_next - 1/s; c = 0 at s_next = 0 anyway
    return s_next * (-torch.expm1(-h * h * gap)).sqrt()


def _ddim(s: Tensor, s_next: Tensor, h: Tensor) -> Tensor:
    return h * s_next * (1 - _ratio(s, s_next).square()).sqrt()


def _consistency(s: Tensor, s_next: Tensor, h: Tensor) -> Tensor:
    return h * s_next


_KERNELS = {
    k.name: k
    for k in (
        Kernel("ode", (0.0, 0.0), 0.0, (), _ode, exact=False),
        Kernel("ode2", (0.0, 0.0), 0.0, (), _ode, exact=False),
        Kernel("flow", (0.0, math.inf), 0.7, DENSITIES, _flow, exact=False),
        Kernel("dance", (0.0, math.inf), 0.3, DENSITIES, _dance, exact=False),
        Kernel("cps", (0.0, 1.0), 0.8, DENSITIES, _cps, exact=True),
        Kernel("precise", (0.0, math.inf), 1.5, DENSITIES, _precise, exact=True),
        Kernel("dance_precise", (0.0, math.inf), 0.3, DENSITIES, _dance_precise, exact=True),
        Kernel("ddim", (0.0, 1.0), 1.0, DENSITIES, _ddim, exact=True),
        Kernel("consistency", (0.0, 1.0), 1.0, DENSITIES, _consistency, exact=True),
    )
}


def kernel_names() -> tuple[str, ...]:
    """The names `get_kernel` knows."""
    return tuple(_KERNELS)


def get_kernel(name: str) -> Kernel:
    """The kernel of that name; ValueError names the ones there are."""
    if name not in _KERNELS:
        raise ValueError(f"got kernel '{name}'; expected one of {', '.join(_KERNELS)}. Check the spelling.")
    return _KERNELS[name]
