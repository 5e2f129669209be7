"""Several rewards as one: a weighted sum that keeps what it was made of."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from .protocol import Metadata, Reward, RewardResult, RewardSpec, checked_score
from .schedule import all_at

SCOPES = ("point", "group", "set")  # from narrow to wide


class WeightedSum:
    """``sum_i weight_i reward_i`` of the raw values; nothing is rescaled, so the weights carry the units.

    A sample is missing if any part with a weight other than 0 is missing. A part of weight 0 is scored and logged only.
    ``parts`` of the result holds the raw value of each reward under its name, and the parts of these rewards. Where all
    used rewards know their uncertainty, that of the sum is ``sqrt(sum_i (weight_i u_i)^2)``: errors are taken for
    independent. Where all of them have a gradient, the sum has one.

    Args:
        rewards: name -> reward.
        weights: name -> weight, finite, at least one of them not 0. A negative weight minimises.

    Raises:
        ValueError: empty, weights that do not fit, or a positive weight on a reward of which less is better.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        if not rewards or set(rewards) != set(weights):
            raise ValueError(
                f"got rewards {sorted(rewards)} with weights for {sorted(weights)}, expected one weight for each of at "
                "least one reward. Write them as {name: weight}."
            )
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"got weight {weight} for reward {name!r}, expected a finite number. Correct it.")
            if weight > 0 and not rewards[name].spec.higher_is_better:
                raise ValueError(
                    f"got weight {weight} for reward {name!r}, of which less is better: training would make it worse. "
                    "Give it a negative weight."
                )
        if not any(weights.values()):
            raise ValueError(f"got only zero weights for {sorted(weights)}, expected at least one other. Set a weight.")
        self.rewards = dict(rewards)
        self.weights = {name: float(weights[name]) for name in rewards}
        self.used = {name: weight for name, weight in self.weights.items() if weight}
        self.spec = self._spec()

    def _spec(self) -> RewardSpec:
        ends = [sorted(weight * end for end in self.rewards[name].spec.range) for name, weight in self.used.items()]
        title = " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())
        spec = combined_spec(title, self.rewards, (sum(low for low, _ in ends), sum(high for _, high in ends)))
        return replace(spec, differentiable=all(self.rewards[name].spec.differentiable for name in self.used))

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``."""
        found = score_parts(self.rewards, self.used, images, prompts, metadata, groups)
        total = torch.zeros(len(images), dtype=torch.float64)
        doubts: list[Tensor] = []
        for name, weight in self.used.items():
            result = found.results[name]
            total += weight * result.values.double()  # NaN stays NaN: a missing part is a missing sum
            if result.uncertainty is not None:
                doubts.append(weight * result.uncertainty.double().cpu())
        known = len(doubts) == len(self.used)
        uncertainty = torch.stack(doubts).norm(dim=0).float() if known else None
        return RewardResult(total.float(), found.parts, found.reasons, uncertainty)

    def differentiable(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The sum with a gradient with respect to the images: (N, 3, H, W), N prompts -> (N,).

        Raises:
            ValueError: a used part has no gradient.
        """
        values = with_gradient(self.rewards, self.used, images, prompts)
        return (values.new_tensor(list(self.used.values())) @ values).float()

    def at(self, update: int | None) -> WeightedSum:
        """The sum as it stands at an update, see ``schedule.at``."""
        return WeightedSum(all_at(self.rewards, update), self.weights)


class Parts(NamedTuple):
    """What several rewards said about N images.

    results: by name. parts: their raw values under their names, and the parts inside them; where two have one name, the
    second is called "reward/part". reasons: N, joined from those of the used rewards.
    """

    results: dict[str, RewardResult]
    parts: dict[str, Tensor]
    reasons: list[str | None]


def score_parts(
    rewards: Mapping[str, Reward],
    used: Collection[str],
    images: Tensor,
    prompts: list[str],
    metadata: list[Metadata],
    groups: Tensor | None,
) -> Parts:
    """Ask several rewards about the same images. ``used``: those whose reasons count; the others are logged only."""
    results: dict[str, RewardResult] = {}
    inner: dict[str, Tensor] = {}
    reasons: list[str | None] = [None] * len(images)
    for name, reward in rewards.items():
        result = results[name] = checked_score(reward, images, prompts, metadata, groups, all_missing="allow")
        for key, part in result.parts.items():
            inner[f"{name}/{key}" if key in inner else key] = part
        if name in used:
            reasons = [
                old if new is None else f"{name}: {new}" if old is None else f"{old}; {name}: {new}"
                for old, new in zip(reasons, result.reasons, strict=True)
            ]
    return Parts(results, inner | {name: result.values for name, result in results.items()}, reasons)


def with_gradient(rewards: Mapping[str, Reward], used: Collection[str], images: Tensor, prompts: list[str]) -> Tensor:
    """Values of the K used rewards with a gradient: (N, 3, H, W), N prompts -> (K, N) float64 on the images' device.

    Raises:
        ValueError: one of them has no gradient.
    """
    if without := [name for name in used if not rewards[name].spec.differentiable]:
        raise ValueError(
            f"got {', '.join(map(repr, without))} in a reward that is to be differentiated, expected rewards with a "
            "gradient. Take them out, or give them weight 0."
        )
    values = [cast(Any, rewards[name]).differentiable(images, prompts) for name in used]
    return torch.stack([part.to(images.device, torch.float64) for part in values])


def combined_spec(
    name: str, rewards: Mapping[str, Reward], range: tuple[float, float] = (-math.inf, math.inf)
) -> RewardSpec:
    """The spec of something that is made of rewards: the widest scope, all versions, licences and preprocessings."""
    specs = {key: reward.spec for key, reward in rewards.items()}
    scope = max((spec.scope for spec in specs.values()), key=SCOPES.index)
    return RewardSpec(
        name=name,
        version=" + ".join(s.version if key == s.name else f"{s.name} {s.version}" for key, s in specs.items()),
        scope=cast('Literal["point", "group", "set"]', scope),
        range=range,
        licence=", ".join(sorted({spec.licence for spec in specs.values()})),
        preprocessing="; ".join(f"{key}: {spec.preprocessing}" for key, spec in specs.items()),
    )
