"""What objectives read and return: scalars of edges and of noised leaves, loss terms, and the way through them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

# What an objective may ask for beyond log-probs, advantages and weights. "edges" and "leaves" say what its scalars are
# of; "old" and "old_mean" need the weights that sampled, "paths" the leaves below each edge, "target" a `Progress`.
NEEDS = frozenset({"edges", "leaves", "pairs", "old", "old_mean", "paths", "reference", "target", "image_grad"})


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
        scale: log p = -scale <(next - m)^2> + constant: 1 / (2 c^2), which None stands for; 1 for the unscaled density.
        mean_shift_sq: <(m - m_old)^2> (differentiable), if the objective needs "old_mean".
        target_sq: <(v - v*)^2> (differentiable) and target_weight >= 0, if the objective needs "target"; the weight
            may be 0, and the velocity v* is then any.
        group: (E,) int64 ids of the groups, for coupled objectives.
        root: (E,) int64 ids of the roots (trees), for coupled objectives.
        paths: (E, L) if the objective needs "paths": the value of leaf l of the edge's root where that leaf lies below
            the edge and has a value, else NaN. A path is a pair (root, l); its value is the same at all its edges.
    """

    log_prob: Tensor
    old_log_prob: Tensor
    advantage: Tensor
    weight: Tensor
    kl: Tensor | None = None
    jacobian: Tensor | None = None
    c: Tensor | None = None
    d: Tensor | None = None
    scale: Tensor | None = None
    mean_shift_sq: Tensor | None = None
    target_sq: Tensor | None = None
    target_weight: Tensor | None = None
    group: Tensor | None = None
    root: Tensor | None = None
    paths: Tensor | None = None

    # the scalars through which the model enters; everything else is data
    differentiable: ClassVar[tuple[str, ...]] = ("log_prob", "kl", "mean_shift_sq", "target_sq")

    def __post_init__(self) -> None:
        _check_shapes("edge", {name: x for name, x in present(self).items() if name != "paths"})
        if self.paths is not None and (self.paths.ndim != 2 or len(self.paths) != len(self)):
            raise ValueError(
                f"paths have shape {tuple(self.paths.shape)}; expected (edges, leaves), {len(self)} edges."
            )

    def __len__(self) -> int:
        return len(self.log_prob)

    def __getitem__(self, rows: Any) -> EdgeScalars:
        """Some edges, by slice, index tensor or mask."""
        return EdgeScalars(**{name: x[rows] for name, x in present(self).items()})

    @staticmethod
    def cat(parts: Iterable[EdgeScalars]) -> EdgeScalars:
        """The edges of several micro-batches in a row; all must carry the same scalars."""
        return EdgeScalars(**_cat([present(part) for part in parts]))


@dataclass(frozen=True)
class LeafVelocities:
    """N finished latents, noised again, and what the models predict there: the input of `LeafObjective.measure`.

    x = (1 - s) x0 + s e. x0, x, v, v_old, v_ref: (N, C, H, W) float32; s (N,). v is that of the model being trained,
    v_old of the one that sampled, v_ref of the reference (None unless the objective needs "reference").
    """

    x0: Tensor
    x: Tensor
    s: Tensor
    v: Tensor
    v_old: Tensor
    v_ref: Tensor | None = None


@dataclass(frozen=True)
class LeafScalars:
    """The scalars of N noised leaves (one leaf at one time each), each (N,).

    Attributes:
        positive, negative: matching errors of the implicit positive and negative policy (differentiable).
        advantage: of the leaf. weight: >= 0; 0 takes it out of the loss.
        kl: <(v - v_ref)^2> (differentiable), if the objective needs "reference".
        group, root: int64 ids, for coupled objectives.
    """

    positive: Tensor
    negative: Tensor
    advantage: Tensor
    weight: Tensor
    kl: Tensor | None = None
    group: Tensor | None = None
    root: Tensor | None = None

    differentiable: ClassVar[tuple[str, ...]] = ("positive", "negative", "kl")

    def __post_init__(self) -> None:
        _check_shapes("leaf", present(self))

    def __len__(self) -> int:
        return len(self.positive)

    def __getitem__(self, rows: Any) -> LeafScalars:
        """Some noised leaves, by slice, index tensor or mask."""
        return LeafScalars(**{name: x[rows] for name, x in present(self).items()})

    @staticmethod
    def cat(parts: Iterable[LeafScalars]) -> LeafScalars:
        """Those of several micro-batches in a row; all must carry the same scalars."""
        return LeafScalars(**_cat([present(part) for part in parts]))


Scalars = EdgeScalars | LeafScalars


@dataclass(frozen=True)
class LossTerms:
    """What an objective returns: ``terms`` (E,), weighted, and detached ``metrics``, each (E,), not weighted."""

    terms: Tensor
    metrics: dict[str, Tensor]


class Objective(Protocol):
    """An objective is immutable and has no state between calls. ``needs`` is a subset of `NEEDS`.

    It is called with `EdgeScalars`, or with `LeafScalars` if it needs "leaves" (see `LeafObjective`).
    """

    @property
    def name(self) -> str: ...

    @property
    def coupled(self) -> bool: ...

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, scalars: Any, /) -> LossTerms: ...


class LeafObjective(Objective, Protocol):
    """An objective on noised leaves. It also says how they are noised and what it measures there."""

    @property
    def time_fraction(self) -> float: ...

    @property
    def times(self) -> int | None: ...

    @property
    def shared_noise(self) -> bool: ...

    def measure(self, leaves: LeafVelocities, /) -> dict[str, Tensor]:
        """The differentiable scalars, each (N,), by their names in `LeafScalars`."""


def scalar_gradients(objective: Objective, scalars: Scalars, normaliser: float) -> tuple[LossTerms, dict[str, Tensor]]:
    """The loss terms and d loss / d x_e, each (E,), for every differentiable scalar x that ``scalars`` carries.

    ``loss = terms.sum() / normaliser``. The scalars must hold whole groups; the model's own graph is not used.
    """
    given = present(scalars)
    leaves = {name: given[name].detach().requires_grad_() for name in scalars.differentiable if name in given}
    with torch.enable_grad():
        out = objective(type(scalars)(**{**given, **leaves}))
        gradients = torch.autograd.grad(
            out.terms.sum() / normaliser, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
    return LossTerms(out.terms.detach(), out.metrics), dict(zip(leaves, gradients, strict=True))


def surrogate(scalars: Scalars, gradients: Mapping[str, Tensor]) -> Tensor:
    """() sum over rows and scalars of (d loss / d x_e) x_e: its gradient in theta is that of the loss.

    ``scalars`` are those of a micro-batch, computed with gradient; ``gradients`` the same rows of `scalar_gradients`.
    """
    terms = [(g.detach() * getattr(scalars, name)).sum() for name, g in gradients.items()]
    return torch.stack(terms).sum()


def present(scalars: Scalars) -> dict[str, Tensor]:
    """The scalars that are there, by name."""
    return {f.name: x for f in fields(scalars) if (x := getattr(scalars, f.name)) is not None}


def _cat(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _check_shapes(what: str, given: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(x.shape) for name, x in given.items()}
    if any(len(shape) != 1 for shape in shapes.values()) or len(set(shapes.values())) > 1:
        # broadcasting would silently mix edges
        raise ValueError(f"{what} scalars have shapes {shapes}; expected one vector of one length for each.")
