"""Answers as judges write them, and as they should not."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_models.judges import grammars
from reward_models.judges.grammars import Unparsable, Verdict


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Final Score: 4", 4.0),
        ("... the dog is missing.\nFinal Score: 3.75\n", 3.75),
        ("**Final Score:** 4.5", 4.5),
        ("final score : 1", 1.0),
        ("Final Score: 2\nOn reflection\nFinal Score: 4", 4.0),
        ("<think>Final Score: 1?</think>Final Score: 5", 5.0),
        ("Final Score: 4/5.", 4.0),
    ],
)
def test_final_score(text, value):
    assert grammars.final_score(text) == value


@pytest.mark.parametrize(
    "text", ["", "Score: 4", "Final Score: 0", "Final Score: 7", "Final Score: 45", "Final Score: -3", "Final Score: x"]
)
def test_no_final_score(text):
    with pytest.raises(Unparsable):
        grammars.final_score(text)


def test_final_score_as_released():
    assert grammars.final_score("Final Score: 4", "flow_grpo") == 0.8
    assert grammars.final_score("nothing", "flow_grpo") == 0.0
    assert grammars.final_score("Final Score: 45", "flow_grpo") == 0.8  # its expression stops after one digit
    assert grammars.final_score("final score: 4", "flow_grpo") == 0.0
    assert grammars.final_score("Final Score: 2, no: Final Score: 4", "flow_grpo") == 0.4  # the first one


def test_score_tag():
    assert grammars.score_tag("<Thought>calm</Thought>\n<Score>3</Score>") == 3
    assert grammars.score_tag("<score> 4.5 </score>") == 4.5
    assert grammars.score_tag("<Score>3</Score>", "flow_grpo") == 0.6
    assert grammars.score_tag("<score>3</score>", "flow_grpo") == 0
    for text in ("3", "<Score>6</Score>", "<Score>three</Score>", "<Score>3"):
        with pytest.raises(Unparsable):
            grammars.score_tag(text)


def test_acs():
    text = "Alignment Score (1-5): 4.5\nCoherence Score (1-5): 3\n**Style Score (1-5):** 2\n"
    assert grammars.acs_scores(text) == {"alignment": 4.5, "coherence": 3.0, "style": 2.0}
    partial = grammars.acs_scores("Style Score (1-5): 2")
    assert partial["style"] == 2 and math.isnan(partial["alignment"]) and math.isnan(partial["coherence"])
    for bad in ("", "Alignment Score: 4", "Alignment Score (1-5): 0", "Style Score (1-5): 9"):
        with pytest.raises(Unparsable):
            grammars.acs_scores(bad)


def test_acs_as_released():
    """A missing axis takes the mean of the others in the batch, 0 if nobody has it."""
    texts = ["Alignment Score (1-5): 4\nStyle Score (1-5): 1", "Alignment Score (1-5): 0", "nothing"]
    rows = grammars.fill_axes([grammars.acs_scores(text, "pref_grpo") for text in texts])
    assert [row["alignment"] for row in rows] == [4, 0, 2]
    assert [row["style"] for row in rows] == [1, 1, 1]
    assert [row["coherence"] for row in rows] == [0, 0, 0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Image 1 is better than Image 2.", 1.0),
        ("Therefore, image 2 is better than image 1", 0.0),
        ("Both images are equally good.", 0.5),
        ("**Image 2** is better", 0.0),
        ("<think>Image 1 is better at first sight</think> Image 2 is better.", 0.0),
    ],
)
def test_pair_rank(text, value):
    assert grammars.pair_rank(text) == Verdict(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Image 1 is not better",
        "Image 1 is better in colour, Image 2 is better in form",
        "Image 1 is better, though both are equally good",
        "Image 12 is better",
    ],
)
def test_no_pair_rank(text):
    with pytest.raises(Unparsable):
        grammars.pair_rank(text)


def test_think():
    chain = "<think>Image 2 is better in style, 8+7=15 against 20</think>\n"
    assert grammars.think_verdict(chain + "<answer>Image 1 is better</answer>") == Verdict(1.0)
    assert grammars.think_verdict("<answer>\nimage 2 is better\n</answer>") == Verdict(0.0)
    for bad in (
        "Image 1 is better",
        "<answer>Both</answer>",
        "<answer>Both images are equally good</answer>",
        "<answer>Image 1 is better</answer><answer>Image 2 is better</answer>",
        "<answer>Image 1 is better or Image 2 is better</answer>",
        "<think>never closed <answer>Image 1 is better</answer>",
    ):
        with pytest.raises(Unparsable):
            grammars.think_verdict(bad)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<answer>Image 1 is better</answer>", 1.0),
        ("<answer>\nImage 2 is better</answer>", 0.0),
        ("<answer>Image 2 is better, no, Image 1 is better</answer>", 1.0),  # the first image is looked for first
        ("<answer>image 1 is better</answer>", 0.5),  # case counts
        ("Image 1 is better", 0.5),
        ("<answer>hm</answer><answer>Image 2 is better</answer>", 0.5),  # the first tag counts
    ],
)
def test_think_as_released(text, value):
    assert grammars.think_verdict(text, "pref_grpo") == Verdict(value)


def pair_scores(*numbers):
    rows = zip(("Alignment", "Coherence", "Style"), numbers, strict=True)
    return "\n".join(f"{axis} Score:\n Image 1: {a}\n Image 2: {b}\n" for axis, (a, b) in rows)


def test_pair_scores():
    found = grammars.pair_scores(pair_scores((0.4357, 0.5643), (0.9, 0.1), (0.5, 0.5)))
    assert found.preference == 1 and found.categories == {"alignment": 0, "coherence": 1, "style": 0.5}
    assert grammars.pair_scores(pair_scores((0.6, 0.4), (0.4, 0.6), (0.5, 0.5))).preference == 0.5
    for bad in (
        "",
        pair_scores((0.6, 0.6), (0.4, 0.6), (0.5, 0.5)),
        pair_scores((1.6, -0.6), (0.4, 0.6), (0.5, 0.5)),
        pair_scores((0.6, 0.4), (0.4, 0.6), ("x", "y")),
    ):
        with pytest.raises(Unparsable):
            grammars.pair_scores(bad)


def flex(winner, *categories):
    return json.dumps({"categories": [{"name": n, "cat_winner": w} for n, w in categories], "winner": winner})


def test_flex():
    text = flex("Image 2", ("Semantics", "Image 1"), ("Quality", "image 2"), ("Beauty", "tie"), ("Mood", "Image 1"))
    assert grammars.flex_verdict(text) == Verdict(0.0, {"semantic": 1.0, "quality": 0.0, "aesthetics": 0.5})
    assert grammars.flex_verdict(f"```json\n{text}\n```").preference == 0.0
    gap = flex("Image 1", ("a", "Image 1"), ("b", "neither"), ("c", "Image 2"))
    assert grammars.flex_verdict(gap).categories == {"semantic": 1.0, "aesthetics": 0.0}
    assert grammars.flex_verdict(json.dumps({"winner": "Image 1"})) == Verdict(1.0)
    for bad in ("", "[1]", "{", flex("neither"), flex("Image 1 or Image 2"), flex(None), '{"winner": NaN}'):
        with pytest.raises(Unparsable):
            grammars.flex_verdict(bad)


def test_flex_as_released():
    """Categories by the judge's own names, the first three of them; ties where nobody, or everybody, is named."""
    text = flex("Image 2", ("Semantics", "Image 1"), ("Quality", "both"), ("Beauty", "Image 2"), ("Mood", "Image 1"))
    assert grammars.flex_verdict(text, "pref_grpo") == Verdict(0.0, {"Semantics": 1.0, "Quality": 0.5, "Beauty": 0.0})
    assert grammars.flex_verdict("not JSON", "pref_grpo") == Verdict(0.5)
    assert grammars.flex_verdict(flex("Image 1 and Image 2"), "pref_grpo") == Verdict(0.5)


