"""The discriminator's benchmark: its counts by hand, and a short run on pictures anyone can tell apart."""

import numpy as np
import pytest
import torch

from benchmarks.discriminator import correct, in_order, learn, residuals
from reward_models.features import load_features
from reward_models.shapes.grammar import prompts
from reward_models.shapes.render import render, sample_scene


def test_counts_by_hand():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])
    assert correct(real, fake, 0.5).tolist() == [0.5, 0.5]
    assert in_order(real, fake).tolist() == [1.0, 0.5]
    assert float(in_order(real[:, None], fake).mean()) == pytest.approx((1 + 1 + 0 + 0.5) / 4)


def test_residuals_by_hand():
    image = torch.zeros(1, 3, 16, 8)
    image[0, 1, :8, 3] = 3 / 255  # a green line in the upper patch: two steps across, one down at its lower end
    whole, patches, _ = residuals(image)
    want = torch.zeros(2, 7)
    want[0, 1], want[0, 4], want[:, 6] = 8 * 2 * np.log(4) / 64, np.log(4) / 64, 1
    torch.testing.assert_close(patches[0], want)
    torch.testing.assert_close(whole[0], want.mean(0))


def test_noisy_pictures_are_told_from_clean_ones():
    rng = np.random.default_rng(0)
    clean = torch.from_numpy(np.stack([render(sample_scene(m, rng)) for m in prompts("train")[:24]]))
    clean = clean.permute(0, 3, 1, 2).float() / 255
    noisy = (clean + 0.2 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    texts = [["a shape"] * 16, ["a shape"] * 8]
    rows = learn(load_features("tiny-clip"), {"lr": 1e-3}, texts, clean.split(16), noisy.split(16), steps=20, seed=0)
    assert [row["steps"] for row in rows] == [0, 20]
    assert rows[-1]["auc"] > 0.95 and rows[-1]["low"] <= rows[-1]["pairs"] <= rows[-1]["high"]
