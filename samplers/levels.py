"""Noise levels as functions of the step and of the depth in the tree.

A level function gives the level h of a noisy step; the kernel's table in `kernels` turns it into the step's std. The
level is part of the step's density, so it must lie in the kernel's range: every function here names its kernel, and
checks its settings when it is made and each value when it is asked for one.

    function        level at step i, depth k                                                 source
    constant        h
    linear_growth   h (1 + growth k / d)                                                     Dynamic-TreeRPO, 2509.23352
    cosine_decay    low + (high - low) (1 + cos(pi p)) / 2,  p = (i - start) / steps         HiCoGen, 2511.19965
    by_split        levels[k]                                                                TMPO, 2605.10983
    reward_driven   clamp(h(i, k) (1 + rise (1 - success) - fall success), low, high)        TMPO
    equal_budget    f h(i, k), with f such that sum h^2 over the noisy steps is that of a reference

i counts denoising steps from 0; k is the number of branching steps (those named in `branch_at`) before step i on the
way from the root. Growth with depth and decay over the steps disagree about where noise belongs; `equal_budget` makes
them comparable. Two schedules are comparable only with the same kernel.

Where these differ from the papers: HiCoGen's cosine runs over the model's time t from T_max to 0, here over the noisy
steps; TMPO's success is an average that its trainer keeps, here the caller gives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from samplers.kernels import get_kernel

Level = float | Callable[[int, int], float]


@dataclass(frozen=True)
class Levels:
    """A level function of one kernel: levels(step, depth) -> h. Values outside the kernel's range are a ValueError.

    kernel: its name. at: (step, depth) -> h, unchecked.
    """

    kernel: str
    at: Callable[[int, int], float] = field(repr=False)

    def __call__(self, step: int, depth: int) -> float:
        level = self.at(step, depth)
        get_kernel(self.kernel).check_level(level, f" at step {step}, depth {depth}")
        return level


def constant(kernel: str, level: float | None = None) -> Levels:
    """The same level everywhere; default that of the kernel."""
    h = _base(kernel, level)
    return Levels(kernel, lambda step, depth: h)


def linear_growth(kernel: str, growth: float, depth: int, level: float | None = None) -> Levels:
    """h (1 + growth k / d): from `level` h (default the kernel's) at the first split, for a tree of `depth` d splits.

    growth 0 is constant; below 0 the level falls.
    """
    if depth < 1:
        raise ValueError(f"linear_growth got a depth of {depth}; expected at least 1. Give the number of splits.")
    base = _base(kernel, level)
    levels = Levels(kernel, lambda step, k: base * (1 + growth * k / depth))
    levels(0, depth - 1)
    return levels


def cosine_decay(kernel: str, high: float, low: float, steps: int, start: int = 0) -> Levels:
    """From `high` at step `start` along half a cosine towards `low`, which step start + steps would have.

    Defined for the steps [start, start + steps). HiCoGen has high = 1.
    """
    if steps < 1:
        raise ValueError(f"cosine_decay got {steps} steps; expected at least 1. Give the number of noisy steps.")
    _base(kernel, high), _base(kernel, low)

    def at(step: int, depth: int) -> float:
        if not start <= step < start + steps:
            raise ValueError(
                f"cosine_decay got step {step}; expected one of {start}..{start + steps - 1}. "
                "Let it begin at the first noisy step and last to the last one."
            )
        return low + (high - low) * (1 + math.cos(math.pi * (step - start) / steps)) / 2

    return Levels(kernel, at)


def by_split(kernel: str, levels: Sequence[float]) -> Levels:
    """levels[k] at depth k: one level per split, first split first. TMPO on SD3: 0.4, 0.7, 1.0 with kernel cps."""
    chosen = tuple(_base(kernel, level) for level in levels)

    def at(step: int, depth: int) -> float:
        if depth >= len(chosen):
            raise ValueError(
                f"got {len(chosen)} levels {list(chosen)} and asked for number {depth + 1} at step {step}; expected "
                "one level per split. Add levels, or let only the splits have noise."
            )
        return chosen[depth]

    return Levels(kernel, at)


def reward_driven(
    levels: Levels, success: float, rise: float = 0.3, fall: float = 0.2, low: float = 0.2, high: float = 1.0
) -> Levels:
    """More noise while rewards are low, less when they are high.

    clamp(levels * (1 + rise (1 - success) - fall success), low, high). success in [0, 1]: how well the policy does, for
    instance a moving average of (mean - worst) / (best - worst) reward; given anew before each update.
    """
    if not 0 <= success <= 1:
        raise ValueError(f"reward_driven got success {success}; expected a number in [0, 1]. Normalise the reward.")
    if low > high:
        raise ValueError(f"reward_driven got low {low} and high {high}; expected low <= high. Swap them.")
    _base(levels.kernel, low), _base(levels.kernel, high)
    factor = 1 + rise * (1 - success) - fall * success
    return Levels(levels.kernel, lambda step, depth: min(high, max(low, factor * levels.at(step, depth))))


def noisy_steps(noisy: Iterable[int], branch_at: Iterable[int] = ()) -> list[tuple[int, int]]:
    """(step, depth) of every noisy step of a tree that branches at `branch_at`, in order: the points of `budget`."""
    splits = set(branch_at)
    return [(step, sum(split < step for split in splits)) for step in sorted(set(noisy))]


def budget(levels: Levels, at: Iterable[tuple[int, int]]) -> float:
    """Sum of the squared levels over the noisy steps (step, depth) of one path."""
    return sum(levels(step, depth) ** 2 for step, depth in at)


def equal_budget(levels: Levels, reference: Levels, at: Sequence[tuple[int, int]]) -> Levels:
    """`levels` times the factor that gives them the `budget` of `reference` over the noisy steps `at`.

    Raises ValueError for levels of two kernels, for levels that are all 0, and where a rescaled level leaves the
    kernel's range.
    """
    if levels.kernel != reference.kernel:
        raise ValueError(
            f"equal_budget got levels of '{levels.kernel}' and a reference of '{reference.kernel}'; expected one "
            "kernel. Levels of different kernels are different amounts of noise."
        )
    own, wanted = budget(levels, at), budget(reference, at)
    if own == 0:
        raise ValueError(
            f"equal_budget got levels with a sum of squares of 0 over {len(at)} steps; expected noise. Raise a level."
        )
    factor = math.sqrt(wanted / own)
    scaled = Levels(levels.kernel, lambda step, depth: factor * levels.at(step, depth))
    for step, depth in at:
        scaled(step, depth)
    return scaled


def deeper(level: Level | None, by: int) -> Level | None:
    """The same levels for a tree whose first `by` splits were taken away: depth k there is k + by here."""
    if isinstance(level, Levels):
        inner = level.at
        return Levels(level.kernel, lambda step, depth: inner(step, depth + by))
    if callable(level):
        function = level
        return lambda step, depth: function(step, depth + by)
    return level


def _base(kernel: str, level: float | None) -> float:
    chosen = get_kernel(kernel).default_level if level is None else float(level)
    get_kernel(kernel).check_level(chosen)
    return chosen
