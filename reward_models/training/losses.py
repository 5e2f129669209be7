"""Losses of scorers that learn from comparisons. Pure functions of scores.

    bradley_terry   -log sigmoid(s_w - s_l)                                            (ImageReward, arXiv 2304.05977)
    cross_entropy   -p log softmax(s)_1 - (1 - p) log softmax(s)_2                     (HPSv2, PickScore)
    triplet         max(0, margin + s_negative - s_positive)                           (Social Reward, arXiv 2402.09872)

The softmax of two scores is a sigmoid of their difference, so cross_entropy with p in {0, 1} is bradley_terry; the two
differ in what they do with divided votes. With cosines as scores, triplet is half of the usual hinge on squared
distances of unit vectors, |a - p|^2 = 2 - 2 cos, at twice the margin.

Deviations. HPSv2 and PickScore sum over the batch, here it is the weighted mean, so that a learning rate does not
depend on the batch size. PickScore adds log 0.5 to ties only, which puts the optimum of a tie at 0; here the entropy
of the label is taken off for every p, which does that for all of them and changes no gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

MOST_LOGIT_SCALE = math.log(100)  # bound on CLIP's trained logit scale, as in CLIP and HPSv2


def bradley_terry(gap: Tensor, preference: Tensor) -> Tensor:
    """Loss of each comparison: (...) scores of the first minus the second, (...) labels -> (...).

    A label above 1/2 says that the first won, below that the second did; 1/2 (a tie) costs nothing.
    """
    side = (preference - 0.5).sign()
    return torch.where(side == 0, 0.0, softplus(-side * gap))


def cross_entropy(gap: Tensor, preference: Tensor) -> Tensor:
    """Loss of each comparison above its least: (...) gaps, (...) shares of votes for the first in [0, 1] -> (...)."""
    entropy = -(torch.xlogy(preference, preference) + torch.xlogy(1 - preference, 1 - preference))
    return preference * softplus(-gap) + (1 - preference) * softplus(gap) - entropy


def triplet(gap: Tensor, preference: Tensor, margin: float) -> Tensor:
    """Loss of each comparison: the winner should be ahead by ``margin``; ties cost nothing."""
    side = (preference - 0.5).sign()
    return torch.where(side == 0, 0.0, (margin - side * gap).clamp(min=0))


def weighted_mean(losses: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean over pairs of their mean over aspects: (B, A) losses, (B, A) labels, NaN = not judged, (B,) weights -> ().

    A pair that was judged in few aspects counts as much as one that was judged in all.
    """
    known = ~labels.isnan()
    each = torch.where(known, losses, 0.0).sum(1) / known.sum(1).clamp(min=1)
    weights = weights * known.any(1)
    return (each * weights).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def comparison_loss(name: str, gap: Tensor, labels: Tensor, weights: Tensor, margin: float = 0.2) -> Tensor:
    """One number for a batch: (B, A) gaps, (B, A) labels with NaN = not judged, (B,) weights -> ().

    Raises:
        ValueError: unknown name.
    """
    if name != "cross_entropy":  # a tie has no winner: it says nothing, and has no share in the mean
        labels = labels.masked_fill(labels == 0.5, math.nan)
    preference = labels.nan_to_num(0.5)
    if name == "bradley_terry":
        losses = bradley_terry(gap, preference)
    elif name == "cross_entropy":
        losses = cross_entropy(gap, preference)
    elif name == "triplet":
        losses = triplet(gap, preference, margin)
    else:
        raise ValueError(f"got loss {name!r}, expected one of {', '.join(LOSSES)}. Use one of these.")
    return weighted_mean(losses, labels, weights)


LOSSES = ("bradley_terry", "cross_entropy", "triplet")
