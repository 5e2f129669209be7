"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): what is particular to `StableDiffusion3Pipeline`."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class SD3:
    """Encoding, velocity and s-grid of a `StableDiffusion3Pipeline`; classifier-free guidance in one forward."""

    pipeline_classes = ("StableDiffusion3Pipeline",)
    network_part = "transformer"
    text_parts = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    # Flow-GRPO's choice: joint attention only ("attn2", the second attention of SD3.5-medium, is left alone)
    lora_targets = tuple(
        f"attn.{layer}"
        for layer in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    )

    def __init__(self, pipeline: Any, max_sequence_length: int | None = None):
        """max_sequence_length: T5 tokens; None: 0 where the T5's output is exactly zero, else diffusers' 256."""
        config = pipeline.transformer.config
        self.pipeline, self.clock = pipeline, None
        self.latent_channels = config.in_channels
        self.pixel_multiple = pipeline.vae_scale_factor * config.patch_size
        self.latent_limit = config.pos_embed_max_size * config.patch_size if config.pos_embed_max_size else None
        self.resolution = config.sample_size * pipeline.vae_scale_factor
        self.zero_negative = False
        self.max_sequence_length = max_sequence_length
        if max_sequence_length is None:
            self.max_sequence_length = 0 if _t5_is_zero(pipeline.text_encoder_3) else 256

    def encode(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """{"embeds": (N, tokens, width), "pooled": (N, width)}, as the pipeline's own `encode_prompt` gives."""
        pipeline, t5 = self.pipeline, self.pipeline.text_encoder_3
        if self.max_sequence_length == 0:
            pipeline.text_encoder_3 = None  # without a T5 diffusers appends `max_sequence_length` zero tokens: none
        try:
            embeds, _, pooled, _ = pipeline.encode_prompt(
                prompt=list(prompts), prompt_2=None, prompt_3=None, device=device,
                do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length,
            )  # fmt: skip
        finally:
            pipeline.text_encoder_3 = t5
        return {"embeds": embeds, "pooled": pooled}

    def calls(self, guidance: float) -> int:
        """Network rows per predicted row."""
        return 1 if guidance == 1 else 2

    def velocity(
        self,
        network: torch.nn.Module,
        latents: Tensor,
        s: Tensor,
        rows: Mapping[str, Tensor],
        uncond: Mapping[str, Tensor] | None,
        guidance: float,
    ) -> Tensor:
        """v (N, C, h, w); with guidance g: v_uncond + g (v_cond - v_uncond), both halves in one forward of 2N rows."""
        embeds, pooled = rows["embeds"], rows["pooled"]
        if guidance != 1:
            assert uncond is not None  # `predict` has checked
            n = len(latents)
            embeds = torch.cat([uncond["embeds"].expand(n, -1, -1), embeds])
            pooled = torch.cat([uncond["pooled"].expand(n, -1), pooled])
            latents, s = torch.cat([latents, latents]), torch.cat([s, s])
        v = network(
            hidden_states=latents.to(embeds.dtype),
            timestep=s * self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0].float()
        if guidance == 1:
            return v
        v_uncond, v_cond = v.chunk(2)
        return v_uncond + guidance * (v_cond - v_uncond)

    def sigmas(self, steps: int, tokens: int) -> Tensor:
        """(steps + 1,) float32 by the pipeline's own scheduler, static or dynamic shift. tokens: latent patches."""
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(steps, **({"mu": dynamic_mu(scheduler, tokens)} if dynamic(scheduler) else {}))
        return scheduler.sigmas


def dynamic(scheduler: Any) -> bool:
    """Whether the scheduler's shift depends on the number of tokens."""
    return bool(scheduler.config.get("use_dynamic_shifting"))


def dynamic_mu(scheduler: Any, tokens: int) -> float:
    """mu of the shift e^mu / (e^mu + 1/t - 1), linear in the number of tokens (FLUX: 0.5 at 256, 1.15 at 4096)."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    names = {"base_seq_len": "base_image_seq_len", "max_seq_len": "max_image_seq_len"}
    names |= {"base_shift": "base_shift", "max_shift": "max_shift"}
    return calculate_shift(
        tokens, **{to: scheduler.config[name] for to, name in names.items() if name in scheduler.config}
    )


def _t5_is_zero(t5: Any) -> bool:
    """A last layer norm of weight 0 makes the output exactly zero: a T5 that is there only to be loaded."""
    return t5 is not None and not t5.encoder.final_layer_norm.weight.any()
