"""One scorer per task as one reward: each image goes to the scorer of its prompt's tag."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from flowrl.errors import UserError
from reward_models.protocol import Metadata, Reward, RewardResult, RewardSpec, checked_score


class ByTask:
    """Scores of different scorers under one name; comparable within a task only.

    rewards: tag -> scorer of single images. An image with another tag is missing.
    """

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        self.rewards = dict(rewards)
        specs = {tag: reward.spec for tag, reward in self.rewards.items()}
        for tag, spec in specs.items():
            if spec.scope != "point" or not spec.higher_is_better:
                raise UserError(
                    f"got {spec.name!r} for {tag!r}; expected a scorer of single images of which more is better"
                )
        self.spec = RewardSpec(
            name=", ".join(f"{tag}={spec.name}" for tag, spec in specs.items()),
            version=", ".join(f"{tag}={spec.version}" for tag, spec in specs.items()),
            range=(min(spec.range[0] for spec in specs.values()), max(spec.range[1] for spec in specs.values())),
            licence=", ".join(sorted({spec.licence for spec in specs.values()})),
            preprocessing="; ".join(f"{tag}: {spec.preprocessing}" for tag, spec in specs.items()),
        )

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``."""
        values = torch.full((len(images),), math.nan)
        tags = [None if given.get("tag") is None else str(given["tag"]) for given in metadata]
        reasons: list[str | None] = [f"there is no scorer for {tag!r}" for tag in tags]
        for tag, reward in self.rewards.items():
            if not (at := [i for i, each in enumerate(tags) if each == tag]):
                continue
            found = checked_score(
                reward, images[at], [prompts[i] for i in at], [metadata[i] for i in at], all_missing="allow"
            )
            values[at] = found.values
            for i, reason in zip(at, found.reasons, strict=True):
                reasons[i] = reason
        return RewardResult(values, reasons=reasons)
