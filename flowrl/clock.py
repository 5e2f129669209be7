"""Seconds of training: what `budget_s` and `eval.every_s` count."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from flowrl.distributed import World


class TrainingClock:
    """Counts from `start` to `stop`, on top of what earlier sessions trained.

    kind: "wall", or "cpu": the processor time of this process and its threads, which a busy machine does not inflate.
    Of several processes the slowest counts, so that all of them see one time.
    """

    def __init__(self, kind: Literal["wall", "cpu"], world: World, so_far: float = 0.0) -> None:
        self._now = time.perf_counter if kind == "wall" else time.process_time
        self._world, self._total, self._started = world, so_far, self._now()

    def start(self) -> None:
        """Begin an update."""
        self._started = self._now()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training."""
        before = self._now()
        yield
        self._started += self._now() - before

    def stop(self) -> float:
        """End of an update; returns the seconds trained so far."""
        longest = self._world.max(torch.tensor([self._now() - self._started], dtype=torch.float64))
        self._total += float(longest)
        return self._total
