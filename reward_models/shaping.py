"""One reward made into another: scale, threshold, PAR, repeated passes, weights by certainty.

    scale      (r - subtract) / divide, cut off at low and high
    threshold  1 where r >= at, else 0; or r itself where it passes (keep)
    par        mean over references of sigmoid((r - r_ref) / temperature)          (PAR, arXiv 2502.18770)
    repeat     mean and spread over several augmented passes                       (Ctrl-U, arXiv 2410.11236)
    certainty  m + exp(-strength u) (r - m), m the mean of the group               (Ctrl-U)

The raw value stays in ``parts`` under the name of the reward that was shaped.

With a gradient where the shaped reward has one: scale, par, repeat, and threshold with keep (a bare threshold is flat).

Deviations. PAR's references are rewards of samples of the base model for the same prompt; with ``centre: group`` the
mean of the group stands in for them, which needs no such samples and moves with the policy. Ctrl-U divides a loss by
exp(u); here exp(-u) multiplies an image's distance from the (weighted) mean of its group, so that the advantage of the
result is exactly exp(-u) times the distance, and an image of which nothing is known ends in the middle. Ctrl-U's
discrepancy of two passes |a - b| is sqrt 2 times the ``uncertainty`` of ``repeat`` (a sample standard deviation).
"""

from __future__ import annotations

import hashlib
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

from .combine import check_numbers, check_whole_numbers, group_index, settings
from .mixture import combined_spec, with_gradient
from .protocol import Metadata, Reward, RewardError, RewardResult, RewardSpec, checked_score, to_8bit
from .schedule import Schedule, at

# --- mathematics ------------------------------------------------------------------------------------------------------


def threshold(values: Tensor, least: float, keep: bool = False) -> Tensor:
    """1 (or the value itself) where ``values >= least``, else 0; NaN stays NaN."""
    passed = torch.where(values >= least, values if keep else 1.0, 0.0)
    return torch.where(values.isnan(), values, passed)


def par(values: Tensor, references: Tensor, temperature: float = 1.0) -> Tensor:
    """``mean_m sigmoid((r - r_ref^m) / temperature)``: (N,), (N, M) -> (N,) in (0, 1); NaN references are left out."""
    known = ~references.isnan()
    chances = torch.sigmoid((values[:, None] - references.nan_to_num()) / temperature)
    mean = (chances * known).sum(1) / known.sum(1).clamp_min(1)  # nanmean would have a NaN for a gradient
    return mean.where(known.any(1), math.nan)


