"""DiffusionNFT: matching on finished images, towards the good ones and away from the bad ones; no likelihood, no SDE.

Deviations from the released code: mean absolute errors are summed in float64 from float32 terms; noised leaves of one
update may be fewer than all times of the schedule (``times``), and share their noise (``shared_noise``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flowrl.errors import UserError
from flowrl.objectives.clipped import check_kl_weight, needed
from flowrl.objectives.scalars import LeafScalars, LeafVelocities, LossTerms


@dataclass(frozen=True)
class NFT:
    """DiffusionNFT (arXiv 2509.16117).

        x_s = (1 - s) x0 + s e,    v+ = beta v + (1 - beta) v_old,    v- = (1 + beta) v_old - beta v
        L+- = <(x_s - s v+- - x0)^2> / w+-,    w+- = max(<|x_s - s v+- - x0|>, error_floor) (detached)
        r = 1/2 + clip(A / advantage_clip, -1, 1) / 2
        term = weight [ advantage_clip (r L+ + (1 - r) L-) / beta + kl_weight <(v - v_ref)^2> ]

    v+ is moved towards the image by its reward's share, v- by the rest; since v- is the mirror image of v+ at v_old,
    fitting v- to a bad image moves v away from it. v_old belongs to the weights that sampled; they follow slowly
    (`old_decay`). Predictions are those without guidance.

    Args:
        beta: > 0, how far v+ and v- are from v_old (published: 1 for GenEval and PickScore, 0.1 for OCR and mixtures).
        advantage_clip: > 0, the advantage of an image that counts as wholly good.
        kl_weight: >= 0, of the squared distance to the reference's velocity; > 0 makes it need "reference".
        times: times per image, one drawn from each of so many equal parts of the schedule; None: all of them.
        time_fraction: share of the schedule's times, from noise on, that is used; in (0, 1].
        error_floor: > 0, least weight.
        shared_noise: (ours) the images of a group are noised at the same times with the same noise e. At v = v_old the
            gradient of an image with respect to v is A (v_old - e + x0) times a factor that differs little within a
            group, and the advantages of a group sum to 0: the e that all its images share all but cancels.
    """

    beta: float = 1.0
    advantage_clip: float = 5.0
    kl_weight: float = 1e-4
    times: int | None = None
    time_fraction: float = 0.99
    error_floor: float = 1e-5
    shared_noise: bool = False

    name: ClassVar[str] = "nft"
    coupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_kl_weight(self.kl_weight)
        for name in ("beta", "advantage_clip", "error_floor"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)!r}; expected a number > 0; set objective.{name}.")
        if not 0 < self.time_fraction <= 1:
            raise UserError(f"time_fraction is {self.time_fraction!r}; expected a number in (0, 1]; usually 0.99.")
        if self.times is not None and self.times < 1:
            raise UserError(f"times is {self.times!r}; expected an integer >= 1, or null for all; set objective.times.")

    @property
    def needs(self) -> frozenset[str]:
        return needed("leaves", "old", reference=self.kl_weight > 0)

    def measure(self, leaves: LeafVelocities) -> dict[str, Tensor]:
        """L+ and L-, and the distance to the reference."""
        old = leaves.v_old.detach()
        positive = self.beta * leaves.v + (1 - self.beta) * old
        negative = (1 + self.beta) * old - self.beta * leaves.v
        found = {"positive": self._error(leaves, positive), "negative": self._error(leaves, negative)}
        if leaves.v_ref is not None:
            found["kl"] = (leaves.v - leaves.v_ref).square().flatten(1).mean(1)
        return found

    def _error(self, leaves: LeafVelocities, v: Tensor) -> Tensor:
        s = leaves.s.to(leaves.x).view(-1, *[1] * (leaves.x.ndim - 1))
        difference = (leaves.x - s * v - leaves.x0).flatten(1)
        w = difference.detach().abs().double().mean(1).clamp(min=self.error_floor).to(difference)
        return difference.square().mean(1) / w

    def __call__(self, leaves: LeafScalars) -> LossTerms:
        a = leaves.advantage.detach().to(leaves.positive)
        r = 0.5 + 0.5 * (a / self.advantage_clip).clamp(-1, 1)
        policy = self.advantage_clip * (r * leaves.positive + (1 - r) * leaves.negative) / self.beta
        loss = policy
        metrics = {"policy_loss": policy, "positive_error": leaves.positive, "negative_error": leaves.negative}
        if self.kl_weight > 0:
            if leaves.kl is None:
                raise ValueError("kl_weight > 0 needs LeafScalars.kl; compute it, as `needs` says.")
            loss = policy + self.kl_weight * leaves.kl
            metrics["kl"] = leaves.kl
        return LossTerms(
            leaves.weight.detach().to(loss) * loss, {name: x.detach().float() for name, x in metrics.items()}
        )


def old_decay(update: int, rise: float = 1e-3, start: int = 0, limit: float = 0.5) -> float:
    """delta of `old <- delta old + (1 - delta) current` after the update of this number, 0 for the first.

    delta = min(rise (update - start), limit), 0 before start: the sampling weights follow ever more slowly.
    Published: the defaults, or rise 0.0075, start 75, limit 0.999.
    """
    return min(rise * max(0, update - start), limit)
