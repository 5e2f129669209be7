"""What holds for the plans of every recipe, whatever its settings: counts, shares, and the engine's bits."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import samplers
from samplers import Cost, Key, Plan, rollout
from samplers.plans import sliding_tree, straight, tree
from samplers.pruning import prune_depth, prune_width
from samplers.recipes import coarse_tail, fork, split_tree, trunk, windowed

SHAPE, ROOTS, ROWS = (2, 2, 3), 2, 64
KERNELS = st.sampled_from(["flow", "dance", "cps", "precise", "dance_precise", "ddim", "consistency"])


@st.composite
def windows(draw):
    """A grid of T steps and a window inside all but the last of them."""
    steps = draw(st.integers(3, 7))
    start = draw(st.integers(0, steps - 2))
    end = draw(st.integers(start + 1, min(start + 3, steps - 1)))
    return steps, start, end


def grid(steps):
    return samplers.linear_shift_sigmas(steps, 3.0)


def geometric(k, n):
    return sum(k**j for j in range(n))


# Each strategy gives (plan, nodes, cost) with both numbers from a closed formula.


@st.composite
def straights(draw):
    steps, kernel = draw(st.integers(2, 8)), draw(KERNELS)
    return straight(grid(steps), kernel), steps + 1, Cost(steps, steps - 1, steps - 1, 1)


@st.composite
def windoweds(draw):
    (steps, start, end), solver = draw(windows()), draw(st.sampled_from(["ode", "ode2"]))
    plan = windowed(grid(steps), (start, end), draw(KERNELS), solver=solver)
    return plan, steps + 1, Cost(steps, end - start, end - start, 1)


@st.composite
def sliding_trees(draw, tail=False):
    (steps, start, end), k = draw(windows()), draw(st.integers(1, 3))
    plan = sliding_tree(grid(steps), (start, end), k, draw(KERNELS), 0.5, growth=draw(st.sampled_from([0.0, 0.9])))
    rest, width = steps - end, end - start
    if tail:
        fraction = draw(st.floats(0.05, 1))
        plan = coarse_tail(plan, fraction)
        rest = max(1, math.floor(fraction * rest + 0.5))
    calls, forwards, leaves = start + geometric(k, width) + k**width * rest, geometric(k, width), k**width
    return plan, calls + leaves, Cost(calls, forwards, forwards, leaves)


@st.composite
def listed_trees(draw):
    steps = draw(st.integers(3, 7))
    splits = draw(st.dictionaries(st.integers(0, steps - 2), st.integers(1, 3), max_size=3))
    width = [math.prod(k for i, k in splits.items() if i < step) for step in range(steps + 1)]
    plan = tree(grid(steps), splits, draw(KERNELS), solver=draw(st.sampled_from(["ode", "ode2"])))
    return plan, sum(width), Cost(sum(width[:-1]), sum(width[:-2]), sum(width[:-2]), width[-1])


@st.composite
def split_trees(draw):
    steps = draw(st.integers(4, 7))
    splits = draw(st.dictionaries(st.integers(0, steps - 2), st.integers(1, 3), min_size=1, max_size=3))
    promote = draw(st.sampled_from([None, 0, 1]))
    first = min(splits)
    roots, plan = split_tree(grid(steps), splits, draw(KERNELS), promote=promote)
    if promote is not None and first <= promote and len(splits) > 1:
        assert roots == splits.pop(first)
    else:
        assert roots == 1
    width = [math.prod(k for i, k in splits.items() if i < step) for step in range(steps + 1)]
    forwards = sum(width[step] for step in splits)
    return plan, sum(width), Cost(sum(width[:-1]), forwards, forwards, width[-1])


@st.composite
def trunks(draw):
    steps, branches = draw(st.integers(3, 6)), draw(st.integers(1, 2))
    chosen = draw(st.sets(st.integers(0, steps - 2), min_size=1, max_size=3))
    strides, finish = draw(st.sampled_from([(1,), (1, 2), (2,), (3, 1)])), draw(st.booleans())
    plan = trunk(grid(steps), chosen, branches, draw(KERNELS), strides=strides, finish_trunk=finish)
    calls, leaves = (steps if finish else max(chosen) + 1), int(finish)
    for step in chosen:
        rest = steps - step - 1
        # a stride of `rest` or more takes the one step to the end
        different = {min(stride, rest) for stride in strides}
        calls += branches * (1 + sum(math.ceil(rest / stride) - 1 for stride in different))
        leaves += branches * len(different)
    return plan, calls + leaves, Cost(calls, len(chosen), len(chosen), leaves)


@st.composite
def forks(draw):
    steps, branches = draw(st.integers(2, 7)), draw(st.integers(1, 4))
    interval = draw(st.integers(2, steps))
    plan = fork(grid(steps), interval, branches)
    calls, forwards = steps - interval + 1 + branches * (interval - 1), 1 + branches * (interval - 2)
    return plan, calls + branches, Cost(calls, forwards, forwards, branches)


@st.composite
def depth_pruned(draw):
    (steps, start, end), k = draw(windows()), draw(st.integers(1, 3))
    kept = draw(st.sets(st.integers(start, end - 1), min_size=1))
    plan = prune_depth(
        sliding_tree(grid(steps), (start, end), k), {step + 1 for step in range(start, end)} - {i + 1 for i in kept}
    )
    calls, leaves = start + geometric(k, end - start) + k ** (end - start) * (steps - end), k ** (end - start)
    forwards = sum(k ** (step - start) for step in kept)
    return plan, calls + leaves, Cost(calls, forwards, forwards, leaves)


@st.composite
def width_pruned(draw):
    (steps, start, end), k = draw(windows()), draw(st.integers(1, 3))
    width = end - start
    kept = draw(st.sets(st.integers(0, k**width - 1), min_size=1))
    plan = prune_width(sliding_tree(grid(steps), (start, end), k), kept)
    calls, leaves = start + geometric(k, width) + k**width * (steps - end), k**width
    # a leaf's number in base k is its way down: as many parents per layer as there are different beginnings
    forwards = sum(len({leaf // k ** (width - layer) for leaf in kept}) for layer in range(width))
    return plan, calls + leaves, Cost(calls, forwards, forwards, leaves)


RECIPES = {
    "straight": straights(),
    "windowed": windoweds(),
    "sliding_tree": sliding_trees(),
    "coarse_tail": sliding_trees(tail=True),
    "tree": listed_trees(),
    "split_tree": split_trees(),
    "trunk": trunks(),
    "fork": forks(),
    "prune_depth": depth_pruned(),
    "prune_width": width_pruned(),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


@every_recipe
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_counts_follow_the_formula(recipe, data):
    plan, nodes, cost = data.draw(RECIPES[recipe])
    assert (len(plan), plan.cost()) == (nodes, cost)
    assert float(plan.share[list(plan.leaves)].sum()) == pytest.approx(1)
    described = plan.describe(3)
    assert f"{3 * cost.images} image" in described and f"sampling: {3 * cost.sampling_calls} call" in described


def shuffled(plan: Plan, order) -> tuple[Plan, list[int]]:
    """The same tree with the children of every node in another order; also the old number of every new node."""
    old, queue = [], [0]
    while queue:
        node = queue.pop(0)
        old.append(node)
        queue += order(list(plan.children(node)))
    new = {node: i for i, node in enumerate(old)}
    columns = {f.name: tuple(getattr(plan, f.name)[i] for i in old) for f in dataclasses.fields(plan)}
    return Plan(**columns | {"parent": (-1, *(new[p] for p in columns["parent"][1:]))}), old


def network():
    """A velocity with matrix products, always of 64 rows."""
    g = torch.Generator().manual_seed(0)
    d = math.prod(SHAPE)
    w1, w2 = torch.randn(d + 1, 16, generator=g) / math.sqrt(d), torch.randn(16, d, generator=g) / 4

    def predict(x, s, index):
        rows = torch.cat([x.flatten(1), s.unsqueeze(1)], 1)
        padded = torch.cat([rows, rows[-1:].expand(ROWS - len(rows), -1)])
        return (torch.tanh(padded @ w1) @ w2)[: len(x)].view(x.shape)

    return predict


PREDICT = network()
KEYS = [Key(7, "recipes", 0, 0, 0, root) for root in range(ROOTS)]


def sample(plan, chunk=ROWS, predict=PREDICT):
    return rollout(predict, plan, KEYS, latent_shape=SHAPE, chunk=chunk)


@every_recipe
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_the_order_of_siblings_does_not_matter(recipe, data):
    """Shares, costs and every image stay with their node."""
    plan, _, _ = data.draw(RECIPES[recipe])
    other, old = shuffled(plan, lambda children: data.draw(st.permutations(children)) if children else [])
    assert torch.equal(other.share, plan.share[old]) and other.cost() == plan.cost()
    one, two = sample(plan), sample(other)
    at = [plan.leaves.index(old[leaf]) for leaf in other.leaves]
    assert torch.equal(two.leaves, one.leaves[:, at])


def walk(plan, key):
    """One trajectory of a plan without branches, step by step with what the engine is made of."""
    x, before = samplers.noise([key], SHAPE), None
    for i in range(1, len(plan)):
        v = PREDICT(x, torch.tensor([plan.s[i]]), None)
        x0 = x - plan.s[i] * v
        a, b, c = (t[i] for t in plan.coefficients)
        mean = samplers.affine(x, v, a, b)
        if plan.memory[i] != 0:
            mean = mean + (x0 - before) * torch.tensor(plan.memory[i]).to(torch.float32)
        draw = samplers.noise([key._replace(path=plan.paths[i], step=i - 1)], SHAPE)
        x = mean + draw * c.to(torch.float32) if c > 0 else mean
        before = x0
    return x


@every_recipe
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_the_engine_keeps_its_promises(recipe, data):
    """Counted cost = planned cost; chunks change no bit; every leaf is a straight trajectory, and a plan with a single
    leaf is that trajectory."""
    plan, _, cost = data.draw(RECIPES[recipe])
    rows = []

    def counting(x, s, index):
        rows.append(len(x))
        return PREDICT(x, s, index)

    whole = sample(plan, predict=counting)
    assert sum(rows) == whole.cost.sampling_calls and whole.cost == cost * ROOTS
    assert len(whole.states) == ROOTS * cost.training_forwards and len(whole.edges) == ROOTS * plan.trained_edges
    parts = sample(plan, chunk=data.draw(st.integers(1, 9)))
    assert torch.equal(parts.leaves, whole.leaves)
    assert torch.equal(parts.edges.log_prob, whole.edges.log_prob)
    assert torch.equal(parts.states.x[:], whole.states.x[:])
    at = data.draw(st.integers(0, len(plan.leaves) - 1))
    path = plan.branch(plan.leaves[at])
    for root, key in enumerate(KEYS):
        assert torch.equal(walk(path, key)[0], whole.leaves[root, at])
    if len(plan.leaves) == 1:
        assert path == plan and plan.independent_cost() == plan.cost()
