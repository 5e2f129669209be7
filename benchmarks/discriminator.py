"""Does the adversarial reward learn the tiny world: rendered pictures against those that tiny-sd3 draws?

    python -m benchmarks.discriminator [--out runs/discriminator.json]

One picture of each prompt is rendered (reference) and one is drawn (20 ODE steps, no guidance), so what a prompt asks
for tells them apart no more than chance. A part of the prompts is held out. The discriminator sees the pictures in
minibatches, and now and then is asked about held-out ones, through the path that a trainer uses for scoring.

Two kinds: a head on tokens, which does not read the prompt ("tokens"), and the last layers of tiny-clip itself, trained
to prefer the reference of a prompt ("preference"). A perfect judge of prompts alone would put the reference first
wherever the drawn picture is wrong and guess elsewhere: the "ceiling" that is printed. Tokens are those of tiny-clip,
or "residuals", the sizes of the differences between neighbouring pixels. Three seeds each.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

import flowrl
from flowrl.sampling import SampleSettings, generate
from flowrl.statistics import mean_ci
from reward_models import load
from reward_models.adversarial import AdversarialReward
from reward_models.features import ImageFeatures, load_features
from reward_models.preprocess import Preprocessing
from reward_models.protocol import Metadata
from reward_models.shapes import grammar
from reward_models.shapes.render import render, sample_scene

TRAIN, HELD_OUT, STEPS, EVERY, BATCH = 512, 256, 200, 20, 32
PREFERENCE: dict[str, Any] = {"critic": "preference", "layers": 2, "lr": 1e-4}
VARIANTS: dict[str, dict[str, Any]] = {
    "residuals, hinge": {"loss": "hinge"},
    "tokens, hinge": {"loss": "hinge"},
    "tokens, bce": {"loss": "bce"},
    "tokens, pairwise": {"loss": "pairwise"},
    "tokens, hinge, published paths": {"loss": "hinge", "compat": "adv_grpo"},
    "preference": PREFERENCE,
}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=TRAIN, help="prompts to learn from")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="prompts to judge by")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the discriminator")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=0, help="seed of the pictures")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    return parser


def residuals(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of 8 x 8 px: the mean over a patch of log(1 + |difference to the next pixel| in 8-bit levels), and a 1.

    Images (N, 3, H, W) -> whole image (N, 7), patches (N, M, 7), and the first again: per colour, across and down.
    """
    across, down = images.diff(dim=3).abs(), images.diff(dim=2).abs()
    sizes = torch.log1p(255 * torch.cat([pad(across, (0, 1, 0, 0)), pad(down, (0, 0, 0, 1))], dim=1))
    patches = pad(avg_pool2d(sizes, 8).flatten(2).mT, (0, 1), value=1.0)
    return patches.mean(1), patches, patches.mean(1)


