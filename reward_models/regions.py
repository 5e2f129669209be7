"""Rewards that look at parts of an image: by level (HiCoGen) and as a map over the image (SRUM).

HiCoGen (arXiv 2511.19965): ``R = w_g R_global + w_s mean_i R_subject(crop_i) + w_r mean_j R_relation_j``. SRUM (arXiv
2510.12784): a map that starts at 1/2, on which each box writes ``max(old, (s + 1) / 2)``, times ``(g + 1) / 2``.

What a prompt speaks of comes from its metadata: lists "subjects" and "relations" of texts, or GenEval's clauses
("include"). A subject is found by a detector and cut out; its own text is the prompt of the crop.

Deviations. HiCoGen compares crops with reference images of the subjects by DINO; here any reward scores the crop
for the subject's text, and one with reference images can be among them. SRUM's judge returns boxes itself; here they
come from the detector, and a local reward gives their scores. SRUM weights a loss by the map, place by place; here the
reward is the map's mean, and the map comes beside it for a loss of one's own (``to_grid`` fits it to the latents).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .combine import Combined, Gate, Trust, check_numbers, check_whole_numbers, settings
from .geneval import Box, Detection, Detector
from .mixture import WeightedSum, combined_spec
from .protocol import Metadata, Reward, RewardResult, RewardSpec, checked_score, to_8bit
from .schedule import all_at
from .shaping import transforms


class Subject(NamedTuple):
    """Something that a prompt asks for: the detector's class, a text that describes it, how often it is wanted."""

    label: str
    text: str
    wanted: int = 1


# --- mathematics ------------------------------------------------------------------------------------------------------


def region_map(boxes: Sequence[Box], scores: Sequence[float], overall: float, size: tuple[int, int]) -> Tensor:
    """SRUM's reward map, (H, W) in [0, 1]: base 1/2, ``max(old, (s + 1) / 2)`` inside each box, times ``(g + 1) / 2``.

    Args:
        boxes: [x1, y1, x2, y2] in pixels; a pixel belongs to a box that holds its centre.
        scores: one in [-1, 1] for each box. overall: of the whole image, in [-1, 1]. size: (H, W) in pixels.
    """
    h, w = size
    found = torch.full((h, w), 0.5)
    y, x = torch.arange(h)[:, None] + 0.5, torch.arange(w)[None, :] + 0.5
    for (x1, y1, x2, y2), score in zip(boxes, scores, strict=True):
        inside = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
        found = torch.where(inside, found.clamp(min=(score + 1) / 2), found)
    return found * ((overall + 1) / 2)


