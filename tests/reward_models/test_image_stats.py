"""Image statistics against hand values."""

import colorsys
import math
import warnings

import pytest
import torch

from reward_models.image_stats import dark_fraction, image_statistics, in_group_diversity, saturation, sharpness


def plain(r, g, b):
    return torch.tensor([r, g, b]).view(1, 3, 1, 1).expand(1, 3, 8, 8)


def test_saturation_is_that_of_hsv():
    for rgb in ((1.0, 0.0, 0.0), (0.5, 0.25, 0.25), (0.3, 0.3, 0.3), (0.0, 0.0, 0.0), (0.2, 0.7, 0.4)):
        assert saturation(plain(*rgb)).item() == pytest.approx(colorsys.rgb_to_hsv(*rgb)[1])


def test_dark_fraction():
    half = torch.cat([plain(0.0, 0.0, 0.0), plain(1.0, 1.0, 1.0)], dim=3)
    assert dark_fraction(half).item() == 0.5
    assert dark_fraction(plain(0.0, 0.0, 1.0)).item() == 1  # luma 0.114
    assert dark_fraction(plain(1.0, 0.0, 0.0)).item() == 0  # luma 0.299


def test_sharpness():
    assert sharpness(plain(0.4, 0.4, 0.4)).item() == 0
    board = torch.tensor([[(i + j) % 2 for j in range(8)] for i in range(8)]).float().expand(1, 3, 8, 8)
    # every inner pixel differs from its four neighbours by 1: the Laplacian is +4 or -4, half and half
    assert sharpness(board).item() == pytest.approx(16.0)
    blurred = torch.nn.functional.avg_pool2d(torch.rand(1, 3, 32, 32), 3, 1)
    assert sharpness(torch.rand(1, 3, 32, 32)) > 3 * sharpness(blurred)


def test_tiny_pictures_give_numbers_or_nan_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for height in range(1, 5):
            for width in range(1, 5):
                found = sharpness(torch.rand(2, 3, height, width))
                assert found.shape == (2,) and bool(found.isnan().all()) == (min(height, width) < 3)
        assert sharpness(torch.rand(1, 3, 3, 3)).item() == 0  # one inner pixel has no spread


def test_diversity_is_the_mean_pairwise_cosine_distance():
    generator = torch.Generator().manual_seed(3)
    features, groups = torch.randn(9, 5, generator=generator), torch.tensor([4, 1, 4, 1, 4, 4, 7, 1, 1])
    expected = []
    for group in (1, 4):
        rows = features[groups == group]
        cosine = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2)
        off = ~torch.eye(len(rows), dtype=torch.bool)
        expected.append((1 - cosine[off]).mean())
    got = in_group_diversity(features, groups)
    assert torch.allclose(got[:2], torch.stack(expected), atol=1e-6) and math.isnan(got[2])
    assert in_group_diversity(torch.eye(4), torch.zeros(4, dtype=torch.long)).item() == 1  # orthogonal
    assert in_group_diversity(torch.ones(4, 3), torch.zeros(4, dtype=torch.long)).item() == pytest.approx(0, abs=1e-6)


def test_all_statistics_have_one_value_per_image():
    assert {k: tuple(v.shape) for k, v in image_statistics(torch.rand(5, 3, 16, 16)).items()} == {
        "saturation": (5,),
        "sharpness": (5,),
        "dark_fraction": (5,),
    }