def group_mean(values: Tensor, groups: Tensor, weights: Tensor | None = None) -> Tensor:
    """(Weighted) mean of each image's group without NaN: (N,), (N,) integers -> (N,); NaN where nothing is left."""
    w = torch.ones_like(values) if weights is None else weights
    known = ~(values.isnan() | w.isnan())
    _, index = groups.to(values.device).unique(return_inverse=True)
    none = values.new_zeros(int(index.max()) + 1 if len(index) else 0)
    total = none.index_add(0, index[known], (w * values)[known])
    return (total / none.index_add(0, index[known], w[known]))[index]


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
        ends = {name: end for name, end in (("low", self.low), ("high", self.high)) if end not in (-math.inf, math.inf)}
        check_numbers(subtract=self.subtract, divide=self.divide, **ends)
        if self.divide == 0 or self.low > self.high:
            raise ValueError(
                f"got scale with divide: {self.divide}, low: {self.low}, high: {self.high}, expected a divisor other "
                "than 0 and low <= high. Correct them."
            )
        old = self.reward.spec
        low, high = sorted(min(max((end - self.subtract) / self.divide, self.low), self.high) for end in old.range)
        spec = _spec(self, f"({old.name} - {self.subtract:g}) / {self.divide:g}", (low, high))
        better = old.higher_is_better == (self.divide > 0)
        object.__setattr__(self, "spec", replace(spec, higher_is_better=better, differentiable=old.differentiable))

    def at(self, update: int | None) -> Scale:
        """See ``schedule.at``."""
        return replace(self, reward=at(self.reward, update))

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``."""
        result = _ask(self.reward, images, prompts, metadata, groups)
        uncertainty = None if result.uncertainty is None else result.uncertainty / abs(self.divide)
        shaped = _shaped(self.reward, result, self._shape(result.values.double()))
        return replace(shaped, uncertainty=uncertainty)

    def differentiable(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The value with a gradient, 0 where it is cut off: (N, 3, H, W), N prompts -> (N,)."""
        return self._shape(_with_gradient(self.reward, images, prompts)).float()

    def _shape(self, values: Tensor) -> Tensor:
        return ((values - self.subtract) / self.divide).clamp(self.low, self.high)


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
        spec = _spec(self, f"{old.name} >= {said}", (0.0, high))
        object.__setattr__(self, "spec", replace(spec, differentiable=self.keep and old.differentiable))

    def at(self, update: int | None) -> Threshold:
        """See ``schedule.at``."""
        return replace(self, reward=at(self.reward, update), update=update)

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``."""
        result = _ask(self.reward, images, prompts, metadata, groups)
        return _shaped(self.reward, result, self._shape(result.values))

    def differentiable(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The value with a gradient, 0 where it fails: (N, 3, H, W), N prompts -> (N,).

        Raises:
            ValueError: without ``keep``.
        """
        if not self.keep:
            raise ValueError(
                f"got {self.spec.name!r} to be differentiated, which is flat, expected a threshold with keep. Add "
                "keep: true, or use par."
            )
        return self._shape(_with_gradient(self.reward, images, prompts).float())

    def _shape(self, values: Tensor) -> Tensor:
        return threshold(values, Schedule.read(self.least).at(self.update), self.keep)


