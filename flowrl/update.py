"""One policy update: from a rollout's tree and the advantages of its edges to gradients.

The loss is the sum of the objective's terms over the trained edges of all processes, divided by the sum of their
weights. Edges that leave one state share its forward. Rows that cannot contribute (advantage 0 and no KL) are skipped:
their gradient is exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

import samplers
from flowrl.errors import GuardStop
from flowrl.objectives import EdgeScalars, MetricMeans, Objective, scalar_gradients, surrogate

if TYPE_CHECKING:
    from flowrl.policies import Policy
    from flowrl.policies.conditioning import Conditioning

T = TypeVar("T")


@dataclass(frozen=True)
class RootConditioning:
    """Conditioning of the roots of a rollout: a row per prompt, and which row each root has, (R,)."""

    prompts: Conditioning
    row: Tensor

    def __getitem__(self, roots: Tensor) -> Conditioning:
        """Rows of these roots, (n,) long."""
        return self.prompts[self.row.to(roots.device)[roots]]


@dataclass(frozen=True)
class Batch:
    """A rollout with its credit: everything an update needs.

    cond: conditioning by root. advantage, weight: (E,) of the tree's edges, weight 0 = out of the loss.
    group: (R,) which prompt of the update a root belongs to. part: (M,) which inner update a state belongs to.
    """

    tree: samplers.Tree
    cond: RootConditioning
    advantage: Tensor
    weight: Tensor
    group: Tensor
    part: Tensor


@dataclass(frozen=True)
class UpdateSettings:
    guidance: float
    micro_batch: int
    kl_form: str = "exact"


def active_states(batch: Batch, part: int, objective: Objective) -> Tensor:
    """Rows of the states of an inner update that have a gradient."""
    edges = batch.tree.edges
    counts = batch.weight > 0
    if "reference" not in objective.needs and not objective.coupled:
        counts = counts & (batch.advantage != 0)
    has_edge = torch.zeros(len(batch.tree.states), dtype=torch.bool)
    has_edge[edges.state[counts]] = True
    return ((batch.part == part) & has_edge).nonzero().flatten()


def edge_scalars(
    policy: Policy, batch: Batch, rows: Tensor, objective: Objective, settings: UpdateSettings
) -> EdgeScalars:
    """The scalars of all edges that leave these states, from one forward of the policy, with gradient if enabled."""
    tree = batch.tree
    x, s = tree.states.x[rows], tree.states.s[rows.to(tree.states.s.device)]
    cond = batch.cond[tree.states.root[rows]]
    v = policy.predict(x, s, cond, settings.guidance)
    edges, position, log_prob = tree.log_prob(v, rows)
    device = log_prob.device
    b, c, d = (t[edges] for t in (tree.edges.b, tree.edges.c, tree.edges.d))
    at = position.to(device)
    kl = shift = None
    if "reference" in objective.needs:
        with torch.no_grad(), policy.weights("reference"):
            v_ref = policy.predict(x, s, cond, settings.guidance)
        kl = samplers.kl(v[at], v_ref[at], b, c, d, settings.kl_form, tree.density.reduction)
    if "old_mean" in objective.needs:
        with torch.no_grad(), policy.weights("old"):
            v_old = policy.predict(x, s, cond, settings.guidance)
        shift = (v[at] - v_old[at]).square().flatten(1).mean(1) * (b * b).float().to(device)
    return EdgeScalars(
        log_prob=log_prob,
        old_log_prob=tree.edges.log_prob[edges.to(device)],
        advantage=batch.advantage[edges].to(device),
        weight=batch.weight[edges].float().to(device),
        kl=kl,
        jacobian=b.abs().float().to(device),
        c=c.float().to(device),
        d=d.float().to(device),
        mean_shift_sq=shift,
        group=batch.group[tree.edges.root[edges]].to(device),
        root=tree.edges.root[edges].to(device),
    )


def accumulate_gradients(
    policy: Policy,
    batch: Batch,
    part: int,
    objective: Objective,
    normaliser: float,
    settings: UpdateSettings,
    *,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    on_chunk: Callable[[int], None] | None = None,
) -> tuple[MetricMeans, int]:
    """Add the gradient of one inner update to the parameters; returns its metrics and the number of states used.

    The metrics are means over the edges of these states; the loss counts all valid edges, as its gradient does.
    normaliser: sum of the weights of the valid edges of this inner update on all processes. scale: a loss scaler's.
    """
    metrics, rows = MetricMeans(), active_states(batch, part, objective)
    chunks = list(rows.split(settings.micro_batch)) if len(rows) else []
    weights: list[dict[str, Tensor]] = [{} for _ in chunks]
    if objective.coupled and chunks:  # all scalars first, then their gradients through the model
        with torch.no_grad():
            parts = [edge_scalars(policy, batch, chunk, objective, settings) for chunk in chunks]
        out, gradients = scalar_gradients(objective, EdgeScalars.cat(parts), normaliser)
        metrics.add(EdgeScalars.cat(parts), out)
        sizes = [len(p) for p in parts]
        split = {name: g.split(sizes) for name, g in gradients.items()}
        weights = [{name: g[i] for name, g in split.items()} for i in range(len(chunks))]
    for chunk, weight in zip(chunks, weights, strict=True):
        scalars = edge_scalars(policy, batch, chunk, objective, settings)
        if objective.coupled:
            loss = surrogate(scalars, weight)
        else:
            out = objective(scalars)
            metrics.add(scalars, out)
            loss = out.terms.sum() / normaliser
        scale(loss).backward()
        if on_chunk is not None:
            on_chunk(len(chunk))
    if not chunks:  # every process names the same metrics, also one that has nothing to add
        empty = _no_edges(objective)
        metrics.add(empty, objective(empty))
    metrics.weight = float(batch.weight[batch.part[batch.tree.edges.state] == part].double().sum())
    return metrics, len(rows)


def _no_edges(objective: Objective) -> EdgeScalars:
    names = ["log_prob", "old_log_prob", "advantage", "weight", "jacobian", "c", "d"]
    names += ["kl"] * ("reference" in objective.needs) + ["mean_shift_sq"] * ("old_mean" in objective.needs)
    integers = {name: torch.zeros(0, dtype=torch.long) for name in ("group", "root")}
    return EdgeScalars(**{name: torch.zeros(0) for name in names}, **integers)


@torch.no_grad()
def on_policy_deviation(policy: Policy, batch: Batch, guidance: float) -> float:
    """Largest |ratio - 1| when the rollout's own model calls are repeated: 0 on a CPU in float32."""
    worst = 0.0
    for call in batch.tree.replay_chunks():
        v = policy.predict(call.x, call.s, batch.cond[call.index], guidance)
        edges, _, log_prob = batch.tree.log_prob(v[call.rows.to(v.device)], call.states)
        old = batch.tree.edges.log_prob[edges.to(log_prob.device)]
        worst = max(worst, float(((log_prob - old).exp() - 1).abs().max()))
    return worst


