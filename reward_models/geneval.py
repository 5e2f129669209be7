"""GenEval's decision logic as pure functions over detections.

Source: GenEval (arXiv 2310.11513, github.com/djghosh13/geneval) for the official decision; the reward server of
Flow-GRPO (arXiv 2505.05470, github.com/yifan123/reward-server) for the strict and the soft one. The same functions
serve the Shapes world and the COCO benchmark: only the detector and the colour classifier differ.

Differences from the published code: detections of equal score are ordered by area, then by x (theirs: arbitrary), and a
wrong position adds no term of 1 to the soft score (``flow_grpo_compat`` brings it back). A key of the metadata whose
value is None counts as absent, because tables (Arrow, Parquet) fill up what a row does not have.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .protocol import RewardResult

RELATIONS = ("left of", "right of", "above", "below")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Detection:
    """One found object: class, box [x1, y1, x2, y2] in pixels (y downwards), score in [0, 1], mask (H, W) or None."""

    label: str
    box: Box
    score: float
    mask: np.ndarray | None = field(default=None, compare=False)

    @property
    def area(self) -> float:
        x1, y1, x2, y2 = self.box
        return (x2 - x1) * (y2 - y1)


class Detector(Protocol):
    """Finds objects of a fixed list of classes."""

    @property
    def classes(self) -> Sequence[str]: ...

    def detect(self, images: Tensor) -> list[list[Detection]]:
        """Detections of each of N images, (N, 3, H, W) in [0, 1], in any order and of any score."""
        ...


class ColourClassifier(Protocol):
    """Names the colour of detected objects."""

    @property
    def colours(self) -> Sequence[str]: ...

    def classify(self, image: Tensor, objects: Sequence[Detection]) -> list[str]:
        """One colour for each object of one image, (3, H, W) in [0, 1]."""
        ...


ColoursOf = Callable[[Sequence[Detection]], Sequence[str]]  # a colour classifier bound to one image
Objects = Mapping[str, Sequence[Detection]]  # class -> detections, best first


@dataclass(frozen=True)
class Options:
    """Thresholds of the benchmark; the defaults are the official ones.

    Attributes:
        threshold: a detection counts if its score is strictly greater.
        counting_threshold: the same for prompts whose tag is "counting".
        max_objects: at most so many detections of a class are kept.
        max_overlap: detections that overlap a better one by this IoU or more are dropped; 1 switches that off.
        position_threshold: share of the two sizes that must lie between two centres before they count as apart.
        flow_grpo_compat: reproduce the published soft score, in which a position that was checked adds a term of 1
            whether it was right or wrong (a wrong one scores 0.75 instead of 2/3).
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1
    flow_grpo_compat: bool = False


@dataclass(frozen=True)
class Judgement:
    """The three scores of one image, and why the official one is what it is (empty if correct)."""

    correct: bool
    strict: bool
    soft: float
    reason: str
    objects: Objects


