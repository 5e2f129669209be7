"""T2I-CompBench's decision rules as pure functions over detections, answers and depth maps.

Source: T2I-CompBench (arXiv 2307.06350, github.com/Karine-Huang/T2I-CompBench). Any detector, depth network and
answerer can stand before them; the published ones are UniDet, DPT and BLIP-VQA.

Differences from the published rules; ``compat="t2i_compbench"`` brings back those marked (c):

* (c) "on top of" is "on the top of"; published, it is recognised and then scores no position;
* (c) of several detections of a label the surest counts, and two objects of the same name need two detections;
  published, the first of the list counts, for both;
* (c) 3D: the depth map is read at [y, x], the position is min(IoU / 0.5, 1), and labels must be equal; published it is
  read at [x, y], an IoU of exactly 0.5 scores 0, and a name may be part of a label ("cat" in "cattle");
* (c) numeracy: labels must be equal, and "television" is "tv"; published, labels that contain a missing name are
  renamed to it, and the alias has a spelling mistake;
* (c) numbers and names are read in any case, and a singular may follow a number; published, lower case only;
* (c) the product of the answers is not rounded, and no question at all is missing; published, each answer has four
  decimals and no question scores 1;
* names are found by a vocabulary, the nearest before and the first after the relation (as published for complex
  prompts); published, they are the first and the last word that spaCy takes for a noun: give those as ``nouns``.
* where nothing can be read from a prompt the score is missing (None); published, the evaluation fails.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from .geneval import Box, Detection, iou
from .layout import box_iou

Compat = Literal["t2i_compbench"]
CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
PERSONS = {"girl": "person", "boy": "person", "man": "person", "woman": "person"}
ALIASES = PERSONS | {"ship": "boat", "goldfish": "fish", "painting": "picture", "television": "tv"}
PUBLISHED_ALIASES = PERSONS | {"ship": "boat", "goldfish": "fish", "painting": "picture", "telivision": "tv"}
# looked for in this order
RELATIONS_2D = (
    "on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of",
    "on top of",
)  # fmt: skip
RELATIONS_3D = ("in front of", "behind", "hidden")
BESIDE = ("on side of", "next to", "near")
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
NO_OBJECTS = ("top", "the side", "the left", "the right")  # noun chunks that are half of a relation
MOST_QUESTIONS = 8
NEAR = 150.0  # pixels of the image as the detector saw it
SHORT, LONG = 479, 480  # into which the published detector's image is fitted
MOST_OVERLAP_2D = 0.1  # IoU above which a side is less clear
FULL_OVERLAP_3D = 0.5  # IoU from which one object clearly covers the other
SAME = 0.9  # overlap from which two detections of a label are one object


class Spatial(NamedTuple):
    """What a spatial prompt asks for: ``first`` is in the relation to ``second``."""

    first: str
    second: str
    relation: str


def read_vocabulary(text: str) -> list[tuple[str, str]]:
    """Pairs (singular, plural) from lines "singular - plural", the form of the benchmark's object list."""
    pairs = (line.split(" - ") for line in text.lower().splitlines() if " - " in line)
    return list(dict.fromkeys((one.strip(), many.strip()) for one, many in pairs))


def mentions(text: str, vocabulary: Sequence[tuple[str, str]]) -> list[str]:
    """Singulars of the names that appear in a text as whole words, in order, the longest name at each place."""
    forms = {form: one for one, many in reversed(vocabulary) for form in (many, one)}
    if not forms:
        return []
    pattern = "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
    return [forms[found] for found in re.findall(rf"\b(?:{pattern})\b", text.lower())]


def parse_spatial(
    prompt: str,
    vocabulary: Sequence[tuple[str, str]] = (),
    relations: Sequence[str] = RELATIONS_2D,
    nouns: Sequence[str] | None = None,
    compat: Compat | None = None,
) -> Spatial | None:
    """Objects and relation of a prompt, or None if they cannot be read from it.

    Args:
        prompt: such as "a cat on the left of a sofa".
        vocabulary: pairs (singular, plural); not needed with ``nouns``.
        relations: phrases in the order in which they are looked for.
        nouns: the nouns of the prompt by some tagger; the first and the last one are then the objects.
        compat: see the head of the module.
    """
    text = prompt if compat else prompt.lower()
    places = {r: text.find(r) if compat else _word_place(r, text) for r in relations}
    relation = next((r for r in relations if places[r] >= 0), None)
    if relation is None:
        return None
    if nouns is not None:
        first, second = (nouns[0], nouns[-1]) if nouns else ("", "")
    else:
        before = mentions(text[: places[relation]], vocabulary)
        after = mentions(text[places[relation] + len(relation) :], vocabulary)
        first, second = (before[-1], after[0]) if before and after else ("", "")
    if relation == "on top of" and not compat:
        relation = "on the top of"
    return Spatial(first, second, relation) if first and second else None


def _word_place(phrase: str, text: str) -> int:
    found = re.search(rf"\b{re.escape(phrase)}\b", text)
    return found.start() if found else -1


