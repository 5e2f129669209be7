"""The rollout engine: grow the trees of many roots together, depth by depth.

All live nodes of one depth, over all roots, are one batch (row = node position x R + root), cut into chunks that fit
the memory. Every inner node is predicted once and all its children are drawn from that velocity. Latents are float32;
the coefficients of a plan are computed once; the noise of a step is drawn into one buffer while a GPU still predicts.
Second-order steps (`ode2`) read one earlier prediction, which is kept per node, for one step, and only where needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from samplers.kernels import affine, per_row
from samplers.keys import Key, child_seed, child_suffix, fill_noise, hash_root, noise
from samplers.log_prob import Density
from samplers.plans import Frontier, Plan
from samplers.trees import Edges, Latents, States, Tree

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def rollout(
    predict: Predict,
    plan: Plan,
    keys: Sequence[Key],
    *,
    latent_shape: Sequence[int],
    chunk: int = 64,
    device: torch.device | str = "cpu",
    density: Density | None = None,
    keep: bool = True,
    x_init: Tensor | None = None,
    init_keys: Sequence[Key] | None = None,
    prior_std: float = 1.0,
    on_chunk: Callable[[int, int], None] | None = None,
    on_frontier: Callable[[int, tuple[int, ...], Tensor], None] | None = None,
) -> Tree:
    """Sample one tree per key.

    predict(x, s, index) -> v: x (n, C, H, W) float32, s (n,) float32, index (n,) long, the rows of `keys` that these
    latents belong to (for their prompts); it must not change x. Guidance and padding are its own affair.
    keys: R root keys (`path` and `step` are filled here). latent_shape: (C, H, W). chunk: most rows per model call.
    density: what the stored log-probs mean; default mean, Gaussian, of the plan's trained kernel.
    keep: False keeps leaves only (evaluation).
    x_init: (R, C, H, W) initial latents; else prior_std x noise of `init_keys` (R keys, for instance with root None
    where a group shares its initial noise; default `keys`).
    on_chunk(call, rows) is called after every model call; on_frontier(depth, nodes, x) before those of a depth, with x
    (len(nodes), R, C, H, W).

    Raises ValueError for no or equal keys, a chunk below 1, a density of another kernel than the plan's trained one,
    latents or velocities of a wrong shape.
    """
    roots, shape = len(keys), tuple(latent_shape)
    if roots == 0 or chunk < 1:
        raise ValueError(f"rollout got {roots} keys and chunk {chunk}; expected at least 1. Check the batch sizes.")
    check_keys(keys)
    density = check_density(plan, density)
    device = torch.device(device)
    store = _Store(plan, plan.trained if keep else (False,) * len(plan), roots, shape, device)
    calls = _grow(
        predict, plan, keys, _initial(keys if init_keys is None else init_keys, x_init, shape, roots, prior_std), store,
        len(plan.frontiers), density, chunk, on_chunk, on_frontier,
    )  # fmt: skip
    return store.tree(tuple(keys), density, calls, chunk)


@torch.no_grad()
def regrow(
    predict: Predict,
    plan: Plan,
    keys: Sequence[Key],
    *,
    latent_shape: Sequence[int],
    chunk: int = 64,
    device: torch.device | str = "cpu",
    init_keys: Sequence[Key] | None = None,
    prior_std: float = 1.0,
    on_chunk: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, int]:
    """(pool, rows): the latents that `rollout` keeps for training, by its own model calls, so bit for bit the same.

    pool: (kept R, C, H, W), what `Latents.index` of that rollout reads. rows: predicted for it; it ends at the last
    latent that is kept, so that a window costs only the steps up to its end. Arguments as in `rollout`.
    """
    shape = tuple(latent_shape)
    store = _Store(plan, plan.trained, len(keys), shape, torch.device(device), leaves=False)
    x = _initial(keys if init_keys is None else init_keys, None, shape, len(keys), prior_std)
    calls = _grow(predict, plan, keys, x, store, regrown_steps(plan), None, chunk, on_chunk)
    return store.pool.flatten(0, 1), sum(calls)


def regrown_steps(plan: Plan) -> int:
    """Number of steps of a rollout after which nothing is kept for training any more."""
    return max((plan.depths[i] for i in range(len(plan)) if plan.trained[i]), default=0)


def _grow(
    predict: Predict, plan: Plan, keys: Sequence[Key], x: Tensor, store: _Store, steps: int, density: Density | None,
    chunk: int, on_chunk: Callable[[int, int], None] | None = None,
    on_frontier: Callable[[int, tuple[int, ...], Tensor], None] | None = None,
) -> tuple[int, ...]:  # fmt: skip
    """Take the first `steps` steps from the initial latents x (R, C, H, W); returns the rows of every model call.

    density: of the log-probs to be stored; None: none.
    """
    device, roots = store.device, len(keys)
    x = x.to(device).unsqueeze(0)  # (nodes of the frontier, R, C, H, W); the root is the first frontier
    a, b, c = plan.coefficients
    s_node = torch.tensor(plan.s_next, dtype=torch.float32)
    store.put((0,), x)
    hashes = [hash_root(key) for key in keys]
    calls: list[int] = []
    earlier: dict[int, Tensor] = {}  # x0_hat of the last frontier's nodes that second-order steps read

    for depth, front in enumerate(plan.frontiers[:steps]):
        if on_frontier is not None:
            on_frontier(depth, front.parents, x)
        store.first_call.append(len(calls))
        rows, velocities = x.flatten(0, 1), []
        s = s_node[list(front.parents)].repeat_interleave(roots).to(device)
        index = torch.arange(roots).repeat(len(front.parents)).to(device)
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            v = predict(rows[part], s[part], index[part])
            if v.shape != rows[part].shape:
                raise ValueError(
                    f"predict gave {tuple(v.shape)} for latents {tuple(rows[part].shape)}; expected the same shape. "
                    "Return one velocity per latent."
                )
            velocities.append(v.to(torch.float32))
            calls.append(len(v))
            if on_chunk is not None:
                on_chunk(len(calls) - 1, len(v))
        v = (velocities[0] if len(velocities) == 1 else torch.cat(velocities)).reshape(x.shape)

        children = list(front.children)
        predicted = _predicted_data(plan, front, x, v)
        x, v = _pick(x, front.parent_at), _pick(v, front.parent_at)
        mean = _second_order(plan, children, affine(x, v, a[children], b[children]), predicted, earlier)
        earlier = {node: x0_hat for node, x0_hat in predicted.items() if node in plan.remembered}
        x = _add_noise(mean, plan, children, depth, hashes)
        store.put(front.children, x)
        if density is not None:
            store.score(children, x, mean, density)
        x = _pick(x, tuple(i for i, child in enumerate(children) if plan.children(child)))
        del rows, v, velocities, mean, predicted  # nothing but the frontier outlives its step

    return tuple(calls)


def _predicted_data(plan: Plan, front: Frontier, x: Tensor, v: Tensor) -> dict[int, Tensor]:
    """x0_hat = x - s v, each (R, C, H, W), of the nodes of a frontier whose second-order steps read it."""
    if not plan.remembered:
        return {}
    return {
        node: x[at] - plan.s_next[node] * v[at]
        for at, node in enumerate(front.parents)
        if node in plan.remembered or any(plan.memory[child] != 0 for child in plan.children(node))
    }


def _second_order(
    plan: Plan, children: list[int], mean: Tensor, now: dict[int, Tensor], earlier: dict[int, Tensor]
) -> Tensor:
    """mean + k (x0_hat - x0_hat one step earlier) for the children with a memory k (DPM-Solver++ 2M, see `kernels`)."""
    rows = [i for i, child in enumerate(children) if plan.memory[child] != 0]
    if not rows:
        return mean
    k = torch.tensor([plan.memory[children[i]] for i in rows], dtype=torch.float64)
    parents = [plan.parent[children[i]] for i in rows]
    change = torch.stack([now[parent] - earlier[plan.parent[parent]] for parent in parents])
    change = change.mul_(per_row(k, change))
    return mean.index_add(0, torch.tensor(rows, device=mean.device), change)


def _add_noise(mean: Tensor, plan: Plan, children: list[int], step: int, hashes: list) -> Tensor:
    """mean + c noise for the children with c > 0; the others are the mean itself. mean: (children, R, C, H, W)."""
    noisy = [i for i, child in enumerate(children) if plan.coefficients.c[child] > 0]
    if not noisy:
        return mean
    nodes = [children[i] for i in noisy]
    suffixes = [child_suffix(plan.paths[node], step) for node in nodes]
    # pinned, so that the copy does not wait for the GPU; the caching allocator hands the buffer out again when it may
    buffer = torch.empty(len(noisy) * len(hashes), *mean.shape[2:], pin_memory=mean.is_cuda)
    fill_noise(buffer, [child_seed(root, suffix) for suffix in suffixes for root in hashes])
    draw = buffer.to(mean.device, non_blocking=True).view(len(noisy), *mean.shape[1:])
    draw = draw.mul_(per_row(plan.coefficients.c[nodes], draw))
    if len(noisy) == len(children):
        return draw.add_(mean)
    return mean.index_add(0, torch.tensor(noisy, device=mean.device), draw)


def _pick(x: Tensor, positions: tuple[int, ...]) -> Tensor:
    """x[positions]; `x` itself when these are all in order."""
    return x if positions == tuple(range(len(x))) else x[list(positions)]


def _initial(
    keys: Sequence[Key], x_init: Tensor | None, shape: tuple[int, ...], roots: int, prior_std: float
) -> Tensor:
    if x_init is None:
        if len(keys) != roots:
            raise ValueError(f"got {len(keys)} init_keys for {roots} keys; expected one each. Repeat shared ones.")
        return noise([key._replace(path=(), step=None) for key in keys], shape).mul_(prior_std)
    if tuple(x_init.shape) != (roots, *shape):
        raise ValueError(f"x_init is {tuple(x_init.shape)}; expected {(roots, *shape)}. Give one latent per key.")
    return x_init.to(torch.float32)


def check_keys(keys: Sequence[Key]) -> None:
    """ValueError where two roots would be one image."""
    if len({key[:6] for key in keys}) < len(keys):
        raise ValueError("rollout got equal keys; expected distinct ones (equal keys, equal images). Number the roots.")


def check_density(plan: Plan, density: Density | None) -> Density:
    """The density of the trained steps' log-probs, by default mean and Gaussian; ValueError if of another kernel."""
    kernel = plan.trained_kernel
    if density is None:
        return Density(kernel or "flow")
    if kernel is not None and density.kernel != kernel:
        raise ValueError(
            f"the density is that of kernel '{density.kernel}'; expected '{kernel}', the kernel of the plan's trained "
            "steps. Use one kernel for both."
        )
    return density


