"""DiffusionNFT: its formula by hand, its gradient on `GaussianPolicy` in closed form, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_runs import PROMPTS, TARGET

import samplers
from flowrl.advantages import group_advantages
from flowrl.errors import UserError
from flowrl.leaves import leaf_count, leaf_rows, leaf_scalars, leaf_times
from flowrl.objectives import NFT, LeafScalars, LeafVelocities, old_decay
from flowrl.policies import GaussianPolicy
from flowrl.policies.gaussian import quadratic_reward, velocity_coefficients
from flowrl.update import Batch, UpdateSettings, accumulate_gradients, forwards_per_row, total_weight

SIGMAS = torch.linspace(1, 0, 6, dtype=torch.float64)
STRAIGHT = samplers.plans.straight(SIGMAS, level=0.0)  # a deterministic rollout: no edge is trained
TREE = samplers.plans.sliding_tree(SIGMAS, (1, 3))


def scalars(objective: NFT, velocities: LeafVelocities, advantage: float) -> LeafScalars:
    n = len(velocities.x0)
    return LeafScalars(**objective.measure(velocities), advantage=torch.full((n,), advantage), weight=torch.ones(n))


def one(x0, e, s, v, v_old, v_ref=None) -> LeafVelocities:
    """One leaf of two elements, float64."""
    x0, e, v, v_old = (torch.tensor(x, dtype=torch.float64).view(1, 2, 1, 1) for x in (x0, e, v, v_old))
    ref = None if v_ref is None else torch.tensor(v_ref, dtype=torch.float64).view(1, 2, 1, 1)
    x = (1 - s) * x0 + s * e
    return LeafVelocities(x0, x, torch.tensor([s], dtype=torch.float64), v.requires_grad_(), v_old, ref)


# ---------------------------------------------------------------------------------------------------- the formula
def test_by_hand():
    """x0 = (1, 0), e = (-1, 2), s = 1/2: x = (0, 1), e - x0 = (-2, 2). v_old = (0, 0), v = (-1, 3), beta = 1/2:
    v+ = (-.5, 1.5), x0+ = (.25, .25), off by (-.75, .25): <^2> = .3125, <|.|> = .5, L+ = .625;
    v- = (.5, -1.5), x0- = (-.25, 1.75), off by (-1.25, 1.75): <^2> = 2.3125, <|.|> = 1.5, L- = 2.3125 / 1.5."""
    objective = NFT(beta=0.5, kl_weight=0.1)
    found = scalars(objective, one([1, 0], [-1, 2], 0.5, [-1, 3], [0, 0], [-1, 1]), 2.5)
    assert found.positive.item() == pytest.approx(0.625, rel=1e-6)
    assert found.negative.item() == pytest.approx(2.3125 / 1.5, rel=1e-6)
    assert found.kl.item() == pytest.approx(2.0, rel=1e-6)
    out = objective(found)
    assert out.terms.item() == pytest.approx(5 * (0.75 * 0.625 + 0.25 * 2.3125 / 1.5) / 0.5 + 0.1 * 2.0, rel=1e-6)
    assert out.metrics["policy_loss"].item() == pytest.approx(out.terms.item() - 0.2, rel=1e-5)


@pytest.mark.parametrize(
    ("advantage", "r"), [(5.0, 1.0), (80.0, 1.0), (-5.0, 0.0), (-9.0, 0.0), (0.0, 0.5), (1.0, 0.6)]
)
def test_the_advantage_shares_out_the_two_errors(advantage, r):
    objective = NFT(beta=0.7, kl_weight=0.0)
    velocities = one([1, 0], [-1, 2], 0.5, [-1, 3], [0.2, 0.1])
    found = scalars(objective, velocities, advantage)
    expected = 5 / 0.7 * (r * found.positive.item() + (1 - r) * found.negative.item())
    assert objective(found).terms.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("beta", [1.0, 0.1, 2.0])
@pytest.mark.parametrize("advantage", [3.0, -1.0, 0.0])
def test_while_the_weights_have_not_moved_beta_drops_out(beta, advantage):
    """At v = v_old both errors are one; the gradient is clip (2 r - 1) 2 s^2 (v_old - (e - x0)) / (D w)."""
    x0, e, s, v = [1.0, 0.3], [-1.0, 2.0], 0.6, [-1.0, 3.0]
    objective = NFT(beta=beta, kl_weight=0.0)
    velocities = one(x0, e, s, v, v)
    (gradient,) = torch.autograd.grad(objective(scalars(objective, velocities, advantage)).terms.sum(), velocities.v)
    off = torch.tensor(v) - (torch.tensor(e) - torch.tensor(x0))
    w = s * off.abs().mean()
    expected = 5 * (advantage / 5) * 2 * s**2 * off / (2 * w)
    torch.testing.assert_close(gradient.flatten().float(), expected, rtol=1e-5, atol=1e-7)


def test_the_weight_of_a_perfect_prediction_has_a_floor():
    objective = NFT(kl_weight=0.0, error_floor=0.5)
    velocities = one([1, 0], [-1, 2], 0.5, [-2, 2.2], [-2, 2])
    assert scalars(objective, velocities, 0.0).positive.item() == pytest.approx(0.01 / 2 / 0.5, rel=1e-6)
    exact = scalars(NFT(), one([1, 0], [-1, 2], 0.5, [-2, 2], [-2, 2], [0, 0]), 0.0)
    assert exact.positive.item() == 0 and math.isfinite(exact.negative.item())


def test_old_weights_follow_ever_more_slowly():
    assert [old_decay(n) for n in (0, 1, 499, 500, 9999)] == [0.0, 0.001, 0.499, 0.5, 0.5]
    late = [old_decay(n, rise=0.0075, start=75, limit=0.999) for n in (0, 75, 76, 175, 400)]
    assert late == pytest.approx([0.0, 0.0, 0.0075, 0.75, 0.999])


@pytest.mark.parametrize(
    "bad",
    [{"beta": 0}, {"advantage_clip": -1}, {"error_floor": 0}, {"kl_weight": -1}, {"time_fraction": 0}, {"times": 0}],
)
def test_settings_out_of_range(bad):
    with pytest.raises(UserError):
        NFT(**bad)
    with pytest.raises(ValueError, match=r"LeafScalars\.kl"):
        NFT()(LeafScalars(*[torch.zeros(2)] * 4))
    with pytest.raises(ValueError, match="one vector of one length"):
        LeafScalars(torch.zeros(2), torch.zeros(2), torch.zeros(1), torch.zeros(2))


# -------------------------------------------------------------------------------------------------- in the update
def make(plan: samplers.Plan, seed: int = 0, parts: int = 1) -> tuple[GaussianPolicy, Batch]:
    """A rollout under "old" weights, current ones that moved on, a missing leaf and a root without any."""
    policy, generator = GaussianPolicy(), torch.Generator().manual_seed(seed)

    def move(size: float) -> None:
        with torch.no_grad():
            for _, parameter in policy.trainable():
                parameter += size * torch.randn(parameter.shape, generator=generator)

    move(0.3)
    policy.copy_weights("current", "old")
    group = torch.arange(3).repeat_interleave(2)
    cond = policy.encode(PROMPTS[:3])[group]
    keys = [samplers.Key(seed, "rollout", 4, int(p), 0, i) for i, p in enumerate(group)]
    tree = samplers.rollout(
        lambda x, s, index: policy.predict(x, s, cond[index]), plan, keys, latent_shape=(2, 1, 1), chunk=5
    )
    advantage = 4 * torch.randn(6, len(plan.leaves), generator=generator)
    advantage[1, 0], advantage[4] = math.nan, math.nan
    edges = torch.zeros(len(tree.edges))
    part = group % parts
    batch = Batch(tree, cond, edges, edges, group, part[tree.states.root], advantage, root_part=part)
    move(0.2)
    return policy, batch


def gradient(policy, batch, objective, micro_batch=64, part=0, **settings):
    for _, parameter in policy.trainable():
        parameter.grad = None
    normaliser = total_weight(batch, part, objective)
    metrics, used = accumulate_gradients(
        policy, batch, part, objective, normaliser, UpdateSettings(3.0, micro_batch, **settings)
    )  # a guidance of 3 that must not be used
    return torch.cat([p.grad.flatten() for _, p in policy.trainable()]).double(), metrics, used


def written_out(policy: GaussianPolicy, batch: Batch, objective: NFT, times: int) -> torch.Tensor:
    """d loss / d(W, w) by the chain rule on paper: v = k x + h (m + W m + w), so dv_j/dw_j = h, dv_j/dW_ji = h m_i."""
    tree, beta = batch.tree, objective.beta
    with policy.weights("old"):
        old = policy.weight.detach().double().clone(), policy.bias.detach().double().clone()
    now = policy.weight.detach().double(), policy.bias.detach().double()
    total, count = torch.zeros(6, dtype=torch.float64), 0
    for root in range(6):
        m = batch.cond.rows["mean"][root].double()
        for leaf in range(tree.leaves.shape[1]):
            a = float(batch.leaf_advantage[root, leaf])
            if math.isnan(a):
                continue
            r = 0.5 + 0.5 * max(-1.0, min(1.0, a / 5))
            for i in range(times):
                s = float(SIGMAS[i])
                path = tree.plan.paths[tree.plan.leaves[leaf]]
                key = tree.keys[root]._replace(purpose="leaf noise", path=path, step=i)
                e = samplers.noise([key], (2,))[0].double()
                x0 = tree.leaves[root, leaf].flatten().double()
                x, u = (1 - s) * x0 + s * e, e - x0
                k, h = (float(z) for z in velocity_coefficients(s, policy.std))
                v, v_old, v_ref = (k * x + h * (m + w @ m + b) for w, b in (now, old, (0 * old[0], 0 * old[1])))
                plus, minus = beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v
                # d L+- / d v = +-beta 2 s^2 (v+- - u) / (D w+-), with D = 2 and w+- = s <|v+- - u|>
                dplus = beta * s * (plus - u) / (plus - u).abs().mean()
                dminus = -beta * s * (minus - u) / (minus - u).abs().mean()
                dv = 5 / beta * (r * dplus + (1 - r) * dminus) + objective.kl_weight * (v - v_ref)
                total += torch.cat([torch.outer(h * dv, m).flatten(), h * dv])
                count += 1
    return total / count


@pytest.mark.parametrize("objective", [NFT(), NFT(beta=0.1, kl_weight=0.5), NFT(beta=1.5, kl_weight=0.0)], ids=str)
@pytest.mark.parametrize(("plan", "seed"), [(STRAIGHT, 0), (STRAIGHT, 1), (TREE, 0)], ids=["0", "1", "tree"])
def test_the_gradient_is_the_closed_form_whatever_the_micro_batch(plan, seed, objective):
    policy, batch = make(plan, seed)
    expected = written_out(policy, batch, objective, times=4)  # int(0.99 * 5) of the five times
    leaves = int((~batch.leaf_advantage.isnan()).sum())
    for micro_batch in (1, 7, 64):
        mine, metrics, used = gradient(policy, batch, objective, micro_batch)
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert used == metrics.weight == 4 * leaves
    assert metrics.result()["edges"] == used and math.isfinite(metrics.result()["loss"])


def test_inner_updates_share_the_leaves():
    objective = NFT()
    whole, _, used = gradient(*make(STRAIGHT), objective)
    total, weight = 0.0, 0.0
    for part in (0, 1):
        mine, metrics, _ = gradient(*make(STRAIGHT, parts=2), objective, part=part)
        total, weight = total + mine * metrics.weight, weight + metrics.weight
    torch.testing.assert_close(total / weight, whole, rtol=1e-5, atol=1e-6)
    assert weight == used


def test_times_are_drawn_one_from_each_part_of_the_schedule():
    _, batch = make(STRAIGHT)
    assert leaf_times(STRAIGHT) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert leaf_times(STRAIGHT, 0.99) == pytest.approx([1.0, 0.8, 0.6, 0.4]) and leaf_times(STRAIGHT, 0.01) == (1.0,)
    objective = NFT(times=2)
    rows = leaf_rows(batch, 0, objective)
    leaves = int((~batch.leaf_advantage.isnan()).sum())
    assert len(rows) == leaf_count(batch, 0, objective) == 2 * leaves
    steps = rows[:, 2].view(leaves, 2)
    assert set(steps[:, 0].tolist()) == {0, 1} and set(steps[:, 1].tolist()) == {2, 3}
    assert torch.equal(rows, leaf_rows(batch, 0, objective))  # a function of the keys
    assert not torch.equal(rows, leaf_rows(batch, 0, objective, epoch=1))
    assert leaf_count(batch, 0, NFT(times=99)) == 4 * leaves


def test_noise_is_a_function_of_leaf_time_and_epoch():
    policy, batch = make(TREE)
    objective = NFT()
    rows = leaf_rows(batch, 0, objective)
    whole = leaf_scalars(policy, batch, rows, objective, UpdateSettings(1.0, 64))
    some = leaf_scalars(policy, batch, rows[[3, 1]], objective, UpdateSettings(1.0, 64))
    torch.testing.assert_close(some.positive, whole.positive[[3, 1]], rtol=1e-6, atol=0)
    other = leaf_scalars(policy, batch, rows, objective, UpdateSettings(1.0, 64, epoch=1))
    below = rows[:, 2] > 0  # at s = 1 this policy predicts e - m, so that the error does not depend on the noise
    assert ((other.positive - whole.positive)[below].abs() > 1e-3).float().mean() > 0.9
    assert len(set(whole.positive[below].tolist())) == below.sum()


def test_a_group_may_share_its_times_and_noise(monkeypatch):
    """The noise is taken back out of what the policy is shown: e = (x_s - (1 - s) x0) / s."""
    policy, batch = make(TREE)
    objective, shown = NFT(times=2, kl_weight=0.0, shared_noise=True), []
    rows = leaf_rows(batch, 0, objective)
    predict = policy.predict
    monkeypatch.setattr(policy, "predict", lambda x, s, cond: shown.append((x, s)) or predict(x, s, cond))
    leaf_scalars(policy, batch, rows, objective, UpdateSettings(1.0, 64, on_policy=True))
    ((x, s),) = shown
    x0, s = batch.tree.leaves[rows[:, 0], rows[:, 1]], s.view(-1, 1, 1, 1)
    noise, group = ((x - (1 - s) * x0) / s).flatten(1), batch.group[rows[:, 0]]
    for number in group.unique():
        mine, step = noise[group == number], rows[group == number, 2]
        assert len(step.unique()) == 2  # one time from each half of the schedule, for all its leaves
        for k in step.unique():
            torch.testing.assert_close(mine[step == k], mine[step == k][:1].expand_as(mine[step == k]))
    assert len({tuple(e) for e in (noise * 1e3).round().tolist()}) == 2 * len(group.unique())


def test_on_policy_the_old_weights_need_no_forward(monkeypatch):
    policy, batch = make(STRAIGHT)
    policy.copy_weights("current", "old")
    objective = NFT(kl_weight=0.0)
    expected, _, _ = gradient(policy, batch, objective)
    calls = []
    predict = policy.predict
    monkeypatch.setattr(policy, "predict", lambda *args: calls.append(len(args[0])) or predict(*args))
    mine, _, used = gradient(policy, batch, objective, on_policy=True)
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-8)
    assert sum(calls) == used * forwards_per_row(objective, UpdateSettings(1.0, 8, on_policy=True)) == used
    calls.clear()
    gradient(policy, batch, NFT())
    assert sum(calls) == 3 * used == used * forwards_per_row(NFT(), UpdateSettings(1.0, 8))


def test_without_leaves_the_metrics_have_the_same_names():
    policy, batch = make(STRAIGHT)
    names = set(gradient(policy, batch, NFT())[1].result())
    nothing = Batch(**{**vars(batch), "leaf_advantage": torch.full((6, 1), math.nan)})
    metrics, used = accumulate_gradients(policy, nothing, 0, NFT(), 1.0, UpdateSettings(1.0, 8))
    assert used == 0 and set(metrics.result()) == names
    with pytest.raises(ValueError, match=r"Batch\.root_part"):
        gradient(policy, Batch(**{**vars(batch), "root_part": None}), NFT())


# ------------------------------------------------------------------------------------------------------ it learns
def learn(sign: float, seed: int, updates: int = 60) -> float:
    """Change of the mean reward of deterministic samples; sampling weights follow the trained ones."""
    policy = GaussianPolicy()
    policy.copy_weights("current", "old")
    prompts, size = PROMPTS[:4], 6
    group = torch.arange(len(prompts)).repeat_interleave(size)
    cond = policy.encode(prompts)[group]
    optimizer = torch.optim.Adam([p for _, p in policy.trainable()], lr=0.03)
    objective = NFT(times=2)

    def sample(update: int, weights: str) -> samplers.Tree:
        keys = [samplers.Key(seed, "rollout", update, int(p), 0, i) for i, p in enumerate(group)]
        with policy.weights(weights):
            return samplers.rollout(
                lambda x, s, index: policy.predict(x, s, cond[index]), STRAIGHT, keys, latent_shape=(2, 1, 1)
            )

    def reward(tree: samplers.Tree) -> torch.Tensor:
        return quadratic_reward(tree.leaves.flatten(0, 1).flatten(1), TARGET, 1.0)

    start = reward(sample(9999, "current")).mean()
    for update in range(updates):
        tree = sample(update, "old")
        found = group_advantages(sign * reward(tree), group, std="prompt")
        leaves = found.advantages.where(found.valid, math.nan).view(-1, 1)
        none = torch.zeros(0)
        batch = Batch(tree, cond, none, none, group, none.long(), leaves, root_part=torch.zeros_like(group))
        optimizer.zero_grad()
        accumulate_gradients(policy, batch, 0, objective, total_weight(batch, 0, objective), UpdateSettings(1.0, 64))
        optimizer.step()
        policy.copy_weights("current", "old", decay=old_decay(update))
    return float(reward(sample(9999, "current")).mean() - start)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_it_learns_and_the_flipped_reward_does_the_opposite(seed):
    """Of the reward at the start about 0.9 is the distance of the means from the target, and can be gained."""
    assert learn(1.0, seed) > 0.5
    assert learn(-1.0, seed) < -0.5
