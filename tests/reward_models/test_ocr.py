"""The OCR reward: its rules against hand arithmetic and brute force, and the real reader on rendered text."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from reward_models import checked_score, load
from reward_models.ocr import OcrReward, Piece, normalised, reading_order, similarities, target_text

PROMPTS = Path(__file__).parents[2].parent / "shared" / "data" / "flow_grpo" / "ocr_test.txt"
BLACK = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('a sign that says "Open Now"', "opennow"),
        ("a sign that says “Open Now”", "opennow"),
        ('mixed “marks"', "marks"),
        ('"Big" above "Small print"', "bigsmallprint"),
        ('a 5" ruler', None),
        ('words " " and ""', None),
        ("no quotation", None),
        ("it's the dog's", None),
        ("牌子上写着“你好 世界”", "你好世界"),
        ('wide "ＡＢＣ"', "abc"),  # full-width letters
        ('the formula "E=mc²"', "e=mc²"),  # superscripts stay: they look different
        ('two\nlines "a\n b\tc"', "abc"),
    ],
)
def test_target(prompt, target):
    assert target_text(prompt) == target


def test_target_as_published():
    assert target_text('"Big One" above "Small"', "flow_grpo") == "bigone"
    assert target_text("“curly”", "flow_grpo") is None and target_text('one " mark', "flow_grpo") is None
    assert normalised("A\tb c", "flow_grpo") == "a\tbc"


@pytest.mark.skipif(not PROMPTS.exists(), reason="needs the prompt data")
def test_every_published_prompt_has_a_target_and_both_ways_agree():
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    assert len(prompts) == 1018
    assert all(target_text(p) == target_text(p, "flow_grpo") != "" for p in prompts)


@pytest.mark.parametrize(
    ("recognised", "edit", "ned"),
    [
        ("hello", 1.0, 1.0),
        ("xxhelloyy", 1.0, 1 - 4 / 9),  # extra text costs only the second
        ("helo", 0.8, 0.8),
        ("", 0.0, 0.0),
        ("zzzzzzzzzz", 0.0, 0.0),
        ("hellzzzzzz", 0.0, 0.4),  # distance 6 of 10, held to the target's length
    ],
)
def test_similarities(recognised, edit, ned):
    assert similarities(recognised, "hello") == pytest.approx((edit, ned))


def test_an_empty_target_is_an_error():
    with pytest.raises(ValueError, match="empty target"):
        similarities("a", "")


@functools.cache
def slow_distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(slow_distance(a[1:], b) + 1, slow_distance(a, b[1:]) + 1, slow_distance(a[1:], b[1:]) + (a[0] != b[0]))


@given(st.text("ab", max_size=5), st.text("abc", min_size=1, max_size=5))
def test_similarities_against_a_slow_distance(recognised, target):
    edit, ned = similarities(recognised, target)
    d = slow_distance(recognised, target)
    assert ned == pytest.approx(1 - d / max(len(recognised), len(target)))
    assert edit == pytest.approx(1 if target in recognised else 1 - min(d, len(target)) / len(target))
    assert (edit == 1) == (target in recognised) and 0 <= min(edit, ned) and max(edit, ned) <= 1


def piece(text: str, x: float, y: float, height: float = 10, confidence: float = 0.9) -> Piece:
    return Piece(text, confidence, ((x, y), (x + 30, y), (x + 30, y + height), (x, y + height)))


WORDS = [piece("a", 0, 2), piece("b", 50, 0), piece("c", 100, 4), piece("d", 0, 20), piece("e", 60, 17)]


@given(st.permutations(WORDS))
def test_reading_order(pieces):
    assert "".join(p.text for p in reading_order(pieces)) == "abcde"


def test_small_text_beside_large_text_is_a_line_of_its_own():
    large, small = piece("large", 0, 0, height=100), piece("small", 50, 80, height=10)
    assert [p.text for p in reading_order([small, large])] == ["large", "small"]


def test_the_reader_gets_blue_first_and_compat_gives_it_red_first():
    seen: list[np.ndarray] = []

    def reader(pixels):
        seen.append(pixels)
        return [piece("two", 0, 50), piece("one", 0, 0), piece("unsure", 0, 80, confidence=0.2)]

    red = torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 6)
    ours = OcrReward(reader=reader, min_confidence=0.2).score(red, ['"one two"'], [{}])
    published = OcrReward(reader=reader, min_confidence=0.2, compat="flow_grpo").score(red, ['"one two"'], [{}])
    assert seen[0].shape == (4, 6, 3) and seen[0].dtype == np.uint8
    assert seen[0][0, 0].tolist() == [0, 128, 255] and seen[1][0, 0].tolist() == [255, 128, 0]
    assert ours.values.item() == 1 and ours.reasons == [None]
    assert published.values.item() == pytest.approx(0)  # "twoone" is six edits away from "onetwo": held to 0
    assert "twoone" in published.reasons[0]


def test_a_prompt_without_a_target_is_missing_and_the_others_are_not():
    reward = OcrReward(rule="ned", reader=lambda pixels: [piece("hi!", 0, 0)])
    result = checked_score(reward, BLACK.repeat(3, 1, 1, 1), ['"hi"', "nothing", '""'])
    assert result.values[0] == pytest.approx(2 / 3) and result.missing.tolist() == [False, True, True]
    assert result.parts["ocr-edit"][0] == 1 and "quotation marks" in result.reasons[1]


@pytest.mark.parametrize("wrong", [{"rule": "exact"}, {"compat": "other"}])
def test_unknown_options(wrong):
    with pytest.raises(ValueError, match="expected a rule"):
        OcrReward(reader=lambda pixels: [], **wrong)


# --- the real reader --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    return load("ocr")


def rendered(texts, size=(256, 160), points=30, ink=(20, 20, 160)):
    picture = Image.new("RGB", size, (255, 255, 255))
    font = ImageFont.load_default(size=points)
    for x, y, text in texts:
        ImageDraw.Draw(picture).text((x, y), text, fill=ink, font=font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def test_rendered_text_is_read(reward):
    image = rendered([(10, 20, "HELLO world"), (10, 90, "Flow 2026")])
    prompts = ['a card "Hello World Flow 2026"', 'a card “hello” with "world"', 'a card "Bonjour tous"']
    values = torch.cat([checked_score(reward, image, [p]).values for p in prompts])
    assert values[:2].tolist() == [1, 1] and 0 <= values[2] < 0.5


def test_an_image_without_text_scores_nothing_and_tiny_ones_do_no_harm(reward):
    assert checked_score(reward, torch.ones(1, 3, 64, 96), ['"text"']).values.item() == 0
    for height, width in ((1, 1), (100, 1), (3, 200)):
        assert checked_score(reward, torch.rand(1, 3, height, width), ['"text"']).values.item() < 1


def test_order_and_batch_do_not_matter(reward):
    images = torch.cat([rendered([(10, 40, "STOP")], (128, 96)), rendered([(10, 40, "GO")], (128, 96))])
    prompts = ['"stop"', '"go away"']
    together = reward.score(images, prompts, [{}, {}]).values
    apart = reward.score(images.flip(0), prompts[::-1], [{}, {}]).values.flip(0)
    assert together.tolist() == apart.tolist() == pytest.approx([1, 2 / 6])


def test_the_spec_names_the_reader(reward):
    assert reward.spec.name == "ocr" and "rapidocr" in reward.spec.version and reward.spec.range == (0, 1)
