"""Scores that are a function of the cosine of an image's and a prompt's features, and those features.

One class for all of them: CLIPScore in its variants, PickScore, HPSv2, SigLIP and the bundled ``tiny-clip``. They
differ in weights, in what is done to the image first and in one formula on the cosine.
"""

from __future__ import annotations

import importlib.util
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import two_towers, weights
from .chunks import in_chunks
from .preprocess import Preprocessing
from .protocol import Metadata, RewardResult, RewardSpec
from .two_towers import TwoTowers

REMEMBERED = 20_000  # prompts whose features are kept

# (cosine, logit scale, logit bias) -> value
FORMULAS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "cosine": lambda cosine, scale, bias: cosine,
    "hessel": lambda cosine, scale, bias: 2.5 * cosine.clamp(min=0),  # CLIPScore, arXiv 2104.08718, eq. 1
    "logit": lambda cosine, scale, bias: scale * cosine + bias,
    "probability": lambda cosine, scale, bias: torch.sigmoid(scale * cosine + bias),  # SigLIP, arXiv 2303.15343
}


def bundled_model(name: str) -> Path:
    """Folder of a model that is shipped with flowrl as package data.

    The package is looked up, not imported: rewards must not depend on it.

    Raises:
        ValueError: flowrl is not installed here, or ships no such model.
    """
    found = importlib.util.find_spec("flowrl")
    root = Path(next(iter(found.submodule_search_locations))) if found and found.submodule_search_locations else None
    if root is None or not (root / "models" / name).is_dir():
        shipped = sorted(p.name for p in (root / "models").glob("*") if p.is_dir()) if root else []
        raise ValueError(
            f"got model name {name!r}, expected one shipped with flowrl ({', '.join(shipped) or 'none found'}). "
            "Give the path of a CLIPModel folder."
        )
    return root / "models" / name


