"""T2I-CompBench's categories: which rule scores which prompt, by hand, and what is missing without its part."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from reward_models import load
from reward_models.compbench_reward import CompBench
from reward_models.geneval import Detection
from reward_models.protocol import RewardResult, RewardSpec


class Finds:
    """A cat of score 0.8 to the left of a dog of score 0.6, whatever the image."""

    classes = ("cat", "dog")

    def detect(self, images: torch.Tensor) -> list[list[Detection]]:
        return [[Detection("cat", (0, 0, 10, 10), 0.8), Detection("dog", (100, 0, 110, 10), 0.6)]] * len(images)


class Similar:
    spec = RewardSpec("similar")

    def score(self, images: Any, prompts: Any, metadata: Any, groups: Any = None) -> RewardResult:
        return RewardResult(torch.full((len(images),), 0.25))


@pytest.fixture
def scorer(tmp_path: Path) -> CompBench:
    (tmp_path / "names.txt").write_text("cat - cats\ndog - dogs\n")
    found = CompBench(clip=None, vocabulary=str(tmp_path / "names.txt"))
    found.detector, found.clip = Finds(), Similar()
    found.answerer = lambda images, questions: torch.tensor([0.5 if "red" in q else 0.9 for q in questions])
    found.chunks = lambda prompt: prompt.split(" and ")
    return found


def one(scorer: CompBench, prompt: str, **metadata: Any) -> tuple[float, str | None]:
    result = scorer.score(torch.zeros(1, 3, 16, 16), [prompt], [metadata])
    return float(result.values[0]), result.reasons[0]


def test_each_category_has_its_rule(scorer: CompBench) -> None:
    assert one(scorer, "a red cat and a dog", tag="color")[0] == pytest.approx(0.5 * 0.9)
    assert one(scorer, "a cat on the left of a dog", tag="spatial")[0] == pytest.approx(0.25 * 1.4 + 0.5)
    assert one(scorer, "a cat on the right of a dog", tag="spatial")[0] == 0  # 0.35 is below the cut at 0.5
    assert one(scorer, "two cats and a dog", tag="numeracy")[0] == pytest.approx((0.5 + 1) / 2)
    assert one(scorer, "anything", tag="non_spatial")[0] == 0.25
    prompt = "a cat on the left of a dog"
    for kind, parts in (("action", (0.9, 0.25)), ("spatial", (0.9, 0.85)), ("both", (0.9, 0.25, 0.85))):
        value = one(scorer, prompt, tag="complex", complex_kind=kind)[0]
        assert value == pytest.approx(sum(parts) / len(parts))


def test_depth_decides_in_front_of_and_behind(scorer: CompBench) -> None:
    near = torch.zeros(16, 120)
    near[:, :50] = 1.0  # the cat's half has the greater values: nearer
    assert one(scorer, "a cat in front of a dog", tag="3d_spatial")[1] == "no depth model was given"
    scorer.depth = lambda image: near
    front = one(scorer, "a cat in front of a dog", tag="3d_spatial")[0]
    behind = one(scorer, "a cat behind a dog", tag="3d_spatial")[0]
    assert front == behind == pytest.approx(0.35)  # the boxes do not overlap: no position in depth


@pytest.mark.parametrize(
    ("part", "tag", "said"),
    [
        ("answerer", "color", "no answerer"), ("detector", "spatial", "no detector"),
        ("clip", "non_spatial", "no CLIP"), ("chunks", "color", "noun chunks"),
        ("answerer", "complex", "blip_vqa: no answerer"), ("detector", "complex", "spatial: no detector"),
        ("clip", "complex", "clip: no CLIP"), (None, "x", "no category"),
    ],
)  # fmt: skip
def test_without_its_part_a_category_is_missing(scorer: CompBench, part: str | None, tag: str, said: str) -> None:
    if part:
        setattr(scorer, part, None)
    value, reason = one(scorer, "a cat on the left of a dog", tag=tag)
    assert math.isnan(value) and reason is not None and said in reason


def test_prompts_that_cannot_be_read_are_missing(scorer: CompBench) -> None:
    assert math.isnan(one(scorer, "a cat", tag="spatial")[0]) and math.isnan(one(scorer, "many", tag="numeracy")[0])
    assert one(scorer, "a red cat", tag="color", chunks=["x"])[0] == 0.5  # the option goes before the metadata
    scorer.chunks = None
    assert one(scorer, "a red cat", tag="color", chunks=["x"])[0] == pytest.approx(0.9)
    with pytest.raises(ValueError, match="expected 'module:function'"):
        CompBench(clip=None, depth="nowhere:f")


def test_unsure_detections_do_not_count(scorer: CompBench) -> None:
    scorer.threshold = 0.6  # the dog's score is not above it
    assert one(scorer, "a cat and a dog", tag="numeracy")[0] == pytest.approx(0.5)
    assert one(scorer, "a cat on the left of a dog", tag="spatial")[0] == 0


def test_an_object_that_the_detector_has_no_class_for_is_missing(scorer: CompBench) -> None:
    scorer.vocabulary = [*scorer.vocabulary, ("turtle", "turtles"), ("girl", "girls")]
    for prompt, tag in (
        ("two turtles", "numeracy"),
        ("a turtle near a dog", "spatial"),
        ("a girl near a cat", "spatial"),
    ):
        value, reason = one(scorer, prompt, tag=tag)
        assert math.isnan(value) and reason is not None and "has no class for" in reason
    scorer.detector.classes = ("cat", "dog", "person")
    assert one(scorer, "a girl near a cat", tag="spatial")[1] is None


def test_near_is_150_px_of_the_published_detector_s_image(scorer: CompBench) -> None:
    """The centres lie 100 px apart: near in 480 px, where 150 px are near, and far in 120 px, where 37.6 are."""
    scorer.detector.detect = lambda images: [
        [Detection("cat", (0, 0, 10, 10), 0.8), Detection("dog", (100, 100, 110, 110), 0.6)]
    ]
    prompt = "a cat near a dog"
    large = scorer.score(torch.zeros(1, 3, 480, 480), [prompt], [{"tag": "spatial"}]).values
    small = scorer.score(torch.zeros(1, 3, 120, 120), [prompt], [{"tag": "spatial"}]).values
    assert large.item() == pytest.approx(0.25 * 1.4 + 0.5)
    assert small.item() == pytest.approx(0.25 * 1.4 + 0.5 * 150 * 120 / 479 / 100)


def test_by_name(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("circle - circles\n")
    reward = load("t2i-compbench", detector="shapes", clip=None, vocabulary=str(tmp_path / "names.txt"))
    assert reward.spec.name == "t2i-compbench" and "ShapesDetector" in reward.spec.version
    assert reward.score(torch.zeros(1, 3, 64, 64), ["a circle"], [{"tag": "numeracy"}]).values.item() == 0
    for wrong in ("nowhere.txt", str(tmp_path)):
        with pytest.raises(ValueError, match="cannot be read"):
            load("t2i-compbench", clip=None, vocabulary=wrong)
    with pytest.raises(ValueError, match="t2i_compbench"):
        load("t2i-compbench", clip=None, compat="published")
