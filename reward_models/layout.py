"""Layout IoU: are the objects where the layout wants them?

Sources: detection rewards of Visual-RFT (arXiv 2503.01785) and the agreement of drawn with planned boxes in GoT-R1
(arXiv 2505.17022); that objects beyond those asked for must cost something is a finding of VLM-R1 (arXiv 2504.07615).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .detectors import load_detector
from .geneval import Box, Detection, Detector
from .protocol import Metadata, RewardResult, RewardSpec


@dataclass(frozen=True)
class Planned:
    """One object of a layout: class, and box [x1, y1, x2, y2] in fractions of width and height, y downwards."""

    label: str
    box: Box


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of boxes with real-valued edges (no + 1); 0 if the union is empty."""
    overlap = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    union = sum(max(x2 - x1, 0.0) * max(y2 - y1, 0.0) for x1, y1, x2, y2 in (a, b)) - overlap
    return overlap / union if union > 0 else 0.0


@dataclass(frozen=True)
class Match:
    """How a layout was met.

    Attributes:
        ious: for each planned object the IoU with the detection matched to it, 0 if there is none.
        extra: detections of planned classes that no planned object got.
    """

    ious: tuple[float, ...]
    extra: int

    def value(self, count_extra: bool = True) -> float:
        """``sum(ious) / (planned + extra)``, or ``/ planned``: 1 only if every box fits exactly and nothing is over."""
        return sum(self.ious) / (len(self.ious) + (self.extra if count_extra else 0))


def assign(planned: Sequence[Planned], found: Sequence[Planned]) -> Match:
    """Give each planned object at most one detection of its class so that the sum of the IoUs is greatest.

    Boxes need only share a frame. Detections of other classes are not looked at.
    """
    ious = [0.0] * len(planned)
    extra = 0
    for label in dict.fromkeys(p.label for p in planned):
        rows = [i for i, p in enumerate(planned) if p.label == label]
        mine = [f for f in found if f.label == label]
        table = np.array([[box_iou(planned[i].box, f.box) for f in mine] for i in rows]).reshape(len(rows), len(mine))
        for row, column in zip(*linear_sum_assignment(table, maximize=True), strict=True):
            ious[rows[row]] = float(table[row, column])
        extra += max(len(mine) - len(rows), 0)
    return Match(tuple(ious), extra)


def parse_layout(metadata: Metadata, classes: Sequence[str]) -> list[Planned] | str:
    """The layout of ``metadata["layout"]``, a list of {"class": name, "box": [x1, y1, x2, y2]}, or what is wrong."""
    entries: Any = metadata.get("layout")
    if not isinstance(entries, list | tuple) or not entries:
        return "the metadata has no 'layout'"
    planned: list[Planned] = []
    for entry in entries:
        match entry:
            case {
                "class": str(label),
                "box": [int() | float() as x1, int() | float() as y1, int() | float() as x2, int() | float() as y2],
            }:
                box = (float(x1), float(y1), float(x2), float(y2))
            case _:
                return f"layout entry {entry!r} needs a 'class' and a 'box' of four numbers"
        if label not in classes:
            return f"layout class {label!r} is not one that the detector knows"
        if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            return f"layout box {list(box)} is not [x1, y1, x2, y2] in fractions of the image with x1 < x2 and y1 < y2"
        planned.append(Planned(label, box))
    return planned


def in_fractions(found: Sequence[Detection], height: int, width: int, threshold: float) -> list[Planned]:
    """Detections of a score above the threshold, in the coordinates of a layout."""
    return [
        Planned(d.label, (d.box[0] / width, d.box[1] / height, d.box[2] / width, d.box[3] / height))
        for d in found
        if d.score > threshold
    ]


class LayoutReward:
    """How well detected boxes meet the layout of the metadata, in [0, 1] (see ``Match.value``).

    ``parts``: "layout-mean-iou" over the planned objects, "layout-found" (share of them with an IoU of 0.5 or more),
    "layout-extra" (number of superfluous detections). Images without a readable layout are missing.

    Args:
        detector: see ``detectors.load_detector`` ("shapes" in the tiny world).
        device: where it computes.
        threshold: detections count if their score is greater.
        count_extra: whether superfluous objects of the planned classes lower the value.
        self_check: see ``detectors.load_detector``.

    Raises:
        ValueError: the detector cannot be loaded.
        RewardError: the detector failed its self-check.
    """

    def __init__(
        self,
        detector: str | Detector | None = None,
        *,
        device: str | torch.device = "cpu",
        threshold: float = 0.3,
        count_extra: bool = True,
        self_check: bool = True,
    ) -> None:
        self.detector = load_detector(detector, device, self_check)
        self.threshold, self.count_extra = threshold, count_extra
        self.spec = RewardSpec(
            name="layout-iou",
            version=f"1, {getattr(self.detector, 'version', type(self.detector).__name__)}, threshold {threshold:g}, "
            f"extra {'counted' if count_extra else 'ignored'}",
            range=(0.0, 1.0),
            licence="see the detector's",
            preprocessing=f"8-bit; detector: {getattr(self.detector, 'preprocessing', 'its own')}",
        )

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; prompts are not read."""
        rows: list[tuple[float, float, float, float]] = []
        reasons: list[str | None] = []
        height, width = int(images.shape[-2]), int(images.shape[-1])
        for image, given in zip(images, metadata, strict=True):
            planned = parse_layout(given, self.detector.classes)
            if isinstance(planned, str):
                rows.append((math.nan,) * 4)
                reasons.append(planned)
                continue
            found = in_fractions(self.detector.detect(image[None])[0], height, width, self.threshold)
            met = assign(planned, found)
            hits = sum(v >= 0.5 for v in met.ious) / len(planned)
            rows.append((met.value(self.count_extra), met.value(False), hits, float(met.extra)))
            reasons.append(None)
        values, *rest = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4).unbind(1)
        names = ("layout-mean-iou", "layout-found", "layout-extra")
        return RewardResult(values, dict(zip(names, rest, strict=True)), reasons)
