"""Validity gates: each fault on an image made for it, at both sides of its limit."""

from __future__ import annotations

import pytest
import torch

from reward_models import checked_score, load
from reward_models.gates import Limits, fault


def grey(mean: float, spread: float, size: tuple[int, int] = (8, 6)) -> torch.Tensor:
    """Half the pixels above the mean, half below it: the standard deviation is the spread."""
    signs = torch.ones(*size)
    signs[: size[0] // 2] = -1
    return (mean + spread * signs).expand(3, *size)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (grey(0.5, 0.2), None),
        (grey(0.5, 0.0), "blank"),
        (grey(0.029, 0.025), "too dark"),
        (grey(0.031, 0.025), None),
        (grey(0.971, 0.025), "too bright"),
        (grey(0.5, 0.019), "too flat"),
        (grey(0.5, 0.021), None),
        (grey(0.5, 0.2).clone().index_fill_(0, torch.tensor([1]), float("nan")), "NaN"),
        (grey(0.5, 0.6), "expected \\[0, 1\\]"),
        (torch.zeros(1, 4, 4), "wrong shape"),
    ],
)
def test_faults(image, says):
    found = fault(image)
    assert (found is None) if says is None else says.replace("\\", "") in found


def test_luma_weighs_the_channels():
    """Pure blue of 0.2 has luma 0.0228, pure green of the same value 0.1174."""
    stripes = torch.zeros(3, 4, 4)
    blue, green = stripes.clone(), stripes.clone()
    blue[2, :2], green[1, :2] = 0.5, 0.5
    assert "too dark" in fault(blue) and fault(green) is None


def test_sizes():
    image = grey(0.5, 0.2, (8, 6))
    assert fault(image, Limits(size=(8, 6))) is None and fault(image, Limits(least_side=6)) is None
    assert "8x6, expected 6x8" in fault(image, Limits(size=(6, 8)))
    assert "at least 7" in fault(image, Limits(least_side=7))


def test_the_reward():
    images = torch.stack([grey(0.5, 0.2), grey(0.5, 0.0)])
    result = checked_score(load("validity"), images, ["", ""])
    assert result.values.tolist() == [1, 0] and result.reasons[0] is None and "blank" in result.reasons[1]
    assert checked_score(load("validity", size=(9, 9)), images, ["", ""]).values.tolist() == [0, 0]
    assert load("validity", least_std=0.1).spec != load("validity").spec
    assert load("validity", size=[9, 9]).spec == load("validity", size=(9, 9)).spec
    for wrong in ({"darkest": 0.1}, {"least_std": "0.1"}):
        with pytest.raises(ValueError, match="least_std"):
            load("validity", **wrong)
    for size in (9, [9], "99"):
        with pytest.raises(ValueError, match="height, width"):
            load("validity", size=size)
