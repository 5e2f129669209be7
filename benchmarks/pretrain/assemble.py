"""From trained parts to a folder that plain `StableDiffusion3Pipeline.from_pretrained` loads and samples."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from .flow import TextToImage
from .text import silent_t5

SHIFT = 3.0  # of the s-grid, as SD3


def assemble(model: TextToImage, vae: AutoencoderKL, tokenizer, shift: float, scale: float) -> StableDiffusion3Pipeline:
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


def save_half(pipeline: StableDiffusion3Pipeline, folder: Path) -> Path:
    """Write the pipeline in fp16 safetensors; it loads in float32 unless told otherwise."""
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    pipeline.to(dtype=torch.float32)
    for config in folder.glob("text_encoder*/config.json"):  # transformers loads in the type that stands here
        config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    return folder
