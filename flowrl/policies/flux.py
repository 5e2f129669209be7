"""FLUX.1: what is particular to `FluxPipeline` (packed latents, position ids, embedded guidance)."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowrl.errors import UserError
from flowrl.policies.sd3 import dynamic, dynamic_mu


class Flux:
    """Encoding, velocity and s-grid of a `FluxPipeline`. Latents are (C, h, w) outside and packed 2 x 2 inside."""

    pipeline_classes = ("FluxPipeline",)
    network_part = "transformer"
    text_parts = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    # Flow-GRPO's choice: attention and feed-forward of the double-stream blocks, attention of the single-stream ones
    lora_targets = (
        *(f"attn.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn.{layer}" for layer in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    latent_limit = None  # rotary positions: no largest size

    def __init__(self, pipeline: Any, max_sequence_length: int | None = None):
        """max_sequence_length: T5 tokens, None for diffusers' 512."""
        self.pipeline, self.clock = pipeline, None
        self.zero_negative = False
        self.latent_channels = pipeline.transformer.config.in_channels // 4
        self.pixel_multiple = pipeline.vae_scale_factor * 2
        self.resolution = pipeline.default_sample_size * pipeline.vae_scale_factor
        self.max_sequence_length = 512 if max_sequence_length is None else max_sequence_length
        self.embeds_guidance = bool(pipeline.transformer.config.guidance_embeds)

    def encode(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """{"embeds": (N, tokens, width), "pooled": (N, width)}, as the pipeline's own `encode_prompt` gives."""
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts), prompt_2=None, device=device, max_sequence_length=self.max_sequence_length
        )
        return {"embeds": embeds, "pooled": pooled}

    def calls(self, guidance: float) -> int:
        """Network rows per predicted row: the guidance is an input, not a second row."""
        return 1

    def velocity(
        self,
        network: torch.nn.Module,
        latents: Tensor,
        s: Tensor,
        rows: Mapping[str, Tensor],
        uncond: Mapping[str, Tensor] | None,
        guidance: float,
    ) -> Tensor:
        """v (N, C, h, w). `guidance` goes into the network of guidance-distilled models (FLUX.1-dev)."""
        if guidance != 1 and not self.embeds_guidance:
            raise UserError(
                f"got guidance {guidance} for a FLUX model without embedded guidance (such as FLUX.1-schnell); "
                "expected 1; set guidance to 1"
            )
        n, channels, height, width = latents.shape
        embeds = rows["embeds"]
        packed = self.pipeline._pack_latents(latents.to(embeds.dtype), n, channels, height, width)  # (N, h/2 w/2, 4 C)
        v = network(
            hidden_states=packed,
            timestep=s,  # the network multiplies by 1000 itself
            guidance=torch.full_like(s, guidance) if self.embeds_guidance else None,
            pooled_projections=rows["pooled"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=latents.device, dtype=embeds.dtype),
            img_ids=self.pipeline._prepare_latent_image_ids(n, height // 2, width // 2, latents.device, embeds.dtype),
            return_dict=False,
        )[0].float()
        scale = self.pipeline.vae_scale_factor
        return self.pipeline._unpack_latents(v, height * scale, width * scale, scale)

    def sigmas(self, steps: int, tokens: int) -> Tensor:
        """(steps + 1,) float32: 1, ..., 1/steps through the scheduler's shift, then 0. tokens: packed latents."""
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        arguments = {"mu": dynamic_mu(scheduler, tokens)} if dynamic(scheduler) else {}
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **arguments)
        return scheduler.sigmas
