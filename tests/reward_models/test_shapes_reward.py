"""The Shapes rewards from pictures to numbers."""

import math

import numpy as np
import pytest
import torch

from reward_models import checked_score, load
from reward_models.shapes import grammar, render
from reward_models.shapes.reward import ShapesReward

KINDS = ("shapes", "shapes-strict", "shapes-soft")


def picture(*shapes):
    drawn = tuple(render.Shape(n, c, x, y, 8.0, 0.0, render.PALETTE[c]) for n, c, x, y in shapes)
    return torch.tensor(render.render(render.Scene(drawn, (235, 235, 235)))).permute(2, 0, 1).float() / 255


def scores(prompt, *pictures, **options):
    reward = ShapesReward("shapes", **options)
    result = checked_score(reward, torch.stack(pictures), [prompt] * len(pictures), all_missing="allow")
    return [tuple(result.parts[k][i].item() for k in KINDS) for i in range(len(pictures))], result.reasons


def test_scenes_of_their_prompts_are_right_and_of_others_mostly_wrong():
    metadata = grammar.prompts("test", per_task=15)
    rng = np.random.default_rng(11)
    images = torch.tensor(np.stack([render.render(render.sample_scene(m, rng)) for m in metadata]))
    images = images.permute(0, 3, 1, 2).float() / 255
    prompts = [m["prompt"] for m in metadata]
    result = checked_score(load("shapes"), images, prompts, metadata)
    for kind in KINDS:
        assert result.parts[kind].mean() >= 0.98
    assert torch.equal(checked_score(load("shapes-soft"), images, prompts).values, result.parts["shapes-soft"])
    shuffled = checked_score(load("shapes"), images.roll(31, 0), prompts, metadata)
    assert shuffled.values.mean() < 0.1 and all(
        r for r, v in zip(shuffled.reasons, shuffled.values, strict=True) if v == 0
    )


def test_two_objects_by_hand():
    star, circle = ("star", "red", 16, 20), ("circle", "blue", 46, 40)
    got, reasons = scores(
        "a photo of a star and a circle",
        picture(star, circle),
        picture(star),
        picture(star, circle, ("star", "green", 16, 46)),
        picture(),
    )
    assert got == [(1, 1, 1), (0, 0, 0.5), (1, 0, 0.5), (0, 0, 0)]
    assert reasons[0] is None and "circle" in reasons[1]


def test_counting_by_hand():
    row = [("heart", "red", 14 + 18 * i, 32) for i in range(3)]
    got, _ = scores("a drawing of two hearts", *(picture(*row[:n]) for n in range(4)))
    assert got == [(0, 0, 0), (0, 0, 0.5), (1, 1, 1), (0, 0, 0.5)]


def test_colour_and_position_by_hand():
    wanted, swapped = ("cross", "pink", 16, 32), ("cross", "pink", 48, 32)
    square_r, square_l = ("square", "black", 46, 32), ("square", "black", 18, 32)
    got, _ = scores("an image of a cross left of a square", picture(wanted, square_r), picture(swapped, square_l))
    assert got[0] == (1, 1, 1) and got[1] == pytest.approx((0, 0, 2 / 3))
    got, _ = scores("a cross left of a square", picture(swapped, square_l), flow_grpo_compat=True)
    assert got[0] == (0, 0, 0.75)
    got, _ = scores("a pink cross and a red square", picture(wanted, square_r))
    assert got[0] == (0, 0, 0.75)
    got, _ = scores("a pink cross", picture(wanted))
    assert got[0] == (1, 1, 1)


def test_what_cannot_be_judged_is_missing_not_zero():
    got, reasons = scores("a photo of a dog", picture())
    assert all(math.isnan(v) for v in got[0]) and "Shapes grammar" in reasons[0]
    dog = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}
    result = checked_score(ShapesReward(), picture()[None], ["a photo of a dog"], [dog], all_missing="allow")
    assert result.missing.item() and "'dog'" in result.reasons[0]
    mixed = checked_score(ShapesReward(), torch.stack([picture()] * 2), ["a dog", "a star"])
    assert mixed.missing.tolist() == [True, False]


def test_metadata_wins_over_the_prompt():
    metadata = grammar.parse("a star")
    result = checked_score(ShapesReward(), picture(("star", "red", 32, 32))[None], ["something poetic"], [metadata])
    assert result.values.item() == 1


def test_kinds():
    with pytest.raises(ValueError, match="shapes-strict"):
        ShapesReward("strict")
    assert ShapesReward("shapes-soft").spec.range == (-14.0, 1.0)
    assert ShapesReward(flow_grpo_compat=True).spec != ShapesReward().spec


@pytest.mark.parametrize("size", [32, 48, 100, 128, 512])
def test_other_sizes_score_as_the_world_s_own(size):
    metadata = grammar.prompts("test", per_task=2)
    rng = np.random.default_rng(3)
    scenes = [render.sample_scene(m, rng) for m in metadata]
    images = torch.tensor(np.stack([render.render(scene, size) for scene in scenes])).permute(0, 3, 1, 2).float() / 255
    result = checked_score(load("shapes"), images, [m["prompt"] for m in metadata], metadata)
    assert result.values.mean() == 1


def test_oblong_pictures_keep_their_shapes():
    """The middle half of a picture, twice as wide as high: squeezed to a square it would hold no circle."""
    drawn = [
        render.Shape(n, "red", x, 32.0, 10.0, 0.0, render.PALETTE["red"]) for n, x in (("circle", 18), ("star", 46))
    ]
    wide = render.render(render.Scene(tuple(drawn), (235, 235, 235)), 128)[32:96]
    image = torch.tensor(wide.copy()).permute(2, 0, 1)[None].float() / 255
    assert checked_score(load("shapes-strict"), image, ["a circle left of a star"]).values.item() == 1


def test_the_spec_says_what_is_done_to_other_sizes():
    assert "area of 64x64 px" in load("shapes").spec.preprocessing and "antialias" in load("shapes").spec.preprocessing
