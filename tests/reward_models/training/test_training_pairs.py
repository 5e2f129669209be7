"""Preference pairs out of images: ranking pairs, then sifting by points."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowrl.commands import reward as commands
from flowrl.errors import UserError
from reward_models import RewardResult, RewardSpec
from reward_models.judges.pairwise import Comparison, ScorerJudge
from reward_models.training.manifest import read
from reward_models.training.pairs import meetings, sift


def pictures(*greys):
    return torch.stack([torch.full((3, 4, 4), g / 255) for g in greys])


class Grey:
    """Mean grey in 8-bit steps, through a table; what is not in there is missing."""

    spec = RewardSpec("grey")

    def __init__(self, table=None):
        self.table = table

    def score(self, images, prompts, metadata, groups=None):
        greys = (images.mean((1, 2, 3)) * 255).round()
        return RewardResult(
            greys if self.table is None else torch.tensor([self.table.get(int(g), math.nan) for g in greys])
        )


class FirstAlways:
    """A judge that always prefers what it is shown first."""

    spec = RewardSpec("first")

    def compare(self, images, pairs, prompts, metadata):
        return Comparison(torch.ones(len(pairs), dtype=torch.float64), [None] * len(pairs))


def run(greys, rank=None, score=None, **options):
    judge = ScorerJudge(rank or Grey())
    return sift(pictures(*greys), "p", [{}] * len(greys), judge, score or Grey(), **options)


@given(st.lists(st.integers(0, 255), min_size=2, max_size=9, unique=True), st.integers(0, 99))
def test_the_best_winner_meets_the_worst_loser(greys, seed):
    found = run(greys, seed=seed)
    assert found.compared == len(greys) // 2 and found.ties == found.missing == 0
    assert greys[found.chosen] > greys[found.rejected]
    assert found.scores == pytest.approx(greys)
    if len(greys) % 2 == 0:  # nobody was left over, so the extremes won and lost their meetings
        assert (greys[found.chosen], greys[found.rejected]) == (max(greys), min(greys))


@given(st.permutations([10, 60, 110, 160, 210, 250]))
def test_the_order_of_the_images_has_no_say(greys):
    one, other = run(greys), run(sorted(greys))
    assert (greys[one.chosen], greys[one.rejected]) == (sorted(greys)[other.chosen], sorted(greys)[other.rejected])


def test_meetings_are_disjoint_and_seeded():
    keys = [f"image {i}" for i in range(7)]
    found = meetings(keys, 0)
    assert len(found) == 3 and len({i for pair in found for i in pair}) == 6
    assert found == meetings(keys, 0) and any(found != meetings(keys, seed) for seed in range(1, 9))


def test_points_must_agree_with_the_ranking():
    against = Grey({g: -g for g in (10, 200)})
    found = run([10, 200], score=against)
    assert found.chosen is None and "scores no higher" in found.reason
    assert run([10, 200], least=189.5).chosen == 1 and run([10, 200], least=190.5).chosen is None


def test_what_is_missing_or_tied_makes_no_pair():
    assert run([10, 200], rank=Grey({10: 1.0})).missing == 1
    found = run([10, 200], score=Grey({10: 1.0}))
    assert found.chosen is None and math.isnan(found.scores[1])
    biased = sift(pictures(10, 200), "p", [{}] * 2, FirstAlways(), Grey())  # both orders: it contradicts itself
    assert biased.ties == 1 and biased.chosen is None
    assert sift(pictures(10, 200), "p", [{}] * 2, FirstAlways(), Grey(), order="given").compared == 1


def save(path, image):
    from PIL import Image

    Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(path)


def test_the_verb_writes_a_manifest_that_can_be_trained_on(tmp_path):
    rows = []
    for i, image in enumerate(torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.5):
        image[:, :, : 12 * (i % 4)] = 1.0  # fewer and fewer bytes
        save(tmp_path / f"{i}.png", image)
        rows.append({"image": f"{i}.png", "prompt": "alone" if i == 8 else f"prompt {i // 4}"})
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "deep" / "pairs.jsonl"
    counts = commands.pairs(tmp_path, out, rank="jpeg", score="jpeg")
    assert counts == {"prompts": 3, "pairs": 2, "compared": 4, "ties": 0, "missing": 0, "single": 1, "sizes": 0}
    first, second = read(out)
    assert first.first.endswith("3.png") and first.second.endswith("0.png") and second.labels == {"": 1.0}
    row = json.loads(out.read_text().splitlines()[0])
    assert row["scores"][0] > row["scores"][1] and row["ranked_by"] == "jpeg as judge"
    ranked = tmp_path / "deep" / "ranked.jsonl"
    commands.pairs(tmp_path, ranked, rank="{win-rate: {judge: jpeg}}", score="jpeg")  # the judge inside a win rate
    assert ranked.read_text() == out.read_text()
    with pytest.raises(UserError, match="scope 'group'"):
        commands.pairs(tmp_path, tmp_path / "x.jsonl", rank="{win-rate: {weight: 1, judge: jpeg}}", score="jpeg")
    with pytest.raises(UserError, match="already"):
        commands.pairs(tmp_path, out, rank="jpeg", score="jpeg")
    with pytest.raises(UserError, match="both, random or given"):
        commands.pairs(tmp_path, tmp_path / "x.jsonl", rank="jpeg", score="jpeg", order="any")