def test_score_lists():
    assert grammars.score_list('Well. {"reasoning": "good", "score": [20, 12.5]} Done.', 2, 25) == [20, 12.5]
    assert grammars.score_list("[3, 4]", 2, 10) == [3, 4]
    assert grammars.score_list('{"score": 7}', 1, 10) == [7]
    for bad, count, high in (
        ('{"score": [20, 12.5]}', 1, 25),
        ('{"score": [26, 1]}', 2, 25),
        ('{"score": [-1, 1]}', 2, 25),
        ('{"score": ["a", 1]}', 2, 25),
        ('{"score": [true, 1]}', 2, 25),
        ('{"score": [NaN, 1]}', 2, 25),
        ('{"scores": [1, 1]}', 2, 25),
        ("I'm sorry, but I can't assist with that request.", 2, 25),
        ("[" * 50_000, 2, 25),
    ):
        with pytest.raises(Unparsable):
            grammars.score_list(bad, count, high)


def test_overall_and_self_ensemble():
    assert grammars.geometric_overall([20, 12.5], [5, 25], 25) == pytest.approx(math.sqrt(12.5 * 5) / 2.5)
    assert grammars.geometric_overall([4], [9, 10], 10) == pytest.approx(6)
    semantic, quality = [[4, 8], [9, 10]], [[9, 9], [16, 20]]
    assert grammars.self_ensemble(semantic, quality, 10) == pytest.approx((6 + 12) / 2)
    assert grammars.self_ensemble(semantic, quality, 10, how="means") == pytest.approx(math.sqrt(6.5 * 12.5))


