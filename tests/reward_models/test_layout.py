"""Layout IoU against hand arithmetic, brute force over all matchings, and the Shapes world."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reward_models import checked_score, load
from reward_models.geneval import Detection
from reward_models.layout import LayoutReward, Planned, assign, box_iou, parse_layout
from reward_models.shapes import render


def test_iou():
    assert box_iou((0, 0, 1, 1), (0.5, 0, 1.5, 1)) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0 and box_iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0
    assert box_iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1 and box_iou((2, 2, 0, 0), (0, 0, 2, 2)) == 0


def test_the_matching_maximises_the_sum_and_not_the_first_pair():
    """The first planned box fits the first found best (0.6), but only the other way round serves both."""
    planned = [Planned("cat", (0.0, 0.0, 0.5, 1.0)), Planned("cat", (0.2, 0.0, 0.7, 1.0))]
    found = [Planned("cat", (0.1, 0.0, 0.6, 1.0)), Planned("cat", (0.0, 0.0, 0.4, 1.0)), Planned("dog", (0, 0, 1, 1))]
    met = assign(planned, found)
    assert met.ious == pytest.approx((0.8, 2 / 3)) and met.extra == 0  # 0.4 / 0.5 and 0.4 / 0.6


def test_superfluous_objects_cost_and_other_classes_do_not():
    planned = [Planned("cat", (0, 0, 0.5, 0.5)), Planned("dog", (0.5, 0.5, 1, 1))]
    exact = [*planned, Planned("bird", (0, 0, 0.1, 0.1))]
    assert assign(planned, exact).value() == 1
    over = assign(planned, [*exact, Planned("cat", (0.5, 0, 0.6, 0.1)), Planned("cat", (0.8, 0, 0.9, 0.1))])
    assert over.extra == 2 and over.value() == pytest.approx(2 / 4) and over.value(count_extra=False) == 1
    assert assign(planned, []).value() == 0


boxes = st.tuples(*[st.integers(0, 3)] * 2, *[st.integers(1, 3)] * 2).map(
    lambda b: Planned("cat", (b[0] / 6, b[1] / 6, (b[0] + b[2]) / 6, (b[1] + b[3]) / 6))
)


@given(st.lists(boxes, min_size=1, max_size=3), st.lists(boxes, max_size=4))
def test_against_all_matchings(planned, found):
    slots = [*found, *[None] * len(planned)]
    best = max(
        sum(box_iou(p.box, f.box) for p, f in zip(planned, chosen, strict=True) if f)
        for chosen in itertools.permutations(slots, len(planned))
    )
    met = assign(planned, found)
    assert sum(met.ious) == pytest.approx(best) and met.extra == max(len(found) - len(planned), 0)


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (None, "no 'layout'"),
        ([], "no 'layout'"),
        ([{"class": "cat"}], "four numbers"),
        ([{"class": "cat", "box": ["left", 0, 1, 1]}], "four numbers"),
        ([{"class": "cat", "box": [None, 0, 1, 1]}], "four numbers"),
        ([{"class": "cow", "box": [0, 0, 1, 1]}], "'cow'"),
        ([{"class": "cat", "box": [0, 0, 64, 64]}], "fractions"),
        ([{"class": "cat", "box": [0.5, 0, 0.5, 1]}], "x1 < x2"),
    ],
)
def test_layouts_that_cannot_be_read(layout, says):
    assert says in parse_layout({"layout": layout}, ["cat"])


def test_the_reward_scales_boxes_by_height_and_width():
    class Detector:
        classes = ("cat",)

        def detect(self, images):
            return [[Detection("cat", (10, 10, 20, 30), 0.9), Detection("cat", (0, 0, 5, 5), 0.3)] for _ in images]

    images = torch.zeros(2, 3, 40, 20)
    layout = {"layout": [{"class": "cat", "box": [0.5, 0.25, 1.0, 0.5]}]}
    result = checked_score(LayoutReward(Detector()), images, ["", ""], [layout, {}])
    assert result.values[0] == pytest.approx(0.5) and result.missing.tolist() == [False, True]
    assert result.parts["layout-found"][0] == 1 and result.parts["layout-extra"][0] == 0  # 0.3 is not above 0.3
    both = checked_score(LayoutReward(Detector(), threshold=0.2), images[:1], [""], [layout])
    assert both.values.item() == pytest.approx(0.25) and both.parts["layout-mean-iou"].item() == pytest.approx(0.5)


def test_in_the_shapes_world():
    """A drawn circle and square, planned where they are and the other way round."""
    circle = render.Shape("circle", "red", 18.0, 32.0, 9.0, 0.0, render.PALETTE["red"])
    square = render.Shape("square", "blue", 46.0, 32.0, 9.0, 0.0, render.PALETTE["blue"])
    image = torch.from_numpy(render.render(render.Scene((circle, square), (230, 230, 230))).copy())
    image = image.permute(2, 0, 1)[None].float() / 255
    left, right = ([(x - 8) / 64, 24 / 64, (x + 8) / 64, 40 / 64] for x in (18, 46))
    reward = load("layout-iou", detector="shapes")
    right_way, wrong_way = (
        {"layout": [{"class": "circle", "box": a}, {"class": "square", "box": b}]}
        for a, b in ((left, right), (right, left))
    )
    values = checked_score(reward, image.repeat(2, 1, 1, 1), ["", ""], [right_way, wrong_way]).values
    assert values[0] > 0.7 and values[1] == 0


def test_in_the_shapes_world_at_another_size():
    """The same scene at 256x256 px, and cut to 192x256: the boxes are fractions of the picture as it is."""
    circle = render.Shape("circle", "red", 18.0, 32.0, 9.0, 0.0, render.PALETTE["red"])
    image = torch.from_numpy(render.render(render.Scene((circle,), (230, 230, 230)), 256).copy())
    image = image.permute(2, 0, 1)[None].float() / 255
    left, top, right, bottom = (18 - 8.3) / 64, (32 - 8.3) / 64, (18 + 8.3) / 64, (32 + 8.3) / 64
    reward = load("layout-iou", detector="shapes")
    for picture, box in (
        (image, [left, top, right, bottom]),
        (image[:, :, 32:224], [left, (top - 1 / 8) * 4 / 3, right, (bottom - 1 / 8) * 4 / 3]),
    ):
        values = checked_score(reward, picture, [""], [{"layout": [{"class": "circle", "box": box}]}]).values
        assert values.item() > 0.85
