"""Agreement with people: each data set's rule against hand-computed numbers and brute force."""

from __future__ import annotations

import json
import math
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judge_server import serve
from PIL import Image
from scipy import stats
from typer.testing import CliRunner

from benchmarks import preference_bench
from benchmarks.preferences import (
    FOUR_WAY,
    THRESHOLDS,
    VOTES,
    Record,
    Verdicts,
    best_threshold,
    best_tie_threshold,
    clustered,
    four_way,
    half_credit,
    numbers,
    numbers_of_judge,
    preference,
    ranking_score,
    strict_pairs,
    tie_credit,
    tie_pairs,
)
from flowrl.cli import app
from flowrl.errors import UserError

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "imagereward" / "test_rankings_noprompt.json"
NAN = math.nan


def record(prompt: str, labels: Any) -> Record:
    return Record(prompt, tuple(f"{prompt}{i}.png" for i in range(len(labels))), tuple(map(float, labels)))


# ---------------------------------------------------------------------------------------------------------------- rules
def test_strict_pairs_by_hand() -> None:
    # labels 3 > 2 = 2 > 1; pairs with different labels: (0,1), (0,2), (0,3), (1,3), (2,3)
    assert strict_pairs([3, 2, 2, 1], [0.9, 0.5, 0.9, 0.1]) == [1, 0, 1, 1, 1]  # a predicted tie is wrong
    found = strict_pairs([3, 2, 2, 1], [0.9, NAN, 0.1, 0.5])
    assert math.isnan(found[0]) and found[1:3] == [1, 1] and math.isnan(found[3]) and found[4] == 0


def test_ranking_score_by_hand() -> None:
    assert ranking_score([3, 2, 1], [1, 2, 3]) == 0 and ranking_score([3, 2, 1], [3, 2, 1]) == 1
    assert ranking_score([3, 2, 1], [2, 3, 1]) == pytest.approx(2 / 3)
    assert ranking_score([2, 2, 1], [1, 5, 3]) == pytest.approx(2 / 3)  # a label tie is right in either order
    assert ranking_score([3, 2, 1], [5, 5, 5]) == 1 / 2  # who cannot tell is right by chance
    assert ranking_score([2, 2, 1], [5, 5, 5]) == pytest.approx(2 / 3)
    assert ranking_score([3, 2, 1], [NAN, 1, 2]) == 0 and math.isnan(ranking_score([2, 1], [NAN, 1]))


@given(st.permutations([0, 1, 2, 3, 4]), st.permutations([0.0, 1.5, 2.0, 3.25, 9.0]))
def test_without_ties_the_ranking_score_is_kendalls_tau(labels: list[int], scores: list[float]) -> None:
    assert ranking_score(labels, scores) == pytest.approx((stats.kendalltau(labels, scores).statistic + 1) / 2)
    assert ranking_score(labels, scores) == pytest.approx(np.mean(strict_pairs(labels, scores)))


def test_preference_is_the_difference_of_the_softmax() -> None:
    for first, second, scale in ((20.0, 21.5, 1.0), (0.2, 0.25, 100.0), (3.0, -2.0, 0.5)):
        p = np.exp([scale * first, scale * second])
        assert preference([first, second], scale) == pytest.approx((p[1] - p[0]) / p.sum())
    assert preference([1e6, -1e6]) == -1


@pytest.mark.parametrize(
    ("labels", "difference", "credit"),
    [
        ((1, 0), -0.5, 1.0), ((1, 0), 0.5, 0.0), ((1, 0), 0.1, 0.5), ((0.5, 0.5), 0.1, 1.0), ((0.5, 0.5), 0.5, 0.5),
        ((0, 1), 0.2, 0.5), ((0, 1), 0.2001, 1.0),
    ],
)  # fmt: skip
def test_half_credit_by_hand(labels: Any, difference: float, credit: float) -> None:
    assert half_credit(labels, difference, 0.2) == credit
    assert half_credit(labels[::-1], -difference, 0.2) == credit
    assert math.isnan(half_credit(labels, NAN, 0.2))


