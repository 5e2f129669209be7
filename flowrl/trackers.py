"""Accelerate's trackers (TensorBoard, W&B, Trackio, MLflow ...) beside the local log, which stays the source of truth.

A tracker that is down must never cost a run: its outages are caught, counted and reported, its other errors are not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.errors import UserError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

# Where the client libraries keep the errors they raise when their service is away. requests' errors are OSErrors.
_OUTAGES = {
    "httpx": "HTTPError",
    "wandb.errors": "Error",
    "mlflow.exceptions": "MlflowException",
    "comet_ml.exceptions": "CometException",
    "swanlab.error": "SwanLabError",
}


def outages() -> tuple[type[Exception], ...]:
    """What counts as an outage: network, file and time-out errors, and the clients' own errors once imported."""
    found: list[type[Exception]] = [OSError]
    for module, name in _OUTAGES.items():
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            found.append(kind)
    return tuple(found)


class Tracker:
    """One accelerate tracker whose outages are counted in `failures` (of `calls`) instead of being raised."""

    def __init__(self, name: str, open_tracker: Callable[[], GeneralTracker], tell: Callable[[str], None]) -> None:
        self.name = name
        self.calls = 0
        self.failures = 0
        self._tell = tell
        self._tracker: GeneralTracker | None = None
        self._guarded(lambda: self._start(open_tracker))

    def _start(self, open_tracker: Callable[[], GeneralTracker]) -> None:
        tracker = open_tracker()
        tracker.start()
        self._tracker = tracker

    def _guarded(self, action: Callable[[], None]) -> None:
        self.calls += 1
        try:
            action()
        except outages() as error:
            self.failures += 1
            if self.failures == 1:
                self._tell(f"tracker {self.name} failed ({type(error).__name__}: {error}); training goes on without it")

    def configure(self, values: Mapping[str, Any]) -> None:
        """Hand over the settings of the run; `values` is flat (strings, numbers, booleans)."""
        if (tracker := self._tracker) is not None:
            self._guarded(lambda: tracker.store_init_configuration(dict(values)))

    def log(self, values: Mapping[str, float], update: int) -> None:
        """Send the numbers of one update."""
        if (tracker := self._tracker) is not None:
            self._guarded(lambda: tracker.log(dict(values), step=update))

    def close(self) -> None:
        """Finish the tracker's run and say how many calls failed, if any did."""
        if (tracker := self._tracker) is not None:
            self._guarded(tracker.finish)
        if self.failures:
            self._tell(f"tracker {self.name}: {self.failures} of {self.calls} calls failed; metrics.jsonl has it all")


def open_trackers(
    trackers: Sequence[str | GeneralTracker], folder: Path, project: str, tell: Callable[[str], None]
) -> list[Tracker]:
    """Start trackers given by accelerate's names, or ready-made objects. A name whose package is missing: UserError."""
    if not trackers:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(kind) for kind in get_available_trackers()]
    opened = []
    for tracker in trackers:
        if not isinstance(tracker, str):
            opened.append(Tracker(tracker.name, partial(_given, tracker), tell))
            continue
        if tracker not in available:
            raise UserError(
                f"the tracker {tracker!r} cannot be used here; usable: {', '.join(available) or 'none'}; "
                f"run `pip install {tracker}` or remove it from logging.trackers (metrics.jsonl is written always)"
            )
        kind = LOGGER_TYPE_TO_CLASS[tracker]
        where = (str(folder),) if kind.requires_logging_directory else ()
        opened.append(Tracker(tracker, partial(kind, project, *where), tell))
    return opened


def _given(tracker: GeneralTracker) -> GeneralTracker:
    return tracker


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str | float | int | bool]:
    """Nested settings as `section.key: value`, which is the form trackers take; lists and nulls become text."""
    flat: dict[str, str | float | int | bool] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + str(key)] = value if isinstance(value, str | float | int | bool) else str(value)
    return flat
