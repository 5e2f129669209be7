"""The runs of a benchmark: processes of `flowrl train`, as a user starts it, measured and never done twice.

A run called NAME has its config in OUT/NAME.yaml and its folder in OUT/NAME. One that was stopped goes on, one that is
finished is left alone, and one that was made with other settings is an error.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowrl.config import Config, read_yaml, resolved_yaml
from flowrl.errors import UserError
from flowrl.trackers import flatten

SESSIONS = "sessions.jsonl"


@dataclass(frozen=True)
class Session:
    """One process of a run: seconds from start to end, largest resident memory in MB, exit code."""

    seconds: float
    peak_rss_mb: float
    exit_code: int


@dataclass
class Running:
    """A process that was started. Only `poll` and `wait` may wait for it, so that its memory is measured."""

    process: subprocess.Popen[bytes]
    started: float
    session: Session | None = None

    def poll(self) -> Session | None:
        """What it came to, or None while it runs."""
        return self._look(os.WNOHANG)

    def wait(self) -> Session:
        """Wait for its end."""
        found = self._look(0)
        assert found is not None  # without WNOHANG wait4 returns the process
        return found

    def stop(self) -> None:
        """Ask it to save its state and stop; asked again, it stops at once."""
        if self.session is None:
            os.kill(self.process.pid, signal.SIGTERM)  # Popen.terminate would wait for one that has just ended

    def _look(self, options: int) -> Session | None:
        if self.session is None:
            pid, status, usage = os.wait4(self.process.pid, options)
            if pid:
                self.process.returncode = os.waitstatus_to_exitcode(status)
                unit = 1e6 if sys.platform == "darwin" else 1e6 / 1024  # bytes there, KiB elsewhere
                seconds = time.perf_counter() - self.started
                self.session = Session(seconds, usage.ru_maxrss / unit, self.process.returncode)
        return self.session


def launch(arguments: list[str]) -> Session:
    """Run `python -m flowrl ...` on this terminal to its end."""
    start = time.perf_counter()
    return Running(subprocess.Popen([sys.executable, "-m", "flowrl", *arguments]), start).wait()


def start(arguments: list[str], log: Path, cores: Sequence[int] | None) -> Running:
    """Start `python -m flowrl ...` in the background.

    log: file that its output is appended to. cores: numbers of the CPU cores it is kept on, None for any. It has a
    process group of its own, so that Ctrl-C reaches it only through `Running.stop`, and its state is saved.
    """
    began = time.perf_counter()
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "flowrl", *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
    if cores is not None:
        os.sched_setaffinity(process.pid, cores)  # before it has any thread that would not inherit it
    return Running(process, began)


def check(name: str, config: Config, out: Path) -> None:
    """UserError where OUT/NAME was made with other settings; a run that never began does not count."""
    path = out / f"{name}.yaml"
    if not (Path(config.output_dir) / "config.yaml").exists() or not path.exists():
        return
    if path.read_text(encoding="utf-8") == resolved_yaml(config):
        return
    old, new = flatten(read_yaml(path)), flatten(config.model_dump(mode="json", by_alias=True))
    different = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    raise UserError(
        f"{path} is of another benchmark ({', '.join(different) or 'its text'} differ); expected the same settings or "
        "a new folder; choose another --out"
    )


def prepare(name: str, config: Config, out: Path) -> list[str] | None:
    """Arguments of `flowrl` that bring a run to its end, from wherever it is; None when it is there.

    Raises:
        UserError: see `check`.
    """
    check(name, config, out)
    folder, path = Path(config.output_dir), out / f"{name}.yaml"
    path.write_text(resolved_yaml(config), encoding="utf-8")
    if (folder / "summary.json").exists():
        return None
    return ["train", str(path), *(["--resume"] if (folder / "config.yaml").exists() else [])]


def record(name: str, out: Path, session: Session, **facts: Any) -> None:
    """Add a line to OUT/sessions.jsonl."""
    with (out / SESSIONS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"run": name, **asdict(session), **facts}) + "\n")
