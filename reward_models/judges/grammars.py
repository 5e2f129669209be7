"""Reading the answers of judges: pure functions from text to numbers.

An answer that does not say what was asked for is ``Unparsable``, with the reason; its reward is then missing. Nothing
is guessed. Where released code does otherwise, its behaviour stands behind ``compat``:

* ``"flow_grpo"`` (UnifiedReward's and Qwen's pointwise scores): divided by 5, and 0 where there is none;
* ``"pref_grpo"`` (UnifiedReward-Think, -Flex, ACS): case-sensitive, both phrases or none decided as described there.

Differences of the defaults from the released parsers: the chain of thought is cut off first, so that a score or a
verdict weighed in it does not count; case and Markdown stars do not matter; a number outside its scale is unparsable;
an answer that names both images as the better one is unparsable; the last score counts, not the first.
VIEScore's random guess and EditScore's repair of broken JSON have no counterpart here.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

ACS_AXES = ("alignment", "coherence", "style")
FLEX_CATEGORIES = ("semantic", "quality", "aesthetics")  # the three fixed ones, in the order of the template
LONGEST = 100_000  # characters; no judge writes more
DEEPEST = 200  # brackets; Python's literals are read by recursion
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_COLON = r"[\s*]{0,9}:[\s*]{0,9}"  # with Markdown stars; bounded, so that no answer makes the search quadratic
_T = TypeVar("_T")


class Unparsable(ValueError):
    """An answer does not have the form that was asked for; the message says what is wrong with it."""


@dataclass(frozen=True)
class Verdict:
    """What a judge said of two images.

    Attributes:
        preference: 1 if the first image is better, 0 if the second is, 0.5 for a tie.
        categories: the same for parts of the question, where the judge was asked for them.
        good: of a tie: 1 if both are good, 0 if both are bad; NaN for no tie; None where the judge was not asked.
    """

    preference: float
    categories: Mapping[str, float] = field(default_factory=dict)
    good: float | None = None


def after_thinking(text: str) -> str:
    """The answer without a chain of thought ``<think>...</think>`` before it.

    Raises:
        Unparsable: the chain was never closed (usually the answer was cut), or the text is longer than any answer.
    """
    if len(text) > LONGEST:
        raise Unparsable(f"the answer has {len(text)} characters, more than {LONGEST}")
    thought, closed, answer = text.rpartition("</think>")
    if not closed and "<think>" in text:
        raise Unparsable("the chain of thought was not closed")
    return answer if closed else text


def tagged(text: str, name: str, ignore_case: bool = True) -> list[str]:
    """What stands between ``<name>`` and the next ``</name>``, for each such pair; in one pass over the text."""
    found, start = [], None
    for token in re.finditer(rf"<(/?){name}>", text, re.IGNORECASE if ignore_case else 0):
        if token[1] and start is not None:
            found.append(text[start : token.start()])
            start = None
        elif not token[1] and start is None:
            start = token.end()
    return found


def _in_range(number: str | float, low: float, high: float, what: str) -> float:
    try:
        value = float(number)
    except OverflowError:  # a whole number of hundreds of digits
        value = math.inf
    if not low <= value <= high:  # also NaN
        raise Unparsable(f"{what} is {value:g}, outside [{low:g}, {high:g}]")
    return value


def _last_score(pattern: str, text: str, low: float, high: float, what: str) -> float:
    found = re.findall(pattern, after_thinking(text), re.IGNORECASE)
    if not found:
        raise Unparsable(f"no {what} in the answer")
    return _in_range(found[-1], low, high, what)


# ------------------------------------------------------------------------------------------------- one image, numbers


def final_score(text: str, compat: Literal["flow_grpo"] | None = None) -> float:
    """UnifiedReward, pointwise: the x of ``Final Score: x``, in [1, 5]; with compat x / 5, or 0."""
    if compat == "flow_grpo":
        match = re.search(r"Final Score:\s*([1-5](?:\.\d+)?)", text)
        return float(match[1]) / 5 if match else 0.0
    return _last_score(rf"final score{_COLON}{_NUMBER}", text, 1, 5, "final score")


def score_tag(text: str, compat: Literal["flow_grpo"] | None = None) -> float:
    """Qwen's aesthetic score: the n of ``<Score>n</Score>``, in [1, 5]; with compat n / 5, or 0."""
    if compat == "flow_grpo":
        match = re.search(r"<Score>(\d+)</Score>", text)
        return float(match[1]) / 5 if match else 0.0
    return _last_score(rf"<score>\s*{_NUMBER}\s*</score>", text, 1, 5, "<Score> tag")


