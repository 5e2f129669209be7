"""Several rewards as one: a weighted sum that keeps what it was made of."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from .protocol import Metadata, Reward, RewardResult, RewardSpec, checked_score
from .schedule import at

SCOPES = ("point", "group", "set")  # from narrow to wide


class WeightedSum:
    """``sum_i weight_i reward_i`` of the raw values; nothing is rescaled, so the weights carry the units.

    A sample is missing if any part with a weight other than 0 is missing. A part of weight 0 is scored and logged only.
    ``parts`` of the result holds the raw value of each reward under its name, and the parts of these rewards.

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
        self.spec = self._spec()

    def _spec(self) -> RewardSpec:
        specs = {name: reward.spec for name, reward in self.rewards.items()}
        used = {name: w for name, w in self.weights.items() if w}
        ends = [sorted(w * end for end in specs[name].range) for name, w in used.items()]
        scope = max((spec.scope for spec in specs.values()), key=SCOPES.index)
        return RewardSpec(
            name=" + ".join(f"{w:g} {name}" for name, w in self.weights.items()),
            version=" + ".join(spec.version for spec in specs.values()),
            scope=cast('Literal["point", "group", "set"]', scope),
            range=(sum(low for low, _ in ends), sum(high for _, high in ends)),
            licence=", ".join(sorted({spec.licence for spec in specs.values()})),
            preprocessing="; ".join(f"{name}: {spec.preprocessing}" for name, spec in specs.items()),
        )

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``."""
        used = {name for name, weight in self.weights.items() if weight}
        found = score_parts(self.rewards, used, images, prompts, metadata, groups)
        total = torch.zeros(len(images), dtype=torch.float64)
        for name in self.rewards:
            if name in used:  # NaN stays NaN: a missing part is a missing sum
                total += self.weights[name] * found.results[name].values.double()
        return RewardResult(total.float(), found.parts, found.reasons)

    def at(self, update: int | None) -> WeightedSum:
        """The sum as it stands at an update, see ``schedule.at``."""
        return WeightedSum({name: at(reward, update) for name, reward in self.rewards.items()}, self.weights)


class Parts(NamedTuple):
    """What several rewards said about N images.

    results: by name. parts: their raw values under their names, and the parts inside them; where two differ under one
    name, the second is called "reward/part". reasons: N, joined from those of the used rewards.
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
            same = key in inner and torch.allclose(inner[key], part, rtol=0, atol=0, equal_nan=True)
            inner[key if key not in inner or same else f"{name}/{key}"] = part
        if name in used:
            reasons = [
                old if new is None else f"{name}: {new}" if old is None else f"{old}; {name}: {new}"
                for old, new in zip(reasons, result.reasons, strict=True)
            ]
    return Parts(results, inner | {name: result.values for name, result in results.items()}, reasons)
