"""Selection: which leaves to learn from, as a mask over leaves.

    DanceGRPO, best of n       best_and_worst(advantages, groups[:, None].expand(R, L), n / 2, n / 2)
    B2-DiffuRL                 best_and_worst(z, branch_sets(plan, R), 1, 1, at_least=0.5, less_than=-0.5),
                               z = PromptHistory.standardise(scores, ...)

To learn as if the other leaves had not been drawn, pass the mask as ``valid`` to a credit rule. To keep all leaves in
the statistics and only prune edges: ``credit._replace(weights=edge_weights(plan, valid & mask))``, as for the masks of
`samplers.pruning`.

Deviations. B2-DiffuRL's std of a single score is NaN; here such a score is missing. A set with fewer than two valid
scores selects nothing, whatever its one score is.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowrl.errors import UserError
from samplers.plans import Plan


def branch_sets(plan: Plan, roots: int) -> Tensor:
    """(R, L) int64 ids: leaves of one tree with the same last fork above them share one; no fork = the tree's own."""
    last_fork = [0] * len(plan)
    for node, parent in enumerate(plan.parent[1:], start=1):  # parents come before their children
        last_fork[node] = parent if len(plan.children(parent)) > 1 else last_fork[parent]
    return torch.arange(roots)[:, None] * len(plan) + torch.tensor([last_fork[leaf] for leaf in plan.leaves])


def best_and_worst(
    scores: Tensor,
    sets: Tensor,
    top: int,
    bottom: int,
    *,
    at_least: float = -torch.inf,
    less_than: float = torch.inf,
    valid: Tensor | None = None,
) -> Tensor:
    """(R, L) bool: in each set the ``top`` best scores if >= at_least and the ``bottom`` worst ones if < less_than.

    A set with fewer than top + bottom valid scores may select all of them. Equal scores go by leaf order, the earlier
    leaf as the better one.

    Args:
        scores: (R, L), NaN = missing. sets: (R, L) integer ids, each set whole on one process.
        valid: (R, L) bool, None = all that are not missing.

    Raises:
        UserError: shapes that differ, ids that are not integers, negative counts.
    """
    same = scores.shape == sets.shape and (valid is None or valid.shape == scores.shape)
    if not same or sets.is_floating_point() or min(top, bottom) < 0:
        raise UserError(
            f"selection got scores {tuple(scores.shape)}, sets {tuple(sets.shape)} of {sets.dtype}, top {top} and "
            f"bottom {bottom}; expected one integer set id per score and counts >= 0; take both from one rollout."
        )
    s, ids = scores.flatten().cpu(), sets.flatten().cpu()
    present = ~s.isnan() if valid is None else valid.flatten().cpu() & ~s.isnan()
    order = present.nonzero().squeeze(1)
    order = order[s[order].argsort(descending=True, stable=True)]
    order = order[ids[order].argsort(stable=True)]  # set by set, the best first
    _, size = ids[order].unique_consecutive(return_counts=True)
    rank = torch.arange(len(order)) - (size.cumsum(0) - size).repeat_interleave(size)
    size = size.repeat_interleave(size)
    best, worst = (rank < top) & (s[order] >= at_least), (rank >= size - bottom) & (s[order] < less_than)
    mask = torch.zeros_like(present)
    mask[order[(best | worst) & (size >= 2)]] = True
    return mask.view(scores.shape)


class PromptHistory:
    """Scores of the last updates by prompt, and how a new score stands among them (B2-DiffuRL, released code).

        z = (score - mean) / (std + eps)    over the prompt's scores of this update and of the ``updates`` before it

    std is the sample std. An update counts whether or not the prompt was in it. The history is the same on every
    process, because a prompt may come back on another one.
    """

    def __init__(self, updates: int = 8) -> None:
        if updates < 0:
            raise UserError(f"the history has {updates} updates; expected a number >= 0; 0 looks at this update alone.")
        self._past: deque[tuple[list[int], list[float]]] = deque(maxlen=updates + 1)

    def standardise(
        self,
        scores: Tensor,
        prompts: Tensor,
        rows: Tensor,
        total: int,
        *,
        eps: float = 1e-8,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Add the scores of an update and return their z, (R, L) float64: NaN where missing or alone, 0 where equal.

        Args:
            scores: (R, L), NaN = missing.
            prompts: (R,) integer ids, the same in all updates.
            rows: (R,) place of each root among the ``total`` roots of the update on all processes.
            reduce: sums a (total, 2 L + 1) float64 tensor over all processes. Called exactly once, on every process,
                also one that has no root. None = this process is alone.

        Raises:
            UserError: an infinite score, shapes that do not fit.
        """
        roots = scores.shape[:1]
        if scores.ndim != 2 or prompts.shape != roots or rows.shape != roots or prompts.is_floating_point():
            raise UserError(
                f"history got scores {tuple(scores.shape)}, prompts {tuple(prompts.shape)} of {prompts.dtype} and rows "
                f"{tuple(rows.shape)}; expected (R, L), (R,) integers and (R,); take them from one rollout."
            )
        x = scores.detach().to("cpu", torch.float64)
        if x.isinf().any():
            raise UserError("history got an infinite score; expected finite ones, or NaN where there is none.")
        # Every process fills the rows of its own roots, so that the sum is the table of the whole update.
        table = x.new_zeros(total, 1 + 2 * x.shape[1])
        table[rows.cpu()] = torch.cat([prompts.cpu().double()[:, None], (~x.isnan()).double(), x.nan_to_num()], 1)
        names, present, values = (reduce or (lambda t: t))(table).split([1, x.shape[1], x.shape[1]], 1)
        shown = present > 0
        self._past.append((names.expand_as(shown)[shown].long().tolist(), values[shown].tolist()))

        known: dict[int, list[float]] = defaultdict(list)
        for ids, past in self._past:
            for prompt, score in zip(ids, past, strict=True):
                known[prompt].append(score)
        z = torch.full_like(x, torch.nan)
        for root, prompt in enumerate(prompts.tolist()):
            if len(known[prompt]) >= 2:
                all_scores = torch.tensor(known[prompt], dtype=torch.float64)
                low = all_scores.min()  # the mean of equal scores is then that score to the bit
                deviation = x[root] - (low + (all_scores - low).mean())
                z[root] = torch.where(deviation == 0, 0.0, deviation / (all_scores.std() + eps))
        return z

    def state_dict(self) -> dict[str, Any]:
        """A copy that JSON holds to the bit."""
        return {"updates": [{"prompts": list(ids), "scores": list(scores)} for ids, scores in self._past]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; a shorter history keeps the newest updates."""
        self._past.clear()
        self._past.extend((list(update["prompts"]), list(update["scores"])) for update in state["updates"])
