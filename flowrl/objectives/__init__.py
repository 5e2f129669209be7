"""Objectives: pure functions from the scalars of a group of edges, or of noised leaves, to a loss.

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

An objective that needs "leaves" works in the same way on finished images that are noised again, one number per (image,
time) in place of one per edge; its normaliser is their number.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from flowrl.errors import UserError
from flowrl.objectives.clipped import Clipped
from flowrl.objectives.dppo import DPPO
from flowrl.objectives.guard import Guard
from flowrl.objectives.metrics import MetricMeans
from flowrl.objectives.nft import NFT, old_decay
from flowrl.objectives.scalars import (
    NEEDS,
    EdgeScalars,
    LeafObjective,
    LeafScalars,
    LeafVelocities,
    LossTerms,
    Objective,
    Scalars,
    scalar_gradients,
    surrogate,
)
from flowrl.objectives.softmax_tb import SoftmaxTB

__all__ = [
    "DPPO",
    "NEEDS",
    "NFT",
    "OBJECTIVES",
    "Clipped",
    "EdgeScalars",
    "Guard",
    "LeafObjective",
    "LeafScalars",
    "LeafVelocities",
    "LossTerms",
    "MetricMeans",
    "Objective",
    "Scalars",
    "SoftmaxTB",
    "get_objective",
    "old_decay",
    "scalar_gradients",
    "surrogate",
]

OBJECTIVES: dict[str, type] = {cls.name: cls for cls in (Clipped, Guard, DPPO, SoftmaxTB, NFT)}


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
