"""Plain statistics of images that betray reward hacking: greyness, blur, darkness, sameness.

Watched beside the reward; none of them is a reward itself.
"""

from __future__ import annotations

import torch
from torch import Tensor


def luma(images: Tensor) -> Tensor:
    """(N, 3, H, W) in [0, 1] -> (N, H, W): Rec. 601 luma, 0.299 R + 0.587 G + 0.114 B."""
    red, green, blue = images.float().unbind(1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def saturation(images: Tensor) -> Tensor:
    """(N,) in [0, 1]: mean HSV saturation, (max - min) / max over the channels, 0 for black."""
    high, low = images.float().amax(1), images.float().amin(1)
    return torch.where(high > 0, (high - low) / high.clamp_min(1e-12), 0.0).mean((1, 2))


def sharpness(images: Tensor) -> Tensor:
    """(N,) >= 0: variance of the luma's Laplacian (4 neighbours, inner pixels); 0 for a flat image, NaN below 3 px."""
    y = luma(images)
    laplacian = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:] - 4 * y[:, 1:-1, 1:-1]
    if laplacian.numel() == 0:  # no inner pixel
        return torch.full((len(images),), torch.nan, device=images.device)
    return laplacian.flatten(1).var(1, correction=0)


def dark_fraction(images: Tensor, threshold: float = 0.15) -> Tensor:
    """(N,) in [0, 1]: share of pixels whose luma is below the threshold."""
    return (luma(images) < threshold).float().mean((1, 2))


def image_statistics(images: Tensor) -> dict[str, Tensor]:
    """All statistics of single images, (N, 3, H, W) in [0, 1] -> name -> (N,)."""
    return {
        "saturation": saturation(images),
        "sharpness": sharpness(images),
        "dark_fraction": dark_fraction(images),
    }


def in_group_diversity(features: Tensor, groups: Tensor) -> Tensor:
    """Mean pairwise cosine distance within each group.

    For unit vectors f_1..f_n the mean of ``1 - f_i . f_j`` over i != j is ``(n^2 - |sum f|^2) / (n (n - 1))``.

    Args:
        features: (N, D), normalised here; from any feature extractor, as long as it is named beside the number.
        groups: (N,) integers.

    Returns:
        (G,) in [0, 2], one for each distinct group in ascending order; NaN for groups of one.
    """
    numbers, group = groups.unique(return_inverse=True)
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    total = torch.zeros(len(numbers), unit.shape[1], dtype=torch.float64, device=unit.device).index_add(0, group, unit)
    n = torch.bincount(group, minlength=len(numbers)).double()
    distance = (n.square() - total.square().sum(1)) / (n * (n - 1))  # 0 / 0 for n = 1
    return torch.where(n > 1, distance, torch.nan).float()
