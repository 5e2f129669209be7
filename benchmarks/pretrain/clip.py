"""tiny-clip: a CLIPModel trained from nothing on Shapes scenes, to judge pictures that it was not used to train.

A batch is made of groups of near misses (captions that differ in one thing, each with its picture), and every picture
also meets near-miss captions without pictures. The loss is CLIP's, in which captions that happen to be true of another
picture of the batch are left out. Heads that are thrown away afterwards help it to learn (see ``heads``).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, normalize, pad
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from flowrl.distributed import World
from reward_models.shapes.grammar import PHRASES
from reward_models.shapes.render import SIZE, Scene, render, sample_scene

from .captions import captions, near_misses, one_near_miss, true_of
from .data import TASK_SHARES, to_tensor
from .heads import Heads, caption_loss, patch_loss, scene_loss
from .loop import CPU, fast_precision, fit
from .text import text_config, token_ids, vocabulary_hash

PATCH, WIDTH, LAYERS, PROJECTION = 8, 128, 4, 128
MEAN, STD = (0.8, 0.8, 0.8), (0.3, 0.3, 0.3)  # of the pixels, for the preprocessor
GROUP = 8  # near misses side by side
ALONE = 3  # near-miss captions without a picture, for each picture
HEAD_WEIGHT = 0.5
LOGIT_SCALE_MAX = math.log(50.0)
LATENT_NOISE = 0.3  # at most, in standard deviations of the latents


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": PATCH,
        "projection_dim": PROJECTION,
    }
    text = {**text_config(tokenizer).to_dict(), "projection_dim": PROJECTION}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))


class Trainee(nn.Module):
    """The model, and the heads that are only there to help it learn."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.clip = build(tokenizer)
        self.heads = Heads(WIDTH, PROJECTION)

    def forward(self, pictures: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, H, W) in [0, 1] and (M, L) to features (N, D) and (M, D), and the last but one patch tokens."""
        mean, std = (pictures.new_tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
        seen = self.clip.vision_model((pictures - mean) / std, output_hidden_states=True)
        image = self.clip.visual_projection(seen.pooler_output)
        text = self.clip.text_projection(self.clip.text_model(ids).pooler_output)
        return image.float(), text.float(), seen.hidden_states[-2][:, 1:]

    def model(self) -> CLIPModel:
        """The part that is kept, with the logit scale as it was used."""
        with torch.no_grad():
            self.clip.logit_scale.clamp_(max=LOGIT_SCALE_MAX)
        return self.clip


def draw_batch(rng: np.random.Generator, size: int) -> tuple[list[str], list[Scene], list[str]]:
    """`size` captions with their scenes, in groups of near misses, and captions without scenes (no phrases yet)."""
    table = captions()
    by_task = {task: [text for text, m in table.items() if m["tag"] == task] for task in TASK_SHARES}
    texts: list[str] = []
    while len(texts) < size:
        task = by_task[str(rng.choice(list(TASK_SHARES), p=list(TASK_SHARES.values())))]
        first = task[int(rng.integers(len(task)))]
        group = [first]
        while len(group) < min(GROUP, size - len(texts), 1 + sum(map(len, near_misses(first).values()))):
            other = one_near_miss(first, rng)
            group += [other] * (other not in group)
        texts += group
    scenes = [sample_scene(table[text], rng) for text in texts]
    alone = [one_near_miss(text, rng) for text in texts for _ in range(ALONE)]
    return texts, scenes, [text for text in dict.fromkeys(alone) if text not in texts]


def with_phrase(texts: list[str], rng: np.random.Generator) -> list[str]:
    return [f"{PHRASES[int(rng.integers(len(PHRASES)))]} {text}" for text in texts]


def blur(pictures: Tensor, sigma: float = 0.8) -> Tensor:
    taps = torch.exp(-(torch.arange(-2, 3).to(pictures) ** 2) / (2 * sigma**2))
    kernel = (taps / taps.sum()).view(1, 1, 5, 1).expand(3, 1, 5, 1)
    padded = pad(pictures, (2, 2, 2, 2), mode="replicate")
    return conv2d(conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


@torch.no_grad()
def augment(pictures: Tensor, vae: AutoencoderKL | None, g: torch.Generator) -> Tensor:
    """What a decoder may do to a picture: up to sigma 0.8 of blur, noise, brightness; one group goes through `vae`."""
    n = len(pictures)
    u = torch.rand(4, n, 1, 1, 1, generator=g).to(pictures.device)
    noise = torch.randn(pictures.shape, generator=g).to(pictures.device)
    if vae is not None:
        first = int(torch.randint(max(n // GROUP, 1), (), generator=g)) * GROUP
        some = slice(first, first + GROUP)
        with fast_precision(pictures.device):
            z = vae.encode(2 * pictures[some] - 1).latent_dist.mode()
            jitter = torch.randn(z.shape, generator=g).to(z) * torch.rand(len(z), 1, 1, 1, generator=g).to(z)
            decoded = vae.decode(z + LATENT_NOISE * z.std() * jitter).sample
        pictures = torch.cat([pictures[:first], (decoded.float() + 1) / 2, pictures[first + GROUP :]])
    pictures = pictures + u[0] * (blur(pictures) - pictures)
    return ((0.9 + 0.2 * u[1]) * pictures + 0.06 * (u[2] - 0.5) + 0.04 * u[3] * noise).clamp(0, 1)


def contrast(image: Tensor, text: Tensor, scale: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's loss and the share of pictures that find their caption.

    image (N, D), text (M, D), M >= N; caption i belongs to picture i; pairs that are `true` (N, M) beside these are no
    negatives.
    """
    own = torch.arange(len(image), device=image.device)
    others_true = true.clone()
    others_true[own, own] = False
    logits = (scale * image @ text.T).masked_fill(others_true, -torch.inf)
    value = (cross_entropy(logits, own) + cross_entropy(logits[:, : len(image)].T, own)) / 2
    return value, (logits.argmax(1) == own).float().mean()


