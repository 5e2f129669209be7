"""One reward made into another."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reward_models import RewardError, RewardResult, RewardSpec, checked_score
from reward_models.shaping import Certainty, Par, Repeat, Scale, Threshold, certainty, group_mean, par

NAN = math.nan
IMAGES, PROMPTS = torch.zeros(4, 3, 8, 8), ["a", "a", "b", "b"]
GROUPS = torch.tensor([0, 0, 1, 1])


class Fixed:
    def __init__(self, values, uncertainty=None, **spec):
        self.spec = RewardSpec("raw", **spec)
        self.values = torch.tensor(values)
        self.uncertainty = None if uncertainty is None else torch.tensor(uncertainty)

    def score(self, images, prompts, metadata, groups=None):
        return RewardResult(self.values, uncertainty=self.uncertainty)


class Grey:
    """The mean grey of an image, which jitter changes."""

    spec = RewardSpec("grey", range=(0.0, 1.0))

    def score(self, images, prompts, metadata, groups=None):
        return RewardResult(images.mean((1, 2, 3)))


def ask(reward, images=IMAGES, prompts=PROMPTS, groups=GROUPS):
    return checked_score(reward, images, prompts, None, groups, all_missing="allow")


def test_scale_by_hand_and_its_range():
    reward = Scale(Fixed([18.0, 26.0, 34.0, NAN], range=(0.0, 30.0)), subtract=18, divide=8, high=1.5)
    out = ask(reward)
    assert out.values[:3].tolist() == [0.0, 1.0, 1.5] and out.values[3].isnan()
    assert reward.spec.range == (-2.25, 1.5) and out.parts["raw"][:3].tolist() == [18.0, 26.0, 34.0]
    cost = Scale(Fixed([1.0] * 4, higher_is_better=False, range=(0.0, 2.0)), divide=-1)
    assert cost.spec.higher_is_better and cost.spec.range == (-2.0, 0.0)


def test_threshold_with_and_without_the_value():
    raw = Fixed([0.2, 0.5, 0.9, NAN], range=(0.0, 1.0))
    assert ask(Threshold(raw, 0.5)).values[:3].tolist() == [0, 1, 1]
    assert ask(Threshold(raw, 0.5, keep=True)).values[:3].tolist() == pytest.approx([0, 0.5, 0.9])
    assert ask(Threshold(raw, 0.5)).values[3].isnan()
    with pytest.raises(ValueError, match="never negative"):
        Threshold(Fixed([0.0] * 4), 0.5, keep=True)


# --- PAR --------------------------------------------------------------------------------------------------------------


def test_par_by_hand(tmp_path):
    assert par(torch.tensor([1.0]), torch.tensor([[1.0, 1.0 - math.log(3)]])).item() == pytest.approx((0.5 + 0.75) / 2)
    assert ask(Par(Fixed([2.0, 2.0, 4.0, NAN]), centre=2)).values[:2].tolist() == [0.5, 0.5]
    rows = [{"prompt": "a", "score": 2.0}, {"prompt": "a", "score": None}, {"prompt": "a", "score": 2 - math.log(3)}]
    file = tmp_path / "scores.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    out = ask(Par(Fixed([2.0, 2.0, 4.0, 4.0]), references=str(file)))
    assert out.values[:2].tolist() == pytest.approx([0.625, 0.625]) and out.missing.tolist() == [False] * 2 + [True] * 2
    assert "no score for this prompt" in out.reasons[2] and out.parts["raw"].tolist() == [2, 2, 4, 4]


def test_par_around_the_group():
    reward = Par(Fixed([1.0, 3.0, 5.0, NAN]), centre="group")
    assert ask(reward).values[:3].tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e), 0.5])
    assert reward.spec.scope == "group" and reward.spec.range == (0.0, 1.0)
    assert torch.equal(ask(reward).values[:2], ask(reward, groups=None).values[:2])  # equal prompts are a group


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=6), st.floats(-3, 3), st.floats(0.1, 5))
def test_par_is_bounded_rises_and_ignores_a_common_shift(rewards, shift, temperature):
    r, ref = torch.tensor(sorted(rewards), dtype=torch.float64), torch.tensor([[0.3, -1.0]], dtype=torch.float64)
    shaped = par(r, ref.expand(len(r), 2), temperature)
    assert bool(((shaped >= 0) & (shaped <= 1)).all()) and bool((shaped.diff() >= 0).all())
    moved = par(r + shift, ref.expand(len(r), 2) + shift, temperature)
    torch.testing.assert_close(moved, shaped, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "said"),
    [({}, "one of the two"), ({"centre": "prompt"}, "one of the two"), ({"centre": 0, "temperature": 0}, "above 0"),
     ({"references": "nowhere.jsonl"}, "flowrl score"), ({"centre": 1, "references": "x"}, "one of the two")],
)  # fmt: skip
def test_par_options(options, said):
    with pytest.raises(ValueError, match=said):
        Par(Fixed([0.0] * 4), **options)


def test_references_of_another_form(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "a"}')
    with pytest.raises(ValueError, match="line 1"):
        Par(Fixed([0.0] * 4), references=str(tmp_path / "x.jsonl"))


# --- uncertainty ------------------------------------------------------------------------------------------------------


def test_repeated_passes_know_how_sure_they_are():
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sure = ask(Repeat(Grey(), passes=3, jitter=0, shift=0), images)
    assert sure.uncertainty.abs().max() < 1e-6
    reward = Repeat(Grey(), passes=3, jitter=0.1, shift=1)
    doubtful = ask(reward, images)
    assert bool((doubtful.uncertainty > 1e-4).all())
    each = torch.stack([Grey().score(reward.augment(images, i), None, None).values for i in range(3)])
    torch.testing.assert_close(doubtful.values, each.mean(0), rtol=0, atol=3e-3)  # passes are put on the 8-bit grid
    torch.testing.assert_close(doubtful.uncertainty, each.std(0), rtol=0, atol=3e-3)
    assert torch.equal(ask(reward, images).values, doubtful.values)  # seeded
    alone = ask(reward, images[2:3], ["b"], GROUPS[2:3])
    torch.testing.assert_close(alone.values, doubtful.values[2:3], rtol=0, atol=1e-7)  # of other images independent
    assert torch.equal(reward.augment(images, 0), images)
    with pytest.raises(ValueError, match="at least 2"):
        Repeat(Grey(), passes=1)


def test_certainty_by_hand():
    # weights 1 and 1/4: m = (1 * 1 + 4 / 4) / 1.25 = 1.6; 1.6 - 0.6 = 1, 1.6 + 2.4 / 4 = 2.2
    reward = Certainty(Fixed([1.0, 4.0, 2.0, 2.0], uncertainty=[0.0, math.log(4), 1.0, 9.0]))
    out = ask(reward)
    assert out.values.tolist() == pytest.approx([1.0, 2.2, 2.0, 2.0])
    assert out.parts["raw"].tolist() == [1, 4, 2, 2] and out.parts["uncertainty"][1] == pytest.approx(math.log(4))
    assert ask(Certainty(Fixed([1.0, 4.0, 2.0, 3.0], uncertainty=[1.0] * 4), strength=0)).values.tolist() == [
        1,
        4,
        2,
        3,
    ]
    with pytest.raises(RewardError, match="no uncertainty"):
        ask(Certainty(Fixed([1.0] * 4)))
    out = ask(Certainty(Fixed([1.0] * 4, uncertainty=[0.0, NAN, 0.0, 0.0])))
    assert out.missing.tolist() == [False, True, False, False] and out.reasons[1] == "its uncertainty is NaN"


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 4)), min_size=2, max_size=8), st.floats(0, 2))
def test_certainty_weighs_the_distance_from_the_mean(rows, strength):
    r, u = torch.tensor(rows, dtype=torch.float64).unbind(1)
    one = torch.zeros(len(rows), dtype=torch.long)
    shaped, w = certainty(r, u, one, strength), torch.exp(-strength * u)
    m = (w * r).sum() / w.sum()
    torch.testing.assert_close(shaped - shaped.mean(), w * (r - m), rtol=1e-8, atol=1e-9)


def test_group_mean_leaves_out_what_is_missing():
    values = torch.tensor([1.0, NAN, 5.0, 7.0])
    assert group_mean(values, torch.tensor([4, 4, 2, 2])).tolist() == [1.0, 1.0, 6.0, 6.0]
    assert group_mean(values[1:2], torch.tensor([0])).isnan().all()


def test_what_is_shaped_keeps_its_scale_of_doubt():
    out = ask(Scale(Fixed([1.0] * 4, uncertainty=[0.5] * 4), divide=-2))
    assert out.uncertainty.tolist() == [0.25] * 4
