"""T2I-CompBench's rules against values worked out by hand; ``compat`` against those of the published code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reward_models.compbench import (
    RELATIONS_3D,
    Spatial,
    blip_vqa,
    chunk_questions,
    complex_kind,
    distinct,
    mean_depth,
    mentions,
    numeracy,
    parse_numeracy,
    parse_spatial,
    position_2d,
    position_3d,
    read_vocabulary,
    spatial_2d,
    spatial_3d,
    three_in_one,
)
from reward_models.geneval import Detection

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "t2i_compbench"
COMPAT = "t2i_compbench"
WORDS = [("cat", "cats"), ("dog", "dogs"), ("fish", "fish"), ("mouse", "mice"), ("traffic light", "traffic lights"),
         ("light", "lights"), ("girl", "girls"), ("television", "televisions")]  # fmt: skip


def at(label, x, y=0.0, score=0.8, size=100.0):
    return Detection(label, (x, y, x + size, y + size), score)


# --- what a prompt asks for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("a cat on the left of a dog", ("cat", "dog", "on the left of")),
        ("a cat on side of a dog", ("cat", "dog", "on side of")),
        ("The cats sat on top of a red fish.", ("cat", "fish", "on the top of")),
        ("a traffic light near a mouse", ("traffic light", "mouse", "near")),
        ("a light cat next to a dog and a fish", ("cat", "dog", "next to")),  # the nearest on each side
        ("a cat nearby a dog", None),
        ("a cow near a dog", None),
        ("a cat", None),
    ],
)
def test_spatial_prompts(prompt, target):
    assert parse_spatial(prompt, WORDS) == target


def test_spatial_prompts_as_published():
    nouns = ["traffic", "light", "dog"]
    assert parse_spatial("a traffic light on top of a dog", nouns=nouns, compat=COMPAT) == (
        "traffic", "dog", "on top of",
    )  # fmt: skip
    assert parse_spatial("a bird nearby a dog", nouns=["bird", "dog"], compat=COMPAT).relation == "near"
    assert parse_spatial("a cat near", nouns=[]) is None
    behind = parse_spatial("a mouse hidden by a girl", WORDS, RELATIONS_3D)
    assert behind == Spatial("mouse", "girl", "hidden")


def test_names_are_whole_words_and_the_longest():
    assert mentions("Traffic lights, a catfish, a cat.", WORDS) == ["traffic light", "cat"]
    assert mentions("anything", []) == []


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("two cats, a dog and three mice", [("cat", 2), ("dog", 1), ("mouse", 3)]),
        ("five traffic lights near one light", [("traffic light", 5), ("light", 1)]),
        ("four fish", [("fish", 4)]),
        ("Two cats", [("cat", 2)]),
        ("two cat", [("cat", 2)]),
        ("two red cats", []),
        ("nine cats", []),
    ],
)
def test_numeracy_prompts(prompt, wanted):
    assert parse_numeracy(prompt, WORDS) == wanted


def test_numeracy_prompts_as_published():
    assert parse_numeracy("Two cats and two cat", WORDS, COMPAT) == []
    assert parse_numeracy("two cats and a fish", WORDS, COMPAT) == [("cat", 2), ("fish", 1)]


@pytest.mark.skipif(not DATA.exists(), reason="needs the prompt data")
def test_every_prompt_of_the_benchmark_is_read():
    words = read_vocabulary((DATA / "new_objects.txt").read_text())
    assert ("knife", "knives") in words and ("fish", "fish") in words and len(words) == len(set(words))

    def prompts(name):
        return (DATA / f"{name}.txt").read_text().split("\n")

    for prompt in filter(str.strip, prompts("numeracy_val")):
        ours, published = parse_numeracy(prompt, words), parse_numeracy(prompt, words, COMPAT)
        assert ours and (ours == published or set(published) < set(ours))
    known = sum(parse_spatial(p, words) is not None for p in prompts("spatial_val"))
    deep = sum(parse_spatial(p, words, RELATIONS_3D) is not None for p in prompts("3d_spatial_val"))
    assert known > 250 and deep > 250, (known, deep)
    kinds = [complex_kind(p, prompts("complex_val_spatial"), prompts("complex_val_action"))
             for p in prompts("complex_val") if p.strip()]  # fmt: skip
    assert len(kinds) == 300 and set(kinds) == {"spatial", "action", "both"}


# --- positions --------------------------------------------------------------------------------------------------------

BOX = (0.0, 0.0, 100.0, 100.0)


def moved(x: float, y: float = 0.0):
    return (x, y, x + 100, y + 100)


@pytest.mark.parametrize(
    ("a", "relation", "value"),
    [
        (moved(149, 149), "near", 1.0),
        (moved(500, 149), "next to", 1.0),  # one axis is enough
        (moved(200, 300), "on side of", 0.5),  # 150 / 300
        (moved(200), "on the right of", 1.0),
        (moved(200), "on the left of", 0.0),
        (moved(-200, 199), "on the left of", 1.0),
        (moved(-200, 200), "on the left of", 0.0),  # the axis must dominate strictly
        (moved(0, -150), "on the top of", 1.0),
        (moved(0, 150), "on the bottom of", 1.0),
        (moved(0, 150), "on the top of", 0.0),
        (moved(50), "on the right of", 0.3),  # IoU 1/3: 0.1 / (1/3)
        (moved(0), "on the right of", 0.0),
        (moved(200), "on top of", 0.0),  # without a rule
    ],
)
def test_positions_in_the_plane(a, relation, value):
    assert position_2d(a, BOX, relation) == pytest.approx(value)


def test_spatial_scores():
    left = Spatial("cat", "dog", "on the left of")
    assert spatial_2d([at("cat", 0, score=0.6), at("dog", 300, score=0.9)], left) == pytest.approx(0.875)
    assert spatial_2d([at("cat", 300, score=0.9), at("dog", 0, score=0.9)], left) == 0  # 0.45 is cut to 0
    assert spatial_2d([at("cat", 300, score=1.0), at("dog", 0, score=1.0)], left) == 0.5
    assert spatial_2d([at("cat", 0, score=1.0)], left) == 0 and spatial_2d([], left) == 0


def test_the_surest_counts_and_published_the_first():
    left = Spatial("girl", "dog", "on the left of")
    found = [at("person", 600, score=0.5), at("dog", 300, score=0.8), at("person", 0, score=0.8)]
    assert spatial_2d(found, left) == pytest.approx(0.9)
    assert spatial_2d(found, left, compat=COMPAT) == 0
    twice = Spatial("cat", "cat", "near")
    assert spatial_2d([at("cat", 0, score=0.9)], twice) == 0  # one cat is no pair
    assert spatial_2d([at("cat", 0, score=0.9)], twice, compat=COMPAT) == pytest.approx(0.95)


def test_depth_is_read_by_rows_and_published_by_columns():
    depth = np.zeros((100, 200))
    depth[:50, 100:] = 8.0  # upper right
    assert mean_depth(depth, (100, 0, 200, 50)) == 8 and mean_depth(depth, (0, 50, 100, 100)) == 0
    assert mean_depth(depth, (0, 100, 50, 200), COMPAT) == 8
    assert mean_depth(depth, (150.9, 20.2, 150.95, 20.3)) == 8  # less than a pixel is one pixel
    assert mean_depth(depth, (150, 25, 160, 75)) == 4
    assert np.isnan(mean_depth(depth, (500, 500, 600, 600)))


@pytest.mark.parametrize(("shift", "value"), [(20, 1.0), (50, 2 / 3), (100, 0.0)])
def test_positions_in_depth(shift, value):
    """Boxes 100 wide and ``shift`` apart, the right one nearer: IoU (100 - shift) / (100 + shift)."""
    depth = np.add.outer(np.arange(300.0), np.arange(300.0))  # symmetric: both ways of reading it agree
    near, far = moved(shift), BOX
    for compat in (None, COMPAT):
        assert position_3d(near, far, "in front of", depth, compat) == pytest.approx(value)
        assert position_3d(far, near, "in front of", depth, compat) == 0
        for relation in ("behind", "hidden"):
            assert position_3d(far, near, relation, depth, compat) == pytest.approx(value)
            assert position_3d(near, far, relation, depth, compat) == 0
        assert position_3d(near, near, "behind", depth, compat) == 0  # neither in front nor behind


def test_an_overlap_of_exactly_one_half_scores_nothing_in_the_published_rule():
    depth = np.tile(np.arange(400.0), (400, 1))
    small, large = (100.0, 0.0, 200.0, 100.0), (0.0, 0.0, 200.0, 100.0)
    assert position_3d(small, large, "in front of", depth) == 1
    assert position_3d(small, large, "in front of", depth.T, COMPAT) == 0


def test_scores_in_depth():
    depth = np.tile(np.arange(400.0), (400, 1))
    target = Spatial("cat", "dog", "in front of")
    found = [at("dog", 0, score=0.4), at("cat", 25, score=0.8)]  # IoU 75/125 = 0.6
    assert spatial_3d(found, target, depth) == pytest.approx(0.25 * 1.2 + 0.5)
    assert spatial_3d(found[1:], target, depth) == pytest.approx(0.2)  # no cut at 0.5
    cattle = [at("cattle", 0, score=0.4)]
    assert spatial_3d(cattle, target, depth) == 0 and spatial_3d(cattle, target, depth, COMPAT) == pytest.approx(0.1)
    # published: the last cat before the first dog counts
    order = [at("cat", 300, score=0.9), at("cat", 200, score=0.5), at("dog", 0, score=0.4), at("cat", 0, score=0.6)]
    assert spatial_3d(order, target, depth, COMPAT) == pytest.approx(0.25 * (0.5 + 0.4))


# --- counting ---------------------------------------------------------------------------------------------------------


def test_repeated_detections_are_one_object():
    inner = Detection("cat", (10, 10, 60, 60), 0.7)  # inside: IoU 0.255, but all of it in the larger one
    assert distinct([at("cat", 0), inner, at("dog", 0), at("cat", 0, score=0.3)]) == [at("cat", 0), at("dog", 0)]
    # 101 wide with the edges: moved by 5, IoU 96/106 = 0.906; by 6, 95/107 = 0.888, but 95/101 = 0.94 of a box
    assert len(distinct([at("cat", 0), at("cat", 6)])) == 1
    assert len(distinct([at("cat", 0), at("cat", 11)])) == 2  # 90/101 = 0.89


@pytest.mark.parametrize(
    ("number", "value"), [(0, 0.0), (1, 0.5), (2, 1.0), (3, 0.5)]
)  # two cats are wanted, no dog is there
def test_numeracy(number, value):
    found = [at("cat", 200 * i) for i in range(number)]
    assert numeracy(found, [("cat", 2)]) == value
    assert numeracy(found, [("cat", 2), ("dog", 1)]) == value / 2


def test_numeracy_as_published():
    cattle = [at("cattle", 0), at("cat", 200)]
    assert numeracy(cattle, [("cat", 1)]) == numeracy(cattle, [("cat", 1)], COMPAT) == 1  # there is a cat: no renaming
    assert numeracy(cattle[:1], [("cat", 1)]) == 0 and numeracy(cattle[:1], [("cat", 1)], COMPAT) == 1
    # the renaming stays: the cattle that became a cat is no longer there
    both = [("cat", 1), ("cattle", 1)]
    assert numeracy(cattle[:1], both, COMPAT) == 0.5 and numeracy(cattle[:1], both) == 0.5
    television = [at("tv", 0)]
    assert numeracy(television, [("television", 1)]) == 1 and numeracy(television, [("television", 1)], COMPAT) == 0
    assert numeracy([at("person", 0), at("boat", 200)], [("girl", 1), ("ship", 1)]) == 1
    assert numeracy([], []) is None


# --- answers ----------------------------------------------------------------------------------------------------------


def test_questions():
    assert chunk_questions(["a red cat", "top", "a dog", "the left"]) == ["a red cat?", "a dog?"]
    assert len(chunk_questions([str(i) for i in range(12)])) == 8


def test_products_of_answers():
    assert blip_vqa([0.5, 0.25]) == 0.125 and blip_vqa([]) is None and blip_vqa([], COMPAT) == 1
    assert blip_vqa([0.12345, 0.5]) == pytest.approx(0.061725)
    assert blip_vqa([0.12344, 0.5], COMPAT) == pytest.approx(0.0617)


def test_three_in_one():
    scores = {"spatial": 0.9, "blip_vqa": 0.3, "clip": 0.6}
    assert three_in_one("spatial", scores) == pytest.approx(0.6)
    assert three_in_one("action", scores) == pytest.approx(0.45)
    assert three_in_one("both", scores) == pytest.approx(0.6)
    spatial, action = ["The red hat was on top."], ["A dog ran. It was fast."]
    assert complex_kind("the red HAT was on top", spatial, action) == "spatial"
    assert complex_kind("A dog ran.", spatial, action) == "action"
    assert complex_kind("A dog slept.", spatial, action) == "both"
