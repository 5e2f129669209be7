"""LAION's aesthetic predictor v2 ("sac+logos+ava1"): an affine map of CLIP's image features."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from . import weights
from .affine_head import fold
from .clip_score import ClipScore
from .protocol import Metadata, RewardResult, RewardSpec


class Aesthetic:
    """How much people would like the look of an image, about 1 to 10; prompts are not read.

    ``w . f + b`` of the normalised image features f of CLIP ViT-L/14. Differs from the original on a GPU in that it
    computes in float32 (second or third decimal).

    Args:
        path: file of the head.
        clip: folder or hub repository of the CLIPModel that the head was trained on.
        device: where to compute.
        chunk: images per forward.
        checkpoint: save memory in a backward pass.

    Raises:
        ValueError: no such files, or a head of another width.
    """

    def __init__(
        self,
        path: str | Path = weights.OFFICIAL["aesthetic"].path,
        *,
        clip: str | Path = weights.OFFICIAL["clip-l14"].path,
        device: str | torch.device = "cpu",
        chunk: int = 32,
        checkpoint: bool = False,
    ) -> None:
        state, digest = weights.read(weights.locate_file(path))
        w, b = fold(state, "layers.", path)
        self.clip = ClipScore(clip, device=device, chunk=chunk, checkpoint=checkpoint)
        if len(w) != self.clip.towers.dimension:
            raise ValueError(
                f"got a head for {len(w)} features and {self.clip.towers.name!r}, which gives "
                f"{self.clip.towers.dimension}, expected as many. Give the CLIP model that the head was trained on."
            )
        self.w, self.b = w.to(self.clip.device), b.to(self.clip.device)
        reach = float(w.double().norm())  # features have length 1
        self.spec = RewardSpec(
            name="aesthetic",
            version=hashlib.sha256(f"{digest} {self.clip.towers.digest}".encode()).hexdigest()[:12],
            range=(float(b) - reach, float(b) + reach),
            licence="Apache-2.0 (head), MIT (CLIP)",
            preprocessing=self.clip.spec.preprocessing,
            differentiable=True,
        )

    def differentiable(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The score with a gradient with respect to the images: (N, 3, H, W), N prompts -> (N,)."""
        return self.clip.differentiable_features(images) @ self.w + self.b

    @torch.no_grad()
    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; prompts and metadata are not read."""
        return RewardResult(self.differentiable(images, prompts).cpu())
