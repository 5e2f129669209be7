"""What watches a run: alarms of reward hacking, numbers that are not finite, and signals that ask it to end."""

from __future__ import annotations

import math
import os
import signal
import statistics
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from flowrl.errors import GuardStop, UserError
from flowrl.statistics import Estimate

# --- reward hacking -------------------------------------------------------------------------------------------------

REWARD = "reward/mean"
JUDGE = "judge/"
DIVERSITY = "images/diversity"
STATISTICS = ("images/saturation", "images/sharpness", "images/dark_fraction")
SIGNIFICANT = 2.0  # standard errors that a change must exceed to be more than noise
SMALL = 1e-3  # relative changes are taken against at least this, or a statistic near 0 would double by chance


@dataclass(frozen=True)
class Limits:
    """How far things may move while the reward rises.

    Attributes:
        window: updates averaged at each end of the history, >= 2.
        judge_drop: fall of a held-out judge, in standard errors of the change.
        diversity_drop: relative fall of in-group diversity.
        statistic_change: relative change, either way, of saturation, sharpness or dark fraction.
    """

    window: int = 10
    judge_drop: float = 2.0
    diversity_drop: float = 0.3
    statistic_change: float = 0.5

    def __post_init__(self) -> None:
        if self.window < 2:
            raise UserError(f"alarms.window is {self.window}; expected at least 2, or there is no spread to judge by.")


@dataclass(frozen=True)
class Change:
    """A quantity before, how much it changed, and the standard error of that change."""

    before: float
    diff: float
    error: float

    @staticmethod
    def paired(before: float, diff: Estimate) -> Change:
        """From a paired evaluation; ``diff`` is a 95 % interval, 2 x 1.96 standard errors wide."""
        return Change(before, diff.mean, (diff.high - diff.low) / (2 * 1.96))

    @staticmethod
    def between(first: list[float], last: list[float]) -> Change | None:
        """From two windows of independent values, NaN = missing; None where one has fewer than two left."""
        first, last = ([x for x in window if not math.isnan(x)] for window in (first, last))
        if min(len(first), len(last)) < 2:
            return None
        before = statistics.fmean(first)
        error = math.sqrt(statistics.variance(first) / len(first) + statistics.variance(last) / len(last))
        return Change(before, statistics.fmean(last) - before, error)

    def __str__(self) -> str:
        return f"from {self.before:.4g} to {self.before + self.diff:.4g}"


def find_alarms(changes: Mapping[str, Change], limits: Limits) -> dict[str, str]:
    """Name -> sentence for everything that moved beyond its limit while the reward rose; empty where it did not.

    Args:
        changes: by metric name: "reward/mean", "judge/<name>", "images/diversity|saturation|sharpness|dark_fraction".
            Absent ones are not judged.
    """
    reward = changes.get(REWARD)
    if reward is None or not reward.diff > SIGNIFICANT * reward.error:
        return {}
    alarms = {}
    for name, change in changes.items():
        relative = change.diff / max(abs(change.before), SMALL)
        noise = abs(change.diff) <= SIGNIFICANT * change.error
        if name.startswith(JUDGE) and change.diff < -limits.judge_drop * change.error:
            why = f"the held-out judge {name.removeprefix(JUDGE)} fell {change}"
        elif name == DIVERSITY and relative < -limits.diversity_drop and not noise:
            why = f"the diversity of images of one prompt fell {change} (limit {limits.diversity_drop:.0%})"
        elif name in STATISTICS and abs(relative) > limits.statistic_change and not noise:
            label = name.removeprefix("images/").replace("_", " ")
            why = f"{label} went {change} (limit {limits.statistic_change:.0%})"
        else:
            continue
        alarms[name] = f"the reward rose {reward}, but {why}: look at the pictures, the reward may be being hacked"
    return alarms


