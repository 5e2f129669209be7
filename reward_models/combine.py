"""Several rewards as one, other than by a weighted sum (``mixture.WeightedSum``): rules, gates, trust.

    product         prod_k r_k^w_k                        every part is needed; parts must be >= 0
    minimum         min_k r_k                             the worst part counts (EditScore, of two of its marks)
    geometric_mean  (prod_k r_k^w_k)^(1 / sum w)          as the product, in the units of its parts
    ensemble        sum w_k r_k / sum w_k                 with the members' spread as uncertainty (Ctrl-U)

The raw value of every part stays in ``parts`` under its name, whatever the rule makes of it.

Sources: Ctrl-U (arXiv 2410.11236); EditScore (arXiv 2509.23909); gates on validity as in SVG generation by
reinforcement (arXiv 2509.05208); Trust-GRPO of SophiaVL-R1 (arXiv 2505.17018).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .mixture import combined_spec, score_parts, with_gradient
from .protocol import Metadata, Reward, RewardResult, RewardSpec
from .schedule import Schedule, all_at

Rule = Callable[[Tensor, Tensor], Tensor]
Scope = Literal["point", "group", "set"]

TRUSTED = ("verified", "learned")
MADE_OF = {"reward", "rewards", "weights", "rule", "update", "spec"}  # fields that are no settings


# --- rules: (K, N) values and (K,) positive weights -> (N,); NaN in, NaN out ------------------------------------------


def product(values: Tensor, weights: Tensor) -> Tensor:
    """``prod_k r_k^w_k`` of values >= 0."""
    return (values ** weights[:, None]).prod(0)


def minimum(values: Tensor, weights: Tensor) -> Tensor:
    """``min_k r_k``; weights are not read."""
    return values.amin(0)


def geometric_mean(values: Tensor, weights: Tensor) -> Tensor:
    """``(prod_k r_k^w_k)^(1 / sum w)`` of values >= 0; 0 as soon as one of them is."""
    return product(values, weights / weights.sum())


def mean(values: Tensor, weights: Tensor) -> Tensor:
    """``sum w_k r_k / sum w_k``."""
    return weights / weights.sum() @ values


def spread(values: Tensor, weights: Tensor) -> Tensor:
    """Population standard deviation over the members, each counted by its weight: (K, N) -> (N,)."""
    share = weights / weights.sum()
    return (share @ (values - share @ values) ** 2).sqrt()


RULES: dict[str, Rule] = {
    "product": product,
    "minimum": minimum,
    "geometric_mean": geometric_mean,
    "ensemble": mean,
}


@dataclass(frozen=True)
class Combined:
    """Rewards under one rule of the table above.

    Args:
        rewards: name -> reward, of each of which more is better.
        weights: name -> weight >= 0, at least one above 0; 0: scored and logged only. ``minimum`` takes 0 and 1 only.
        rule: a name of ``RULES``.

    Raises:
        ValueError: weights or ranges that do not fit the rule.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    rule: str
    spec: RewardSpec = field(init=False)

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if weight < 0 or (self.rule == "minimum" and weight not in (0, 1)):
                wanted = "0 or 1, as a minimum has no weights" if self.rule == "minimum" else "a weight >= 0"
                raise ValueError(
                    f"got weight {weight:g} for {name!r} in a {self.rule}, expected {wanted}. Turn a cost round with "
                    "{transform: scale, divide: -1, of: ...}."
                )
        used = _used(self.weights)
        for name in used:
            _check_direction(name, self.rewards[name], self.rule)
            if self.rule in ("product", "geometric_mean") and self.rewards[name].spec.range[0] < 0:
                raise ValueError(
                    f"got {name!r} with values from {self.rewards[name].spec.range[0]:g} on in a {self.rule}, expected "
                    "rewards that are never negative (two bad ones would make a good one). Wrap it: {transform: scale, "
                    "low: 0, of: ...} cuts it off, {transform: par, centre: 0, of: ...} squashes it into 0 to 1."
                )
        ends = torch.tensor([self.rewards[name].spec.range for name in used], dtype=torch.float64)
        low, high = RULES[self.rule](ends, self._used_weights()).nan_to_num(nan=math.inf).tolist()  # 0 * inf
        parts = [
            (name if name == reward.spec.name else f"{name}: {reward.spec.name}")  # a label alone says nothing
            + ("" if self.weights[name] == 1 else f"^{self.weights[name]:g}")
            for name, reward in self.rewards.items()
        ]
        spec = combined_spec(f"{self.rule}({', '.join(parts)})", self.rewards, (low, high))
        smooth = all(self.rewards[name].spec.differentiable for name in used)
        object.__setattr__(self, "spec", replace(spec, differentiable=smooth))

    def _used_weights(self) -> Tensor:
        return torch.tensor([self.weights[name] for name in _used(self.weights)], dtype=torch.float64)

    def at(self, update: int | None) -> Combined:
        """The combination as it stands at an update, see ``schedule.at``."""
        return replace(self, rewards=all_at(self.rewards, update))

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; missing where a part with a weight above 0 is missing."""
        used = _used(self.weights)
        found = score_parts(self.rewards, used, images, prompts, metadata, groups)
        values = torch.stack([found.results[name].values.double() for name in used])
        uncertainty = spread(values, self._used_weights()).float() if self.rule == "ensemble" else None
        combined = RULES[self.rule](values, self._used_weights()).float()
        return RewardResult(combined, found.parts, found.reasons, uncertainty)

    def differentiable(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The value with a gradient: (N, 3, H, W), N prompts -> (N,). Infinite slopes at 0 are the rule's own.

        Raises:
            ValueError: a used part has no gradient.
        """
        values = with_gradient(self.rewards, _used(self.weights), images, prompts)
        return RULES[self.rule](values, self._used_weights().to(values.device)).float()


