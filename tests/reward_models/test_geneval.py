"""GenEval's decision against values worked out by hand and against those of the published code."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_models.geneval import (
    Detection,
    Options,
    check_metadata,
    image_and_prompt_shares,
    iou,
    judge,
    range_of,
    record,
    relations,
    select,
)

COMPAT = Options(flow_grpo_compat=True)


def at(label, x, y=0.0, score=0.95, size=10.0):
    return Detection(label, (x, y, x + size, y + size), score)


def no_colours(objects):
    raise AssertionError("nothing asks for a colour here")


def painted(**colours):
    """A colour classifier that knows the colour of each object by its left edge: x20="red"."""
    return lambda objects: [colours[f"x{int(o.box[0])}"] for o in objects]


POSITION = {
    "tag": "position",
    "include": [{"class": "B", "count": 1}, {"class": "A", "count": 1, "position": ["right of", 0]}],
}
COUNTING = {"tag": "counting", "include": [{"class": "A", "count": 3}], "exclude": [{"class": "A", "count": 4}]}
TWO = {"tag": "two_object", "include": [{"class": "A", "count": 1}, {"class": "B", "count": 1}]}
COLOURS = {"tag": "colors", "include": [{"class": "A", "count": 1, "color": "red"}]}
ATTRIBUTES = {
    "tag": "color_attr",
    "include": [{"class": "A", "count": 1, "color": "red"}, {"class": "B", "count": 1, "color": "blue"}],
}


@pytest.mark.parametrize(
    ("found", "correct", "strict", "soft", "published"),
    [
        ([at("B", 0), at("A", 50)], True, True, 1.0, 1.0),
        ([at("B", 50), at("A", 0)], False, False, 2 / 3, 0.75),  # wrong relation
        ([at("A", 50)], False, False, 1 / 3, 1 / 3),  # the target is missing
        ([at("B", 0)], False, False, 1 / 3, 1 / 3),  # the object is missing
        ([], False, False, 0.0, 0.0),
        # two targets, the better one well placed: the official decision looks at one only
        ([at("B", 0, score=0.99), at("B", 90), at("A", 50)], True, False, 1 / 3, 1 / 3),
    ],
)
def test_position(found, correct, strict, soft, published):
    fixed, compat = judge(found, POSITION, no_colours), judge(found, POSITION, no_colours, COMPAT)
    assert (fixed.correct, fixed.strict) == (compat.correct, compat.strict) == (correct, strict)
    assert fixed.soft == pytest.approx(soft) and compat.soft == pytest.approx(published)


@pytest.mark.parametrize(("n", "soft"), enumerate([0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0, -1 / 3, -2 / 3]))
def test_counting_three(n, soft):
    answer = judge([at("A", 20 * i) for i in range(n)], COUNTING, no_colours)
    assert answer.soft == pytest.approx(soft)
    assert answer.strict == answer.correct == (n == 3)


def test_counting_uses_its_own_threshold_by_tag_alone():
    sure, unsure = [at("A", 20 * i) for i in range(3)], [at("A", 90, score=0.9)]
    assert judge(sure + unsure, COUNTING, no_colours).correct  # 0.9 is not strictly greater than 0.9
    assert not judge(sure + unsure, COUNTING | {"tag": "two_object"}, no_colours).correct  # four now: excluded
    assert not judge(
        [at("A", 0, score=0.3)], {"tag": "colors", "include": [{"class": "A", "count": 1}]}, no_colours
    ).correct


@pytest.mark.parametrize(
    ("found", "colours", "correct", "strict", "soft"),
    [
        ([at("A", 0), at("B", 50)], {"x0": "red", "x50": "blue"}, True, True, 1.0),
        ([at("A", 0), at("B", 50)], {"x0": "blue", "x50": "red"}, False, False, 0.5),  # swapped
        ([at("A", 0), at("B", 50)], {"x0": "red", "x50": "red"}, False, False, 0.75),  # one wrong
        ([at("A", 0)], {"x0": "red"}, False, False, 0.5),  # the second object is missing
        # one extra first object
        (
            [at("A", 0, score=0.99), at("A", 20), at("B", 50)],
            {"x0": "red", "x20": "red", "x50": "blue"},
            True,
            False,
            0.5,
        ),
    ],
)
def test_colour_attribution(found, colours, correct, strict, soft):
    answer = judge(found, ATTRIBUTES, painted(**colours))
    assert (answer.correct, answer.strict) == (correct, strict) and answer.soft == pytest.approx(soft)


@pytest.mark.parametrize(
    ("colours", "correct", "soft"),
    [(["red"], True, 1.0), (["blue"], False, 0.5), ([], False, 0.0), (["red", "red"], True, 0.0)],
)
def test_colours(colours, correct, soft):
    found = [at("A", 20 * i, score=0.99 - 0.01 * i) for i in range(len(colours))]
    answer = judge(found, COLOURS, painted(**{f"x{20 * i}": c for i, c in enumerate(colours)}))
    assert answer.correct == correct and answer.soft == pytest.approx(soft)


def test_a_second_object_of_the_right_colour_does_not_help_the_official_decision():
    found = [at("A", 0, score=0.99), at("A", 20, score=0.5)]
    answer = judge(found, COLOURS, painted(x0="blue", x20="red"))
    assert not answer.correct and "blue" in answer.reason


@pytest.mark.parametrize(
    ("found", "correct", "soft"),
    [
        ([at("A", 0), at("B", 50)], True, 1.0),
        ([at("A", 0)], False, 0.5),
        ([at("A", 0), at("A", 20), at("B", 50)], True, 0.5),
    ],
)
def test_two_objects(found, correct, soft):
    answer = judge(found, TWO, no_colours)
    assert answer.correct == correct and answer.soft == pytest.approx(soft)


def test_no_clause_scores_nothing():
    assert judge([at("A", 0)], {"tag": "x", "include": []}, no_colours).soft == 0.0


def test_relation_depends_on_the_gap_between_the_boxes():
    def beside(offset, dy=0.0):
        return relations((offset, dy, offset + 100, dy + 100), (0, 0, 100, 100))

    assert beside(20) == set() and beside(40) == set() and beside(41) == {"right of"}  # (41 - 20) / 41 > 0.5
    assert beside(-41) == {"left of"}
    assert beside(0, -90) == {"above"} and beside(0, 90) == {"below"}
    assert beside(200, 200) == {"right of", "below"}  # 180 / 283 on both axes
    assert beside(0) == set()


@given(st.tuples(*[st.floats(-100, 100)] * 4), st.tuples(*[st.floats(1, 50)] * 4))
def test_relations_mirror(centres, sizes):
    ax, ay, bx, by = centres
    aw, ah, bw, bh = sizes
    a, b = (ax, ay, ax + aw, ay + ah), (bx, by, bx + bw, by + bh)
    mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert {mirror[r] for r in relations(a, b)} == relations(b, a)


def test_iou_counts_whole_pixels():
    assert iou((0, 0, 9, 9), (0, 0, 9, 9)) == 1.0
    assert iou((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)  # sides of 10, shared 5 x 10
    assert iou((0, 0, 9, 9), (10, 0, 19, 9)) == 0.0
    assert iou((0, 0, -1, -1), (0, 0, -1, -1)) == 0.0


def test_ties_are_ordered_by_area_then_x_whatever_the_order_given():
    big, left, right = at("A", 70, size=20.0), at("A", 0), at("A", 30)
    for order in ([right, left, big], [big, right, left], [left, big, right]):
        assert select(order, "colors")["A"] == [big, left, right]


def test_select_keeps_sixteen_and_suppresses_only_when_asked():
    many = [at("A", i, score=0.9 - 0.01 * i) for i in range(20)]
    assert select(many, "colors")["A"] == many[:16]
    assert select(many, "colors", Options(max_overlap=0.5))["A"][1] == many[4]  # 11 - 4 of 11 + 4: 7/15 < 0.5 < 8/14
    assert select([at("A", 0), at("A", 0)], "colors")["A"] == [at("A", 0)] * 2  # duplicates count
    assert select([at("A", 0, score=0.2)], "colors") == {}


def test_the_two_side_figures():
    assert image_and_prompt_shares(["a", "a", "b", "b"], [1, 0, 0, 0]) == (0.25, 0.5)


def test_record_has_the_official_form():
    line = record("00000/0.png", POSITION | {"prompt": "p"}, judge([at("B", 0)], POSITION, no_colours))
    assert (line["tag"], line["prompt"], line["correct"]) == ("position", "p", False) and line["reason"]
    assert json.loads(line["details"]) == {"B": [[0, 0, 10, 10, 0.95]]}
    assert json.loads(line["metadata"])["include"] == POSITION["include"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"include": []}, "include"),
        ({"tag": None}, "tag"),
        ({"include": [{"class": "dog", "count": 1}]}, "'dog'"),
        ({"include": [{"class": "A", "count": 0}]}, "count"),
        ({"include": [{"class": "A", "count": 1, "color": "teal"}]}, "'teal'"),
        ({"include": [{"class": "A", "count": 1, "position": ["above", 0]}]}, "earlier"),
        ({"include": [{"class": "A", "count": 1}, {"class": "A", "count": 1, "position": ["near", 0]}]}, "'near'"),
        ({"include": [{"class": "A", "count": 1}, {"class": "A", "count": 1, "position": "above"}]}, "'above'"),
        ({"exclude": [{"class": "C", "count": 1}]}, "'C'"),
        ({"exclude": {"class": "A", "count": 1}}, "a list of clauses"),
    ],
)
def test_bad_metadata_is_named(change, said):
    assert check_metadata(POSITION, "AB", ("red",)) is None
    assert said in (check_metadata(POSITION | change, "AB", ("red",)) or "")


def test_without_classes_and_colours_any_are_right():
    other = {"include": [{"class": "dog", "count": 1, "color": "teal"}]}
    assert check_metadata(POSITION | other) is None
    assert "count" in (check_metadata(POSITION | {"include": [{"class": "dog"}]}) or "")


@pytest.mark.parametrize("metadata", [POSITION, COUNTING, TWO, COLOURS, ATTRIBUTES])
def test_keys_that_a_table_filled_up_with_nothing_are_absent(metadata):
    """A row of an Arrow or Parquet table has every key that any row has."""
    keys = ("class", "count", "color", "position")
    filled = metadata | {"include": [{key: clause.get(key) for key in keys} for clause in metadata["include"]]}
    filled |= {"exclude": metadata.get("exclude")}
    assert check_metadata(filled, "AB", ("red", "blue")) is None
    for found in ([], [at("B", 0), at("A", 50)], [at("A", 20 * i) for i in range(3)]):
        answers = [judge(found, m, lambda objects: ["red"] * len(objects), COMPAT) for m in (metadata, filled)]
        assert answers[0] == answers[1]


def test_ranges_of_the_three_kinds():
    kinds = ("x", "x-strict", "x-soft")
    assert [range_of(kind, kinds) for kind in kinds] == [(0, 1), (0, 1), (-14, 1)]
    most = [at("A", 20 * i) for i in range(40)]  # sixteen are kept, one is asked for
    assert judge(most, TWO | {"include": TWO["include"][:1]}, no_colours).soft == -14
    with pytest.raises(ValueError, match="x-strict"):
        range_of("y", kinds)


def test_detections_with_masks_compare_and_sort():
    mask = np.ones((2, 2), bool)
    a, b = Detection("A", (0, 0, 2, 2), 0.9, mask), Detection("A", (0, 0, 2, 2), 0.9, ~mask)
    assert a == b and select([a, b], "colors")["A"] == [a, b]
