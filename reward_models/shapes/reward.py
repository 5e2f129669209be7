"""GenEval's three scores on Shapes images: one pass of the detector gives all of them."""

from __future__ import annotations

import functools

from torch import Tensor

from ..geneval import Judgement, Options, check_metadata, judge, range_of, result_of
from ..protocol import Metadata, RewardResult, RewardSpec
from . import grammar
from .detector import PaletteColours, ShapesDetector, fitted

KINDS = ("shapes", "shapes-strict", "shapes-soft")


class ShapesReward:
    """The official decision, the strict or the soft score of GenEval with the rule-based Shapes detector.

    The result's ``parts`` hold all three whichever is the value, and ``reasons`` say what the official decision found
    wrong. Prompts need GenEval metadata; where there is none, a prompt in the Shapes grammar is parsed. An image is
    missing if neither helps, or if the metadata asks for something that is not in the Shapes world.

    Args:
        kind: "shapes", "shapes-strict" or "shapes-soft".
        flow_grpo_compat: the soft score as published, with its fault (see ``geneval.Options``).

    Raises:
        ValueError: unknown kind.
    """

    def __init__(self, kind: str = "shapes", flow_grpo_compat: bool = False) -> None:
        self.kind = kind
        self.options = Options(flow_grpo_compat=flow_grpo_compat)
        self.detector = ShapesDetector()
        self.colours = PaletteColours()
        self.spec = RewardSpec(
            name=kind,
            version="1-compat" if flow_grpo_compat else "1",
            range=range_of(kind, KINDS, self.options),
            licence="Apache-2.0",
            preprocessing=f"8-bit; {self.detector.preprocessing}",
        )

    def judge(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> list[Judgement | str]:
        """What was found in each of N images, or why it cannot be judged; boxes are in pixels of the fitted images."""
        answers: list[Judgement | str] = []
        images = fitted(images)
        detections = self.detector.detect(images)
        for image, prompt, given, found in zip(images, prompts, metadata, detections, strict=True):
            wanted = given if "include" in given else grammar.parse(prompt)
            if wanted is None:
                answers.append(f"no GenEval metadata, and the prompt {prompt!r} is not in the Shapes grammar")
            elif fault := check_metadata(wanted, self.detector.classes, self.colours.colours):
                answers.append(fault)
            else:
                colours_of = functools.partial(self.colours.classify, image)
                answers.append(judge(found, wanted, colours_of, self.options))
        return answers

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``."""
        return result_of(self.judge(images, prompts, metadata), KINDS, self.kind)
