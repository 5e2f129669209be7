"""Diffusion models with a UNet: what is particular to Stable Diffusion 1 and 2, SDXL, and latent consistency models.

They predict noise (or v), under a table of noise levels; `vp` says how that becomes a flow. The std of the initial
noise depends on the first time, since diffusers draws x_vp ~ N(0, 1) wherever its grid begins.

A UNet with a guidance embedding (`time_cond_proj_dim`: latent consistency models) takes guidance w = g - 1 as an input:
one row per call, no unconditional row, and guidance 1 is the embedding of 0 (what LCMs learned is about 3 to 14).
Guidance on noise and guidance on velocity are the same, as v is affine in what the network says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.errors import UserError
from flowrl.policies.vp import Clock, vp_scale
from samplers.kernels import per_row

Rows = Mapping[str, Tensor]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # DDPO's choice and the field's: self- and cross-attention


class StableDiffusion:
    """A `StableDiffusionPipeline` (1.x, 2.x) or `LatentConsistencyModelPipeline`; see the module."""

    pipeline_classes = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    network_part = "unet"
    text_parts = ("text_encoder",)
    tokenizers = ("tokenizer",)
    lora_targets = ATTENTION
    latent_limit = None  # convolutions: no largest size
    zero_negative = False

    def __init__(self, pipeline: Any, max_sequence_length: int | None = None):
        """max_sequence_length: None, as there is no T5. Raises UserError."""
        _no_t5(pipeline, max_sequence_length)
        self.pipeline, self.max_sequence_length = pipeline, None
        self.clock = Clock(pipeline.scheduler)
        self.latent_channels, self.resolution = _sizes(pipeline)
        self.pixel_multiple = pipeline.vae_scale_factor

    def encode(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """{"embeds": (N, tokens, width)}, as the pipeline's own `encode_prompt` gives."""
        embeds, _ = self.pipeline.encode_prompt(list(prompts), device, 1, False)
        return {"embeds": embeds}

    def calls(self, guidance: float) -> int:
        """Network rows per predicted row."""
        return _calls(self.pipeline, guidance)

    def velocity(
        self, network: nn.Module, latents: Tensor, s: Tensor, rows: Rows, uncond: Rows | None, guidance: float
    ) -> Tensor:
        """v (N, C, h, w); with classifier-free guidance both halves in one forward of 2N rows."""
        return _velocity(self.pipeline, self.clock, network, latents, s, rows, uncond, guidance)

    def sigmas(self, steps: int, tokens: int) -> Tensor:
        """(steps + 1,) float64 of the scheduler's settings, whatever the number of tokens."""
        return self.clock.sigmas(steps)


class StableDiffusionXL:
    """A `StableDiffusionXLPipeline` (base, Turbo, LCM); see the module.

    Size conditioning is that of a plain call: original and target size are the picture's, nothing was cropped. Without
    a negative prompt the unconditional row is zeros where the pipeline says so (`force_zeros_for_empty_prompt`).
    """

    pipeline_classes = ("StableDiffusionXLPipeline",)
    network_part = "unet"
    text_parts = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    lora_targets = ATTENTION
    latent_limit = None

    def __init__(self, pipeline: Any, max_sequence_length: int | None = None):
        """max_sequence_length: None, as there is no T5. Raises UserError."""
        _no_t5(pipeline, max_sequence_length)
        self.pipeline, self.max_sequence_length = pipeline, None
        self.clock = Clock(pipeline.scheduler)
        self.latent_channels, self.resolution = _sizes(pipeline)
        self.pixel_multiple = pipeline.vae_scale_factor
        self.zero_negative = bool(pipeline.config.force_zeros_for_empty_prompt)

    def encode(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """{"embeds": (N, tokens, width of both), "pooled": (N, width)}, as the pipeline's own `encode_prompt` gives."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"embeds": embeds, "pooled": pooled}

    def calls(self, guidance: float) -> int:
        """Network rows per predicted row."""
        return _calls(self.pipeline, guidance)

    def velocity(
        self, network: nn.Module, latents: Tensor, s: Tensor, rows: Rows, uncond: Rows | None, guidance: float
    ) -> Tensor:
        """v (N, C, h, w); with classifier-free guidance both halves in one forward of 2N rows."""
        scale = self.pipeline.vae_scale_factor
        size = [scale * latents.shape[-2], scale * latents.shape[-1]]
        ids = torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=latents.device)
        return _velocity(self.pipeline, self.clock, network, latents, s, rows, uncond, guidance, ids)

    def sigmas(self, steps: int, tokens: int) -> Tensor:
        """(steps + 1,) float64 of the scheduler's settings, whatever the number of tokens."""
        return self.clock.sigmas(steps)


def _velocity(
    pipeline: Any,
    clock: Clock,
    network: nn.Module,
    latents: Tensor,
    s: Tensor,
    rows: Rows,
    uncond: Rows | None,
    guidance: float,
    time_ids: Tensor | None = None,
) -> Tensor:
    """v (N, C, h, w) float32 of float32 latents; the network computes in the number format of the embeddings."""
    n, twice = len(latents), _calls(pipeline, guidance) == 2
    timestep = clock.timestep(s)
    inputs = {"x": per_row(vp_scale(s), latents) * latents, "t": timestep, **rows}
    if twice:
        assert uncond is not None  # `predict` has checked
        free = {key: value.expand(n, *value.shape[1:]) for key, value in uncond.items()}
        inputs = {key: torch.cat([free.get(key, value), value]) for key, value in inputs.items()}
    embeds = inputs["embeds"]
    extra: dict[str, Any] = {}
    if time_ids is not None:
        ids = time_ids.expand(len(embeds), -1)
        extra["added_cond_kwargs"] = {"text_embeds": inputs["pooled"], "time_ids": ids}
    if (width := pipeline.unet.config.time_cond_proj_dim) is not None:
        strength = pipeline.get_guidance_scale_embedding(torch.full((n,), guidance - 1.0), embedding_dim=width)
        extra["timestep_cond"] = strength.to(embeds)
    output = network(
        inputs["x"].to(embeds.dtype), inputs["t"], encoder_hidden_states=embeds, return_dict=False, **extra
    )[0].float()
    if twice:
        without, with_prompt = output.chunk(2)
        output = without + guidance * (with_prompt - without)
    return clock.velocity(output, latents, s, timestep)


def _calls(pipeline: Any, guidance: float) -> int:
    return 1 if guidance == 1 or pipeline.unet.config.time_cond_proj_dim is not None else 2


def _sizes(pipeline: Any) -> tuple[int, int]:
    """Latent channels, and the side in pixels that the UNet was made for."""
    config = pipeline.unet.config
    side = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    return config.in_channels, side * pipeline.vae_scale_factor


def _no_t5(pipeline: Any, max_sequence_length: int | None) -> None:
    if max_sequence_length is not None:
        raise UserError(
            f"got max_sequence_length {max_sequence_length} for a {type(pipeline).__name__}; expected none, as its "
            "text encoders have a fixed length; leave it out"
        )