def test_the_threshold_is_the_first_of_the_best() -> None:
    labels, differences = [(0.5, 0.5), (0, 1), (1, 0)], [0.25, 0.9, -0.9]
    assert best_threshold(labels, differences) == 0.3  # 0.3 to 0.8 are all perfect
    assert best_threshold([(0, 1)], [0.9]) == 0.0
    assert len(THRESHOLDS) == 11 and THRESHOLDS[3] == 0.3


def test_four_way_verdicts_meet_one_vote_or_none() -> None:
    for said, good, vote in (
        (1.0, NAN, "leftvote"), (0.75, NAN, "leftvote"), (0.0, NAN, "rightvote"), (0.25, 1.0, "rightvote"),
        (0.5, 1.0, "tievote"), (0.5, 0.0, "bothbad_vote"), (0.5, NAN, None), (0.5, 0.5, None),
    ):  # fmt: skip
        assert {v for v, labels in VOTES.items() if four_way(labels, said, good)} == ({vote} - {None})
    assert all(math.isnan(four_way(labels, NAN, NAN)) for labels in VOTES.values())


@given(st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 2.0]), st.sampled_from([-2.0, -1.0, 0.0, 1.0, 3.0])), min_size=1))
def test_the_tie_threshold_is_that_of_a_search(pairs: list[tuple[float, float]]) -> None:
    def accuracy(threshold: float) -> float:
        return float(np.mean([tie_credit(pair, threshold) for pair in pairs]))

    best = max(sorted({0.0, *(abs(score) for _, score in pairs)}), key=accuracy)
    assert best_tie_threshold(pairs) == best


# -------------------------------------------------------------------------------------------------------------- numbers
def test_micro_and_macro_differ_as_they_should() -> None:
    records = [record("a", [3, 2, 1]), record("b", [2, 1]), record("c", [1, 1])]
    scores = [[3.0, 2.0, 1.0], [1.0, 2.0], [5.0, 4.0]]
    found = numbers("imagereward", records, scores)
    assert found["accuracy"] == found["micro"] and found["micro"]["mean"] == 3 / 4
    assert found["macro"]["mean"] == 1 / 2  # a: 1, b: 0; c has no pair
    assert (found["pairs"], found["label_ties"], found["predicted_ties"], found["invalid"]) == (5, 1 / 5, 0, 0)
    assert numbers("hpdv2", records, scores)["accuracy"]["mean"] == pytest.approx((1 + 0 + 1) / 3)