def to_grid(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, H, W) on the grid of the latents, (N, h, w), by averaging areas (its mean stays where sizes divide)."""
    return interpolate(maps[:, None], size, mode="area")[:, 0]


def crop(image: Tensor, box: Box, margin: float, size: int) -> Tensor:
    """The square around a box with a margin on each side (a share of its longer side), cut at the borders of the image.

    (3, H, W) -> (3, size, size), bilinear with antialias, on the 8-bit grid.
    """
    h, w = image.shape[-2:]
    x1, y1, x2, y2 = box
    half = max(x2 - x1, y2 - y1) * (0.5 + margin)
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
    left, right = max(0, math.floor(cx - half)), min(w, math.ceil(cx + half))
    top, bottom = max(0, math.floor(cy - half)), min(h, math.ceil(cy + half))
    part = image[None, :, top : max(bottom, top + 1), left : max(right, left + 1)]
    return to_8bit(interpolate(part, (size, size), mode="bilinear", antialias=True, align_corners=False))[0]


def subjects(metadata: Metadata) -> list[Subject] | None:
    """What the metadata names, or None where it names nothing."""
    if "subjects" in metadata:
        given = metadata["subjects"]
        return [Subject(s, s) if isinstance(s, str) else Subject(s["class"], s.get("text", s["class"])) for s in given]
    if "include" not in metadata:
        return None
    clauses = [(c, f"{c['color']} {c['class']}" if "color" in c else c["class"]) for c in metadata["include"]]
    return [Subject(c["class"], f"a photo of {_article(name)}", int(c.get("count", 1))) for c, name in clauses]


def relations(metadata: Metadata) -> list[str]:
    """Texts of the relations between subjects; empty where there are none."""
    if "relations" in metadata:
        return list(metadata["relations"])
    clauses = metadata.get("include", ())
    return [
        f"a photo of {_article(clause['class'])} {clause['position'][0]} "
        f"{_article(clauses[clause['position'][1]]['class'])}"
        for clause in clauses
        if "position" in clause
    ]


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


# --- rewards ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hierarchy:
    """Levels of a prompt: the whole, each subject in its own crop, each relation (formula: see the module).

    A subject that is not found counts ``absent``. A level of which a prompt has nothing (no relation) is left out of
    its sum; a prompt whose metadata names no subject has no subject level and is missing if that level has a weight.

    Args:
        rewards: under "global", "subject", "relation"; any of them. The last two see the unit's text as their prompt.
        weights: of the levels, 0: logged only.
        detector: finds the subjects (see ``detectors.load_detector``); needed by the subject level.
        absent: the score of a subject that is not found. margin: around a box, share of its longer side.
        size: of the crops in pixels. least: score of a detection that counts.

    Raises:
        ValueError: no detector for the subject level, weights below 0, options out of range.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    detector: Detector | None = None
    absent: float = 0.0
    margin: float = 0.1
    size: int = 224
    least: float = 0.3
    spec: RewardSpec = field(init=False)

    def __post_init__(self) -> None:
        if min(self.weights.values()) < 0:
            raise ValueError(f"got weights {dict(self.weights)} in a hierarchy, expected numbers >= 0. Correct them.")
        check_numbers(absent=self.absent)
        _check_crops(self.margin, self.size, self.least)
        if "subject" in self.rewards:
            _check_detector(self.detector, "a hierarchy with a subject level")
        parts = " + ".join(f"{self.weights[level]:g} {level}:{r.spec.name}" for level, r in self.rewards.items())
        object.__setattr__(self, "spec", _spec(self, f"hierarchy({parts})"))

    def at(self, update: int | None) -> Hierarchy:
        """See ``schedule.at``."""
        return replace(self, rewards=all_at(self.rewards, update))

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; ``parts`` holds each level under its name, NaN where a prompt has nothing of it, and
        what the level is made of under "level/name"."""
        n = len(images)
        total, reasons = torch.zeros(n, dtype=torch.float64), list[str | None]([None] * n)
        parts: dict[str, Tensor] = {}
        for level, reward in self.rewards.items():
            applies = torch.ones(n, dtype=torch.bool)
            if level == "global":
                found = checked_score(reward, images, prompts, metadata, groups, all_missing="allow")
            elif level == "subject":
                found = self._subjects(reward, images, metadata)
            else:
                texts = [relations(m) for m in metadata]
                rows = [(i, text) for i, row in enumerate(texts) for text in row]
                pictures = images[torch.tensor([i for i, _ in rows], dtype=torch.long)]
                found = _units(reward, pictures, rows, [metadata[i] for i, _ in rows], n).by_image
                applies = torch.tensor([bool(row) for row in texts], dtype=torch.bool)
            parts |= {level: found.values, **{f"{level}/{name}": part for name, part in found.parts.items()}}
            if self.weights[level]:
                total += torch.where(applies, self.weights[level] * found.values.double(), 0.0)
                said = [
                    f"{level}: {reason}" if reason and x else None
                    for reason, x in zip(found.reasons, applies.tolist(), strict=True)
                ]
                reasons = [old or new for old, new in zip(reasons, said, strict=True)]
        return RewardResult(total.float(), parts, reasons)

    def _subjects(self, reward: Reward, images: Tensor, metadata: list[Metadata]) -> RewardResult:
        """Mean over subjects of the score of their crops."""
        crops = cut_out(self, images, metadata)
        # the crops' metadata is that of no prompt: a rule that reads it would judge the wrong thing
        found = _units(reward, crops.pictures, crops.rows, [{} for _ in crops.rows], len(images)).by_image
        absent, asked = crops.absent, crops.asked
        present = torch.where(absent == asked, 0.0, found.values * (asked - absent) / asked)
        values = (present + self.absent * absent / asked).where(asked > 0, math.nan)
        nothing = [None if count else "the metadata names no subject" for count in asked.tolist()]
        return replace(found, values=values, reasons=[a or b for a, b in zip(nothing, found.reasons, strict=True)])


@dataclass(frozen=True)
class Regional:
    """A map of where an image is right, and its mean as the value (formula: see the module).

    An image is missing if its metadata names no subject, or if one of its two rewards gives it no score.

    Args:
        rewards: "global" sees the image and its prompt, "local" the crop and the text of each detected subject; both
            are read as scores in [-1, 1] after ``2 (r - low) / (high - low) - 1`` with the ends of their ranges.
        weights: both 1.
        detector, margin, size, least: as for ``Hierarchy``.

    Raises:
        ValueError: rewards without bounds, no detector, options out of range.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    detector: Detector
    margin: float = 0.1
    size: int = 224
    least: float = 0.3
    spec: RewardSpec = field(init=False)

    def __post_init__(self) -> None:
        for name, reward in self.rewards.items():
            if not all(map(math.isfinite, reward.spec.range)) or self.weights[name] != 1:
                raise ValueError(
                    f"got {name!r} with values in {reward.spec.range} and weight {self.weights[name]:g} in a regional "
                    "reward, expected finite bounds and no weight. Bound it: {transform: scale, low: -1, high: 1}."
                )
        _check_crops(self.margin, self.size, self.least)
        _check_detector(self.detector, "a regional reward")
        parts = ", ".join(reward.spec.name for reward in self.rewards.values())
        object.__setattr__(self, "spec", _spec(self, f"regional({parts})", (0.0, 1.0)))

    def at(self, update: int | None) -> Regional:
        """See ``schedule.at``."""
        return replace(self, rewards=all_at(self.rewards, update))

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; ``region_map`` is (N, H, W) in [0, 1], NaN where the value is. ``parts``: "global",
        "local" (mean over the crops), and what these are made of under "global/name", "local/name"."""
        whole = checked_score(self.rewards["global"], images, prompts, metadata, groups, all_missing="allow")
        overall = _signed(whole.values, self.rewards["global"].spec)
        crops = cut_out(self, images, metadata)
        units = _units(self.rewards["local"], crops.pictures, crops.rows, [{} for _ in crops.rows], len(images))
        scores = _signed(units.scores, self.rewards["local"].spec).tolist()
        maps, reasons = images.new_zeros(len(images), *images.shape[-2:], dtype=torch.float32), list[str | None]()
        for i, asked in enumerate(crops.asked.tolist()):
            own = [k for k, (image, _) in enumerate(crops.rows) if image == i]
            boxes, marks = [crops.boxes[k] for k in own], [scores[k] for k in own]
            maps[i] = region_map(boxes, marks, float(overall[i]), (images.shape[-2], images.shape[-1]))
            said = [("global", whole.reasons[i]), ("local", units.by_image.reasons[i])]
            nothing = None if asked else "the metadata names no subject"
            reasons.append(nothing or next((f"{name}: {reason}" for name, reason in said if reason), None))
            if not asked or any(map(math.isnan, marks)):
                maps[i] = math.nan
        parts = {"global": whole.values, "local": units.by_image.values}
        for name, found in (("global", whole), ("local", units.by_image)):
            parts |= {f"{name}/{part}": values for part, values in found.parts.items()}
        return RewardResult(maps.mean((1, 2)), parts, reasons, None, maps)


# --- what both share --------------------------------------------------------------------------------------------------


class Crops(NamedTuple):
    """Subjects cut out of N images. rows: number of the image and text, boxes and pictures (M, 3, size, size) of the M
    that were found; asked, absent: (N,) how many an image should hold, and how many were not found."""

    rows: list[tuple[int, str]]
    boxes: list[Box]
    pictures: Tensor
    asked: Tensor
    absent: Tensor


def cut_out(reward: Hierarchy | Regional, images: Tensor, metadata: Sequence[Metadata]) -> Crops:
    """The subjects that the metadata names, where the reward's detector finds them."""
    assert reward.detector is not None
    rows: list[tuple[int, str]] = []
    boxes: list[Box] = []
    asked, absent = torch.zeros(2, len(images), dtype=torch.long)
    for i, (wanted, found) in enumerate(zip(map(subjects, metadata), reward.detector.detect(images), strict=True)):
        for subject in wanted or ():
            mine = best_boxes(found, subject, reward.least)
            asked[i] += subject.wanted
            absent[i] += subject.wanted - len(mine)
            rows += [(i, subject.text)] * len(mine)
            boxes += mine
    pictures = [crop(images[i], box, reward.margin, reward.size) for (i, _), box in zip(rows, boxes, strict=True)]
    stacked = torch.stack(pictures) if pictures else images.new_zeros(0, 3, reward.size, reward.size)
    return Crops(rows, boxes, stacked, asked, absent)


