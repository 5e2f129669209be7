"""Detectors of the 80 COCO classes: the class list, Mask2Former from transformers, a self-check, and plug-ins by name.

Source: GenEval (arXiv 2310.11513), whose detector is Mask2Former Swin-S of mmdet 2.x. Its post-processing is followed
here; the weights that transformers can load (``facebook/mask2former-swin-small-coco-instance``) are another training
run, so their scores are not official ones. Further differences: images are resized in floating point and put back on
the 8-bit grid (OpenCV rounds in fixed point), and entries that cannot reach ``floor`` are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate, pad

from . import weights
from .geneval import Box, Detection, Detector, iou
from .plug_ins import plug_in
from .protocol import RewardError
from .torchvision_ops import ready

# in the detector's order and GenEval's spelling
COCO_CLASSES = tuple(
    name.strip()
    for name in """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
    stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack,
    umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove,
    skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich,
    orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv,
    laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator,
    book, clock, vase, scissors, teddy bear, hair drier, toothbrush""".split(",")
)
MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
SIGN = "stop sign"  # of the self-check
MULTIPLE = 32  # sides are padded to multiples of this


def fitted_size(height: int, width: int, long: int = 1333, short: int = 800) -> tuple[int, int]:
    """Height and width of an image resized, keeping its ratio, to the largest that fits into (long, short)."""
    scale = min(long / max(height, width), short / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def mask_box(mask: np.ndarray) -> Box:
    """The tight box of a mask (H, W), its upper edges + 1 as in mmdet; all zeros for an empty mask."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(ys):
        return 0.0, 0.0, 0.0, 0.0
    return float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    padded: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
    classes: Sequence[str],
    top: int = 100,
    floor: float = 0.0,
) -> list[Detection]:
    """Instances of one image from the outputs of Mask2Former, best first.

    Of all (query, class) entries the ``top`` most probable are taken, so that one query may appear with several
    classes; score = class probability x mean sigmoid within the mask; mask = logit > 0 at the original size.

    Args:
        class_logits: (Q, C + 1), the last column being "no object".
        mask_logits: (Q, h, w).
        padded: height and width of the model's input.
        resized: of the image within it, at the upper left.
        original: of the image before it was resized.
        classes: names of the first classes; others ("stuff") are dropped.
        top: number of entries.
        floor: entries of a smaller class probability are left out; lossless for any score threshold >= floor.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    columns = probabilities.shape[1]
    best, entries = probabilities.flatten().topk(min(top, probabilities.numel()))
    found: list[Detection] = []
    masks: dict[int, tuple[np.ndarray, float, Box]] = {}  # of a query: mask, its score, its box
    for probability, entry in zip(best.tolist(), entries.tolist(), strict=True):
        query, label = divmod(entry, columns)
        if probability < floor or label >= len(classes):
            continue
        if query not in masks:
            logits = interpolate(mask_logits[query][None, None].float(), padded, mode="bilinear", align_corners=False)
            logits = logits[..., : resized[0], : resized[1]]
            logits = interpolate(logits, original, mode="bilinear", align_corners=False)[0, 0]
            inside = logits > 0
            score = (logits.sigmoid() * inside).sum() / (inside.sum() + 1e-6)
            mask = inside.cpu().numpy()
            masks[query] = mask, float(score), mask_box(mask)
        mask, quality, box = masks[query]
        found.append(Detection(classes[label], box, probability * quality, mask))
    return sorted(found, key=lambda d: -d.score)


class Mask2FormerDetector:
    """Mask2Former from transformers with the post-processing of GenEval's detector; one image per forward.

    Args:
        path: hub id or folder of a ``Mask2FormerForUniversalSegmentation``.
        device: where to compute.
        classes: names of the model's first classes.
        long, short: the image is resized to fit into these, larger or smaller.
        floor: detections of a smaller class probability are not given.

    Raises:
        ValueError: no such model, or one with fewer classes.
    """

    def __init__(
        self,
        path: str | Path = MASK2FORMER,
        *,
        device: str | torch.device = "cpu",
        classes: Sequence[str] = COCO_CLASSES,
        long: int = 1333,
        short: int = 800,
        floor: float = 0.1,
    ) -> None:
        folder = weights.locate_folder(path, ("config.json", "*.safetensors"))
        ready()
        from transformers import Mask2FormerForUniversalSegmentation  # heavy

        model: Any
        model, digest = weights.pretrained(Mask2FormerForUniversalSegmentation, folder)
        self.version = f"mask2former {digest[:12]}"
        if model.config.num_labels < len(classes):
            raise ValueError(
                f"got a Mask2Former of {model.config.num_labels} classes, expected at least {len(classes)}. "
                "Give the names of its classes."
            )
        self.model: Any = model.to(device)
        self.device, self.classes = torch.device(device), tuple(classes)
        self.long, self.short, self.floor = long, short, floor
        self.preprocessing = f"bilinear (no antialias) to fit {long} x {short} px on the 8-bit grid, float32"
        self.mean, self.std = (torch.tensor(x, device=self.device).view(1, 3, 1, 1) / 255 for x in (MEAN, STD))

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[list[Detection]]:
        """See ``Detector.detect``."""
        return [self._detect(image.to(self.device).float()[None]) for image in images]

    def _detect(self, image: Tensor) -> list[Detection]:
        height, width = int(image.shape[-2]), int(image.shape[-1])
        resized = fitted_size(height, width, self.long, self.short)
        pixels = interpolate(image, resized, mode="bilinear", align_corners=False, antialias=False)
        pixels = ((pixels * 255).round() / 255 - self.mean) / self.std
        padding = (0, -resized[1] % MULTIPLE, 0, -resized[0] % MULTIPLE)
        pixels = pad(pixels, padding)  # zeros after the normalisation
        out = self.model(pixel_values=pixels)
        return instances(
            out.class_queries_logits[0],
            out.masks_queries_logits[0],
            (int(pixels.shape[-2]), int(pixels.shape[-1])),
            resized,
            (height, width),
            self.classes,
            floor=self.floor,
        )


def self_check_image(size: int = 512) -> tuple[Tensor, Detection]:
    """A drawn stop sign, (3, size, size) in [0, 1], and what a detector of COCO classes should find in it."""
    u = size / 512
    picture = Image.new("RGB", (size, size), (150, 190, 230))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 380 * u, size, size), fill=(95, 140, 80))
    draw.rectangle((246 * u, 280 * u, 266 * u, 470 * u), fill=(120, 120, 120))
    centre = (256 * u, 190 * u)
    draw.regular_polygon((*centre, 130 * u), 8, rotation=22.5, fill=(255, 255, 255))
    draw.regular_polygon((*centre, 120 * u), 8, rotation=22.5, fill=(200, 20, 30))
    draw.text(centre, "STOP", fill=(255, 255, 255), anchor="mm", font_size=78 * u, stroke_width=round(2 * u))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    reach = 130 * u * float(np.cos(np.pi / 8))
    box = (centre[0] - reach, centre[1] - reach, centre[0] + reach, centre[1] + reach)
    return pixels, Detection(SIGN, box, 1.0)


def self_check(detector: Detector, threshold: float = 0.3, size: int = 512) -> float:
    """Let a detector find the drawn stop sign; returns the IoU of its box with the true one.

    A detector that finds nothing here gives every prompt a score near 0: wrong weights, or compiled operators that
    were built for another device, look like that.

    Raises:
        RewardError: no stop sign of a score above ``threshold`` that covers the drawn one by at least half.
    """
    image, expected = self_check_image(size)
    found = detector.detect(image[None])[0]
    overlap = max(
        (iou(d.box, expected.box) for d in found if d.label == expected.label and d.score > threshold), default=0.0
    )
    if overlap < 0.5:
        best = sorted(found, key=lambda d: -d.score)[:3]
        raise RewardError(
            f"the detector failed its self-check: expected a {expected.label!r} above {threshold} at {expected.box}, "
            f"found {[(d.label, round(d.score, 2), d.box) for d in best]}. Check its weights and device; if it is "
            "right all the same, `self_check: false` leaves this check out."
        )
    return overlap


def load_detector(
    spec: str | Detector | None = None, device: str | torch.device = "cpu", self_check: bool = True
) -> Detector:
    """A detector by name.

    Args:
        spec: None for Mask2Former of the published name; "shapes" for the rule-based one of the Shapes world;
            "module:attribute" for a plug-in, an object or a class without arguments; any other text is a hub id or
            folder of a Mask2Former; a Detector is returned as it is.
        device: where Mask2Former computes.
        self_check: let a detector that is loaded by name, and knows stop signs, find a drawn one first.

    Raises:
        ValueError: the name leads nowhere.
        RewardError: the detector failed its self-check.
    """
    return _named(spec, str(device), self_check) if spec is None or isinstance(spec, str) else spec


@lru_cache(maxsize=4)  # rewards of a run share it, and check it once
def _named(spec: str | None, device: str, check: bool) -> Detector:
    expected = "'shapes', a Mask2Former or 'module:attribute' with `classes` and `detect(images)`"
    found: Detector
    if spec == "shapes":
        from .shapes.detector import ShapesDetector

        found = ShapesDetector()
    elif spec is None or ":" not in spec:
        found = Mask2FormerDetector(spec or MASK2FORMER, device=device)
    else:
        found = plug_in(spec, "detector", expected)
        if not (hasattr(found, "classes") and hasattr(found, "detect")):
            raise ValueError(f"got detector {spec!r}, a {type(found).__name__}, expected {expected}. Correct the name.")
    if check and SIGN in found.classes:
        self_check(found)
    return found
