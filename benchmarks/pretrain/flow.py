"""The transformer of tiny-sd3 and its text encoders, trained together by flow matching on Shapes latents.

``x_s = (1 - s) x0 + s e``, target ``v = e - x0``, mean squared error, s from a logit-normal (Esser et al. 2024,
arXiv 2403.03206, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPTokenizer

from flowrl.distributed import World

from .data import scene_batch
from .loop import ALONE, fast_precision, fit, share
from .text import WIDTH, TextEncoders, token_ids, vocabulary_hash
from .vae import LATENT_CHANNELS

UNCONDITIONAL = 0.1  # share of empty prompts, for guidance
PADDED = 0.25  # share of prompts followed by the zero tokens that plain pipelines append
ZERO_TOKENS = 256  # diffusers' default length of the T5's part


def build() -> SD3Transformer2DModel:
    """Four blocks of width 160; 8x8 latents in patches of 2 are 16 tokens. Modulations start at 0 (adaLN-zero)."""
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=160,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1_context.linear.weight)
    nn.init.zeros_(model.norm_out.linear.weight)
    nn.init.zeros_(model.proj_out.weight)
    return model


class _RepeatLastKey(TorchFunctionMode):
    """Attention inside sees its last key ``counts`` (N,) times over: weight n of exp(q k) is log n on the logit."""

    def __init__(self, counts: Tensor) -> None:
        super().__init__()
        self.logs = counts.float().log()[:, None, None]  # 0 times: -inf, the key is not there

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key = args[:2]
        bias = query.new_zeros(len(query), 1, 1, key.shape[-2])
        bias[..., -1] = self.logs
        return func(*args, **{**(kwargs or {}), "attn_mask": bias})


class TextToImage(nn.Module):
    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text = TextEncoders(tokenizer)
        self.transformer = build()

    def forward(self, x: Tensor, s: Tensor, ids: Tensor, zero_tokens: Tensor | None = None) -> Tensor:
        """Velocity (N, C, 8, 8); ``zero_tokens`` (N,): how many zeros follow the tokens of each prompt.

        Tokens of text have no position here, so equal ones stay equal in every block: one of them, counted many times
        by the attention, is exact (in bfloat16 log 256 rounds to that of 252) and costs 256 times less.
        """
        states, pooled = self.text(ids)
        if zero_tokens is None:
            return self.transformer(x, states, pooled, 1000 * s, return_dict=False)[0]
        states = torch.cat([states, states.new_zeros(len(x), 1, states.shape[-1])], 1)
        with _RepeatLastKey(zero_tokens):
            return self.transformer(x, states, pooled, 1000 * s, return_dict=False)[0]


def encode_latents(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    folder: Path,
    *,
    seed: int = 0,
    scenes: int = 65536,
    batch: int = 256,
) -> Path:
    """Scenes to latents, once: ``latents`` (n, 8, 8, 8) fp16 of mean 0 and std 1 over all elements, and the tokens of
    their prompts ``ids`` (n, length) int16.

    Written in shards, so that a stopped run goes on where it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "latents.safetensors"
    if path.exists():
        return path
    shards = []
    per_shard = 32 * batch
    for first in range(0, scenes, per_shard):
        shard = folder / f"shard_{first:08d}.safetensors"
        if not shard.exists():
            latents, ids = [], []
            for step in range(first // batch, min(first + per_shard, scenes) // batch):
                metadata, pictures = scene_batch(seed, 3, step, batch)
                with torch.no_grad(), fast_precision(vae.device):
                    x = (2 * pictures - 1).to(vae.device, memory_format=torch.channels_last)
                    latents.append(vae.encode(x).latent_dist.mode().float().cpu())
                ids.append(token_ids(tokenizer, [m["prompt"] for m in metadata]).short())
            save_file({"latents": torch.cat(latents).contiguous(), "ids": torch.cat(ids)}, shard)
            print(f"latents {min(first + per_shard, scenes)}/{scenes}", flush=True)
        shards.append(load_file(shard))
    everything = torch.cat([s["latents"] for s in shards])
    shift, scale = everything.mean(), 1 / everything.std()
    tensors = {
        "latents": ((everything - shift) * scale).half(),
        "ids": torch.cat([s["ids"] for s in shards]),
        "shift": shift,
        "scale": scale,
    }
    save_file(tensors, path)
    return path


def train(
    data: dict[str, Tensor],
    tokenizer: CLIPTokenizer,
    folder: Path,
    *,
    seed: int = 0,
    steps: int = 8500,
    batch: int = 192,
    lr: float = 1e-3,
    muon_lr: float = 2e-3,
    world: World = ALONE,
    save_every: int = 500,
    on_save: Callable[[TextToImage, int], None] | None = None,
) -> TextToImage:
    """Fit transformer and text encoders; returns them with their EMA weights."""
    torch.manual_seed(seed)
    device = world.device
    model = TextToImage(tokenizer).to(device)
    empty = token_ids(tokenizer, [""])

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(data["latents"]), (batch,), generator=g)
        unconditional = torch.rand(batch, 1, generator=g) < UNCONDITIONAL
        zeros = ZERO_TOKENS * (torch.rand(batch, generator=g) < PADDED)
        e = torch.randn(batch, *data["latents"].shape[1:], generator=g)
        s = torch.sigmoid(0.4 + 1.1 * torch.randn(batch, generator=g))
        x0, ids = data["latents"][rows].float(), torch.where(unconditional, empty, data["ids"][rows].long())
        x0, e, s, ids, zeros = (share(t, world).to(device) for t in (x0, e, s, ids, zeros))
        x = (1 - s[:, None, None, None]) * x0 + s[:, None, None, None] * e
        with fast_precision(device):
            v = model(x, s, ids, zeros).float()
        error = (v - (e - x0)).square().mean((1, 2, 3))
        return error.sum() / batch, {"loss": error.mean().item()}

    def save(step: int) -> None:
        if on_save is not None:
            on_save(model, step)

    settings = {"seed": seed, "batch": batch, "scenes": len(data["latents"]), "tokenizer": vocabulary_hash(tokenizer)}
    ema = fit(
        model, loss, folder, steps=steps, lr=lr, muon_lr=muon_lr, ema_decay=0.999, save_every=save_every, on_save=save,
        settings=settings, world=world,
    )  # fmt: skip
    model.load_state_dict(ema)
    return model


__all__ = ["TextToImage", "build", "encode_latents", "train"]
