"""The Shapes prompts and pictures: splits, parsing, and scenes that hold what the prompt says."""

import itertools
import math

import numpy as np
import pytest

from reward_models.geneval import relations
from reward_models.shapes import grammar, render

SPLITS = {split: grammar.prompts(split) for split in grammar.SPLITS}
EVERY = list(itertools.chain(*SPLITS.values()))


def test_splits_are_disjoint_and_hold_every_task():
    texts = {split: {m["prompt"] for m in prompts} for split, prompts in SPLITS.items()}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["held_out"]
    assert len(EVERY) == len({m["prompt"] for m in EVERY})
    for split in ("train", "test"):
        assert {m["tag"] for m in SPLITS[split]} == set(grammar.TASKS)


def test_a_test_prompt_is_not_a_training_prompt_in_other_words():
    def contents(split):
        return [(m["tag"], grammar.describe(m["tag"], m["include"])) for m in SPLITS[split]]

    train, test, held_out = (contents(split) for split in ("train", "test", "held_out"))
    assert not set(train) & set(test) and not (set(train) | set(test)) & set(held_out)
    assert len(set(test)) == len(test) and len(set(held_out)) == len(held_out)  # one phrasing each
    for task in grammar.TASKS:
        new = sum(tag == task for tag, _ in test)
        assert new >= 2 and 0.25 <= new / (new + sum(tag == task for tag, _ in set(train))) <= 0.34


def test_pretraining_sees_every_phrasing_of_every_seen_content():
    seen = {m["prompt"] for task in grammar.TASKS for m in grammar.seen_prompts(task)}
    assert {m["prompt"] for m in SPLITS["train"] + SPLITS["test"]} <= seen
    assert not seen & {m["prompt"] for m in SPLITS["held_out"]}
    assert len(seen) == len(SPLITS["train"]) + len(grammar.PHRASES) * len(SPLITS["test"])


def test_held_out_combinations_are_never_seen():
    def pairs(split):
        return {(c["class"], c["color"]) for m in SPLITS[split] for c in m["include"] if "color" in c}

    everything = set(itertools.product(grammar.SHAPES, grammar.COLOURS))
    assert len(everything - pairs("train")) == 6 and not (everything - pairs("train")) & pairs("test")


def test_parsing_is_the_inverse_of_writing():
    for metadata in EVERY:
        assert grammar.parse(metadata["prompt"]) == metadata
    for other in ("a photo of a dog", "three red", "", "a red star near a circle"):
        assert grammar.parse(other) is None


def test_prompts_by_hand():
    def of(text):
        return grammar.parse(text)

    assert of("a photo of two crosses") == {
        "tag": "counting",
        "include": [{"class": "cross", "count": 2}],
        "exclude": [{"class": "cross", "count": 3}],
        "prompt": "a photo of two crosses",
    }
    position = of("an orange star above a circle")
    assert position["include"] == [
        {"class": "circle", "count": 1},
        {"class": "star", "count": 1, "color": "orange", "position": ["above", 0]},
    ]


def test_selection():
    few = grammar.prompts("test", ["counting", "colors"], per_task=5)
    assert [m["tag"] for m in few] == ["counting"] * 5 + ["colors"] * 5
    with pytest.raises(ValueError, match="'valid'"):
        grammar.prompts("valid")
    with pytest.raises(ValueError, match="'colours'"):
        grammar.prompts("test", ["colours"])


@pytest.mark.parametrize("seed", [0, 1])
def test_scenes_hold_exactly_what_was_asked_for(seed):
    rng = np.random.default_rng(seed)
    for metadata in grammar.prompts("test", per_task=8):
        scene = render.sample_scene(metadata, rng)
        wanted = [(c["class"], c.get("color")) for c in metadata["include"] for _ in range(c["count"])]
        assert [
            (s.name, s.colour if colour else None) for s, (_, colour) in zip(scene.shapes, wanted, strict=True)
        ] == wanted
        boxes = []
        for shape in scene.shapes:
            ys, xs = render.mask(shape).nonzero()
            assert len(xs) > 40 and xs.min() > 0 and ys.min() > 0 and xs.max() < 63 and ys.max() < 63
            boxes.append((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
        for a, b in itertools.combinations(scene.shapes, 2):
            assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius
        for clause in metadata["include"]:
            if "position" in clause:
                assert clause["position"][0] in relations(boxes[1], boxes[0])


def test_pictures_are_anti_aliased_and_repeatable():
    metadata = grammar.parse("a red circle")
    scene = render.sample_scene(metadata, np.random.default_rng(7))
    picture = render.render(scene)
    assert scene == render.sample_scene(metadata, np.random.default_rng(7))
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    (circle,) = scene.shapes
    coverage = (picture[..., 1].astype(float) - scene.ground[1]) / (circle.rgb[1] - scene.ground[1])
    assert coverage.sum() == pytest.approx(math.pi * (0.92 * circle.radius) ** 2, rel=0.05)
    assert ((coverage > 0.1) & (coverage < 0.9)).any()