@dataclass(frozen=True)
class Par:
    """PAR: the reward's chance against references of the same prompt, in (0, 1); bounded, and flat where it is high.

    Args:
        reward: of which more is better.
        centre: a number; or "group": the mean of the image's group. One of ``centre`` and ``references``.
        references: the JSON lines that `flowrl score` writes for samples of the base model, see ``read_references``;
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
        check_numbers(temperature=self.temperature)
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
        said: Any = self.centre
        digest: str | None = None
        if self.references is not None:
            said, content = Path(self.references).name, repr(read_references(self.references, self.reward.spec.name))
            digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        spec = _spec(self, f"par({self.reward.spec.name}; {said})", (0.0, 1.0), references=digest)
        wide = "group" if self.centre == "group" and spec.scope == "point" else spec.scope
        smooth = self.reward.spec.differentiable
        object.__setattr__(self, "spec", replace(spec, scope=wide, differentiable=smooth))

    def at(self, update: int | None) -> Par:
        """See ``schedule.at``."""
        return replace(self, reward=at(self.reward, update))

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``."""
        result = _ask(self.reward, images, prompts, metadata, groups)
        shaped = _shaped(self.reward, result, self._shape(result.values.double(), prompts, groups))
        if self.references is not None:
            said, table = f"{self.references} holds no score for this prompt", self._table()
            shaped.reasons = [
                old if table.get(prompt) else said for prompt, old in zip(prompts, shaped.reasons, strict=True)
            ]
        return shaped

    def differentiable(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The value with a gradient, images of equal prompts being a group: (N, 3, H, W), N prompts -> (N,)."""
        return self._shape(_with_gradient(self.reward, images, prompts), prompts, None).float()

    def _shape(self, values: Tensor, prompts: list[str], groups: Tensor | None) -> Tensor:
        """PAR of (N,) float64 rewards."""
        if self.references is not None:
            rows = [self._table().get(prompt, ()) for prompt in prompts]
            most = max(map(len, rows), default=0)
            centre = values.new_tensor([[*row, *[math.nan] * (most - len(row))] for row in rows]).view(len(rows), most)
        elif self.centre == "group":
            centre = group_mean(values, group_index(groups, prompts))[:, None]
        else:
            centre = values.new_full((len(values), 1), float(self.centre or 0))
        return par(values, centre, self.temperature)

    def _table(self) -> dict[str, tuple[float, ...]]:
        return read_references(str(self.references), self.reward.spec.name)


@lru_cache(maxsize=16)
def read_references(path: str, name: str) -> dict[str, tuple[float, ...]]:
    """Scores by prompt from JSON lines: those of `flowrl score`, or {"prompt": ..., "score": ...}; null is left out.

    Args:
        path: of the file. name: of the score, where its lines have several ("scores": {name: ...}).

    Raises:
        ValueError: no such file, a line that is something else, or several scores and none of this name.
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
            prompt, scores = str(row["prompt"]), dict(row["scores"]) if "scores" in row else {"score": row["score"]}
            known = {key: float(score) for key, score in scores.items() if score is not None}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"got {line[:80]!r} in line {number} of {path!r}, expected JSON with prompt and score ({error!r}). "
                "Write it with `flowrl score`."
            ) from error
        if len(scores) > 1 and name not in scores:
            raise ValueError(
                f"got scores of {', '.join(map(repr, scores))} in {path!r}, expected one, or {name!r} among them. "
                "Score the images with this reward alone."
            )
        table[prompt] = (*table.get(prompt, ()), *(known[key] for key in known if len(scores) == 1 or key == name))
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
        check_whole_numbers(passes=self.passes, shift=self.shift, seed=self.seed)
        check_numbers(jitter=self.jitter)
        if self.passes < 2 or not 0 <= self.jitter < 1 or self.shift < 0:
            raise ValueError(
                f"got repeat with passes: {self.passes}, jitter: {self.jitter}, shift: {self.shift}, expected at least "
                "2 passes, jitter in [0, 1) and shift >= 0. Correct them."
            )
        old = self.reward.spec
        spec = _spec(self, f"{self.passes} x {old.name}", old.range)
        smooth = old.differentiable
        object.__setattr__(self, "spec", replace(spec, higher_is_better=old.higher_is_better, differentiable=smooth))

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
        mean = values.mean(0)
        spread = ((values - mean).square().sum(0) / (self.passes - 1)).sqrt()
        return replace(_shaped(self.reward, results[0], mean), reasons=reasons, uncertainty=spread.float())

    def differentiable(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The mean with a gradient: (N, 3, H, W), N prompts -> (N,).

        As when they are scored, the passes are put on the 8-bit grid; that rounding counts as a slope of 1.
        """
        passes = []
        for number in range(self.passes):
            x = self.augment(images, number)
            passes.append(_with_gradient(self.reward, x + (to_8bit(x) - x).detach(), prompts))
        return torch.stack(passes).mean(0).float()


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
        check_numbers(strength=self.strength)
        if self.strength < 0:
            raise ValueError(f"got certainty with strength {self.strength}, expected a number >= 0. Correct it.")
        old = self.reward.spec
        spec = _spec(self, f"certain({old.name})", old.range)
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


def _with_gradient(reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    """(N,) float64 on the images' device; ValueError where the reward has no gradient."""
    return with_gradient({reward.spec.name: reward}, [reward.spec.name], images, prompts)[0]


def _spec(shaped: Any, name: str, range: tuple[float, float], **instead: Any) -> RewardSpec:
    """That of a shaped reward, with its settings in the version; instead: see ``settings``."""
    inner: RewardSpec = shaped.reward.spec
    spec = combined_spec(name, {inner.name: shaped.reward}, range)
    return replace(spec, version=f"{inner.version}; {settings(shaped, **instead)}", preprocessing=inner.preprocessing)


def transforms() -> Mapping[str, type]:
    """Names that ``transform:`` understands."""
    return {"scale": Scale, "threshold": Threshold, "par": Par, "repeat": Repeat, "certainty": Certainty}