class ClipScore:
    """``scale * formula(cosine of the image's and the prompt's features)``.

    The formulas are "cosine", "hessel" (2.5 max(cosine, 0)), "logit" (the model's own: its logit scale times the
    cosine, plus its bias) and "probability" (the sigmoid of that). Images are fitted to the model's size as the spec
    says, prompts truncated to its length, keeping the end token.

    Args:
        path: a folder of transformers (CLIPModel, SiglipModel), a hub repository, the name of a bundled model
            ("tiny-clip"), or encoders that are already built.
        processor: folder or repository of the tokenizer and preprocessor_config.json; None: the same.
        formula, scale: as above.
        prefix: put before every prompt; CLIPScore's paper has "A photo depicts ", other uses of it nothing.
        preprocessing: attributes of the model's own ``Preprocessing`` to replace, for example {"antialias": False}.
        device: where to compute.
        chunk: images per forward.
        checkpoint: save memory in a backward pass (see ``in_chunks``).
        name: for the spec; None: that of the folder.
        licence: of the weights.

    Raises:
        ValueError: no such model, weights that do not fill it, unknown formula or preprocessing.
    """

    def __init__(
        self,
        path: str | Path | TwoTowers,
        *,
        processor: str | Path | None = None,
        formula: str = "cosine",
        scale: float = 1.0,
        prefix: str = "",
        preprocessing: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
        chunk: int = 256,
        checkpoint: bool = False,
        name: str | None = None,
        licence: str = "see the model card",
    ) -> None:
        if formula not in FORMULAS:
            raise ValueError(f"got formula {formula!r}, expected one of {', '.join(FORMULAS)}. Choose one of them.")
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"got scale {scale}, expected a positive number. Correct it.")
        if isinstance(path, TwoTowers):
            self.towers = path
        else:
            self.towers = two_towers.from_folder(_found(path), processor=processor, device=device)
        self.formula, self.scale, self.prefix, self.chunk, self.checkpoint = formula, scale, prefix, chunk, checkpoint
        self.model, self.device = self.towers.model, self.towers.device
        self.preprocessing = _changed(self.towers.preprocessing, preprocessing or {})
        self._text: dict[str, Tensor] = {}  # features of prompts seen before; training repeats its prompts
        nothing = torch.zeros(0)
        self._last = weakref.ref(nothing), 0, nothing  # images, their version, their features
        low, high = self._value(torch.tensor([-1.0, 1.0])).tolist()
        how = ("" if formula == "cosine" else f" {formula}") + ("" if scale == 1 else f" x {scale:.6g}")
        how += f" after {prefix!r}" if prefix else ""
        self.spec = RewardSpec(
            name=name or self.towers.name,
            version=self.towers.digest[:12] + how,
            range=(low, high),
            licence=licence,
            preprocessing=str(self.preprocessing),
            differentiable=True,
        )

    def _value(self, cosine: Tensor) -> Tensor:
        return self.scale * FORMULAS[self.formula](cosine, self.towers.logit_scale, self.towers.logit_bias)

    def _image_features(self, images: Tensor) -> Tensor:
        return normalize(self.towers.encode_image(self.preprocessing(images)), dim=1)

    def differentiable_features(self, images: Tensor) -> Tensor:
        """Normalised image features with a gradient: (N, 3, H, W) in [0, 1] -> (N, D) on the model's device."""
        if not len(images):  # networks reshape, and nothing has no shape to infer
            return torch.zeros(0, self.towers.dimension, device=self.device)
        return in_chunks(self._image_features, images, chunk=self.chunk, device=self.device, checkpoint=self.checkpoint)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Normalised image features, (N, 3, H, W) in [0, 1] -> (N, D) float32 on the CPU.

        Those of the last images are kept: who asks for a score often asks for diversity next."""
        if images.is_inference():  # such tensors do not say whether they were changed
            return self.differentiable_features(images).cpu()
        last, version, features = self._last
        if last() is not images or version != images._version:
            features = self.differentiable_features(images).cpu()
            self._last = weakref.ref(images), images._version, features
        return features

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """Normalised prompt features, (N, D) float32 on the CPU."""
        if not prompts:
            return torch.zeros(0, self.towers.dimension)
        if new := sorted(set(prompts) - set(self._text)):
            if len(self._text) > REMEMBERED:
                self._text.clear()
                new = sorted(set(prompts))
            for start in range(0, len(new), self.chunk):
                part = new[start : start + self.chunk]
                features = normalize(self.towers.encode_text([self.prefix + prompt for prompt in part]), dim=1).cpu()
                self._text |= dict(zip(part, features, strict=True))
        return torch.stack([self._text[prompt] for prompt in prompts])

    def differentiable(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The score with a gradient with respect to the images: (N, 3, H, W), N prompts -> (N,)."""
        text = self.text_features(prompts).to(self.device)
        return self._value((self.differentiable_features(images) * text).sum(1))

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; metadata is not read."""
        return RewardResult(self._value((self.features(images) * self.text_features(prompts)).sum(1)))


def hpsv2(
    path: str | Path,
    *,
    architecture: str | Mapping[str, Any] = "ViT-H-14",
    antialias: bool = True,
    device: str | torch.device = "cpu",
    chunk: int = 32,
    checkpoint: bool = False,
    name: str = "hpsv2.1",
) -> ClipScore:
    """HPSv2 and v2.1 (arXiv 2306.09341): the cosine in open_clip's ViT-H-14; typically 0.2 to 0.35.

    Differs from the published package in that the product is taken in float32 and not under float16 autocast, whose
    steps of 2.4e-4 make ties.

    Args:
        path: HPS_v2_compressed.pt or HPS_v2.1_compressed.pt, or "owner/name:file" on the hub.
        architecture: a name that open_clip knows, or the arguments of its ``CLIP``.
        antialias: of the resize. The package leaves it to torchvision: on since 0.17, off before.
        device, chunk, checkpoint: see ``ClipScore``.
        name: for the spec.

    Raises:
        ValueError: no such file, open_clip is not installed, or weights that do not fill it.
    """

    def padded(size: int) -> Preprocessing:
        return Preprocessing(size, fit="pad", antialias=antialias)

    towers = two_towers.from_open_clip(path, architecture, padded, device=device)
    return ClipScore(towers, chunk=chunk, checkpoint=checkpoint, name=name, licence="Apache-2.0")


def flow_grpo_clip(
    path: str | Path = weights.OFFICIAL["clip-l14"].path,
    *,
    divisor: float,
    antialias: bool = True,
    device: str | torch.device = "cpu",
    chunk: int = 32,
    checkpoint: bool = False,
) -> ClipScore:
    """The CLIP score of flow_grpo's descendants: the logit of CLIP ViT-L/14 over 30 (Adv-GRPO) or 100 (DiffusionNFT).

    They resize with torchvision's default, which is bilinear and not CLIP's bicubic, and crop as torchvision does.

    Args:
        path: folder or hub repository of the CLIPModel.
        divisor: of the logit, which is about 100 times the cosine.
        antialias: of the resize; torchvision's default for tensors since 0.17.
        device, chunk, checkpoint: see ``ClipScore``.
    """
    return ClipScore(
        path,
        formula="logit",
        scale=1 / divisor,
        preprocessing={"mode": "bilinear", "antialias": antialias, "half_pixel": "even"},
        device=device,
        chunk=chunk,
        checkpoint=checkpoint,
        name=f"clip-logit-{divisor:g}",
        licence="MIT",
    )


def model_folder(path: str | Path) -> Path:
    """The folder of a model: itself, that of a hub repository, or of a bundled name."""
    return weights.locate_folder(_found(path), two_towers.MODEL_FILES)


def _found(path: str | Path) -> str | Path:
    """A folder or hub repository as it is; any other word is the name of a bundled model."""
    if Path(path).expanduser().is_dir() or weights.HUB_ID.fullmatch(str(path)):
        return path
    return bundled_model(str(path))


def _changed(preprocessing: Preprocessing, changes: Mapping[str, Any]) -> Preprocessing:
    try:
        return replace(preprocessing, **changes)
    except TypeError as error:
        raise ValueError(
            f"got preprocessing {dict(changes)}, expected attributes of {preprocessing}: size, fit, mode, antialias, "
            f"half_pixel, mean, std ({error}). Correct them."
        ) from error
