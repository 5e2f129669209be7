"""Means of an objective's metrics over micro-batches, inner updates and processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowrl.objectives.scalars import LossTerms, Scalars


@dataclass
class MetricMeans:
    """Collects per-edge (or per-leaf) metrics over micro-batches and processes; those of weight 0 do not count.

    `result` gives the mean of each metric under its name (of ratio: ``ratio/mean``, and ``ratio/max_dev`` =
    max |r - 1|), ``loss`` = sum of the terms over the sum of the weights, and ``edges``, the number of edges (or noised
    leaves) counted.
    NaN where nothing was counted.
    """

    sums: dict[str, float] = field(default_factory=dict)
    count: float = 0.0
    weight: float = 0.0
    loss: float = 0.0
    ratio_max_dev: float = 0.0

    def add(self, scalars: Scalars, out: LossTerms) -> None:
        counted = scalars.weight > 0
        for name, x in out.metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(x[counted].double().sum())
        if "ratio" in out.metrics and counted.any():
            # torch's max keeps a NaN, Python's would drop it
            worst = (out.metrics["ratio"][counted].double() - 1).abs().max()
            self.ratio_max_dev = float(torch.maximum(worst, torch.tensor(self.ratio_max_dev, dtype=torch.float64)))
        self.count += float(counted.sum())
        self.weight += float(scalars.weight.double().sum())
        self.loss += float(out.terms.detach().double().sum())

    def merge(self, other: MetricMeans) -> None:
        """Add what another collector has counted."""
        for name, total in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + total
        self.count += other.count
        self.weight += other.weight
        self.loss += other.loss
        worst = torch.tensor([self.ratio_max_dev, other.ratio_max_dev], dtype=torch.float64)
        self.ratio_max_dev = float(worst.max())

    def result(
        self, reduce_sum: Callable[[Tensor], Tensor] | None = None, reduce_max: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, float]:
        """Means over all processes. The reducers take and return a float64 vector; each is called exactly once.

        Every process must have seen the same metric names, so one without edges must still `add` an empty batch.
        """
        names = sorted(self.sums)
        local = torch.tensor([self.count, self.weight, self.loss, *(self.sums[n] for n in names)], dtype=torch.float64)
        worst = torch.tensor([self.ratio_max_dev], dtype=torch.float64)
        count, weight, loss, *sums = (reduce_sum(local) if reduce_sum else local).tolist()
        worst = reduce_max(worst) if reduce_max else worst
        nan = float("nan")
        means = {name: total / count if count else nan for name, total in zip(names, sums, strict=True)}
        if "ratio" in means:
            means |= {"ratio/mean": means.pop("ratio"), "ratio/max_dev": float(worst) if count else nan}
        return {
            "loss": loss / weight if weight else nan,
            **means,
            "edges": count,
        }
