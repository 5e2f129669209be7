"""One policy update: from a rollout's tree and the advantages of its edges to gradients.

The loss is the sum of the objective's terms over the trained edges of all processes, divided by the sum of their
weights. Edges that leave one state share its forward. Rows that cannot contribute (advantage 0 and nothing else to
learn from) are skipped: their gradient is exactly zero.

An objective on leaves (DiffusionNFT) takes noised leaves in place of states with their edges: see `flowrl.leaves`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

import samplers
from flowrl.errors import GuardStop
from flowrl.leaves import leaf_count, leaf_rows, leaf_scalars
from flowrl.objectives import (
    EdgeScalars,
    LeafObjective,
    LeafScalars,
    MetricMeans,
    Objective,
    Scalars,
    scalar_gradients,
    surrogate,
)

if TYPE_CHECKING:
    from flowrl.layer_tuning import Progress
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
    leaf_advantage: (R, L), NaN = the leaf is out of the loss; for objectives that need "leaves" or "paths".
    root_part: (R,) which inner update a root belongs to, for those that need "leaves". progress: for "target".
    """

    tree: samplers.Tree
    cond: RootConditioning
    advantage: Tensor
    weight: Tensor
    group: Tensor
    part: Tensor
    leaf_advantage: Tensor | None = None
    root_part: Tensor | None = None
    progress: Progress | None = None

    def given(self, name: str) -> Any:
        """A field that only some objectives need; ValueError where it was not filled."""
        if getattr(self, name) is None:
            raise ValueError(f"the objective needs Batch.{name}, which is None; fill it when the batch is made.")
        return getattr(self, name)


@dataclass(frozen=True)
class UpdateSettings:
    """How gradients are computed.

    guidance: of likelihoods and velocities of edges. micro_batch: rows per forward. kl_form: "exact" or "published".
    on_policy: the weights are still those that sampled, so that those need no forward of their own: the shift of the
    mean is 0, and so is its gradient. epoch: number of this pass over the rollout; leaves get fresh noise in each.
    """

    guidance: float
    micro_batch: int
    kl_form: str = "exact"
    on_policy: bool = False
    epoch: int = 0


def active_states(batch: Batch, part: int, objective: Objective) -> Tensor:
    """Rows of the states of an inner update that have a gradient."""
    edges = batch.tree.edges
    counts = batch.weight > 0
    if "reference" not in objective.needs and not objective.coupled:
        learns = batch.advantage != 0
        if "target" in objective.needs:
            learns = learns | (batch.given("progress").weight > 0)
        counts = counts & learns
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
    kl = shift = target = target_weight = paths = None
    if "reference" in objective.needs:
        with torch.no_grad(), policy.weights("reference"):
            v_ref = policy.predict(x, s, cond, settings.guidance)
        kl = samplers.kl(v[at], v_ref[at], b, c, d, settings.kl_form, tree.density.reduction)
    if "old_mean" in objective.needs:
        if settings.on_policy:
            shift = torch.zeros_like(log_prob)
        else:
            with torch.no_grad(), policy.weights("old"):
                v_old = policy.predict(x, s, cond, settings.guidance)
            squares = (v[at] - v_old[at]).square().flatten(1)
            over_elements = squares.sum(1) if tree.density.reduction == "sum" else squares.mean(1)
            shift = over_elements * (b * b).float().to(device)
    if "target" in objective.needs:
        progress = batch.given("progress")
        target = (v[at] - progress.velocity[rows][at]).square().flatten(1).mean(1)
        target_weight = progress.weight[edges].to(device)
    if "paths" in objective.needs:
        values = batch.given("leaf_advantage")[tree.edges.root[edges]]
        passed = tree.leaf_mask(edges) & (batch.weight[edges] > 0)[:, None]
        paths = values.where(passed, torch.nan).to(device)
    return EdgeScalars(
        log_prob=log_prob,
        old_log_prob=tree.edges.log_prob[edges.to(device)],
        advantage=batch.advantage[edges].to(device),
        weight=batch.weight[edges].float().to(device),
        kl=kl,
        jacobian=b.abs().float().to(device),
        c=c.float().to(device),
        d=d.float().to(device),
        scale=(torch.ones_like(c) if tree.density.density == "unscaled" else 1 / (2 * c * c)).float().to(device),
        mean_shift_sq=shift,
        target_sq=target,
        target_weight=target_weight,
        group=batch.group[tree.edges.root[edges]].to(device),
        root=tree.edges.root[edges].to(device),
        paths=paths,
    )


