"""Recompute instead of storage: the same numbers as a rollout that keeps its latents, one block of roots at a time."""

import math
import weakref
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import samplers
from samplers import Key, regrow, rollout, rollout_in_blocks
from samplers.plans import sliding_tree, straight, tree
from samplers.recipes import coarse_tail
from samplers.regrow import block_roots, root_blocks

SHAPE = (3, 4, 4)
SIGMAS = samplers.sd3_sigmas(6)
PLANS = {
    "straight": straight(SIGMAS),
    "window": straight(SIGMAS, "cps", noisy=[1, 2]),
    "binary": sliding_tree(SIGMAS, (1, 4)),
    "second order": sliding_tree(SIGMAS, (3, 5), solver="ode2"),
    "coarse tail": coarse_tail(tree(SIGMAS, {0: 2, 1: 3}, "precise", noisy=[0, 1], trained=[0, 1])),
}
KEYS = [Key(5, "test", 0, root // 3, 0, root % 3) for root in range(7)]
SHARED = [key._replace(root=None) for key in KEYS]


def network(seed=0):
    """A small velocity network; every call is padded to 64 rows, as one matrix product of one shape."""
    g = torch.Generator().manual_seed(seed)
    d = math.prod(SHAPE)
    w1, w2 = torch.randn(d + 2, 32, generator=g) / math.sqrt(d), torch.randn(32, d, generator=g) / math.sqrt(32)

    def predict(x, s, index):
        rows = torch.cat([x.flatten(1), s.unsqueeze(1), index.unsqueeze(1) / 10], 1)
        padded = torch.cat([rows, rows[-1:].expand(64 - len(rows), -1)])
        return (torch.tanh(padded @ w1) @ w2)[: len(x)].view(x.shape)

    return predict


def in_blocks(plan, blocks, predict=None, chunk=4, **kwargs):
    blocks = [torch.tensor(block) for block in blocks]
    return rollout_in_blocks(
        predict or network(), plan, KEYS, blocks, latent_shape=SHAPE, chunk=chunk, init_keys=SHARED, **kwargs
    )


def stored(plan, chunk=4):
    return rollout(network(), plan, KEYS, latent_shape=SHAPE, chunk=chunk, init_keys=SHARED)


def partitions():
    """The seven roots in any blocks."""
    return st.lists(st.integers(0, 3), min_size=7, max_size=7).map(
        lambda place: [block for i in range(4) if (block := [root for root in range(7) if place[root] == i])]
    )


@settings(max_examples=15)
@given(st.sampled_from(sorted(PLANS)), partitions(), st.integers(1, 9))
def test_it_is_the_rollout_that_keeps_its_latents(name, blocks, chunk):
    """Bit for bit, as this network's calls have one shape; only the order of states and edges is that of the blocks."""
    plan = PLANS[name]
    grown, kept = in_blocks(plan, blocks, chunk=chunk), stored(plan, chunk)
    assert torch.equal(grown.leaves, kept.leaves) and grown.keys == kept.keys and grown.density == kept.density
    assert len(grown.states) == len(kept.states) and len(grown.edges) == len(kept.edges)

    def order(table):
        return sorted(range(len(table)), key=lambda i: (int(table.root[i]), int(table.node[i])))

    mine, theirs = torch.tensor(order(grown.states)), torch.tensor(order(kept.states))
    assert torch.equal(grown.states.x[mine], kept.states.x[theirs]) and grown.states.x.shape == kept.states.x.shape
    assert torch.equal(grown.states.s[mine], kept.states.s[theirs])
    mine, theirs = torch.tensor(order(grown.edges)), torch.tensor(order(kept.edges))
    assert torch.equal(grown.edges.x_next[mine], kept.edges.x_next[theirs])
    for column in ("a", "b", "c", "s", "s_next", "log_prob", "node", "root", "weight"):
        assert torch.equal(getattr(grown.edges, column)[mine], getattr(kept.edges, column)[theirs]), column
    parents = grown.states.node[grown.edges.state]
    assert parents.tolist() == [plan.parent[i] for i in grown.edges.node.tolist()]
    assert torch.equal(grown.states.root[grown.edges.state], grown.edges.root)
    assert torch.equal(grown.edges.state, grown.edges.state.sort().values)


@pytest.mark.parametrize("name", PLANS)
def test_ratio_is_exactly_one_on_replay(name):
    """Also where the shape of a call decides about its last bits: the replay has the calls of the blocks."""
    w = torch.randn(math.prod(SHAPE), math.prod(SHAPE), generator=torch.Generator().manual_seed(0)) / 7

    def predict(x, s, index):
        return torch.tanh(x.flatten(1) @ w).view(x.shape)

    out = in_blocks(PLANS[name], [[0, 4, 5], [1, 6], [2, 3]], predict)
    seen = []
    for call in out.replay_chunks():
        v = predict(call.x, call.s, call.index)[call.rows]
        edges, _, log_prob = out.log_prob(v, call.states)
        assert torch.equal(log_prob, out.edges.log_prob[edges])
        seen += edges.tolist()
    assert sorted(seen) == list(range(len(out.edges)))


def test_whole_model_calls_are_those_of_the_stored_rollout():
    """Seven roots by calls of two, in blocks of two: the very same calls, in another order."""

    def recorded(run):
        calls = []

        def predict(x, s, index):
            calls.append((float(s[0]), tuple(index.tolist()), x.clone()))
            return network()(x, s, index)

        run(predict)
        return sorted(calls, key=lambda call: call[:2])

    plan = PLANS["straight"]
    kept = recorded(lambda p: rollout(p, plan, KEYS, latent_shape=SHAPE, chunk=2))
    blocks = root_blocks(plan, torch.zeros(7), 2)
    assert [block.tolist() for block in blocks] == [[0, 1], [2, 3], [4, 5], [6]]
    mine = recorded(lambda p: rollout_in_blocks(p, plan, KEYS, blocks, latent_shape=SHAPE, chunk=2))
    assert [call[:2] for call in mine] == [call[:2] for call in kept]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(mine, kept, strict=True))


def test_what_it_costs_and_what_it_holds():
    """A window that ends with step 2 of 6 is grown again in three steps; one block is in memory, at first the last."""
    out = in_blocks(PLANS["window"], [[0, 1, 2], [3, 4, 5, 6]])
    pool, first = out.states.x.pool, out.cost.sampling_calls
    assert first == 7 * 6 == sum(out.calls)
    held = weakref.ref(pool.kept[1])
    lots = out.micro_batches(torch.arange(len(out.states)), 3)
    assert [len(lot) for lot in lots] == [3, 3, 3, 3, 2]  # 2 states of each of 3 and 4 roots
    _ = out.states.x[lots[-1]]
    assert pool.regrown == 0 and held() is not None
    for lot in lots:
        edges, _ = out.edges_of(lot)
        _ = out.states.x[lot], out.edges.x_next[edges]
        assert len(pool.kept[1]) in (3 * 3, 3 * 4)  # states before, between and after the two steps
    assert pool.regrown == 7 * 3 and out.cost.sampling_calls == first + 7 * 3
    assert held() is None


def test_while_sampling_too_one_block_is_in_memory(monkeypatch):
    held = []

    def recorded(*args, **kwargs):
        assert all(pool() is None for pool in held)
        tree = rollout(*args, **kwargs)
        held.append(weakref.ref(tree.states.x.pool))
        return tree

    monkeypatch.setattr(regrow, "rollout", recorded)
    out = in_blocks(PLANS["binary"], [[0, 1], [2, 3], [4, 5, 6]])
    assert [pool() is None for pool in held] == [True, True, False] and out.states.x.pool.kept is not None


def test_equal_keys_in_different_blocks_are_refused():
    blocks = [torch.tensor([0]), torch.tensor([1])]
    with pytest.raises(ValueError, match="equal keys"):
        rollout_in_blocks(network(), PLANS["straight"], [KEYS[0], KEYS[0]], blocks, latent_shape=SHAPE)


def test_micro_batches_of_a_stored_rollout_are_plain_ones():
    out = stored(PLANS["binary"])
    rows = torch.tensor([3, 1, 4, 10, 5])
    assert [lot.tolist() for lot in out.micro_batches(rows, 2)] == [[3, 1], [4, 10], [5]]
    assert out.micro_batches(rows[:0], 2) == []
    grown = in_blocks(PLANS["binary"], [[1], [0, 2, 3, 4, 5, 6]])
    assert grown.micro_batches(rows[:0], 2) == [] and len(grown.states.x[rows[:0]]) == 0
    assert sorted(torch.cat(grown.micro_batches(torch.arange(49), 5)).tolist()) == list(range(49))


def test_it_grows_with_the_weights_that_sampled():
    active = ["first"]

    @contextmanager
    def use(name):
        before, active[0] = active[0], name
        yield
        active[0] = before

    nets = {"first": network(0), "second": network(1)}
    plan, blocks = PLANS["binary"], [[0, 1, 2], [3, 4, 5, 6]]

    def predict(x, s, index):
        return nets[active[0]](x, s, index)

    right = in_blocks(plan, blocks, predict, sampling=lambda: use("first")).states.x
    wrong = in_blocks(plan, blocks, predict).states.x
    rows = torch.arange(len(right))
    wanted = right[rows]
    active[0] = "second"
    assert torch.equal(right[rows], wanted) and active == ["second"]
    assert not torch.equal(wrong[rows], wanted)


def test_pruned_trees_read_the_same_latents():
    out, kept = in_blocks(PLANS["binary"], [[0, 1], [2, 3, 4, 5, 6]]), stored(PLANS["binary"])
    keep = torch.rand(7, 8, generator=torch.Generator().manual_seed(1)) < 0.4
    mine, theirs = out.prune(keep), kept.prune(keep)
    assert len(mine.edges) == len(theirs.edges)
    total = [t.edges.x_next[torch.arange(len(t.edges))].double().sum() for t in (mine, theirs)]
    assert float(total[0]) == pytest.approx(float(total[1]))


def test_blocks_fill_a_model_call_where_the_tree_is_widest():
    assert block_roots(PLANS["straight"], 8) == 8
    assert block_roots(PLANS["binary"], 8) == 2  # four parents in its last trained step
    assert block_roots(PLANS["binary"], 3) == 1
    parts = torch.tensor([0, 1, 0, 1, 0, 1, 1])
    assert [b.tolist() for b in root_blocks(PLANS["straight"], parts, 3)] == [[0, 2, 4], [1, 3, 5], [6]]


@pytest.mark.parametrize("blocks", [[], [[0, 1]], [[0, 1, 2, 3], [3, 4, 5, 6]], [[0, 1, 2, 3, 4, 5, 7]]])
def test_blocks_hold_every_root_once(blocks):
    with pytest.raises(ValueError, match="7 keys in blocks .*exactly one"):
        in_blocks(PLANS["straight"], blocks)