@dataclass(frozen=True)
class Gate:
    """One reward counts only where another one passes.

        value                     where gate >= at_least
        otherwise                 elsewhere (a number; "missing": NaN with a reason)
        value * gate              everywhere, if at_least is null: a soft gate in [0, 1]

    ``otherwise`` has no default, because 0 is a good score for a reward whose values are negative.

    Args:
        rewards: under "value" and "gate".
        weights: both 1.
        at_least: a threshold, or a schedule of one (see ``Schedule.read``), or None.
        otherwise: value of what does not pass.

    Raises:
        ValueError: options that do not fit each other or the rewards.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    at_least: Any = None
    otherwise: float | str | None = None
    update: int | None = None
    spec: RewardSpec = field(init=False)

    def __post_init__(self) -> None:
        _check_plain_weights(self.weights, "gate")
        _check_direction("gate", self.rewards["gate"], "gate")
        value, gate = self.rewards["value"].spec, self.rewards["gate"].spec
        if self.at_least is None:
            if self.otherwise is not None or gate.range[0] < 0 or gate.range[1] > 1 or value.range[0] < 0:
                raise ValueError(
                    f"got a gate without at_least, with otherwise: {self.otherwise!r}, a gate in {gate.range} and a "
                    f"value in {value.range}, expected a gate in [0, 1], a value >= 0 and no otherwise. Give at_least."
                )
            low, high = 0.0, value.range[1]
        else:
            Schedule.read(self.at_least)
            number = isinstance(self.otherwise, int | float) and not isinstance(self.otherwise, bool)
            if not (self.otherwise == "missing" or (number and math.isfinite(cast("float", self.otherwise)))):
                raise ValueError(
                    f"got otherwise: {self.otherwise!r} in a gate, expected a number or missing: what an image gets "
                    "that does not pass. A reward whose values are negative needs a number below them."
                )
            ends = [*value.range] if self.otherwise == "missing" else [*value.range, float(self.otherwise or 0)]
            low, high = min(ends), max(ends)
        said = "" if self.at_least is None else f" >= {_say(self.at_least)} else {self.otherwise}"
        spec = combined_spec(f"{value.name} if {gate.name}{said}", self.rewards, (low, high))
        version = f"{spec.version}; {settings(self)}"
        object.__setattr__(self, "spec", replace(spec, version=version, higher_is_better=value.higher_is_better))

    def at(self, update: int | None) -> Gate:
        """The gate as it stands at an update, see ``schedule.at``."""
        return replace(self, rewards=all_at(self.rewards, update), update=update)

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``. Missing where the gate is; a missing value matters only where the gate is open."""
        found = score_parts(self.rewards, self.rewards, images, prompts, metadata, groups)
        value, gate = found.results["value"].values, found.results["gate"].values
        if self.at_least is None:
            return RewardResult(value * gate, found.parts, found.reasons)
        least = Schedule.read(self.at_least).at(self.update)
        closed = math.nan if self.otherwise == "missing" else float(self.otherwise or 0)
        values = torch.where(gate >= least, value, closed).where(~gate.isnan(), math.nan)
        shut = (gate < least).tolist()
        name = self.rewards["gate"].spec.name
        said = [f"{name} {g:g} < {least:g}" for g in gate.tolist()]
        reasons = [f"{s}; {r}" if x and r else s if x else r for x, s, r in zip(shut, said, found.reasons, strict=True)]
        return RewardResult(values, found.parts, reasons)


