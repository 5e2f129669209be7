"""Two scorers beside each other: the figures by hand, and the command on pictures of several sizes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import cross_check
from benchmarks.cross_check import agreement, main
from flowrl.errors import UserError


def test_the_figures_by_hand() -> None:
    found = agreement([0.1, 0.2, 0.4, None, 0.9], [0.1, 0.5, 0.3, 0.2, None])
    assert (found.images, found.missing) == (3, 2)
    assert found.largest == pytest.approx(0.3) and found.mean == pytest.approx(0.4 / 3)
    assert found.spread == pytest.approx(np.std([0.1, 0.2, 0.4]))
    assert found.correlation == pytest.approx(0.5)  # ranks 1 2 3 and 1 3 2: 1 - 6 * 2 / 24
    assert math.isnan(agreement([1.0, 1.0], [0.0, 1.0]).correlation)
    with pytest.raises(UserError, match="no image has both"):
        agreement([None, 1.0], [1.0, None])


@pytest.fixture
def images(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    for i, size in enumerate([(8, 8), (8, 12), (8, 8), (5, 5)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return str(tmp_path)


def test_the_command(images: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_check.OFFICIAL, "jpeg", ("validity", {"least_std": 0.0}, 0.1))
    common = ["jpeg", images, "--prompt", "anything", "--device", "cpu"]
    assert main(common) == 1  # minus a fraction of a kilobyte against 1
    assert "4 images, 0 without" in (said := capsys.readouterr().out) and "DO NOT AGREE to 0.1" in said
    assert main([*common, "--tolerance", "2"]) == 0
    assert main([*common, "--against", "jpeg-incompress", "--tolerance", "0.5"]) == 1
    assert "rank correlation -1.0000" in capsys.readouterr().out  # incompressible is not compressible


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pickscore", "IMAGES"], "for which no package is known"),
        (["hpsv2.1", "IMAGES", "--prompt", "a"], "flowrl[hpsv2]"),
        (["hpsv2.1", "IMAGES"], "prompt"),
        (["imagereward", "IMAGES", "--prompt", "a", "--against", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["hpsv2", "nowhere.png", "--prompt", "a"], "nowhere.png"),
    ],
)
def test_what_is_missing_is_named(
    images: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "hpsv2", None)
    assert main([images if word == "IMAGES" else word for word in words] + ["--device", "cpu"]) == 2
    assert said in capsys.readouterr().err
