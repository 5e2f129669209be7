"""Win rates: by hand, by their sums, as released, and under judges that favour a place."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from judge_server import greys

from reward_models import RewardSpec, checked_score
from reward_models.judges.pairwise import (
    Comparison,
    ScorerJudge,
    coin,
    content_keys,
    flip_rate,
    flipped,
    judge_pairs,
    position_bias,
)
from reward_models.judges.win_rate import WinRate, flex_rewards, schedule, win_rates
from reward_models.protocol import RewardResult


class Judge:
    """Prefers the brighter image; or whatever ``rule(first level, second level)`` says."""

    def __init__(self, rule=None, weights=None, categories=None):
        self.rule = rule or (lambda a, b: 0.5 if a == b else float(a > b))
        self.spec = RewardSpec(name="by brightness", version="3", licence="none")
        self.asked, self.weights, self.categories = [], weights, categories or {}

    def compare(self, images, pairs, prompts, metadata):
        level = (images.mean((1, 2, 3)) * 255).round().int().tolist()
        self.asked += [(level[i], level[j]) for i, j in pairs]
        said = torch.tensor([self.rule(level[i], level[j]) for i, j in pairs], dtype=torch.float64)
        reasons = ["cannot tell" if p != p else None for p in said.tolist()]
        weights = None if self.weights is None else torch.tensor([self.weights(level[i], level[j]) for i, j in pairs])
        named = {
            name: torch.tensor([rule(level[i], level[j]) for i, j in pairs], dtype=torch.float64)
            for name, rule in self.categories.items()
        }
        return Comparison(said, reasons, weights=weights, categories=named)


def first(a, b):
    return 1.0


def rewards(images, judge=None, prompts=None, groups=None, **options):
    return checked_score(
        WinRate(judge or Judge(), **options), images, prompts or ["p"] * len(images), None, groups, all_missing="allow"
    )


FOUR = greys(0.9, 0.1, 0.6, 0.3)


def test_by_hand():
    result = rewards(FOUR)
    assert result.values.tolist() == pytest.approx([1, 0, 2 / 3, 1 / 3])
    assert result.reasons == [None] * 4
    assert result.parts["valid_pairs"].tolist() == [3] * 4 and result.parts["missing_pairs"].tolist() == [0] * 4
    assert result.parts["flip_rate"].tolist() == [0] * 4 and result.parts["position_bias"].tolist() == [0] * 4


def test_an_always_first_judge_as_released():
    """The verified values: position bias becomes reward by index."""
    assert rewards(FOUR, Judge(first), compat="pref_grpo").values.tolist() == pytest.approx([1, 0.667, 0.333, 0])


def test_an_always_first_judge_earns_nothing_in_both_orders():
    result = rewards(FOUR, Judge(first))
    assert result.values.tolist() == [0.5] * 4
    assert result.parts["flip_rate"].tolist() == [1] * 4
    assert result.parts["position_bias"].tolist() == [1] * 4
    assert result.parts["ties"].tolist() == [1] * 4


def test_the_released_mix():
    """Pair 0-1: the first; 0-2: not to be parsed, which its grammar takes for a tie; 1-2: the second."""
    said = {(230, 26): 1.0, (230, 153): 0.5, (26, 153): 0.0}
    result = rewards(FOUR[:3], Judge(lambda a, b: said[a, b]), compat="pref_grpo")
    assert result.values.tolist() == [0.75, 0, 0.75]


def test_the_same_mix_without_guessing():
    said = {frozenset((230, 26)): 230, frozenset((26, 153)): 153}
    judge = Judge(lambda a, b: float(said[frozenset((a, b))] == a) if frozenset((a, b)) in said else math.nan)
    result = rewards(FOUR[:3], judge)
    assert result.values.tolist() == [1, 0, 1]
    assert result.parts["missing_pairs"].tolist() == [1, 0, 1]


def test_an_image_alone():
    assert rewards(FOUR[:1], compat="pref_grpo").values.tolist() == [0]
    result = rewards(FOUR[:1])
    assert math.isnan(result.values[0]) and "no other image" in result.reasons[0]


def test_an_image_without_a_verdict_is_missing_and_the_others_are_not():
    result = rewards(FOUR, Judge(lambda a, b: math.nan if 26 in (a, b) else float(a > b)))
    assert result.values.isnan().tolist() == [False, True, False, False]
    assert "cannot tell" in result.reasons[1]
    assert result.values[[0, 2, 3]].tolist() == [1, 0.5, 0]


def test_one_order_without_an_answer_makes_the_pair_invalid():
    result = rewards(FOUR[:2], Judge(lambda a, b: math.nan if a < b else 1.0))
    assert result.values.isnan().all() and result.parts["flip_rate"].isnan().all()


def test_prompts_are_groups_where_none_are_given_and_never_meet():
    images = greys(0.9, 0.1, 0.6, 0.3)
    judge = Judge()
    result = rewards(images, judge, prompts=["a", "b", "a", "b"])
    assert result.values.tolist() == [1, 0, 0, 1] and len(judge.asked) == 4
    same = rewards(images, groups=torch.tensor([5, 2, 5, 2]))
    assert same.values.tolist() == [1, 0, 0, 1]
    with pytest.raises(Exception, match="different prompts in group"):
        rewards(images, prompts=["a", "b", "a", "b"], groups=torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("options", [{}, {"order": "random"}, {"opponents": 2}, {"aggregate": "bradley_terry"}])
def test_order_of_images_and_company_do_not_matter(options):
    images = greys(*[(37 * i % 101) / 101 for i in range(9)])
    biased = Judge(lambda a, b: 1.0 if a > b - 30 else 0.0)
    before = rewards(images, biased, groups=torch.zeros(9), **options).values
    mixed = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert rewards(images[mixed], biased, **options).values == pytest.approx(before[mixed], abs=1e-6)
    both = torch.cat([images, images[:4]])
    names = ["p"] * 9 + ["other"] * 4
    assert rewards(both, biased, prompts=names, **options).values[:9] == pytest.approx(before, abs=1e-6)


def test_random_orders_are_fair_on_average_and_follow_the_seed():
    images = greys(*[i / 30 for i in range(30)])
    judge = Judge(first)
    values = rewards(images, judge, order="random").values
    assert len(judge.asked) == 435
    swapped = sum(a > b for a, b in judge.asked) / 435
    assert 0.4 < swapped < 0.6  # five standard errors are 0.12
    assert 0.2 < float(values.min()) and float(values.max()) < 0.8
    assert values.tolist() == rewards(images, Judge(first), order="random").values.tolist()
    assert values.tolist() != rewards(images, Judge(first), order="random", seed=1).values.tolist()


def test_equal_images_tie_without_being_asked():
    judge = Judge(first)
    result = rewards(greys(0.5, 0.5, 0.9), judge)
    assert len(judge.asked) == 4 and result.values.tolist() == [0.5] * 3
    assert result.parts["flip_rate"].tolist() == [1] * 3


PREFERENCES = st.integers(2, 6).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(
            st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan]), min_size=n * (n - 1) // 2, max_size=n * (n - 1) // 2
        ),
    )
)


@given(PREFERENCES)
def test_sums_and_brute_force(drawn):
    n, said = drawn
    pairs = list(itertools.combinations(range(n), 2))
    rates = win_rates(n, pairs, torch.tensor(said, dtype=torch.float64))
    for i in range(n):
        games = [p if a == i else 1 - p for (a, b), p in zip(pairs, said, strict=True) if i in (a, b) and p == p]
        assert float(rates[i]) == pytest.approx(sum(games) / len(games)) if games else math.isnan(rates[i])
    if not any(map(math.isnan, said)):
        assert float(rates.sum()) == pytest.approx(n / 2)


def test_weights_of_verdicts():
    pairs, said = [(0, 1), (0, 2), (1, 2)], torch.tensor([1.0, 0.0, 1.0])
    rates = win_rates(3, pairs, said, torch.tensor([3.0, 1.0, 0.0]))
    assert rates.tolist() == [0.75, 0, 1]
    result = rewards(FOUR[:3], Judge(weights=lambda a, b: 0.0 if 26 in (a, b) else 0.5))
    assert math.isnan(result.values[1]) and "weight 0" in result.reasons[1]
    assert result.parts["agreement"][0] == 0.25


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 5))
def test_schedules(n, k, seed):
    keys = [f"image {i}" for i in range(n)]
    pairs = schedule(keys, k, seed)
    assert len(set(pairs)) == len(pairs) and all(0 <= i < j < n for i, j in pairs)
    met = [sum(i in pair for pair in pairs) for i in range(n)]
    k = min(k, n - 1)
    assert met == [k + 1 if k % 2 and n % 2 and k < n - 1 else k] * n
    reached = {0}
    for _ in range(n):
        reached |= {x for pair in pairs for x in pair if reached & set(pair)}
    assert len(reached) == n or k == 1  # with one opponent each, there are only pairs


def test_the_same_images_meet_in_any_order():
    keys = [f"image {i}" for i in range(8)]
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    named = {frozenset((keys[i], keys[j])) for i, j in schedule(keys, 3)}
    assert named == {frozenset((keys[order[i]], keys[order[j]])) for i, j in schedule([keys[i] for i in order], 3)}
    assert schedule(keys, 3) != schedule(keys, 3, seed=1)
    assert schedule(keys) == list(itertools.combinations(range(8), 2)) == schedule(keys, 7)


def test_bradley_terry_corrects_for_the_opponents_met():
    """Two opponents each, of sixteen: on average its order is nearer to the true one than that of the raw rates."""
    images = greys(*[i / 16 for i in range(16)])
    truth = torch.arange(16.0)

    def correlation(aggregate, seed):
        values = rewards(images, opponents=4, aggregate=aggregate, seed=seed).values
        return float(torch.corrcoef(torch.stack([truth, values]))[0, 1])

    gains = [correlation("bradley_terry", s) - correlation("win_rate", s) for s in range(6)]
    assert sum(gains) / 6 > 0.02
    result = rewards(FOUR, aggregate="bradley_terry")
    assert result.parts["win_rate"].tolist() == pytest.approx([1, 0, 2 / 3, 1 / 3])
    assert float(result.values.sum()) == pytest.approx(2) and result.values.argsort().tolist() == [1, 3, 2, 0]
    assert float(result.parts["strength"].sum()) == pytest.approx(0, abs=1e-5)


def test_flex_by_hand():
    """Three images; overall 1 > 0 > 2 in full, one category seen on one pair only."""
    pairs = [(0, 1), (0, 2), (1, 2)]
    overall = torch.tensor([0.0, 1.0, 1.0])
    named = {"semantic": torch.tensor([1.0, 1.0, 0.5]), "quality": torch.tensor([math.nan, 0.0, math.nan])}
    # win rates: overall (.5, 1, 0); semantic (1, .25, .25); quality (0, -, 1)
    assert flex_rewards(3, pairs, overall, named).tolist() == pytest.approx(
        [(0.5 + 0.5) / 2, (1 + 0.25) / 2, (0 + 0.625) / 2]
    )
    weighted = flex_rewards(
        3, pairs, overall, named, category_weights={"quality": 3.0}, overall_weight=2.0, category_weight=1.0
    )
    assert weighted.tolist() == pytest.approx([(2 * 0.5 + 0.25) / 3, (2 + 0.25) / 3, (2 * 0 + (0.25 + 3 * 1) / 4) / 3])
    assert flex_rewards(3, pairs, overall, {}).tolist() == [0.5, 1, 0]
    assert flex_rewards(3, pairs, overall, named, digits=3).tolist() == [0.5, 0.625, round((0 + 0.625) / 2, 3)]


def test_flex_through_a_judge():
    judge = Judge(categories={"semantic": lambda a, b: float(a < b)})
    result = rewards(FOUR, judge, aggregate="flex")
    assert result.values.tolist() == pytest.approx([0.5] * 4)
    assert result.parts["category/semantic"].tolist() == pytest.approx([0, 1, 1 / 3, 2 / 3])
    assert rewards(FOUR, judge, aggregate="flex", category_weight=0.0).values.tolist() == pytest.approx(
        [1, 0, 2 / 3, 1 / 3]
    )


class Brightness:
    def __init__(self, higher_is_better=True, scope="point"):
        self.spec = RewardSpec(name="brightness", higher_is_better=higher_is_better, scope=scope)
        self.calls = []

    def score(self, images, prompts, metadata, groups=None):
        self.calls.append(len(images))
        values = images.mean((1, 2, 3))
        return RewardResult(
            values.masked_fill(values < 0.05, math.nan), reasons=["dark" if v < 0.05 else None for v in values]
        )


def test_any_pointwise_reward_is_a_judge():
    reward = Brightness()
    assert rewards(FOUR, ScorerJudge(reward)).values.tolist() == pytest.approx([1, 0, 2 / 3, 1 / 3])
    assert reward.calls == [4]
    down = rewards(FOUR, ScorerJudge(Brightness(higher_is_better=False)))
    assert down.values.tolist() == pytest.approx([0, 1, 1 / 3, 2 / 3])
    near = rewards(FOUR, ScorerJudge(Brightness(), threshold=0.31))
    assert near.values.tolist() == pytest.approx([2.5 / 3, 0.5 / 3, 2 / 3, 1 / 3])  # ties: 0-2, 1-3, 2-3
    dark = rewards(greys(0.9, 0.0, 0.6), ScorerJudge(Brightness()))
    assert math.isnan(dark.values[1]) and "dark" in dark.reasons[1] and dark.values[[0, 2]].tolist() == [1, 0]
    with pytest.raises(ValueError, match="scope"):
        ScorerJudge(Brightness(scope="group"))
    with pytest.raises(ValueError, match="threshold"):
        ScorerJudge(Brightness(), threshold=-1.0)


def test_bias_and_flips_of_a_judge():
    forward, backward = torch.tensor([1.0, 1.0, 0.0, 0.5, math.nan]), torch.tensor([0.0, 1.0, 1.0, 0.5, 1.0])
    assert flip_rate(forward, backward) == 0.25
    assert position_bias(torch.cat([forward, backward])) == pytest.approx(2 * 6 / 9 - 1)
    assert flipped(1.0, 0.5) == 1 and flipped(0.5, 0.5) == 0 and math.isnan(flipped(math.nan, 1.0))
    images = greys(0.2, 0.4, 0.6)
    judged = judge_pairs(Judge(lambda a, b: 1.0 if a < 80 else 0.0), images, [(0, 1), (1, 2)], ["p"] * 3, [{}] * 3)
    assert judged.preference.tolist() == [1, 0.5] and judged.flips.tolist() == [0, 1]
    assert judged.bias.tolist() == [0, -1]


def test_content_keys_and_coins():
    assert len(set(content_keys(greys(0.1, 0.2, 0.1)))) == 2
    assert coin(1, "a") == coin(1, "a") != coin(1, "b")


@pytest.mark.parametrize(
    "options",
    [
        {"opponents": 0},
        {"opponents": True},
        {"order": "swap"},
        {"aggregate": "mean"},
        {"compat": "old"},
        {"compat": "pref_grpo", "order": "both"},
        {"compat": "pref_grpo", "opponents": 3},
        {"overall_weight": 0.0, "category_weight": 0.0},
    ],
)
def test_impossible_settings(options):
    with pytest.raises(ValueError, match="expected|released"):
        WinRate(Judge(), **options)


def test_the_spec_says_everything_that_changes_the_numbers():
    versions = {
        WinRate(Judge(), **options).spec.version
        for options in ({}, {"opponents": 3}, {"order": "random"}, {"seed": 1}, {"aggregate": "bradley_terry"})
    }
    assert len(versions) == 5
    assert WinRate(Judge()).spec.scope == "group" and WinRate(Judge()).spec.range == (0, 1)
