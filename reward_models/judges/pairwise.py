"""Judges that compare two images, and what can be learnt from asking them in both orders."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..protocol import Metadata, Reward, RewardSpec, checked_score, preflight
from .endpoint import ChatEndpoint, Question, ask_parsed, pictures
from .grammars import Verdict
from .wording import Wording

Order = Literal["both", "random", "given"]
Pairs = Sequence[tuple[int, int]]
Images = Tensor | Sequence[Tensor]  # (N, 3, H, W), or N images (3, H, W) of different sizes


@dataclass
class Comparison:
    """Answers to M questions "is the first image better than the second?".

    Attributes:
        preference: (M,) float64: 1 yes, 0 no, 0.5 a tie, NaN no usable answer.
        reasons: M entries: why a preference is NaN, else None.
        texts: M entries: what the judge wrote, for audits; empty for judges that do not write.
        weights: (M,) how far each answer is to be trusted, in [0, 1]; None: all equally.
        categories: name -> (M,) preferences in parts of the question, NaN where the judge gave none.
        good: (M,) of ties: 1 if both images are good, 0 if both are bad, NaN otherwise; None: nobody asked.
    """

    preference: Tensor
    reasons: list[str | None]
    texts: list[str] = field(default_factory=list)
    weights: Tensor | None = None
    categories: dict[str, Tensor] = field(default_factory=dict)
    good: Tensor | None = None


@runtime_checkable
class PairJudge(Protocol):
    """Anything that compares images."""

    @property
    def spec(self) -> RewardSpec: ...

    def compare(self, images: Images, pairs: Pairs, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Comparison:
        """Compare M pairs out of N images.

        Args:
            images: (N, 3, H, W) float in [0, 1] on the 8-bit grid; or N images (3, H, W) where their sizes differ, as
                in benchmarks.
            pairs: M pairs of image numbers; the order within a pair is the order in which the judge sees them.
            prompts: N prompts; both images of a pair have the same one.
            metadata: N dictionaries that came with the prompts.
        """
        ...


class EndpointPairJudge:
    """A vision-language model that is shown both images.

    Args:
        endpoint: where it is asked.
        wording: what it is told, with the place ``{prompt}``.
        parse: grammar of its answer.
        name: for the spec.
        form: how images are sent, see ``Picture``.
    """

    def __init__(
        self,
        endpoint: ChatEndpoint,
        wording: Wording,
        parse: Callable[[str], Verdict],
        *,
        name: str,
        form: str = "png",
    ) -> None:
        self.endpoint, self.wording, self.parse, self.form = endpoint, wording, parse, form
        self.spec = RewardSpec(
            name=name,
            version=f"{endpoint.fingerprint} {wording.name}-{wording.digest} {form}",
            range=(0.0, 1.0),
            licence="that of the model",
            preprocessing=f"8-bit, sent as {form}",
        )

    def preflight(self) -> None:
        """See ``ChatEndpoint.check``."""
        self.endpoint.check()

    def compare(self, images: Images, pairs: Pairs, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Comparison:
        """See ``PairJudge.compare``; metadata is not read."""
        shown = pictures(images, self.form)
        questions = [Question(self.wording.fill(prompt=prompts[i]), (shown[i], shown[j])) for i, j in pairs]
        replies = ask_parsed(self.endpoint, questions, [self.parse] * len(questions))
        verdicts: list[Verdict | None] = [reply.value for reply in replies]
        names = sorted({name for verdict in verdicts if verdict for name in verdict.categories})
        asked = any(verdict.good is not None for verdict in verdicts if verdict)
        return Comparison(
            _column([verdict.preference if verdict else math.nan for verdict in verdicts]),
            [reply.reason for reply in replies],
            [reply.answer.reasoning + (reply.answer.text or "") for reply in replies],
            categories={
                name: _column([v.categories.get(name, math.nan) if v else math.nan for v in verdicts]) for name in names
            },
            good=_column([math.nan if v is None or v.good is None else v.good for v in verdicts]) if asked else None,
        )


class ScorerJudge:
    """Any pointwise scorer as a judge: the image with the better score wins. Each image is scored once.

    Args:
        reward: a reward of scope "point".
        threshold: scores that differ by no more than this tie.

    Raises:
        ValueError: the reward looks at other images too, or the threshold is negative.
    """

    def __init__(self, reward: Reward, threshold: float = 0.0) -> None:
        if reward.spec.scope != "point":
            raise ValueError(
                f"got reward {reward.spec.name!r} of scope {reward.spec.scope!r} as a judge, expected 'point': its "
                "score of an image depends on the others. Give a pairwise judge or a pointwise reward."
            )
        if not threshold >= 0:
            raise ValueError(f"got tie threshold {threshold}, expected at least 0. Correct it.")
        self.reward, self.threshold = reward, threshold
        self.spec = RewardSpec(
            name=f"{reward.spec.name} as judge",
            version=f"{reward.spec.version} threshold {threshold:g}",
            range=(0.0, 1.0),
            licence=reward.spec.licence,
            preprocessing=reward.spec.preprocessing,
        )

    def preflight(self) -> None:
        """That of the reward, if it has one."""
        preflight(self.reward)

    def compare(self, images: Images, pairs: Pairs, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Comparison:
        """See ``PairJudge.compare``."""
        scores, why = self._scores(images, prompts, metadata)
        first, second = index(pairs)
        gap = scores[first] - scores[second]
        preference = torch.where(gap.abs() <= self.threshold, 0.5, (gap > 0).double())
        reasons = [why[i] if scores[i].isnan() else why[j] for i, j in pairs]
        missing = gap.isnan()
        return Comparison(
            preference.masked_fill(missing, torch.nan),
            [reason if bad else None for reason, bad in zip(reasons, missing.tolist(), strict=True)],
        )

    def _scores(
        self, images: Images, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[Tensor, list[str | None]]:
        """(N,) scores of which more is better, and N reasons; images of one size are scored together."""
        scores = torch.full((len(images),), torch.nan, dtype=torch.float64)
        why: list[str | None] = [None] * len(images)
        by_size: dict[torch.Size, list[int]] = {}
        for i, image in enumerate(images):
            by_size.setdefault(image.shape, []).append(i)
        for same in by_size.values():
            result = checked_score(
                self.reward,
                torch.stack([images[i] for i in same]),
                [prompts[i] for i in same],
                [metadata[i] for i in same],
                all_missing="allow",
            )
            scores[same] = result.values.double() * (1 if self.reward.spec.higher_is_better else -1)
            for i, reason in zip(same, result.reasons, strict=True):
                why[i] = reason
        return scores, why


def index(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Numbers of the first and of the second images: 2 x (M,)."""
    first, second = torch.tensor(list(pairs), dtype=torch.long).reshape(-1, 2).T
    return first, second


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------- orders