def backbone(name: str, options: Mapping[str, Any]) -> str | ImageFeatures:
    """What a variant looks through. A preference critic loads its own, as its layers are trained."""
    if options.get("critic") == "preference":
        return "tiny-clip"
    if not name.startswith("residuals"):
        return load_features("tiny-clip", chunk=256)
    as_is = Preprocessing(64, "squeeze", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return ImageFeatures(residuals, None, None, "residuals", "1", as_is, 7, "-", torch.device("cpu"), 256)


def pictures(count: int, seed: int = 0) -> tuple[list[str], Tensor, Tensor]:
    """(prompts, rendered, drawn): one picture each, (count, 3, 64, 64), of as many different prompts."""
    wanted = [dict(m) for m in grammar.prompts("train")]
    random.Random(seed).shuffle(wanted)
    texts = [str(m["prompt"]) for m in wanted[:count]]
    rng = np.random.default_rng(seed)
    rendered = np.stack([render(sample_scene(m, rng)) for m in wanted[:count]])
    policy = flowrl.load_policy("tiny-sd3")
    drawn = torch.cat([images for _, images in generate(policy, texts, SampleSettings(seed=seed))])
    return texts, torch.from_numpy(rendered).permute(0, 3, 1, 2).float() / 255, drawn


def correct(real: Tensor, fake: Tensor, threshold: float) -> Tensor:
    """(N,) share of right answers on the two pictures of each prompt, 0, 0.5 or 1."""
    return ((real > threshold).float() + (fake < threshold).float()) / 2


def in_order(real: Tensor, fake: Tensor) -> Tensor:
    """1 where the first is greater, 0.5 where they are equal, else 0."""
    return (real > fake).float() + (real == fake).float() / 2


def learn(
    features: str | ImageFeatures,
    options: Mapping[str, Any],
    prompts: Sequence[Sequence[str]],
    real: Sequence[Tensor],
    fake: Sequence[Tensor],
    steps: int,
    seed: int,
) -> list[dict[str, float]]:
    """Held-out numbers after 0, 20, 40, ... steps.

    "pairs" is the share of prompts whose reference scores above their drawn picture, with a 95 % interval over prompts;
    "auc" the same over all pairs of pictures; "accuracy" that of a threshold. A pairwise critic has no natural zero:
    the threshold is half-way between the two means of the training pictures, for all variants alike.

    Args:
        features: backbone.
        options: of the reward.
        prompts, real, fake: those to learn from, those held out.
        steps: of the discriminator.
        seed: of its weights and minibatches.
    """
    reward = AdversarialReward(features, batch=BATCH, seed=seed, replay=0, chunk=256, **options)
    words = list(prompts[0]) if options.get("critic") == "preference" else None

    def score(images: Tensor, texts: Sequence[str]) -> Tensor:
        return reward.score(images, list(texts), [{}] * len(images)).values

    rows = []
    for done in range(0, steps + 1, EVERY):
        if done:
            reward.update(fake[0], real[0], done, prompts=words, steps=EVERY)
        threshold = float(score(real[0], prompts[0]).mean() + score(fake[0], prompts[0]).mean()) / 2
        r, f = score(real[1], prompts[1]), score(fake[1], prompts[1])
        pairs = mean_ci([[c] for c in in_order(r, f).tolist()])
        rows.append(
            {
                "steps": done,
                "pairs": pairs.mean, "low": pairs.low, "high": pairs.high,
                "accuracy": float(correct(r, f, threshold).mean()),
                "auc": float(in_order(r[:, None], f).mean()),
            }
        )  # fmt: skip
    return rows


def ceiling(drawn: Tensor, texts: Sequence[str]) -> float:
    """Share of pairs that a judge orders who reads the prompt perfectly and cannot tell right pictures apart."""
    metadata: list[Metadata] = [grammar.parse(text) or {} for text in texts]
    right = load("shapes").score(drawn, list(texts), metadata).values
    return float((1 - right + right / 2).mean())


def main() -> None:
    given = parser().parse_args()
    texts, rendered, drawn = pictures(given.train + given.held_out, given.pictures)
    parts = [given.train, given.held_out]
    prompts = [texts[: given.train], texts[given.train :]]
    real, fake = rendered.split(parts), drawn.split(parts)
    best = ceiling(fake[1], prompts[1])
    print(f"{given.held_out} held-out prompts; ceiling of pairs for a perfect judge of prompts {best:.3f}")
    found: dict[str, Any] = {"train": given.train, "held_out": given.held_out, "ceiling": best, "variants": {}}
    for name in given.variants:
        options = VARIANTS[name]
        runs = [
            learn(backbone(name, options), options, prompts, real, fake, given.steps, seed)
            for seed in range(given.seeds)
        ]
        found["variants"][name] = runs
        for seed, rows in enumerate(runs):
            first, last = rows[0], rows[-1]
            print(
                f"{name}, seed {seed}: pairs in order {first['pairs']:.3f} -> {last['pairs']:.3f} "
                f"[{last['low']:.3f}, {last['high']:.3f}], accuracy {first['accuracy']:.3f} -> {last['accuracy']:.3f}, "
                f"AUC {first['auc']:.3f} -> {last['auc']:.3f} after {last['steps']} steps",
                flush=True,
            )
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
