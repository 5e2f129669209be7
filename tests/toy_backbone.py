"""A backbone without any library: 16 px images, four patches of 8 px, random fixed projections."""

from __future__ import annotations

import torch
from torch import Tensor

from reward_models.features import ImageFeatures
from reward_models.preprocess import Preprocessing

WIDTH = 6


def toy_features(chunk: int = 32, antialias: bool = True) -> ImageFeatures:
    """CLS (6 numbers), four patches, a feature of 5; texts go by their length."""
    generator = torch.Generator().manual_seed(7)
    patch, cls, pool = (
        torch.randn(*s, generator=generator) / s[0] ** 0.5 for s in ((192, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 5))
    )

    def network(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tiles = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(len(x), 4, 192)
        patches = torch.tanh(tiles @ patch)
        first = torch.tanh(patches.flatten(1) @ cls)
        return first, patches, first @ pool

    def text(texts: list[str]) -> Tensor:
        return torch.stack([torch.cos(torch.arange(5.0) * len(t)) for t in texts])

    prepare = Preprocessing(16, "squeeze", antialias=antialias, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return ImageFeatures(network, text, None, "toy", "1", prepare, WIDTH, "none", torch.device("cpu"), chunk)
