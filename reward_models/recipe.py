"""The grammar in which a config says how rewards are put together. Read without loading any of them.

    REWARD  = name                                            "shapes", "module:attribute", a URL, a folder
            | {LABEL: ENTRY, ...}                             weighted sum of raw values
            | {combine: RULE, of: {LABEL: ENTRY, ...}, option: value, ...}
            | {transform: KIND, of: REWARD, option: value, ...}
    ENTRY   = weight                                          the label is the reward's name
            | {weight: w, option: value, ...}                 the same with options of the reward
            | {weight: w, reward: REWARD, option: value, ...}            the label is free, but is no import path or URL
            | {weight: w, combine: ...} | {weight: w, transform: ...}    the same, written in place

Under ``combine`` a weight may be left out and is then 1, ``of`` may be a list of names, and an entry may be a name
(``{value: tiny-clip, gate: shapes}``). Options are those of the classes in ``combine``, ``shaping`` and ``regions``.
Any key beside these is an error that suggests the nearest one.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .combine import RULES, Combined, Gate, Trust
from .detectors import load_detector
from .geneval import Detector
from .mixture import WeightedSum
from .protocol import Reward, RewardSpec
from .regions import Hierarchy, Regional
from .shaping import transforms

# what is asked of the labels of `of`: (needed, all that are known), or None for free ones
LABELS: dict[str, tuple[set[str], set[str]]] = {
    "gate": ({"value", "gate"}, {"value", "gate"}),
    "trust": ({"verified", "learned"}, {"verified", "learned"}),
    "hierarchy": (set(), {"global", "subject", "relation"}),
    "regional": ({"global", "local"}, {"global", "local"}),
}
SPECIAL: dict[str, Callable[..., Reward]] = {
    "gate": Gate,
    "trust": Trust,
    "hierarchy": Hierarchy,
    "regional": Regional,
}
COMBINATIONS = ("sum", *RULES, *SPECIAL)
OURS = {"rewards", "weights", "reward", "rule", "update", "spec"}  # parameters that no option may name


@dataclass(frozen=True)
class Named:
    """One reward by name, with its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Combination:
    """Rewards under a rule: label -> (reward, weight)."""

    rule: str
    parts: Mapping[str, tuple[Node, float]]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Transformation:
    """A reward made into another."""

    kind: str
    of: Node
    options: Mapping[str, Any]


Node = Named | Combination | Transformation


def parse(spec: Any, options: Mapping[str, Any] | None = None) -> Node:
    """Read a reward specification.

    Args:
        spec: see the grammar above. options: of a reward that is given by name.

    Raises:
        ValueError: it does not follow the grammar; the message shows the place.
    """
    if isinstance(spec, str):
        return Named(spec, dict(options or {}))
    if not isinstance(spec, Mapping):
        raise ValueError(
            f"got reward {spec!r} of type {type(spec).__name__}, expected a name, 'module:attribute' or a mapping "
            "{name: weight}. See `flowrl list`."
        )
    if options:
        raise ValueError(
            f"got options {dict(options)} beside a mapping of rewards, expected them inside it. Move them."
        )
    if "combine" in spec:
        return _combination(spec)
    if "transform" in spec:
        return _transformation(spec)
    if not spec:
        raise ValueError("got an empty mapping, expected at least one reward, as in {shapes: 1.0}. Name one.")
    return Combination("sum", {label: _entry(label, entry) for label, entry in spec.items()}, {})


def _combination(spec: Mapping[str, Any]) -> Combination:
    rule = spec["combine"]
    if rule not in COMBINATIONS:
        raise ValueError(
            f"got combine: {rule!r}, expected one of {', '.join(COMBINATIONS)}.{_near(rule, COMBINATIONS)}"
        )
    options = _options(spec, f"combine: {rule}", "combine", SPECIAL.get(rule))
    of = spec["of"]
    if isinstance(of, list | tuple) and len(set(map(str, of))) == len(of):
        of = {str(name): 1.0 for name in of}
    if not isinstance(of, Mapping) or not of:
        raise ValueError(f"got of: {of!r} in combine: {rule}, expected rewards as {{name: weight}} or a list of names.")
    needed, known = LABELS.get(rule, (set(), set(of)))
    for label in [*(label for label in of if label not in known), *(label for label in needed if label not in of)]:
        raise ValueError(
            f"got {sorted(map(str, of))} in combine: {rule}, expected {' and '.join(sorted(known))}."
            f"{_near(label, known)}"
        )
    parts = {label: _entry(label, entry, weight=1.0, named=rule not in LABELS) for label, entry in of.items()}
    return Combination(rule, parts, options)


def _transformation(spec: Mapping[str, Any]) -> Transformation:
    kind, known = spec["transform"], transforms()
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"got transform: {kind!r}, expected one of {', '.join(known)}.{_near(kind, known)}")
    options = _options(spec, f"transform: {kind}", "transform", known[kind])
    return Transformation(kind, parse(spec["of"]), options)


