"""Advantages against hand arithmetic, and their algebra as properties."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowrl.advantages import group_advantages
from flowrl.errors import UserError

NAN, INF = float("nan"), float("inf")


def f64(*x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def ids(*x: int) -> torch.Tensor:
    return torch.tensor(x)


# --- literal values -----------------------------------------------------------------------------------------------


def test_global_std_by_hand():
    # rewards 0 2 | 10 14: means 1, 12; global mean 6.5; squares 42.25 + 20.25 + 12.25 + 56.25 = 131; std sqrt(32.75)
    out = group_advantages(f64(0, 2, 10, 14), ids(3, 3, 8, 8), std="global", eps=1e-4, clip=None)
    scale = math.sqrt(32.75) + 1e-4
    torch.testing.assert_close(out.advantages, torch.tensor([-1 / scale, 1 / scale, -2 / scale, 2 / scale]))
    torch.testing.assert_close(out.stds, f64(math.sqrt(32.75), math.sqrt(32.75)))
    torch.testing.assert_close(out.group_means, f64(1, 12))
    assert out.groups.tolist() == [3, 8] and out.valid.all()
    assert (out.missing, out.dropped_groups, out.zero_variance_groups, out.clipped) == (0, 0, 0, 0)


def test_prompt_std_by_hand():
    # stds of the groups: 1 and 2 (population)
    out = group_advantages(f64(0, 10, 2, 14), ids(0, 1, 0, 1), std="prompt", eps=0.5, clip=None)
    torch.testing.assert_close(out.advantages, torch.tensor([-1 / 1.5, -2 / 2.5, 1 / 1.5, 2 / 2.5]))
    torch.testing.assert_close(out.stds, f64(1, 2))


def test_no_std_leaves_the_reward_scale():
    out = group_advantages(f64(0, 2, 10, 14), ids(0, 0, 1, 1), std="none", clip=None)
    assert out.advantages.tolist() == [-1, 1, -2, 2]


def test_clip_is_applied_last_and_counted():
    out = group_advantages(f64(0, 2, 10, 14), ids(0, 0, 1, 1), std="none", clip=1.5)
    assert out.advantages.tolist() == [-1, 1, -1.5, 1.5]
    assert out.clipped == 2


def test_the_default_clip_is_five():
    # one reward of 1 among n - 1 zeros: z-score sqrt(n - 1) = 9.95 for n = 100
    r = torch.zeros(100)
    r[7] = 1
    out = group_advantages(r, torch.zeros(100, dtype=torch.long), std="prompt")
    assert out.advantages[7] == 5.0 and out.clipped == 1


# --- missing rewards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", ["global", "prompt", "none"])
def test_missing_rewards_are_as_if_never_drawn(std):
    full = group_advantages(f64(0, NAN, 2, 10, NAN, 14, 5), ids(0, 0, 0, 1, 1, 1, 1), std=std)
    short = group_advantages(f64(0, 2, 10, 14, 5), ids(0, 0, 1, 1, 1), std=std)
    assert full.missing == 2
    assert full.valid.tolist() == [True, False, True, True, False, True, True]
    assert torch.equal(full.advantages[full.valid], short.advantages)
    assert (full.advantages[~full.valid] == 0).all()


@pytest.mark.parametrize("std", ["global", "prompt", "none"])
def test_a_group_with_one_valid_leaf_is_dropped_and_is_in_no_statistic(std):
    out = group_advantages(f64(0, 2, 1000, NAN), ids(0, 0, 1, 1), std=std)
    alone = group_advantages(f64(0, 2), ids(0, 0), std=std)
    assert torch.equal(out.advantages[:2], alone.advantages)
    assert out.valid.tolist() == [True, True, False, False]
    assert out.dropped_groups == 1 and out.missing == 1
    assert math.isnan(out.stds[1]) and math.isnan(out.group_means[1]) and out.advantages[2] == 0


@pytest.mark.parametrize("std", ["global", "prompt", "none"])
def test_nothing_but_missing_rewards(std):
    out = group_advantages(f64(NAN, NAN), ids(0, 0), std=std)
    assert not out.valid.any() and out.advantages.tolist() == [0, 0] and out.dropped_groups == 1
    assert len(group_advantages(torch.empty(0), torch.empty(0, dtype=torch.long), std=std).advantages) == 0


@pytest.mark.parametrize("std", ["global", "prompt", "none"])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
@settings(max_examples=30, deadline=None)
@given(value=st.floats(-1e6, 1e6), n=st.integers(2, 9))
@example(value=0.1, n=3)
def test_equal_rewards_give_exactly_zero(std, eps, value, n):
    # 0.1 three times has a float mean that differs from 0.1: the zero must not come from luck in rounding
    r = f64(*[value] * n, 0.0, 3.0)
    out = group_advantages(r, ids(*[0] * n, 1, 1), std=std, eps=eps)
    assert (out.advantages[:n] == 0).all() and out.valid.all()
    assert out.zero_variance_groups == 1
    assert out.advantages[n] < 0 < out.advantages[n + 1]


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [INF, -INF])
def test_infinity_names_the_image(bad):
    with pytest.raises(UserError, match="image 2 is -?inf"):
        group_advantages(f64(0, NAN, bad, 1), ids(0, 0, 0, 0))


def test_bad_arguments():
    with pytest.raises(UserError, match="'globl'.*expected 'global', 'prompt' or 'none'"):
        group_advantages(f64(0, 1), ids(0, 0), std="globl")
    with pytest.raises(UserError, match="one group id"):
        group_advantages(f64(0, 1), ids(0, 0, 0))
    with pytest.raises(UserError, match="integers"):
        group_advantages(f64(0, 1), f64(0, 0))


# --- properties ---------------------------------------------------------------------------------------------------

# Rewards on a grid of 1/64: shifted and scaled ones are exact too, and the algebra can be tested tightly.
grid = st.integers(-640, 640).map(lambda k: k / 64)
batches = st.lists(st.tuples(st.integers(0, 4), st.one_of(grid, grid, grid, st.just(NAN))), min_size=1, max_size=30)
stds = st.sampled_from(["global", "prompt", "none"])


def unpack(batch):
    return f64(*[r for _, r in batch]), ids(*[g for g, _ in batch])


@settings(max_examples=60, deadline=None)
@given(batches, stds, st.integers(-100, 100))
def test_shift_of_all_rewards_changes_nothing(batch, std, shift):
    r, g = unpack(batch)
    a, b = group_advantages(r, g, std=std), group_advantages(r + shift, g, std=std)
    torch.testing.assert_close(a.advantages, b.advantages, rtol=1e-5, atol=1e-6)
    assert torch.equal(a.valid, b.valid)


@settings(max_examples=60, deadline=None)
@given(batches, st.sampled_from(["global", "prompt"]), st.sampled_from([0.25, 3.0, 64.0]))
def test_scale_of_the_rewards_is_divided_out(batch, std, scale):
    r, g = unpack(batch)
    a, b = group_advantages(r, g, std=std, eps=0), group_advantages(scale * r, g, std=std, eps=0)
    torch.testing.assert_close(a.advantages, b.advantages, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(batches, stds, st.randoms())
def test_permuting_the_images_permutes_the_advantages(batch, std, random):
    r, g = unpack(batch)
    order = list(range(len(batch)))
    random.shuffle(order)
    a, b = group_advantages(r, g, std=std), group_advantages(r[order], g[order], std=std)
    torch.testing.assert_close(a.advantages[order], b.advantages, rtol=1e-5, atol=1e-6)
    assert torch.equal(a.valid[order], b.valid)


@settings(max_examples=60, deadline=None)
@given(batches, stds)
def test_each_group_sums_to_zero_and_keeps_the_order_of_rewards(batch, std):
    r, g = unpack(batch)
    out = group_advantages(r, g, std=std, clip=None)
    for group in g.unique():
        mine = (g == group) & out.valid
        # float32 results of up to 30 leaves
        assert abs(out.advantages[mine].double().sum()) <= 1e-5 * (1 + out.advantages[mine].abs().sum())
        order = r[mine].argsort()
        assert (out.advantages[mine][order].diff() >= 0).all()
    clipped = group_advantages(r, g, std=std, clip=0.5)
    assert (clipped.advantages.abs() <= 0.5).all()


@settings(max_examples=60, deadline=None)
@given(batches)
def test_group_z_scores_have_unit_population_std(batch):
    r, g = unpack(batch)
    out = group_advantages(r, g, std="prompt", eps=0, clip=None)
    for group in g.unique():
        a = out.advantages[(g == group) & out.valid].double()
        if len(a) and a.any():
            assert math.isclose(float((a**2).mean()), 1, rel_tol=1e-5)


@settings(max_examples=40, deadline=None)
@given(batches, st.integers(1, 4), stds)
def test_any_split_over_processes_gives_the_same_advantages(batch, ranks, std):
    """Processes are threads here: the reducer waits until all have given their sums, as an all-reduce does."""
    from threading import Barrier, Thread

    r, g = unpack(batch)
    whole = group_advantages(r, g, std=std)
    barrier, given_sums, got = Barrier(ranks), [None] * ranks, [None] * ranks

    def process(rank):
        def reduce(x):
            given_sums[rank] = x.clone()
            barrier.wait()
            total = sum(given_sums[1:], start=given_sums[0])
            barrier.wait()
            return total

        mine = g % ranks == rank  # groups stay whole; some processes may hold none
        got[rank] = (mine, group_advantages(r[mine], g[mine], std=std, reduce=reduce))

    threads = [Thread(target=process, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    for mine, part in got:
        assert torch.equal(part.valid, whole.valid[mine])
        torch.testing.assert_close(part.advantages, whole.advantages[mine], rtol=1e-6, atol=1e-7)
        if std == "global" and part.valid.any():
            mine_std, all_std = part.stds[~part.stds.isnan()], whole.stds[~whole.stds.isnan()]
            torch.testing.assert_close(mine_std[0], all_std[0], rtol=1e-13, atol=1e-13)
