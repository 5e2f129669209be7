"""Softmax trajectory balance (TMPO): the probabilities of a group's paths are fitted to a softmax of their rewards.

Deviations from the released code: values are not clamped or scrubbed; edges that several paths share are one tensor,
not a copy per path; ``form: squared`` gives the loss itself in place of its clipped surrogate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowrl.errors import UserError
from flowrl.objectives.clipped import (
    ClipRange,
    check_kl_weight,
    clip_bounds,
    clipped_surrogate,
    needed,
    required,
    with_kl,
)
from flowrl.objectives.guard import ratio_norm
from flowrl.objectives.scalars import EdgeScalars, LossTerms


@dataclass(frozen=True)
class SoftmaxTB:
    """TMPO's softmax trajectory balance (arXiv 2605.10983) over the K paths of a group.

        l_i = sum of log p over the trained edges of path i,    q = log softmax(l),    t = log softmax(beta R)
        squared   term_i = (q_i - t_i)^2
        clipped   term_i = max(-A_i r_i w_i, -A_i clip(r_i, 1 - low, 1 + high) w_i),    A_i = t_i - q_i (detached),
                  r_i = exp(l_i - l_old_i - their mean over the group (detached)),
                  w_i = clip(exp(mean over the path's edges of <eps (m - m_old)>), 1 - low, 1 + high) (detached)

    Both vanish, with their gradients, where the paths are as likely, relative to each other, as their rewards want:
    unlike a policy gradient it does not run towards the one best path. Normalisation is over all paths of a prompt,
    those of several trees included. A path without a reward is left out. A_i has the mean -KL(uniform || softmax
    (beta R)) where all paths are equally likely, not 0; it pushes all log-probs of the group down alike. That is 0 on
    average only where how much a group's rewards differ does not depend on its noise; `squared` compares within it.

    An edge carries the mean of the terms of the paths through it, times its weight: with weights that are shares of
    leaves, the loss is the mean over paths.

    Args:
        beta: > 0, sharpness of the target (published: 15 for SD3; 0.8 to 2 for FLUX, over 150 updates).
        form: "clipped" is the released one and needs no more than the trust region of its clip; "squared" the paper's.
        clip_range: as in `Clipped`, of the ratios of whole paths.
        guard: weights w of GRPO-Guard; False sets them to 1. They are 1 as long as the weights are those that sampled.
        kl_weight: >= 0; > 0 makes the objective need "reference".
    """

    beta: float = 15.0
    form: Literal["clipped", "squared"] = "clipped"
    clip_range: ClipRange = 0.2
    guard: bool = True
    kl_weight: float = 0.0

    name: ClassVar[str] = "tmpo"
    coupled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise UserError(f"beta is {self.beta!r}; expected a number > 0; set objective.beta, for example to 15.")
        if self.form not in ("clipped", "squared"):
            raise UserError(f"form is {self.form!r}; expected 'clipped' or 'squared'; set objective.form to one.")
        clip_bounds(self.clip_range)
        check_kl_weight(self.kl_weight)

    @property
    def needs(self) -> frozenset[str]:
        guarded = self.guard and self.form == "clipped"
        return needed("edges", "paths", old_mean=guarded, reference=self.kl_weight > 0)

    def __call__(self, edges: EdgeScalars) -> LossTerms:
        paths = _Paths(edges)
        log_ratio = edges.log_prob - edges.old_log_prob.detach()
        q = paths.log_softmax(paths.sum(edges.log_prob))
        t = paths.log_softmax(self.beta * paths.value.to(q))
        error = q - t
        if self.form == "squared":
            term = error.square()
            metrics = {"ratio": paths.mean(paths.sum(log_ratio).exp())}
        else:
            low, high = clip_bounds(self.clip_range)
            change = paths.sum(log_ratio)
            change = change - paths.group_mean(change.detach())
            term, of_paths = clipped_surrogate(change, -error.detach(), low, high)
            if self.guard:
                w = (paths.sum(ratio_norm(edges)) / paths.length).exp().clamp(1 - low, 1 + high)
                term = term * w.detach()
            metrics = {name: paths.mean(x.to(term)) for name, x in of_paths.items()}
        metrics |= {"policy_loss": paths.mean(term), "balance_error": paths.mean(error.detach().square())}
        return with_kl(edges, paths.mean(term), self.kl_weight, metrics)


class _Paths:
    """The P paths (root, leaf) with a value, and sums between them and the E edges.

    value, length (P,): value and number of edges of each path. group (P,): number of its group, 0, 1, ...
    """

    def __init__(self, edges: EdgeScalars):
        given = required(edges, "paths")
        roots, row = torch.unique(required(edges, "root"), return_inverse=True)
        edge, leaf = (~given.isnan()).nonzero(as_tuple=True)
        # one number per (root, leaf) that occurs, in rising order
        found, self.path = torch.unique(row[edge] * given.shape[1] + leaf, return_inverse=True)
        self.edge, self.paths, self.edges = edge, len(found), len(edges)
        self.length = self._to_paths(torch.ones_like(given[edge, leaf]))
        self.value = self._to_paths(given[edge, leaf]) / self.length
        group = torch.zeros_like(roots).index_copy(0, row, required(edges, "group"))
        groups, self.group = torch.unique(group[found // max(given.shape[1], 1)], return_inverse=True)
        self.groups = len(groups)

    def sum(self, x: Tensor) -> Tensor:
        """(E,) -> (P,): over the edges of each path."""
        return self._to_paths(x[self.edge])

    def mean(self, x: Tensor) -> Tensor:
        """(P,) -> (E,): over the paths through each edge; 0 where there is none."""
        count = torch.zeros(self.edges, dtype=x.dtype, device=x.device)
        total = count.index_add(0, self.edge, x[self.path])
        return total / count.index_add(0, self.edge, torch.ones_like(x[self.path])).clamp(min=1)

    def group_mean(self, x: Tensor) -> Tensor:
        """(P,) -> (P,): the mean of its group at every path."""
        zero = torch.zeros(self.groups, dtype=x.dtype, device=x.device)
        count = zero.index_add(0, self.group, torch.ones_like(x))
        return (zero.index_add(0, self.group, x) / count)[self.group]

    def log_softmax(self, x: Tensor) -> Tensor:
        """(P,) -> (P,): within each group."""
        zero = torch.zeros(self.groups, dtype=x.dtype, device=x.device)
        peak = zero.scatter_reduce(0, self.group, x.detach(), "amax", include_self=False)
        x = x - peak[self.group]
        return x - zero.index_add(0, self.group, x.exp()).log()[self.group]

    def _to_paths(self, x: Tensor) -> Tensor:
        return torch.zeros(self.paths, dtype=x.dtype, device=x.device).index_add(0, self.path, x)
