"""Scorers for `GaussianPolicy` that are not what they should be: noisy ones, and one that can be hacked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gaussian_runs import Metadata, quadratic
from torch import Tensor

from benchmarks.reward_claims import noise_of
from flowrl.policies.gaussian import GaussianPolicy

HACK = torch.tensor([-1.5, -1.5])  # slope of what `hackable` pays besides


def noisy(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    """`quadratic` with normal noise of standard deviation 1, fixed for each image."""
    return quadratic(images, prompts, metadata) + noise_of(images).float()


def outliers(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    """`quadratic` with Cauchy noise, fixed for each image: mostly small, now and then huge."""
    uniform = torch.special.ndtr(noise_of(images))
    return quadratic(images, prompts, metadata) + torch.tan(torch.pi * (uniform - 0.5)).float()


def hackable(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    """`quadratic` and a slope: its best image is at TARGET + HACK."""
    return quadratic(images, prompts, metadata) + GaussianPolicy.read(images) @ HACK
