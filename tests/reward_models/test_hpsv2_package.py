"""The adapter of the hpsv2 package, with a stand-in for the package, which cannot be installed beside pytest 8."""

from __future__ import annotations

import sys
import types

import pytest
import tiny_scorers
import torch

from reward_models import RewardError, checked_score, load

NAME = "reward_models.hpsv2_package:Hpsv2Package"


@pytest.fixture
def asked(monkeypatch):
    """Calls of the stand-in, whose score is the number of the call and the mean of the picture."""
    calls = []

    def score(pictures, prompt, cp=None, hps_version="v2.0"):
        calls.append((len(pictures), pictures[0].mode, prompt, cp, hps_version))
        return [picture.getpixel((1, 0))[2] / 255 for picture in pictures]

    inner = types.SimpleNamespace(score=score, hps_version_map={"v2.0": "a.pt", "v2.1": "b.pt"})
    package = types.ModuleType("hpsv2")
    package.img_score = inner
    monkeypatch.setitem(sys.modules, "hpsv2", package)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.2.0")
    return calls


def test_the_package_is_asked_once_for_each_prompt(asked):
    images = tiny_scorers.pictures(3, 5, 4)
    reward = load(NAME, version="v2.0", path="weights.pt")
    values = checked_score(reward, images, ["b", "a", "b"]).values
    assert torch.allclose(values, images[:, 2, 0, 1])  # blue of the second pixel of the first row
    assert asked == [(2, "RGB", "b", "weights.pt", "v2.0"), (1, "RGB", "a", "weights.pt", "v2.0")]
    assert reward.spec.version == "1.2.0 v2.0" and load(NAME).spec.version == "1.2.0 v2.1"
    with pytest.raises(RewardError, match=r"v2\.0, v2\.1"):
        load(NAME, version="2.1")


def test_what_is_not_there_is_named(asked, monkeypatch):
    monkeypatch.setitem(sys.modules, "hpsv2", None)
    with pytest.raises(RewardError, match=r"flowrl\[hpsv2\]"):
        load(NAME)

    class Lacking(types.ModuleType):
        @property
        def img_score(self):
            raise FileNotFoundError(2, "No such file", "/env/hpsv2/src/open_clip/bpe_simple_vocab_16e6.txt.gz")

    monkeypatch.setitem(sys.modules, "hpsv2", Lacking("hpsv2"))
    with pytest.raises(RewardError, match=r"cp '.*open_clip/bpe.*' '/env/hpsv2/src/open_clip/bpe"):
        load(NAME)
