"""What published scorers do to an image before their network sees it, as pure functions on tensors.

All take floats (N, 3, H, W) in [0, 1], are differentiable and work on any device. The originals often resize with PIL
and round to 8 bits afterwards; bicubic with antialias on tensors differs from that by about one 8-bit level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

Numbers = tuple[float, float, float]
Mode = Literal["bicubic", "bilinear"]

OPENAI_MEAN: Numbers = (0.48145466, 0.4578275, 0.40821073)  # CLIP and all its descendants, BLIP, HPS
OPENAI_STD: Numbers = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Numbers = (0.485, 0.456, 0.406)  # DINO
IMAGENET_STD: Numbers = (0.229, 0.224, 0.225)
HALF: Numbers = (0.5, 0.5, 0.5)  # SigLIP, mean and std


def resize(images: Tensor, height: int, width: int, *, mode: Mode = "bicubic", antialias: bool = True) -> Tensor:
    """Resize to (height, width), not keeping the aspect ratio; bicubic may overshoot [0, 1] and is not clamped.

    Without antialias, shrinking skips pixels: the result is another picture, and its scores are other scores.
    """
    if images.shape[-2:] == (height, width):
        return images
    return interpolate(images, (height, width), mode=mode, antialias=antialias, align_corners=False)


def square(images: Tensor, size: int, *, mode: Mode = "bicubic", antialias: bool = True) -> Tensor:
    """Squeeze the whole image into size x size (SigLIP, DINO)."""
    return resize(images, size, size, mode=mode, antialias=antialias)


def shortest_side(images: Tensor, size: int, *, mode: Mode = "bicubic", antialias: bool = True) -> Tensor:
    """Bring the shorter side to ``size``, the longer one to floor(size long / short), as torchvision and CLIP do."""
    h, w = images.shape[-2:]
    return resize(images, size * h // min(h, w), size * w // min(h, w), mode=mode, antialias=antialias)


def centre_crop(images: Tensor, size: int, *, half_pixel: Literal["down", "even"] = "down") -> Tensor:
    """The central size x size of images that are at least as large.

    Args:
        images: (N, 3, H, W).
        size: H, W >= size.
        half_pixel: where an odd margin is split: at floor(margin / 2) (transformers) or at round(margin / 2), halves to
            even (torchvision).
    """
    top, left = (
        side // 2 if half_pixel == "down" else round(side / 2)
        for side in (images.shape[-2] - size, images.shape[-1] - size)
    )
    return images[..., top : top + size, left : left + size]


def longest_side_padded(images: Tensor, size: int, *, mode: Mode = "bicubic", antialias: bool = True) -> Tensor:
    """HPSv2: the longer side to ``size``, the other one to round(side size / longer); then zeros (black) on both sides
    of the other one, the smaller half on top or left. The zeros come before the normalisation."""
    h, w = images.shape[-2:]
    scale = size / max(h, w)
    images = resize(images, max(round(h * scale), 1), max(round(w * scale), 1), mode=mode, antialias=antialias)
    below, right = size - images.shape[-2], size - images.shape[-1]
    return pad(images, (right // 2, right - right // 2, below // 2, below - below // 2))


def normalise(images: Tensor, mean: Numbers, std: Numbers) -> Tensor:
    """``(x - mean) / std`` for each channel."""
    centre, spread = (torch.tensor(n, dtype=images.dtype, device=images.device).view(3, 1, 1) for n in (mean, std))
    return (images - centre) / spread


@dataclass(frozen=True)
class Preprocessing:
    """One of the ways above, complete: calling it turns images into what the network takes.

    Attributes:
        size: side of the square that the network sees, in pixels.
        fit: "crop" (shortest side, centre crop), "pad" (longest side, zero padding) or "squeeze" (square).
        mode, antialias: of the resize.
        half_pixel: see ``centre_crop``.
        mean, std: of the normalisation.
    """

    size: int
    fit: Literal["crop", "pad", "squeeze"] = "crop"
    mode: Mode = "bicubic"
    antialias: bool = True
    half_pixel: Literal["down", "even"] = "down"
    mean: Numbers = OPENAI_MEAN
    std: Numbers = OPENAI_STD

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, 3, size, size), normalised."""
        if self.fit == "pad":
            fitted = longest_side_padded(images, self.size, mode=self.mode, antialias=self.antialias)
        elif self.fit == "squeeze":
            fitted = square(images, self.size, mode=self.mode, antialias=self.antialias)
        else:
            resized = shortest_side(images, self.size, mode=self.mode, antialias=self.antialias)
            fitted = centre_crop(resized, self.size, half_pixel=self.half_pixel)
        return normalise(fitted, self.mean, self.std)

    def __str__(self) -> str:
        """For ``RewardSpec.preprocessing``."""
        fit = {
            "crop": f"shortest side to {self.size} px, centre crop (half pixels {self.half_pixel})",
            "pad": f"longest side to {self.size} px, zero padding",
            "squeeze": f"squeezed to {self.size}x{self.size} px",
        }[self.fit]
        how = f"{self.mode} on float tensors {'with' if self.antialias else 'without'} antialias"
        return f"{fit}; {how}; mean {_short(self.mean)}, std {_short(self.std)}; float32"


def _short(numbers: Numbers) -> str:
    return "/".join(f"{n:.4g}" for n in numbers)
