"""Fitting images to networks, against torchvision and by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reward_models import preprocess as p
from reward_models.torchvision_ops import optional, ready

SIDES = st.integers(1, 90)


def images(h, w, seed=0):
    return torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def T():
    ready()
    from torchvision.transforms import functional

    return functional


@given(h=SIDES, w=SIDES, antialias=st.booleans(), mode=st.sampled_from(["bicubic", "bilinear"]))
def test_crop_is_torchvision_s(T, h, w, antialias, mode):
    x, size = images(h, w), 16
    kind = {"bicubic": T.InterpolationMode.BICUBIC, "bilinear": T.InterpolationMode.BILINEAR}[mode]
    resized = T.resize(x, size, kind, antialias=antialias)
    got = p.shortest_side(x, size, mode=mode, antialias=antialias)
    assert torch.allclose(got, resized, atol=1e-6)
    assert torch.equal(p.centre_crop(got, size, half_pixel="even"), T.center_crop(got, size))


@given(h=SIDES, w=SIDES)
def test_padding_is_centred_black_and_keeps_the_whole_image(h, w):
    size = 16
    out = p.longest_side_padded(torch.ones(1, 3, h, w), size)
    assert out.shape == (1, 3, size, size)
    rows, columns = (out[0, 0].amax(1) > 0.5).nonzero()[:, 0], (out[0, 0].amax(0) > 0.5).nonzero()[:, 0]
    for inside, side in ((rows, h), (columns, w)):
        expected = max(round(side * size / max(h, w)), 1)
        assert len(inside) == expected and int(inside[0]) == (size - expected) // 2
    # an unpadded white image is white: what is not, is padding
    assert float(out.sum()) / 3 == pytest.approx(len(rows) * len(columns), rel=1e-5)


def test_padding_is_minus_mean_over_std_after_normalisation():
    out = p.Preprocessing(16, fit="pad")(torch.rand(1, 3, 8, 32))
    assert out[0, :, 0, 0].tolist() == pytest.approx([-1.7923, -1.7521, -1.4802], abs=1e-4)


def test_odd_margins_are_split_as_each_library_does():
    x = torch.arange(7.0).view(1, 1, 1, 7).expand(1, 3, 4, 7)
    assert p.centre_crop(x, 4)[0, 0, 0].tolist() == [1, 2, 3, 4]  # margin 3: 1 pixel on the left (transformers)
    assert p.centre_crop(x, 4, half_pixel="even")[0, 0, 0].tolist() == [2, 3, 4, 5]  # 1.5 rounds to 2 (torchvision)


def test_an_image_of_the_right_size_is_left_alone():
    x = images(16, 16)
    for fitted in (p.square(x, 16), p.shortest_side(x, 16), p.longest_side_padded(x, 16), p.centre_crop(x, 16)):
        assert torch.equal(fitted, x)


def test_without_antialias_a_fine_pattern_becomes_another_image():
    stripes = (torch.arange(64) % 2).float().expand(1, 3, 64, 64)
    assert p.square(stripes, 16)[..., 2:-2].std() < 0.02
    skipped = p.square(stripes, 21, antialias=False)
    assert skipped.std() > 0.2


@pytest.mark.parametrize("fit", ["crop", "pad", "squeeze"])
@pytest.mark.parametrize("shape", [(16, 16), (40, 23), (9, 30), (1, 1)])
def test_gradient_reaches_the_image_through_each_fit(fit, shape):
    x = images(*shape).double().requires_grad_()
    out = p.Preprocessing(16, fit=fit)(x)
    assert out.shape == (2, 3, 16, 16) and out.dtype == torch.float64
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.abs().sum() > 0


def test_the_description_tells_settings_apart():
    settings = [
        p.Preprocessing(16),
        p.Preprocessing(17),
        p.Preprocessing(16, fit="pad"),
        p.Preprocessing(16, fit="squeeze"),
        p.Preprocessing(16, mode="bilinear"),
        p.Preprocessing(16, antialias=False),
        p.Preprocessing(16, half_pixel="even"),
        p.Preprocessing(16, mean=p.HALF, std=p.HALF),
    ]
    assert len({str(s) for s in settings}) == len(settings)


def test_a_library_that_is_absent_is_a_readable_error():
    with pytest.raises(ValueError, match=r"pip install 'flowrl\[clip\]'"):
        optional("no_such_library", "no-such-library", "clip")
    assert optional("torchvision", "torchvision", "clip").__name__ == "torchvision"