def best_boxes(found: Sequence[Detection], subject: Subject, least: float) -> list[Box]:
    """Boxes of the best ``wanted`` detections of a subject's class with a score of at least ``least``."""
    mine = [d for d in found if d.label == subject.label and d.score >= least]
    return [d.box for d in sorted(mine, key=lambda d: (-d.score, -d.area, d.box[0]))[: subject.wanted]]


class Units(NamedTuple):
    """Raw scores (M,) of units of N images, and their means by image with those of what they are made of."""

    scores: Tensor
    by_image: RewardResult


def _units(
    reward: Reward, pictures: Tensor, rows: Sequence[tuple[int, str]], metadata: Sequence[Metadata], n: int
) -> Units:
    """Score M units (number of their image, text); a mean is NaN where an image has none or one misses."""
    index = torch.tensor([i for i, _ in rows], dtype=torch.long)
    texts = [text for _, text in rows]
    found = checked_score(reward, pictures, texts, metadata, None, all_missing="allow") if rows else None

    def mean(scores: Tensor) -> Tensor:
        return (
            torch.zeros(n, dtype=torch.float64).index_add_(0, index, scores.double()) / index.bincount(minlength=n)
        ).float()

    reasons: list[str | None] = [None] * n
    for (i, _), reason in zip(rows, found.reasons if found else (), strict=True):
        reasons[i] = reasons[i] or reason
    scores = found.values if found else torch.zeros(0)
    # only names that do not depend on the images: processes and batches must agree on their parts
    parts = {name: mean(found.parts[name] if found else scores) for name in made_of(reward)}
    return Units(scores, RewardResult(mean(scores), parts, reasons))


