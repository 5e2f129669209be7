"""ImageReward (arXiv 2304.05977): BLIP reads the prompt while looking at the image, an affine head gives the number.

Differs from the published package in that the image is resized as a float tensor, not by PIL in 8 bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import weights
from .affine_head import fold
from .chunks import in_chunks
from .preprocess import Preprocessing
from .protocol import Metadata, RewardResult, RewardSpec
from .torchvision_ops import ready

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw head on the training set
TEXT_LENGTH = 35  # tokens; longer prompts are cut
TOKENIZER = "google-bert/bert-base-uncased"
# eps of the image encoder is BLIP's own, not the default of transformers
VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6,
}  # fmt: skip
TEXT = {
    "vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 512, "layer_norm_eps": 1e-12,
}  # fmt: skip
VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.", "encoder.layers."),
    (r"^norm\.", "post_layernorm."),
)


def vision_name(name: str) -> str:
    """Name in transformers' BlipVisionModel of a tensor of BLIP's ``visual_encoder``."""
    for pattern, replacement in VISION_NAMES:
        changed, count = re.subn(pattern, replacement, name)
        if count:
            return changed
    return name


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


class ImageReward:
    """Human preference for an image given its prompt; about mean 0 and standard deviation 1 on the training set.

    Args:
        path: ImageReward.pt (or a conversion), or "owner/name:file" on the hub.
        tokenizer: folder or hub repository of BERT's uncased tokenizer.
        config: {"vision": {...}, "text": {...}}: sizes other than the published ones.
        device: where to compute.
        chunk: images per forward.
        checkpoint: save memory in a backward pass.

    Raises:
        ValueError: no such files, or weights that do not fill the model.
    """

    def __init__(
        self,
        path: str | Path = weights.OFFICIAL["imagereward"].path,
        *,
        tokenizer: str | Path = TOKENIZER,
        config: Mapping[str, Mapping[str, Any]] | None = None,
        device: str | torch.device = "cpu",
        chunk: int = 32,
        checkpoint: bool = False,
    ) -> None:
        state, digest = weights.read(weights.locate_file(path))
        words = weights.locate_folder(tokenizer, ("*.json", "vocab.txt"))
        ready()
        from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        changes = config or {}
        sizes: dict[str, Any] = VISION | dict(changes.get("vision", {}))
        vision = BlipVisionConfig(**sizes)
        # is_decoder only makes the cross-attention exist; the forward pass below is that of an encoder
        text = BlipTextConfig(
            **TEXT | {"encoder_hidden_size": vision.hidden_size, "is_decoder": True} | dict(changes.get("text", {}))
        )
        self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        named = {vision_name(key): value for key, value in _part(state, "blip.visual_encoder.").items()}
        weights.fill(self.vision, named, path)
        weights.fill(self.text, _part(state, "blip.text_encoder."), path)
        w, b = fold(state, "mlp.layers.", path)
        self.device, self.chunk, self.checkpoint = torch.device(device), chunk, checkpoint
        for model in (self.vision, self.text):
            model.eval().requires_grad_(False).to(self.device)
        self.w, self.b = w.to(self.device), b.to(self.device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(words)
        self.preprocessing = Preprocessing(int(sizes["image_size"]), half_pixel="even")
        self.spec = RewardSpec(
            name="imagereward",
            version=digest[:12],
            licence="Apache-2.0",
            preprocessing=str(self.preprocessing),
            differentiable=True,
        )

    def _forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        patches = self.vision(pixel_values=self.preprocessing(images)).last_hidden_state
        seen = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
        out = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=patches, encoder_attention_mask=seen)
        raw = out.last_hidden_state[:, 0] @ self.w + self.b  # the first token stays [CLS]; BLIP would make it [ENC]
        return (raw - MEAN) / STD

    def differentiable(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The score with a gradient with respect to the images: (N, 3, H, W), N prompts -> (N,)."""
        if not prompts:
            return torch.zeros(0, device=self.device)
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
        )
        return in_chunks(
            self._forward,
            images,
            tokens["input_ids"],
            tokens["attention_mask"],
            chunk=self.chunk,
            device=self.device,
            checkpoint=self.checkpoint,
        )

    @torch.no_grad()
    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; metadata is not read."""
        return RewardResult(self.differentiable(images, prompts).cpu())
