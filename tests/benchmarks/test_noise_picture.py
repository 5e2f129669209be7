"""The picture of docs/noise.md: its numbers are those of the exact recursion, and docs/noise.md quotes them."""

import math
import re
from pathlib import Path

import pytest

from benchmarks.noise_picture import GRAIN, KERNELS, denoised, figure, picture, result_std

PAGE = Path(__file__).parents[2] / "docs" / "noise.md"


@pytest.mark.parametrize("kernel", ["ode", "flow", "cps"])
def test_pictures_have_the_noise_that_the_recursion_predicts(kernel):
    mean = picture()
    left = (denoised(mean, kernel, 10) - mean).double()
    assert abs(float(left.std()) / result_std(kernel, 10, GRAIN) - 1) < 5 / math.sqrt(2 * left.numel())
    assert abs(float(left.mean())) < 5 * float(left.std()) / math.sqrt(left.numel())


def test_the_page_quotes_the_numbers():
    rows = re.findall(
        r"^\| `(\w+)` [\d.]* ?\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE.read_text(), re.M
    )
    assert [row[0] for row in rows] == list(KERNELS)
    for kernel, *quoted in rows:
        exact = [result_std(kernel, steps, std) for std in (GRAIN, 1.0) for steps in (10, 40)]
        assert quoted == [f"{value:.3f}" for value in exact]


def test_the_figure_is_drawn(tmp_path):
    figure(3).savefig(tmp_path / "noise.png")
    assert (tmp_path / "noise.png").read_bytes()[:4] == b"\x89PNG"
    assert PAGE.with_name("noise.png").is_file()