def made_of(reward: Any) -> list[str]:
    """The parts that a combination or a transform always lists: the rewards inside it, one level deep."""
    if isinstance(reward, tuple(transforms().values())):
        return [cast(Any, reward).reward.spec.name]
    combined = isinstance(reward, WeightedSum | Combined | Gate | Trust | Hierarchy | Regional)
    return list(reward.rewards) if combined else []


def _spec(reward: Hierarchy | Regional, name: str, range: tuple[float, float] = (-math.inf, math.inf)) -> RewardSpec:
    spec = combined_spec(name, reward.rewards, range)
    if reward.detector is None:
        return spec
    detector = getattr(reward.detector, "version", type(reward.detector).__name__)
    crops = f"crops: bilinear with antialias to {reward.size} px; detector: "
    return replace(
        spec,
        version=f"{spec.version}; {settings(reward, detector=detector)}",
        preprocessing=f"{spec.preprocessing}; {crops}{getattr(reward.detector, 'preprocessing', 'its own')}",
    )


def _check_detector(detector: Detector | None, where: str) -> None:
    if not hasattr(detector, "detect"):
        raise ValueError(
            f"got {where} and detector {detector!r}, expected one that finds the subjects. Write detector: shapes, "
            "module:attribute, or a Mask2Former's hub id or folder."
        )


def _check_crops(margin: float, size: int, least: float) -> None:
    check_whole_numbers(size=size)
    check_numbers(margin=margin, least=least)
    if margin < 0 or size < 1:
        raise ValueError(f"got margin {margin} and size {size} of crops, expected >= 0 and >= 1. Correct them.")


def _signed(values: Tensor, spec: RewardSpec) -> Tensor:
    """From the range of a reward to [-1, 1]."""
    low, high = spec.range
    signed = (2 * (values - low) / (high - low) - 1).clamp(-1, 1)
    return signed if spec.higher_is_better else -signed
