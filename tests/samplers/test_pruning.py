"""Training less of a tree: which edges stay, what they weigh, what they cost."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import samplers
from samplers import Cost, Key, rollout
from samplers.plans import sliding_tree, straight, tree
from samplers.pruning import better_half, extremes, prune_depth, prune_width
from samplers.recipes import trunk

SHAPE = (1, 2, 2)
GRID = samplers.linear_shift_sigmas(6, 3.0)
BINARY = sliding_tree(GRID, (1, 4))  # 8 leaves, trained depths 2, 3, 4
PLANS = {"binary": BINARY, "trunk": trunk(GRID, [0, 2], 2, strides=(1, 2)), "uneven": tree(GRID, {0: 3, 2: 2})}


def velocity(x, s, index=None):
    return torch.tanh(x) * s.view(-1, 1, 1, 1) - 0.1


def sample(plan, roots=3):
    keys = [Key(2, "prune", 0, 0, 0, root) for root in range(roots)]
    return rollout(velocity, plan, keys, latent_shape=SHAPE, chunk=5)


def test_depth():
    plan = prune_depth(BINARY, [4])
    assert plan.cost() == Cost(BINARY.cost().sampling_calls, 1 + 2, 1 + 2, 8) and plan.trained_edges == 2 + 4
    assert prune_depth(BINARY, [1, 6]) == BINARY  # nothing was trained there
    assert len(sample(plan).states) == 3 * 3


def test_branch_grpo_depths():
    plan = tree(samplers.linear_shift_sigmas(20, 3.0), {0: 2, 3: 2, 6: 2, 9: 2}, "dance", trained=range(19))
    pruned = prune_depth(plan, [15, 16, 17, 18])
    assert plan.trained_edges - pruned.trained_edges == 4 * 16
    assert plan.cost().training_forwards - pruned.cost().training_forwards == 4 * 16


def test_width_of_a_plan():
    plan = prune_width(BINARY, [0, 7])
    # the two outermost paths: they share the first parent only
    assert plan.trained_edges == 6 and plan.cost() == Cost(BINARY.cost().sampling_calls, 5, 5, 8)


def test_better_half_of_each_last_family():
    values = torch.tensor([[1.0, 2, 4, 3, 0, 0, math.nan, -1], [0, 1, 2, 3, 4, 5, math.nan, math.nan]])
    kept = better_half(values, BINARY)
    assert kept.int().tolist() == [[0, 1, 1, 0, 1, 0, 0, 1], [0, 1, 0, 1, 0, 1, 0, 0]]
    assert better_half(torch.tensor([[3.0]]), straight(GRID)).tolist() == [[True]]
    five = tree(GRID, {1: 5})
    assert better_half(torch.tensor([[1.0, 5, 3, 4, 2]]), five).int().tolist() == [[0, 1, 0, 1, 0]]


def test_extremes():
    values = torch.tensor([[5.0, 1, 7, 2, 9, 0, 4, 3], [math.nan] * 6 + [1.0, 2.0]])
    assert extremes(values).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0], [0] * 6 + [1, 1]]
    assert extremes(values, 0.5)[0].all()


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(sorted(PLANS)), st.data())
def test_a_pruned_tree_counts_and_weighs_what_is_left(name, data):
    plan = PLANS[name]
    out = sample(plan)
    leaves = len(plan.leaves)
    flags = st.lists(st.booleans(), min_size=3 * leaves, max_size=3 * leaves)
    keep = torch.tensor(data.draw(flags)).view(3, leaves)
    pruned = out.prune(keep)
    edges = {(int(n), int(r)) for n, r in zip(pruned.edges.node, pruned.edges.root, strict=True)}
    expected = {
        (node, root)
        for root in range(3)
        for node in range(len(plan))
        if plan.trained[node] and bool((plan.below[node] & keep[root]).any())
    }
    assert edges == expected
    parents = {(plan.parent[node], root) for node, root in expected}
    assert pruned.cost == Cost(out.cost.sampling_calls, len(parents), len(parents), 3 * leaves)
    assert {(int(n), int(r)) for n, r in zip(pruned.states.node, pruned.states.root, strict=True)} == parents
    for e in range(len(pruned.edges)):  # edges still belong to their states
        state, node, root = (int(t[e]) for t in (pruned.edges.state, pruned.edges.node, pruned.edges.root))
        assert (int(pruned.states.node[state]), int(pruned.states.root[state])) == (plan.parent[node], root)
        share = (plan.below[node] & keep[root]).sum() / keep[root].sum()
        assert float(pruned.edges.weight[e]) == pytest.approx(float(share))
    seen = []  # the replay is still exact
    for call in pruned.replay_chunks():
        at, _, log_prob = pruned.log_prob(velocity(call.x, call.s)[call.rows], call.states)
        assert torch.equal(log_prob, pruned.edges.log_prob[at])
        seen += at.tolist()
    assert sorted(seen) == list(range(len(pruned.edges)))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_keeping_everything_changes_nothing(plan):
    out = sample(plan)
    same = out.prune(torch.ones(3, len(plan.leaves), dtype=torch.bool))
    for table in ("states", "edges"):
        for name, column in vars(getattr(out, table)).items():
            other = getattr(getattr(same, table), name)
            if isinstance(column, torch.Tensor):
                torch.testing.assert_close(other, column)
            else:
                assert torch.equal(other.index, column.index) and other.pool is column.pool


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(sorted(PLANS)), st.data())
def test_plan_and_tree_prune_alike(name, data):
    """Leaves known before the rollout: the pruned plan has the states and edges of the pruned tree."""
    plan = PLANS[name]
    leaves = data.draw(st.lists(st.integers(0, len(plan.leaves) - 1), min_size=1, unique=True))
    keep = torch.zeros(3, len(plan.leaves), dtype=torch.bool)
    keep[:, leaves] = True
    one, other = sample(prune_width(plan, leaves)), sample(plan).prune(keep)
    assert one.cost == other.cost == prune_width(plan, leaves).cost() * 3
    assert torch.equal(one.edges.node, other.edges.node) and torch.equal(one.edges.log_prob, other.edges.log_prob)


def test_refused_with_the_numbers():
    cases = [
        (lambda: prune_depth(BINARY, [7]), r"depths \[7\]; expected depths 1\.\.6"),
        (lambda: prune_depth(BINARY, [2, 3, 4]), r"pruned depths \[2, 3, 4\]; expected some of the trained edges"),
        (lambda: prune_width(BINARY, [8]), r"leaves \[8\]; expected some of the positions 0\.\.7"),
        (lambda: prune_width(BINARY, []), r"leaves \[\]"),
        (lambda: prune_width(trunk(GRID, [0], 2, finish_trunk=True), [2]), "all leaves but"),
        (lambda: extremes(torch.zeros(1, 4), 0.6), r"fraction of 0.6; expected a number in \(0, 0.5\]"),
        (lambda: sample(BINARY).prune(torch.ones(2, 8, dtype=torch.bool)), r"shape \(2, 8\); expected bool \(3, 8\)"),
        (lambda: sample(BINARY).prune(torch.ones(3, 8)), "prune got torch.float32"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()