def near_in(height: int, width: int) -> float:
    """``NEAR`` in pixels of an image of this size, whose detections are in its own pixels."""
    return NEAR / min(SHORT / min(height, width), LONG / max(height, width))


def position_2d(a: Box, b: Box, relation: str, near: float = NEAR) -> float:
    """How far box ``a`` is in a relation to ``b``, in [0, 1] (y grows downwards).

    Beside: 1 if the centres are less than ``near`` apart on one axis, else near / the larger distance. On a side: 0
    unless the centre lies there and that axis dominates strictly; then 1 below an IoU of 0.1, else 0.1 / IoU.
    """
    dx, dy = ((b[i] + b[i + 2] - a[i] - a[i + 2]) / 2 for i in (0, 1))
    if relation in BESIDE:
        return 1.0 if min(abs(dx), abs(dy)) < near else near / max(abs(dx), abs(dy))
    along, across = {
        "on the right of": (-dx, dy),
        "on the left of": (dx, dy),
        "on the bottom of": (-dy, dx),
        "on the top of": (dy, dx),
    }.get(relation, (0.0, 0.0))
    if along <= abs(across):  # also for a relation without a rule
        return 0.0
    overlap = box_iou(a, b)
    return 1.0 if overlap < MOST_OVERLAP_2D else MOST_OVERLAP_2D / overlap


def mean_depth(depth: np.ndarray, box: Box, compat: Compat | None = None) -> float:
    """Mean of a depth map (H, W) in a box, whose edges are cut to pixels; NaN where the box is outside the map."""
    x1, y1, x2, y2 = (max(int(edge), 0) for edge in box)
    part = depth[x1:x2, y1:y2] if compat else depth[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]
    return float(part.mean()) if part.size else math.nan


def position_3d(a: Box, b: Box, relation: str, depth: np.ndarray, compat: Compat | None = None) -> float:
    """How far box ``a`` is in front of ``b`` or behind it, in [0, 1]: min(IoU / 0.5, 1) if the order is right, else 0.

    Args:
        a, b: boxes in pixels of the map.
        relation: "in front of", "behind" or "hidden".
        depth: (H, W), larger is nearer.
        compat: see the head of the module.
    """
    nearer = mean_depth(depth, a, compat) - mean_depth(depth, b, compat)
    right = nearer > 0 if relation == "in front of" else nearer < 0 if relation in RELATIONS_3D else False
    overlap = box_iou(a, b)
    if not right or (compat and overlap == FULL_OVERLAP_3D):
        return 0.0
    return min(overlap / FULL_OVERLAP_3D, 1.0)


def spatial_2d(
    detections: Sequence[Detection], target: Spatial, near: float = NEAR, compat: Compat | None = None
) -> float:
    """0.25 (score of the first + score of the second) + 0.5 position, and 0 if that is below 0.5; in [0, 1].

    Args:
        detections: of one image, in pixels of the image as the detector saw it.
        target: see ``parse_spatial``.
        near: see ``position_2d``.
        compat: see the head of the module.
    """
    pair = _first_pair(detections, target) if compat else _best_pair(detections, target)
    total = _pair_score(*pair, lambda a, b: position_2d(a, b, target.relation, near))
    return total if total >= 0.5 else 0.0


def spatial_3d(
    detections: Sequence[Detection], target: Spatial, depth: np.ndarray, compat: Compat | None = None
) -> float:
    """0.25 (score of the first + score of the second) + 0.5 position; in [0, 1]; see ``position_3d``."""
    pair = _last_pair(detections, target) if compat else _best_pair(detections, target)
    return _pair_score(*pair, lambda a, b: position_3d(a, b, target.relation, depth, compat))


def _pair_score(first: Detection | None, second: Detection | None, position: Callable[[Box, Box], float]) -> float:
    score = 0.25 * sum(found.score for found in (first, second) if found)
    return score + 0.5 * position(first.box, second.box) if first and second else score


def _is(label: str, name: str) -> bool:
    return label in (name, ALIASES.get(name))


def knows(classes: Sequence[str], name: str, compat: Compat | None = None) -> bool:
    """Whether a detector of these classes can find a name; for one that cannot, 0 would be the detector's fault."""
    if compat:
        return any(PUBLISHED_ALIASES.get(name, name) in label for label in classes)
    return any(_is(label, name) for label in classes)


def _best_pair(detections: Sequence[Detection], target: Spatial) -> tuple[Detection | None, Detection | None]:
    ranked = sorted(detections, key=lambda d: (-d.score, -d.area, d.box))
    first = next((d for d in ranked if _is(d.label, target.first)), None)
    second = next((d for d in ranked if _is(d.label, target.second) and d is not first), None)
    return first, second


def _first_pair(detections: Sequence[Detection], target: Spatial) -> tuple[Detection | None, Detection | None]:
    first, second = (
        next((d for d in detections if d.label == PERSONS.get(name, name)), None)
        for name in (target.first, target.second)
    )
    return first, second