def iou(a: Box, b: Box) -> float:
    """Intersection over union, a side being the corner difference + 1 as in GenEval; 0 if both boxes are empty."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0


def select(detections: Sequence[Detection], tag: str, options: Options = Options()) -> dict[str, list[Detection]]:
    """The detections that count, by class, best first; classes of which nothing is left are absent.

    Args:
        detections: all detections of one image.
        tag: the task of the prompt ("counting" has a threshold of its own).
        options: thresholds.
    """
    threshold = options.counting_threshold if tag == "counting" else options.threshold
    objects: dict[str, list[Detection]] = {}
    for found in sorted(detections, key=lambda d: (-d.score, -d.area, d.box)):  # ties: area, then x
        if found.score > threshold:
            objects.setdefault(found.label, []).append(found)
    for label, ranked in objects.items():
        objects[label] = _suppress(ranked[: options.max_objects], options.max_overlap)
    return objects


def _suppress(ranked: list[Detection], max_overlap: float) -> list[Detection]:
    if max_overlap == 1:  # officially switched off: even a perfect duplicate counts
        return ranked
    kept: list[Detection] = []
    for found in ranked:
        if all(iou(found.box, better.box) < max_overlap for better in kept):
            kept.append(found)
    return kept


def relations(a: Box, b: Box, position_threshold: float = 0.1) -> set[str]:
    """Where ``a`` lies with respect to ``b``: a subset of RELATIONS.

    With the centre offset o = centre(a) - centre(b), on each axis r = sign(o) max(|o| - 0.1 (size_a + size_b), 0), and
    a relation holds where r / |o|_2 exceeds 0.5 (the norm is that of the offset before the revision).
    """
    offset = ((a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2)
    sizes = (abs(a[2] - a[0]) + abs(b[2] - b[0]), abs(a[3] - a[1]) + abs(b[3] - b[1]))
    revised = [
        math.copysign(max(abs(o) - position_threshold * size, 0), o) for o, size in zip(offset, sizes, strict=True)
    ]
    if max(map(abs, revised)) < 1e-3:
        return set()
    dx, dy = (r / math.hypot(*offset) for r in revised)
    return {name for name, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True) if holds}


def _all_related(
    found: Sequence[Detection], targets: Sequence[Detection], relation: str, options: Options
) -> tuple[bool, str]:
    for a in found:
        for b in targets:
            true = relations(a.box, b.box, options.position_threshold)
            if relation not in true:
                said = " and ".join(sorted(true)) or "no relation"
                return False, f"expected {a.label} {relation} {b.label}, found {said}"
    return True, ""


def official(
    objects: Objects, metadata: Mapping[str, Any], colours_of: ColoursOf, options: Options = Options()
) -> tuple[bool, str]:
    """The benchmark's decision for one image: correct or not, and what was wrong.

    More objects than asked for are fine unless ``exclude`` forbids them; only the best ``count`` of a class are tested.
    """
    faults: list[str] = []
    groups: list[Sequence[Detection] | None] = []  # the matched objects of each clause
    for clause in metadata.get("include", ()):
        label, count = clause["class"], clause["count"]
        found = objects.get(label, ())[:count]
        matched = len(found) == count
        if not matched:
            faults.append(f"expected {label} >= {count}, found {len(found)}")
        if matched and clause.get("color") is not None:
            seen = list(colours_of(found))
            if seen.count(clause["color"]) < count:
                matched = False
                faults.append(f"expected {clause['color']} {label} >= {count}, found {', '.join(seen)}")
        if matched and clause.get("position") is not None:
            relation, target = clause["position"]
            if groups[target] is None:
                matched, fault = False, f"no target for {label} to be {relation}"
            else:
                matched, fault = _all_related(found, groups[target] or (), relation, options)
            if not matched:
                faults.append(fault)
        groups.append(found if matched else None)
    for clause in metadata.get("exclude") or ():
        number = len(objects.get(clause["class"], ()))
        if number >= clause["count"]:
            faults.append(f"expected {clause['class']} < {clause['count']}, found {number}")
    return not faults, "; ".join(faults)


def strict_and_soft(
    objects: Objects, metadata: Mapping[str, Any], colours_of: ColoursOf, options: Options = Options()
) -> tuple[bool, float]:
    """The two training scores: all detections count, and their number must be exactly the one asked for.

    strict: 1 if every clause has exactly ``count`` objects, all of the right colour, all pairs in the right position.
    ``exclude`` is not read. soft: the mean of these terms over all clauses (0 if there is no clause):

        1 - |count - found| / count                       always; not clipped, so that over-generation can go below 0
        0                                                 if found != count and the clause has a colour or a position
        1 - |count - found of the colour| / count         if found == count and the clause has a colour
        1 or 0                                            if found == count, the colour is right and there is a position
    """
    terms: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", ()):
        count = clause["count"]
        found = objects.get(clause["class"], ())
        matched = len(found) == count
        coloured, placed = (clause.get(key) is not None for key in ("color", "position"))
        terms.append(1 - abs(count - len(found)) / count)
        if not matched and (coloured or placed):
            terms.append(0.0)
        if matched and coloured:
            right = list(colours_of(found)).count(clause["color"])
            terms.append(1 - abs(count - right) / count)
            matched = right == count
        if matched and placed:
            relation, target = clause["position"]
            if groups[target] is None:
                matched = False
                terms.append(0.0)
            else:
                matched, _ = _all_related(found, groups[target] or (), relation, options)
                if options.flow_grpo_compat and not matched:
                    terms.append(0.0)
                terms.append(1.0 if matched or options.flow_grpo_compat else 0.0)
        groups.append(found if matched else None)
    strict = all(group is not None for group in groups)
    return strict, sum(terms) / len(terms) if terms else 0.0


def judge(
    detections: Sequence[Detection],
    metadata: Mapping[str, Any],
    colours_of: ColoursOf,
    options: Options = Options(),
) -> Judgement:
    """All three scores of one image from its detections.

    Args:
        detections: what the detector found in the image.
        metadata: of the prompt: "tag", "include" and perhaps "exclude" (see ``check_metadata``).
        colours_of: names the colours of objects of this image; asked only about the objects under test.
        options: thresholds.
    """
    objects = select(detections, metadata["tag"], options)
    correct, reason = official(objects, metadata, colours_of, options)
    strict, soft = strict_and_soft(objects, metadata, colours_of, options)
    return Judgement(correct, strict, soft, reason, objects)


def check_metadata(
    metadata: Mapping[str, Any], classes: Sequence[str] | None = None, colours: Sequence[str] | None = None
) -> str | None:
    """Why metadata cannot be judged, or None if it can.

    Args:
        metadata: of the prompt.
        classes, colours: those that the detector and the colour classifier know; None: any.
    """
    include, exclude = metadata.get("include"), metadata.get("exclude") or ()
    if not isinstance(metadata.get("tag"), str) or not isinstance(include, list | tuple) or not include:
        return "the metadata has no GenEval 'tag' and 'include'"
    if not isinstance(exclude, list | tuple):
        return f"exclude is {exclude!r}, expected a list of clauses"
    for i, clause in enumerate([*include, *exclude]):
        match clause:
            case {"class": str(label), "count": int(count)} if count >= 1:
                if classes is not None and label not in classes:
                    return f"class {label!r} is not one of {', '.join(classes)}"
            case _:
                return f"clause {clause!r} needs a 'class' and a 'count' of at least 1"
        colour = clause.get("color")
        if colour is not None and colours is not None and colour not in colours:
            return f"colour {colour!r} is not one of {', '.join(colours)}"
        match clause.get("position"):
            case None:
                pass
            case [relation, int(target)] if relation in RELATIONS and 0 <= target < i < len(include):
                pass
            case position:
                return f"position {position!r} is not [one of {', '.join(RELATIONS)}; number of an earlier clause]"
    return None


def record(filename: str, metadata: Mapping[str, Any], judgement: Judgement) -> dict[str, Any]:
    """One line of the benchmark's official results file."""
    details = {label: [[*d.box, d.score] for d in judgement.objects[label]] for label in sorted(judgement.objects)}
    return {
        "filename": filename,
        "tag": metadata["tag"],
        "prompt": metadata.get("prompt", ""),
        "correct": judgement.correct,
        "reason": judgement.reason,
        "metadata": json.dumps(dict(metadata)),
        "details": json.dumps(details),
    }


