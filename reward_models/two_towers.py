"""Image and text encoders that share a space (CLIP, SigLIP), from transformers' folders or in open_clip's classes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import weights
from .preprocess import OPENAI_MEAN, OPENAI_STD, Mode, Numbers, Preprocessing
from .torchvision_ops import optional, ready

TOKENIZER_FILES = ("*.json", "*.txt", "*.model")
RESAMPLING: dict[Any, Mode] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
MODEL_FILES = (*TOKENIZER_FILES, "model*.safetensors")


@dataclass(frozen=True)
class TwoTowers:
    """A pair of encoders, frozen, in float32.

    Attributes:
        model: the module that owns both.
        encode_image: normalised pixels (N, 3, size, size) on the model's device -> features (N, D), not normalised.
        encode_text: n prompts -> features (n, D), not normalised; the same for a prompt whatever stands beside it.
        preprocessing: from images in [0, 1] to normalised pixels.
        dimension: D.
        logit_scale, logit_bias: the model's own logit is ``logit_scale * cosine + logit_bias``.
        name: of the folder or architecture.
        digest: SHA-256 of the weights.
        device: where it computes.
    """

    model: nn.Module
    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[list[str]], Tensor]
    preprocessing: Preprocessing
    dimension: int
    logit_scale: float
    logit_bias: float
    name: str
    digest: str
    device: torch.device


def from_folder(
    path: str | Path, *, processor: str | Path | None = None, device: str | torch.device = "cpu"
) -> TwoTowers:
    """A CLIPModel or SiglipModel saved by transformers.

    The activation (OpenAI's models need QuickGELU) is read from config.json, the resize, the crop, mean and std of the
    pixels from preprocessor_config.json. Prompts are truncated to the model's length, keeping the end token.

    Args:
        path: folder or hub repository.
        processor: folder or hub repository of the tokenizer and preprocessor_config.json; None: the same.
        device: where to compute.

    Raises:
        ValueError: no such folder, another kind of model, weights that do not fill it, or a preprocessor that does
            something else than CLIP's or SigLIP's.
    """
    folder = weights.locate_folder(path, MODEL_FILES)
    beside = folder if processor is None else weights.locate_folder(processor, TOKENIZER_FILES)
    kind = _checked_kind(folder, beside)
    ready()
    import transformers  # heavy, and needed by learned rewards alone

    model, digest = weights.pretrained(transformers.CLIPModel if kind == "clip" else transformers.SiglipModel, folder)
    towers: Any = model.to(device)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(beside)
    length = int(towers.config.text_config.max_position_embeddings)

    def encode_image(pixels: Tensor) -> Tensor:
        return _pooled(towers.get_image_features(pixel_values=pixels))

    def encode_text(prompts: list[str]) -> Tensor:
        # one padded length for all calls, so that a feature does not depend on the other prompts of its call
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        given = {"input_ids": tokens["input_ids"].to(towers.device)}
        if kind == "clip":  # SigLIP was trained to see its padding
            given["attention_mask"] = tokens["attention_mask"].to(towers.device)
        return _pooled(towers.get_text_features(**given))

    return TwoTowers(
        model=model,
        encode_image=encode_image,
        encode_text=encode_text,
        preprocessing=_preprocessing(beside, kind, int(towers.config.vision_config.image_size)),
        dimension=int(towers.config.projection_dim if kind == "clip" else towers.config.vision_config.hidden_size),
        logit_scale=float(towers.logit_scale.exp()),
        logit_bias=float(getattr(towers, "logit_bias", 0.0)),
        name=folder.name,
        digest=digest,
        device=torch.device(device),
    )


def from_open_clip(
    path: str | Path,
    architecture: str | Mapping[str, Any],
    preprocessing: Callable[[int], Preprocessing],
    *,
    device: str | torch.device = "cpu",
) -> TwoTowers:
    """A checkpoint with open_clip's names.

    Args:
        path: file, or "owner/name:file" on the hub.
        architecture: a name that open_clip knows, or the arguments of its ``CLIP``.
        preprocessing: from the model's image size.
        device: where to compute.

    Raises:
        ValueError: no such file, unknown architecture, or weights that do not fill it.
    """
    file = weights.locate_file(path)
    open_clip: Any = optional("open_clip", "open_clip_torch", "clip")
    if isinstance(architecture, str):
        if architecture not in open_clip.list_models():
            raise ValueError(
                f"got architecture {architecture!r}, expected one of open_clip.list_models(), or a mapping."
            )
        model = open_clip.create_model(architecture, pretrained=None)
    else:
        model = open_clip.CLIP(**architecture)
    state, digest = weights.read(file)
    weights.fill(model, state, path)
    name = architecture if isinstance(architecture, str) else "open_clip"
    return around_open_clip(model, preprocessing, name=name, digest=digest, device=device)


def around_open_clip(
    model: Any,
    preprocessing: Callable[[int], Preprocessing],
    *,
    name: str,
    digest: str,
    device: str | torch.device = "cpu",
) -> TwoTowers:
    """A ``CLIP`` of open_clip as it is, with OpenAI's tokenizer; frozen here and moved to ``device``.

    Raises:
        ValueError: another class of open_clip, whose text tower has a tokenizer of its own.
    """
    open_clip: Any = optional("open_clip", "open_clip_torch", "clip")
    if not isinstance(model, open_clip.CLIP):
        raise ValueError(
            f"got {name!r}, a {type(model).__name__} of open_clip, expected its CLIP, such as ViT-B-32. Choose one."
        )
    model.eval().requires_grad_(False).to(device)
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)

    def encode_text(prompts: list[str]) -> Tensor:
        return model.encode_text(tokenizer(prompts).to(device))

    size = model.visual.image_size
    return TwoTowers(
        model=model,
        encode_image=model.encode_image,
        encode_text=encode_text,
        preprocessing=preprocessing(int(size[0] if isinstance(size, tuple) else size)),
        dimension=int(model.text_projection.shape[1]),
        logit_scale=float(model.logit_scale.exp()),
        logit_bias=0.0,
        name=name,
        digest=digest,
        device=torch.device(device),
    )


def _pooled(output: Any) -> Tensor:
    return cast(Tensor, getattr(output, "pooler_output", output))  # transformers 4 returned the tensor itself


def _preprocessing(folder: Path, kind: str, size: int) -> Preprocessing:
    """What a folder's preprocessor_config.json says; what it leaves out is as published."""
    said = json.loads((folder / "preprocessor_config.json").read_text())
    crop = kind == "clip" and bool(said.get("do_center_crop", True))
    sides = said.get("size", size)
    short = sides.get("shortest_edge", sides.get("height")) if isinstance(sides, dict) else sides
    mode = RESAMPLING.get(said.get("resample", 3))
    if mode is None or short != size:
        raise ValueError(
            f"got model folder {str(folder)!r} whose preprocessor_config.json resizes to {sides} px with resample "
            f"{said.get('resample')!r}, expected {size} px, as its network sees, and 2 (bilinear) or 3 (bicubic). "
            "Correct the file; the option `preprocessing` can say what else is to be done."
        )
    return Preprocessing(
        size,
        fit="crop" if crop else "squeeze",
        mode=mode,
        mean=_numbers(said.get("image_mean", OPENAI_MEAN)),
        std=_numbers(said.get("image_std", OPENAI_STD)),
    )


def _numbers(values: Any) -> Numbers:
    red, green, blue = map(float, values)
    return red, green, blue


def _checked_kind(folder: Path, processor: Path) -> str:
    absent = [
        name
        for where, name in ((folder, "config.json"), (processor, "preprocessor_config.json"))
        if not (where / name).is_file()
    ]
    if absent:
        raise ValueError(
            f"got model folder {str(folder)!r} without {', '.join(absent)}, expected a CLIPModel or SiglipModel saved "
            "by transformers with its processor. Save both with save_pretrained()."
        )
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind not in ("clip", "siglip"):
        raise ValueError(
            f"got model folder {str(folder)!r} of type {kind!r}, expected 'clip' or 'siglip'. Give the folder of a "
            "CLIPModel or SiglipModel."
        )
    return str(kind)
