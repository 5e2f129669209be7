"""The result of a rollout: leaves to decode, and flat arrays of what training needs.

Only latents that training needs are kept, each of them once: `tree.states.x[rows]` and `tree.edges.x_next[rows]` read
from one pool. Latents and old log-probs lie on the rollout's device; indices and coefficients on the CPU, where they
steer without synchronising.

R roots, N nodes, L leaves per root, M kept states (one per node that trained edges leave, per root), E trained edges.
States are in the order of the rollout's model calls; edges are sorted by state, siblings next to each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from samplers.kernels import affine
from samplers.keys import Key
from samplers.log_prob import Density
from samplers.plans import Cost, Plan


class Blocks(Protocol):
    """A pool whose latents are not stored: they are grown again, a block of roots at a time (`regrow.Regrown`).

    regrown: rows predicted for that so far. block_of: the block in which each of these rows of the pool lies.
    """

    regrown: int

    @property
    def shape(self) -> torch.Size: ...

    def block_of(self, rows: Tensor) -> Tensor: ...

    def __getitem__(self, rows: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Latents:
    """Rows of a pool of latents, in the order of `index`. `latents[rows]` gathers (n, C, H, W)."""

    pool: Tensor | Blocks
    index: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        if isinstance(self.pool, Tensor):
            return self.pool[self.index[rows].to(self.pool.device)]
        return self.pool[self.index[rows]]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.index), *self.pool.shape[1:]))


def _select(table: States | Edges, rows: Tensor) -> dict[str, Any]:
    """These rows of every column, in this order; latents are not copied."""
    columns: dict[str, Any] = {f.name: getattr(table, f.name) for f in fields(table)}
    return {
        name: Latents(c.pool, c.index[rows]) if isinstance(c, Latents) else c[rows.to(c.device)]
        for name, c in columns.items()
    }


@dataclass(frozen=True, eq=False)
class States:
    """Inputs of the training forwards: x_s at s, one per node that trained edges leave.

    x: (M, C, H, W) float32. s: (M,) float32. root: (M,) row of the keys. node: (M,) node of the plan. call: (M,) model
    call of the rollout that predicted it, row: (M,) its row in that call.
    """

    x: Latents
    s: Tensor
    root: Tensor
    node: Tensor
    call: Tensor
    row: Tensor

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True, eq=False)
class Edges:
    """The trained steps.

    state: (E,) row in the states. x_next: (E, C, H, W) float32. a, b, c: (E,) float64, x_next = a x + b v + c noise.
    s, s_next: (E,) float64; d = s - s_next. log_prob: (E,) float32, under the policy that sampled. node: (E,) node of
    the plan that the edge leads to. root: (E,) row of the keys. weight: (E,) float64, share of the root's leaves
    below; these sum to 1 over the edges of one root that all its paths cross at one depth.
    """

    state: Tensor
    x_next: Latents
    a: Tensor
    b: Tensor
    c: Tensor
    s: Tensor
    s_next: Tensor
    log_prob: Tensor
    node: Tensor
    root: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.state)

    @property
    def d(self) -> Tensor:
        """Step length s - s_next, (E,) float64."""
        return self.s - self.s_next


@dataclass(frozen=True, eq=False)
class Replay:
    """One model call of the rollout, to be repeated: predict(x, s, index)[rows] belongs to `states`.

    x: (n, C, H, W), s: (n,), index: (n,) as in the rollout, same rows in the same places; rows that no training needs
    were not kept and hold a copy of a kept one. states: (m,) rows of the tree's states. rows: (m,) their place.
    """

    x: Tensor
    s: Tensor
    index: Tensor
    states: Tensor
    rows: Tensor


@dataclass(frozen=True, eq=False)
class Tree:
    """What `rollout` returns.

    leaves: (R, L, C, H, W) float32. leaf_nodes: (L,) their nodes. calls: rows of every model call. See `States` and
    `Edges`; both are empty when the rollout did not keep them.
    """

    plan: Plan
    keys: tuple[Key, ...]
    density: Density
    leaves: Tensor
    leaf_nodes: Tensor
    states: States
    edges: Edges
    calls: tuple[int, ...]

    @property
    def cost(self) -> Cost:
        """Model calls of all roots, without guidance: those made, and those that training on the kept states takes.

        Rows that were predicted once more because latents are not stored are among those made."""
        pool, states = self.states.x.pool, len(self.states)
        regrown = 0 if isinstance(pool, Tensor) else pool.regrown
        return Cost(sum(self.calls) + regrown, states, states, self.leaves.shape[0] * self.leaves.shape[1])

    def micro_batches(self, states: Tensor, size: int) -> list[Tensor]:
        """These states, (n,) rows, in lots of at most `size`.

        Where latents are grown again, no lot crosses a block, and those of one block follow each other."""
        pool = self.states.x.pool
        if isinstance(pool, Tensor):
            return list(states.split(size)) if len(states) else []
        block = pool.block_of(self.states.x.index[states])
        return [lot for i in block.unique() for lot in states[block == i].split(size)]

    def prune(self, keep: Tensor) -> Tree:
        """The same rollout with only the edges above the leaves that are kept, and the states that these leave.

        keep: (R, L) bool. Weights become shares of each root's kept leaves; a root without any has no edges left.
        Leaves, model calls and the pool of latents stay."""
        if keep.shape != self.leaves.shape[:2] or keep.dtype != torch.bool:
            raise ValueError(
                f"prune got {keep.dtype} of shape {tuple(keep.shape)}; expected bool {tuple(self.leaves.shape[:2])}. "
                "Give one flag per root and leaf."
            )
        edges, states = self.edges, self.states
        kept_below = (self.leaf_mask() & keep[edges.root]).sum(1)
        chosen = kept_below.nonzero().squeeze(1)
        left, state = edges.state[chosen].unique(return_inverse=True)
        weight = kept_below[chosen].double() / keep.sum(1)[edges.root[chosen]]
        edges = replace(Edges(**_select(edges, chosen)), state=state, weight=weight)
        return replace(self, states=States(**_select(states, left)), edges=edges)

    def leaf_mask(self, edges: Tensor | slice = slice(None)) -> Tensor:
        """(E, L) bool: which leaves of its root lie below each of these edges."""
        return self.plan.below[self.edges.node[edges]]

    @cached_property
    def _fan(self) -> tuple[Tensor, Tensor]:
        count = torch.bincount(self.edges.state, minlength=len(self.states))
        return count, count.cumsum(0) - count

    def edges_of(self, states: Tensor | slice) -> tuple[Tensor, Tensor]:
        """The edges that leave these states: (edges (n,), position (n,) of each one's state among those given)."""
        count, first = (t[states] for t in self._fan)
        position = torch.repeat_interleave(count)
        offset = torch.arange(len(position)) - (count.cumsum(0) - count)[position]
        return first[position] + offset, position

    def mean(self, v: Tensor, states: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Step means of all edges that leave these states, from one velocity per state.

        v: (m, C, H, W), with gradient if wanted; m = number of states. Returns (edges, position, mean (n, C, H, W)).
        """
        edges, position = self.edges_of(states)
        at = position.to(v.device)
        v = v.to(torch.float32)
        return edges, position, affine(self.states.x[states][at], v[at], self.edges.a[edges], self.edges.b[edges])

    def log_prob(self, v: Tensor, states: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        """New log-probs of all edges that leave these states: (edges, position, log_prob (n,)); see `mean`.

        With the rollout's own v they equal `edges.log_prob` bit for bit (on a CPU).
        """
        edges, position, mean = self.mean(v, states)
        return edges, position, self.density.log_prob(self.edges.x_next[edges], mean, self.edges.c[edges])

    def replay_chunks(self) -> Iterator[Replay]:
        """The rollout's model calls that training needs, in their order."""
        for call in self.states.call.unique().tolist():
            states = (self.states.call == call).nonzero().squeeze(1)
            rows = self.states.row[states]
            source = states[0].repeat(self.calls[call])
            source[rows] = states
            x, s = self.states.x[source], self.states.s[source]
            yield Replay(x, s, self.states.root[source].to(s.device), states, rows)
