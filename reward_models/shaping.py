"""One reward made into another: scale, threshold, PAR, repeated passes, weights by certainty.

    scale      (r - subtract) / divide, cut off at low and high
    threshold  1 where r >= at, else 0; or r itself where it passes (keep)
    par        mean over references of sigmoid((r - r_ref) / temperature)          (PAR, arXiv 2502.18770)
    repeat     mean and spread over several augmented passes                       (Ctrl-U, arXiv 2410.11236)
    certainty  m + exp(-strength u) (r - m), m the mean of the group               (Ctrl-U)

The raw value stays in ``parts`` under the name of the reward that was shaped.

Deviations. PAR's references are rewards of samples of the base model for the same prompt; with ``centre: group`` the
mean of the group stands in for them, which needs no such samples and moves with the policy. Ctrl-U divides a loss by
exp(u); here exp(-u) multiplies an image's distance from the (weighted) mean of its group, so that the advantage of the
result is exactly exp(-u) times the distance, and an image of which nothing is known ends in the middle. Ctrl-U's
discrepancy of two passes |a - b| is sqrt 2 times the ``uncertainty`` of ``repeat`` (a sample standard deviation).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .combine import group_index
from .mixture import combined_spec
from .protocol import Metadata, Reward, RewardError, RewardResult, RewardSpec, checked_score
from .schedule import Schedule, at

# --- mathematics ------------------------------------------------------------------------------------------------------


def threshold(values: Tensor, least: float, keep: bool = False) -> Tensor:
    """1 (or the value itself) where ``values >= least``, else 0; NaN stays NaN."""
    passed = torch.where(values >= least, values if keep else 1.0, 0.0)
    return torch.where(values.isnan(), values, passed)


def par(values: Tensor, references: Tensor, temperature: float = 1.0) -> Tensor:
    """``mean_m sigmoid((r - r_ref^m) / temperature)``: (N,), (N, M) -> (N,) in (0, 1); NaN references are left out."""
    return torch.sigmoid((values[:, None] - references) / temperature).nanmean(1)


def group_mean(values: Tensor, groups: Tensor, weights: Tensor | None = None) -> Tensor:
    """(Weighted) mean of each image's group without NaN: (N,), (N,) integers -> (N,); NaN where nothing is left."""
    w = torch.ones_like(values) if weights is None else weights
    known = ~(values.isnan() | w.isnan())
    _, index = groups.unique(return_inverse=True)
    total, count = torch.zeros(2, int(index.max()) + 1 if len(index) else 0, dtype=values.dtype)
    total.index_add_(0, index[known], (w * values)[known])
    count.index_add_(0, index[known], w[known])
    return (total / count)[index]


def certainty(values: Tensor, uncertainty: Tensor, groups: Tensor, strength: float) -> Tensor:
    """``m + w (r - m)`` with ``w = exp(-strength u)`` and ``m = sum w r / sum w`` over the group.

    That m is also the mean of the result, so its distance from the mean is exactly ``w (r - m)``.
    """
    w = torch.exp(-strength * uncertainty)
    m = group_mean(values, groups, w)
    return m + w * (values - m)


# --- rewards ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """``(r - subtract) / divide``, cut off at ``low`` and ``high``. A negative ``divide`` turns a cost round.

    Raises:
        ValueError: divide is 0, or low above high.
    """

    reward: Reward
    subtract: float = 0.0
    divide: float = 1.0
    low: float = -math.inf
    high: float = math.inf
    spec: RewardSpec = field(init=False)

    def __post_init__(self) -> None:
        _check_numbers(subtract=self.subtract, divide=self.divide, low=self.low, high=self.high)
        if self.divide == 0 or self.low > self.high:
            raise ValueError(
                f"got scale with divide: {self.divide}, low: {self.low}, high: {self.high}, expected a divisor other "
                "than 0 and low <= high. Correct them."
            )
        old = self.reward.spec
        ends = sorted(min(max((end - self.subtract) / self.divide, self.low), self.high) for end in old.range)
        spec = _spec(self.reward, f"({old.name} - {self.subtract:g}) / {self.divide:g}", (ends[0], ends[1]))
        object.__setattr__(self, "spec", replace(spec, higher_is_better=old.higher_is_better == (self.divide > 0)))

    def at(self, update: int | None) -> Scale:
        """See ``schedule.at``."""
        return replace(self, reward=at(self.reward, update))

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``."""
        result = _ask(self.reward, images, prompts, metadata, groups)
        values = ((result.values.double() - self.subtract) / self.divide).clamp(self.low, self.high)
        uncertainty = None if result.uncertainty is None else result.uncertainty / abs(self.divide)
        return replace(_shaped(self.reward, result, values), uncertainty=uncertainty)


