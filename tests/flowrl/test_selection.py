"""Selections against hand-made cases and sorting; the history against numpy, over processes and checkpoints."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from thread_ranks import Reduce, in_ranks

from flowrl.checkpoint import load_latest, save_checkpoint
from flowrl.credit import edge_weights, leaf_mean, path
from flowrl.errors import UserError
from flowrl.selection import PromptHistory, best_and_worst, branch_sets
from samplers import PlanBuilder

NAN = float("nan")


def two_families():
    """0 < (1, 2); 1 < (3, 4, 5), 2 < (6, 7): families of three and of two leaves."""
    b = PlanBuilder(1.0)
    for count in (3, 2):
        node = b.add(0, 0.5, "flow", 0.7, trained=True)
        for _ in range(count):
            b.add(node, 0.0, "flow", 0.7, trained=True)
    plan = b.build()  # nodes: 1, its leaves 2 3 4; 5, its leaves 6 7
    assert plan.parent == (-1, 0, 1, 1, 1, 0, 5, 5)
    return plan


PLAN = two_families()


# --- which leaves belong together ---------------------------------------------------------------------------------


def test_branch_sets_are_the_families_of_the_last_fork():
    sets = branch_sets(PLAN, 2)
    assert sets.tolist() == [[1, 1, 1, 5, 5], [9, 9, 9, 13, 13]]


def test_a_fork_far_above_makes_the_family():
    b = PlanBuilder(1.0)
    trunk = b.add(0, 0.8, "flow", 0.7)
    for _ in range(3):
        b.add(b.add(trunk, 0.4, "flow", 0.7, trained=True), 0.0)
    assert branch_sets(b.build(), 1).unique().tolist() == [trunk]
    straight = PlanBuilder(1.0)
    straight.add(straight.add(0, 0.5), 0.0)
    sets = branch_sets(straight.build(), 3)
    assert sets.shape == (3, 1) and len(sets.unique()) == 3


# --- selection ----------------------------------------------------------------------------------------------------


def test_best_and_worst_of_every_family_by_hand():
    scores = torch.tensor([[0.6, 0.4, -0.5], [0.5, 0.1, -0.51], [9.0, NAN, NAN]])
    sets = torch.tensor([[0] * 3, [1] * 3, [2] * 3])
    mask = best_and_worst(scores, sets, 1, 1, at_least=0.5, less_than=-0.5)
    # -0.5 is not below -0.5; 0.5 is enough; a single score is not compared with anything
    assert mask.tolist() == [[True, False, False], [True, False, True], [False, False, False]]


def test_top_and_bottom_of_a_group_by_hand():
    scores = torch.tensor([[3.0], [NAN], [-1.0], [7.0], [0.0], [5.0]])  # one leaf per root, one prompt
    sets = torch.zeros(6, 1, dtype=torch.long)
    assert best_and_worst(scores, sets, 2, 1)[:, 0].tolist() == [False, False, True, True, False, True]
    assert best_and_worst(scores, sets, 4, 4)[:, 0].tolist() == [True, False, True, True, True, True]
    assert not best_and_worst(scores, sets, 0, 0).any()
    valid = torch.tensor([[True], [True], [False], [True], [True], [True]])
    assert best_and_worst(scores, sets, 1, 1, valid=valid)[:, 0].tolist() == [False, False, False, True, True, False]


def test_equal_scores_go_by_leaf_order():
    sets = torch.zeros(1, 4, dtype=torch.long)
    assert best_and_worst(torch.ones(1, 4), sets, 1, 1).tolist() == [[True, False, False, True]]


def test_selected_leaves_as_valid_or_as_pruning():
    scores = torch.tensor([[2.0, 0.0, -1.0, 0.5, 0.2]])
    mask = best_and_worst(scores, branch_sets(PLAN, 1), 1, 0)  # the better leaf of each family: 2 and 0.5
    only = leaf_mean(scores, PLAN, mask)
    assert only.advantages[0].tolist() == [1.25, 2, 2, 0, 0, 0.5, 0.5, 0]
    assert (only.weights[0] > 0).tolist() == [True, True, True, False, False, True, True, False]
    # pruned: the statistics keep all leaves, only the weights change
    full = path(scores, PLAN, torch.tensor([0]))
    pruned = full._replace(weights=edge_weights(PLAN, mask, "one"))
    assert torch.equal(pruned.advantages, full.advantages)
    assert pruned.weights[0].tolist() == [1, 1, 1, 0, 0, 1, 1, 0]


@given(
    st.lists(st.tuples(st.sampled_from([0, 3, 4]), st.one_of(st.integers(-4, 4), st.just(NAN))), min_size=1),
    st.integers(0, 3), st.integers(0, 3), st.sampled_from([-math.inf, 1.0]), st.sampled_from([math.inf, -1.0]),
)  # fmt: skip
def test_selection_agrees_with_sorting(rows, top, bottom, at_least, less_than):
    scores, sets = torch.tensor([[float(x) for _, x in rows]]), torch.tensor([[g for g, _ in rows]])
    expected = [False] * len(rows)
    for g in {g for g, _ in rows}:
        mine = sorted((i for i, (h, x) in enumerate(rows) if h == g and not math.isnan(x)), key=lambda i: -rows[i][1])
        if len(mine) > 1:
            for i in mine[:top]:
                expected[i] |= rows[i][1] >= at_least
            for i in mine[len(mine) - bottom :]:
                expected[i] |= rows[i][1] < less_than
    found = best_and_worst(scores, sets, top, bottom, at_least=at_least, less_than=less_than)
    assert found[0].tolist() == expected


def test_bad_selections_are_refused():
    scores, sets = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long)
    for arguments in [(scores, sets[:1], 1, 1), (scores, sets.double(), 1, 1), (scores, sets, -1, 1)]:
        with pytest.raises(UserError, match="one integer set id per score"):
            best_and_worst(*arguments)
    with pytest.raises(UserError, match="one integer set id per score"):
        best_and_worst(scores, sets, 1, 1, valid=torch.ones(3, dtype=torch.bool))
    with pytest.raises(UserError, match="number >= 0"):
        PromptHistory(-1)
    with pytest.raises(UserError, match="infinite score"):
        PromptHistory().standardise(torch.tensor([[math.inf]]), torch.tensor([0]), torch.tensor([0]), 1)
    with pytest.raises(UserError, match="expected \\(R, L\\)"):
        PromptHistory().standardise(scores, torch.tensor([0]), torch.tensor([0, 1]), 2)


# --- history ------------------------------------------------------------------------------------------------------


def alone(history: PromptHistory, scores: list[list[float]], prompts: list[int]) -> torch.Tensor:
    rows = torch.arange(len(prompts))
    return history.standardise(torch.tensor(scores), torch.tensor(prompts), rows, len(prompts))


def test_scores_are_standardised_with_the_last_updates_of_their_prompt():
    history = PromptHistory(updates=2)
    z = alone(history, [[1.0, 3.0], [5.0, 5.0]], [4, 9])
    # 1 3: mean 2, sample std sqrt 2; equal scores give 0
    torch.testing.assert_close(z, torch.tensor([[-1, 1], [0, 0]]).double() / math.sqrt(2))
    z = alone(history, [[2.0, 6.0]], [4])
    past = np.array([1.0, 3, 2, 6])
    np.testing.assert_allclose(z[0], (np.array([2.0, 6]) - past.mean()) / past.std(ddof=1), rtol=1e-6)
    alone(history, [[0.0, 1.0]], [9])  # an update without prompt 4 still counts
    z = alone(history, [[7.0, NAN]], [4])  # two updates back: 2 6; the first has gone
    past = np.array([2.0, 6, 7])
    assert z[0, 0] == pytest.approx((7 - past.mean()) / past.std(ddof=1)) and z[0, 1].isnan()


def test_a_score_without_company_is_missing():
    history = PromptHistory()
    assert alone(history, [[1.0, NAN], [NAN, NAN]], [0, 1]).isnan().all()
    z = alone(history, [[1.0, NAN]], [0])
    assert z[0, 0] == 0 and z[0, 1].isnan()  # 1 and 1: equal


def test_equal_scores_give_exactly_zero():
    history = PromptHistory()
    for _ in range(3):
        assert (alone(history, [[0.1, 0.1, 0.1]], [2]) == 0).all()


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 2), st.floats(-1, 1), st.booleans()), min_size=1, max_size=5),
             min_size=1, max_size=4),
    st.integers(1, 3),
)  # fmt: skip
def test_any_split_over_processes_gives_the_same_history(updates, ranks):
    """A prompt may be on another process in every update."""
    whole, parts = PromptHistory(1), [PromptHistory(1) for _ in range(ranks)]
    for number, update in enumerate(updates):
        prompts = torch.tensor([p for p, _, _ in update])
        scores = torch.tensor([[x, NAN if missing else x / 3] for _, x, missing in update], dtype=torch.float64)
        rows = torch.arange(len(update))
        expected = whole.standardise(scores, prompts, rows, len(update))
        masks = [(rows + number) % ranks == rank for rank in range(ranks)]

        def part(rank: int, reduce: Reduce, x=scores, p=prompts, rows=rows, masks=masks) -> torch.Tensor:
            mine = masks[rank]
            return parts[rank].standardise(x[mine], p[mine], rows[mine], len(rows), reduce=reduce)

        for mine, (z, calls) in zip(masks, in_ranks(ranks, part), strict=True):
            assert torch.equal(z.nan_to_num(7), expected[mine].nan_to_num(7)) and calls == 1
    assert all(history.state_dict() == whole.state_dict() for history in parts)


def test_history_survives_a_checkpoint_to_the_bit(tmp_path):
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(5, 2, 3, generator=generator)
    prompts = torch.tensor([11, 5])
    first = PromptHistory(2)
    for update in range(3):
        first.standardise(scores[update], prompts, torch.arange(2), 2)
    saved = first.state_dict()
    save_checkpoint(tmp_path, 3, {"w": torch.zeros(1)}, {"history": saved})
    restored = PromptHistory(2)
    restored.load_state_dict(load_latest(tmp_path).state["history"])
    for update in (3, 4):
        a, b = (h.standardise(scores[update], prompts, torch.arange(2), 2) for h in (first, restored))
        assert torch.equal(a, b)
    assert json.loads(json.dumps(saved)) == saved and saved != first.state_dict()  # a copy, not a view
    short = PromptHistory(0)
    short.load_state_dict(saved)
    assert short.state_dict()["updates"] == saved["updates"][-1:]
