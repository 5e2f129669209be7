"""The autoencoder of the box: 64x64 pixels to 8x8x8 latents, under a million parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from flowrl.distributed import World

from .data import scene_batch
from .loop import ALONE, CPU, fast_precision, fit, load_ema, share

LATENT_CHANNELS = 8
KL_WEIGHT = 2e-3  # small: a latent space smooth enough for the flow, pictures still crisp
EDGE_WEIGHT = 4.0  # outlines are few pixels, and all that makes a shape


def build() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def edge_weights(pictures: Tensor) -> Tensor:
    """(N, 1, H, W): 1 on plain areas, up to 1 + EDGE_WEIGHT within a pixel of an outline."""
    span = torch.nn.functional.max_pool2d(pictures, 3, 1, 1) + torch.nn.functional.max_pool2d(-pictures, 3, 1, 1)
    return 1 + EDGE_WEIGHT * span.amax(1, keepdim=True)


def train(
    folder: Path,
    *,
    seed: int = 0,
    steps: int = 3000,
    batch: int = 16,
    lr: float = 1.5e-3,
    world: World = ALONE,
    save_every: int = 500,
) -> AutoencoderKL:
    """Fit the autoencoder and return it with its EMA weights (without the scaling of the latents)."""
    torch.manual_seed(seed)
    device = world.device
    model = build().to(device, memory_format=torch.channels_last)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        pictures = share(scene_batch(seed, 1, step, batch)[1], world).to(device, memory_format=torch.channels_last)
        noise = torch.Generator().manual_seed(seed * 1_000_003 + step)
        with fast_precision(device):
            posterior = model.encode(2 * pictures - 1).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            latents = mean + torch.exp(0.5 * logvar) * share(
                torch.randn(batch, *mean.shape[1:], generator=noise), world
            ).to(device)
            decoded = (model.decode(latents).sample.float() + 1) / 2
        error = (decoded - pictures).abs()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        value = ((error * edge_weights(pictures)).mean() + KL_WEIGHT * kl) * len(pictures) / batch
        mse = (decoded - pictures).square().mean().item()
        return value, {"l1": error.mean().item(), "mse": mse, "kl": kl.item()}

    def show(step: int) -> None:
        pictures = scene_batch(seed, 2, 0, 8)[1].to(device)
        with torch.no_grad():
            decoded = (model.decode(model.encode(2 * pictures - 1).latent_dist.mode()).sample + 1) / 2
        rows = torch.cat([torch.cat(list(pictures), 2), torch.cat(list(decoded.clamp(0, 1)), 2)], 1)
        sheet = Image.fromarray((rows.permute(1, 2, 0) * 255).round().byte().cpu().numpy())
        large = sheet.resize((3 * sheet.width, 3 * sheet.height), Image.Resampling.NEAREST)
        large.save(folder / f"step_{step:06d}.png")

    ema = fit(
        model, loss, folder, steps=steps, lr=lr, ema_decay=0.998, save_every=save_every, on_save=show,
        settings={"seed": seed, "batch": batch}, world=world,
    )  # fmt: skip
    model.load_state_dict(ema)
    return model


def load(folder: Path, device: torch.device = CPU) -> AutoencoderKL:
    """The trained autoencoder of a folder, frozen. Raises UserError if there is none."""
    model = build()
    load_ema(model, folder)
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
