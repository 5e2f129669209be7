"""Rewards that are a rule and need no model: the size of an image as JPEG (DDPO, arXiv 2305.13301)."""

from __future__ import annotations

import io
import math

import torch
from PIL import Image
from torch import Tensor

from .protocol import Metadata, RewardResult, RewardSpec


def jpeg_bytes(image: Tensor) -> int:
    """Size in bytes of one image, (3, H, W) in [0, 1], as JPEG of quality 95 with Pillow's other defaults (4:2:0).

    It may differ by a few bytes between versions of libjpeg.
    """
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
    return buffer.tell()


class JpegReward:
    """``bytes / 1000`` (incompressibility) or ``-bytes / 1000 / 500`` (compressibility), as flow_grpo scales them.

    Args:
        incompressible: reward large files instead of small ones.
    """

    def __init__(self, incompressible: bool = False) -> None:
        self.incompressible = incompressible
        self.spec = RewardSpec(
            name="jpeg-incompress" if incompressible else "jpeg",
            range=(0.0, math.inf) if incompressible else (-math.inf, 0.0),
            licence="Apache-2.0",
            preprocessing="8-bit; JPEG quality 95, 4:2:0",
        )

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; prompts and metadata are not read."""
        kilobytes = torch.tensor([jpeg_bytes(image) / 1000 for image in images], dtype=torch.float64)
        return RewardResult((kilobytes if self.incompressible else -kilobytes / 500).float())
