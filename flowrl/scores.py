"""The rewards of an update's images, on one process or on many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowrl.distributed import World
from flowrl.prompts import Prompt
from reward_models.protocol import Reward, RewardError, RewardResult, checked_score


def everyones(images: Tensor, place: Tensor, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """The images of all processes, in the same order whatever their number.

    Args:
        images: (N, 3, H, W) of this process, on the 8-bit grid; they travel as uint8. place: (N,) which of the update's
            prompts an image belongs to, rising; all images of one are on one process.

    Returns:
        (images, place) of all M images, ordered by place, and (N,) where among them this process's are.
    """
    if world.size == 1:
        return images, place, torch.arange(len(images))
    pixels = world.gather((images * 255).round().byte())
    places, ranks = world.gather(place), world.gather(torch.full_like(place, world.rank))
    order = places.argsort(stable=True)
    return pixels[order].float() / 255, places[order], (ranks[order] == world.rank).nonzero().flatten()


def score_update(
    reward: Reward, images: Tensor, place: Tensor, prompts: Sequence[Prompt], world: World
) -> RewardResult:
    """The reward of this process's images; a failure on one process ends the run on all.

    A reward of scope "set" sees the images of all processes.

    Args:
        images: (N, 3, H, W) on the 8-bit grid. place: (N,) which of the update's prompts an image belongs to.
        prompts: of the update, all processes' together.

    Raises:
        RewardError: the reward failed, or gave no image on any process a value.
    """
    everything = reward.spec.scope == "set"
    mine = torch.arange(len(images))
    if everything:
        images, place, mine = everyones(images, place, world)
    chosen = [prompts[i] for i in place.tolist()]
    texts, metadata = [prompt.text for prompt in chosen], [prompt.metadata for prompt in chosen]
    with world.together():
        result = checked_score(reward, images, texts, metadata, place, all_missing="allow")
    if not world.any(not bool(result.missing.all())):
        raise RewardError(
            f"reward {reward.spec.name!r} gave NaN for all images of an update, expected at least one score. First "
            f"reason: {result.reasons[0]}. Check that the reward fits these prompts and their metadata."
        )
    if not everything:
        return result
    return RewardResult(
        result.values[mine],
        {name: part[mine] for name, part in result.parts.items()},
        [result.reasons[i] for i in mine.tolist()],
        None if result.uncertainty is None else result.uncertainty[mine],
        None if result.region_map is None else result.region_map[mine],
    )
