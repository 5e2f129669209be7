"""Validity gates: is this a picture at all? To be multiplied onto a reward that a degenerate image could please.

Source: gates of this kind stand before the rewards of reinforced vector graphics (arXiv 2509.05208); the limits here
are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .protocol import Metadata, RewardResult, RewardSpec

LUMA = (0.299, 0.587, 0.114)  # Rec. 601, of values as they are stored


@dataclass(frozen=True)
class Limits:
    """What an image must keep to.

    Attributes:
        least_mean, greatest_mean: of the luma in [0, 1]; outside, the image is too dark or too bright.
        least_std: of the luma over the pixels; below, the image is too flat.
        least_side: in pixels.
        size: (height, width) that every image must have; None: any.
    """

    least_mean: float = 0.03
    greatest_mean: float = 0.97
    least_std: float = 0.02
    least_side: int = 1
    size: tuple[int, int] | None = None


def fault(image: Tensor, limits: Limits = Limits()) -> str | None:
    """The first thing that is wrong with one image, or None.

    Asked in this order: shape, size, finite, range, blank (all pixels equal), too dark, too bright, too flat.

    Args:
        image: (3, H, W), meant to be in [0, 1].
        limits: see ``Limits``.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        return f"wrong shape {tuple(image.shape)}, expected (3, H, W)"
    height, width = int(image.shape[1]), int(image.shape[2])
    if limits.size is not None and (height, width) != tuple(limits.size):
        return f"wrong size {height}x{width}, expected {limits.size[0]}x{limits.size[1]}"
    if min(height, width) < limits.least_side:
        return f"wrong size {height}x{width}, expected sides of at least {limits.least_side}"
    pixels = image.detach().double()
    if not bool(pixels.isfinite().all()):
        return "NaN or infinite pixels"
    if float(pixels.min()) < 0 or float(pixels.max()) > 1:
        return f"pixels from {float(pixels.min()):.3g} to {float(pixels.max()):.3g}, expected [0, 1]"
    if bool((pixels == pixels[:, :1, :1]).all()):
        return "blank: all pixels are equal"
    luma = torch.einsum("chw,c->hw", pixels, pixels.new_tensor(LUMA))
    mean, std = float(luma.mean()), float(luma.std(correction=0))
    if mean < limits.least_mean:
        return f"too dark: mean luma {mean:.3f} below {limits.least_mean:g}"
    if mean > limits.greatest_mean:
        return f"too bright: mean luma {mean:.3f} above {limits.greatest_mean:g}"
    if std < limits.least_std:
        return f"too flat: standard deviation of the luma {std:.4f} below {limits.least_std:g}"
    return None


class ValidityReward:
    """1 for a valid image, 0 for another one, with the first fault as the reason.

    Args:
        limits: those of ``Limits`` that differ from the default.

    Raises:
        ValueError: unknown limit, or one of another kind.
    """

    def __init__(self, **limits: Any) -> None:
        known = {field.name for field in fields(Limits)}
        if unknown := set(limits) - known:
            raise ValueError(
                f"got limits {', '.join(sorted(unknown))}, expected some of {', '.join(sorted(known))}. Correct them."
            )
        size = limits.get("size")
        if size is not None and not (isinstance(size, list | tuple) and len(size) == 2):
            raise ValueError(f"got size {size!r}, expected [height, width]. Give both.")
        if wrong := {k: v for k, v in limits.items() if k != "size" and not isinstance(v, int | float)}:
            raise ValueError(f"got limits {wrong}, expected numbers. Correct them.")
        self.limits = Limits(**limits | {"size": None if size is None else (int(size[0]), int(size[1]))})
        self.spec = RewardSpec(
            name="validity",
            version=f"1, {self.limits}",
            range=(0.0, 1.0),
            licence="Apache-2.0",
            preprocessing="8-bit",
        )

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; prompts and metadata are not read."""
        reasons = [fault(image, self.limits) for image in images]
        return RewardResult(torch.tensor([float(reason is None) for reason in reasons]), reasons=reasons)