def test_macro_is_over_prompts_not_records() -> None:
    """Three records of one prompt count once, and one prompt has no interval."""
    records = [record("a", [1, 0])] * 3 + [record("b", [1, 0])]
    scores = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    found = numbers("genai", records, scores)
    assert found["micro"]["mean"] == 1 / 2 and found["macro"]["mean"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["macro"]["prompts"] == 2
    alone = numbers("genai", records[:3], scores[:3])["macro"]
    assert alone["mean"] == pytest.approx(2 / 3) and alone["ci95"] == [None, None]


def test_invalid_pairs_are_left_out_and_counted() -> None:
    records, scores = [record("a", [3, 2, 1]), record("b", [2, 1])], [[3.0, 2.0, NAN], [NAN, 1.0]]
    found = numbers("imagereward", records, scores)
    assert found["micro"]["mean"] == 1 and found["macro"]["mean"] == 1 and found["invalid"] == 3 / 4


def test_genai_leaves_ties_out_and_also_counts_them_as_wrong() -> None:
    records = [record("a", [1, 0]), record("b", [0, 1]), record("c", [1, 1]), record("d", [0, 0])]
    found = numbers("genai", records, [[2.0, 1.0], [2.0, 1.0], [1.0, 1.0], [1.0, 2.0]])
    assert found["accuracy"]["mean"] == 1 / 2 and found["ties_wrong"]["mean"] == 1 / 4


def test_records_of_one_prompt_are_drawn_together() -> None:
    """Fifty copies of two prompts are two prompts: the interval must not shrink."""
    two = [record("a", [1, 0]), record("b", [1, 0])]
    scores = [[1.0, 0.0], [0.0, 1.0]]
    assert numbers("imagereward", two, scores)["micro"] == numbers("imagereward", two * 50, scores * 50)["micro"]
    assert numbers("imagereward", two * 50, scores * 50)["micro"]["ci95"] == [0, 1]


def test_cmu_numbers_against_scipy_and_brute_force() -> None:
    rng = np.random.default_rng(3)
    records = [record(f"p{i}", rng.integers(1, 6, size=5)) for i in range(12)]
    scores = [[0.3 * label + rng.normal() for label in each.labels] for each in records]
    found = numbers("genai-cmu", records, scores)
    labels, flat = np.concatenate([r.labels for r in records]), np.concatenate(scores)
    assert found["pearson"]["mean"] == pytest.approx(stats.pearsonr(labels, flat).statistic)
    assert found["kendall_tau_b"]["mean"] == pytest.approx(stats.kendalltau(labels, flat).statistic)
    low, high = found["pearson"]["ci95"]
    assert low < found["pearson"]["mean"] < high
    right = 0
    for each, score in zip(records, scores, strict=True):
        for i, j in combinations(range(5), 2):
            said = 0 if abs(score[i] - score[j]) <= found["threshold"] else np.sign(score[i] - score[j])
            right += said == np.sign(each.labels[i] - each.labels[j])
    assert found["accuracy"]["mean"] == pytest.approx(right / 120)
    assert len(tie_pairs([1, 2, 3], [0.0, NAN, 1.0])) == 1
    assert clustered([[(1.0, 2.0), (2.0, 3.0)]], lambda x, y: 0.5).prompts == 1


def verdicts(*preference: float, flips: Any = None, bias: Any = None) -> Verdicts:
    nothing = (0.0,) * len(preference)
    return Verdicts(preference, flips or nothing, bias or nothing)


def test_a_judge_by_hand() -> None:
    records = [record("a", [3, 2, 1]), record("b", [2, 2]), record("c", [1, 2])]
    # a: (0,1) right, (0,2) a tie, (1,2) nothing usable; b: a tie for people; c: wrong
    said = [verdicts(1.0, 0.5, NAN, flips=(0, 1, NAN), bias=(0, 1, NAN)), verdicts(1.0), verdicts(0.75)]
    found = numbers_of_judge("imagereward", records, said)
    assert found["accuracy"] == found["micro"] and found["micro"]["mean"] == pytest.approx(1 / 3)
    assert found["macro"]["mean"] == pytest.approx((1 / 2 + 0) / 2)
    assert found["flipped"]["mean"] == 1 / 4 and found["position_bias"]["mean"] == 1 / 4
    assert (found["pairs"], found["invalid"], found["predicted_ties"], found["label_ties"]) == (5, 0.2, 0.2, 0.2)
    assert numbers_of_judge("hpdv2", records, said)["accuracy"]["mean"] == pytest.approx((0.75 + 1 + 0) / 3)
    pairs = [record("a", [1, 0]), record("b", [0.5, 0.5]), record("c", [0, 1])]
    said = [verdicts(0.5), verdicts(0.5), verdicts(0.0)]
    assert numbers_of_judge("pickapic", pairs, said)["accuracy"]["mean"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert numbers_of_judge("genai-cmu", pairs, said)["accuracy"]["mean"] == pytest.approx((0 + 1 + 1) / 3)


def test_a_four_way_judge_by_hand() -> None:
    labels = [VOTES[vote] for vote in ("leftvote", "rightvote", "tievote", "bothbad_vote", "tievote", "leftvote")]
    records = [record(name, each) for name, each in zip("abcdef", labels, strict=True)]
    said = [(1.0, NAN), (1.0, NAN), (0.5, 1.0), (0.5, 1.0), (0.5, NAN), (NAN, NAN)]  # right, wrong, right, 2 wrong, no
    found = numbers_of_judge("genai", records, [Verdicts((p,), (0.0,), (0.0,), (g,)) for p, g in said])
    assert found["accuracy"]["mean"] == pytest.approx(2 / 5) and found["invalid_wrong"]["mean"] == pytest.approx(2 / 6)
    assert found["rule"] == FOUR_WAY and found["invalid"] == pytest.approx(1 / 6)
    assert found["micro"]["mean"] == 1 / 2 and "ties_wrong" not in found
    plain = numbers_of_judge("genai", records, [verdicts(p) for p, _ in said])
    assert plain["accuracy"] == plain["micro"] and plain["ties_wrong"]["mean"] == pytest.approx(1 / 5)


def flat(estimate: dict[str, Any]) -> list[float]:
    return [NAN if x is None else x for x in (estimate["mean"], *estimate["ci95"], estimate["prompts"])]


@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=4), min_size=1, max_size=4), st.integers(0, 99))
@settings(max_examples=8)
def test_a_scorer_and_the_judge_that_follows_it_agree(labels: list[list[int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    records = [record(f"p{i}", each) for i, each in enumerate(labels)]
    scores = [[float(rng.integers(0, 3)) for _ in each] for each in labels]
    said = [
        verdicts(*(0.5 if a == b else float(a > b) for a, b in combinations(each, 2))) for each in scores
    ]  # fmt: skip
    for form in ("imagereward", "hpdv2", "genai"):
        one, other = numbers(form, records, scores), numbers_of_judge(form, records, said)
        for key in ("accuracy", "micro", "macro"):
            assert flat(one[key]) == pytest.approx(flat(other[key]), nan_ok=True)


@pytest.mark.skipif(not SHARED.is_file(), reason="the shared data are not here")
def test_imagereward_has_its_published_number_of_pairs() -> None:
    rows = json.loads(SHARED.read_text())
    records = [preference_bench.FORMATS["imagereward"]({"prompt": row["id"], **row}) for row in rows]
    labels = [list(each.labels) for each in records]
    assert len(records) == 466 and sum(len(strict_pairs(x, x)) for x in labels) == 6399
    oracle, reverse = numbers("imagereward", records, labels), [[-x for x in each] for each in labels]
    assert oracle["micro"]["mean"] == oracle["macro"]["mean"] == 1
    assert numbers("imagereward", records, reverse)["micro"]["mean"] == 0
    constant = [[0.0] * len(each) for each in labels]
    assert numbers("imagereward", records, constant)["micro"]["mean"] == 0  # ties are wrong here,
    ties = [sum(x == y for x, y in combinations(each, 2)) / math.comb(len(each), 2) for each in labels]
    expected = float(
        np.mean([(1 + share) / 2 for share in ties])
    )  # there a tie of people is right, other pairs by half
    assert numbers("hpdv2", records, constant)["accuracy"]["mean"] == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------------------ run
ROWS: dict[str, list[dict[str, Any]]] = {
    "imagereward": [{"prompt": "a", "generations": ["0.png", "1.png", "2.png"], "ranking": [3, 1, 1]}],
    "hpdv2": [{"prompt": "a", "image_path": ["0.png", "1.png"], "rank": [2, 1]}],
    "pickapic": [
        {"caption": "a", "image_0": "0.png", "image_1": "1.png", "label_0": 0, "label_1": 1},
        {"caption": "b", "image_0_uid": "3", "image_1_uid": "3", "label_0": 0.5, "label_1": 0.5},
    ],
    "genai": [{"prompt": "a", "left_image": "0.png", "right_image": "1.png", "vote_type": "rightvote"}],
    "genai-cmu": [{"prompt": "a", "images": ["0.png", "1.png", "2.png"], "human": [[1, 2], [3, 3], 4.5]}],
}  # fmt: skip
REWARD = """
import torch
from reward_models import RewardResult, RewardSpec

class Red:
    spec = RewardSpec("red")

    def score(self, images, prompts, metadata, groups=None):
        return RewardResult(images[:, 0].flatten(1).mean(1))
"""


JUDGE = """
from pathlib import Path
import torch
from reward_models import RewardSpec
from reward_models.judges.pairwise import Comparison
from reward_models.judges.win_rate import WinRate

class Nearly:
    spec = RewardSpec("nearly")

    def compare(self, images, pairs, prompts, metadata):
        with open(Path(__file__).with_name("asked"), "a") as file:
            file.write("." * len(pairs))
        red = (images[:, 0].flatten(1).mean(1) * 255).round()
        said = [1.0 if abs(red[i] - red[j]) <= 60 else float(red[i] > red[j]) for i, j in pairs]
        assert len({image.shape for image in images}) == 1 and isinstance(images, torch.Tensor)
        return Comparison(torch.tensor(said, dtype=torch.float64), [None] * len(pairs))

rate = WinRate(Nearly())
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i, name in enumerate(("0.png", "1.png", "2.png", "3.jpg")):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / name)
    (tmp_path / "red.py").write_text(REWARD)
    return tmp_path


@pytest.mark.parametrize(("form", "suffix"), product(ROWS, (".json", ".jsonl")))
def test_every_format_runs_and_resumes(images: Path, form: str, suffix: str) -> None:
    labels = images / f"labels{suffix}"
    rows = ROWS[form]
    labels.write_text(json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    arguments = (form, labels, images, f"{images}/red.py:Red,jpeg", images / "out")
    first = preference_bench.run(*arguments, validation=labels if form == "pickapic" else None, say=said.append)
    again = preference_bench.run(*arguments, validation=labels if form == "pickapic" else None, say=said.append)
    assert first == again and "0 scores computed" in said[-1]
    assert json.loads((images / "out" / "summary.json").read_text())["scores"] == first["scores"]
    red = first["scores"][f"{images}/red.py:Red"]
    assert red["accuracy"]["mean"] == 1 and red["rule"] in "\n".join(preference_bench.brief(first))


def test_an_image_of_two_prompts_is_scored_for_each(images: Path) -> None:
    rows = [{"prompt": p, "left_image": "0.png", "right_image": "1.png", "vote_type": "tievote"} for p in "ab"]
    (images / "l.json").write_text(json.dumps(rows))
    preference_bench.run("genai", images / "l.json", images, "jpeg", images / "out", say=lambda line: None)
    stored = [json.loads(line) for line in (images / "out" / "scores.jsonl").read_text().splitlines()]
    assert [(row["image"], row["prompt"]) for row in stored] == [
        ("0.png", "a"), ("1.png", "a"), ("0.png#2", "b"), ("1.png#2", "b")
    ]  # fmt: skip
    found = preference_bench.run("genai", images / "l.json", images, "jpeg", images / "o", limit=1, say=print)
    assert found["scores"]["jpeg"]["records"] == 1 and not found["complete"]


def test_a_judge_is_asked_in_both_orders_once(images: Path) -> None:
    """The judge here prefers red, and the image shown first when they differ by one step only."""
    (images / "judge.py").write_text(JUDGE)
    rows = [
        {"prompt": "a", "image_path": ["0.png", "1.png", "2.png"], "rank": [3, 2, 1]},
        {"prompt": "b", "image_path": ["0.png", "0.png"], "rank": [1, 2]},
    ]
    (images / "l.json").write_text(json.dumps(rows))
    arguments = ("hpdv2", images / "l.json", images, f"{images}/judge.py:rate", images / "out")
    found = preference_bench.run(*arguments, say=print)["scores"][arguments[3]]
    # (0,1) and (1,2) flip and so tie; (0,2) is right; the two equal images tie without being asked
    assert found["flipped"]["mean"] == pytest.approx(2 / 3) and found["predicted_ties"] == 3 / 4
    assert found["accuracy"]["mean"] == pytest.approx((2 / 3 + 1 / 2) / 2) and found["micro"]["mean"] == 1 / 4
    asked = (images / "asked").read_text()
    assert len(asked) == 6 and preference_bench.run(*arguments, say=print)["scores"][arguments[3]] == found
    assert (images / "asked").read_text() == asked  # the second time from the file


def test_the_four_way_question_reaches_the_judge(images: Path) -> None:
    """Left and right of different sizes, as models of the data set differ; red is good, dark is bad."""
    Image.new("RGB", (12, 6), (250, 0, 0)).save(images / "wide.png")

    def says(text: str, shown: list[np.ndarray], body: Any) -> str:
        assert {image.shape for image in shown} == {(8, 8, 3), (6, 12, 3)} and "[[A=B=Bad]]" in text
        a, b = (float(image[..., 0].mean()) for image in shown)
        return "[[A=B=Good]]" if min(a, b) > 100 else "[[A>B]]" if a > b else "[[B>A]]"

    votes = [("wide.png", "0.png", "leftvote"), ("2.png", "wide.png", "tievote"), ("wide.png", "3.jpg", "bothbad_vote")]
    rows = [{"prompt": "a", "left_image": x, "right_image": y, "vote_type": vote} for x, y, vote in votes]
    (images / "l.json").write_text(json.dumps(rows))
    with serve(says) as server:
        reward = f"{{vlm-judge: {{mode: four_way, model: judge, endpoint: '{server.url}'}}}}"
        arguments = ("genai", images / "l.json", images, reward, images / "out")
        summary = preference_bench.run(*arguments, say=print)
        asked = len(server.bodies)
        assert asked == 6 and preference_bench.run(*arguments, say=print) == summary and len(server.bodies) == asked
    found = summary["scores"]["vlm-judge"]
    assert found["accuracy"]["mean"] == pytest.approx(2 / 3) and found["flipped"]["mean"] == 0
    assert found["rule"] == FOUR_WAY and found["invalid"] == 0
    assert FOUR_WAY in "\n".join(preference_bench.brief(summary))


def test_bad_labels_are_explained(images: Path) -> None:
    path = images / "l.json"
    for content, form, said in (
        ("{", "hpdv2", "cannot read"), ("[]", "hpdv2", "no records"), ('[{"prompt": "a"}]', "hpdv2", "image_path"),
        ('[{"prompt": "a", "image_path": ["x"], "rank": [1, 2]}]', "hpdv2", "1 images and 2 labels"),
        ('[{"prompt": "a", "image_path": ["x", "y"], "rank": [1, 2]}]', "hpdv2", "is missing"),
        ("[]", "hpd", "expected one of imagereward"),
        (json.dumps([{**ROWS["genai"][0], "vote_type": "none"}]), "genai", "record 1: KeyError.*bothbad_vote"),
    ):  # fmt: skip
        path.write_text(content)
        with pytest.raises(UserError, match=said):
            preference_bench.run(form, path, images, "jpeg", images / "out", say=print)


def test_options_of_another_format_are_refused(images: Path) -> None:
    (images / "l.json").write_text(json.dumps(ROWS["hpdv2"]))
    for options in ({"validation": images / "l.json"}, {"scale": 100.0}):
        with pytest.raises(UserError, match="expected them with pickapic"):
            preference_bench.run("hpdv2", images / "l.json", images, "jpeg", images / "out", say=print, **options)


def test_the_verb_prints_the_rule_and_the_numbers(images: Path) -> None:
    (images / "l.json").write_text(json.dumps(ROWS["genai"]))
    words = ["reward", "bench", "genai", images / "l.json", "--images", images, "--reward", f"{images}/red.py:Red"]
    done = CliRunner().invoke(app, [str(word) for word in (*words, "--out", images / "out")])
    assert done.exit_code == 0, done.output
    assert "a predicted tie is wrong" in done.output and "accuracy        1.0000" in done.output
    assert "1 pairs: 0.0% label ties, 0.0% predicted ties, 0.0% invalid" in done.output
