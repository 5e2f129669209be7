"""A discriminator for `GaussianPolicy`, to be named in a config by import path, and references for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gaussian_runs import TARGET
from PIL import Image
from torch import Tensor

from flowrl.policies.gaussian import GaussianPolicy
from reward_models.adversarial import AdversarialReward
from reward_models.features import ImageFeatures


class AsTheyAre:
    """Preprocessing that does nothing: each pixel is a number in 24 bits."""

    size = 1

    def __call__(self, images: Tensor) -> Tensor:
        return images


def features() -> ImageFeatures:
    """CLS: x0 and 1 (tokens are brought to one length, which the 1 makes reversible); one patch, the same."""

    def network(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = GaussianPolicy.read(images)
        row = torch.cat([x, torch.ones(len(x), 1)], 1)
        return row, row[:, None], row

    prepare: Any = AsTheyAre()
    return ImageFeatures(network, None, None, "gaussian", "1", prepare, 3, "none", torch.device("cpu"), 64)


class Discriminator(AdversarialReward):
    """The reward of Adv-GRPO on x0 itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__(features(), **{"hidden": 16, "lr": 0.01, "replay": 32, **options})


def write_references(folder: Path, count: int = 40, seed: int = 0) -> Path:
    """Images of x0 ~ N(TARGET, 0.5^2) as PNG files, for any prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    x = TARGET + 0.5 * torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    for i, image in enumerate(GaussianPolicy().decode(x[:, :, None, None])):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{i:03d}.png")
    return folder
