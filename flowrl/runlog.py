"""The log of a run: what is true of the training, and, apart from it, what is true of the machine.

`metrics.jsonl`  one line per update with everything that follows from config and seed. A resumed run cuts it back to
                 the update it resumes from, so the file of an interrupted run equals that of an uninterrupted one
                 byte for byte.
`timings.jsonl`  one line per update and attempt with clock times, speed and memory, only ever appended to: work that an
                 interruption made the run do twice stays visible as cost. `session` counts the starts of the run.
`run.log`        the plain text that a terminal without cursor control would show.

Names of metrics (the report groups its curves by them): `reward/mean`, `reward/std`, `reward/<part>/mean|std`,
`judge/<name>`, `ratio/max_dev`, `clip_fraction`, `kl`, `loss`, `grad_norm`, `images/diversity|saturation|sharpness|
dark_fraction`, `eval/...`. Of the timings, `images_per_s` is shown while the run goes on.
"""

from __future__ import annotations

import errno
import json
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from flowrl.errors import UserError
from flowrl.trackers import flatten, open_trackers

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

METRICS, TIMINGS, TEXT = "metrics.jsonl", "timings.jsonl", "run.log"
SHOWN = {"reward/mean": "reward", "kl": "kl", "clip_fraction": "clipped", "grad_norm": "grad"}


class RunLog:
    """Writes the log files of a run folder, shows progress, and feeds trackers.

    `total`: number of updates, `budget_s`: seconds of training; for "n/N" and the time left. `resumed`: None for a new
    run, else the last update that the checkpoint contains (-1: nothing yet); later lines of `metrics.jsonl` are
    dropped. `active=False` makes every method do nothing (all processes but the first). `trackers`: accelerate names
    or tracker objects.
    """

    def __init__(
        self,
        folder: str | Path,
        trackers: Sequence[str | GeneralTracker] = (),
        console: bool = True,
        *,
        total: int | None = None,
        budget_s: float | None = None,
        resumed: int | None = None,
        project: str = "flowrl",
        config: Mapping[str, Any] | None = None,
        active: bool = True,
        stream: TextIO | None = None,
        plain_every_s: float = 5.0,
    ) -> None:
        self.active = active
        if not active:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if resumed is None and (folder / METRICS).exists() and (folder / METRICS).stat().st_size:
            raise UserError(
                f"{folder / METRICS} already holds the log of a run, a new run needs a folder of its own; "
                "continue that run with --resume or choose another output_dir"
            )
        self._last = _cut_back(folder / METRICS, -1 if resumed is None else resumed)
        self._metrics = _appending(folder / METRICS)
        _cut_back(folder / TIMINGS, None)
        self._session = 1 + max((row.get("session", 0) for row in read_jsonl(folder / TIMINGS)), default=0)
        self._timings = _appending(folder / TIMINGS)
        self._text = _appending(folder / TEXT)
        self._total, self._budget_s = total, budget_s
        self._walls: deque[float] = deque(maxlen=20)
        self._clock = time.monotonic()
        self._screen = _Screen(sys.stdout if stream is None else stream, total, plain_every_s) if console else None
        self._trackers = open_trackers(trackers, folder, project, self.note)
        for tracker in self._trackers:
            tracker.configure(flatten(config or {}))

    def write(
        self,
        update: int,
        metrics: Mapping[str, Any],
        timings: Mapping[str, Any] | None = None,
        alarms: Sequence[str] = (),
    ) -> None:
        """Log one update: `metrics` must follow from config and seed alone, `timings` is all the rest.

        Values are numbers, booleans or one-element tensors; NaN and infinity are written as null. `update` must grow
        from call to call (0 is the state before training). `alarms`: sentences for a person.
        """
        if not self.active:
            return
        if self._last is not None and update <= self._last:
            raise ValueError(f"got update {update} after update {self._last}, expected growing numbers")
        self._last = update
        values = {key: _number(key, value) for key, value in metrics.items()}
        machine = {key: _number(key, value) for key, value in (timings or {}).items()}
        now = time.monotonic()
        wall, self._clock = now - self._clock, now
        _append(self._metrics, {"update": update, **values, **({"alarms": list(alarms)} if alarms else {})})
        _append(
            self._timings, {"update": update, "session": self._session, "time": time.time(), "wall_s": wall, **machine}
        )
        if update:
            self._walls.append(wall)
        line = self._line(update, values, machine)
        self._text.write((line + "\n").encode())
        if self._screen:
            self._screen.update(update, line)
        for alarm in alarms:
            self.note(f"ALARM: {alarm}")
        sent = {key: value for key, value in {**values, **machine}.items() if value is not None}
        for tracker in self._trackers:
            tracker.log(sent, update)

    def note(self, text: str) -> None:
        """One line for a person: on the screen and in run.log."""
        if not self.active:
            return
        self._text.write((text + "\n").encode())
        if self._screen:
            self._screen.say(text)

    def stage(self, name: str, done: int, total: int) -> None:
        """Progress of something slow that is not an update, such as an evaluation; call it after each part."""
        if self.active and self._screen:
            self._screen.stage(name, done, total)

    def sync(self) -> None:
        """Force both logs to the disk; call it before a checkpoint is declared complete."""
        if self.active:
            os.fsync(self._metrics.fileno())
            os.fsync(self._timings.fileno())

    def close(self) -> None:
        """Finish trackers and progress, close the files. Closing twice is fine."""
        if not self.active:
            return
        for tracker in self._trackers:
            tracker.close()
        if self._screen:
            self._screen.close()
        for file in (self._metrics, self._timings, self._text):
            file.close()
        self.active = False

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _line(self, update: int, metrics: Mapping[str, Any], timings: Mapping[str, Any]) -> str:
        parts = [f"update {update}/{self._total}" if self._total else f"update {update}"]
        judges = {key: key.removeprefix("judge/") for key in metrics if key.startswith("judge/")}
        for key, label in {**SHOWN, **judges}.items():
            if (value := metrics.get(key)) is not None:
                parts.append(f"{label} {value:.4g}")
        if (speed := timings.get("images_per_s")) is not None:
            parts.append(f"images/s {speed:.1f}")
        to_come = self._to_come(update, timings)
        if self._walls and to_come:
            parts.append(f"left {duration(to_come * statistics.median(self._walls))}")
        return "  ".join(parts)

    def _to_come(self, update: int, timings: Mapping[str, Any]) -> float:
        """Updates until the run has made all of them or, by the mean of those so far, spent its seconds of training."""
        left = [float(self._total - update)] if self._total else []
        trained = timings.get("train_s")
        if self._budget_s and trained and update:
            left.append((self._budget_s - trained) / (trained / update))
        return max(0.0, min(left, default=0.0))


