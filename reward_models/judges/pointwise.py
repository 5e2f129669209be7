"""Judges that rate one image at a time.

Differences of EditScore here from the released code: an answer that cannot be used is missing and not half of the
scale; broken JSON is not repaired; the PQ question is asked of the edit alone, as in its batch path, and two scores are
expected of each question. ``compat="editscore"`` brings the half of the scale back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..protocol import Metadata, RewardResult, RewardSpec
from . import grammars
from .endpoint import ChatEndpoint, Picture, Question, Reply, ask_parsed, pictures
from .wording import Wording

Parts = Mapping[str, float]


class PointJudge:
    """A vision-language model that rates an image by its prompt.

    The value is the weighted mean of the parts that the grammar reads; it is missing if one of them is.

    Args:
        endpoint: where it is asked.
        wording: what it is told; ``{prompt}`` is filled.
        parse: grammar from an answer to named numbers, NaN for one that was not given.
        name: for the spec.
        range: of the value.
        weights: of the parts; those without are only reported. None: all parts equally.
        form: how images are sent, see ``Picture``.
        complete: fills what is not given from the batch's answers (``grammars.fill_axes``), or None.

    Raises:
        ValueError: weights without one above 0.
    """

    def __init__(
        self,
        endpoint: ChatEndpoint,
        wording: Wording,
        parse: Callable[[str], Parts],
        *,
        name: str,
        range: tuple[float, float],
        weights: Mapping[str, float] | None = None,
        form: str = "png",
        complete: Callable[[Sequence[Parts]], Sequence[Parts]] | None = None,
    ) -> None:
        if weights is not None and not (all(w >= 0 for w in weights.values()) and any(weights.values())):
            raise ValueError(f"got weights {dict(weights)} for {name}, expected numbers from 0, one above 0. Correct.")
        self.endpoint, self.wording, self.parse, self.form = endpoint, wording, parse, form
        self.weights = None if weights is None else {part: w for part, w in weights.items() if w}
        self.complete = complete
        mix = "" if weights is None else f" {self.weights}"
        self.spec = RewardSpec(
            name=name,
            version=f"{endpoint.fingerprint} {wording.name}-{wording.digest}{mix}",
            range=range,
            licence="that of the model",
            preprocessing=f"8-bit, sent as {form}",
        )

    def preflight(self) -> None:
        """See ``ChatEndpoint.check``."""
        self.endpoint.check()

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; metadata is not read."""
        shown = pictures(images, self.form)
        questions = [
            Question(self.wording.fill(prompt=prompt), (picture,))
            for picture, prompt in zip(shown, prompts, strict=True)
        ]
        replies = ask_parsed(self.endpoint, questions, [self.parse] * len(questions))
        rows: list[Parts] = [{} if reply.value is None else reply.value for reply in replies]
        if self.complete:
            given = iter(self.complete([row for row in rows if row]))
            rows = [next(given) if row else row for row in rows]
        names = sorted({name for row in rows for name in row})
        weights = self.weights or dict.fromkeys(names, 1.0)
        values = [_weighted(row, weights) for row in rows]
        reasons = [
            reply.reason or (f"not in the judge's answer: {', '.join(_absent(row, weights))}" if v != v else None)
            for reply, row, v in zip(replies, rows, values, strict=True)
        ]
        parts = {name: torch.tensor([row.get(name, math.nan) for row in rows]) for name in names if len(names) > 1}
        return RewardResult(torch.tensor(values, dtype=torch.float32), parts, reasons)


def _weighted(row: Parts, weights: Mapping[str, float]) -> float:
    total = math.fsum(weights.values())
    return math.fsum(w * row.get(name, math.nan) for name, w in weights.items()) / total if total else math.nan


def _absent(row: Parts, weights: Mapping[str, float]) -> list[str]:
    return [name for name in weights if math.isnan(row.get(name, math.nan))]


