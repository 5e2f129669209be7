"""Random-weight pipelines of every supported class, built in-process in a fraction of a second, with no download."""

import json
from pathlib import Path

import torch

from reward_models.torchvision_ops import ready

ready()  # in a process of its own too, see conftest
WORDS = "a photo of red green blue yellow circle square triangle star two three four and left above cat dog".split()


def clip_tokenizer(folder: Path, max_length: int = 16):
    """A CLIP tokenizer whose vocabulary is the letters and a few whole words."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            if pieces[0] not in tokens:
                tokens.append(pieces[0])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=max_length, pad_token="<|endoftext|>")


def t5_tokenizer():
    """A T5 tokenizer of letters."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(c) for c in range(ord("a"), ord("z") + 1))]
    return T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def _clip(tokenizer, cls, max_length: int, width: int = 16):
    from transformers import CLIPTextConfig

    vocabulary = tokenizer.get_vocab()
    return cls(
        CLIPTextConfig(
            hidden_size=width, intermediate_size=2 * width, num_attention_heads=2, num_hidden_layers=2,
            vocab_size=len(vocabulary), max_position_embeddings=max_length, projection_dim=width,
            bos_token_id=vocabulary["<|startoftext|>"], eos_token_id=vocabulary["<|endoftext|>"],
            pad_token_id=vocabulary["<|endoftext|>"],
        )
    )  # fmt: skip


def _t5(zero: bool):
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(
        T5Config(vocab_size=30, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2, is_encoder_decoder=False)
    )
    if zero:
        model.encoder.final_layer_norm.weight.data.zero_()
    return model


def _vae(channels: int):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16), layers_per_block=1,
        latent_channels=channels, norm_num_groups=4, sample_size=16, shift_factor=0.0609, scaling_factor=1.5035,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def _finish(pipeline):
    """Eval mode (a fresh T5 has dropout), no progress bar, weights in zero-initialised layers of the network."""
    for parameter in (pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer).parameters():
        if parameter.ndim >= 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sd3(folder: Path, seed: int = 0, t5: str = "zero", shift: float = 3.0):
    """A `StableDiffusion3Pipeline` of 16 x 16 px (latents 4 x 8 x 8). t5: "zero", "real" or "none"."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first, second = clip_tokenizer(folder / "tok1"), clip_tokenizer(folder / "tok2")
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=32, pooled_projection_dim=32,
            pos_embed_max_size=16, qk_norm="rms_norm",
        )  # fmt: skip
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=_vae(4),
            text_encoder=_clip(first, CLIPTextModelWithProjection, 16),
            tokenizer=first,
            text_encoder_2=_clip(second, CLIPTextModelWithProjection, 16),
            tokenizer_2=second,
            text_encoder_3=None if t5 == "none" else _t5(zero=t5 == "zero"),
            tokenizer_3=None if t5 == "none" else t5_tokenizer(),
        )
        return _finish(pipeline)


def tiny_flux(folder: Path, seed: int = 0, guidance_embeds: bool = True):
    """A `FluxPipeline` whose latents are 4 x (2 per packed token) and whose VAE halves the image side."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(folder / "tok1")
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance_embeds,
        )  # fmt: skip
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0,
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=1.15,
                base_image_seq_len=256,
                max_image_seq_len=4096,
            ),
            vae=_vae(4),
            text_encoder=_clip(tokenizer, CLIPTextModel, 16),
            tokenizer=tokenizer,
            text_encoder_2=_t5(zero=False),
            tokenizer_2=t5_tokenizer(),
            transformer=transformer,
        )
        return _finish(pipeline)


def _unet(**more):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, norm_num_groups=2, **{"cross_attention_dim": 16, **more},
    )  # fmt: skip


def _betas(**more):
    """The noise levels of Stable Diffusion, and the end of its schedule (at timestep 0)."""
    levels = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return levels | {"clip_sample": False, "set_alpha_to_one": False} | more


def _diffusion_vae():
    """Without a shift, as the pipelines of diffusion models want it."""
    vae = _vae(4)
    vae.register_to_config(shift_factor=None, scaling_factor=0.18215)
    return vae


def tiny_sd(folder: Path, seed: int = 0, **scheduler):
    """A `StableDiffusionPipeline` of 16 x 16 px (latents 4 x 8 x 8); scheduler: settings of its DDIMScheduler."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(folder / "tok1")
        return _finish(
            StableDiffusionPipeline(
                vae=_diffusion_vae(), text_encoder=_clip(tokenizer, CLIPTextModel, 16), tokenizer=tokenizer,
                unet=_unet(), scheduler=DDIMScheduler(**_betas(**scheduler)), safety_checker=None,
                feature_extractor=None, requires_safety_checker=False,
            )
        )  # fmt: skip


def tiny_lcm(folder: Path, seed: int = 0, **scheduler):
    """A `LatentConsistencyModelPipeline` of 16 x 16 px whose UNet embeds its guidance."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler
    from transformers import CLIPTextModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(folder / "tok1")
        levels = {key: value for key, value in _betas().items() if key != "steps_offset"}
        return _finish(
            LatentConsistencyModelPipeline(
                vae=_diffusion_vae(), text_encoder=_clip(tokenizer, CLIPTextModel, 16), tokenizer=tokenizer,
                unet=_unet(time_cond_proj_dim=16), scheduler=LCMScheduler(**levels | scheduler),
                safety_checker=None, feature_extractor=None, requires_safety_checker=False,
            )
        )  # fmt: skip


def tiny_sdxl(folder: Path, seed: int = 0, zeros: bool = True, **scheduler):
    """A `StableDiffusionXLPipeline` of 16 x 16 px. zeros: of its unconditional row."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first, second = clip_tokenizer(folder / "tok1"), clip_tokenizer(folder / "tok2")
        unet = _unet(
            cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16, transformer_layers_per_block=(1, 2),
        )  # fmt: skip
        return _finish(
            StableDiffusionXLPipeline(
                vae=_diffusion_vae(), text_encoder=_clip(first, CLIPTextModel, 16), tokenizer=first,
                text_encoder_2=_clip(second, CLIPTextModelWithProjection, 16), tokenizer_2=second, unet=unet,
                scheduler=DDIMScheduler(**_betas(**scheduler)), force_zeros_for_empty_prompt=zeros,
                add_watermarker=False,
            )
        )  # fmt: skip
