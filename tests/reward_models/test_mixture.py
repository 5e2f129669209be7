"""Weighted sums of rewards."""

import math

import pytest
import torch

from reward_models import RewardError, RewardResult, RewardSpec, checked_score
from reward_models.mixture import WeightedSum

IMAGES, PROMPTS = torch.zeros(3, 3, 8, 8), ["a", "b", "c"]


class Fixed:
    def __init__(self, name, values, parts=None, reasons=(), **spec):
        self.spec = RewardSpec(name, **spec)
        self.result = RewardResult(torch.tensor(values), parts or {}, list(reasons))

    def score(self, images, prompts, metadata, groups=None):
        return self.result


def mix(weights, *rewards):
    return WeightedSum({r.spec.name: r for r in rewards}, weights)


def test_sum_keeps_its_parts_raw():
    a, b = Fixed("a", [1.0, 2.0, 3.0], {"inner": torch.tensor([7.0, 8.0, 9.0])}), Fixed("b", [10.0, 20.0, 30.0])
    result = checked_score(mix({"a": 2, "b": -0.5}, a, b), IMAGES, PROMPTS)
    assert result.values.tolist() == [-3, -6, -9]
    assert {k: v.tolist() for k, v in result.parts.items()} == {"inner": [7, 8, 9], "a": [1, 2, 3], "b": [10, 20, 30]}


def test_a_missing_part_makes_the_sum_missing_with_its_reason():
    a = Fixed("a", [math.nan, 2.0, math.nan], reasons=["no face", None, "dark"])
    b = Fixed("b", [math.nan, 1.0, 1.0])
    result = checked_score(mix({"a": 1, "b": 1}, a, b), IMAGES, PROMPTS)
    assert result.missing.tolist() == [True, False, True] and result.values[1] == 3
    assert result.reasons == ["a: no face; b: b gave NaN", None, "a: dark"]
    only_logged = checked_score(mix({"a": 0, "b": 1}, a, b), IMAGES, PROMPTS)
    assert only_logged.missing.tolist() == [True, False, False] and only_logged.parts["a"][1] == 2


def test_parts_of_the_same_name_stay_apart():
    x, y = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    for second in (x, y):  # whatever the data: processes must agree on the names
        both = Fixed("a", [0.0] * 3, {"p": x}), Fixed("b", [0.0] * 3, {"p": second})
        parts = checked_score(mix({"a": 1, "b": 1}, *both), IMAGES, PROMPTS).parts
        assert parts.keys() == {"a", "b", "p", "b/p"}
        assert parts["p"].tolist() == [1, 2, 3] and torch.equal(parts["b/p"], second)


def test_a_bad_part_is_named():
    with pytest.raises(RewardError, match="'b'.*shape"):
        checked_score(mix({"a": 1, "b": 1}, Fixed("a", [1.0] * 3), Fixed("b", [1.0] * 2)), IMAGES, PROMPTS)


def test_spec_of_a_sum():
    a, b = Fixed("a", [0.0] * 3, range=(0.0, 1.0)), Fixed("b", [0.0] * 3, range=(-1.0, 2.0), scope="group")
    spec = mix({"a": 2, "b": -1}, a, b).spec
    assert spec.range == (-2.0, 3.0) and spec.scope == "group" and spec.name == "2 a + -1 b"


@pytest.mark.parametrize(
    ("weights", "said"),
    [({"a": math.inf}, "finite"), ({"a": 0}, "only zero"), ({"b": 1}, "one weight"), ({}, "one weight")],
)
def test_weights_that_do_not_fit(weights, said):
    with pytest.raises(ValueError, match=said):
        mix(weights, Fixed("a", [0.0] * 3))


def test_a_cost_needs_a_negative_weight():
    cost = Fixed("a", [1.0, 2.0, 3.0], higher_is_better=False)
    with pytest.raises(ValueError, match="negative weight"):
        mix({"a": 1}, cost)
    assert checked_score(mix({"a": -1}, cost), IMAGES, PROMPTS).values.tolist() == [-1, -2, -3]


class Linear:
    """``slope * mean grey`` with a gradient, and a constant doubt."""

    def __init__(self, slope, doubt=None):
        self.spec = RewardSpec(f"linear {slope}", range=(0.0, 10.0), differentiable=True)
        self.slope, self.doubt = slope, doubt

    def differentiable(self, images, prompts):
        return self.slope * images.mean((1, 2, 3))

    def score(self, images, prompts, metadata, groups=None):
        doubt = None if self.doubt is None else torch.full((len(images),), self.doubt)
        return RewardResult(self.differentiable(images, prompts), uncertainty=doubt)


def test_a_sum_has_the_gradient_of_its_used_parts():
    images = (torch.arange(3 * 192).reshape(3, 3, 8, 8) % 256 / 255).requires_grad_()
    fixed = Fixed("fixed", [1.0] * 3)
    total = WeightedSum({"a": Linear(2.0), "b": Linear(5.0), "c": fixed}, {"a": 3.0, "b": -1.0, "c": 0.0})
    assert total.spec.differentiable
    values = total.differentiable(images, PROMPTS)
    assert values.tolist() == pytest.approx(checked_score(total, images.detach(), PROMPTS).values.tolist(), rel=1e-6)
    (slope,) = torch.autograd.grad(values.sum(), images)
    assert torch.allclose(slope, torch.full_like(slope, (3 * 2 - 5) / 192))
    inner = WeightedSum({"sum": total}, {"sum": 2.0})  # sums of sums
    assert torch.allclose(inner.differentiable(images, PROMPTS), 2 * values)
    stiff = WeightedSum({"a": Linear(2.0), "c": fixed}, {"a": 1.0, "c": 1.0})
    assert not stiff.spec.differentiable
    with pytest.raises(ValueError, match="'c'.*gradient"):
        stiff.differentiable(images, PROMPTS)


def test_doubts_add_in_squares_where_all_are_known():
    parts, weights = {"a": Linear(1.0, 0.5), "b": Linear(1.0, 3.0), "c": Linear(1.0)}, {"a": 8.0, "b": -1.0, "c": 0.0}
    assert checked_score(WeightedSum(parts, weights), IMAGES, PROMPTS).uncertainty.tolist() == [5.0] * 3  # (4, 3)
    assert checked_score(WeightedSum(parts, weights | {"c": 1.0}), IMAGES, PROMPTS).uncertainty is None
