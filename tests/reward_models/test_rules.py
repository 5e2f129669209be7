"""JPEG sizes against values measured with the published code (libjpeg-turbo 3.2.0; others differ by a few bytes)."""

import numpy as np
import pytest
import torch
from PIL import features

from reward_models import rules
from reward_models.rules import JpegReward

GREY = np.full((512, 512, 3), 128)
RAMP = np.broadcast_to(np.floor(np.linspace(0, 255, 512))[None, :, None], (512, 512, 3))
NOISE = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)


@pytest.mark.parametrize(("pixels", "size"), [(GREY, 4_721), (RAMP, 15_593), (NOISE, 307_993)])
def test_jpeg_sizes(pixels, size):
    slack = 0 if features.version("libjpeg_turbo") == "3.2.0" else 0.002
    image = torch.tensor(pixels.copy(), dtype=torch.float32).permute(2, 0, 1)[None] / 255
    small = JpegReward().score(image, [""], [{}]).values
    large = JpegReward(incompressible=True).score(image, [""], [{}]).values
    assert large.item() == pytest.approx(size / 1000, rel=slack + 1e-6)
    assert small.item() == pytest.approx(-size / 500_000, rel=slack + 1e-6)


def test_simple_images_are_more_compressible():
    images = torch.tensor(np.stack([GREY, RAMP, NOISE]), dtype=torch.float32).permute(0, 3, 1, 2) / 255
    values = JpegReward().score(images, [""] * 3, [{}] * 3).values
    assert values[0] > values[1] > values[2]


def test_the_encoder_is_checked_when_the_reward_is_made(monkeypatch):
    assert rules.encoder().startswith("libjpeg") and JpegReward().spec.version.endswith(rules.encoder())
    rules.encoder.cache_clear()
    real = rules._size
    monkeypatch.setattr(rules, "_size", lambda pixels: real(pixels) * 101 // 100)  # finer tables: another encoder
    with pytest.raises(ValueError, match="another encoder"):
        JpegReward()
    monkeypatch.undo()
    assert rules.encoder()
