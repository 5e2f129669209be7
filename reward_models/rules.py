"""Rewards that are a rule and need no model: the size of an image as JPEG (DDPO, arXiv 2305.13301)."""

from __future__ import annotations

import io
import math
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from .protocol import Metadata, RewardResult, RewardSpec, pixels_of

# bytes of two pictures of 512x512 px by libjpeg-turbo 3.2.0: plain grey, and a ramp from left to right
GREY, RAMP = 4_721, 15_593
SLACK = 0.005  # share by which versions of libjpeg may differ; another encoder (mozjpeg) is off by far more


def _size(pixels: np.ndarray) -> int:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
    return buffer.tell()


def jpeg_bytes(image: Tensor) -> int:
    """Size in bytes of one image, (3, H, W) in [0, 1], as JPEG of quality 95 with Pillow's other defaults (4:2:0).

    It may differ by a few bytes between versions of libjpeg.
    """
    return _size(pixels_of(image))


@lru_cache(maxsize=1)
def encoder() -> str:
    """Name and version of Pillow's JPEG encoder, once two known pictures have come out at their published sizes.

    Raises:
        ValueError: they have not: other quantisation tables or another subsampling, with which scores mean another
            thing.
    """
    row = np.floor(np.linspace(0, 255, 512)).astype(np.uint8)
    ramp = np.ascontiguousarray(np.broadcast_to(row[None, :, None], (512, 512, 3)))
    sizes = [_size(np.full_like(ramp, 128)), _size(ramp)]
    turbo = features.version("libjpeg_turbo")
    name = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}"
    if any(abs(size / known - 1) > SLACK for size, known in zip(sizes, (GREY, RAMP), strict=True)):
        raise ValueError(
            f"got JPEG files of {sizes[0]} and {sizes[1]} bytes from Pillow with {name}, expected about {GREY} and "
            f"{RAMP}: it is built with another encoder, and its sizes are other scores. Install Pillow from PyPI."
        )
    return name


class JpegReward:
    """``bytes / 1000`` (incompressibility) or ``-bytes / 1000 / 500`` (compressibility), as flow_grpo scales them.

    Args:
        incompressible: reward large files instead of small ones.

    Raises:
        ValueError: this Pillow writes other files than the published one (see ``encoder``).
    """

    def __init__(self, incompressible: bool = False) -> None:
        self.incompressible = incompressible
        self.spec = RewardSpec(
            name="jpeg-incompress" if incompressible else "jpeg",
            version=f"1, {encoder()}",
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
