"""From trained parts to folders that plain diffusers and transformers load: fp16 on disk, float32 in memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from transformers import CLIPModel, CLIPTokenizer

from .clip import MEAN, STD
from .diffusion import TextToNoise, noise_levels
from .flow import TextToImage
from .text import silent_t5

SHIFT = 3.0  # of the s-grid, as SD3


def assemble(
    model: TextToImage, vae: AutoencoderKL, tokenizer: CLIPTokenizer, shift: float, scale: float
) -> StableDiffusion3Pipeline:
    """The pipeline; `shift` and `scale` are those of the latents (see `flow.encode_latents`)."""
    vae.register_to_config(shift_factor=float(shift), scaling_factor=float(scale))
    t5, t5_tokenizer = silent_t5()
    return StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=model.text.layers_1,
        tokenizer=tokenizer,
        text_encoder_2=model.text.layers_2,
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )


def assemble_sd(
    model: TextToNoise, vae: AutoencoderKL, tokenizer: CLIPTokenizer, scale: float
) -> StableDiffusionPipeline:
    """The pipeline; `scale` is that of the latents. Its autoencoder has no shift: these pipelines would not add it."""
    vae.register_to_config(shift_factor=None, scaling_factor=float(scale))
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=noise_levels(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_half(pipeline: DiffusionPipeline, folder: Path) -> Path:
    """Write the pipeline in fp16 safetensors; it loads in float32 unless told otherwise."""
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    pipeline.to(dtype=torch.float32)
    for config in folder.glob("text_encoder*/config.json"):
        _loads_in_float32(config)
    return folder


def save_half_clip(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> Path:
    """Write a CLIP model in fp16 safetensors with its tokenizer and the settings of its image processor."""
    model.half().save_pretrained(folder, safe_serialization=True)
    model.float()
    tokenizer.save_pretrained(folder)
    size = json.loads((folder / "config.json").read_text())["vision_config"]["image_size"]
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    _loads_in_float32(folder / "config.json")
    return folder


def _loads_in_float32(config: Path) -> None:
    """transformers loads a model in the type that stands in its config."""
    content = json.loads(config.read_text())
    for part in (content, *(content[key] for key in ("text_config", "vision_config") if key in content)):
        part.pop("torch_dtype", None)
        part["dtype"] = "float32"
    config.write_text(json.dumps(content, indent=2) + "\n")
