"""Seconds of training: what is counted, and what is not."""

from __future__ import annotations

import time

import torch

from flowrl.clock import TrainingClock


class Alone:
    """A world of one process."""

    def max(self, values: torch.Tensor) -> torch.Tensor:
        return values


def test_updates_add_up_without_what_lies_between_and_without_pauses(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = TrainingClock("wall", Alone(), so_far=100.0)
    clock.start()
    now[0] += 2.0
    with clock.paused():
        now[0] += 50.0
    now[0] += 1.0
    assert clock.stop() == 103.0
    now[0] += 7.0  # an evaluation
    clock.start()
    now[0] += 4.0
    assert clock.stop() == 107.0


def test_the_cpu_clock_does_not_count_sleep():
    clock = TrainingClock("cpu", Alone())
    clock.start()
    time.sleep(0.2)
    assert clock.stop() < 0.1


def test_the_slowest_process_counts(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Slower:
        def max(self, values: torch.Tensor) -> torch.Tensor:
            return torch.maximum(values, torch.tensor(9.0, dtype=torch.float64))

    clock = TrainingClock("wall", Slower())
    clock.start()
    now[0] = 5.0
    assert clock.stop() == 9.0
