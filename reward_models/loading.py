"""From what a config says about rewards to reward objects."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .mixture import WeightedSum
from .protocol import Metadata, Reward, RewardError, RewardResult, RewardSpec, as_result

# name -> (what it is, class, fixed arguments); classes are imported on use, as some need heavy libraries
BUILT_IN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "shapes": (
        "GenEval's official decision on Shapes images, 0 or 1",
        "shapes.reward:ShapesReward",
        {"kind": "shapes"},
    ),
    "shapes-strict": ("the same with exact counts, 0 or 1", "shapes.reward:ShapesReward", {"kind": "shapes-strict"}),
    "shapes-soft": (
        "how much of the prompt is right, at most 1",
        "shapes.reward:ShapesReward",
        {"kind": "shapes-soft"},
    ),
    "jpeg": ("compressibility: minus the JPEG size in kB / 500", "rules:JpegReward", {"incompressible": False}),
    "jpeg-incompress": ("incompressibility: the JPEG size in kB", "rules:JpegReward", {"incompressible": True}),
    "tiny-clip": ("cosine of image and prompt in the box's CLIP model", "clip_score:ClipScore", {"path": "tiny-clip"}),
    "clip": ("the same with any CLIPModel folder: {clip: {weight: 1, path: FOLDER}}", "clip_score:ClipScore", {}),
}


def names() -> dict[str, str]:
    """Names of the built-in rewards, each with one line about it."""
    return {name: about for name, (about, *_) in BUILT_IN.items()}


def load(
    spec: str | Mapping[str, float | Mapping[str, Any]], device: str | torch.device = "cpu", **options: Any
) -> Reward:
    """Build the reward that a config asks for.

    Args:
        spec: one of
            a built-in name (see ``names()``);
            ``"module:attribute"`` or ``"file.py:attribute"``: a function ``(images, prompts, metadata)`` that returns
            N numbers (None: missing) or a ``RewardResult``, or a class whose ``score`` does the same. Either may have a
            parameter ``groups`` besides;
            a mapping ``{name: weight}`` or ``{name: {weight: w, option: value, ...}}``: the weighted sum.
        device: where learned rewards compute.
        options: passed to the reward (single names only).

    Raises:
        ValueError: unknown name (the nearest is suggested), import path that leads nowhere, bad options or weights.
        RewardError: a user's module or class raised while it was being loaded.
    """
    if isinstance(spec, Mapping):
        return _load_sum(spec, device)
    if not isinstance(spec, str):
        raise ValueError(
            f"got reward {spec!r} of type {type(spec).__name__}, expected a name, 'module:attribute' or a mapping "
            "{name: weight}. See `flowrl list`."
        )
    if ":" in spec:
        return _load_user(spec, device, options)
    if spec not in BUILT_IN:
        near = difflib.get_close_matches(spec, BUILT_IN, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]!r}?" if near else "For a function of your own write 'module:function'."
        raise ValueError(f"got unknown reward {spec!r}, expected one of {', '.join(BUILT_IN)}. {hint}")
    _, where, fixed = BUILT_IN[spec]
    module, _, name = where.partition(":")
    target = functools.partial(getattr(importlib.import_module(f".{module}", __package__), name), **fixed)
    return target(**_checked_options(spec, target, device, options))


def _load_sum(spec: Mapping[str, float | Mapping[str, Any]], device: str | torch.device) -> WeightedSum:
    rewards: dict[str, Reward] = {}
    weights: dict[str, float] = {}
    for name, entry in spec.items():
        options = dict(entry) if isinstance(entry, Mapping) else {"weight": entry}
        weight = options.pop("weight", None)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(
                f"got {entry!r} for reward {name!r}, expected a weight. Write {name}: 1.0 or {name}: "
                "{weight: 1.0, option: value}."
            )
        rewards[name], weights[name] = load(name, device, **options), float(weight)
    return WeightedSum(rewards, weights)


def _checked_options(
    name: str, target: Callable[..., Any], device: str | torch.device, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options with which to build a reward: the given ones, and the device where one is wanted.

    Raises:
        ValueError: the target takes no such options, or needs others.
    """
    signature = inspect.signature(target)
    wanted = {"device": device, **options} if "device" in signature.parameters else dict(options)
    try:
        signature.bind(**wanted)
    except TypeError as error:
        raise ValueError(
            f"got options {wanted} for reward {name!r}, expected those of {signature} ({error}). Correct them."
        ) from error
    return wanted


