"""A line now and then about work that may take hours."""

from __future__ import annotations

import time
from collections.abc import Callable

EVERY_S = 10.0


class Progress:
    """Says `done of total what` at most once in EVERY_S seconds; who finishes says so."""

    def __init__(self, say: Callable[[str], None], total: int, what: str) -> None:
        self._say, self._total, self._what = say, total, what
        self._last = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if done < self._total and now - self._last >= EVERY_S:
            self._last = now
            self._say(f"{done} of {self._total} {self._what}")
