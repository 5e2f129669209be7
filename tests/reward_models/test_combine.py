"""Rules that make one reward of several, the grammar of configs, levels and regions of an image."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reward_models
from reward_models import RewardError, RewardResult, RewardSpec, checked_score, recipe
from reward_models.combine import Combined, Gate, Trust, geometric_mean, minimum, product, spread, trust_weights
from reward_models.geneval import Detection
from reward_models.regions import Hierarchy, Regional, best_boxes, crop, region_map, relations, subjects, to_grid
from reward_models.schedule import Schedule, at

NAN = math.nan
IMAGES, PROMPTS = torch.zeros(3, 3, 8, 8), ["a", "a", "b"]


class Fixed:
    """A reward of given values."""

    def __init__(self, name, values, reasons=(), **spec):
        self.spec = RewardSpec(name, **{"range": (0.0, 1.0), **spec})
        self.values, self.reasons = torch.tensor(values), list(reasons)

    def score(self, images, prompts, metadata, groups=None):
        return RewardResult(self.values, reasons=self.reasons)


def both(a, b, **spec):
    return {"a": Fixed("a", a, **spec), "b": Fixed("b", b, **spec)}


def values(reward, images=IMAGES, prompts=PROMPTS, metadata=None, groups=None):
    return checked_score(reward, images, prompts, metadata, groups, all_missing="allow").values.tolist()


# --- rules ------------------------------------------------------------------------------------------------------------


def test_rules_by_hand():
    parts = both([0.5, 1.0, 0.0], [0.5, 0.25, 1.0])
    one = {"a": 1.0, "b": 1.0}
    assert values(Combined(parts, one, "product")) == [0.25, 0.25, 0.0]
    assert values(Combined(parts, one, "minimum")) == [0.5, 0.25, 0.0]
    assert values(Combined(parts, one, "geometric_mean")) == [0.5, 0.5, 0.0]
    # (0.5 0.5^3)^(1/4) = 0.5, (1 0.25^3)^(1/4) = 2^-1.5
    assert values(Combined(parts, {"a": 1.0, "b": 3.0}, "geometric_mean")) == pytest.approx([0.5, 2**-1.5, 0.0])
    result = checked_score(Combined(parts, one, "ensemble"), IMAGES, PROMPTS)
    assert result.values.tolist() == [0.5, 0.625, 0.5]
    assert result.uncertainty.tolist() == [0.0, 0.375, 0.5]
    assert result.parts["a"].tolist() == [0.5, 1.0, 0.0]  # the raw values stay


def test_a_weight_of_zero_is_logged_only_and_a_missing_part_is_missing():
    parts = both([0.5, NAN, 0.5], [0.5, 0.5, NAN], reasons=[])
    out = checked_score(Combined(parts, {"a": 1.0, "b": 0.0}, "minimum"), IMAGES, PROMPTS)
    assert out.missing.tolist() == [False, True, False] and out.parts["b"][2].isnan()
    out = checked_score(Combined(parts, {"a": 1.0, "b": 1.0}, "product"), IMAGES, PROMPTS)
    assert out.missing.tolist() == [False, True, True] and "b gave NaN" in out.reasons[2]


class Channel:
    """The mean of one colour channel, with a gradient."""

    def __init__(self, number):
        self.spec, self.number = RewardSpec(f"channel {number}", range=(0.0, 1.0), differentiable=True), number

    def differentiable(self, images, prompts):
        return images[:, self.number].mean((1, 2))

    def score(self, images, prompts, metadata, groups=None):
        return RewardResult(self.differentiable(images, prompts))


def test_a_rule_has_the_gradient_of_its_used_parts():
    images = torch.zeros(1, 3, 8, 8)
    images[0, 0], images[0, 1] = 51 / 255, 204 / 255  # 0.2 and 0.8
    images.requires_grad_()
    parts = {"a": Channel(0), "b": Channel(1), "c": Fixed("c", [0.5])}
    weights = {"a": 1.0, "b": 1.0, "c": 0.0}
    # d / d a, d / d b of: a b; min(a, b); sqrt(a b); (a + b) / 2
    slopes = {"product": (0.8, 0.2), "minimum": (1, 0), "geometric_mean": (1.0, 0.25), "ensemble": (0.5, 0.5)}
    for rule, wanted in slopes.items():
        reward = Combined(parts, weights, rule)
        assert reward.spec.differentiable
        value = reward.differentiable(images, ["p"])
        assert value.tolist() == pytest.approx(values(reward, images.detach(), ["p"]), rel=1e-6)
        (slope,) = torch.autograd.grad(value.sum(), images)
        assert slope.sum((0, 2, 3)).tolist() == pytest.approx([*wanted, 0], rel=1e-5)
    stiff = Combined(parts, weights | {"c": 1.0}, "product")
    assert not stiff.spec.differentiable
    with pytest.raises(ValueError, match="'c'.*gradient"):
        stiff.differentiable(images, ["p"])


positive = st.lists(st.floats(0.01, 10), min_size=2, max_size=5)


@given(positive, st.data())
def test_the_means_lie_in_order(row, data):
    weights = data.draw(st.lists(st.floats(0.1, 5), min_size=len(row), max_size=len(row)))
    v, w = torch.tensor(row, dtype=torch.float64)[:, None], torch.tensor(weights, dtype=torch.float64)
    low, geometric, high = minimum(v, w).item(), geometric_mean(v, w).item(), v.max().item()
    assert low * (1 - 1e-9) <= geometric <= (w @ v / w.sum()).item() * (1 + 1e-9) <= high * (1 + 2e-9)
    assert geometric == pytest.approx(
        math.exp(sum(w * math.log(x) for w, x in zip(weights, row, strict=True)) / sum(weights))
    )
    assert product(v, torch.ones_like(w)).item() == pytest.approx(math.prod(row))
    assert spread(v, w).item() <= (high - low) / 2 + 1e-9  # Popoviciu


def test_spec_of_a_combination():
    parts = {"a": Fixed("a", [0.0] * 3, range=(0.5, 2.0)), "b": Fixed("b", [0.0] * 3, range=(0.0, 3.0), scope="group")}
    spec = Combined(parts, {"a": 1.0, "b": 1.0}, "product").spec
    assert spec.range == (0.0, 6.0) and spec.scope == "group" and spec.name == "product(a, b)"
    named = Combined({"looks": parts["a"], "b": parts["b"]}, {"looks": 2.0, "b": 1.0}, "product").spec
    assert named.name == "product(looks: a^2, b)"  # a free label does not hide which reward it is
    parts["b"] = Fixed("b", [0.0] * 3, range=(0.0, math.inf))
    assert Combined(parts, {"a": 1.0, "b": 1.0}, "minimum").spec.range == (0.0, 2.0)


def test_combinations_that_would_mislead():
    with pytest.raises(ValueError, match="never negative"):
        Combined(both([0.0] * 3, [0.0] * 3, range=(-1.0, 1.0)), {"a": 1.0, "b": 1.0}, "product")
    with pytest.raises(ValueError, match="less is better"):
        Combined(both([0.0] * 3, [0.0] * 3, higher_is_better=False), {"a": 1.0, "b": 1.0}, "minimum")
    with pytest.raises(ValueError, match="no weights"):
        Combined(both([0.0] * 3, [0.0] * 3), {"a": 2.0, "b": 1.0}, "minimum")
    with pytest.raises(ValueError, match="weight >= 0"):
        Combined(both([0.0] * 3, [0.0] * 3), {"a": -1.0, "b": 1.0}, "product")


# --- gates, trust, schedules ------------------------------------------------------------------------------------------


def test_a_gate_multiplies_replaces_or_invalidates():
    one = {"value": 1.0, "gate": 1.0}
    parts = {"value": Fixed("v", [0.5, 0.8, 0.9]), "gate": Fixed("g", [0.2, 0.5, NAN])}
    assert values(Gate(parts, one))[:2] == pytest.approx([0.1, 0.4])
    assert values(Gate(parts, one, at_least=0.5, otherwise=-1.0))[:2] == pytest.approx([-1.0, 0.8])
    out = checked_score(Gate(parts, one, at_least=0.5, otherwise="missing"), IMAGES, PROMPTS)
    assert out.missing.tolist() == [True, False, True] and out.reasons[0] == "g 0.2 < 0.5"
    assert "g gave NaN" in out.reasons[2] and out.parts["value"].tolist() == pytest.approx([0.5, 0.8, 0.9])
    assert Gate(parts, one, at_least=0.5, otherwise=-1).spec.range == (-1.0, 1.0)
    closed = {"value": Fixed("v", [NAN, NAN, 0.5]), "gate": Fixed("g", [0.0, 1.0, 1.0])}
    assert values(Gate(closed, one, at_least=0.5, otherwise=0))[::2] == [0.0, 0.5]  # a closed gate needs no value


def test_a_gate_never_gives_negative_values_a_zero_by_itself():
    parts = {"value": Fixed("v", [0.0] * 3, range=(-5.0, 0.0)), "gate": Fixed("g", [0.0] * 3)}
    with pytest.raises(ValueError, match="value >= 0"):
        Gate(parts, {"value": 1.0, "gate": 1.0})
    with pytest.raises(ValueError, match="otherwise: None"):
        Gate(parts, {"value": 1.0, "gate": 1.0}, at_least=0.5)


def test_a_schedule_by_hand():
    steps = Schedule.read({"updates": [10, 20], "values": [0.2, 0.6]})
    assert [steps.at(u) for u in (0, 10, 19, 20, 99, None)] == [0.2, 0.2, 0.2, 0.6, 0.6, 0.6]
    line = Schedule((10, 20), (0.2, 0.6), "linear")
    assert [line.at(u) for u in (0, 10, 15, 20)] == pytest.approx([0.2, 0.2, 0.4, 0.6])
    for wrong in ("high", {"updates": [0]}, {"updates": [1, 1], "values": [1, 2]}, {"updates": [0], "values": [NAN]}):
        with pytest.raises(ValueError, match="schedule|finite"):
            Schedule.read(wrong)


def test_a_threshold_moves_with_the_update_through_everything_around_it():
    rising = {"updates": [0, 5], "values": [0.3, 0.7]}
    spec = {"combine": "minimum", "of": {"x": {"transform": "threshold", "least": rising, "of": "half"}, "half": 1}}
    reward = recipe.build(recipe.parse(spec), lambda named: Fixed(named.name, [0.5, 0.5, 0.5]))
    assert values(at(reward, 0)) == [0.5] * 3 and values(at(reward, 5)) == [0.0] * 3
    assert values(reward) == [0.0] * 3  # outside of training the last threshold holds
    gate = Gate({"value": Fixed("v", [1.0] * 3), "gate": Fixed("g", [0.5] * 3)}, {"value": 1.0, "gate": 1.0}, rising, 0)
    assert values(at(gate, 4)) == [1.0] * 3 and values(at(gate, 5)) == [0.0] * 3


def test_trust_by_hand():
    good, groups = torch.tensor([True, False, True, True]), torch.tensor([0, 0, 1, 1])
    learned = torch.tensor([0.2, 0.6, 0.1, 0.9])
    weights = trust_weights(good, learned, groups, torch.ones(4, dtype=torch.bool))
    assert weights.tolist() == pytest.approx([math.exp(-0.4)] * 2 + [1.0] * 2)  # group 1 has no bad image
    right = trust_weights(~good, learned, groups, torch.ones(4, dtype=torch.bool))
    assert right.tolist() == [1.0] * 4  # the learned reward agrees
    parts = {"verified": Fixed("v", [1.0, 0.0, 1.0]), "learned": Fixed("l", [0.2, 0.6, 0.5])}
    reward = Trust(parts, {"verified": 1.0, "learned": 0.5}, decay=10)
    wanted = [1 + 0.5 * math.exp(-0.4 - 0.2) * 0.2, 0.5 * math.exp(-0.6) * 0.6, 1 + 0.5 * math.exp(-0.2) * 0.5]
    assert values(at(reward, 2)) == pytest.approx(wanted)
    assert values(reward) == [1.0, 0.0, 1.0] and reward.spec.scope == "group"


def test_other_options_are_another_spec():
    value, trusted = (
        {"value": Fixed("v", [0.0]), "gate": Fixed("g", [0.0])},
        {"verified": Fixed("v", [0.0]), "learned": Fixed("l", [0.0])},
    )
    one = {"value": 1.0, "gate": 1.0}
    ramps = [{"updates": [0, u], "values": [0.2, 0.4]} for u in (5, 9)]
    gates = [Gate(value, one), *(Gate(value, one, ramp, 0.5) for ramp in ramps), Gate(value, one, ramps[0], 0.7)]
    both = {"verified": 1.0, "learned": 1.0}
    trusts = [
        Trust(trusted, both),
        Trust(trusted, both | {"learned": 2.0}),
        Trust(trusted, both, 0.7),
        Trust(trusted, both, decay=9),
    ]
    assert len({reward.spec for reward in gates + trusts}) == 8
    assert at(gates[1], 7).spec == gates[1].spec  # which update it is does not make it another reward


# --- the grammar ------------------------------------------------------------------------------------------------------


def test_the_same_reward_in_all_forms_of_the_grammar():
    load = lambda named: Fixed(named.name, [0.25, 0.5, 1.0])  # noqa: E731
    build = lambda spec: values(recipe.build(recipe.parse(spec), load))  # noqa: E731
    assert build("a") == [0.25, 0.5, 1.0]
    assert build({"a": 2, "b": {"weight": 1, "path": "x"}}) == [0.75, 1.5, 3.0]
    assert build({"combine": "sum", "of": ["a", "b"]}) == [0.5, 1.0, 2.0]
    assert build({"combine": "product", "of": {"a": 1, "b": {"reward": "c", "path": "x"}}}) == [0.0625, 0.25, 1.0]
    nested = {
        "a": 1,
        "best": {"weight": 2, "transform": "scale", "divide": 0.5, "of": {"combine": "minimum", "of": "ab"}},
    }
    with pytest.raises(ValueError, match="expected rewards as"):
        build(nested)
    nested["best"]["of"]["of"] = ["a", "b"]
    assert build(nested) == [1.25, 2.5, 5.0]
    assert list(recipe.names(recipe.parse(nested))) == ["a", "a", "b"]
    assert build({"combine": "gate", "at_least": 0.5, "otherwise": 0, "of": {"value": "a", "gate": "b"}}) == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"combine": "prodct", "of": ["a"]}, "'product'"),
        ({"combine": "product", "off": ["a"]}, "without of"),
        ({"combine": "product", "of": ["a"], "weights": 1}, "beside combine: product"),
        ({"combine": "gate", "of": {"value": "a", "gat": "b"}}, "gate and value.* Did you mean 'gate'"),
        ({"combine": "gate", "of": {"value": "a", "gate": "b"}, "at_lest": 1}, "Did you mean 'at_least'"),
        ({"combine": "gate", "of": {"value": {"path": "x"}, "gate": "b"}}, "no reward's name"),
        ({"transform": "pa", "of": "a"}, "Did you mean 'par'"),
        ({"transform": ["scale"], "of": "a"}, "expected one of scale"),
        ({"combine": "gate", "of": {1: "a", "gate": "b"}}, "expected gate and value"),
        ({"combine": "trust", "of": {"verified": "a", "learned": "b"}, "decay": "soon"}, "decay: 'soon'"),
        ({"combine": "regional", "of": {"global": "a", "local": "b"}, "detector": "shapes", "size": 0}, "size 0"),
        ({"transform": "par", "of": "a", "temprature": 2}, "Did you mean 'temperature'"),
        ({"transform": "par", "of": "a"}, "expected one of the two"),
        ({"transform": "threshold", "of": "a"}, "without least"),
        ({"transform": "threshold", "of": "a", "least": "high"}, "schedule"),
        ({"a": "much"}, "finite weight"),
        ({"a": {"combine": "minimum", "of": ["x", "y"]}}, "finite weight"),
        ({"combine": "minimum", "of": {"a": 0}}, "only zero"),
        ({}, "empty"),
        (3, "of type int"),
        ({"module:Class": {"weight": 1.0, "reward": "shapes"}}, "label"),
    ],
)
def test_what_does_not_follow_the_grammar_says_where(spec, said):
    with pytest.raises(ValueError, match=said):
        recipe.check(recipe.parse(spec))


def test_loading_a_combination_of_built_in_rewards():
    reward = reward_models.load({"combine": "geometric_mean", "of": ["shapes", "shapes-strict"]})
    result = checked_score(reward, torch.full((1, 3, 64, 64), 0.9), ["a photo of a star"])
    assert result.values.tolist() == [0.0] and {"shapes", "shapes-strict", "shapes-soft"} <= set(result.parts)
    with pytest.raises(ValueError, match="'shapes'"):
        reward_models.load({"combine": "minimum", "of": ["shaps"]})


# --- levels and regions -----------------------------------------------------------------------------------------------

STAR_AND_HEART = {
    "include": [
        {"class": "heart", "count": 1},
        {"class": "star", "count": 1, "color": "red", "position": ["left of", 0]},
    ]
}


LEVELS, BOTH = ("global", "subject", "relation"), ("global", "local")


class Boxes:
    """A detector that sees a star on the left, and a heart on the right of bright images."""

    classes = ("star", "heart")

    def detect(self, images):
        star, heart = Detection("star", (0, 0, 4, 8), 0.9), Detection("heart", (4, 0, 8, 8), 0.8)
        return [[star, heart] if image.mean() > 0.5 else [star] for image in images]


class Grey:
    """The mean grey of an image; remembers what it was asked."""

    def __init__(self, name="grey"):
        self.spec, self.asked = RewardSpec(name, range=(0.0, 1.0)), []

    def score(self, images, prompts, metadata, groups=None):
        self.asked += list(prompts)
        return RewardResult(images.mean((1, 2, 3)))


def test_units_of_a_prompt():
    assert [s.text for s in subjects(STAR_AND_HEART)] == ["a photo of a heart", "a photo of a red star"]
    assert relations(STAR_AND_HEART) == ["a photo of a star left of a heart"]
    assert subjects({}) is None and relations({}) == []
    orange = {"include": [{"class": "apple"}, {"class": "cat", "color": "orange", "position": ["above", 0]}]}
    assert [s.text for s in subjects(orange)] == ["a photo of an apple", "a photo of an orange cat"]
    assert relations(orange) == ["a photo of a cat above an apple"]
    assert subjects({"subjects": ["cat", {"class": "dog", "text": "a wet dog"}]})[1] == ("dog", "a wet dog", 1)


def test_hierarchy_by_hand():
    images = torch.zeros(2, 3, 8, 8)
    images[0, :, :, :4], images[0, :, :, 4:] = 0.4, 0.8  # bright: both are found
    images[1] = 0.2
    images = reward_models.to_8bit(images)
    rewards = {"global": Grey(), "subject": Grey(), "relation": Grey()}
    weights = {"global": 1.0, "subject": 10.0, "relation": 100.0}
    reward = Hierarchy(rewards, weights, Boxes(), margin=0.0, size=8)
    out = checked_score(reward, images, ["p", "p"], [STAR_AND_HEART, STAR_AND_HEART])
    star = crop(images[0], (0, 0, 4, 8), 0.0, 8).mean().item()  # the square around the box holds some of its neighbour
    heart = crop(images[0], (4, 0, 8, 8), 0.0, 8).mean().item()
    assert out.parts["subject"].tolist() == pytest.approx([(star + heart) / 2, 0.2 / 2], abs=1e-6)  # absent counts 0
    assert out.values[0].item() == pytest.approx(0.6 + 10 * (star + heart) / 2 + 100 * 0.6, rel=1e-5)
    assert out.values[1].item() == pytest.approx(0.2 + 10 * 0.1 + 100 * 0.2, rel=1e-5)
    assert rewards["subject"].asked == ["a photo of a heart", "a photo of a red star", "a photo of a red star"]


def test_a_detector_is_loaded_with_the_reward_and_where_it_computes(monkeypatch):
    asked = []

    def detector(given, device):
        asked.append((given, device))
        return Boxes()

    monkeypatch.setattr("reward_models.recipe.load_detector", detector)
    options = {"detector": "a/mask2former", "of": {"subject": "jpeg"}}
    nested = {"combine": "sum", "of": {"h": {"weight": 1.0, "combine": "hierarchy", **options}}}
    recipe.check(recipe.parse(nested))
    assert not asked  # checking loads nothing
    reward = reward_models.load(nested, device="meta")
    assert asked == [("a/mask2former", "meta")]
    checked_score(reward, torch.ones(1, 3, 8, 8), ["p"], [STAR_AND_HEART], all_missing="allow")
    monkeypatch.undo()
    for wrong, said in (("no_such_module:Eyes", "no_such_module"), (3, "detector 3"), (None, "detector None")):
        with pytest.raises(ValueError, match=said):
            reward_models.load({"combine": "regional", "detector": wrong, "of": dict.fromkeys(BOTH, "validity")})


def test_levels_and_regions_keep_the_raw_values_of_what_they_are_made_of():
    grey = torch.full((2, 3, 8, 8), 0.8)
    one = {"x": Grey("x"), "y": Grey("y")}
    nested = Combined(one, {"x": 1.0, "y": 1.0}, "product")
    scaled = recipe.transforms()["scale"](Grey("raw"), divide=2)
    reward = Hierarchy({"global": nested, "subject": nested, "relation": scaled}, dict.fromkeys(LEVELS, 1.0), Boxes())
    out = checked_score(reward, grey, ["p", "p"], [STAR_AND_HEART, {"include": [{"class": "star", "count": 1}]}])
    names = {"global", "subject", "relation", "global/x", "global/y", "subject/x", "subject/y", "relation/raw"}
    assert set(out.parts) == names
    assert out.parts["subject/x"].tolist() == pytest.approx([0.8, 0.8])
    assert out.parts["relation/raw"][0] == pytest.approx(0.8) and out.parts["relation/raw"][1].isnan()
    empty = checked_score(reward, grey, ["p", "p"], [{}, {}], all_missing="allow")
    assert set(empty.parts) == names  # whatever the prompts, so that batches and processes agree
    assert set(checked_score(reward, grey[:0], [], []).parts) == names
    bounded = recipe.transforms()["scale"](Grey("raw"), low=0, high=1)
    regional = Regional({"global": nested, "local": bounded}, {"global": 1.0, "local": 1.0}, Boxes())
    out = checked_score(regional, grey, ["p", "p"], [STAR_AND_HEART] * 2)
    assert set(out.parts) == {"global", "local", "global/x", "global/y", "local/raw"}
    assert out.parts["local/raw"].tolist() == pytest.approx([0.8] * 2)


def test_their_specs_name_the_detector_and_every_option():
    rewards, weights = {"global": Grey(), "subject": Grey()}, {"global": 1.0, "subject": 1.0}
    newer = Boxes()
    newer.version, newer.preprocessing = "eyes 2", "as it is"
    options: list[dict] = [{}, {"absent": 0.1}, {"margin": 0.2}, {"size": 64}, {"least": 0.4}]
    specs = [Hierarchy(rewards, weights, Boxes(), **each).spec for each in options]
    specs.append(Hierarchy(rewards, weights, newer).spec)
    assert len(set(specs)) == 6 and specs[0] == Hierarchy(rewards, weights, Boxes()).spec
    assert "Boxes" in specs[0].version and "eyes 2" in specs[-1].version and "as it is" in specs[-1].preprocessing
    parts, one = {"global": Grey(), "local": Grey()}, {"global": 1.0, "local": 1.0}
    assert (
        Regional(parts, one, Boxes()).spec != Regional(parts, one, newer).spec != Regional(parts, one, newer, 0.5).spec
    )
    for wrong in ({"size": 0}, {"size": 8.5}, {"margin": -1.0}, {"least": "high"}):
        with pytest.raises(ValueError, match="[Cc]orrect"):
            Regional(parts, one, Boxes(), **wrong)


def test_an_image_without_a_local_score_or_a_subject_has_no_region_map():
    class Shy(Grey):
        """Has no score for what is dark."""

        def score(self, images, prompts, metadata, groups=None):
            grey = images.mean((1, 2, 3))
            return RewardResult(grey.where(grey > 0.5, NAN), reasons=[None if g > 0.5 else "dark" for g in grey])

    images = reward_models.to_8bit(torch.tensor([0.2, 0.8, 0.8])[:, None, None, None].expand(3, 3, 8, 8))
    reward = Regional({"global": Grey(), "local": Shy()}, {"global": 1.0, "local": 1.0}, Boxes())
    out = checked_score(reward, images, ["p"] * 3, [STAR_AND_HEART, STAR_AND_HEART, {}])
    assert out.missing.tolist() == [True, False, True]
    assert out.reasons == ["local: dark", None, "the metadata names no subject"]
    assert out.region_map.isnan().all((1, 2)).tolist() == out.missing.tolist()
    assert checked_score(reward, images[:0], [], []).region_map.shape == (0, 8, 8)


def test_hierarchy_leaves_out_what_a_prompt_has_nothing_of():
    weights = {"global": 1.0, "relation": 1.0}
    reward = Hierarchy({"global": Grey(), "relation": Grey()}, weights)
    out = checked_score(reward, torch.full((1, 3, 8, 8), 0.2), ["p"], [{"include": [{"class": "star", "count": 1}]}])
    assert out.values.tolist() == pytest.approx([0.2]) and out.parts["relation"].isnan().all()
    nameless = Hierarchy({"subject": Grey()}, {"subject": 1.0}, Boxes())
    out = checked_score(nameless, torch.zeros(1, 3, 8, 8), ["p"], all_missing="allow")
    assert out.missing.all() and "names no subject" in out.reasons[0]
    with pytest.raises(ValueError, match="detector"):
        Hierarchy({"subject": Grey()}, {"subject": 1.0})


def test_a_reward_map_by_hand():
    # base 1/2; first box s = 0 writes 1/2, second s = 1 writes 1; overlap takes the larger; overall 0 halves everything
    found = region_map([(0, 0, 2, 2), (1, 1, 3, 3)], [0.0, 1.0], 0.0, (4, 4))
    wanted = torch.full((4, 4), 0.25)
    wanted[1:3, 1:3] = 0.5
    assert torch.equal(found, wanted)
    assert torch.equal(region_map([(0, 0, 4, 4)], [-1.0], 1.0, (4, 4)), torch.full((4, 4), 0.5))  # never below the base
    assert to_grid(found[None], (2, 2)).tolist() == [[[0.3125, 0.3125], [0.3125, 0.3125]]]


def test_a_regional_reward_gives_its_map():
    images = torch.full((1, 3, 8, 8), 0.25)
    reward = Regional({"global": Fixed("g", [1.0]), "local": Grey()}, {"global": 1.0, "local": 1.0}, Boxes(), size=8)
    out = checked_score(reward, images, ["p"], [STAR_AND_HEART])
    assert out.region_map.shape == (1, 8, 8) and out.values[0] == out.region_map.mean()
    assert torch.equal(out.region_map, torch.full((1, 8, 8), 0.5))  # a crop of 1/4 is -1/2, so 1/4: below the base
    with pytest.raises(ValueError, match="finite bounds"):
        Regional(both([0.0], [0.0], range=(0.0, math.inf)) | {}, {"a": 1.0, "b": 1.0}, Boxes())


def test_best_boxes_are_the_surest_of_the_class():
    found = [Detection("star", (0, 0, 1, 1), s) for s in (0.2, 0.9, 0.5)] + [Detection("heart", (0, 0, 9, 9), 1.0)]
    star = subjects({"include": [{"class": "star", "count": 2}]})[0]
    assert len(best_boxes(found, star, 0.3)) == 2 and len(best_boxes(found, star, 0.6)) == 1


def test_a_part_that_fails_is_named():
    with pytest.raises(RewardError, match="'b'"):
        values(Combined({"a": Fixed("a", [1.0] * 3), "b": Fixed("b", [1.0] * 2)}, {"a": 1.0, "b": 1.0}, "minimum"))