class _Store:
    """Collects what outlives the frontier: leaves, latents that training needs, old log-probs."""

    def __init__(
        self, plan: Plan, trained: Sequence[bool], roots: int, shape: tuple[int, ...], device: torch.device,
        leaves: bool = True,
    ):  # fmt: skip
        self.plan, self.roots, self.shape, self.device = plan, roots, shape, device
        targets = [child for front in plan.frontiers for child in front.children if trained[child]]  # edge order
        inner = [p for front in plan.frontiers for p in front.parents if any(trained[i] for i in plan.children(p))]
        self.targets, self.inner = targets, inner
        kept = sorted({*targets, *inner})
        self.slot = {node: i for i, node in enumerate(kept)}
        self.leaf = {node: i for i, node in enumerate(plan.leaves if leaves else ())}
        self.target_at = {node: i for i, node in enumerate(targets)}
        self.inner_at = {node: i for i, node in enumerate(inner)}
        self.pool = torch.empty(len(kept), roots, *shape, device=device)
        self.leaves = torch.empty(roots, len(self.leaf), *shape, device=device)
        self.log_prob = torch.empty(len(targets), roots, device=device)
        self.first_call: list[int] = []  # per depth: number of the model call that began its frontier

    def put(self, nodes: Sequence[int], x: Tensor) -> None:
        """Keep the latents x (nodes, R, C, H, W) where somebody needs them."""
        for node, latents in zip(nodes, x, strict=True):
            if node in self.slot:
                self.pool[self.slot[node]] = latents
            if node in self.leaf:
                self.leaves[:, self.leaf[node]] = latents

    def score(self, nodes: Sequence[int], x: Tensor, mean: Tensor, density: Density) -> None:
        """Log-probs of the trained edges into these nodes; x, mean: (nodes, R, C, H, W)."""
        at = tuple(i for i, node in enumerate(nodes) if node in self.target_at)
        if at:
            hit = [nodes[i] for i in at]
            c = self.plan.coefficients.c[hit].repeat_interleave(self.roots)
            value = density.log_prob(_pick(x, at).flatten(0, 1), _pick(mean, at).flatten(0, 1), c)
            first = self.target_at[hit[0]]  # targets of one depth are neighbours
            self.log_prob[first : first + len(hit)] = value.view(len(hit), self.roots)

    def tree(self, keys: tuple[Key, ...], density: Density, calls: tuple[int, ...], chunk: int) -> Tree:
        """Flatten. Rows are (node, root) pairs; edges are re-sorted so that siblings are neighbours."""
        plan, roots = self.plan, self.roots

        def grid(values: Sequence[int]) -> Tensor:
            """Per node -> per (node, root): slots of a (nodes, R) array."""
            return (torch.tensor(values, dtype=torch.long).unsqueeze(1) * roots + torch.arange(roots)).flatten()

        pool = self.pool.flatten(0, 1)
        node = torch.tensor(self.inner, dtype=torch.long).repeat_interleave(roots)
        s_next = torch.tensor(plan.s_next, dtype=torch.float64)
        # which row of its frontier a state was, hence which call predicted it
        position = {node: at for front in plan.frontiers for at, node in enumerate(front.parents)}
        row = grid([position[i] for i in self.inner])
        first_call = torch.tensor([self.first_call[plan.depths[i]] for i in self.inner], dtype=torch.long)
        states = States(
            x=Latents(pool, grid([self.slot[i] for i in self.inner])),
            s=s_next[node].to(torch.float32).to(self.device),
            root=torch.arange(roots).repeat(len(self.inner)),
            node=node,
            call=first_call.repeat_interleave(roots) + row // chunk,
            row=row % chunk,
        )
        state = grid([self.inner_at[plan.parent[i]] for i in self.targets])
        order = state.argsort(stable=True)
        to = torch.tensor(self.targets, dtype=torch.long).repeat_interleave(roots)[order]
        a, b, c = plan.coefficients
        edges = Edges(
            state=state[order],
            x_next=Latents(pool, grid([self.slot[i] for i in self.targets])[order]),
            a=a[to],
            b=b[to],
            c=c[to],
            s=torch.tensor(plan.s, dtype=torch.float64)[to],
            s_next=s_next[to],
            log_prob=self.log_prob.flatten()[order.to(self.device)],
            node=to,
            root=torch.arange(roots).repeat(len(self.targets))[order],
            weight=plan.share[to],
        )
        return Tree(plan, keys, density, self.leaves, torch.tensor(plan.leaves), states, edges, calls)
