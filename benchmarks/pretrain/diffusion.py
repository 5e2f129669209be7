"""The UNet of tiny-sd and its text encoder, trained together to predict the noise in Shapes latents (DDPM).

``x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) e``, target ``e``, t uniform over the 1000 steps of Stable Diffusion's
scaled-linear table. The squared error of step t has weight ``min(SNR_t, 5) / SNR_t``, ``SNR = abar / (1 - abar)``
(Min-SNR, Hang et al. 2023, arXiv 2303.09556, section 3.4): nearly clean latents, of which there is most to predict and
least to learn about what a prompt asks for, count less.

The autoencoder is that of tiny-sd3, and so are the latents, but for their shift, which pipelines of diffusion models do
not know: it is put back here. The text encoder starts as the first one of tiny-sd3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from flowrl.distributed import World

from .loop import ALONE, fast_precision, fit, share
from .text import WIDTH, text_config, token_ids, vocabulary_hash
from .vae import LATENT_CHANNELS

UNCONDITIONAL = 0.1  # share of empty prompts, for guidance
SNR_LIMIT = 5.0
CHANNELS = (48, 112)  # of 8x8 and 4x4 latents: a forward takes about as long as one of tiny-sd3's transformer


def build() -> UNet2DConditionModel:
    """Convolutions at 8x8, and four blocks of attention (to itself, to the text) at 4x4. At first it says 0."""
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=8,
        use_linear_projection=True,
    )
    for parameter in model.conv_out.parameters():
        nn.init.zeros_(parameter)
    return model


def noise_levels() -> DDIMScheduler:
    """Stable Diffusion's table; sampling begins at the noisiest step (trailing, Lin et al. 2023, arXiv 2305.08891) and
    ends at the picture."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        timestep_spacing="trailing",
    )  # fmt: skip


def snr_weights(abar: Tensor) -> Tensor:
    """min(SNR, 5) / SNR of cumulative products abar."""
    snr = abar / (1 - abar)
    return snr.clamp(max=SNR_LIMIT) / snr


class TextToNoise(nn.Module):
    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text = CLIPTextModel(text_config(tokenizer))
        self.unet = build()

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Noise (N, C, 8, 8) in x (N, C, 8, 8) at steps t (N,); ids (N, L) of the prompts."""
        states = self.text(ids).last_hidden_state
        return self.unet(x, t, encoder_hidden_states=states, return_dict=False)[0]


def _hash(state: Mapping[str, Tensor] | None) -> str | None:
    if state is None:
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def train(
    data: dict[str, Tensor],
    tokenizer: CLIPTokenizer,
    folder: Path,
    *,
    text: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    steps: int = 8000,
    batch: int = 128,
    lr: float = 1e-3,
    muon_lr: float = 2e-3,
    world: World = ALONE,
    save_every: int = 500,
) -> TextToNoise:
    """Fit UNet and text encoder; returns them with their EMA weights.

    data: what `flow.encode_latents` wrote. text: state of the `CLIPTextModel` to start from; None: random weights.
    """
    torch.manual_seed(seed)
    device = world.device
    model = TextToNoise(tokenizer)
    if text is not None:
        model.text.load_state_dict(text)
    model.to(device)
    empty, offset = token_ids(tokenizer, [""]), float(data["shift"] * data["scale"])
    table = noise_levels().alphas_cumprod

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(data["latents"]), (batch,), generator=g)
        unconditional = torch.rand(batch, 1, generator=g) < UNCONDITIONAL
        e = torch.randn(batch, *data["latents"].shape[1:], generator=g)
        t = torch.randint(len(table), (batch,), generator=g)
        x0, ids = data["latents"][rows].float() + offset, torch.where(unconditional, empty, data["ids"][rows].long())
        x0, e, t, ids = (share(tensor, world) for tensor in (x0, e, t, ids))
        abar = table[t][:, None, None, None]
        x = (abar.sqrt() * x0 + (1 - abar).sqrt() * e).to(device)
        with fast_precision(device):
            said = model(x, t.to(device), ids.to(device)).float()
        error = (said - e.to(device)).square().mean((1, 2, 3))
        weighted = snr_weights(table[t]).to(device) * error
        return weighted.sum() / batch, {"loss": weighted.mean().item(), "error": error.mean().item()}

    settings = {
        "seed": seed, "batch": batch, "scenes": len(data["latents"]), "tokenizer": vocabulary_hash(tokenizer),
        "text": _hash(text),
    }  # fmt: skip
    ema = fit(
        model, loss, folder, steps=steps, lr=lr, muon_lr=muon_lr, ema_decay=0.999, save_every=save_every,
        settings=settings, world=world,
    )  # fmt: skip
    model.load_state_dict(ema)
    return model
