"""GenEval on real images without mmdet: Mask2Former from transformers, colours by CLIP, the benchmark's own decision.

Source: GenEval (arXiv 2310.11513, github.com/djghosh13/geneval). The name ends in ``-hf`` because the detector's
weights are another training run than the official ones (see ``detectors``), so the numbers are not official GenEval
numbers; those come from the official detections, see ``geneval_stored``.

Colours need the QuickGELU that OpenAI's CLIP weights were trained with. A ``CLIPModel`` of transformers carries its
activation in its configuration, and any other one is refused here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from .detectors import load_detector
from .geneval import (
    ColourClassifier,
    ColoursOf,
    Detection,
    Detector,
    Judgement,
    Options,
    check_metadata,
    judge,
    range_of,
    result_of,
)
from .plug_ins import plug_in
from .preprocess import normalise
from .protocol import Metadata, RewardResult, RewardSpec, pixels_of
from .two_towers import from_folder

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {colour} {label}", "a photo of a {colour}-colored {label}", "a photo of a {colour} object")
CLIP = "openai/clip-vit-large-patch14"
KINDS = ("geneval-hf", "geneval-hf-strict", "geneval-hf-soft")


def cut_out(image: Image.Image, found: Detection, background: str | None = "#999", crop: bool = True) -> Image.Image:
    """The picture of one object that is shown to CLIP.

    Args:
        image: RGB.
        found: the object; without a mask all pixels are kept.
        background: colour of the pixels outside the mask; None leaves them.
        crop: cut to the box, whose corners are rounded to pixels.
    """
    if background is not None and found.mask is not None:
        canvas = Image.new("RGB", image.size, background)
        image = Image.composite(image, canvas, Image.fromarray(found.mask.astype(np.uint8) * 255))
    if not crop:
        return image
    left, top, right, bottom = (round(corner) for corner in found.box)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def resized_crop(picture: Image.Image, size: int) -> Tensor:
    """As open_clip shows a picture to CLIP: shortest side to ``size`` (Pillow's bicubic), centre crop.

    A long thin object loses its ends. Returns (3, size, size) in [0, 1].
    """
    width, height = picture.size
    width, height = size * width // min(picture.size), size * height // min(picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


class ClipColours:
    """Names the colour of objects by the CLIP similarity of their cut-outs with three sentences for each colour.

    Args:
        path: hub id or folder of a ``CLIPModel`` with QuickGELU.
        device: where to compute.
        colours: the colours to choose from.
        background, crop: see ``cut_out``.
        chunk: cut-outs per forward.

    Raises:
        ValueError: no such model, or one with another activation.
    """

    def __init__(
        self,
        path: str | Path = CLIP,
        *,
        device: str | torch.device = "cpu",
        colours: Sequence[str] = COLOURS,
        background: str | None = "#999",
        crop: bool = True,
        chunk: int = 16,
    ) -> None:
        self.towers = from_folder(path, device=device)
        config: Any = self.towers.model.config
        used = {str(part.hidden_act) for part in (config.vision_config, config.text_config)}
        if used != {"quick_gelu"}:
            raise ValueError(
                f"got colour classifier {str(path)!r} with activation {', '.join(sorted(used))}, expected quick_gelu: "
                "with another one OpenAI's weights see wrong colours. Correct hidden_act in its config.json."
            )
        self.colours, self.version = tuple(colours), self.towers.digest[:12]
        self.background, self.crop, self.chunk = background, crop, chunk
        self._classes: dict[str, Tensor] = {}

    @torch.no_grad()
    def class_features(self, label: str) -> Tensor:
        """(colours, D): for each colour the normalised mean of the normalised features of its three sentences."""
        if label not in self._classes:
            sentences = [t.format(colour=c, label=label) for c in self.colours for t in TEMPLATES]
            features = normalize(self.towers.encode_text(sentences), dim=1)
            self._classes[label] = normalize(features.view(len(self.colours), len(TEMPLATES), -1).mean(1), dim=1)
        return self._classes[label]

    @torch.no_grad()
    def classify(self, image: Tensor, objects: Sequence[Detection]) -> list[str]:
        """See ``ColourClassifier.classify``."""
        if not objects:
            return []
        whole = Image.fromarray(pixels_of(image))
        fit = self.towers.preprocessing
        cuts = [resized_crop(cut_out(whole, found, self.background, self.crop), fit.size) for found in objects]
        features: list[Tensor] = []
        for part in torch.stack(cuts).split(self.chunk):
            pixels = normalise(part.to(self.towers.device), fit.mean, fit.std)
            features += normalize(self.towers.encode_image(pixels), dim=1)
        best = [int((self.class_features(o.label) @ f).argmax()) for o, f in zip(objects, features, strict=True)]
        return [self.colours[i] for i in best]


def load_colours(spec: str | ColourClassifier = CLIP, device: str | torch.device = "cpu") -> ColourClassifier:
    """A colour classifier by name: "module:attribute" for a plug-in (an object, or a class without arguments), any
    other text is a hub id or folder of a CLIPModel with QuickGELU; a ColourClassifier is returned as it is.

    Raises:
        ValueError: the name leads nowhere.
    """
    if not isinstance(spec, str):
        return spec
    if ":" in spec:
        return plug_in(spec, "colour classifier", "'module:attribute' with `colours` and `classify(image, objects)`")
    return ClipColours(spec, device=device)


def remembering(colours_of: ColoursOf, memory: dict[Detection, str]) -> ColoursOf:
    """The same colour classifier, asked about each object once; what it said is kept in ``memory``."""

    def ask(objects: Sequence[Detection]) -> list[str]:
        new = [found for found in dict.fromkeys(objects) if found not in memory]
        memory.update(zip(new, colours_of(new) if new else (), strict=True))
        return [memory[found] for found in objects]

    return ask


class GenevalReward:
    """The official decision, the strict or the soft score of GenEval on real images.

    ``parts`` hold all three whichever is the value; ``reasons`` say what the official decision found wrong. An image is
    missing without GenEval metadata ("tag", "include", perhaps "exclude") of the detector's classes and the colours.

    Args:
        kind: "geneval-hf" (official decision, 0 or 1), "geneval-hf-strict" (0 or 1) or "geneval-hf-soft" (at most 1).
        detector: see ``detectors.load_detector``.
        colours: see ``load_colours``.
        device: where both compute.
        flow_grpo_compat: the soft score as published, with its fault (see ``geneval.Options``).
        options: thresholds of ``geneval.Options``.
        self_check: see ``detectors.load_detector``.

    Raises:
        ValueError: unknown kind or threshold, or a model that cannot be loaded.
        RewardError: the detector failed its self-check.
    """

    def __init__(
        self,
        kind: str = "geneval-hf",
        detector: str | Detector | None = None,
        colours: str | ColourClassifier = CLIP,
        *,
        device: str | torch.device = "cpu",
        flow_grpo_compat: bool = False,
        options: dict[str, float] | None = None,
        self_check: bool = True,
    ) -> None:
        self.kind = kind
        try:
            self.options = Options(flow_grpo_compat=flow_grpo_compat, **(options or {}))  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(f"got options {options}, expected fields of geneval.Options ({error}).") from error
        ends = range_of(kind, KINDS, self.options)
        self.detector = load_detector(detector, device, self_check)
        self.colours = load_colours(colours, device)
        versions = [getattr(part, "version", type(part).__name__) for part in (self.detector, self.colours)]
        self.spec = RewardSpec(
            name=kind,
            version=f"1, {' + '.join(versions)}, {self.options}",
            range=ends,
            licence="see the model cards of the detector and CLIP",
            preprocessing=f"8-bit; detector: {getattr(self.detector, 'preprocessing', 'its own')}; colours: Pillow "
            "bicubic and centre crop to CLIP's size",
        )

    def judge(self, images: Tensor, metadata: Sequence[Metadata]) -> list[tuple[Judgement | str, dict[Detection, str]]]:
        """For each of N images what was found, or why it cannot be judged, and the colours that were looked at."""
        answers: list[tuple[Judgement | str, dict[Detection, str]]] = []
        for image, wanted in zip(images, metadata, strict=True):
            seen: dict[Detection, str] = {}
            answer: Judgement | str | None = check_metadata(wanted, self.detector.classes, self.colours.colours)
            if answer is None:
                colours_of = remembering(partial(self.colours.classify, image), seen)
                answer = judge(self.detector.detect(image[None])[0], wanted, colours_of, self.options)
            answers.append((answer, seen))
        return answers

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``."""
        return result_of([answer for answer, _ in self.judge(images, metadata)], KINDS, self.kind)