@dataclass
class Judged:
    """Verdicts on M unordered pairs.

    Attributes:
        pairs: M pairs of image numbers.
        preference: (M,) for the first of each pair over the second, in [0, 1]; NaN: no valid verdict.
        weights: (M,) trust in each verdict, in [0, 1].
        bias: (M,) mean of ``2 p - 1`` over the orders asked, p the preference for the image that was shown first:
            1 always the first, -1 always the second; NaN where an order has no answer, or the pair was not asked.
        flips: (M,) 1 if the verdict changes when the images change places, 0 if it does not; NaN if not known.
        reasons: M entries: why a preference is NaN, else None.
        categories: name -> (M,) preferences in parts of the question.
        good: (M,) whether both images are good (1) or bad (0), mean over the orders in which the judge saw a tie; NaN
            where it saw none. None: it was not asked.
    """

    pairs: list[tuple[int, int]]
    preference: Tensor
    weights: Tensor
    bias: Tensor
    flips: Tensor
    reasons: list[str | None]
    categories: dict[str, Tensor] = field(default_factory=dict)
    good: Tensor | None = None


def content_keys(images: Images) -> list[str]:
    """Hash of each image's content: (N, 3, H, W) -> N strings. What is drawn from them does not depend on order."""
    return [picture.digest for picture in pictures(images)]