class TwoQuestionScore:
    """VIEScore (arXiv 2312.14867) and EditScore (arXiv 2509.23909): ``sqrt(min(semantic) min(quality))`` in [0, 10].

    The first question is about what the image was to show (for edits with the source image before it), the second
    about the image alone. Several passes under different seeds are averaged over those that can be used; their standard
    deviation (n - 1) is the result's ``uncertainty``. Source images come in the metadata under ``source``: a path or a
    (3, H, W) tensor in [0, 1].

    ``parts``: ``semantic`` and ``quality``, the minima on the scale 0 to 10, means over passes; ``passes``, how many
    could be used.

    Args:
        endpoint: where it is asked; for several passes at a temperature above 0.
        semantic: first question, with ``{prompt}`` and ``{high}``.
        quality: second question, with ``{high}``.
        name: for the spec.
        high: upper end of the judge's scale: 25 for EditScore, 10 for VIEScore.
        edit: whether there is a source image; then the first question has two scores, otherwise one.
        passes: how often to ask.
        reduction: "overalls" averages the passes' overalls, "means" takes the overall of the mean minima.
        compat: "editscore": a question without a usable answer gets half of the scale.

    Raises:
        ValueError: several passes at temperature 0, which would all be the same, or an unknown reduction.
    """

    def __init__(
        self,
        endpoint: ChatEndpoint,
        semantic: Wording,
        quality: Wording,
        *,
        name: str,
        high: float,
        edit: bool,
        passes: int = 1,
        reduction: Literal["overalls", "means"] = "overalls",
        compat: Literal["editscore"] | None = None,
    ) -> None:
        if passes < 1 or (passes > 1 and endpoint.temperature == 0):
            raise ValueError(
                f"got {passes} passes at temperature {endpoint.temperature:g}, expected one pass, or a temperature "
                "above 0: otherwise all passes say the same. Set the endpoint's temperature (EditScore: 0.7)."
            )
        if reduction not in ("overalls", "means"):
            raise ValueError(f"got reduction {reduction!r}, expected 'overalls' or 'means'. Correct it.")
        self.endpoint, self.semantic, self.quality = endpoint, semantic, quality
        self.high, self.edit, self.passes, self.reduction, self.compat = high, edit, passes, reduction, compat
        wordings = " ".join(f"{w.name}-{w.digest}" for w in (semantic, quality))
        self.spec = RewardSpec(
            name=name,
            version=f"{endpoint.fingerprint} {wordings} {passes} {reduction}" + (f" {compat}" if compat else ""),
            range=(0.0, 10.0),
            licence="that of the model",
            preprocessing="8-bit, sent as png",
        )

    def preflight(self) -> None:
        """See ``ChatEndpoint.check``."""
        self.endpoint.check()

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``. An image whose source is not given is missing.

        Raises:
            ValueError: a source is neither a readable file nor a tensor.
        """
        shown = pictures(images)
        sources = [source_picture(row) if self.edit else () for row in metadata]
        asked = [i for i, source in enumerate(sources) if source is not None]
        questions: list[Question] = []
        for number in range(self.passes):
            for i in asked:
                text = self.semantic.fill(prompt=prompts[i], high=f"{self.high:g}")
                questions.append(Question(text, (*(sources[i] or ()), shown[i]), number))
                questions.append(Question(self.quality.fill(high=f"{self.high:g}"), (shown[i],), number))
        first = partial(grammars.score_list, count=2 if self.edit else 1, high=self.high)
        second = partial(grammars.score_list, count=2, high=self.high)
        replies = iter(ask_parsed(self.endpoint, questions, [first, second] * (len(questions) // 2)))
        said: dict[int, list[tuple[Reply, Reply]]] = {i: [] for i in asked}
        for _ in range(self.passes):
            for i in asked:
                said[i].append((next(replies), next(replies)))
        rows = [self._row(said.get(i)) for i in range(len(images))]
        table = torch.tensor([row[:5] for row in rows], dtype=torch.float32).reshape(-1, 5)
        value, spread, semantic, quality, passes = table.unbind(1)
        parts = {"semantic": semantic, "quality": quality, "passes": passes}
        return RewardResult(value, parts, [row[5] for row in rows], uncertainty=spread if self.passes > 1 else None)

    def _row(self, said: list[tuple[Reply, Reply]] | None) -> tuple[float, float, float, float, float, str | None]:
        """Value, standard deviation, semantic, quality, passes used, reason."""
        if said is None:
            return math.nan, math.nan, math.nan, math.nan, 0.0, "the metadata hold no source image under 'source'"
        middle = [self.high / 2] if self.compat else None
        used = []
        for first, second in said:
            s, q = (middle if r.unread and middle else r.value for r in (first, second))
            if s is not None and q is not None:
                used.append((s, q))
        if not used:
            reason = next((r.reason for pair in said for r in pair if r.reason), None)
            return math.nan, math.nan, math.nan, math.nan, 0.0, reason
        semantic, quality = [s for s, _ in used], [q for _, q in used]
        value = grammars.self_ensemble(semantic, quality, self.high, how=self.reduction)
        overalls = [grammars.geometric_overall(s, q, self.high) for s, q in used]
        spread = float(np.std(overalls, ddof=1)) if len(used) > 1 else math.nan
        means = [10 / self.high * math.fsum(map(min, scores)) / len(used) for scores in (semantic, quality)]
        return value, spread, means[0], means[1], float(len(used)), None


def source_picture(metadata: Metadata) -> tuple[Picture] | None:
    """The source image of an edit, or None if the metadata hold none.

    Raises:
        ValueError: it is neither a readable image file nor a (3, H, W) tensor.
    """
    source = metadata.get("source")
    if source is None:
        return None
    if isinstance(source, Tensor) and source.ndim == 3 and len(source) == 3:
        return (pictures(source[None])[0],)
    if not isinstance(source, str | Path):
        raise ValueError(f"got a source image of type {type(source).__name__}, expected a path or a (3, H, W) tensor.")
    try:
        with Image.open(Path(source).expanduser()) as image:
            return (Picture(np.asarray(image.convert("RGB"))),)
    except OSError as error:
        raise ValueError(
            f"got source image {str(source)!r}, which cannot be read ({error}). Correct the path."
        ) from error
