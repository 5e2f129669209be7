"""Images of prompts from a policy, without training: the one path that `sample` and the benchmarks share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import samplers
from reward_models.protocol import to_8bit

if TYPE_CHECKING:
    from flowrl.policies import Conditioning, Policy


@dataclass(frozen=True)
class SampleSettings:
    """How images are drawn: ODE steps, guidance (1: none), pixels (None: the policy's own), rows per model call."""

    steps: int = 20
    guidance: float = 1.0
    height: int | None = None
    width: int | None = None
    images_per_prompt: int = 1
    seed: int = 0
    chunk: int = 64


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Sequence[str],
    settings: SampleSettings,
    purpose: str = "sample",
    before: Sequence[str] = (),
) -> Iterator[tuple[int, Tensor]]:
    """Yield (prompt number, images (K, 3, H, W) in [0, 1] on the 8-bit grid) for each prompt, in order.

    An image is a function of (seed, purpose, prompt text, how often the text came before, image number) and of the
    settings, whatever the batch it is drawn in. before: prompts that other processes draw, ahead of these.
    """
    k = settings.images_per_prompt
    seen = Counter(before)
    size = (settings.height, settings.width)
    plan = samplers.plans.straight(policy.sigmas(settings.steps, *size), kernel="ode", level=0.0)
    for numbers in _in_batches(len(prompts), max(1, settings.chunk // k)):
        texts = [prompts[number] for number in numbers]
        rows = policy.encode(texts)[torch.arange(len(texts)).repeat_interleave(k)]
        keys = []
        for text in texts:
            keys += [samplers.Key(settings.seed, purpose, None, text, seen[text], image) for image in range(k)]
            seen[text] += 1

        def predict(x: Tensor, s: Tensor, index: Tensor, rows: Conditioning = rows) -> Tensor:
            return policy.predict(x, s, rows[index], settings.guidance)

        tree = samplers.rollout(
            predict, plan, keys, latent_shape=policy.latent_shape(*size), chunk=settings.chunk, device=policy.device,
            keep=False, prior_std=policy.prior_std(plan.s[0]),
        )  # fmt: skip
        images = to_8bit(policy.decode(tree.leaves.flatten(0, 1)).cpu())
        yield from zip(numbers, images.split(k), strict=True)


def _in_batches(count: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, count)) for start in range(0, count, size))
