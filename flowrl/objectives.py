"""Objectives: pure functions from the scalars of a group of edges to a loss.

An edge is one trained denoising step. Whatever the loss, the model enters it only through a few numbers per edge
(its log-prob, its KL to the reference, ...), so the chain rule splits there:

    loss = (1 / normaliser) sum over edges of terms_e(scalars),
    d loss / d theta = sum over edges and scalars x of (d loss / d x_e) (d x_e / d theta).

* An objective that is not ``coupled`` looks at each edge alone: call it on a micro-batch and back-propagate.
* A ``coupled`` one (a softmax over a group, pairs) needs all edges at once. Then: one pass without gradient over all
  micro-batches gives the scalars, ``scalar_gradients`` gives d loss / d x, and a second pass back-propagates
  ``surrogate(edges, gradients)`` in micro-batches of any size. Same gradient, same memory.

The normaliser is the sum of the weights of the valid edges of all processes: their number where every weight is 1, and
trained steps times roots where weights are shares of a root's leaves.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from flowrl.errors import UserError

# What an objective may ask the trainer for, beyond log-probs, advantages and weights.
NEEDS = frozenset({"edges", "leaves", "pairs", "old_mean", "reference", "image_grad"})
# The scalars through which the model enters; everything else is data.
DIFFERENTIABLE = ("log_prob", "kl", "mean_shift_sq")


@dataclass(frozen=True)
class EdgeScalars:
    """The scalars of E edges, each (E,). Notation: a step is next = m + c eps with m = a x + b v; <.> is over elements.

    Attributes:
        log_prob: log-prob of the stored step under the model being trained (differentiable).
        old_log_prob: under the model that made the rollout, with the same kernel, reduction and density.
        advantage: from `flowrl.advantages`; already clipped.
        weight: >= 0; 0 takes the edge out of the loss, the KL, the metrics and the normaliser.
        kl: KL to the reference at this step (differentiable), if the objective needs "reference".
        jacobian: |b| = |dm/dv|.
        c: std of the step.
        d: s - s_next > 0.
        mean_shift_sq: <(m - m_old)^2> (differentiable), if the objective needs "old_mean".
        group: (E,) int64 ids of the groups, for coupled objectives.
        root: (E,) int64 ids of the roots (trajectories), for coupled objectives.
    """

    log_prob: Tensor
    old_log_prob: Tensor
    advantage: Tensor
    weight: Tensor
    kl: Tensor | None = None
    jacobian: Tensor | None = None
    c: Tensor | None = None
    d: Tensor | None = None
    mean_shift_sq: Tensor | None = None
    group: Tensor | None = None
    root: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = {name: tuple(x.shape) for name, x in self._present().items()}
        if self.log_prob.ndim != 1 or len(set(shapes.values())) > 1:  # broadcasting would silently mix edges
            raise ValueError(f"edge scalars have shapes {shapes}; expected one vector of one length for each.")

    def __len__(self) -> int:
        return len(self.log_prob)

    def _present(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def __getitem__(self, rows: Any) -> EdgeScalars:
        """Some edges, by slice, index tensor or mask."""
        return EdgeScalars(**{name: x[rows] for name, x in self._present().items()})

    @staticmethod
    def cat(parts: Iterable[EdgeScalars]) -> EdgeScalars:
        """The edges of several micro-batches in a row; all must carry the same scalars."""
        present = [part._present() for part in parts]
        return EdgeScalars(**{name: torch.cat([part[name] for part in present]) for name in present[0]})


@dataclass(frozen=True)
class LossTerms:
    """What an objective returns: ``terms`` (E,), weighted, and detached ``metrics``, each (E,), not weighted."""

    terms: Tensor
    metrics: dict[str, Tensor]


class Objective(Protocol):
    """An objective is immutable and has no state between calls. ``needs`` is a subset of `NEEDS`."""

    name: ClassVar[str]
    coupled: ClassVar[bool]

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, edges: EdgeScalars) -> LossTerms: ...


@dataclass(frozen=True)
class Clipped:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7) with a KL penalty, as in Flow-GRPO (arXiv 2505.05470, eq. 5).

        r = exp(log p - log p_old),    term = w [ max(-A r, -A clip(r, 1 - low, 1 + high)) + kl_weight KL ]

    The gradient is zero where the clip is active: A > 0 and r > 1 + high, or A < 0 and r < 1 - low.

    Args:
        clip_range: low = high = clip_range, or the pair (low, high), 0 < low < 1, high > 0. It has a meaning only
            together with the log-prob's kernel, reduction and density: 1e-4 belongs to Flow-SDE and the mean.
        kl_weight: >= 0; > 0 makes the objective need "reference".
    """

    clip_range: float | tuple[float, float] = 1e-4
    kl_weight: float = 0.0

    name: ClassVar[str] = "clipped"
    coupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        low, high = self._bounds()
        if not (0 < low < 1 and 0 < high < float("inf")):
            raise UserError(
                f"clip_range is {self.clip_range!r}; expected a number e or a pair (low, high) with 0 < low < 1 and "
                "0 < high; set objective.clip_range, for example 1.0e-4."
            )
        if not 0 <= self.kl_weight < float("inf"):
            raise UserError(f"the KL weight is {self.kl_weight!r}; expected a number >= 0; set objective.kl.weight.")

    def _bounds(self) -> tuple[float, float]:
        if isinstance(self.clip_range, (int, float)):
            return float(self.clip_range), float(self.clip_range)
        low, high = self.clip_range
        return float(low), float(high)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"edges", "reference"}) if self.kl_weight > 0 else frozenset({"edges"})

    def __call__(self, edges: EdgeScalars) -> LossTerms:
        low, high = self._bounds()
        log_ratio = edges.log_prob - edges.old_log_prob.detach()
        ratio = log_ratio.exp()
        a = edges.advantage.detach().to(ratio)
        policy = torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high))
        above, below = ratio > 1 + high, ratio < 1 - low
        metrics = {
            "policy_loss": policy,
            "ratio": ratio,
            "clip_fraction": above | below,  # outside the range, whatever the sign of A (as flow_grpo logs it)
            "clip_active": ((a > 0) & above) | ((a < 0) & below),  # no policy gradient left
            "approx_kl": 0.5 * log_ratio**2,  # flow_grpo's estimate
        }
        loss = policy
        if self.kl_weight > 0:
            if edges.kl is None:
                raise ValueError("kl_weight > 0 needs EdgeScalars.kl; compute it, as `needs` says.")
            loss = policy + self.kl_weight * edges.kl
        if edges.kl is not None:
            metrics["kl"] = edges.kl
        return LossTerms(edges.weight.detach().to(loss) * loss, {k: x.detach().float() for k, x in metrics.items()})