def _load_user(spec: str, device: str | torch.device, options: dict[str, Any]) -> Reward:
    where, _, attribute = spec.rpartition(":")
    module = _import(where, spec)
    target = getattr(module, attribute, None)
    if target is None:
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Define {attribute!r} there."
        raise ValueError(f"got reward {spec!r}, expected {where!r} to hold {attribute!r}, which it does not. {hint}")
    if inspect.isclass(target):
        options = _checked_options(spec, target, device, options)
        try:
            target = target(**options)
        except Exception as error:  # a user's constructor may raise anything; it is reported under the reward's name
            raise RewardError(f"reward {spec!r} raised {type(error).__name__} while it was built: {error}") from error
        options = {}
    scorer = getattr(target, "score", target)
    if not callable(scorer):
        raise ValueError(
            f"got reward {spec!r}, which is neither a function nor a class with a method score(). Give one of these."
        )
    if isinstance(target, Reward) and isinstance(target.spec, RewardSpec):
        return target
    return UserReward(spec, scorer, options)


def _run_file(path: Path) -> ModuleType:
    found = importlib.util.spec_from_file_location(f"user_reward_{path.stem}", path)
    assert found is not None and found.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look their module up; the prefix keeps it from hiding another one
    found.loader.exec_module(module)
    return module


def _import(where: str, spec: str) -> ModuleType:
    load_module: Callable[[], ModuleType]
    if where.endswith(".py"):
        path = Path(where).expanduser().resolve()
        if not path.is_file():
            raise ValueError(f"got reward {spec!r}, but there is no file {where!r}. Correct the path.")
        load_module = functools.partial(_run_file, path)
    else:
        if not {"", str(Path.cwd())} & set(sys.path):
            sys.path.append(str(Path.cwd()))  # a console script does not look into the current folder by itself
        load_module = functools.partial(importlib.import_module, where)
    try:
        return load_module()
    except ModuleNotFoundError as error:
        if error.name is None or not (where == error.name or where.startswith(error.name + ".")):
            raise RewardError(f"reward {spec!r} needs {error.name!r}, which is not installed. Install it.") from error
        raise ValueError(
            f"got reward {spec!r}, but there is no module {where!r}. Run from the folder that holds it, install it, or "
            "write 'path/to/file.py:function'."
        ) from error
    except Exception as error:  # whatever a user's module raises on import is reported under the reward's name
        raise RewardError(f"reward {spec!r}: importing it raised {type(error).__name__}: {error}") from error


class UserReward:
    """A user's function, or the ``score`` of a user's object without a spec, as a reward.

    Args:
        name: its import path.
        function: ``(images, prompts, metadata)`` and, if it has a parameter of this name, ``groups``; returns N numbers
            or a RewardResult.
        options: further keyword arguments of the function.

    Raises:
        ValueError: it cannot be called like that.
    """

    def __init__(self, name: str, function: Callable[..., Any], options: Mapping[str, Any] | None = None) -> None:
        self.function, self.options = function, dict(options or {})
        self.spec = RewardSpec(name=name, version="user")
        signature = inspect.signature(function)
        self._takes_groups = "groups" in signature.parameters
        try:
            signature.bind(None, None, None, **self._keywords(None))
        except TypeError as error:
            raise ValueError(
                f"got reward {name!r} with parameters {signature} and options {self.options}, expected "
                f"(images, prompts, metadata) and parameters for all options ({error}). Give it these."
            ) from error

    def _keywords(self, groups: Tensor | None) -> dict[str, Any]:
        return {"groups": groups, **self.options} if self._takes_groups else self.options

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``."""
        answer = self.function(images, prompts, metadata, **self._keywords(groups))
        return as_result(answer, len(images), self.spec.name)
