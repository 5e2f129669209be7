"""LayerTuning-RL (Dynamic-TreeRPO, arXiv 2509.23352): imitation of the best path of a tree, inside the RL loss.

    loss = loss of the inner objective + (1 / normaliser) sum over edges of lambda_e <(v - v*)^2>       (eq. 13)

v* is a velocity that leads to the best image; lambda_e is the term's weight times the progress that the path made at
this edge. The other half of the method, clip bounds that widen with the reward, is `Clipped(clip_range_max=...)`.

No code was published, and the sources at hand leave much open; each such choice is a setting of `LayerTuning`.
Deviations, all of them by default and each with a setting that undoes it:
* v* = (x_s - x0_best) / s points to the best image. The published target, the best path's own velocity, is what the
  model says already: on the path itself its gradient is 0 as long as the weights are those that sampled.
* A group whose best image is no better than the average image of the update teaches nothing (``floor``).
* Layers count by the progress made at them (``weighting``), only states of the best path count (``states``), and only
  in the tree that holds the group's best image (``best``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import samplers
from flowrl.errors import UserError
from flowrl.objectives.clipped import required
from flowrl.objectives.scalars import EdgeScalars, LossTerms, Objective
from samplers.kernels import per_row

# (x (n, C, H, W), s (n,), root (n,)) -> v, under the weights and the guidance of the rollout
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
CHOICES = {
    "target": ("image", "velocity"),
    "states": ("path", "all"),
    "weighting": ("progress", "uniform"),
    "best": ("group", "tree"),
}


@dataclass(frozen=True)
class LayerTuning:
    """Settings of the supervised term.

    Args:
        weight: lambda >= 0; its published value is unknown.
        target: "image": v* = (x_s - x0_best) / s. "velocity" (published): the velocity that the sampling weights
            predict on the best path, at the same time s.
        states: "path": the states of the best path. "all": all states of its tree, each edge by its share of leaves.
        weighting: of the layers. "progress": layer k counts by u_k = n max(0, V_k - V_{k-1}) / sum of the same over
            the n trained edges of the path, V the mean reward of the leaves below; u_k = 1 where no edge made any
            progress. "uniform": u_k = 1.
        best: "group": the best leaf of a prompt's trees. "tree": the best leaf of each tree, in that tree.
        floor: least reward of a leaf worth imitating: a number, "mean" (of all images of the update), or None. Besides,
            it must be above the mean of its group (or tree).
        decay: the weight falls linearly to 0 over so many updates; None: it stays.
    """

    weight: float = 0.1
    target: Literal["image", "velocity"] = "image"
    states: Literal["path", "all"] = "path"
    weighting: Literal["progress", "uniform"] = "progress"
    best: Literal["group", "tree"] = "group"
    floor: float | Literal["mean"] | None = "mean"
    decay: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}; set it so.")
        if not 0 <= self.weight < float("inf"):
            raise UserError(f"the supervised weight is {self.weight!r}; expected a number >= 0; 0 switches it off.")
        if isinstance(self.floor, str) and self.floor != "mean":
            raise UserError(f"floor is {self.floor!r}; expected a reward, 'mean' or null; correct it.")
        if self.decay is not None and self.decay < 1:
            raise UserError(f"decay is {self.decay!r}; expected a number of updates >= 1, or null for none.")

    def weight_at(self, update: int) -> float:
        """lambda in the update of this number, 0 for the first."""
        return self.weight if self.decay is None else self.weight * max(0.0, 1 - update / self.decay)


@dataclass(frozen=True, eq=False)
class Progress:
    """What a rollout's states are to imitate.

    velocity: v* of the M states, `velocity[rows]` gathers (n, C, H, W); any latent where no edge of the state counts.
    weight: (E,) float32 >= 0, lambda_e. best: (R,) column of the leaf imitated in each tree, -1 for none.
    """

    velocity: samplers.Latents
    weight: Tensor
    best: Tensor


@dataclass(frozen=True)
class Supervised:
    """An objective on edges plus the supervised term: term_e + lambda_e <(v - v*)^2>. Edges of weight 0 stay out."""

    inner: Objective

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def coupled(self) -> bool:
        return self.inner.coupled

    @property
    def needs(self) -> frozenset[str]:
        return self.inner.needs | {"target"}

    def __call__(self, edges: EdgeScalars) -> LossTerms:
        out = self.inner(edges)
        weight = required(edges, "target_weight").where(edges.weight > 0, 0.0).detach()
        term = weight.to(out.terms) * required(edges, "target_sq")
        return LossTerms(out.terms + term, out.metrics | {"progress_loss": term.detach().float()})


def best_leaves(
    values: Tensor,
    groups: Tensor,
    *,
    best: Literal["group", "tree"] = "group",
    floor: float | Literal["mean"] | None = "mean",
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """(R,) column of the leaf that each tree is to imitate, -1 for none; the first one of equal leaves.

    Args:
        values: (R, L) rewards, NaN = missing. groups: (R,) prompt of each tree.
        best, floor: see `LayerTuning`.
        reduce: sums a (2,) float64 tensor over all processes; called exactly once with floor "mean", else never.
    """
    r = values.detach().to("cpu", torch.float64)
    valid = ~r.isnan()
    least = None if floor == "mean" else floor
    if floor == "mean":
        sums = torch.stack([r.nansum(), valid.double().sum()])
        total, count = reduce(sums) if reduce else sums
        least = float(total / count) if count else None
    scope = groups.to("cpu") if best == "group" else torch.arange(len(r))
    top, column = torch.where(valid, r, -torch.inf).max(1)
    found = torch.full((len(r),), -1)
    for members in [(scope == i).nonzero().flatten() for i in scope.unique()]:
        root = members[top[members].argmax()]
        enough = least is None or bool(top[root] >= least)
        differ = len(r[members][valid[members]].unique()) > 1  # then, and only then, the best is above their mean
        if enough and differ:
            found[root] = column[root]
    return found


def progress_targets(
    settings: LayerTuning,
    tree: samplers.Tree,
    values: Tensor,
    groups: Tensor,
    *,
    update: int = 0,
    predict: Predict | None = None,
    chunk: int = 64,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Progress:
    """What this rollout's states are to imitate, and how much each edge counts.

    For every tree that imitates, the weights of its edges sum to lambda n, n the trained edges of the best path:
    edges of one layer together weigh what they weigh in a loss by shares of leaves.

    Args:
        values: (R, L) rewards, NaN = missing. groups: (R,) prompt of each tree. update: number of the update.
        predict: needed for the target "velocity" only, with the rollout's weights and guidance; chunk: its rows.
        reduce: see `best_leaves`; every process must call this, also one without trees.
    """
    edges, states = tree.edges, tree.states
    best = best_leaves(values, groups, best=settings.best, floor=settings.floor, reduce=reduce)
    weight = settings.weight_at(update) * _edge_weights(settings, tree, values.detach().to("cpu", torch.float64), best)
    wanted = torch.zeros(len(states), dtype=torch.bool)
    wanted[edges.state[weight > 0]] = True
    rows = wanted.nonzero().flatten()
    index = torch.zeros(len(states), dtype=torch.long)
    index[rows] = torch.arange(len(rows))
    with torch.no_grad():
        if settings.target == "image":
            leaf = tree.leaves[states.root[rows], best[states.root[rows]]]
            velocity = (states.x[rows] - leaf) / per_row(states.s[rows.to(states.s.device)], leaf)
        else:
            velocity = _path_velocity(tree, best, rows, predict, chunk)
    if not len(rows):  # gathering needs a row, though nobody looks at it
        velocity = torch.zeros(1, *states.x.shape[1:], device=tree.leaves.device)
    return Progress(samplers.Latents(velocity, index), weight.float(), best)


def _edge_weights(settings: LayerTuning, tree: samplers.Tree, values: Tensor, best: Tensor) -> Tensor:
    """(E,): weight of each edge, before lambda; 0 where it does not count."""
    plan, edges, below = tree.plan, tree.edges, tree.plan.below
    there = torch.zeros(len(best), len(plan), dtype=torch.bool)  # (R, N): pruned edges are not
    there[edges.root, edges.node] = True
    on_path = below[:, best.clamp(min=0)].T & (best >= 0)[:, None] & there
    u = on_path.double()
    if settings.weighting == "progress":
        valid = (~values.isnan()).double()
        mean = torch.where(valid > 0, values, 0.0) @ below.T.double() / (valid @ below.T.double())
        gain = torch.where(on_path, mean - mean[:, list(plan.parent)], 0.0).clamp(min=0)
        total = gain.sum(1, keepdim=True)
        u = torch.where(total > 0, gain * u.sum(1, keepdim=True) / total, u)
    if settings.states == "path":
        return u[edges.root, edges.node]
    times, time = torch.tensor(plan.s, dtype=torch.float64).unique(return_inverse=True)
    of_layer = torch.zeros(len(best), len(times), dtype=torch.float64).index_add(1, time, u)
    return of_layer[edges.root, time[edges.node]] * edges.weight


def _path_velocity(tree: samplers.Tree, best: Tensor, rows: Tensor, predict: Predict | None, chunk: int) -> Tensor:
    """(n, C, H, W): velocity at the state of the best path that has the root and the time of each of these states."""
    if predict is None:
        raise ValueError("the target 'velocity' got no predict; expected the rollout's model. Pass predict.")
    states = tree.states

    def key(i: int) -> tuple[int, float]:
        return int(states.root[i]), tree.plan.s_next[int(states.node[i])]

    on_path = tree.plan.below[states.node, best[states.root].clamp(min=0)] & (best[states.root] >= 0)
    at = {key(i): i for i in on_path.nonzero().flatten().tolist()}
    source, back = torch.tensor([at[key(i)] for i in rows.tolist()], dtype=torch.long).unique(return_inverse=True)
    if not len(source):
        return tree.leaves[:0, 0]
    velocity = torch.cat(
        [predict(states.x[part], states.s[part.to(states.s.device)], states.root[part]) for part in source.split(chunk)]
    )
    return velocity[back.to(velocity.device)]
