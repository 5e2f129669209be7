"""The clipped surrogate: PPO, Flow-GRPO, and bounds that follow the reward (Dynamic-TreeRPO)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowrl.errors import UserError
from flowrl.objectives.scalars import EdgeScalars, LossTerms

ClipRange = float | tuple[float, float]


@dataclass(frozen=True)
class Clipped:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7) with a KL penalty, as in Flow-GRPO (arXiv 2505.05470, eq. 5).

        r = exp(log p - log p_old),    term = w [ max(-A r, -A clip(r, 1 - low, 1 + high)) + kl_weight KL ]

    The gradient is zero where the clip is active: A > 0 and r > 1 + high, or A < 0 and r < 1 - low.

    With ``clip_range_max`` the bounds follow the edge's advantage, which stands for the reward of the paths through it
    (Dynamic-TreeRPO, arXiv 2509.23352, eq. 11):

        low(A) = low + (low_max - low) g,  high(A) = high + (high_max - high) g,    g = 1 / (1 + exp(-sensitivity A))

    The sources at hand give the two ends and a sensitivity, not the curve between: the logistic one is ours.

    Args:
        clip_range: low = high = clip_range, or the pair (low, high), 0 < low < 1, high > 0. It has a meaning only
            together with the log-prob's kernel, reduction and density: 1e-4 belongs to Flow-SDE and the mean.
        kl_weight: >= 0; > 0 makes the objective need "reference".
        clip_range_max: the bounds that good paths approach, each at least that of clip_range; None: they are fixed.
        sensitivity: how fast they do; 0 gives all paths the middle, a negative one gives bad paths the wide bounds.
    """

    clip_range: ClipRange = 1e-4
    kl_weight: float = 0.0
    clip_range_max: ClipRange | None = None
    sensitivity: float = 1.0

    name: ClassVar[str] = "clipped"
    coupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        low, high = clip_bounds(self.clip_range)
        check_kl_weight(self.kl_weight)
        if self.clip_range_max is not None:
            low_max, high_max = clip_bounds(self.clip_range_max, "clip_range_max")
            if low_max < low or high_max < high:
                raise UserError(
                    f"clip_range_max is {self.clip_range_max!r} with clip_range {self.clip_range!r}; expected bounds "
                    "at least as wide; exchange the two, or turn the sign of objective.sensitivity."
                )
        if not math.isfinite(self.sensitivity):
            raise UserError(f"sensitivity is {self.sensitivity!r}; expected a finite number, usually 1.")

    @property
    def needs(self) -> frozenset[str]:
        return needed("edges", reference=self.kl_weight > 0)

    def bounds(self, advantage: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(low, high) of each edge, (E,); two numbers where they are fixed."""
        low, high = clip_bounds(self.clip_range)
        if self.clip_range_max is None:
            return low, high
        low_max, high_max = clip_bounds(self.clip_range_max)
        g = torch.sigmoid(self.sensitivity * advantage)
        return low + (low_max - low) * g, high + (high_max - high) * g

    def __call__(self, edges: EdgeScalars) -> LossTerms:
        log_ratio = edges.log_prob - edges.old_log_prob.detach()
        advantage = edges.advantage.detach().to(log_ratio)
        low, high = self.bounds(advantage)
        policy, metrics = clipped_surrogate(log_ratio, advantage, low, high)
        return with_kl(edges, policy, self.kl_weight, metrics)


def clipped_surrogate(
    log_ratio: Tensor, advantage: Tensor, low: Tensor | float, high: Tensor | float
) -> tuple[Tensor, dict[str, Tensor]]:
    """max(-A r, -A clip(r, 1 - low, 1 + high)) with r = exp(log_ratio), and its metrics; all (E,)."""
    ratio = log_ratio.exp()
    policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))  # type: ignore[arg-type]
    above, below = ratio > 1 + high, ratio < 1 - low
    return policy, {
        "policy_loss": policy,
        "ratio": ratio,
        "clip_fraction": above | below,  # outside the range, whatever the sign of A (as flow_grpo logs it)
        "clip_active": ((advantage > 0) & above) | ((advantage < 0) & below),  # no policy gradient left
        "approx_kl": 0.5 * log_ratio**2,  # flow_grpo's estimate
    }


def with_kl(edges: EdgeScalars, policy: Tensor, kl_weight: float, metrics: Mapping[str, Tensor]) -> LossTerms:
    """w (policy + kl_weight KL), and the metrics, detached; the KL is among them wherever it was computed."""
    loss, metrics = policy, dict(metrics)
    if kl_weight > 0:
        loss = policy + kl_weight * required(edges, "kl")
    if edges.kl is not None:
        metrics["kl"] = edges.kl
    return LossTerms(edges.weight.detach().to(loss) * loss, {k: x.detach().float() for k, x in metrics.items()})


def needed(*always: str, **if_true: bool) -> frozenset[str]:
    """The names that are always needed, and those whose condition holds."""
    return frozenset(always) | {name for name, condition in if_true.items() if condition}


def required(edges: EdgeScalars, name: str) -> Tensor:
    """A scalar that an objective needs; ValueError where it was not computed."""
    value = getattr(edges, name)
    if value is None:
        raise ValueError(f"the objective got no EdgeScalars.{name}; compute it, as `needs` says.")
    return value


def clip_bounds(clip_range: ClipRange, name: str = "clip_range") -> tuple[float, float]:
    """(low, high) of one number or a pair; UserError unless 0 < low < 1 and 0 < high."""
    low, high = (clip_range, clip_range) if isinstance(clip_range, (int, float)) else clip_range
    if not (0 < low < 1 and 0 < high < float("inf")):
        raise UserError(
            f"{name} is {clip_range!r}; expected a number e or a pair (low, high) with 0 < low < 1 and 0 < high; "
            f"set objective.{name}, for example 1.0e-4."
        )
    return float(low), float(high)


def check_kl_weight(kl_weight: float) -> None:
    """UserError unless it is a number >= 0."""
    if not 0 <= kl_weight < float("inf"):
        raise UserError(f"the KL weight is {kl_weight!r}; expected a number >= 0; set objective.kl.weight.")
