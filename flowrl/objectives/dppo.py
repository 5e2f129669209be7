"""Flow-DPPO: a trust region on the divergence of each step in place of a clipped ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flowrl.errors import UserError
from flowrl.objectives.clipped import check_kl_weight, needed, required, with_kl
from flowrl.objectives.scalars import EdgeScalars, LossTerms


@dataclass(frozen=True)
class DPPO:
    """Policy gradient whose terms drop out where a step's policy has left the trust region (as in verl-omni, UniRL).

        r = exp(log p - log p_old),    D = <(m - m_old)^2> / (2 c^2)
        term = w [ -A r 1[kept] + kl_weight KL ],    kept unless D >= threshold and r has moved the way A wants:
                                                     A > 0 and r > 1, or A < 0 and r < 1

    D is the KL of the step from that of the weights that sampled. Unlike the ratio it does not depend on the noise
    drawn, so that a step is held because its policy has moved far, not because its sample was an outlier.

    Args:
        threshold: > 0, may be infinite (plain importance-weighted policy gradient). 1e-5 belongs to reduction "mean".
        kl_weight: >= 0; > 0 makes the objective need "reference".
    """

    threshold: float = 1e-5
    kl_weight: float = 0.0

    name: ClassVar[str] = "dppo"
    coupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise UserError(f"threshold is {self.threshold!r}; expected a number > 0; set it, for example to 1.0e-5.")
        check_kl_weight(self.kl_weight)

    @property
    def needs(self) -> frozenset[str]:
        return needed("edges", "old_mean", reference=self.kl_weight > 0)

    def __call__(self, edges: EdgeScalars) -> LossTerms:
        log_ratio = edges.log_prob - edges.old_log_prob.detach()
        a = edges.advantage.detach().to(log_ratio)
        divergence = required(edges, "mean_shift_sq").detach() / (2 * required(edges, "c") ** 2)
        moved = ((a > 0) & (log_ratio > 0)) | ((a < 0) & (log_ratio < 0))
        masked = moved & (divergence >= self.threshold)
        ratio = log_ratio.where(~masked, 0.0).exp()  # a masked one may be infinite, and 0 x infinity no gradient
        policy = (-a * ratio).where(~masked, 0.0)
        metrics = {
            "policy_loss": policy,
            "ratio": log_ratio.exp(),
            "masked_fraction": masked,
            "divergence": divergence,
            "approx_kl": 0.5 * log_ratio**2,
        }
        return with_kl(edges, policy, self.kl_weight, metrics)
