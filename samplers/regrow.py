"""Recompute instead of storage: a rollout that keeps images and log-probs, and grows its latents again when asked.

Every draw is a function of its key, so the same model calls with the same weights give the same latents, bit for bit.
Roots are rolled out in blocks; when an update needs latents, the block of their roots is grown again, up to the last
step that is trained, and stays until another one is asked for. So memory is bounded by one block, for one more pass of
sampling per pass over the rollout (none where one block is all).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from samplers.keys import Key
from samplers.log_prob import Density
from samplers.plans import Plan
from samplers.rollout import Predict, check_density, check_keys, regrow, regrown_steps, rollout
from samplers.trees import Edges, Latents, States, Tree


class Regrown:
    """Stands in for the pool of `Latents`: the rows of all blocks in turn, of which one block is in memory.

    regrown: rows that were predicted to grow blocks again.
    """

    def __init__(self, latent_shape: Sequence[int]):
        self.latent_shape = tuple(latent_shape)
        self.grow: list[Callable[[], tuple[Tensor, int]]] = []
        self.ends = torch.zeros(0, dtype=torch.long)  # where the rows of each block end
        self.kept: tuple[int, Tensor] | None = None
        self.regrown = 0

    def add(self, grow: Callable[[], tuple[Tensor, int]], latents: Tensor) -> None:
        """The next block: its latents (n, C, H, W), and () -> (the same again, rows predicted for them)."""
        self.kept = len(self.grow), latents
        self.grow.append(grow)
        self.ends = torch.cat([self.ends, torch.tensor([len(self) + len(latents)])])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.latent_shape))

    def block_of(self, rows: Tensor) -> Tensor:
        """(n,): the block of each of these rows."""
        return torch.bucketize(rows, self.ends, right=True)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """(n, C, H, W) of these rows, (n,) on the CPU."""
        block = self.block_of(rows)
        found = [self._latents(i, rows[block == i]) for i in block.unique().tolist()]
        if not found:
            return torch.empty(0, *self.latent_shape)
        if len(found) == 1:
            return found[0]
        back = block.argsort(stable=True).argsort()
        return torch.cat(found)[back.to(found[0].device)]

    def _latents(self, block: int, rows: Tensor) -> Tensor:
        if self.kept is None or self.kept[0] != block:
            self.kept = None  # before the next one is made
            latents, predicted = self.grow[block]()
            self.kept, self.regrown = (block, latents), self.regrown + predicted
        latents = self.kept[1]
        first = int(self.ends[block]) - len(latents)
        return latents[(rows - first).to(latents.device)]


def block_roots(plan: Plan, chunk: int) -> int:
    """How many roots fill a model call of `chunk` rows where the part of the tree that is grown again is widest."""
    widest = max((len(front.parents) for front in plan.frontiers[: regrown_steps(plan)]), default=1)
    return max(1, chunk // widest)


def root_blocks(plan: Plan, parts: Tensor, chunk: int) -> list[Tensor]:
    """Rows of the keys in blocks of `block_roots`, which do not mix parts. parts: (R,), those trained together.

    Then every block is grown again once per pass over the rollout, however many optimizer steps a pass has.
    """
    size = block_roots(plan, chunk)
    return [rows for part in parts.unique() for rows in (parts == part).nonzero().flatten().split(size)]


def rollout_in_blocks(
    predict: Predict,
    plan: Plan,
    keys: Sequence[Key],
    blocks: Sequence[Tensor],
    *,
    latent_shape: Sequence[int],
    chunk: int = 64,
    device: torch.device | str = "cpu",
    density: Density | None = None,
    init_keys: Sequence[Key] | None = None,
    prior_std: float = 1.0,
    on_chunk: Callable[[int, int], None] | None = None,
    sampling: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tree:
    """`rollout` of one block after the other, whose tree grows its latents again instead of keeping them.

    Its images and log-probs are those of `rollout` bit for bit where both make model calls of the same shape, else to
    rounding. Latents that are grown again are always the first ones, if equal calls give equal results.

    blocks: rows of `keys`, every one in exactly one block (`root_blocks`). sampling: makes the context in which a
    block is grown again; there `predict` must have the weights of the rollout. Others as in `rollout`.

    Raises ValueError where blocks are not a partition of the keys, and as `rollout` does.
    """
    order = torch.cat(list(blocks)) if blocks else torch.zeros(0, dtype=torch.long)
    if not len(keys) or not torch.equal(order.sort().values, torch.arange(len(keys))):
        raise ValueError(
            f"got {len(keys)} keys in blocks {[block.tolist() for block in blocks]}; expected every key in exactly one "
            "block. Make them with root_blocks."
        )
    check_keys(keys)
    density = check_density(plan, density)
    initial = keys if init_keys is None else init_keys
    leaves = torch.empty(len(keys), len(plan.leaves), *latent_shape, device=device)
    pool, joined = Regrown(latent_shape), _Joined()
    for block in blocks:
        arguments: dict[str, Any] = {
            "predict": partial(_of_block, predict, block), "plan": plan, "keys": [keys[i] for i in block.tolist()],
            "init_keys": [initial[i] for i in block.tolist()], "latent_shape": latent_shape, "chunk": chunk,
            "device": device, "prior_std": prior_std, "on_chunk": on_chunk,
        }  # fmt: skip
        pool.kept = None  # before the next one is made
        tree = rollout(**arguments, density=density)
        leaves[block.to(leaves.device)] = tree.leaves
        joined.add(tree, block, pool)
        latents = tree.states.x.pool
        assert isinstance(latents, Tensor)
        pool.add(partial(_grow_again, sampling, arguments), latents)
        del tree, latents  # the pool has them, until the next block
    states, edges = joined.tables(pool)
    return Tree(plan, tuple(keys), density, leaves, torch.tensor(plan.leaves), states, edges, tuple(joined.calls))


def _of_block(predict: Predict, block: Tensor, x: Tensor, s: Tensor, index: Tensor) -> Tensor:
    return predict(x, s, block.to(index.device)[index])


def _grow_again(sampling: Callable[[], AbstractContextManager[Any]], arguments: dict[str, Any]) -> tuple[Tensor, int]:
    with sampling():
        return regrow(**arguments)


class _Joined:
    """The tables of several trees as those of one, with roots, states, model calls and latents numbered through."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.edges: list[dict[str, Tensor]] = []
        self.calls: list[int] = []
        self.count = 0

    def add(self, tree: Tree, block: Tensor, pool: Regrown) -> None:
        """block: (r,) the numbers of its roots. pool: as it was before its latents."""
        shift = {"x": len(pool), "x_next": len(pool), "state": self.count, "call": len(self.calls)}
        for table, rows in ((tree.states, self.states), (tree.edges, self.edges)):
            columns: dict[str, Any] = {f.name: getattr(table, f.name) for f in fields(table)}
            columns = {name: c.index if isinstance(c, Latents) else c for name, c in columns.items()}
            columns |= {name: columns[name] + by for name, by in shift.items() if name in columns}
            rows.append(columns | {"root": block[columns["root"]]})
        self.count += len(tree.states)
        self.calls += tree.calls

    def tables(self, pool: Regrown) -> tuple[States, Edges]:
        states, edges = (
            {name: torch.cat([part[name] for part in rows]) for name in rows[0]} for rows in (self.states, self.edges)
        )
        x, x_next = Latents(pool, states.pop("x")), Latents(pool, edges.pop("x_next"))
        return States(x=x, **states), Edges(x_next=x_next, **edges)
