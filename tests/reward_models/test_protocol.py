"""The checks between trainers and rewards."""

import math

import pytest
import torch

from reward_models import RewardError, RewardResult, RewardSpec, checked_score, to_8bit
from reward_models.protocol import as_result, pixels_of

IMAGES, PROMPTS = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), ["a", "b", "c"]


class Fixed:
    """A reward that gives a fixed answer, or raises it."""

    spec = RewardSpec("fixed")

    def __init__(self, answer):
        self.answer = answer

    def score(self, images, prompts, metadata, groups=None):
        self.seen = images, prompts, metadata, groups
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def values(*numbers, **more):
    return RewardResult(torch.tensor(numbers), **more)


def test_eight_bit_grid():
    x = torch.tensor([-1.0, 0.0, 0.5 / 255, 1.5 / 255, 100.4 / 255, 100.6 / 255, 1.0, 7.0])
    # halves go to the even neighbour (or to either, where the float lies beside the half)
    got = (to_8bit(x.view(1, 1, 2, 4)) * 255).flatten().tolist()
    assert [got[i] for i in (0, 1, 4, 5, 6, 7)] == [0, 0, 100, 101, 255, 255] and got[2] in (0, 1) and got[3] in (1, 2)
    every = torch.arange(256).float().view(1, 1, 16, 16) / 255
    assert torch.equal(to_8bit(every), every) and torch.equal(to_8bit(to_8bit(IMAGES)), to_8bit(IMAGES))


def test_what_the_reward_sees_and_what_comes_back():
    reward = Fixed(values(1, 2, math.nan, parts={"p": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}))
    result = checked_score(reward, IMAGES, PROMPTS, groups=torch.tensor([0, 0, 1]))
    images, prompts, metadata, groups = reward.seen
    assert torch.equal(images, to_8bit(IMAGES)) and prompts == PROMPTS and metadata == [{}, {}, {}]
    assert groups.tolist() == [0, 0, 1]
    assert result.values.dtype == result.parts["p"].dtype == torch.float32
    assert result.missing.tolist() == [False, False, True]
    assert result.reasons == [None, None, "fixed gave NaN"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (KeyError("colour"), "raised KeyError"),
        (values(1.0, 2.0), r"shape \(2,\), expected \(3,\)"),
        (RewardResult(torch.ones(3, 1)), r"shape \(3, 1\)"),
        (values(math.nan, math.nan, math.nan), "NaN for all 3 images"),
        (values(1.0, math.inf, 2.0), r"\+inf for image 1 \(prompt 'b'\)"),
        (values(1.0, 2.0, -math.inf), "-inf for image 2"),
        (RewardResult(torch.tensor([1e300, 0, 0], dtype=torch.float64)), "inf for image 0"),  # too large for float32
        (values(1.0, 2.0, 3.0, parts={"p": torch.tensor([0, 0, math.inf])}), "part 'p'"),
        (values(1.0, 2.0, 3.0, parts={"p": torch.zeros(2)}), "part 'p'"),
        (values(1.0, 2.0, 3.0, reasons=["x"]), "1 reasons for 3"),
        (RewardResult([1.0, 2.0, 3.0]), "is a list"),
        (RewardResult(torch.ones(3, dtype=torch.complex64)), "complex"),
        (values(1.0, 2.0, 3.0, uncertainty=torch.ones(2)), "uncertainty has shape"),
        (values(1.0, 2.0, 3.0, uncertainty=torch.tensor([0, 0, math.inf])), "uncertainty"),
        (values(1.0, 2.0, 3.0, region_map=torch.ones(2, 4, 4)), r"region_map has shape \(2, 4, 4\)"),
        (torch.ones(3), "expected a RewardResult"),
        (None, "NoneType"),
    ],
)
def test_a_bad_reward_is_an_error_that_names_it(answer, said):
    with pytest.raises(RewardError, match=said) as caught:
        checked_score(Fixed(answer), IMAGES, PROMPTS)
    assert "'fixed'" in str(caught.value)
    if isinstance(answer, Exception):
        assert caught.value.__cause__ is answer


def test_the_reason_for_all_missing_is_told_and_can_be_allowed():
    reward = Fixed(values(math.nan, math.nan, math.nan, reasons=["no key"] * 3))
    with pytest.raises(RewardError, match="no key"):
        checked_score(reward, IMAGES, PROMPTS)
    assert bool(checked_score(reward, IMAGES, PROMPTS, all_missing="allow").missing.all())


@pytest.mark.parametrize(
    ("images", "prompts", "more", "said"),
    [
        (IMAGES.permute(0, 2, 3, 1), PROMPTS, {}, "shape"),
        ((IMAGES * 255).long(), PROMPTS, {}, "uint8"),
        (IMAGES, PROMPTS[:2], {}, "2 prompts for 3 images"),
        (IMAGES, PROMPTS, {"metadata": [{}]}, "1 metadata"),
        (IMAGES, PROMPTS, {"groups": torch.zeros(4)}, "4 groups"),
        (IMAGES.clone().index_fill_(0, torch.tensor(1), math.nan), PROMPTS, {}, r"numbers \[1\]"),
    ],
)
def test_bad_input_is_refused(images, prompts, more, said):
    with pytest.raises(ValueError, match=said):
        checked_score(Fixed(values(1.0, 2.0, 3.0)), images, prompts, **more)


def test_interrupts_and_memory_pass_through():
    with pytest.raises(torch.OutOfMemoryError):
        checked_score(Fixed(torch.OutOfMemoryError("full")), IMAGES, PROMPTS)


def test_answers_of_plain_functions():
    assert as_result([1, None, 2.5], 3, "f").values.isnan().tolist() == [False, True, False]
    assert as_result(torch.tensor([1, 2]), 2, "f").values.tolist() == [1, 2]
    assert as_result(torch.tensor([1.0, 2.0]).numpy(), 2, "f").values.tolist() == [1, 2]
    for wrong, said in ((3.0, "float"), ("abc", "str"), ([1.0], "1 values for 3"), ([1, 2, "x"], "no number")):
        with pytest.raises(RewardError, match=said):
            as_result(wrong, 3, "f")


def test_bytes_are_the_grid_itself():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_8bit(every), to_8bit(every / 255)) and to_8bit(every).dtype == torch.float32
    reward = Fixed(values(1.0))
    dark = torch.ones(1, 3, 4, 4, dtype=torch.uint8)  # all ones: the type says that this is nearly black
    checked_score(reward, dark, ["a"])
    assert reward.seen[0].max() == torch.tensor(1.0) / 255
    assert pixels_of(reward.seen[0][0]).tolist() == dark[0].permute(1, 2, 0).tolist()


def test_uncertainty_and_region_map_come_back_in_float32():
    more = {"uncertainty": torch.ones(3, dtype=torch.float64), "region_map": torch.ones(3, 2, 2, dtype=torch.float64)}
    result = checked_score(Fixed(values(1.0, 2.0, 3.0, **more)), IMAGES, PROMPTS)
    assert result.uncertainty.dtype == result.region_map.dtype == torch.float32
