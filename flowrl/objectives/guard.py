"""GRPO-Guard: the ratio normalised step by step, and every step's gradient freed of its Jacobian.

Deviations from the released code (flow_grpo's GRPO-Guard trainer):
* <(m - m_old)^2> is taken for each edge; the released code averages it over the whole batch.
* The loss is divided by |b| = |dm/dv|, which holds for every kernel, instead of by the step length d (which is |b| of
  the ODE step); ``reweight: step`` is the released form.
* Under the unscaled density the exponent is the same number, <eps (m - m_old)>; the released code knows the Gaussian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from flowrl.errors import UserError
from flowrl.objectives.clipped import (
    ClipRange,
    check_kl_weight,
    clip_bounds,
    clipped_surrogate,
    needed,
    required,
    with_kl,
)
from flowrl.objectives.scalars import EdgeScalars, LossTerms


@dataclass(frozen=True)
class Guard:
    """GRPO-Guard: clipped surrogate with RatioNorm and gradient reweighting.

        ln r = (log p - log p_old + <(m - m_old)^2> / (2 c^2)) c  =  <eps (m - m_old)>
        term = w [ max(-A r, -A clip(r, 1 - low, 1 + high)) / |b| + kl_weight KL ]

    The plain log-ratio has mean -<(m - m_old)^2> / (2 c^2), below 0, and a spread that depends on the step, so that a
    clip range binds on one side and at some steps only. This exponent has mean 0 and, for one and the same m - m_old,
    one spread. d(term)/dv carries |b| once; dividing by it gives all steps the same say.

    Args:
        clip_range: as in `Clipped`, of the normalised ratio (published: 2e-6; PickScore 4e-6).
        kl_weight: >= 0; not divided by |b|.
        ratio_norm: False leaves the ratio as it is; then the weights that sampled are not needed.
        reweight: "jacobian" divides by |b|, "step" by d, "none" by 1.
    """

    clip_range: ClipRange = 2e-6
    kl_weight: float = 0.0
    ratio_norm: bool = True
    reweight: Literal["jacobian", "step", "none"] = "jacobian"

    name: ClassVar[str] = "guard"
    coupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        clip_bounds(self.clip_range)
        check_kl_weight(self.kl_weight)
        if self.reweight not in ("jacobian", "step", "none"):
            raise UserError(
                f"reweight is {self.reweight!r}; expected 'jacobian', 'step' or 'none'; set objective.reweight to one."
            )

    @property
    def needs(self) -> frozenset[str]:
        return needed("edges", old_mean=self.ratio_norm, reference=self.kl_weight > 0)

    def __call__(self, edges: EdgeScalars) -> LossTerms:
        log_ratio = ratio_norm(edges) if self.ratio_norm else edges.log_prob - edges.old_log_prob.detach()
        advantage = edges.advantage.detach().to(log_ratio)
        policy, metrics = clipped_surrogate(log_ratio, advantage, *clip_bounds(self.clip_range))
        if self.reweight != "none":
            policy = policy / required(edges, "jacobian" if self.reweight == "jacobian" else "d").to(policy)
        return with_kl(edges, policy, self.kl_weight, metrics)


def ratio_norm(edges: EdgeScalars) -> Tensor:
    """The normalised log-ratio <eps (m - m_old)>, (E,).

    With log p = -scale <(next - m)^2> + constant and next = m_old + c eps,
    log p - log p_old = 2 scale c <eps (m - m_old)> - scale <(m - m_old)^2>. For the Gaussian, scale = 1 / (2 c^2).
    """
    c, shift = required(edges, "c"), required(edges, "mean_shift_sq")
    scale = 1 / (2 * c**2) if edges.scale is None else edges.scale
    return (edges.log_prob - edges.old_log_prob.detach() + scale * shift) / (2 * scale * c)