def scalar_gradients(
    objective: Objective, edges: EdgeScalars, normaliser: float
) -> tuple[LossTerms, dict[str, Tensor]]:
    """The loss terms and d loss / d x_e, each (E,), for every differentiable scalar x that ``edges`` carries.

    ``loss = terms.sum() / normaliser``. The edges must hold whole groups; the model's own graph is not used.
    """
    leaves = {name: x.detach().requires_grad_() for name in DIFFERENTIABLE if (x := getattr(edges, name)) is not None}
    with torch.enable_grad():
        out = objective(EdgeScalars(**{**edges._present(), **leaves}))
        gradients = torch.autograd.grad(
            out.terms.sum() / normaliser, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
    return LossTerms(out.terms.detach(), out.metrics), dict(zip(leaves, gradients, strict=True))


def surrogate(edges: EdgeScalars, gradients: Mapping[str, Tensor]) -> Tensor:
    """() sum over edges and scalars of (d loss / d x_e) x_e: its gradient in theta is that of the loss.

    ``edges`` are those of a micro-batch, computed with gradient; ``gradients`` the same rows of `scalar_gradients`.
    """
    terms = [(g.detach() * getattr(edges, name)).sum() for name, g in gradients.items()]
    return torch.stack(terms).sum()


@dataclass
class MetricMeans:
    """Collects per-edge metrics over micro-batches and processes; edges of weight 0 do not count.

    `result` gives the mean of each metric under its name (of ratio: ``ratio/mean``, and ``ratio/max_dev`` =
    max |r - 1|), ``loss`` = sum of the terms over the sum of the weights, and ``edges``, the number of edges counted.
    NaN where nothing was counted.
    """

    sums: dict[str, float] = field(default_factory=dict)
    count: float = 0.0
    weight: float = 0.0
    loss: float = 0.0
    ratio_max_dev: float = 0.0

    def add(self, edges: EdgeScalars, out: LossTerms) -> None:
        counted = edges.weight > 0
        for name, x in out.metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(x[counted].double().sum())
        if "ratio" in out.metrics and counted.any():
            # torch's max keeps a NaN, Python's would drop it
            worst = (out.metrics["ratio"][counted].double() - 1).abs().max()
            self.ratio_max_dev = float(torch.maximum(worst, torch.tensor(self.ratio_max_dev, dtype=torch.float64)))
        self.count += float(counted.sum())
        self.weight += float(edges.weight.double().sum())
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


OBJECTIVES: dict[str, type] = {Clipped.name: Clipped}


def get_objective(name: str, **settings: Any) -> Objective:
    """The objective called ``name`` with its settings, for example ``get_objective("clipped", clip_range=1e-4)``.

    Raises:
        UserError: an unknown name or setting (the nearest valid one is named), or a setting out of range.
    """
    if name not in OBJECTIVES:
        raise UserError(
            f"unknown objective {name!r}; expected one of {', '.join(sorted(OBJECTIVES))}"
            f"{_nearest(name, OBJECTIVES)}; set objective.name."
        )
    cls = OBJECTIVES[name]
    known = [f.name for f in fields(cls)]
    for key in settings:
        if key not in known:
            raise UserError(
                f"objective {name!r} has no setting {key!r}; expected {', '.join(known)}"
                f"{_nearest(key, known)}; correct or remove it."
            )
    return cls(**settings)


def _nearest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
