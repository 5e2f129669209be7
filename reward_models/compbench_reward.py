"""T2I-CompBench's categories scored by its published rules, with a detector and an answerer of one's choice.

The rules are in ``compbench``. Upstream the parts are BLIP-VQA, UniDet, DPT and CLIP ViT-B/32; other detectors give
other numbers, and the spec names what was used. What is not given leaves its categories missing, and so does an object
that the detector has no class for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import compbench as rules
from .checklist import Answerer, load_answerer
from .detectors import load_detector
from .geneval import Detection, Detector
from .loading import load
from .plug_ins import plug_in
from .protocol import Metadata, Reward, RewardResult, RewardSpec

ATTRIBUTES = ("color", "shape", "texture")
FUNCTION = "'module:function'"
Score = float | str  # or why there is none


class CompBench:
    """The score of each image by the rule of its category (``tag`` of the metadata), in [0, 1] (cosines: [-1, 1]).

    Args:
        answerer: "blip" or what ``load_answerer`` takes: for attributes and complex prompts. None: not scored.
        detector: "mask2former" or what ``load_detector`` takes: for positions and numbers. None: not scored.
        depth: "module:function" from an image (3, H, W) to its depth map (H, W): for 3D positions.
        clip: name of the reward for non-spatial prompts. None: not scored.
        chunks: "spacy" (en_core_web_sm) or "module:function" from a prompt to its noun chunks; None: those of the
            metadata, under ``chunks``.
        vocabulary: file of names, "singular - plural" in each line (the benchmark's ``new_objects.txt``), for positions
            and numbers.
        threshold: detections count if their score is greater.
        compat: "t2i_compbench" for the published defects, see ``compbench``.
        device: where the parts compute.
        self_check: see ``detectors.load_detector``.

    Raises:
        ValueError: a part cannot be loaded.
        RewardError: the detector failed its self-check.
    """

    def __init__(
        self,
        answerer: str | Answerer | None = None,
        detector: str | Detector | None = None,
        depth: str | None = None,
        clip: str | None = "clip-cosine",
        chunks: str | None = None,
        vocabulary: str | Path | None = None,
        threshold: float = 0.5,
        compat: rules.Compat | None = None,
        *,
        device: str | torch.device = "cpu",
        self_check: bool = True,
    ) -> None:
        if compat not in (None, "t2i_compbench"):
            raise ValueError(f"got compat {compat!r}, expected 't2i_compbench' or none. Use one of these.")
        self.compat, self.threshold = compat, threshold
        self.answerer = None if answerer is None else load_answerer(None if answerer == "blip" else answerer, device)
        self.detector = (
            None
            if detector is None
            else load_detector(None if detector == "mask2former" else detector, device, self_check)
        )
        self.depth: Callable[[Tensor], Any] | None = None if depth is None else plug_in(depth, "depth model", FUNCTION)
        self.clip: Reward | None = None if clip is None else load(clip, device)
        self.chunks = _splitter(chunks)
        self.vocabulary = _names(vocabulary)
        parts = {"answerer": self.answerer, "detector": self.detector, "depth": depth, "chunks": chunks}
        versions = [f"{name} {_version(part)}" for name, part in parts.items() if part is not None]
        if self.clip is not None:
            versions.append(f"clip {self.clip.spec.version}")
        versions.append(f"{len(self.vocabulary)} names, above {threshold:g}{f', {compat}' if compat else ''}")
        self.spec = RewardSpec(
            name="t2i-compbench",
            version=f"1, {', '.join(versions)}",
            range=(-1.0, 1.0),
            licence="see the parts'",
            preprocessing="8-bit; the parts' own",
        )

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``."""
        scores = [self._one(*each) for each in zip(images, prompts, metadata, strict=True)]
        values = [math.nan if isinstance(found, str) else found for found in scores]
        return RewardResult(torch.tensor(values), reasons=[s if isinstance(s, str) else None for s in scores])

    def _one(self, image: Tensor, prompt: str, given: Metadata) -> Score:
        category = given.get("tag")
        if category in ATTRIBUTES:
            return self.attributes(image, prompt, given)
        if category == "non_spatial":
            return self.similarity(image, prompt)
        if category == "complex":
            return self.complex(image, prompt, given)
        if category == "numeracy":
            return self.numbers(image, prompt)
        if category not in rules.CATEGORIES:
            return f"{category!r} is no category of T2I-CompBench"
        return self.positions(image, prompt, depth=category == "3d_spatial")

    def attributes(self, image: Tensor, prompt: str, given: Metadata) -> Score:
        """Product of the probabilities of yes to one question for each noun chunk."""
        if self.answerer is None:
            return "no answerer was given"
        chunks = given.get("chunks") if self.chunks is None else self.chunks(prompt)
        if chunks is None:
            return "nothing splits the prompt into noun chunks; expected chunks in the metadata, or the option chunks"
        questions = rules.chunk_questions(chunks)
        sure = self.answerer(image[None].expand(len(questions), -1, -1, -1), questions) if questions else ()
        value = rules.blip_vqa([float(p) for p in sure], self.compat)
        return "the prompt has no noun chunk" if value is None else value

    def similarity(self, image: Tensor, prompt: str) -> Score:
        """Cosine of image and prompt."""
        if self.clip is None:
            return "no CLIP model was given"
        return float(self.clip.score(image[None], [prompt], [{}]).values[0])

    def numbers(self, image: Tensor, prompt: str) -> Score:
        """Names and how many there are of each."""
        wanted = rules.parse_numeracy(prompt, self.vocabulary, self.compat)
        found = self._find(image, [name for name, _ in wanted])
        value = found if isinstance(found, str) else rules.numeracy(found, wanted, self.compat)
        return "no numbers and names of the vocabulary in the prompt" if value is None else value

    def positions(self, image: Tensor, prompt: str, *, depth: bool = False) -> Score:
        """Two objects and how they lie to each other, in the plane or in depth."""
        relations = rules.RELATIONS_3D if depth else rules.RELATIONS_2D
        target = rules.parse_spatial(prompt, self.vocabulary, relations, compat=self.compat)
        found = self._find(image, [] if target is None else [target.first, target.second])
        if isinstance(found, str):
            return found
        if target is None:
            return "no relation between two names of the vocabulary in the prompt"
        if not depth:
            near = rules.near_in(int(image.shape[-2]), int(image.shape[-1]))
            return rules.spatial_2d(found, target, near, self.compat)
        if self.depth is None:
            return "no depth model was given"
        return rules.spatial_3d(found, target, np.asarray(self.depth(image)), self.compat)

    def complex(self, image: Tensor, prompt: str, given: Mapping[str, Any]) -> Score:
        """Mean of the measures that fit the prompt."""
        kind = given.get("complex_kind", "both")
        scores: dict[str, Score] = {"blip_vqa": self.attributes(image, prompt, given)}
        if kind != "spatial":
            scores["clip"] = self.similarity(image, prompt)
        if kind != "action":
            scores["spatial"] = self.positions(image, prompt)
        if faults := [f"{name}: {value}" for name, value in scores.items() if isinstance(value, str)]:
            return "; ".join(faults)
        return rules.three_in_one(kind, {name: float(value) for name, value in scores.items()})

    def _find(self, image: Tensor, names: Iterable[str]) -> list[Detection] | str:
        """Sure detections of one image, or why there are none for these names."""
        if self.detector is None:
            return "no detector was given"
        if unknown := [name for name in names if not rules.knows(self.detector.classes, name, self.compat)]:
            return f"the detector has no class for {', '.join(map(repr, unknown))}"
        return [found for found in self.detector.detect(image[None])[0] if found.score > self.threshold]


def _version(part: object) -> str:
    return part if isinstance(part, str) else str(getattr(part, "version", type(part).__name__))


def _names(file: str | Path | None) -> list[tuple[str, str]]:
    if file is None:
        return []
    try:
        names = rules.read_vocabulary(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"got vocabulary {str(file)!r}, which cannot be read ({error}). Correct the path.") from error
    if not names:
        raise ValueError(f"got vocabulary {str(file)!r} without names, expected lines 'singular - plural'.")
    return names


def _splitter(spec: str | None) -> Callable[[str], Sequence[str]] | None:
    if spec != "spacy":
        return None if spec is None else plug_in(spec, "splitter into noun chunks", FUNCTION)
    try:
        import spacy

        model = spacy.load("en_core_web_sm")
    except (ImportError, OSError) as error:
        raise ValueError(
            "noun chunks by spaCy need the package and its model: pip install spacy, python -m spacy download "
            f"en_core_web_sm ({error})"
        ) from error
    return lambda prompt: [chunk.text for chunk in model(prompt).noun_chunks]
