"""The scoring benchmark on a network that costs nothing: what it times, and what it says about wrong options."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_scorers import HPS, IMAGE

from benchmarks import scoring
from reward_models import two_towers
from reward_models.clip_score import ClipScore
from reward_models.preprocess import Preprocessing
from reward_models.torchvision_ops import ready


@pytest.fixture(scope="module")
def scorer():
    ready()
    import open_clip

    model = open_clip.CLIP(**HPS)
    return ClipScore(two_towers.around_open_clip(model, Preprocessing, name="tiny", digest="random"), chunk=2)


def test_every_run_encodes_the_same_batches_with_and_without_the_scorer(scorer, monkeypatch):
    sizes = []
    forward = type(scorer.model.visual).forward
    monkeypatch.setattr(type(scorer.model.visual), "forward", lambda self, x: sizes.append(len(x)) or forward(self, x))
    seen = scoring.measure(scorer, batch=2, batches=3, size=IMAGE + 9, repeats=2)
    assert {kind: len(times) for kind, times in seen.items()} == {"scoring": 2, "bare": 2, "fitting": 2}
    assert sizes == [2] * (3 * 2 * 3)  # three batches, scoring and bare, one run to warm up and two that count
    assert len(scorer._text) == 6 * 3  # prompts are new in every run


def test_command_line(scorer, monkeypatch, capsys, tmp_path):
    assert scoring.main(["--model", "ViT-Q"]) == 2
    assert scoring.main(["--batch", "0"]) == 2
    assert "open_clip.list_models()" in capsys.readouterr().err
    monkeypatch.setattr(scoring, "random_scorer", lambda *_: scorer)
    for target, code in ((1e9, 0), (0.0, 1)):
        monkeypatch.setattr(scoring, "TARGET", target)
        words = ["--batch", "2", "--batches", "1", "--size", "40", "--repeats", "1", "--json", str(tmp_path / "t.json")]
        assert scoring.main(words) == code
    assert "scoring / bare" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "t.json").read_text())["scoring"]) == 1


def test_a_published_network_is_built_by_name(monkeypatch):
    ready()
    import open_clip

    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained: open_clip.CLIP(**HPS))
    scorer = scoring.random_scorer("ViT-B-32", 4, "cpu")
    assert scorer.spec.name == "ViT-B-32" and scorer.chunk == 4
    assert torch.isfinite(scorer.score(torch.rand(1, 3, 40, 40), ["a"], [{}]).values).all()
    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained: torch.nn.Identity())
    with pytest.raises(ValueError, match="a Identity of open_clip, expected its CLIP"):
        scoring.random_scorer("ViT-B-16-SigLIP", 4, "cpu")