def acs_scores(text: str, compat: Literal["pref_grpo"] | None = None) -> dict[str, float]:
    """UnifiedReward, three axes: ``Alignment Score (1-5): x`` and so on -> axis -> score, NaN for an axis not given.

    With compat any number from 0 to 5.9 counts, as the released expression has it.

    Raises:
        Unparsable: no axis was given (not with compat), or a score is outside [1, 5].
    """
    if compat == "pref_grpo":
        named = {k.lower(): float(x) for k, x in re.findall(r"(\w+) Score \(1-5\):\s*([0-5](?:\.\d+)?)", text)}
        return {axis: named.get(axis, math.nan) for axis in ACS_AXES}
    pattern = rf"({'|'.join(ACS_AXES)}) score ?\(1 ?- ?5\){_COLON}{_NUMBER}"
    found = re.findall(pattern, after_thinking(text), re.IGNORECASE)
    if not found:
        raise Unparsable("none of the three scores is in the answer")
    given = {axis.lower(): _in_range(number, 1, 5, f"{axis.lower()} score") for axis, number in found}
    return {axis: given.get(axis, math.nan) for axis in ACS_AXES}


def fill_axes(rows: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """As Pref-GRPO completes ACS scores: a missing axis takes the batch's mean of that axis, 0 if nobody has one."""
    means = {}
    for axis in ACS_AXES:
        given = [row[axis] for row in rows if not math.isnan(row[axis])]
        means[axis] = sum(given) / len(given) if given else 0.0
    return [{axis: means[axis] if math.isnan(row[axis]) else row[axis] for axis in ACS_AXES} for row in rows]


def find_json(text: str) -> Any:
    """The JSON value that an answer is, or else the one between its first ``{`` and its last ``}``.

    Raises:
        Unparsable: neither is JSON, or it holds NaN or an infinity.
    """

    def refuse(constant: str) -> None:
        raise Unparsable(f"the answer's JSON holds {constant}")

    inner = text[text.find("{") : text.rfind("}") + 1]
    for candidate in (text.strip(), inner):
        try:
            return json.loads(candidate, parse_constant=refuse)
        except Unparsable:
            raise
        except (ValueError, RecursionError):  # ValueError: no JSON, or a number of thousands of digits
            continue
    raise Unparsable("the answer holds no JSON")


def score_list(text: str, count: int, high: float, low: float = 0.0) -> list[float]:
    """EditScore and VIEScore: the list under ``"score"`` of a JSON answer, or a bare list or number.

    Args:
        text: the answer.
        count: how many numbers were asked for.
        high: upper end of the scale (25 for EditScore, 10 for VIEScore).
        low: lower end.

    Raises:
        Unparsable: no JSON, another number of scores, or one outside the scale.
    """
    found = find_json(after_thinking(text))
    scores = found.get("score") if isinstance(found, dict) else found
    scores = [scores] if isinstance(scores, int | float) else scores
    if not isinstance(scores, list) or not all(isinstance(s, int | float) and not isinstance(s, bool) for s in scores):
        raise Unparsable("the answer's JSON has no list of numbers under 'score'")
    if len(scores) != count:
        raise Unparsable(f"the answer has {len(scores)} scores instead of {count}")
    return [_in_range(score, low, high, "score") for score in scores]


def geometric_overall(semantic: Sequence[float], quality: Sequence[float], high: float) -> float:
    """``sqrt(min(semantic) min(quality))`` on a scale of 0 to 10 (VIEScore; EditScore, whose ``high`` is 25)."""
    return math.sqrt(min(semantic) * min(quality)) * 10 / high


def self_ensemble(
    semantic: Sequence[Sequence[float]], quality: Sequence[Sequence[float]], high: float, *, how: str = "overalls"
) -> float:
    """Several passes of a stochastic judge as one score on a scale of 0 to 10 (EditScore).

    Args:
        semantic: per pass the scores of the first question.
        quality: per pass those of the second.
        high: upper end of the judge's scale.
        how: "overalls" is the mean of the passes' overalls, "means" the overall of the mean minima.
    """
    if how == "overalls":
        overalls = [geometric_overall(s, q, high) for s, q in zip(semantic, quality, strict=True)]
        return math.fsum(overalls) / len(overalls)
    means = [math.fsum(map(min, scores)) / len(scores) for scores in (semantic, quality)]
    return geometric_overall(means[:1], means[1:], high)


# --------------------------------------------------------------------------------------------------------- two images


def _phrases(text: str) -> set[float]:
    first = re.search(r"\bimage\s*1\b\**\s+is\s+better", text, re.IGNORECASE)
    second = re.search(r"\bimage\s*2\b\**\s+is\s+better", text, re.IGNORECASE)
    equal = re.search(r"\bequally\s+good\b", text, re.IGNORECASE)
    return {value for value, found in ((1.0, first), (0.0, second), (0.5, equal)) if found}


def pair_rank(text: str) -> Verdict:
    """``Image 1 is better``, ``Image 2 is better`` or ``equally good`` (UnifiedReward, pair ranking).

    Raises:
        Unparsable: none of them, or several.
    """
    found = _phrases(after_thinking(text))
    if len(found) != 1:
        raise Unparsable("the answer names both images as better, or one and a tie" if found else "no verdict found")
    return Verdict(found.pop())


def think_verdict(text: str, compat: Literal["pref_grpo"] | None = None) -> Verdict:
    """The verdict within ``<answer>...</answer>`` (UnifiedReward-Think). A tie is no answer to its question.

    With compat the first tag counts, "Image 1 is better" is looked for first, and everything else is a tie.

    Raises:
        Unparsable: no tag, or neither or both of the verdicts in the tags.
    """
    if compat == "pref_grpo":
        said = next(iter(tagged(text, "answer", ignore_case=False)), "")
        return Verdict(1.0 if "Image 1 is better" in said else 0.0 if "Image 2 is better" in said else 0.5)
    tags = tagged(after_thinking(text), "answer")
    if not tags:
        raise Unparsable("no <answer> tag")
    found = _phrases(" ".join(tags))
    if found not in ({0.0}, {1.0}):
        raise Unparsable("the <answer> names both images, or a tie" if found else "no verdict in the <answer> tag")
    return Verdict(found.pop())


FOUR_WAY = {  # preference, and whether both are good
    **dict.fromkeys(("A>B", "A>>B", "B<A"), (1.0, math.nan)),
    **dict.fromkeys(("B>A", "B>>A", "A<B"), (0.0, math.nan)),
    "A=B=GOOD": (0.5, 1.0),
    "A=B=BAD": (0.5, 0.0),
}


def four_way(text: str) -> Verdict:
    """GenAI-Bench (TIGER-Lab): the last of ``[[A>B]]``, ``[[B>A]]``, ``[[A=B=Good]]`` and ``[[A=B=Bad]]``.

    The released parser also takes ``[[A=B]]``, which was not asked for and counts there as right for either tie.

    Raises:
        Unparsable: no double brackets, or none of the four in the last ones.
    """
    found = re.findall(r"\[\[([^\[\]]{0,40})\]\]", after_thinking(text))
    if not found:
        raise Unparsable("no verdict in [[...]]")
    said = re.sub(r"\s", "", found[-1]).upper()
    if said not in FOUR_WAY:
        raise Unparsable(f"[[{found[-1]}]] is none of the four verdicts")
    preference, good = FOUR_WAY[said]
    return Verdict(preference, good=good)


def pair_scores(text: str) -> Verdict:
    """UnifiedReward 2.0: under ``Alignment Score:`` and so on, ``Image 1: x`` and ``Image 2: y`` with x + y = 1.

    The image with the larger sum over the three axes is better; equal sums tie. Categories are the axes.

    Raises:
        Unparsable: an axis is missing, or its two scores do not sum to 1 within 0.02.
    """
    answer, categories, total = after_thinking(text), {}, 0.0
    for axis in ACS_AXES:
        pattern = rf"{axis} score\W{{1,20}}image ?1{_COLON}{_NUMBER}\W{{1,20}}image ?2{_COLON}{_NUMBER}"
        found = re.findall(pattern, answer, re.IGNORECASE)
        if not found:
            raise Unparsable(f"no {axis} scores of both images")
        first, second = (_in_range(number, 0, 1, f"{axis} score") for number in found[-1])
        if abs(first + second - 1) > 0.02:
            raise Unparsable(f"the {axis} scores sum to {first + second:g} instead of 1")
        categories[axis] = _sign(first - second)
        total += first - second
    return Verdict(_sign(total), categories)


def _sign(difference: float) -> float:
    return 0.5 if abs(difference) < 1e-9 else float(difference > 0)


def _flex_winner(said: Any, compat: str | None) -> float:
    """Who is named: 1, 0, or 0.5 for a tie; NaN if it cannot be told."""
    text = str(said).lower() if isinstance(said, str) or compat else ""
    one, two = "image 1" in text, "image 2" in text
    if one != two:
        return float(one)
    if compat == "pref_grpo":
        return 0.5
    return 0.5 if re.search(r"\b(tie|equal|equally|both|draw)\b", text) else math.nan


def flex_verdict(text: str, compat: Literal["pref_grpo"] | None = None) -> Verdict:
    """UnifiedReward-Flex: JSON with ``winner`` and, in ``categories``, ``cat_winner`` of at least three.

    The first three categories are the fixed ones and are named by their place (``FLEX_CATEGORIES``), as judges vary
    the wording of their names; a category whose winner cannot be told is left out. With compat the names are the
    judge's own, whatever names one image or the other wins, anything else is a tie, and so is an answer without JSON.

    Raises:
        Unparsable: no JSON object, or no winner that can be told.
    """
    try:
        found = find_json(after_thinking(text) if compat is None else text)
        if not isinstance(found, dict):
            raise Unparsable("the answer's JSON is no object")
    except Unparsable:
        if compat == "pref_grpo":
            return Verdict(0.5)
        raise
    listed = found.get("categories")
    categories: dict[str, float] = {}
    rows = listed if isinstance(listed, list) else []
    for name, row in zip(FLEX_CATEGORIES, rows, strict=False):  # a fourth one is the judge's own
        value = _flex_winner(row.get("cat_winner"), compat) if isinstance(row, dict) else math.nan
        if not math.isnan(value):
            categories[str(row.get("name", "")) if compat else name] = value
    winner = _flex_winner(found.get("winner"), compat)
    if math.isnan(winner):
        raise Unparsable(f"the winner {found.get('winner')!r} is neither image, nor a tie")
    return Verdict(winner, categories)


def confidence(text: str) -> float:
    """A listener's confidence that the first image is better: ``<confidence>p</confidence>``, in [0, 1] or per cent."""
    found = re.findall(rf"<confidence>\s*{_NUMBER}\s*(%?)\s*</confidence>", after_thinking(text), re.IGNORECASE)
    if not found:
        raise Unparsable("no <confidence> tag")
    number, percent = found[-1]
    return _in_range(float(number) / (100 if percent else 1), 0, 1, "confidence")


# --------------------------------------------------------------------------------------------------------- test points


def _literal(text: str, what: str) -> list[Any]:
    if len(text) > LONGEST or text.count("[") + text.count("(") + text.count("{") > DEEPEST:
        raise Unparsable(f"the {what} list is longer or deeper than any answer")
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise Unparsable(f"the {what} tag holds no list") from None
    if not isinstance(value, list):
        raise Unparsable(f"the {what} tag holds no list")
    return value


def point_list(text: str, count: int, compat: Literal["published"] | None = None) -> list[int]:
    """UniGenBench: the list of 0 and 1 in ``<score>[...]</score>``, one for each test point.

    As published, the first tag of each kind counts, and ``<analysis>[...]</analysis>`` must hold as many entries.
    With compat any other number counts as 0; by default it makes the answer unparsable.

    Raises:
        Unparsable: a tag is missing, is no list, or has another length.
    """
    answer = text if compat else after_thinking(text)
    lists = {}
    for what in ("analysis", "score"):
        found = tagged(answer, what, ignore_case=False)
        if not found:
            raise Unparsable(f"no <{what}> tag")
        lists[what] = _literal(found[0], what)
        if len(lists[what]) != count:
            raise Unparsable(f"the {what} tag has {len(lists[what])} entries for {count} test points")
    if compat is None and not all(score in (0, 1) for score in lists["score"]):
        raise Unparsable("a score is neither 0 nor 1")
    return [int(score == 1) for score in lists["score"]]


def tried(parse: Callable[[str], _T], text: str) -> tuple[_T | None, str | None]:
    """``(parsed, None)`` or ``(None, why it cannot be parsed)``."""
    try:
        return parse(text), None
    except Unparsable as error:
        return None, str(error)