def _entry(label: Any, entry: Any, weight: float | None = None, named: bool = True) -> tuple[Node, float]:
    """One part and its weight. ``weight``: where none is given, None: it must be. ``named``: the label may be a name"""
    asked = f"{label}: 1.0 or {label}: {{weight: 1.0, option: value}}."
    if not isinstance(label, str):
        raise ValueError(f"got {label!r} as the name of a reward, expected a text. Put it in quotes.")
    if isinstance(entry, str) and weight is not None:
        return parse(entry), weight
    given = dict(entry) if isinstance(entry, Mapping) else {"weight": entry}
    number = given.pop("weight", weight)
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"got {entry!r} for reward {label!r}, expected a weight. Give a finite weight: {asked}")
    if "combine" in given or "transform" in given:
        return parse(given), float(number)
    if "reward" in given:
        if ":" in label:  # an import path or URL: which of the two is meant?
            raise ValueError(
                f"got reward: {given['reward']!r} for {label!r}, a reward itself, expected a free label beside it. "
                "Choose another label, or name an option of your class differently."
            )
        return parse(given.pop("reward"), given), float(number)
    if not named:
        raise ValueError(
            f"got {entry!r} for {label!r}, which is no reward's name here, expected one. Write {label}: name, or "
            f"{label}: {{reward: name, option: value}}."
        )
    return parse(label, given), float(number)


def _options(spec: Mapping[str, Any], where: str, head: str, target: Callable[..., Any] | None) -> dict[str, Any]:
    """What stands beside `of`, if the target has parameters of these names."""
    known = set() if target is None else set(inspect.signature(target).parameters) - OURS
    if "of" not in spec:
        raise ValueError(f"got {dict(spec)} without of, expected the reward of {where}. Add of: ...")
    options = {key: value for key, value in spec.items() if key not in (head, "of")}
    for key in options:
        if key not in known:
            raise ValueError(
                f"got {key!r} beside {where}, expected {', '.join(['of', *sorted(known)])}.{_near(key, {'of', *known})}"
            )
    if target is not None:
        empty = inspect.Parameter.empty
        for name, parameter in inspect.signature(target).parameters.items():
            if name not in OURS | set(options) and parameter.default is empty:
                raise ValueError(f"got {where} without {name}, which it needs. Add {name}: ...")
    return options


def _near(word: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else " Use one of these."


def names(node: Node) -> Iterator[str]:
    """The names of all rewards in it, in the order in which they are written."""
    return (each.name for each in named(node))


def named(node: Node) -> Iterator[Named]:
    """All rewards in it by name and options, in the order in which they are written."""
    if isinstance(node, Named):
        yield node
    elif isinstance(node, Transformation):
        yield from named(node.of)
    else:
        for part, _ in node.parts.values():
            yield from named(part)


def build(node: Node, load: Callable[[Named], Reward], device: str | torch.device = "cpu") -> Reward:
    """The reward object.

    Args:
        node: what to build. load: makes a reward of a name and its options. device: where detectors compute.

    Raises:
        ValueError: options or weights that do not fit, no such detector; what ``load`` raises.
    """
    return _build(node, load, lambda detector: load_detector(detector, device))


def _build(node: Node, load: Callable[[Named], Reward], find: Callable[[str | Detector], Detector]) -> Reward:
    """See ``build``. find: makes a detector of its name."""
    if isinstance(node, Named):
        return load(node)
    if isinstance(node, Transformation):
        return transforms()[node.kind](_build(node.of, load, find), **node.options)
    rewards = {label: _build(part, load, find) for label, (part, _) in node.parts.items()}
    weights = {label: weight for label, (_, weight) in node.parts.items()}
    if node.rule == "sum":
        return WeightedSum(rewards, weights)
    if not any(weights.values()):
        raise ValueError(f"got only zero weights for {sorted(weights)}, expected at least one other. Set a weight.")
    if node.rule in RULES:
        return Combined(rewards, weights, node.rule)
    options = dict(node.options)
    if options.get("detector") is not None:
        options["detector"] = find(options["detector"])
    return SPECIAL[node.rule](rewards, weights, **options)


def check(node: Node) -> None:
    """Build it from stand-ins: finds bad options and weights before anything is loaded.

    What depends on the rewards themselves (whether their values may be negative, say) is seen when they are loaded.

    Raises:
        ValueError: see ``build``.
    """

    def stand_in(named: Named) -> Reward:
        return _StandIn(RewardSpec(named.name, range=(0.0, 1.0)))

    _build(node, stand_in, lambda detector: _Blind() if isinstance(detector, str) else detector)


@dataclass(frozen=True)
class _StandIn:
    spec: RewardSpec

    def score(self, images: Any, prompts: Any, metadata: Any, groups: Any = None) -> Any:
        raise NotImplementedError("a stand-in scores nothing")


class _Blind:
    classes: tuple[str, ...] = ()

    def detect(self, images: Any) -> Any:
        raise NotImplementedError("a stand-in sees nothing")