def image_and_prompt_shares(prompt_ids: Sequence[object], correct: Sequence[float]) -> tuple[float, float]:
    """Share of correct images, and share of prompts with at least one correct image (GenEval's two side figures)."""
    best: dict[object, float] = {}
    for prompt, value in zip(prompt_ids, correct, strict=True):
        best[prompt] = max(best.get(prompt, 0.0), float(value))
    return sum(map(float, correct)) / len(correct), sum(best.values()) / len(best)


def range_of(kind: str, kinds: Sequence[str], options: Options = Options()) -> tuple[float, float]:
    """Least and greatest value of one of a reward's three kinds: official, strict, soft.

    The soft score is least where one object is asked for and as many as count are found: 1 - (max_objects - 1).

    Raises:
        ValueError: unknown kind.
    """
    if kind not in kinds:
        raise ValueError(f"got GenEval reward {kind!r}, expected one of {', '.join(kinds)}. Use one of these.")
    return (min(2.0 - options.max_objects, 0.0), 1.0) if kind == kinds[2] else (0.0, 1.0)


def result_of(answers: Sequence[Judgement | str], kinds: Sequence[str], kind: str) -> RewardResult:
    """The result of a reward from judgements (or why there is none): parts in the order official, strict, soft."""
    nothing = (math.nan, math.nan, math.nan)
    rows = [nothing if isinstance(a, str) else (float(a.correct), float(a.strict), a.soft) for a in answers]
    parts = dict(zip(kinds, torch.tensor(rows, dtype=torch.float32).reshape(-1, 3).unbind(1), strict=True))
    reasons = [a if isinstance(a, str) else a.reason or None for a in answers]
    return RewardResult(parts[kind], parts, reasons)
