"""The loss of one update on `GaussianPolicy`, written out edge by edge in float64 and left to autograd.

Nothing of `flowrl.update`, `flowrl.objectives` or `flowrl.advantages` is used: weights, advantages, log-probs, KL and
clip follow from the formulas. Of the tree only what was sampled is read: the plan's shape, latents and their times.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import samplers

STD = 0.5  # of the policy's data


def velocity(x: Tensor, s: float, mean: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """v of one latent (D,): k x - (s / V) (m + W m + w), k = (s - (1 - s) std^2) / V, V = (1 - s)^2 std^2 + s^2."""
    w, bias = weights
    variance = (1 - s) ** 2 * STD**2 + s**2
    return (s - (1 - s) * STD**2) / variance * x - s / variance * (mean + w @ mean + bias)


def flow_step(s: float, s_next: float, level: float) -> tuple[float, float, float]:
    """(a, b, c) of Flow-SDE (arXiv 2505.05470): x' = x - v d - h^2 d / (2 s) (x + (1 - s) v) + h sqrt(d) noise."""
    d, limit = s - s_next, s_next if s >= 1 else s
    h = level * math.sqrt(s / (1 - limit))
    pull = h**2 * d / (2 * s)
    return 1 - pull, -d - pull * (1 - s), h * math.sqrt(d)


def loss(
    weights: tuple[Tensor, Tensor],
    old: tuple[Tensor, Tensor],
    tree: samplers.Tree,
    means: Tensor,
    leaf_advantages: Tensor,
    *,
    clip: float,
    kl_weight: float = 0.0,
    kl_form: str = "exact",
    roots: list[int] | None = None,
) -> Tensor:
    """sum_e w_e [max(-A r, -A clip(r)) + beta KL_e] / sum_e w_e over the trained edges of some roots (default all).

    weights, old: (W, w) in float64, those trained and those that sampled. means: (R, D). leaf_advantages: (R, L), NaN =
    missing. An edge's A is the mean, its w the share, of the valid leaves below it.
    """
    plan, total, normaliser = tree.plan, torch.zeros((), dtype=torch.float64), 0.0
    reference = (torch.zeros_like(old[0]), torch.zeros_like(old[1]))
    for e in range(len(tree.edges)):
        root, node = int(tree.edges.root[e]), int(tree.edges.node[e])
        if roots is not None and root not in roots:
            continue
        below = [n for n, leaf in enumerate(plan.leaves) if node in ancestors(plan, leaf)]
        valid = [a for n in below if not math.isnan(a := leaf_advantages[root, n].item())]
        if not valid:
            continue
        advantage, weight = sum(valid) / len(valid), len(valid) / len(plan.leaves)
        s, s_next = plan.s[node], plan.s_next[node]
        a, b, c = flow_step(s, s_next, plan.level[node])
        x = tree.states.x[tree.edges.state[[e]]].flatten().double()
        x_next, mean = tree.edges.x_next[[e]].flatten().double(), means[root].double()

        def log_prob(using: tuple[Tensor, Tensor], x=x, s=s, mean=mean, a=a, b=b, c=c, x_next=x_next) -> Tensor:
            centre = a * x + b * velocity(x, s, mean, using)
            return torch.distributions.Normal(centre, c).log_prob(x_next).mean()

        ratio = (log_prob(weights) - log_prob(old).detach()).exp()
        term = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
        if kl_weight:
            shift = b * (velocity(x, s, mean, weights) - velocity(x, s, mean, reference))
            kl = (shift**2 / (2 * c**2)).mean()
            term = term + kl_weight * kl * (s - s_next if kl_form == "published" else 1.0)
        total, normaliser = total + weight * term, normaliser + weight
    return total / normaliser


def ancestors(plan: samplers.Plan, leaf: int) -> list[int]:
    """The leaf and all nodes above it, without the root."""
    path = []
    while leaf > 0:
        path.append(leaf)
        leaf = plan.parent[leaf]
    return path
