"""What an adversarial reward trains: a head on frozen tokens, or the last layers of a preference model.

A critic splits its forward pass: `inputs` is the frozen part, computed once for an update; `logits` the trained part.
Scoring and training go through the same two functions. Positive means reference-like.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from .features import ImageFeatures

Inputs = tuple[Tensor, ...]  # each with N rows


class Critic(Protocol):
    """See the module. `modules` holds what is trained."""

    modules: nn.ModuleDict

    def inputs(self, images: Tensor, prompts: Sequence[str] | None, training: bool) -> Inputs:
        """Images (N, 3, H, W) in [0, 1] and perhaps N prompts -> what `logits` takes."""
        ...

    def logits(self, inputs: Inputs, generator: torch.Generator, training: bool) -> tuple[Tensor, Tensor | None]:
        """-> (N,) of whole images and (N, M) of their patches, or None if it has none. The generator is for choices."""
        ...


class Head(nn.Module):
    """``Linear(D, hidden) - GELU - Linear(hidden, 1)``, shared by CLS and patches; (..., D) -> (...)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, hidden), nn.Linear(hidden, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        return self.last(nn.functional.gelu(self.first(tokens))).squeeze(-1)


def unit_rms(tokens: Tensor) -> Tensor:
    """Tokens (..., D) scaled to mean square 1: an L2 norm of sqrt(D), the size that a LayerNorm leaves."""
    return tokens * torch.rsqrt(tokens.square().mean(-1, keepdim=True) + 1e-6)


class TokenCritic:
    """Adv-GRPO's DINO critic: a head on CLS and patch tokens of a frozen backbone (any of ``features``).

    Ours: tokens have root mean square 1 whenever the head sees them, and images are resized in one way (tensors,
    antialias). ``compat="adv_grpo"``, as published: trained on raw tokens of images resized by Pillow; scored on tokens
    of L2 norm 1 of images resized without antialias.

    Args:
        features: the backbone.
        hidden: width of the head.
        patches: how many patches the head sees, drawn anew at each step; None: all. The same places for all images;
            with compat drawn with replacement for each image, as published.
        seed: of the head's weights.
        compat: None or "adv_grpo".
    """

    def __init__(
        self, features: ImageFeatures, hidden: int, patches: int | None, seed: int, compat: str | None
    ) -> None:
        self.features, self.patches, self.compat = features, patches, compat
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.modules = nn.ModuleDict({"head": Head(features.width, hidden)}).to(features.device)

    def inputs(self, images: Tensor, prompts: Sequence[str] | None, training: bool) -> Inputs:
        """(CLS (N, D), patches (N, M, D)); prompts are not read."""
        if self.compat is None:
            return tuple(unit_rms(tokens) for tokens in self.features.tokens(images))
        if training:
            return self.features.tokens(pillow_resized(images, self.features.prepare.size))
        return tuple(tokens / (tokens.norm(dim=-1, keepdim=True) + 1e-6) for tokens in self._without_antialias(images))

    def _without_antialias(self, images: Tensor) -> Inputs:
        size = self.features.prepare.size
        small = nn.functional.interpolate(images, (size, size), mode="bicubic", align_corners=False)
        return self.features.tokens(small)

    def logits(self, inputs: Inputs, generator: torch.Generator, training: bool) -> tuple[Tensor, Tensor | None]:
        """See ``Critic``."""
        cls, patches = inputs
        if self.patches is not None:
            n, m, _ = patches.shape
            if self.compat is None:
                places = torch.randperm(m, generator=generator)[: self.patches].expand(n, -1)
            else:
                places = torch.randint(m, (n, self.patches), generator=generator)
            patches = patches[torch.arange(n)[:, None].to(patches.device), places.to(patches.device)]
        return self.modules["head"](cls), self.modules["head"](patches)


def pillow_resized(images: Tensor, size: int) -> Tensor:
    """8-bit images squeezed into size x size by Pillow's bicubic: (N, 3, H, W) in [0, 1], without a gradient."""
    pixels = (images.detach().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    small = [np.array(Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC)) for p in pixels]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).to(images.device).float() / 255


class PreferenceCritic:
    """Adv-GRPO's preference critic: a CLIP-type scorer such as PickScore whose last vision layers are trained.

    The logit is the score itself, ``exp(logit_scale) cos(image, prompt)``.

    Args:
        features: a CLIP model of ``features`` ("pickscore", "clip", "tiny-clip").
        layers: how many of the last vision layers are trained (paper: 2; published configuration: 1).

    Raises:
        ValueError: another kind of model, or fewer layers than that.
    """

    def __init__(self, features: ImageFeatures, layers: int) -> None:
        tower: Any = getattr(features.model, "vision_model", None)
        if features.text is None or not hasattr(tower, "pre_layrnorm"):
            raise ValueError(
                f"got critic 'preference' on {features.name!r}, expected a CLIP model. Use critic 'tokens'."
            )
        if not 1 <= layers <= len(tower.encoder.layers):
            raise ValueError(
                f"got {layers} layers to train in {features.name!r}, expected 1 to {len(tower.encoder.layers)}."
            )
        self.features, self.tower = features, tower
        self.frozen: list[Any] = list(tower.encoder.layers[:-layers])
        self.trained: list[Any] = list(tower.encoder.layers[-layers:])
        self.modules = nn.ModuleDict({str(i): layer.requires_grad_() for i, layer in enumerate(self.trained)})

    def inputs(self, images: Tensor, prompts: Sequence[str] | None, training: bool) -> Inputs:
        """(hidden states before the trained layers (N, 1 + M, D), unit text features (N, E)). Needs prompts."""
        if prompts is None:
            raise ValueError("got no prompts for a preference model, expected one for each image. Pass prompts.")
        assert self.features.text is not None
        parts = []
        for part in images.split(self.features.chunk):
            x = self.features.prepare(part.to(self.features.device).float())
            hidden = self.tower.pre_layrnorm(self.tower.embeddings(x))
            parts.append(_through(self.frozen, hidden))
        return torch.cat(parts), normalize(self.features.text(list(prompts)), dim=1)

    def logits(self, inputs: Inputs, generator: torch.Generator, training: bool) -> tuple[Tensor, Tensor | None]:
        """See ``Critic``."""
        hidden, text = inputs
        pooled = self.tower.post_layernorm(_through(self.trained, hidden)[:, 0])
        image = normalize(self.features.model.visual_projection(pooled), dim=1)
        return self.features.model.logit_scale.exp() * (image * text).sum(1), None


def _through(layers: Sequence[Any], hidden: Tensor) -> Tensor:
    for layer in layers:
        out = layer(hidden, None)
        hidden = out[0] if isinstance(out, tuple) else out  # transformers 4 returned a tuple
    return hidden