def _last_pair(detections: Sequence[Detection], target: Spatial) -> tuple[Detection | None, Detection | None]:
    """Published 3D: the list is read until both were seen, each being the last seen so far; alone, the first one."""
    names = [PERSONS.get(name, name) for name in (target.first, target.second)]
    seen: list[Detection | None] = [None, None]
    for found in detections:
        seen = [found if name in found.label else old for name, old in zip(names, seen, strict=True)]
        if all(seen):
            return seen[0], seen[1]
    first, second = (next((d for d in detections if name in d.label), None) for name in names)
    return first, second


def parse_numeracy(
    prompt: str, vocabulary: Sequence[tuple[str, str]], compat: Compat | None = None
) -> list[tuple[str, int]]:
    """Names (singular) and numbers of a prompt: each number word "a" ... "eight" with the name of one or two words
    right after it.

    Args:
        prompt: such as "two cats and a dog".
        vocabulary: pairs (singular, plural).
        compat: see the head of the module.
    """
    words = re.findall(r"[a-z]+" if not compat else r"[A-Za-z]+", prompt if compat else prompt.lower())
    plural = {many: one for one, many in reversed(vocabulary)}
    singular = {one for one, _ in vocabulary}
    found: list[tuple[str, int]] = []
    for i, word in enumerate(words):
        if word not in NUMBERS:
            continue
        for name in (" ".join(words[i + 1 : i + 3]), " ".join(words[i + 1 : i + 2])):
            one = name if name in singular else plural.get(name)
            if one is None or (compat and NUMBERS[word] > 1 and name not in plural):
                continue
            found.append((one, NUMBERS[word]))
            break
    return found


def distinct(detections: Sequence[Detection]) -> list[Detection]:
    """Detections without those that repeat an earlier one of the same label: an IoU, or a share of either box in the
    other, above 0.9 (sides + 1)."""
    kept: list[Detection] = []
    for found in detections:
        if not any(found.label == d.label and _same_place(found.box, d.box) for d in kept):
            kept.append(found)
    return kept


def _same_place(a: Box, b: Box) -> bool:
    areas = [(x2 - x1 + 1) * (y2 - y1 + 1) for x1, y1, x2, y2 in (a, b)]
    shared = iou(a, b)
    overlap = shared * sum(areas) / (1 + shared)  # IoU = overlap / (areas - overlap)
    return shared > SAME or overlap > SAME * min(areas)


def numeracy(
    detections: Sequence[Detection], wanted: Sequence[tuple[str, int]], compat: Compat | None = None
) -> float | None:
    """Mean over the names of 0.5 (it is there) + 0.5 (its number is right); None if there is no name.

    Args:
        detections: of one image, best first.
        wanted: see ``parse_numeracy``.
        compat: see the head of the module.
    """
    if not wanted:
        return None
    labels = [d.label for d in distinct(detections)]
    total = 0.0
    for name, count in wanted:
        if compat:
            name = PUBLISHED_ALIASES.get(name, name)
            if name not in labels:
                labels = [name if name in label else label for label in labels]  # stays so for the names that follow
            number = labels.count(name)
        else:
            number = sum(_is(label, name) for label in labels)
        total += 0.5 * (number > 0) + 0.5 * (number == count)
    return total / len(wanted)


def chunk_questions(chunks: Sequence[str]) -> list[str]:
    """Questions of BLIP-VQA: the noun chunks of a prompt with a question mark, at most eight, without "top" and
    "the side", "the left", "the right", which are parts of relations."""
    return [f"{chunk}?" for chunk in chunks if chunk not in NO_OBJECTS][:MOST_QUESTIONS]


def blip_vqa(probabilities: Sequence[float], compat: Compat | None = None) -> float | None:
    """Product of the probabilities of "yes"; None if there was no question (compat: 1, and four decimals each)."""
    if compat:
        return math.prod(float(f"{p:.4f}") for p in probabilities)
    return math.prod(probabilities) if len(probabilities) else None


def complex_kind(
    prompt: str, spatial: Collection[str], action: Collection[str]
) -> Literal["spatial", "action", "both"]:
    """To which list of complex prompts one belongs; only the text before the first full stop counts, in any case.

    Args:
        prompt: of the image.
        spatial: the prompts of the spatial list.
        action: the prompts of the action list.
    """

    def key(text: str) -> str:
        return text.lower().partition(".")[0].strip()

    if key(prompt) in {key(other) for other in spatial}:
        return "spatial"
    return "action" if key(prompt) in {key(other) for other in action} else "both"


def three_in_one(kind: Literal["spatial", "action", "both"], scores: Mapping[str, float]) -> float:
    """Score of a complex prompt: the mean of the measures that fit it.

    Args:
        kind: see ``complex_kind``.
        scores: "spatial" (2D), "blip_vqa" and "clip" (CLIPScore) in [0, 1]; those that do not fit are not read.
    """
    fit = {"spatial": ("spatial", "blip_vqa"), "action": ("clip", "blip_vqa"), "both": ("spatial", "clip", "blip_vqa")}
    return sum(scores[name] for name in fit[kind]) / len(fit[kind])