def total_weight(batch: Batch, part: int, objective: Objective) -> float:
    """Sum of the weights of all valid edges, or rows of leaves, of an inner update on this process."""
    if "leaves" in objective.needs:
        return float(leaf_count(batch, part, cast(LeafObjective, objective)))
    return float(batch.weight[batch.part[batch.tree.edges.state] == part].double().sum())


def forwards_per_row(objective: Objective, settings: UpdateSettings) -> int:
    """Model calls per row: of the trained weights, and where needed of the reference and of the sampling weights."""
    old = bool(objective.needs & {"old", "old_mean"}) and not settings.on_policy
    return 1 + ("reference" in objective.needs) + old


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
    """Add the gradient of one inner update to the parameters; returns its metrics and the number of rows used.

    A row is a state with its edges, or a leaf at one time. The metrics are means over the edges (leaves) of these rows;
    the loss counts all valid edges, as its gradient does.
    normaliser: sum of `total_weight` of this inner update over all processes. scale: a loss scaler's.
    """
    metrics, on_leaves = MetricMeans(), "leaves" in objective.needs

    def scalars(rows: Tensor) -> Scalars:
        if on_leaves:
            return leaf_scalars(policy, batch, rows, cast(LeafObjective, objective), settings)
        return edge_scalars(policy, batch, rows, objective, settings)

    if on_leaves:
        rows = leaf_rows(batch, part, cast(LeafObjective, objective), settings.epoch)
    else:
        rows = active_states(batch, part, objective)
    if on_leaves:
        chunks = list(rows.split(settings.micro_batch)) if len(rows) else []
    else:
        chunks = batch.tree.micro_batches(rows, settings.micro_batch)
    weights: list[dict[str, Tensor]] = [{} for _ in chunks]
    if objective.coupled and chunks:  # all scalars first, then their gradients through the model
        with torch.no_grad():
            parts: list[Any] = [scalars(chunk) for chunk in chunks]
        everything = parts[0].cat(parts)
        out, gradients = scalar_gradients(objective, everything, normaliser)
        metrics.add(everything, out)
        sizes = [len(p) for p in parts]
        split = {name: g.split(sizes) for name, g in gradients.items()}
        weights = [{name: g[i] for name, g in split.items()} for i in range(len(chunks))]
    for chunk, weight in zip(chunks, weights, strict=True):
        found = scalars(chunk)
        if objective.coupled:
            loss = surrogate(found, weight)
        else:
            out = objective(found)
            metrics.add(found, out)
            loss = out.terms.sum() / normaliser
        scale(loss).backward()
        if on_chunk is not None:
            on_chunk(len(chunk))
    if not chunks:  # every process names the same metrics, also one that has nothing to add
        empty = _nothing(objective)
        metrics.add(empty, objective(empty))
    metrics.weight = total_weight(batch, part, objective)
    return metrics, len(rows)


def _nothing(objective: Objective) -> Scalars:
    needs, integers = objective.needs, {name: torch.zeros(0, dtype=torch.long) for name in ("group", "root")}
    names = ["advantage", "weight"] + ["kl"] * ("reference" in needs)
    if "leaves" in needs:
        return LeafScalars(**{name: torch.zeros(0) for name in [*names, "positive", "negative"]}, **integers)
    names += ["log_prob", "old_log_prob", "jacobian", "c", "d", "scale"] + ["mean_shift_sq"] * ("old_mean" in needs)
    names += ["target_sq", "target_weight"] * ("target" in needs)
    paths = {"paths": torch.zeros(0, 1)} if "paths" in needs else {}
    return EdgeScalars(**{name: torch.zeros(0) for name in names}, **integers, **paths)


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
