"""Rewards that look at parts of an image: by level (HiCoGen) and as a map over the image (SRUM).

HiCoGen (arXiv 2511.19965): ``R = w_g R_global + w_s mean_i R_subject(crop_i) + w_r mean_j R_relation_j``. SRUM (arXiv
2510.12784): a map that starts at 1/2, on which each box writes ``max(old, (s + 1) / 2)``, times ``(g + 1) / 2``.

What a prompt speaks of comes from its metadata: lists "subjects" and "relations" of texts, or GenEval's clauses
("include"). A subject is found by a detector and cut out; its own text is the prompt of the crop.

Deviations. HiCoGen compares crops with reference images of the subjects by DINO; here any reward scores the crop
for the subject's text, and one with reference images can be among them. SRUM's judge returns boxes itself; here they
come from the detector, and a local reward gives their scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .detectors import load_detector
from .geneval import Box, Detection, Detector
from .mixture import combined_spec
from .protocol import Metadata, Reward, RewardResult, RewardSpec, checked_score, to_8bit
from .schedule import all_at


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
    return [
        Subject(c["class"], f"a photo of a {c['color']} {c['class']}" if "color" in c else f"a photo of a {c['class']}",
                int(c.get("count", 1)))
        for c in metadata["include"]
    ]  # fmt: skip


def relations(metadata: Metadata) -> list[str]:
    """Texts of the relations between subjects; empty where there are none."""
    if "relations" in metadata:
        return list(metadata["relations"])
    clauses = metadata.get("include", ())
    return [
        f"a photo of a {clause['class']} {clause['position'][0]} a {clauses[clause['position'][1]]['class']}"
        for clause in clauses
        if "position" in clause
    ]


# --- rewards ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hierarchy:
    """Levels of a prompt: the whole, each subject in its own crop, each relation (formula: see the module).

    A subject that is not found counts ``absent``. A level of which a prompt has nothing (no relation) is left out of
    its sum; a prompt whose metadata names no subject has no subject level and is missing if that level has a weight.

    Args:
        rewards: under "global", "subject", "relation"; any of them. The last two see the unit's text as their prompt.
        weights: of the levels, 0: logged only.
        detector: a name, see ``detectors.load_detector``, or a ``geneval.Detector``; needed by the subject level.
        absent: the score of a subject that is not found. margin: around a box, share of its longer side.
        size: of the crops in pixels. least: score of a detection that counts.
        device: where a learned detector computes.

    Raises:
        ValueError: no detector for the subject level, weights below 0.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    detector: str | Detector | None = None
    absent: float = 0.0
    margin: float = 0.1
    size: int = 224
    least: float = 0.3
    device: str | torch.device = "cpu"
    spec: RewardSpec = field(init=False)

    def __post_init__(self) -> None:
        if min(self.weights.values()) < 0:
            raise ValueError(f"got weights {dict(self.weights)} in a hierarchy, expected numbers >= 0. Correct them.")
        if "subject" in self.rewards and self.detector is None:
            raise ValueError(
                "got a hierarchy with a subject level and no detector, expected one that finds the subjects. Write "
                "detector: shapes, module:attribute, or a Mask2Former's hub id or folder."
            )
        parts = " + ".join(f"{self.weights[level]:g} {level}:{r.spec.name}" for level, r in self.rewards.items())
        object.__setattr__(self, "spec", combined_spec(f"hierarchy({parts})", self.rewards))

    def at(self, update: int | None) -> Hierarchy:
        """See ``schedule.at``."""
        return replace(self, rewards=all_at(self.rewards, update))

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; ``parts`` holds each level under its name, NaN where a prompt has nothing of it."""
        n = len(images)
        levels: dict[str, Tensor] = {}
        reasons: list[str | None] = [None] * n
        none = torch.zeros(n, dtype=torch.bool)
        applies: dict[str, Tensor] = {}
        for level, reward in self.rewards.items():
            if level == "global":
                found = checked_score(reward, images, prompts, metadata, groups, all_missing="allow")
                levels[level], applies[level], said = found.values, ~none, found.reasons
            elif level == "subject":
                levels[level], said = self._subjects(reward, images, metadata)
                applies[level] = ~none
            else:
                texts = [relations(m) for m in metadata]
                rows = [(i, text) for i, row in enumerate(texts) for text in row]
                pictures = images[torch.tensor([i for i, _ in rows], dtype=torch.long)]
                levels[level], said = _mean_of_units(reward, pictures, rows, [metadata[i] for i, _ in rows], n)
                applies[level] = torch.tensor([bool(row) for row in texts])
            counts = applies[level] if self.weights[level] else none
            reasons = [
                f"{level}: {new}" if new and used and not old else old
                for old, new, used in zip(reasons, said, counts.tolist(), strict=True)
            ]
        total = torch.zeros(n, dtype=torch.float64)
        for level, values in levels.items():
            if self.weights[level]:
                total += torch.where(applies[level], self.weights[level] * values.double(), 0.0)
        parts = {level: values.float() for level, values in levels.items()}
        return RewardResult(total.float(), parts, reasons)

    def _subjects(self, reward: Reward, images: Tensor, metadata: list[Metadata]) -> tuple[Tensor, list[str | None]]:
        """Mean over subjects of the score of their crops, (N,)."""
        detections = load_detector(cast("str | Detector", self.detector), self.device).detect(images)
        rows: list[tuple[int, str]] = []
        crops: list[Tensor] = []
        absent = torch.zeros(len(images), dtype=torch.long)
        asked = torch.zeros(len(images), dtype=torch.long)
        for i, (image, wanted, found) in enumerate(zip(images, map(subjects, metadata), detections, strict=True)):
            for subject in wanted or ():
                boxes = best_boxes(found, subject, self.least)
                asked[i] += subject.wanted
                absent[i] += subject.wanted - len(boxes)
                rows += [(i, subject.text)] * len(boxes)
                crops += [crop(image, box, self.margin, self.size) for box in boxes]
        pictures = torch.stack(crops) if crops else images.new_zeros(0, 3, self.size, self.size)
        # the crops' metadata is that of no prompt: a rule that reads it would judge the wrong thing
        means, said = _mean_of_units(reward, pictures, rows, [{} for _ in rows], len(images))
        found_share = (asked - absent) / asked
        values = torch.where(absent == asked, 0.0, means * found_share) + self.absent * absent / asked
        nothing = [None if count else "the metadata names no subject" for count in asked.tolist()]
        return values.where(asked > 0, math.nan), [a or b for a, b in zip(nothing, said, strict=True)]


@dataclass(frozen=True)
class Regional:
    """A map of where an image is right, and its mean as the value (formula: see the module).

    Args:
        rewards: "global" sees the image and its prompt, "local" the crop and the text of each detected subject; both
            are read as scores in [-1, 1] after ``2 (r - low) / (high - low) - 1`` with the ends of their ranges.
        weights: both 1.
        detector, margin, size, least, device: as for ``Hierarchy``.

    Raises:
        ValueError: rewards without bounds.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    detector: str | Detector
    margin: float = 0.1
    size: int = 224
    least: float = 0.3
    device: str | torch.device = "cpu"
    spec: RewardSpec = field(init=False)

    def __post_init__(self) -> None:
        for name, reward in self.rewards.items():
            if not all(map(math.isfinite, reward.spec.range)) or self.weights[name] != 1:
                raise ValueError(
                    f"got {name!r} with values in {reward.spec.range} and weight {self.weights[name]:g} in a regional "
                    "reward, expected finite bounds and no weight. Bound it: {transform: scale, low: -1, high: 1}."
                )
        parts = ", ".join(reward.spec.name for reward in self.rewards.values())
        object.__setattr__(self, "spec", combined_spec(f"regional({parts})", self.rewards, (0.0, 1.0)))

    def at(self, update: int | None) -> Regional:
        """See ``schedule.at``."""
        return replace(self, rewards=all_at(self.rewards, update))

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; ``region_map`` is (N, H, W) in [0, 1], NaN where the value is."""
        whole = checked_score(self.rewards["global"], images, prompts, metadata, groups, all_missing="allow")
        overall = _signed(whole.values, self.rewards["global"].spec)
        detections = load_detector(self.detector, self.device).detect(images)
        rows: list[tuple[int, str]] = []
        boxes: list[Box] = []
        for i, (wanted, found) in enumerate(zip(map(subjects, metadata), detections, strict=True)):
            for subject in wanted or ():
                mine = best_boxes(found, subject, self.least)
                boxes += mine
                rows += [(i, subject.text)] * len(mine)
        crops = [crop(images[i], box, self.margin, self.size) for (i, _), box in zip(rows, boxes, strict=True)]
        scores = torch.zeros(0)
        if crops:
            local, texts = self.rewards["local"], [text for _, text in rows]
            given = checked_score(local, torch.stack(crops), texts, None, None, all_missing="allow")
            scores = _signed(given.values, local.spec)
        maps = []
        for i in range(len(images)):
            own = [k for k, (image, _) in enumerate(rows) if image == i and not scores[k].isnan()]
            size = (images.shape[-2], images.shape[-1])
            maps.append(region_map([boxes[k] for k in own], [float(scores[k]) for k in own], float(overall[i]), size))
        stacked = torch.stack(maps) if maps else images.new_zeros(0, *images.shape[-2:])
        parts = whole.parts | {"global": whole.values}
        return RewardResult(stacked.mean((1, 2)), parts, whole.reasons, None, stacked)


# --- what both share --------------------------------------------------------------------------------------------------


def best_boxes(found: Sequence[Detection], subject: Subject, least: float) -> list[Box]:
    """Boxes of the best ``wanted`` detections of a subject's class with a score of at least ``least``."""
    mine = [d for d in found if d.label == subject.label and d.score >= least]
    return [d.box for d in sorted(mine, key=lambda d: (-d.score, -d.area, d.box[0]))[: subject.wanted]]


def _mean_of_units(
    reward: Reward, pictures: Tensor, rows: Sequence[tuple[int, str]], metadata: Sequence[Metadata], n: int
) -> tuple[Tensor, list[str | None]]:
    """Scores of units (number of their image, text), averaged by image: (n,), NaN where there is none or one misses."""
    reasons: list[str | None] = [None] * n
    if not rows:
        return torch.full((n,), math.nan), reasons
    index, texts = torch.tensor([i for i, _ in rows]), [text for _, text in rows]
    found = checked_score(reward, pictures, texts, metadata, None, all_missing="allow")
    total = torch.zeros(n, dtype=torch.float64).index_add_(0, index, found.values.double())
    for (i, _), reason in zip(rows, found.reasons, strict=True):
        reasons[i] = reasons[i] or reason
    return (total / index.bincount(minlength=n)).float(), reasons


def _signed(values: Tensor, spec: RewardSpec) -> Tensor:
    """From the range of a reward to [-1, 1]."""
    low, high = spec.range
    signed = (2 * (values - low) / (high - low) - 1).clamp(-1, 1)
    return signed if spec.higher_is_better else -signed
