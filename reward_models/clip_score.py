"""A CLIP model as a judge: cosine of image and prompt, and image features for diversity.

Works with any ``CLIPModel`` folder in transformers' layout (config.json, model.safetensors, preprocessor_config.json
and the tokenizer's files), from the bundled ``tiny-clip`` to the published ones.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from .protocol import Metadata, RewardResult, RewardSpec

REMEMBERED = 20_000  # prompts whose features are kept
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


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
    """Cosine of the image's and the prompt's CLIP features, in [-1, 1], unscaled.

    Images are resized (shortest side, bicubic with antialias, on tensors) and centre-cropped to the model's size, and
    normalised as preprocessor_config.json says. Prompts are truncated to the model's length, keeping the end token.

    Args:
        path: a folder, or the name of a bundled model ("tiny-clip").
        device: where to compute.
        chunk: images per forward.

    Raises:
        ValueError: no such folder, or it does not hold a CLIPModel.
    """

    def __init__(self, path: str | Path, *, device: str | torch.device = "cpu", chunk: int = 256) -> None:
        folder = Path(path).expanduser()
        folder = folder if folder.is_dir() else bundled_model(str(path))
        _check_folder(folder)
        from transformers import AutoTokenizer, CLIPModel  # heavy, and needed by this reward alone

        self.device, self.chunk = torch.device(device), chunk
        self.model: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        self.model.to(self.device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.length = int(self.model.config.text_config.max_position_embeddings)
        self.size = int(self.model.config.vision_config.image_size)
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        self.mean, self.std = (
            torch.tensor(settings.get(key, default), device=self.device).view(1, 3, 1, 1)
            for key, default in (("image_mean", OPENAI_MEAN), ("image_std", OPENAI_STD))
        )
        self._text: dict[str, Tensor] = {}  # features of prompts seen before; training repeats its prompts
        nothing = torch.zeros(0)
        self._last = weakref.ref(nothing), 0, nothing  # images, their version, their features
        digest = hashlib.sha256()
        for file in sorted(folder.glob("*.safetensors")):
            digest.update(file.read_bytes())
        self.spec = RewardSpec(
            name=folder.name,
            version=digest.hexdigest()[:12],
            range=(-1.0, 1.0),
            licence="see the model card",
            preprocessing=f"bicubic antialias resize and centre crop to {self.size} px, float32",
            differentiable=True,
        )

    def _image_features(self, images: Tensor) -> Tensor:
        h, w = images.shape[-2:]
        scale = self.size / min(h, w)
        if scale != 1:
            shape = (max(round(h * scale), self.size), max(round(w * scale), self.size))
            images = interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False)
        top, left = (images.shape[-2] - self.size) // 2, (images.shape[-1] - self.size) // 2
        crop = images[..., top : top + self.size, left : left + self.size]
        out = self.model.get_image_features(pixel_values=(crop - self.mean) / self.std)
        return normalize(getattr(out, "pooler_output", out), dim=1)  # transformers 4 returned the tensor itself

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Normalised image features, (N, 3, H, W) in [0, 1] -> (N, D) float32 on the CPU.

        Those of the last images are kept: who asks for a score often asks for diversity next."""
        last, version, features = self._last
        if last() is not images or version != images._version:
            parts = [self._image_features(c.to(self.device).float()).cpu() for c in images.split(self.chunk)]
            features = torch.cat(parts)
            self._last = weakref.ref(images), images._version, features
        return features

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> Tensor:
        """Normalised prompt features, (N, D) float32 on the CPU."""
        if not prompts:
            return torch.zeros(0, int(self.model.config.projection_dim))
        if new := sorted(set(prompts) - set(self._text)):
            if len(self._text) > REMEMBERED:
                self._text.clear()
                new = sorted(set(prompts))
            for start in range(0, len(new), self.chunk):
                part = new[start : start + self.chunk]
                # one padded length for all calls, so that a feature does not depend on the other prompts of its call
                tokens = self.tokenizer(
                    part, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
                ).to(self.device)
                out = self.model.get_text_features(
                    input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
                )
                features = normalize(getattr(out, "pooler_output", out), dim=1).cpu()
                self._text |= dict(zip(part, features, strict=True))
        return torch.stack([self._text[prompt] for prompt in prompts])

    def differentiable(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The score with a gradient with respect to the images: (N, 3, H, W), N prompts -> (N,)."""
        features = torch.cat([self._image_features(c.to(self.device).float()) for c in images.split(self.chunk)])
        return (features * self.text_features(prompts).to(self.device)).sum(1)

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; metadata is not read."""
        return RewardResult((self.features(images) * self.text_features(prompts)).sum(1))


def _check_folder(folder: Path) -> None:
    absent = [n for n in ("config.json", "preprocessor_config.json") if not (folder / n).is_file()]
    if absent or not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"got model folder {str(folder)!r} without {', '.join(absent) or 'a .safetensors file'}, "
            "expected a CLIPModel saved by transformers with its processor. Save both with save_pretrained()."
        )
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != "clip":
        raise ValueError(
            f"got model folder {str(folder)!r} of type {kind!r}, expected 'clip'. Give the folder of a CLIPModel."
        )