@dataclass(frozen=True)
class Trust:
    """A verified reward, and a learned one as far as it can be trusted with this group (Trust-GRPO).

        r = w_v verified + w_l trust exp(-update / decay) learned
        trust = min(1, exp(mean learned of the good - mean learned of the bad))     per group, 1 where either is empty

    An image is good if its verified reward is >= ``threshold``. A learned reward that puts the bad above the good is
    trusted less in that group.

    Args:
        rewards: under "verified" and "learned". weights: of both, above 0.
        threshold: of a good image.
        decay: updates over which the learned reward fades by a factor e; None: it stays.

    Raises:
        ValueError: weights or options that do not fit.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    threshold: float = 0.5
    decay: float | None = None
    update: int | None = None
    spec: RewardSpec = field(init=False)

    def __post_init__(self) -> None:
        for name, reward in self.rewards.items():
            _check_direction(name, reward, "trust")
        check_numbers(threshold=self.threshold, decay=1 if self.decay is None else self.decay)
        if min(self.weights.values()) <= 0 or (self.decay is not None and self.decay <= 0):
            raise ValueError(
                f"got trust with weights {dict(self.weights)} and decay {self.decay}, expected numbers above 0. "
                "Correct them, or leave decay out."
            )
        verified, learned = (f"{self.weights[name]:g} {self.rewards[name].spec.name}" for name in TRUSTED)
        spec = combined_spec(f"{verified} + trusted {learned}", self.rewards)
        scope: Scope = "set" if spec.scope == "set" else "group"
        object.__setattr__(self, "spec", replace(spec, version=f"{spec.version}; {settings(self)}", scope=scope))

    def at(self, update: int | None) -> Trust:
        """The reward as it stands at an update, see ``schedule.at``."""
        return replace(self, rewards=all_at(self.rewards, update), update=update)

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; ``parts["trust"]`` is the weight of the learned reward."""
        found = score_parts(self.rewards, self.rewards, images, prompts, metadata, groups)
        verified, learned = found.results["verified"].values.double(), found.results["learned"].values.double()
        trust = trust_weights(verified >= self.threshold, learned, group_index(groups, prompts), ~verified.isnan())
        if self.decay is not None:
            # outside of training there is no update; the reward is then that of the end, verified alone
            trust = trust * (0.0 if self.update is None else math.exp(-self.update / self.decay))
        values = self.weights["verified"] * verified + self.weights["learned"] * trust * learned
        return RewardResult(values.float(), found.parts | {"trust": trust.float()}, found.reasons)


def trust_weights(good: Tensor, learned: Tensor, groups: Tensor, judged: Tensor) -> Tensor:
    """``min(1, exp(mean of the good - mean of the bad))`` of each image's group, in (0, 1]; 1 where either is empty.

    Args:
        good: (N,) bool. learned: (N,), NaN is left out. groups: (N,) integers. judged: (N,) bool, others are left out.
    """
    weights = torch.ones_like(learned)
    known = judged & ~learned.isnan()
    for group in groups.unique():
        mine = groups == group
        right, wrong = learned[mine & known & good], learned[mine & known & ~good]
        if len(right) and len(wrong):
            weights[mine] = (right.mean() - wrong.mean()).exp().clamp(max=1)
    return weights


# --- what all of them share -------------------------------------------------------------------------------------------


def group_index(groups: Tensor | None, prompts: list[str]) -> Tensor:
    """(N,) group numbers; where they are not given, images of equal prompts are a group."""
    if groups is not None:
        return groups.cpu()
    places: dict[str, int] = {}
    return torch.tensor([places.setdefault(prompt, len(places)) for prompt in prompts], dtype=torch.long)


def settings(reward: Any, **instead: Any) -> str:
    """The options of a reward that is made of others, for its version: two that differ in one are not comparable.

    instead: what to say of an option in place of its value.
    """
    names = [f.name for f in fields(reward) if f.name not in MADE_OF]
    return ", ".join(f"{name} {instead.get(name, getattr(reward, name))}" for name in names)


def check_numbers(**given: Any) -> None:
    """ValueError for what is no finite number."""
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"got {name}: {value!r}, expected a finite number. Correct it.")


def check_whole_numbers(**given: Any) -> None:
    """ValueError for what is no whole number."""
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"got {name}: {value!r}, expected a whole number. Correct it.")


def _used(weights: Mapping[str, float]) -> list[str]:
    return [name for name, weight in weights.items() if weight]


def _check_direction(name: str, reward: Reward, rule: str) -> None:
    if not reward.spec.higher_is_better:
        raise ValueError(
            f"got {name!r}, of which less is better, in a {rule}, expected rewards of which more is better. Turn it "
            "round: {transform: scale, divide: -1, of: ...}."
        )


def _check_plain_weights(weights: Mapping[str, float], rule: str) -> None:
    if any(weight != 1 for weight in weights.values()):
        raise ValueError(f"got weights {dict(weights)} in a {rule}, which has none. Leave them out.")


def _say(threshold: Any) -> str:
    schedule = Schedule.read(threshold)
    return "->".join(f"{value:g}" for value in schedule.values)
