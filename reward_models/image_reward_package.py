"""The official `image-reward` package as a reward, for an environment of its own behind `flowrl serve`.

Runs where the package does: `configs/servers/image_reward.txt` lists that environment.
Its use is to compare: the built-in reward ``imagereward`` loads the same weights without the package.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import torchvision_ops
from .protocol import Metadata, RewardResult, RewardSpec, pixels_of


class ImageRewardPackage:
    """ImageReward as its authors' package computes it, one image at a time, about N(0, 1).

    Args:
        name: a model that ``ImageReward.load`` knows, or the path of its checkpoint.
        med_config: path of the text encoder's configuration; default: fetched by the package.
        device: where to compute.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(
        self, name: str = "ImageReward-v1.0", med_config: str | None = None, *, device: str | torch.device = "cpu"
    ) -> None:
        torchvision_ops.ready()
        try:
            import ImageReward
        except ImportError as error:
            raise ValueError(
                f"got no package ImageReward ({error}), expected it with its old dependencies. Make an environment of "
                "its own: pip install -r configs/servers/image_reward.txt"
            ) from error
        self.model: Any = ImageReward.load(name, device=str(device), med_config=med_config).eval()
        self.spec = RewardSpec(
            name="image-reward-package",
            version=f"{importlib.metadata.version('image-reward')} {name.rpartition('/')[2]}",
            licence="Apache-2.0",
            preprocessing="PIL bicubic resize of the short side to 224 px, centre crop, float32",
        )

    @torch.no_grad()
    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``."""
        pictures = (Image.fromarray(pixels_of(image)) for image in images)
        pairs = zip(prompts, pictures, strict=True)
        return RewardResult(torch.tensor([float(self.model.score(prompt, picture)) for prompt, picture in pairs]))
