"""What moves from update to update: windows, splits and intervals as pure functions of the number of the update.

Nothing here has a state, so a resumed run continues where it was. Updates count from 0, steps from 0 (noise) upwards.

    Window        where the stochastic window of steps lies    MixGRPO, arXiv 2507.21802; TreeGRPO, 2512.08153
    backward      length of an interval that ends at the data and grows towards the noise   B2-DiffuRL, 2503.11240
    moving_steps  splits that move from early to late          TMPO, 2605.10983
    shallower     depths that are not trained, moving up       BranchGRPO, 2509.06040

Where `Window` differs from MixGRPO's code: windows always have their full size (there they shrink at the end of the
range); the random start follows from a key, not from a process's generator; of its two ways to shorten the interval
only the exponential one, the paper's, is here. TreeGRPO stops with an error past the last window, here `at_end` says
what happens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from samplers.keys import Key

MOVES = ("progressive", "random", "frozen")
ENDS = ("restart", "stop")


@dataclass(frozen=True)
class Window:
    """A window of `size` steps inside the steps [low, high), and how it moves.

    move: "progressive" (from low towards high, `stride` steps at a time), "random" (drawn anew for each update) or
    "frozen" (at low). every: updates at one position; with decay > 0 only
    ceil(every exp(-decay max(0, start - decay_from))) of them, so that the window hurries through late steps.
    at_end: "restart" at low, or "stop" at the last position.
    MixGRPO: size 4, every 25, stride 1, restart; decay 0.1, decay_from 13. Its Flash* variant is frozen.
    TreeGRPO: size 4, every 50.

    Raises ValueError for a window that does not fit and for other impossible settings.
    """

    size: int
    high: int
    low: int = 0
    move: str = "progressive"
    every: int = 25
    stride: int = 1
    at_end: str = "restart"
    decay: float = 0.0
    decay_from: int = 13

    def __post_init__(self) -> None:
        if not (self.size >= 1 and 0 <= self.low <= self.high - self.size):
            expected = f"1 <= size <= {self.high - self.low}, the length of the range"
            raise _bad(f"size {self.size} in the steps [{self.low}, {self.high})", expected, "Shrink the window.")
        if self.every < 1 or self.stride < 1:
            raise _bad(f"every {self.every}, stride {self.stride}", "at least 1", "Use move='frozen' to stand still.")
        if not 0 <= self.decay < math.inf:
            raise _bad(f"decay {self.decay}", "a number >= 0", "0 keeps the interval.")
        for name, value, allowed in (("move", self.move, MOVES), ("at_end", self.at_end, ENDS)):
            if value not in allowed:
                raise _bad(f"{name} '{value}'", f"one of {list(allowed)}", "Check the spelling.")

    @property
    def positions(self) -> range:
        """The starts that the window takes, first to last."""
        if self.move == "frozen":
            return range(self.low, self.low + 1)
        return range(self.low, self.high - self.size + 1, self.stride)

    def interval(self, start: int) -> int:
        """Updates that a progressive window spends at this start, at least 1."""
        return math.ceil(self.every * math.exp(-self.decay * max(0, start - self.decay_from)))

    def start(self, update: int, seed: int = 0) -> int:
        """First step of the window in this update; seed matters for "random" only."""
        positions = self.positions
        if self.move == "random":
            return positions[Key(seed, "window", update, "", 0, None).integer(0, len(positions))]
        intervals = [self.interval(start) for start in positions]
        if self.at_end == "restart":
            update %= sum(intervals)
        for start, interval in zip(positions, intervals, strict=True):
            if update < interval:
                return start
            update -= interval
        return positions[-1]

    def steps(self, update: int, seed: int = 0) -> tuple[int, int]:
        """(start, end) of the window in this update: the steps [start, end)."""
        start = self.start(update, seed)
        return start, start + self.size


def backward(update: int, updates: int, first: int, last: int) -> int:
    """Length of an interval that ends at the last step, in an update of `updates`: from `first` to `last` steps.

    first + floor(update (last - first + 1) / updates), `last` from then on. B2-DiffuRL: 14 to 20 over 100 updates.
    """
    if not 1 <= first <= last or updates < 1:
        got = f"first {first}, last {last}, updates {updates}"
        raise _bad(got, "1 <= first <= last and updates >= 1", "Let the interval grow.")
    return min(last, first + update * (last - first + 1) // updates)


def moving_steps(update: int, updates: int, early: Sequence[int], late: Sequence[int]) -> tuple[int, ...]:
    """Steps on the way from `early` to `late`, each in a straight line over `updates` updates, rounded.

    TMPO on FLUX: (1, 2, 3) to (1, 3, 5). Both must rise and have equal lengths; then every result rises.
    """
    for name, steps in (("early", early), ("late", late)):
        if list(steps) != sorted(set(steps)) or len(early) != len(late) or not steps:
            got = f"early {list(early)} and late {list(late)}"
            raise _bad(got, f"{name} to rise, in as many steps as the other", "List the steps in order.")
    progress = min(1.0, update / updates) if updates > 0 else 1.0
    return tuple(math.floor(a + progress * (b - a) + 0.5) for a, b in zip(early, late, strict=True))


def shallower(update: int, depths: Sequence[int], every: int, stop: int) -> tuple[int, ...]:
    """Depths that move up by one every `every` updates until the first of them is `stop`. BranchGRPO: 15 to 18, 30."""
    if not depths or every < 1 or stop > min(depths):
        got = f"depths {list(depths)}, every {every}, stop {stop}"
        raise _bad(got, "depths, every >= 1 and a stop at or above the first of them", "Lower the stop.")
    shift = min(update // every, min(depths) - stop)
    return tuple(depth - shift for depth in depths)


def _bad(got: str, expected: str, fix: str) -> ValueError:
    return ValueError(f"curriculum: got {got}; expected {expected}. {fix}")