def test_confidence():
    assert grammars.confidence("<confidence>0.3</confidence>") == 0.3
    assert grammars.confidence("<confidence> 30 % </confidence>") == 0.3
    for bad in ("0.3", "<confidence>30</confidence>", "<confidence>high</confidence>"):
        with pytest.raises(Unparsable):
            grammars.confidence(bad)


def points(analysis, score):
    return f"<analysis>{analysis}</analysis>\n<score>{score}</score>"


def test_points_of_unigenbench():
    assert grammars.point_list(points("['it\\'s there', \"not\"]", "[1, 0]"), 2) == [1, 0]
    assert grammars.point_list(points("['a', 'b']", "[1, 2]"), 2, "published") == [1, 0]
    for bad in (
        points("['a', 'b']", "[1]"),
        points("['a']", "[1, 0]"),
        points("['a', 'b']", "[1, 2]"),
        points("['a', 'b']", "1, 0"),
        points("['a', 'b']", "['1', '0']"),
        points("a and b", "[1, 0]"),
        points("['a', 'b'", "[1, 0]"),
        points("[" * 5000, "[1, 0]"),
        points("['a', 'b']", "__import__('os')"),
        "<score>[1, 0]</score>",
    ):
        with pytest.raises(Unparsable):
            grammars.point_list(bad, 2)


PARSERS = [
    grammars.final_score,
    grammars.score_tag,
    grammars.acs_scores,
    grammars.pair_rank,
    grammars.think_verdict,
    grammars.pair_scores,
    grammars.flex_verdict,
    grammars.confidence,
    grammars.four_way,
    lambda text: grammars.score_list(text, 2, 25),
    lambda text: grammars.point_list(text, 2),
    lambda text: grammars.flex_verdict(text, "pref_grpo"),
    lambda text: grammars.think_verdict(text, "pref_grpo"),
]
PIECES = [
    "Final Score: ",
    "<answer>",
    "</answer>",
    "Image 1 is better",
    "<think>",
    "</think>",
    '{"score": [',
    "]}",
    "[[A>",
    "9" * 400,
    "é\n",
]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=12)).map("".join))
def test_any_text_is_parsed_or_refused(text):
    for parse in PARSERS:
        value, reason = grammars.tried(parse, text)
        assert (value is None) == (reason is not None)


@pytest.mark.parametrize(
    "unit", ["<answer>", "<think>", "(", "final score:", " ", "*", "image 1", "<score>[", ":1 ", "[[", "[[A>B]]"]
)
def test_long_answers_are_read_in_moments(unit):
    for parse in PARSERS:
        grammars.tried(parse, unit * (60_000 // len(unit)))


@pytest.mark.parametrize(
    ("text", "preference", "good"),
    [
        ("[[A>B]]", 1, math.nan), ("so [[ B > A ]].", 0, math.nan), ("[[A=B=Good]]", 0.5, 1), ("[[A=B=BAD]]", 0.5, 0),
        ("[[A>>B]]", 1, math.nan), ("[[B<A]]", 1, math.nan), ("Not [[A=B=Good]] but\n[[B>A]]", 0, math.nan),
        ("<think>[[A>B]]</think>[[A=B=Bad]]", 0.5, 0),
    ],
)  # fmt: skip
def test_four_way(text, preference, good):
    verdict = grammars.four_way(text)
    assert verdict.preference == preference and (verdict.good == good or math.isnan(verdict.good + good))


@pytest.mark.parametrize("text", ["", "A>B", "[[C]]", "[[A=B]]", "[[A>B]] or [[A=B=Fair]]", "<think>[[A>B]]"])
def test_no_four_way_verdict(text):
    with pytest.raises(Unparsable):
        grammars.four_way(text)


@pytest.mark.parametrize("digits", [400, 5000])
def test_numbers_without_end_are_unparsable(digits):
    """400 digits overflow a float, 5000 are more than Python reads as a whole number."""
    for text in ('{"score": [1, %s]}', "[1, %s]"):
        with pytest.raises(Unparsable):
            grammars.score_list(text % ("9" * digits), 2, 25)
    with pytest.raises(Unparsable):
        grammars.final_score("Final Score: " + "9" * digits)
    with pytest.raises(Unparsable):
        grammars.flex_verdict('{"winner": %s}' % ("9" * digits))


def test_flex_categories_keep_their_place():
    rows = ["no object", {"name": "Quality", "cat_winner": "Image 2"}, {"name": "Art", "cat_winner": "Image 1"}]
    verdict = grammars.flex_verdict(json.dumps({"categories": rows, "winner": "Image 1"}))
    assert verdict.categories == {"quality": 0.0, "aesthetics": 1.0}
