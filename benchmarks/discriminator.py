"""Does the adversarial reward learn the tiny world: rendered pictures against those that tiny-sd3 draws?

    python -m benchmarks.discriminator [--out runs/discriminator.json]

One picture of each prompt is rendered (reference) and one is drawn (20 ODE steps, no guidance), so what a prompt asks
for tells them apart no more than chance. A part of the prompts is held out. The discriminator is a head on tiny-clip;
it sees the pictures in minibatches, and now and then is asked about held-out ones, through the path that a trainer
uses for scoring. Each loss is run, and hinge with the published paths of features (`compat`), three seeds each.
Four to five minutes of one CPU thread; the drawing is a small part of it.
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

import flowrl
from flowrl.sampling import SampleSettings, generate
from flowrl.statistics import mean_ci
from reward_models.adversarial import AdversarialReward
from reward_models.features import ImageFeatures, load_features
from reward_models.shapes import grammar
from reward_models.shapes.render import render, sample_scene

TRAIN, HELD_OUT, STEPS, EVERY, BATCH = 128, 64, 200, 20, 32
VARIANTS: dict[str, dict[str, Any]] = {
    "hinge": {"loss": "hinge"},
    "bce": {"loss": "bce"},
    "pairwise": {"loss": "pairwise"},
    "hinge, published paths": {"loss": "hinge", "compat": "adv_grpo"},
}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=TRAIN, help="prompts to learn from")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="prompts to judge by")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the discriminator")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    return parser


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


def auc(real: Tensor, fake: Tensor) -> float:
    """Share of pairs in order; ties count half."""
    difference = real[:, None] - fake
    return float((difference > 0).float().mean() + (difference == 0).float().mean() / 2)


def learn(
    features: ImageFeatures,
    options: Mapping[str, Any],
    real: Sequence[Tensor],
    fake: Sequence[Tensor],
    steps: int,
    seed: int,
) -> list[dict[str, float]]:
    """Held-out numbers after 0, 20, 40, ... steps.

    A pairwise critic has no natural zero: the threshold is half-way between the two means of the training pictures, for
    all variants alike.

    Args:
        features: backbone.
        options: of the reward.
        real, fake: pictures to learn from, pictures held out.
        steps: of the discriminator.
        seed: of its weights and minibatches.
    """
    reward = AdversarialReward(features, batch=BATCH, seed=seed, replay=0, **options)

    def score(images: Tensor) -> Tensor:
        return reward.score(images, [""] * len(images), [{}] * len(images)).values

    rows = []
    for done in range(0, steps + 1, EVERY):
        if done:
            reward.update(fake[0], real[0], done, steps=EVERY)
        threshold = float(score(real[0]).mean() + score(fake[0]).mean()) / 2
        r, f = score(real[1]), score(fake[1])
        estimate = mean_ci([[c] for c in correct(r, f, threshold).tolist()])
        rows.append(
            {"steps": done, "accuracy": estimate.mean, "low": estimate.low, "high": estimate.high, "auc": auc(r, f)}
        )
    return rows


def main() -> None:
    given = parser().parse_args()
    _, rendered, drawn = pictures(given.train + given.held_out)
    real, fake = rendered.split([given.train, given.held_out]), drawn.split([given.train, given.held_out])
    features = load_features("tiny-clip", chunk=256)
    found: dict[str, Any] = {"train": given.train, "held_out": given.held_out, "variants": {}}
    for name, options in VARIANTS.items():
        runs = [learn(features, options, real, fake, given.steps, seed) for seed in range(given.seeds)]
        found["variants"][name] = runs
        for seed, rows in enumerate(runs):
            first, last = next((row["steps"] for row in rows if row["accuracy"] >= 0.95), None), rows[-1]
            interval = f"[{last['low']:.3f}, {last['high']:.3f}]"
            print(
                f"{name}, seed {seed}: held-out accuracy {last['accuracy']:.3f} {interval}, AUC {last['auc']:.3f} "
                f"after {last['steps']} steps; 0.95 after {'-' if first is None else first}"
            )
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