class _Screen:
    """A rich progress bar on a terminal; elsewhere plain lines, one per update but at most one every few seconds."""

    def __init__(self, stream: TextIO, total: int | None, every_s: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._stream, self._total, self._every = stream, total, every_s
        self._printed = -math.inf
        self._progress = None
        console = Console(file=stream)
        if console.is_terminal:
            text = TextColumn("{task.description}", markup=False)
            self._progress = Progress(BarColumn(bar_width=24), text, console=console)
            self._progress.start()
            self._main = self._progress.add_task("starting", total=total)
            self._side = self._progress.add_task("", total=None, visible=False)

    def update(self, update: int, line: str) -> None:
        if self._progress:
            self._progress.update(self._main, completed=update, description=line)
        elif self._due() or update == self._total:
            self.say(line)

    def say(self, text: str) -> None:
        if self._progress:
            self._progress.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def stage(self, name: str, done: int, total: int) -> None:
        if self._progress:
            self._progress.update(
                self._side, description=f"{name} {done}/{total}", completed=done, total=total, visible=done < total
            )
        elif self._due() or done == total:
            self.say(f"{name} {done}/{total}")

    def close(self) -> None:
        if self._progress:
            self._progress.stop()

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self._printed < self._every:
            return False
        self._printed = now
        return True


def duration(seconds: float) -> str:
    """A time span for people: `42s`, `3m05s`, `2h07m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All complete lines of a .jsonl file as dicts; no file is no lines; a half-written last line is left out."""
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):  # after the last \n: unfinished
        rows.append(_parse(path, number, line))
    return rows


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:  # also an invalid UTF-8 sequence
        raise UserError(
            f"line {number} of {path} is damaged ({error}), expected one JSON object per line; "
            "restore the file, or move it away to keep the rest of the run folder usable"
        ) from error
    if not isinstance(row, dict):
        raise UserError(f"line {number} of {path} is {line[:40]!r}, expected a JSON object; restore the file")
    return row


def _cut_back(path: Path, update: int | None) -> int | None:
    """Drop a half-written last line and, unless `update` is None, the lines of later updates.

    Returns the update of the last line kept (None if there is none). Kept lines keep their bytes.
    """
    if not path.exists():
        return None
    last, end = None, 0
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        row = _parse(path, number, line)
        if update is not None and row["update"] > update:
            break
        last, end = row.get("update"), end + len(line) + 1
    if end < path.stat().st_size:
        os.truncate(path, end)
    return last


def _appending(path: Path) -> BinaryIO:
    return path.open("ab", buffering=0)  # unbuffered: a killed process loses no line


def _append(file: BinaryIO, row: Mapping[str, Any]) -> None:
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    try:
        if file.write(line) != len(line):  # an unbuffered file may take a part only
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise UserError(
            f"could not write {file.name}: {error.strerror}; expected a folder that can be written; free some space "
            "(or raise the quota), then continue with --resume; checkpoints are untouched"
        ) from error


def _number(key: str, value: Any) -> float | int | bool | None:
    """A plain number with the same value (float32 becomes the double of equal value), or None if it is not finite."""
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, bool | int | float):
        raise ValueError(f"the metric {key!r} is {value!r}, expected a number; log parts under names of their own")
    return value if math.isfinite(value) else None
