"""Processes of a run played by threads, for functions that take a `reduce`: cheap enough for many examples."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


def in_ranks(size: int, work: Callable[[int, Reduce], Any]) -> list[tuple[Any, int]]:
    """[(work(rank, reduce), calls of reduce)] of every rank; `reduce` waits for all of them, as an all-reduce does."""
    barrier, given, calls = Barrier(size, timeout=20), [None] * size, [0] * size

    def rank_of(rank: int) -> Any:
        def reduce(x: Tensor) -> Tensor:
            calls[rank] += 1
            given[rank] = x.clone()  # type: ignore[call-overload]
            barrier.wait()
            total = sum(given[1:], start=given[0])  # type: ignore[call-overload]
            barrier.wait()
            return total

        return work(rank, reduce)

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(rank_of, range(size)))
    return list(zip(results, calls, strict=True))
