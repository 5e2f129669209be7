"""GenEval's three scores on Shapes images: one pass of the detector gives all of them."""

from __future__ import annotations

import functools

from torch import Tensor

from ..geneval import Judgement, Options, check_metadata, judge, result_of
from ..protocol import Metadata, RewardResult, RewardSpec
from . import grammar
from .detector import PaletteColours, ShapesDetector

KINDS = {
    "shapes": (0.0, 1.0),
    "shapes-strict": (0.0, 1.0),
    "shapes-soft": (1.0 - Options().max_objects, 1.0),  # one object asked for, sixteen found
}


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
        if kind not in KINDS:
            raise ValueError(f"got Shapes reward {kind!r}, expected one of {', '.join(KINDS)}. Use one of these.")
        self.kind = kind
        self.options = Options(flow_grpo_compat=flow_grpo_compat)
        self.detector = ShapesDetector()
        self.colours = PaletteColours()
        self.spec = RewardSpec(
            name=kind,
            version="1-compat" if flow_grpo_compat else "1",
            range=KINDS[kind],
            licence="Apache-2.0",
            preprocessing="8-bit, 64x64 px",
        )

    def judge(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> list[Judgement | str]:
        """What was found in each of N images, or why it cannot be judged."""
        answers: list[Judgement | str] = []
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
        return result_of(self.judge(images, prompts, metadata), tuple(KINDS), self.kind)