@dataclass(frozen=True)
class Threshold:
    """1 where the reward reaches ``least``, else 0; with ``keep`` the reward itself where it does.

    Args:
        reward: of which more is better; with ``keep`` never negative.
        least: a number, or a schedule of one (see ``Schedule.read``): what is asked for may rise while training.

    Raises:
        ValueError: options that do not fit.
    """

    reward: Reward
    least: Any
    keep: bool = False
    update: int | None = None
    spec: RewardSpec = field(init=False)

    def __post_init__(self) -> None:
        schedule = Schedule.read(self.least)
        old = self.reward.spec
        if not old.higher_is_better or (self.keep and old.range[0] < 0):
            raise ValueError(
                f"got a threshold on {old.name!r} with values in {old.range}, higher_is_better {old.higher_is_better} "
                f"and keep {self.keep}, expected a reward of which more is better, and with keep one that is never "
                "negative (0 is what fails). Scale it first."
            )
        said = "->".join(f"{value:g}" for value in schedule.values)
        high = max(0.0, old.range[1]) if self.keep else 1.0
        object.__setattr__(self, "spec", _spec(self.reward, f"{old.name} >= {said}", (0.0, high)))

    def at(self, update: int | None) -> Threshold:
        """See ``schedule.at``."""
        return replace(self, reward=at(self.reward, update), update=update)

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``."""
        result = _ask(self.reward, images, prompts, metadata, groups)
        least = Schedule.read(self.least).at(self.update)
        return _shaped(self.reward, result, threshold(result.values, least, self.keep))


@dataclass(frozen=True)
class Par:
    """PAR: the reward's chance against references of the same prompt, in (0, 1); bounded, and flat where it is high.

    Args:
        reward: of which more is better.
        centre: a number; or "group": the mean of the image's group. One of ``centre`` and ``references``.
        references: JSON lines with "prompt" and "score", such as `flowrl score` writes for samples of the base model;
            an image whose prompt is not in there is missing. One sample per prompt is enough.
        temperature: of the sigmoid, in units of the reward.

    Raises:
        ValueError: options that do not fit, a file that cannot be read.
    """

    reward: Reward
    centre: float | str | None = None
    references: str | None = None
    temperature: float = 1.0
    spec: RewardSpec = field(init=False)

    def __post_init__(self) -> None:
        _check_numbers(temperature=self.temperature)
        number = isinstance(self.centre, int | float) and not isinstance(self.centre, bool)
        if (self.centre is None) == (self.references is None) or not (self.centre in (None, "group") or number):
            raise ValueError(
                f"got par with centre: {self.centre!r} and references: {self.references!r}, expected one of the two: "
                "centre as a number or group, or references as a file of scores. Correct them."
            )
        if self.temperature <= 0 or not self.reward.spec.higher_is_better:
            raise ValueError(
                f"got par of {self.reward.spec.name!r} with temperature {self.temperature}, expected a reward of which "
                "more is better and a temperature above 0. Turn a cost round with {transform: scale, divide: -1}."
            )
        if self.references is not None:
            read_references(self.references)
        said = self.centre if self.references is None else Path(self.references).name
        spec = _spec(self.reward, f"par({self.reward.spec.name}; {said})", (0.0, 1.0))
        wide = "group" if self.centre == "group" and spec.scope == "point" else spec.scope
        object.__setattr__(self, "spec", replace(spec, scope=wide))

    def at(self, update: int | None) -> Par:
        """See ``schedule.at``."""
        return replace(self, reward=at(self.reward, update))

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``."""
        result = _ask(self.reward, images, prompts, metadata, groups)
        values, without = result.values.double(), [False] * len(images)
        if self.references is not None:
            table = read_references(self.references)
            rows = [table.get(prompt, ()) for prompt in prompts]
            without = [not row for row in rows]
            most = max(map(len, rows), default=1) or 1
            centre = torch.tensor([[*row, *[math.nan] * (most - len(row))] for row in rows], dtype=torch.float64)
        elif self.centre == "group":
            centre = group_mean(values, group_index(groups, prompts))[:, None]
        else:
            centre = torch.full((len(images), 1), float(self.centre or 0), dtype=torch.float64)
        shaped = _shaped(self.reward, result, par(values, centre.reshape(len(images), -1), self.temperature))
        said = f"{self.references} holds no score for this prompt"
        shaped.reasons = [said if bare else old for bare, old in zip(without, shaped.reasons, strict=True)]
        return shaped