@dataclass
class Alarms:
    """The alarms of a training run: the last ``window`` updates against the first.

    An alarm is raised when it begins, and again only after it has been silent for a whole window: one that hovers at
    its limit speaks once. `raised` holds all sentences so far, `held` the last update at which each alarm was on.
    """

    limits: Limits = field(default_factory=Limits)
    first: dict[str, list[float]] = field(default_factory=dict)
    last: dict[str, list[float]] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    raised: list[str] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)

    def add(self, update: int, metrics: Mapping[str, float]) -> list[str]:
        """Sentences of the alarms that begin with this update's metrics; names that it does not know are ignored."""
        window = self.limits.window
        for name, value in metrics.items():
            if name in (REWARD, DIVERSITY, *STATISTICS) or name.startswith(JUDGE):
                first, last = self.first.setdefault(name, []), self.last.setdefault(name, [])
                if len(first) < window:
                    first.append(float(value))
                else:
                    last.append(float(value))
                    del last[:-window]
        changes = {
            name: change
            for name, last in self.last.items()
            if len(last) == window and (change := Change.between(self.first[name], last))
        }
        found = find_alarms(changes, self.limits)
        silent = {name for name in found if update - self.held.get(name, -window - 1) > window}
        new = [f"update {update}: {text}" for name, text in found.items() if name in silent]
        self.active = list(found)
        self.held |= dict.fromkeys(found, update)
        self.raised += new
        return new

    def state_dict(self) -> dict[str, Any]:
        return {
            "first": self.first,
            "last": self.last,
            "active": self.active,
            "raised": self.raised,
            "held": self.held,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first = {name: list(values) for name, values in state["first"].items()}
        self.last = {name: list(values) for name, values in state["last"].items()}
        self.active, self.raised, self.held = list(state["active"]), list(state["raised"]), dict(state["held"])


# --- numbers that are not finite --------------------------------------------------------------------------------------


def require_finite(
    values: Mapping[str, float | Tensor], where: str, reduce_max: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Stop the run, on all processes together, if any value anywhere is NaN or infinite.

    Call before the optimizer step.

    Args:
        values: by name, numbers or tensors of any shape.
        where: for the message, for example "update 12".
        reduce_max: takes a (1,) float64 tensor and returns its maximum over all processes; called exactly once.

    Raises:
        GuardStop: names the values, or says that another process has one.
    """
    bad = []
    for name, value in values.items():
        x = torch.as_tensor(value).detach()
        wrong = ~torch.isfinite(x)
        if wrong.any():
            bad.append(f"{name} is {x[wrong][0].item()}" + (f" ({int(wrong.sum())} values)" if x.numel() > 1 else ""))
    flag = torch.tensor([float(bool(bad))], dtype=torch.float64)
    if (flag if reduce_max is None else reduce_max(flag)).item():
        raise GuardStop(
            f"{where}: {', '.join(bad) or 'another process has a number that is not finite'}; expected finite numbers. "
            "The optimizer step was not taken. Try a lower optimizer.lr, a smaller clip range or policy.dtype=float32; "
            "the last good state is saved."
        )


@dataclass
class ScaleSkips:
    """Counts the optimizer steps that an fp16 loss scaler skipped; a few are normal, ``limit`` in a row are not."""

    limit: int = 10
    in_a_row: int = 0
    total: int = 0

    def add(self, skipped: bool) -> None:
        """Raises GuardStop at the ``limit``-th skip in a row."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= self.limit:
            raise GuardStop(
                f"the fp16 loss scaler skipped {self.in_a_row} optimizer steps in a row; expected a finite gradient by "
                "now. Use policy.dtype=bfloat16 or float32, or lower optimizer.lr; the last good state is saved."
            )

    def state_dict(self) -> dict[str, int]:
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.in_a_row, self.total = state["in_a_row"], state["total"]


# --- signals ----------------------------------------------------------------------------------------------------------


class StopSignals:
    """Turns the first SIGTERM or SIGINT into a request to end after saving.

        with StopSignals() as stop:
            for update in ...:
                if stop.requested: save, leave with stop.exit_code

    A second signal of the same kind ends the process at once, by the system's own action; a checkpoint half-written
    then is only a leftover. Of the same kind, because a launcher answers Ctrl-C, which its children get too, by sending
    them SIGTERM. The handlers of before are restored at the end. Outside the main thread Python allows no handlers, and
    nothing is caught.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested: int | None = None  # number of the first signal
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            # None: installed by something that is not Python, and cannot be put back by it
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or number
        signal.signal(number, signal.SIG_DFL)
        # os.write, because print may not be called again inside itself, and a handler can run anywhere
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving and stopping after this update; again to stop at once.\n".encode())

    @property
    def exit_code(self) -> int:
        """143 for SIGTERM, 130 for SIGINT (128 + number, as shells do); 0 without a signal."""
        return 128 + self.requested if self.requested else 0