def train(
    folder: Path,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL | None = None,
    *,
    seed: int = 0,
    steps: int = 2500,
    batch: int = 64,
    lr: float = 1.5e-3,
    muon_lr: float = 2e-3,
    device: torch.device = CPU,
    save_every: int = 250,
) -> CLIPModel:
    """Fit tiny-clip and return it with its EMA weights; with a `vae`, one group of each batch is seen through it."""
    torch.manual_seed(seed)
    model = Trainee(tokenizer).to(device)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, 4, step])
        texts, scenes, alone = draw_batch(rng, batch)
        true = torch.from_numpy(true_of([*texts, *alone], scenes)).to(device)
        ids = token_ids(tokenizer, with_phrase([*texts, *alone], rng)).to(device)
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        pictures = augment(to_tensor([render(scene) for scene in scenes]).to(device), vae, g)
        said = [captions()[text] for text in (*texts, *alone)]
        with fast_precision(device):
            image, text, tokens = model(pictures, ids)
            patches, of_scenes, of_captions = model.heads.patches(tokens), model.heads(image), model.heads(text)
        scale = model.clip.logit_scale.clamp(max=LOGIT_SCALE_MAX).exp()
        value, right = contrast(normalize(image, dim=1), normalize(text, dim=1), scale, true)
        seen = patch_loss(patches, scenes, PATCH) + scene_loss(of_scenes, scenes)
        read = caption_loss(of_captions, said)
        numbers = {"clip": value, "right": right, "seen": seen, "read": read, "scale": scale}
        return value + HEAD_WEIGHT * (seen + read), {name: number.item() for name, number in numbers.items()}

    settings = {"seed": seed, "batch": batch, "vae": vae is not None, "tokenizer": vocabulary_hash(tokenizer)}
    ema = fit(
        model, loss, folder, steps=steps, lr=lr, muon_lr=muon_lr, ema_decay=0.998, save_every=save_every,
        settings=settings, world=World(0, 1, device),
    )  # fmt: skip
    model.load_state_dict(ema)
    return model.model()
