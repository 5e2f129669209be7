"""Numbers that change while a policy trains, and how a reward learns which update it is.

A reward that depends on the update has a method ``at(update)`` that returns the reward as it stands at that update, and
changes nothing in itself: the reward of an update is a function of its number, so a resumed run needs no state of it.
Trainers call ``at(reward, update)`` before they score; evaluations do not, and get the last value of every schedule.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .protocol import Reward


def at(reward: Reward, update: int | None) -> Reward:
    """The reward as it stands at an update (0 is the first; None: after the last); itself if it never changes."""
    method = getattr(reward, "at", None)
    return reward if method is None else method(update)


def all_at(rewards: Mapping[str, Reward], update: int | None) -> dict[str, Reward]:
    """Each of several rewards as it stands at an update."""
    return {name: at(reward, update) for name, reward in rewards.items()}


@dataclass(frozen=True)
class Schedule:
    """A number by update: ``values[i]`` from update ``updates[i]`` on.

    Args:
        updates: rising numbers >= 0; before the first of them its value holds already.
        values: one finite number for each.
        between: "step" stays until the next, "linear" goes straight to it.

    Raises:
        ValueError: anything else.
    """

    updates: tuple[int, ...]
    values: tuple[float, ...]
    between: Literal["step", "linear"] = "step"

    def __post_init__(self) -> None:
        whole = all(isinstance(u, int) and not isinstance(u, bool) and u >= 0 for u in self.updates)
        rising = whole and all(a < b for a, b in zip(self.updates, self.updates[1:], strict=False))
        if not rising or not self.updates or len(self.values) != len(self.updates):
            raise ValueError(
                f"got a schedule of updates {list(self.updates)} with values {list(self.values)}, expected rising "
                "whole numbers from 0 on, and one value for each. Write {updates: [0, 100], values: [0.3, 0.5]}."
            )
        for value in self.values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"got {value!r} among the values of a schedule, expected finite numbers. Correct it.")
        if self.between not in ("step", "linear"):
            raise ValueError(f"got between: {self.between!r} in a schedule, expected step or linear. Use one of these.")

    @staticmethod
    def read(given: Any) -> Schedule:
        """From a number, a mapping ``{updates:, values:, between:}`` or a schedule.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(given, Schedule):
            return given
        if isinstance(given, int | float) and not isinstance(given, bool):
            return Schedule((0,), (float(given),))
        keys = {"updates", "values", "between"}
        if not isinstance(given, Mapping) or not {"updates", "values"} <= set(given) <= keys:
            raise ValueError(
                f"got {given!r}, expected a number or a schedule. Write 0.5, or {{updates: [0, 100], "
                "values: [0.3, 0.5], between: step}."
            )
        lists = [given["updates"], given["values"]]
        if not all(isinstance(one, list | tuple) for one in lists):
            raise ValueError(f"got the schedule {given!r}, expected lists of updates and values. Write [...] for both.")
        return Schedule(tuple(lists[0]), tuple(lists[1]), given.get("between", "step"))

    def at(self, update: int | None) -> float:
        """The value at an update; None: the last."""
        if update is None or update >= self.updates[-1]:
            return float(self.values[-1])
        i = bisect.bisect_right(self.updates, update) - 1
        if i < 0:
            return float(self.values[0])
        if self.between == "step":
            return float(self.values[i])
        share = (update - self.updates[i]) / (self.updates[i + 1] - self.updates[i])
        return float(self.values[i] + share * (self.values[i + 1] - self.values[i]))