def check_on_policy(
    policy: Policy, batch: Batch, guidance: float, *, bound: float, dtype: str, modules: list[torch.nn.Module]
) -> float:
    """The deviation of `on_policy_deviation`; GuardStop with the likely cause when it is outside its bound."""
    deviation = on_policy_deviation(policy, batch, guidance)
    if deviation <= bound:
        return deviation
    suspects = []
    if any(m.training for module in modules for m in module.modules()):
        suspects.append("a part of the network is in training mode (dropout?)")
    if again := on_policy_deviation(policy, batch, guidance) != deviation:
        suspects.append("two equal calls differ: the network or its kernels are not deterministic")
    if dtype != "float32":
        suspects.append(f"the network computes in {dtype}")
    if guidance != 1.0:
        suspects.append("guidance is a part of the sampled policy: rollout and update must use the same")
    if not again and not suspects:
        suspects.append("the batch geometry of the model calls, or a prompt that was encoded twice differently")
    raise GuardStop(
        f"the on-policy ratio deviates from 1 by {deviation:.3g} before the first optimizer step; expected at most "
        f"{bound:.3g}; suspects: {'; '.join(suspects)}. Set self_check.bound_low_precision higher only if you know why"
    )


def with_halving(run: Callable[[int], T], size: int, what: str, note: Callable[[str], None]) -> tuple[T, int]:
    """`run(size)`, halving the size whenever the device runs out of memory; returns the result and the last size.

    `run` must start over each time. Results do not depend on the size beyond rounding.
    """
    while True:
        try:
            return run(size), size
        except torch.OutOfMemoryError:
            if size <= 1:
                raise
        torch.cuda.empty_cache()
        size = max(1, size // 2)
        note(f"out of memory: {what} goes on with {size} rows per model call")
