"""What moves from update to update: windows, splits and intervals as pure functions of the number of the update.

Nothing here has a state, so a resumed run continues where it was. Updates count from 0, steps from 0 (noise) upwards.

    Window           where the stochastic window of steps lies    MixGRPO, arXiv 2507.21802; TreeGRPO, 2512.08153
    backward         length of an interval that ends at the data and grows towards the noise   B2-DiffuRL, 2503.11240
    moving_steps     splits that move from early to late          TMPO, 2605.10983
    scattered_steps  splits drawn around given places             TMPO
    success_steps    splits drawn early where the policy is good  TMPO
    chosen_steps     a random subset of the steps                 DanceGRPO, 2505.07818
    shallower        depths that are not trained, moving up       BranchGRPO, 2509.06040
    ramp             a number that moves in a straight line       TMPO's beta

Where they differ from the published codes. Windows always have their full size (MixGRPO's shrink at the end of the
range). What is random follows from a key, not from a process's generator. TreeGRPO stops with an error past the last
window, here `at_end` says what happens. Splits that are drawn too close to each other or to the end are moved apart
inside their range; TMPO's move on and are then cut off at the end, where two may coincide. DanceGRPO chooses steps for
each image, here they are one choice per update, as the plan is.
"""

from __future__ import annotations

import math
import random
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
    ceil(every exp(-decay max(0, start - decay_from))) of them, so that the window hurries through late steps; or, with
    `least`, floor(every + (least - every) (start - low) / (high - low)): a straight line to `least` at the range's end.
    at_end: "restart" at low, or "stop" at the last position.
    MixGRPO: size 4, every 25, stride 1, restart; decay 0.1, decay_from 13, or least every // 4. Its Flash* variant is
    frozen.
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
    least: int | None = None

    def __post_init__(self) -> None:
        if not (self.size >= 1 and 0 <= self.low <= self.high - self.size):
            expected = f"1 <= size <= {self.high - self.low}, the length of the range"
            raise _bad(f"size {self.size} in the steps [{self.low}, {self.high})", expected, "Shrink the window.")
        if self.every < 1 or self.stride < 1:
            raise _bad(f"every {self.every}, stride {self.stride}", "at least 1", "Use move='frozen' to stand still.")
        if not 0 <= self.decay < math.inf:
            raise _bad(f"decay {self.decay}", "a number >= 0", "0 keeps the interval.")
        if self.least is not None and not 1 <= self.least <= self.every:
            raise _bad(f"least {self.least}", f"1 to {self.every}, the updates at the first position", "Lower it.")
        if self.least is not None and self.decay:
            raise _bad(f"least {self.least} beside decay {self.decay}", "one of the two", "They are two ways to decay.")
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
        if self.least is not None:
            length = self.high - self.low  # in integers: a float below a whole number would lose an update
            return (self.every * length - (self.every - self.least) * (start - self.low)) // length
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


def scattered_steps(
    places: Sequence[int], concentration: float, low: int, high: int, gap: int, key: Key
) -> tuple[int, ...]:
    """Steps drawn around `places`, in [low, high] and at least `gap` apart; one draw for each, sorted.

    low + (high - low) Beta(kappa m, kappa (1 - m)), rounded, m = (place - low) / (high - low) kept off 0 and 1 by
    0.001: the mean is the place, and the larger the concentration kappa the nearer they are. TMPO on FLUX: 6.
    """
    _check_draw(len(places), concentration, low, high, gap)
    if not all(low <= place <= high for place in places):
        raise _bad(f"splits around {list(places)}", f"places in [{low}, {high}]", "Widen the range or move them.")
    means = [min(max((place - low) / max(high - low, 1), 1e-3), 1 - 1e-3) for place in places]
    fractions = [_beta(m * concentration, (1 - m) * concentration, key, i) for i, m in enumerate(means)]
    return _apart([math.floor(low + f * (high - low) + 0.5) for f in fractions], low, high, gap)


def success_steps(
    count: int, success: float, concentration: float, low: int, high: int, gap: int, key: Key
) -> tuple[int, ...]:
    """`count` steps in [low, high] and at least `gap` apart, that are late while success is low.

    floor(low + (high - low) Beta(1 + (1 - a) kappa, 1 + a kappa)) with success a in [0, 1] and concentration kappa,
    which is uniform at 0; sorted. TMPO on SD3: three of 28 steps, 4, low 2, high 24, gap 3.
    """
    _check_draw(count, concentration, low, high, gap)
    if not 0 <= success <= 1:
        raise _bad(f"success {success}", "a number in [0, 1]", "Normalise the reward.")
    a, b = 1 + (1 - success) * concentration, 1 + success * concentration
    return _apart([math.floor(low + _beta(a, b, key, i) * (high - low)) for i in range(count)], low, high, gap)


def _beta(a: float, b: float, key: Key, number: int) -> float:
    return random.Random(key._replace(step=number).seed64()).betavariate(a, b)


def _check_draw(count: int, concentration: float, low: int, high: int, gap: int) -> None:
    if count < 1 or gap < 1 or low < 0 or low + (count - 1) * gap > high:
        got = f"{count} steps, {gap} apart, in [{low}, {high}]"
        raise _bad(got, f"room for them, a high of at least {low + (max(count, 1) - 1) * gap}", "Widen the range.")
    if not 0 < concentration < math.inf:
        raise _bad(f"concentration {concentration}", "a number > 0", "4 to 6 are usual.")


def _apart(steps: Sequence[int], low: int, high: int, gap: int) -> tuple[int, ...]:
    """The steps in order, moved on where they are less than `gap` apart, and back where they then leave [low, high]."""
    found: list[int] = []
    for step in sorted(steps):
        found.append(max(step, found[-1] + gap) if found else max(step, low))
    last = len(found) - 1
    return tuple(min(step, high - (last - i) * gap) for i, step in enumerate(found))


def chosen_steps(update: int, seed: int, count: int, steps: int) -> tuple[int, ...]:
    """`count` of the steps [0, steps), drawn anew for each update, in order. DanceGRPO: 9 of 15."""
    if not 1 <= count <= steps:
        raise _bad(f"{count} of {steps} steps", f"1 to {steps}", "Train fewer of them, or take more steps.")
    key = Key(seed, "trained steps", update, "", 0, None)
    order = sorted(range(steps), key=lambda step: key._replace(step=step).seed64())
    return tuple(sorted(order[:count]))


def ramp(update: int, first: float, last: float, over: int) -> float:
    """From `first` at update 0 in a straight line to `last` at update `over`, `last` from then on."""
    if over < 1:
        raise _bad(f"over {over}", "at least 1 update", "Give the number of updates.")
    return first + (last - first) * min(1.0, update / over)


def shallower(update: int, depths: Sequence[int], every: int, stop: int) -> tuple[int, ...]:
    """Depths that move up by one every `every` updates until the first of them is `stop`. BranchGRPO: 15 to 18, 30."""
    if not depths or every < 1 or stop > min(depths):
        got = f"depths {list(depths)}, every {every}, stop {stop}"
        raise _bad(got, "depths, every >= 1 and a stop at or above the first of them", "Lower the stop.")
    shift = min(update // every, min(depths) - stop)
    return tuple(depth - shift for depth in depths)


def _bad(got: str, expected: str, fix: str) -> ValueError:
    return ValueError(f"curriculum: got {got}; expected {expected}. {fix}")
