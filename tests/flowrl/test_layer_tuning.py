"""LayerTuning-RL: which leaf is imitated, how much each layer counts, and what the target is."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_runs import PROMPTS
from hypothesis import given, settings
from hypothesis import strategies as st

import samplers
from flowrl.errors import UserError
from flowrl.layer_tuning import LayerTuning, Supervised, best_leaves, progress_targets
from flowrl.objectives import Clipped, EdgeScalars, Guard, SoftmaxTB
from flowrl.policies import GaussianPolicy

NONE = math.nan
SIGMAS = torch.linspace(1, 0, 6, dtype=torch.float64)
BINARY = samplers.plans.sliding_tree(SIGMAS, (0, 3))  # eight leaves, all three steps branch
UNEVEN = samplers.plans.tree(SIGMAS, {0: 3, 2: 2})  # trained steps 0..3, of which 1 and 3 do not branch
STRAIGHT = samplers.plans.straight(SIGMAS)


def grow(plan: samplers.Plan, roots: int = 2, seed: int = 0):
    """(tree, predict) of a policy that is not at its start."""
    policy = GaussianPolicy()
    with torch.no_grad():
        policy.bias += torch.tensor([0.4, -0.2])
    cond = policy.encode(PROMPTS)[torch.arange(roots) % len(PROMPTS)]

    def predict(x, s, index):
        return policy.predict(x, s, cond[index]).detach()

    keys = [samplers.Key(seed, "rollout", 0, i, 0, i) for i in range(roots)]
    return samplers.rollout(predict, plan, keys, latent_shape=(2, 1, 1)), predict


def values(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ which leaf
TABLE = values([0.1, 0.9], [0.8, 0.2], [0.3, 0.1], [NONE, 0.2])
GROUPS = torch.tensor([0, 0, 5, 5])


@pytest.mark.parametrize(
    ("best", "floor", "expected"),
    [
        ("group", None, [1, -1, 0, -1]),
        ("group", 0.5, [1, -1, -1, -1]),
        ("group", 0.3, [1, -1, 0, -1]),  # a floor may be met exactly
        ("group", "mean", [1, -1, -1, -1]),  # the mean is 2.6 / 7
        ("tree", None, [1, 0, 0, -1]),  # the last tree has a single reward: nothing to tell it from
        ("tree", 0.85, [1, -1, -1, -1]),
    ],
)
def test_the_leaf_to_imitate(best, floor, expected):
    assert best_leaves(TABLE, GROUPS, best=best, floor=floor).tolist() == expected


def test_equal_and_missing_rewards_teach_nothing():
    table = values([0.5, 0.5], [0.5, NONE], [NONE, NONE], [NONE, 3.0])
    for best in ("group", "tree"):
        assert best_leaves(table, torch.tensor([0, 0, 1, 2]), best=best, floor=None).tolist() == [-1] * 4
    assert best_leaves(values([1.0, 2.0, 2.0]), torch.tensor([0])).tolist() == [1]  # the first of equal ones
    assert best_leaves(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)).tolist() == []


def test_the_mean_is_that_of_all_processes():
    asked = []

    def reduce(sums):
        asked.append(sums.tolist())
        return sums + torch.tensor([100.0, 10.0])  # another process with ten images of reward 10

    assert best_leaves(TABLE, GROUPS, reduce=reduce).tolist() == [-1] * 4
    assert asked == [pytest.approx([2.6, 7.0])]
    best_leaves(TABLE, GROUPS, floor=0.1, reduce=reduce)
    assert len(asked) == 1


# ------------------------------------------------------------------------------------------------ how much
def by_layer(tree: samplers.Tree, weight: torch.Tensor, root: int) -> list[float]:
    """Sum of the weights of the edges of each trained time."""
    mine = tree.edges.root == root
    times = sorted({float(s) for s in tree.edges.s}, reverse=True)
    return [weight[mine & (tree.edges.s == s)].sum().item() for s in times]


def test_progress_by_hand():
    """Leaves 0..7 of a binary tree, best 5 = right, left, right: V = 2, 3 (4..7), 4 (4, 5), 6: gains 1, 1, 2."""
    tree, _ = grow(BINARY, 1)
    rewards = values([1.0, 1, 1, 1, 2, 6, 2, 2])
    assert rewards.mean() == 2
    found = progress_targets(LayerTuning(weight=0.5, floor=None), tree, rewards, torch.tensor([0]))
    assert found.best.tolist() == [5]
    assert by_layer(tree, found.weight, 0) == pytest.approx([0.5 * 0.75, 0.5 * 0.75, 0.5 * 1.5])
    on_path = tree.leaf_mask()[:, 5]
    assert torch.equal(found.weight > 0, on_path) and on_path.sum() == 3
    even = progress_targets(LayerTuning(0.5, weighting="uniform", floor=None), tree, rewards, torch.tensor([0]))
    assert even.weight[on_path].tolist() == [0.5] * 3 and even.weight.sum() == 1.5


def test_a_step_back_counts_nothing_and_a_missing_leaf_is_no_leaf():
    tree, _ = grow(BINARY, 1)
    rewards = values([5.0, 5, 3, NONE, 7, 0, 0, 0])  # best 4; V = 20/7, 7/4 (a step back), 3.5, 7
    found = progress_targets(LayerTuning(1.0, floor=None), tree, rewards, torch.tensor([0]))
    assert by_layer(tree, found.weight, 0) == pytest.approx([0, 3 * 1.75 / 5.25, 3 * 3.5 / 5.25])


def test_steps_that_do_not_branch_make_no_progress_and_without_any_all_count():
    tree, _ = grow(UNEVEN, 1)
    rewards = values([0.0, 1, 2, 3, 4, 8])
    found = progress_targets(LayerTuning(1.0, floor=None), tree, rewards, torch.tensor([0]))
    assert by_layer(tree, found.weight, 0) == pytest.approx([4 * 3 / 5, 0, 4 * 2 / 5, 0])  # V = 3, 6, 6, 8, 8
    tree, _ = grow(STRAIGHT, 3)
    found = progress_targets(LayerTuning(0.3, floor=None), tree, values([1.0], [3], [2]), torch.zeros(3).long())
    assert found.best.tolist() == [-1, 0, -1]
    assert by_layer(tree, found.weight, 1) == pytest.approx([0.3] * 4) and found.weight.sum() == pytest.approx(1.2)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.floats(-3, 3), st.just(NONE)), min_size=12, max_size=12), st.sampled_from(["path", "all"]),
       st.sampled_from(["progress", "uniform"]), st.sampled_from(["group", "tree"]))  # fmt: skip
def test_a_tree_that_imitates_weighs_lambda_per_layer(rewards, states, weighting, best):
    tree = _TREES
    chosen = LayerTuning(0.4, "image", states, weighting, best, None)
    found = progress_targets(chosen, tree, torch.tensor(rewards).view(2, 6), torch.tensor([0, 0]))
    for root in range(2):
        total = sum(by_layer(tree, found.weight, root))
        assert total == pytest.approx(0.4 * 4 if found.best[root] >= 0 else 0.0, abs=1e-5)
    assert (found.weight >= 0).all()


_TREES, _ = grow(UNEVEN, 2)


def test_all_states_share_the_weight_of_their_layer_by_leaves():
    tree, _ = grow(BINARY, 1)
    rewards = values([1.0, 1, 1, 1, 2, 6, 2, 2])
    found = progress_targets(LayerTuning(1.0, states="all", floor=None), tree, rewards, torch.tensor([0]))
    layer = dict(zip([1.0, 0.8, 0.6], [0.75, 0.75, 1.5], strict=True))
    expected = [layer[round(float(s), 1)] * float(w) for s, w in zip(tree.edges.s, tree.edges.weight, strict=True)]
    assert found.weight.tolist() == pytest.approx(expected)


def test_pruned_edges_carry_nothing():
    tree, _ = grow(BINARY, 1)
    rewards = values([1.0, 1, 1, 1, 2, 6, 2, 2])
    pruned = tree.prune(torch.tensor([[True, False, False, False, False, True, False, False]]))
    for states in ("path", "all"):
        found = progress_targets(LayerTuning(1.0, states=states, floor=None), pruned, rewards, torch.tensor([0]))
        assert len(found.weight) == len(pruned.edges) < len(tree.edges)
        assert by_layer(pruned, found.weight, 0) == pytest.approx([0.75, 0.75, 1.5])


def test_the_weight_falls_to_zero():
    chosen = LayerTuning(0.8, decay=4)
    assert [chosen.weight_at(n) for n in (0, 1, 3, 4, 9)] == pytest.approx([0.8, 0.6, 0.2, 0, 0])
    tree, _ = grow(BINARY, 1)
    rewards = values([1.0, 1, 1, 1, 2, 6, 2, 2])
    for update, total in ((0, 2.4), (2, 1.2), (4, 0.0)):
        found = progress_targets(chosen, tree, rewards, torch.tensor([0]), update=update)
        assert found.weight.sum().item() == pytest.approx(total)
    assert found.velocity[torch.arange(len(tree.states))].shape == (len(tree.states), 2, 1, 1)  # there, though unused


# ------------------------------------------------------------------------------------------------ the target
@pytest.mark.parametrize("states", ["path", "all"])
def test_the_velocity_leads_to_the_best_image(states):
    tree, _ = grow(BINARY, 2)
    rewards = values([0.0, 1, 2, 3, 4, 5, 6, 7], [9.0, 1, 2, 3, 4, 5, 6, 7])
    chosen = LayerTuning(states=states, best="tree", floor=None, weighting="uniform")
    found = progress_targets(chosen, tree, rewards, torch.tensor([0, 1]))
    rows = tree.edges.state[found.weight > 0].unique()
    assert len(rows) == (6 if states == "path" else 14)
    x, s = tree.states.x[rows], tree.states.s[rows].view(-1, 1, 1, 1)
    best = torch.stack([tree.leaves[0, 7], tree.leaves[1, 0]])[tree.states.root[rows]]
    torch.testing.assert_close(x - s * found.velocity[rows], best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("states", ["path", "all"])
def test_the_published_target_is_the_best_paths_own_velocity(states):
    tree, predict = grow(BINARY, 2)
    rewards = values([0.0, 1, 2, 3, 4, 5, 6, 7], [9.0, 1, 2, 3, 4, 5, 6, 7])
    chosen = LayerTuning(target="velocity", states=states, best="tree", floor=None, weighting="uniform")
    asked = []

    def counted(x, s, root):
        asked.append(len(x))
        return predict(x, s, root)

    found = progress_targets(chosen, tree, rewards, torch.tensor([0, 1]), predict=counted, chunk=4)
    assert asked == [4, 2]  # six states on the two paths, no other
    rows = tree.edges.state[found.weight > 0].unique()
    v = predict(tree.states.x[rows], tree.states.s[rows], tree.states.root[rows])
    own = tree.plan.below[tree.states.node[rows], torch.tensor([7, 0])[tree.states.root[rows]]]
    torch.testing.assert_close(found.velocity[rows][own], v[own])  # no gradient where the model agrees with itself
    if states == "all":
        assert ((found.velocity[rows] - v)[~own].abs().amax(dim=(1, 2, 3)) > 1e-3).all()
        for root in (0, 1):  # one velocity per tree and time
            mine = tree.states.root[rows] == root
            for s in tree.states.s[rows].unique():
                same = found.velocity[rows][mine & (tree.states.s[rows] == s)]
                assert (same == same[0]).all()
    with pytest.raises(ValueError, match="Pass predict"):
        progress_targets(chosen, tree, rewards, torch.tensor([0, 1]))


# ------------------------------------------------------------------------------------------------ the objective
def test_the_supervised_term_by_hand():
    def vector(*x):
        return torch.tensor(x, dtype=torch.float64)

    gap = vector(3.0, 5.0, 7.0).requires_grad_()
    e = EdgeScalars(
        vector(0.0, 0.0, 0.0), vector(0.0, 0.0, 0.0), vector(2.0, -1.0, 1.0), vector(0.5, 1.0, 0.0),
        target_sq=gap, target_weight=vector(0.1, 0.0, 4.0),
    )  # fmt: skip
    out = Supervised(Clipped(0.1))(e)
    assert out.terms.tolist() == pytest.approx([-1.0 + 0.3, 1.0, 0.0])
    assert out.metrics["progress_loss"].tolist() == pytest.approx([0.3, 0.0, 0.0])
    assert torch.autograd.grad(out.terms.sum(), gap)[0].tolist() == pytest.approx([0.1, 0.0, 0.0])
    assert Supervised(Guard()).name == "guard" and Supervised(SoftmaxTB()).coupled and not Supervised(Guard()).coupled
    with pytest.raises(ValueError, match=r"EdgeScalars\.target_weight"):
        Supervised(Clipped())(EdgeScalars(*[vector(0.0)] * 4))


@pytest.mark.parametrize(
    "bad",
    [{"target": "noise"}, {"states": "leaf"}, {"weighting": "reward"}, {"best": "all"}, {"weight": -1.0},
     {"weight": math.nan}, {"floor": "median"}, {"decay": 0}],
)  # fmt: skip
def test_settings_out_of_range(bad):
    with pytest.raises(UserError, match="expected"):
        LayerTuning(**bad)