@lru_cache(maxsize=16)
def read_references(path: str) -> dict[str, tuple[float, ...]]:
    """Scores by prompt from JSON lines with "prompt" and "score" (null is left out).

    Raises:
        ValueError: no such file, or a line that is something else.
    """
    table: dict[str, tuple[float, ...]] = {}
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(
            f"cannot read the reference scores {path!r} ({error}). Write them with `flowrl score`."
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, score = row["prompt"], row["score"]
            if score is not None:
                table[prompt] = (*table.get(prompt, ()), float(score))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"got {line[:80]!r} in line {number} of {path!r}, expected JSON with prompt and score ({error!r}). "
                "Write it with `flowrl score`."
            ) from error
    return table


@dataclass(frozen=True)
class Repeat:
    """Mean over several passes, with their sample standard deviation as uncertainty.

    The first pass sees the image itself. The others see it with contrast and brightness changed by up to ``jitter`` and
    moved by up to ``shift`` pixels: the same for all images of a pass, and a function of (seed, pass), so that no score
    depends on other images. With both at 0 only a scorer that answers at random has any uncertainty.

    Args:
        reward: what is asked. passes: at least 2.
        jitter: largest change of contrast (a factor around mid grey) and of brightness, in [0, 1).
        shift: pixels; the edge is repeated. seed: of the changes.

    Raises:
        ValueError: options out of range.
    """

    reward: Reward
    passes: int = 2
    jitter: float = 0.02
    shift: int = 2
    seed: int = 0
    spec: RewardSpec = field(init=False)

    def __post_init__(self) -> None:
        _check_numbers(passes=self.passes, jitter=self.jitter, shift=self.shift, seed=self.seed)
        if self.passes < 2 or not 0 <= self.jitter < 1 or self.shift < 0:
            raise ValueError(
                f"got repeat with passes: {self.passes}, jitter: {self.jitter}, shift: {self.shift}, expected at least "
                "2 passes, jitter in [0, 1) and shift >= 0. Correct them."
            )
        old = self.reward.spec
        spec = _spec(self.reward, f"{self.passes} x {old.name}", old.range)
        object.__setattr__(self, "spec", replace(spec, higher_is_better=old.higher_is_better))

    def at(self, update: int | None) -> Repeat:
        """See ``schedule.at``."""
        return replace(self, reward=at(self.reward, update))

    def augment(self, images: Tensor, number: int) -> Tensor:
        """Images of one pass, (N, 3, H, W) -> the same shape; pass 0 changes nothing."""
        if number == 0:
            return images
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        contrast, brightness = ((torch.rand(2, generator=draw) * 2 - 1) * self.jitter).tolist()
        down, right = torch.randint(-self.shift, self.shift + 1, (2,), generator=draw).tolist()
        h, w, s = *images.shape[-2:], self.shift
        if s:
            images = pad(images, (s, s, s, s), mode="replicate")[
                ..., s - down : s - down + h, s - right : s - right + w
            ]
        return ((images - 0.5) * (1 + contrast) + 0.5 + brightness).clamp(0, 1)

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; missing where any pass is."""
        results = [
            _ask(self.reward, self.augment(images, number), prompts, metadata, groups) for number in range(self.passes)
        ]
        values = torch.stack([result.values.double() for result in results])
        reasons = [next((r for r in column if r), None) for column in zip(*(x.reasons for x in results), strict=True)]
        shaped = _shaped(self.reward, results[0], values.mean(0))
        return replace(shaped, reasons=reasons, uncertainty=values.std(0).float())


@dataclass(frozen=True)
class Certainty:
    """Doubtful scores move towards the mean of their group (formula: see the module).

    Args:
        reward: one that gives an uncertainty: ``repeat``, ``ensemble``, or a scorer that knows its own.
        strength: per unit of uncertainty, >= 0.

    Raises:
        ValueError: a negative strength.
    """

    reward: Reward
    strength: float = 1.0
    spec: RewardSpec = field(init=False)

    def __post_init__(self) -> None:
        _check_numbers(strength=self.strength)
        if self.strength < 0:
            raise ValueError(f"got certainty with strength {self.strength}, expected a number >= 0. Correct it.")
        old = self.reward.spec
        spec = _spec(self.reward, f"certain({old.name})", old.range)
        scope = "group" if spec.scope == "point" else spec.scope
        object.__setattr__(self, "spec", replace(spec, higher_is_better=old.higher_is_better, scope=scope))

    def at(self, update: int | None) -> Certainty:
        """See ``schedule.at``."""
        return replace(self, reward=at(self.reward, update))

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; ``parts["uncertainty"]`` is what the scores were weighted by.

        Raises:
            RewardError: the reward gives no uncertainty.
        """
        result = _ask(self.reward, images, prompts, metadata, groups)
        if result.uncertainty is None:
            raise RewardError(
                f"reward {self.reward.spec.name!r} gives no uncertainty, expected one to weight by. Wrap it: "
                "{transform: repeat, of: ...} or {combine: ensemble, of: {...}}."
            )
        u = result.uncertainty.detach().cpu().double()
        values = certainty(result.values.double(), u, group_index(groups, prompts), self.strength)
        shaped = _shaped(self.reward, result, values)
        unknown = (u.isnan() & ~result.values.isnan()).tolist()
        reasons = ["its uncertainty is NaN" if x else r for x, r in zip(unknown, shaped.reasons, strict=True)]
        return replace(shaped, reasons=reasons, parts=shaped.parts | {"uncertainty": u.float()})


# --- what all of them share -------------------------------------------------------------------------------------------


def _ask(
    reward: Reward, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None
) -> RewardResult:
    return checked_score(reward, images, prompts, metadata, groups, all_missing="allow")


def _shaped(reward: Reward, result: RewardResult, values: Tensor) -> RewardResult:
    """The shaped values, with the raw ones in ``parts``."""
    parts = result.parts | {reward.spec.name: result.values}
    return RewardResult(values.float(), parts, result.reasons, None, result.region_map)


def _spec(reward: Reward, name: str, range: tuple[float, float]) -> RewardSpec:
    return replace(combined_spec(name, {reward.spec.name: reward}, range), preprocessing=reward.spec.preprocessing)


def _check_numbers(**given: Any) -> None:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise ValueError(f"got {name}: {value!r}, expected a number. Correct it.")


def transforms() -> Mapping[str, type]:
    """Names that ``transform:`` understands."""
    return {"scale": Scale, "threshold": Threshold, "par": Par, "repeat": Repeat, "certainty": Certainty}
