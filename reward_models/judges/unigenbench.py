"""UniGenBench (arXiv 2508.20751): does an image pass the test points of its prompt?

Rows without a usable answer are left out, as published, and their share stands beside the result. The published code
has no overall number; two are given here, both named. Difference: names are stripped of the blank before the hyphen.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..protocol import Metadata, RewardResult, RewardSpec
from . import grammars, wording
from .endpoint import ChatEndpoint, Question, ask_parsed, pictures


@dataclass(frozen=True)
class Tally:
    """Results over many images.

    Attributes:
        primary: dimension -> (passed, asked) test points.
        sub: sub-dimension -> the same.
        rows: number of images.
        invalid: how many of them had no usable answer.
    """

    primary: Mapping[str, tuple[int, int]]
    sub: Mapping[str, tuple[int, int]]
    rows: int
    invalid: int

    @property
    def micro(self) -> float:
        """Passed test points over all that were asked, in [0, 1]; NaN for none."""
        asked = sum(n for _, n in self.primary.values())
        return sum(k for k, _ in self.primary.values()) / asked if asked else math.nan

    @property
    def mean_of_primary(self) -> float:
        """Mean of the primary dimensions' accuracies, in [0, 1]; NaN for none."""
        rates = [k / n for k, n in self.primary.values()]
        return math.fsum(rates) / len(rates) if rates else math.nan


def primary_dimension(point: str) -> str:
    """ "Attribute - Color" -> "Attribute"."""
    return point.partition("-")[0].strip()


def tally(rows: Iterable[tuple[Sequence[str], Sequence[int] | None]]) -> Tally:
    """Count passed test points.

    Args:
        rows: for each image the names of its test points, and 1 or 0 for each of them, or None if there is no usable
            answer.

    Raises:
        ValueError: a row has more or fewer scores than test points.
    """
    primary: dict[str, tuple[int, int]] = {}
    sub: dict[str, tuple[int, int]] = {}
    count = invalid = 0
    for points, scores in rows:
        count += 1
        if scores is None:
            invalid += 1
            continue
        if len(points) != len(scores):
            raise ValueError(f"got {len(scores)} scores for {len(points)} test points, expected one each.")
        for point, score in zip(points, scores, strict=True):
            for table, name in ((primary, primary_dimension(point)), (sub, point.strip())):
                passed, asked = table.get(name, (0, 0))
                table[name] = passed + int(score == 1), asked + 1
    return Tally(primary, sub, count, invalid)


class UniGenBench:
    """A vision-language model that says for each test point of a prompt whether the image passes it.

    Metadata of each image: ``testpoints`` and ``descriptions``, two lists of the same length (the columns
    ``Testpoints`` and ``Testpoint Description`` of the benchmark's files). The value is the share that it passes;
    ``parts`` hold the same within each primary dimension and each kind of test point.

    Args:
        endpoint: where it is asked.
        language: of the prompts and so of the question: "en" or "zh".
        template_path: text to use instead of the shipped one.
        definitions_path: JSON file that maps each kind of test point to its meaning, instead of the shipped one.
        attempts: how often to ask for an answer that can be used (published: 11); above 1 with a temperature above 0.
        compat: "published": a score other than 0 and 1 counts as 0 instead of making the answer unusable.
    """

    def __init__(
        self,
        endpoint: ChatEndpoint,
        *,
        language: Literal["en", "zh"] = "en",
        template_path: str | Path | None = None,
        definitions_path: str | Path | None = None,
        attempts: int = 1,
        compat: Literal["published"] | None = None,
    ) -> None:
        self.endpoint, self.attempts, self.compat = endpoint, attempts, compat
        if language not in ("en", "zh"):
            raise ValueError(f"got language {language!r}, expected 'en' or 'zh'. Correct it.")
        self.wording = wording.load(f"unigenbench_{language}", template_path)
        file = Path(definitions_path or wording.TEMPLATES / f"unigenbench_definitions_{language}.json").expanduser()
        try:
            self.definitions = {str(point): str(meaning) for point, meaning in json.loads(file.read_bytes()).items()}
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(
                f"got definitions {str(file)!r}, expected a JSON file that maps test points to their meaning "
                f"({error}). Correct it."
            ) from error
        digest = hashlib.sha256(json.dumps(self.definitions, sort_keys=True).encode()).hexdigest()[:8]
        self.spec = RewardSpec(
            name="unigenbench",
            version=f"{endpoint.fingerprint} {self.wording.name}-{self.wording.digest}-{digest}"
            + (f" {compat}" if compat else ""),
            range=(0.0, 1.0),
            licence="that of the model",
            preprocessing="8-bit, sent as png",
        )

    def preflight(self) -> None:
        """See ``ChatEndpoint.check``."""
        self.endpoint.check()

    def question(self, prompt: str, points: Sequence[str], descriptions: Sequence[str]) -> str:
        """What the judge is told about one image.

        Raises:
            ValueError: lists of different lengths, or a kind of test point without a definition.
        """
        if len(points) != len(descriptions) or not points:
            raise ValueError(
                f"got {len(points)} test points and {len(descriptions)} descriptions for prompt {prompt!r}, expected "
                "as many of both, at least one. Correct the metadata."
            )
        if unknown := sorted(set(points) - set(self.definitions)):
            raise ValueError(
                f"got test points {unknown} without a definition, expected some of {sorted(self.definitions)}. Give "
                "the prompts' language (en, zh), or definitions_path."
            )
        return self.wording.fill(
            prompt=prompt,
            points=str(list(points)),
            definitions="\n".join(f"{point}: {self.definitions[point]}" for point in dict.fromkeys(points)),
            descriptions="\n".join(f"{p}: {d}" for p, d in zip(points, descriptions, strict=True)),
        )

    def point_scores(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> tuple[list[list[int] | None], list[str | None]]:
        """For each image 1 or 0 for each of its test points, or None and the reason. Input as for ``score``."""
        rows = [(row.get("testpoints"), row.get("descriptions")) for row in metadata]
        asked = [i for i, (points, _) in enumerate(rows) if points]
        shown = pictures(images)
        questions = [
            Question(self.question(prompts[i], rows[i][0] or [], rows[i][1] or []), (shown[i],)) for i in asked
        ]
        parse = [partial(grammars.point_list, count=len(rows[i][0] or []), compat=self.compat) for i in asked]
        replies = dict(zip(asked, ask_parsed(self.endpoint, questions, parse, self.attempts), strict=True))
        scores = [replies[i].value if i in replies else None for i in range(len(images))]
        silent = "the metadata hold no test points under 'testpoints'"
        return scores, [replies[i].reason if i in replies else silent for i in range(len(images))]

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``.

        Raises:
            ValueError: see ``question``.
        """
        scores, reasons = self.point_scores(images, prompts, metadata)
        values = torch.tensor([sum(row) / len(row) if row else math.nan for row in scores])
        columns: dict[str, list[float]] = {}
        for i, (row, meta) in enumerate(zip(scores, metadata, strict=True)):
            counted = tally([(meta.get("testpoints") or [], row)])
            for name, (passed, asked) in {**counted.sub, **counted.primary}.items():
                columns.setdefault(name, [math.nan] * len(scores))[i] = passed / asked
        return RewardResult(values, {name: torch.tensor(column) for name, column in columns.items()}, reasons)
