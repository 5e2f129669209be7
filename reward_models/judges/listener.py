"""A second judge that checks the first: its agreement is the weight of a verdict.

After listener-augmented GRPO (arXiv 2506.22832), where a frozen second model reads the reasoner's chain without its
verdict and its confidence enters the reward. Here it acts on verdicts at reward time: a verdict p on which the listener
puts the preference q counts ``1 - |p - q|``: fully if they agree, half if one is undecided, not at all if they differ.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ..protocol import Metadata, RewardSpec, preflight
from . import grammars
from .endpoint import ChatEndpoint, Question, ask_parsed, pictures
from .grammars import tagged
from .pairwise import Comparison, Images, PairJudge, Pairs
from .wording import Wording

VERDICT = re.compile(r"image\s*[12]\W+is\s+better|equally\s+good|\b(cat_)?winner\b", re.IGNORECASE)


class Listener(Protocol):
    """Someone who hears a judge's reasons."""

    @property
    def spec(self) -> RewardSpec: ...

    def hear(
        self, images: Images, pairs: Pairs, prompts: Sequence[str], metadata: Sequence[Metadata], texts: Sequence[str]
    ) -> Comparison:
        """As ``PairJudge.compare``, with what the judge wrote on each pair; preferences may lie between 0 and 1."""
        ...


class EndpointListener:
    """A vision-language model that sees both images and the judge's reasons, without the verdict.

    Args:
        endpoint: where it is asked.
        wording: with the places ``{prompt}`` and ``{reasons}``.
    """

    def __init__(self, endpoint: ChatEndpoint, wording: Wording) -> None:
        self.endpoint, self.wording = endpoint, wording
        self.spec = RewardSpec(
            name="listener", version=f"{endpoint.fingerprint} {wording.name}-{wording.digest}", range=(0.0, 1.0)
        )

    def preflight(self) -> None:
        """See ``ChatEndpoint.check``."""
        self.endpoint.check()

    def hear(
        self, images: Images, pairs: Pairs, prompts: Sequence[str], metadata: Sequence[Metadata], texts: Sequence[str]
    ) -> Comparison:
        """See ``Listener.hear``."""
        shown = pictures(images)
        questions = [
            Question(self.wording.fill(prompt=prompts[i], reasons=without_verdict(text)), (shown[i], shown[j]))
            for (i, j), text in zip(pairs, texts, strict=True)
        ]
        replies = ask_parsed(self.endpoint, questions, [grammars.confidence] * len(questions))
        values = [torch.nan if reply.value is None else reply.value for reply in replies]
        return Comparison(torch.tensor(values, dtype=torch.float64), [reply.reason for reply in replies])


def without_verdict(text: str) -> str:
    """A judge's reasons without the ``<answer>``, and without the sentences and fields that name the winner."""
    for verdict in tagged(text, "answer"):
        text = text.replace(f">{verdict}<", "><")
    pieces = re.split(r"(?<=[.!?\n])|(?<=[\",])(?=\s*\"\w+\"\s*:)", text)
    return "".join(piece for piece in pieces if not VERDICT.search(piece)).strip()


class ListenerAudit:
    """A pairwise judge whose verdicts are weighted by a second one's agreement.

    A pair on which the listener gives no usable answer is left out with the reason: silence is no agreement.

    Args:
        judge: whose verdicts count.
        listener: a second judge, which compares on its own, or a ``Listener``, which hears the first one's reasons.
    """

    def __init__(self, judge: PairJudge, listener: PairJudge | Listener) -> None:
        self.judge, self.listener = judge, listener
        self.spec = replace(
            judge.spec,
            name=f"{judge.spec.name} heard by {listener.spec.name}",
            version=f"{judge.spec.version}; {listener.spec.version}",
        )

    def preflight(self) -> None:
        """Those of both."""
        preflight(self.judge)
        preflight(self.listener)

    def compare(self, images: Images, pairs: Pairs, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Comparison:
        """See ``PairJudge.compare``; ``weights`` are set."""
        said = self.judge.compare(images, pairs, prompts, metadata)
        if isinstance(self.listener, PairJudge):
            heard = self.listener.compare(images, pairs, prompts, metadata)
        else:
            heard = self.listener.hear(images, pairs, prompts, metadata, said.texts or [""] * len(pairs))
        silent = heard.preference.isnan()
        return replace(
            said,
            preference=said.preference.masked_fill(silent, torch.nan),
            reasons=[a or (f"listener: {b}" if b else None) for a, b in zip(said.reasons, heard.reasons, strict=True)],
            weights=agreement(said.preference, heard.preference).nan_to_num(0.0),
        )


def agreement(judge: Tensor, listener: Tensor) -> Tensor:
    """``1 - |p - q|``: (M,), (M,) in [0, 1] -> (M,); NaN where one of them is missing."""
    return 1 - (judge.double() - listener.double()).abs()


def contradiction_rate(judge: Tensor, listener: Tensor) -> float:
    """Share of decided verdicts (neither is a tie) on which the two prefer different images; missing ones left out."""
    decided = ((judge - 0.5) * (listener - 0.5))[(judge - 0.5).abs() * (listener - 0.5).abs() > 0]
    return float((decided < 0).double().mean())


def calibration_error(confidence: Tensor, right: Tensor, bins: int = 10) -> float:
    """Expected calibration error: over bins of confidence, the mean of |share right - mean confidence|, weighted by
    the number of answers.

    Args:
        confidence: (M,) probability that the first image is better, in [0, 1].
        right: (M,) whether it is, 0 or 1.
        bins: of equal width.
    """
    place = (confidence.double() * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, place, right.double() - confidence.double())
    return float(gaps.abs().sum() / len(confidence))
