"""One reward made into another."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reward_models import RewardError, RewardResult, RewardSpec, checked_score, load
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


class Red:
    """The mean of the red channel, with a gradient."""

    spec = RewardSpec("red", range=(0.0, 1.0), differentiable=True)

    def differentiable(self, images, prompts):
        return images[:, 0].mean((1, 2))

    def score(self, images, prompts, metadata, groups=None):
        return RewardResult(self.differentiable(images, prompts).detach(), uncertainty=torch.ones(len(images)))


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


def test_par_reads_what_flowrl_score_writes(tmp_path):
    from PIL import Image

    from flowrl.commands.scoring import score_items
    from flowrl.images import find

    Image.linear_gradient("L").save(tmp_path / "grey.png")
    Image.linear_gradient("L").convert("1").save(tmp_path / "dots.png")
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    score_items(find([tmp_path], texts=["a"]), {"jpeg": load("jpeg")}, one)
    score_items(find([tmp_path], texts=["a"]), {"jpeg": load("jpeg"), "validity": load("validity")}, two)
    low, high = sorted(json.loads(line)["scores"]["jpeg"] for line in one.read_text().splitlines())
    raw, jpeg = Fixed([low] * 4), Fixed([low] * 4)
    jpeg.spec = RewardSpec("jpeg")
    for reward in (Par(raw, references=str(one)), Par(jpeg, references=str(two))):
        out = ask(reward)
        assert out.values[:2].tolist() == pytest.approx([(0.5 + 1 / (1 + math.exp(high - low))) / 2] * 2)
        assert low < high and out.missing.tolist() == [False] * 2 + [True] * 2
    with pytest.raises(ValueError, match="'jpeg', 'validity'.*'raw'.*this reward alone"):
        Par(raw, references=str(two))


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


# --- gradients, specs, options ----------------------------------------------------------------------------------------


def slopes_of_repeat(reward):
    """1 + contrast of each pass."""
    ends = torch.tensor([0.4, 0.6])[:, None, None, None].expand(2, 3, 4, 4)
    return [float(reward.augment(ends, k)[:, 0, 0, 0].diff()) / 0.2 for k in range(reward.passes)]


def shaped_rewards(tmp_path):
    """(reward of Red, the same as a formula of its values; None where it has no gradient)"""
    file = tmp_path / "base.jsonl"
    file.write_text("".join(json.dumps({"prompt": "a", "score": s}) + "\n" for s in (0.3, None, 0.5)))
    chance = lambda v, r: torch.sigmoid((v - r) / 0.1)  # noqa: E731
    repeat = Repeat(Red(), passes=3, jitter=0.05, shift=1)
    steep = sum(slopes_of_repeat(repeat)) / 3
    return [
        (Scale(Red(), subtract=0.1, divide=-0.5, low=-0.9), lambda v: ((v - 0.1) / -0.5).clamp(-0.9)),
        (Threshold(Red(), 0.5, keep=True), lambda v: torch.where(v >= 0.5, v, 0.0)),
        (
            Threshold(Red(), {"updates": [0, 9], "values": [0.3, 0.5]}, keep=True),
            lambda v: torch.where(v > 0.5, v, 0.0),
        ),
        (Par(Red(), centre=0.4, temperature=0.1), lambda v: chance(v, 0.4)),
        (Par(Red(), centre="group", temperature=0.1), lambda v: chance(v, v.view(2, 2).mean(1).repeat_interleave(2))),
        (
            Par(Red(), references=str(file), temperature=0.1),
            lambda v: torch.cat([(chance(v[:2], 0.3) + chance(v[:2], 0.5)) / 2, torch.full((2,), NAN)]),
        ),
        (repeat, lambda v: v + (v - v.detach()) * (steep - 1)),
        (Scale(repeat, divide=2), lambda v: (v + (v - v.detach()) * (steep - 1)) / 2),
    ]


def test_a_gradient_goes_through_what_is_smooth(tmp_path):
    red = torch.tensor([0.2, 0.4, 0.6, 0.8])
    for reward, formula in shaped_rewards(tmp_path):
        images = torch.zeros(4, 3, 4, 4)
        images[:, 0] = red[:, None, None]
        images.requires_grad_()
        value = reward.differentiable(images, PROMPTS)
        assert reward.spec.differentiable
        torch.testing.assert_close(value, ask(reward, images.detach()).values, rtol=0, atol=1e-6, equal_nan=True)
        (slope,) = torch.autograd.grad((value * torch.tensor([1.0, 2.0, 3.0, 4.0])).nansum(), images)
        v = red.clone().requires_grad_()
        (wanted,) = torch.autograd.grad((formula(v) * torch.tensor([1.0, 2.0, 3.0, 4.0])).nansum(), v)
        torch.testing.assert_close(slope[:, 0].sum((1, 2)), wanted, rtol=1e-4, atol=1e-5)


def test_what_has_no_gradient_says_so():
    flat, sure = Threshold(Red(), 0.5), Certainty(Red())
    assert not flat.spec.differentiable and not sure.spec.differentiable and not hasattr(sure, "differentiable")
    with pytest.raises(ValueError, match="which is flat"):
        flat.differentiable(IMAGES, PROMPTS)
    for made in (Scale, Repeat, lambda r: Par(r, centre=0)):
        assert not made(Grey()).spec.differentiable
        with pytest.raises(ValueError, match="'grey'.*gradient"):
            made(Grey()).differentiable(IMAGES, PROMPTS)


def test_no_images(tmp_path):
    for reward in [*(reward for reward, _ in shaped_rewards(tmp_path)), Threshold(Red(), 0.5), Certainty(Red())]:
        assert ask(reward, IMAGES[:0], [], GROUPS[:0]).values.shape == (0,)


def test_other_options_are_another_spec(tmp_path):
    files = [tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.jsonl"]
    for i, file in enumerate(files):
        file.parent.mkdir()
        file.write_text(json.dumps({"prompt": "a", "score": i}))
    rising = [{"updates": [0, u], "values": [0.1, 0.2]} for u in (5, 9)]
    for made, options in [
        (Threshold, [{"least": 0.5}, {"least": 0.5, "keep": True}, {"least": rising[0]}, {"least": rising[1]}]),
        (Par, [{"centre": 0}, {"centre": 0, "temperature": 2}, *({"references": str(file)} for file in files)]),
        (Repeat, [{}, {"jitter": 0}, {"shift": 1}, {"seed": 1}]),
        (Certainty, [{}, {"strength": 2}]),
    ]:
        assert len({made(Red(), **one).spec for one in options}) == len(options)
        assert made(Red(), **options[0]).spec == made(Red(), **options[0]).spec


@pytest.mark.parametrize(
    ("made", "options"),
    [
        (Repeat, {"passes": 2.5}),
        (Repeat, {"shift": True}),
        (Scale, {"divide": math.inf}),
        (Scale, {"low": NAN}),
        (Certainty, {"strength": "much"}),
        (Par, {"centre": 0, "temperature": NAN}),
    ],
)
def test_wrong_numbers(made, options):
    with pytest.raises(ValueError, match="expected a (finite|whole) number"):
        made(Red(), **options)