def coin(*what: object) -> int:
    """64 bits that look random and are a function of their arguments."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, what)).encode()).digest()[:8], "big")


def judge_pairs(
    judge: PairJudge,
    images: Images,
    pairs: Pairs,
    prompts: Sequence[str],
    metadata: Sequence[Metadata],
    *,
    order: Order = "both",
    seed: int = 0,
    keys: Sequence[str] | None = None,
) -> Judged:
    """Ask about each unordered pair.

    Args:
        judge: whom.
        images: (N, 3, H, W), or N images (3, H, W).
        pairs: M unordered pairs of image numbers.
        prompts: N prompts.
        metadata: N dictionaries.
        order: "both": twice, with the images in either place; the preference is the mean, so verdicts that contradict
            each other are a tie, and a pair with only one answer has none. "random": once, in an order that seed and
            content of the two images decide. "given": once, as the pair says. Two equal images tie without being
            asked, except in a given order.
        seed: of the random orders.
        keys: ``content_keys(images)``, if they are known already.
    """
    keys = content_keys(images) if keys is None else keys
    asked: list[tuple[int, int]] = []
    where: list[list[tuple[int, bool]]] = []  # for each pair, the questions about it, and whether they are turned round
    for i, j in pairs:
        if order == "given":
            turned = [False]
        elif keys[i] == keys[j]:
            turned = []
        elif order == "both":
            turned = [False, True]
        else:
            low, high = sorted((keys[i], keys[j]))
            turned = [(keys[i] == low) == bool(coin(seed, "order", low, high) & 1)]
        where.append([(len(asked) + k, t) for k, t in enumerate(turned)])
        asked += [(j, i) if t else (i, j) for t in turned]
    answer = judge.compare(images, asked, prompts, metadata)
    trust = torch.ones(len(asked), dtype=torch.float64) if answer.weights is None else answer.weights.double()
    said = answer.preference.double()
    good = torch.full_like(said, torch.nan) if answer.good is None else answer.good

    def flip(forward: int, backward: int) -> float:
        """Whether the answers to two questions differ, also in the kind of a tie: good and bad, or the reverse."""
        return max(flipped(float(said[forward]), float(said[backward])), float(good[forward] + good[backward] == 1))

    def over_orders(values: Tensor, empty: float) -> Tensor:
        """Mean preference for the first of the pair, over its questions."""
        rows = [[1 - float(values[m]) if t else float(values[m]) for m, t in asks] for asks in where]
        return _column([sum(row) / len(row) if row else empty for row in rows])

    return Judged(
        list(pairs),
        over_orders(said, 0.5),
        _column([sum(float(trust[m]) for m, _ in asks) / len(asks) if asks else 1.0 for asks in where]),
        _column([sum(2 * float(said[m]) - 1 for m, _ in asks) / len(asks) if asks else math.nan for asks in where]),
        _column([flip(a[0][0], a[1][0]) if len(a) == 2 else math.nan for a in where]),
        [next((r for m, _ in asks if (r := answer.reasons[m]) is not None), None) for asks in where],
        {name: over_orders(column, 0.5) for name, column in answer.categories.items()},
        None if answer.good is None else _column([float(good[[m for m, _ in asks]].nanmean()) for asks in where]),
    )


def flipped(forward: float, backward: float) -> float:
    """Whether a verdict changes with the order: 1 or 0, NaN if one of them is missing.

    Args:
        forward: preference for the image that was shown first.
        backward: the same with the images in each other's place, so a consistent judge gives ``1 - forward``.
    """
    return math.nan if math.isnan(forward) or math.isnan(backward) else float(forward != 1 - backward)


def position_bias(preference: Tensor) -> float:
    """Mean of ``2 p - 1`` over questions, p the preference for the image shown first: 0 for a fair judge that is asked
    in both or in random orders, 1 for one that always names the first. NaN entries do not count."""
    valid = preference[~preference.isnan()]
    return float((2 * valid - 1).mean())


def flip_rate(forward: Tensor, backward: Tensor) -> float:
    """Share of pairs whose verdict changes when the images change places; pairs with a missing verdict do not count."""
    valid = ~(forward.isnan() | backward.isnan())
    return float((forward[valid] != 1 - backward[valid]).double().mean())
