"""T2I-CompBench's categories scored by its published rules, with a detector and an answerer of one's choice.

The rules are in `reward_models.compbench`. Upstream the parts are BLIP-VQA, UniDet, DPT and CLIP ViT-B/32; other
detectors give other numbers, and the spec names what was used. What is not given leaves its categories missing.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.suites.compbench import CATEGORIES
from reward_models import compbench as rules
from reward_models.checklist import load_answerer
from reward_models.detectors import load_detector
from reward_models.geneval import Detection
from reward_models.protocol import Metadata, Reward, RewardResult, RewardSpec

ATTRIBUTES = ("color", "shape", "texture")
Score = float | str  # or why there is none


class CompBench:
    """The score of each image by the rule of its category (`tag` of the metadata), in [0, 1].

    Args:
        answerer: "blip" or what `load_answerer` takes: for attributes and complex prompts. None: not scored.
        detector: "mask2former" or what `load_detector` takes: for positions and numbers.
        depth: "module:function" from an image (3, H, W) to its depth map (H, W): for 3D positions.
        clip: name of the reward for non-spatial prompts.
        chunks: "spacy" (en_core_web_sm) or "module:function" from a prompt to its noun chunks; None: those of the
            metadata, under `chunks`.
        vocabulary: file of names, "singular - plural" in each line (the benchmark's `new_objects.txt`).
        compat: "t2i_compbench" for the published defects, see `reward_models.compbench`.
        device: where the parts compute.

    Raises:
        ValueError: a part cannot be loaded.
    """

    def __init__(
        self, answerer: str | None = None, detector: str | None = None, depth: str | None = None,
        clip: str | None = "clip-cosine", chunks: str | None = None, vocabulary: str | None = None,
        compat: rules.Compat | None = None, device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        import reward_models

        self.compat = compat
        self.answerer = None if answerer is None else load_answerer(None if answerer == "blip" else answerer, device)
        self.detector = (
            None if detector is None else load_detector(None if detector == "mask2former" else detector, device)
        )
        self.depth: Callable[[Tensor], Any] | None = None if depth is None else _function(depth)
        self.clip: Reward | None = None if clip is None else reward_models.load(clip, device)
        self.chunks: Callable[[str], Sequence[str]] | None = (
            None if chunks is None else _spacy() if chunks == "spacy" else _function(chunks)
        )
        names = [] if vocabulary is None else rules.read_vocabulary(Path(vocabulary).read_text(encoding="utf-8"))
        self.vocabulary = names
        parts = {"answerer": self.answerer, "detector": self.detector, "depth": depth, "chunks": chunks}
        versions = [f"{name} {getattr(part, 'version', part)}" for name, part in parts.items() if part is not None]
        if self.clip is not None:
            versions.append(f"clip {self.clip.spec.version}")
        self.spec = RewardSpec(
            name="t2i-compbench",
            version=f"1, {', '.join(versions)}, {len(names)} names{', ' + compat if compat else ''}",
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
        if category not in CATEGORIES:
            return f"{category!r} is no category of T2I-CompBench"
        if self.detector is None:
            return "no detector was given"
        found: list[Detection] = self.detector.detect(image[None])[0]
        if category == "numeracy":
            value = rules.numeracy(found, rules.parse_numeracy(prompt, self.vocabulary, self.compat), self.compat)
            return "no numbers and names of the vocabulary in the prompt" if value is None else value
        return self.positions(image, prompt, found, depth=category == "3d_spatial")

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

    def positions(self, image: Tensor, prompt: str, found: Sequence[Detection], *, depth: bool = False) -> Score:
        """Two objects and how they lie to each other, in the plane or in depth."""
        relations = rules.RELATIONS_3D if depth else rules.RELATIONS_2D
        target = rules.parse_spatial(prompt, self.vocabulary, relations, compat=self.compat)
        if target is None:
            return "no relation between two names of the vocabulary in the prompt"
        if not depth:
            return rules.spatial_2d(found, target, compat=self.compat)
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
            found = None if self.detector is None else self.detector.detect(image[None])[0]
            scores["spatial"] = "no detector was given" if found is None else self.positions(image, prompt, found)
        if faults := [f"{name}: {value}" for name, value in scores.items() if isinstance(value, str)]:
            return "; ".join(faults)
        return rules.three_in_one(kind, {name: float(value) for name, value in scores.items()})


def _function(where: str) -> Callable[..., Any]:
    module, _, name = where.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"got {where!r}, expected module:function ({error}). Correct the name.") from error
    return found


def _spacy() -> Callable[[str], Sequence[str]]:
    try:
        import spacy

        model = spacy.load("en_core_web_sm")
    except (ImportError, OSError) as error:
        raise ValueError(
            "noun chunks by spaCy need the package and its model: pip install spacy, python -m spacy download "
            f"en_core_web_sm ({error})"
        ) from error
    return lambda prompt: [chunk.text for chunk in model(prompt).noun_chunks]
