"""Objectives on edges beyond the plain clip: adaptive bounds, GRPO-Guard, Flow-DPPO, softmax trajectory balance."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import samplers
from flowrl.errors import UserError
from flowrl.objectives import DPPO, Clipped, EdgeScalars, Guard, SoftmaxTB

NONE = math.nan


def vector(x) -> torch.Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


def edges(ratio, advantage, weight=None, **more) -> EdgeScalars:
    """Edges whose ratio is given; the old log-prob is not zero, so that a swapped sign would show."""
    old = torch.linspace(-1.5, -0.5, len(ratio), dtype=torch.float64)
    weight = torch.ones(len(ratio), dtype=torch.float64) if weight is None else vector(weight)
    more = {name: x if isinstance(x, torch.Tensor) else vector(x) for name, x in more.items()}
    return EdgeScalars((old + vector(ratio).log()).requires_grad_(), old, vector(advantage), weight, **more)


def slope(objective, e: EdgeScalars) -> list[float]:
    return torch.autograd.grad(objective(e).terms.sum(), e.log_prob)[0].tolist()


ratios = st.lists(st.floats(0.3, 3), min_size=4, max_size=4)
advantages = st.lists(st.floats(-5, 5), min_size=4, max_size=4)


# ------------------------------------------------------------------------------------------------ adaptive bounds
def test_adaptive_bounds_by_hand():
    """g = 1 / (1 + exp(-2 A)) = 3/4, 1/2, 1/4 at A = ln(3) / 2, 0, -ln(3) / 2."""
    a = math.log(3) / 2
    objective = Clipped(0.1, clip_range_max=0.5, sensitivity=2.0)
    low, high = objective.bounds(vector([a, 0.0, -a]))
    assert low.tolist() == high.tolist() == pytest.approx([0.4, 0.3, 0.2], rel=1e-12)
    out = objective(edges([1.5, 0.7], [a, -a]))
    assert out.terms.tolist() == pytest.approx([-1.4 * a, 0.8 * a], rel=1e-12)
    assert slope(objective, edges([1.5, 0.7], [a, -a])) == [0.0, 0.0]
    assert slope(objective, edges([1.39, 0.81], [a, -a])) == pytest.approx([-1.39 * a, 0.81 * a])
    pair = Clipped((0.1, 0.2), clip_range_max=(0.3, 0.8), sensitivity=0.0)
    assert [x.item() for x in pair.bounds(vector([7.0]))] == pytest.approx([0.2, 0.5])


@settings(max_examples=30, deadline=None)
@given(ratios, advantages, st.floats(0.01, 0.9), st.floats(0.01, 2))
def test_equal_ends_are_a_fixed_range_and_equal_bounds_a_symmetric_one(ratio, advantage, low, high):
    e = edges(ratio, advantage)
    fixed = Clipped((low, high))(e)
    adaptive = Clipped((low, high), clip_range_max=(low, high))(e)
    torch.testing.assert_close(adaptive.terms, fixed.terms, rtol=1e-12, atol=0)
    assert torch.equal(Clipped((low, low))(e).terms, Clipped(low)(e).terms)
    wider = Clipped((low, high), clip_range_max=((1 + low) / 2, 2 * high))
    assert (wider(e).terms <= fixed.terms + 1e-12).all()  # a wider clip is less pessimistic


def test_bad_adaptive_bounds():
    with pytest.raises(UserError, match="at least as wide"):
        Clipped((0.1, 0.5), clip_range_max=0.2)
    with pytest.raises(UserError, match="clip_range_max is 2"):
        Clipped(0.1, clip_range_max=2)
    with pytest.raises(UserError, match="sensitivity"):
        Clipped(0.1, clip_range_max=0.2, sensitivity=math.inf)


# ------------------------------------------------------------------------------------------------ GRPO-Guard
@settings(max_examples=30, deadline=None)
@given(ratios, advantages, st.floats(0.01, 0.9))
def test_guard_with_jacobian_one_is_the_clipped_surrogate(ratio, advantage, clip_range):
    one = torch.ones(4, dtype=torch.float64)
    e = edges(ratio, advantage, jacobian=one, c=one, d=one, mean_shift_sq=0 * one)
    clipped = Clipped(clip_range)(e)
    for guard in (Guard(clip_range, ratio_norm=False), Guard(clip_range), Guard(clip_range, reweight="step")):
        torch.testing.assert_close(guard(e).terms, clipped.terms, rtol=1e-12, atol=1e-15)
    e = edges(ratio, advantage, jacobian=3 * one)
    torch.testing.assert_close(Guard(clip_range, ratio_norm=False, reweight="none")(e).terms, clipped.terms)
    torch.testing.assert_close(3 * Guard(clip_range, ratio_norm=False)(e).terms, clipped.terms)


def test_guard_by_hand():
    """c = 0.5, <dm^2> = 0.02, log-ratio 0.1: ln r = (0.1 + 0.02 / 0.5) 0.5 = 0.07; |b| = 0.2, d = 0.25."""
    e = edges([math.exp(0.1)], [2.0], [0.5], c=[0.5], mean_shift_sq=[0.02], jacobian=[0.2], d=[0.25], kl=[3.0])
    r = math.exp(0.07)
    assert Guard(0.5)(e).terms.item() == pytest.approx(0.5 * -2 * r / 0.2, rel=1e-12)
    assert Guard(0.5, reweight="step")(e).terms.item() == pytest.approx(0.5 * -2 * r / 0.25, rel=1e-12)
    assert Guard(0.05)(e).terms.item() == pytest.approx(0.5 * -2 * 1.05 / 0.2, rel=1e-12)
    assert Guard(0.05, kl_weight=0.1)(e).terms.item() == pytest.approx(0.5 * (-2 * 1.05 / 0.2 + 0.3), rel=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("density", ["gaussian", "unscaled"])
def test_guards_log_ratio_is_that_of_the_noise_under_every_density(reduction, density):
    g = torch.Generator().manual_seed(0)
    x, eps, dm = (torch.randn(5, 7, generator=g) for _ in range(3))
    dm, c = 0.3 * dm, torch.rand(5, generator=g).double() + 0.1
    x_next = x + c.float()[:, None] * eps
    over = torch.sum if reduction == "sum" else torch.mean
    e = EdgeScalars(
        samplers.log_prob(x_next, x + dm, c, reduction, density),
        samplers.log_prob(x_next, x, c, reduction, density),
        torch.ones(5),
        torch.ones(5),
        c=c.float(),
        jacobian=torch.ones(5),
        mean_shift_sq=over(dm**2, dim=1),
        scale=None if density == "gaussian" else torch.ones(5),
    )
    log_ratio = Guard((0.9, 1e9))(e).metrics["ratio"].log()
    torch.testing.assert_close(log_ratio, over(eps * dm, dim=1), rtol=1e-3, atol=1e-4)


def test_guard_gives_every_step_the_same_say():
    """On-policy d(term)/dv = -A sign(b) eps / D at every step, whatever its a, b and c; the plain ratio has b/c."""
    g = torch.Generator().manual_seed(1)
    x, eps = (torch.randn(6, 4, generator=g, dtype=torch.float64) for _ in range(2))
    kernel = samplers.get_kernel("flow")
    sigmas = samplers.sd3_sigmas(8)
    a, b, c = kernel.coefficients(sigmas[:6], sigmas[1:7], 0.7)
    v = torch.randn(6, 4, generator=g, dtype=torch.float64).requires_grad_()

    def mean(v):
        return a[:, None] * x + b[:, None] * v

    x_next = mean(v.detach()) + c[:, None] * eps
    log_prob = -((x_next - mean(v)) ** 2).mean(1) / (2 * c**2)
    shift = ((mean(v) - mean(v.detach())) ** 2).mean(1)
    advantage = vector([1.0, -2, 3, 0.5, -1, 1])
    e = EdgeScalars(log_prob, log_prob.detach(), advantage, torch.ones(6).double(), jacobian=b.abs(), c=c)
    (plain,) = torch.autograd.grad(Clipped(0.1)(e).terms.sum(), v, retain_graph=True)
    e = EdgeScalars(**{**vars(e), "mean_shift_sq": shift})
    (guarded,) = torch.autograd.grad(Guard(0.1)(e).terms.sum(), v)
    noise = -advantage[:, None] * eps / 4
    torch.testing.assert_close(guarded, noise * b.sign()[:, None], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(plain, noise * (b / c)[:, None], rtol=1e-9, atol=1e-12)


def test_guard_refuses_what_it_does_not_know():
    with pytest.raises(UserError, match="reweight"):
        Guard(reweight="c")
    with pytest.raises(ValueError, match=r"EdgeScalars\.mean_shift_sq"):
        Guard()(edges([1.0], [1.0], c=[1.0], jacobian=[1.0]))


# ------------------------------------------------------------------------------------------------ Flow-DPPO
MASK = [
    # ratio, advantage, <dm^2> (with c = 0.5: D = 2 <dm^2>), kept at threshold 0.1
    (1.2, 1.0, 0.06, False),
    (1.2, 1.0, 0.04, True),  # inside the trust region
    (0.8, 1.0, 0.06, True),  # outside, but on its way back
    (0.8, -1.0, 0.06, False),
    (1.2, -1.0, 0.06, True),
    (1.0, 1.0, 0.06, True),  # has not moved
    (1.2, 0.0, 0.06, True),
]


@pytest.mark.parametrize(("ratio", "advantage", "shift", "kept"), MASK)
def test_the_mask_of_dppo(ratio, advantage, shift, kept):
    e = edges([ratio], [advantage], [0.5], c=[0.5], mean_shift_sq=[shift])
    out = DPPO(0.1)(e)
    assert out.terms.item() == pytest.approx(-0.5 * advantage * ratio * kept, rel=1e-12)
    assert slope(DPPO(0.1), e) == pytest.approx([-0.5 * advantage * ratio * kept], rel=1e-12)
    assert bool(out.metrics["masked_fraction"]) is not kept
    assert out.metrics["divergence"].item() == pytest.approx(2 * shift)


@settings(max_examples=30, deadline=None)
@given(ratios, advantages, st.lists(st.floats(0, 10), min_size=4, max_size=4))
def test_dppo_without_a_bound_is_the_plain_policy_gradient(ratio, advantage, shift):
    e = edges(ratio, advantage, c=[0.1, 1, 0.5, 2], mean_shift_sq=shift)
    torch.testing.assert_close(DPPO(math.inf)(e).terms, -vector(advantage) * vector(ratio), rtol=1e-12, atol=0)


def test_a_masked_ratio_may_be_infinite():
    e = edges([1.0], [1.0], c=[0.5], mean_shift_sq=[1.0])
    e = EdgeScalars((e.old_log_prob + 1000).requires_grad_(), *list(vars(e).values())[1:])
    assert DPPO()(e).terms.item() == 0 and slope(DPPO(), e) == [0.0]
    with pytest.raises(UserError, match="threshold"):
        DPPO(0.0)


# ------------------------------------------------------------------------------------------------ trajectory balance
# Two trees of one prompt with two leaves each (edges: trunk, left, right) and another prompt with one tree; a path has
# two edges. Rows: (root, group, values of the leaves below)
FOREST = [
    (0, 0, [0.3, -0.2]), (0, 0, [0.3, NONE]), (0, 0, [NONE, -0.2]),
    (4, 0, [1.0, 0.1]), (4, 0, [1.0, NONE]), (4, 0, [NONE, 0.1]),
    (2, 7, [0.5, -0.5]), (2, 7, [0.5, NONE]), (2, 7, [NONE, -0.5]),
]  # fmt: skip
PATHS = {0: [[0, 1], [0, 2], [3, 4], [3, 5]], 7: [[6, 7], [6, 8]]}  # edges of each path, by group
VALUES = {0: [0.3, -0.2, 1.0, 0.1], 7: [0.5, -0.5]}
SHARE = [1.0, 0.5, 0.5] * 3


def forest(log_prob, old=None, rows=range(9), **more) -> EdgeScalars:
    rows, log_prob = list(rows), vector(log_prob)
    chosen = [FOREST[i] for i in rows]
    return EdgeScalars(
        (log_prob[rows].detach() if not log_prob.requires_grad else log_prob[rows]),
        log_prob.detach()[rows] if old is None else vector(old)[rows],
        torch.full((len(rows),), NONE, dtype=torch.float64),  # the edges' own advantages are not looked at
        vector(SHARE)[rows],
        root=torch.tensor([root for root, _, _ in chosen]),
        group=torch.tensor([group for _, group, _ in chosen]),
        paths=vector([values for _, _, values in chosen]),
        **{name: vector(x)[rows] for name, x in more.items()},
    )


def balance(log_prob: torch.Tensor, beta: float) -> dict[int, list[tuple[torch.Tensor, torch.Tensor]]]:
    """(q, t) of every path, written out."""
    found = {}
    for group, paths in PATHS.items():
        sums = [sum(log_prob[e] for e in path) for path in paths]
        z = sum(s.exp() for s in sums).log()
        zt = math.log(sum(math.exp(beta * r) for r in VALUES[group]))
        found[group] = [(s - z, vector(beta * r - zt)) for s, r in zip(sums, VALUES[group], strict=True)]
    return found


def draw(seed: int) -> torch.Tensor:
    return torch.randn(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_squared_balance_written_out(seed):
    """With shares of leaves as weights, terms.sum() / (trained steps x roots) is the mean over paths."""
    log_prob = draw(seed).requires_grad_()
    pairs = [pair for group in balance(log_prob, 2.0).values() for pair in group]
    expected = sum((q - t) ** 2 for q, t in pairs) / len(pairs)
    out = SoftmaxTB(2.0, "squared")(forest(log_prob))
    loss = out.terms.sum() / 6
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    (mine,) = torch.autograd.grad(loss, log_prob)
    torch.testing.assert_close(mine, torch.autograd.grad(expected, log_prob)[0], rtol=1e-9, atol=1e-12)
    assert out.metrics["balance_error"][1].item() == pytest.approx(((pairs[0][0] - pairs[0][1]) ** 2).item(), rel=1e-5)


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clipped_balance_written_out(seed, guard):
    log_prob, low, high = draw(seed).requires_grad_(), 0.2, 0.3
    old, shift, c = log_prob.detach() + 0.2 * draw(seed + 10), 0.1 * draw(seed + 20) ** 2, 0.5 + draw(seed + 30) ** 2
    exponent = ((log_prob - old + shift / (2 * c**2)) * c).detach()
    total = 0.0
    for group, pairs in balance(log_prob, 2.0).items():
        changes = [sum(log_prob[e] - old[e] for e in path) for path in PATHS[group]]
        centre = sum(change.item() for change in changes) / len(changes)
        for change, path, (q, t) in zip(changes, PATHS[group], pairs, strict=True):
            a, r = (t - q).item(), (change - centre).exp()
            w = min(max(math.exp(sum(exponent[e].item() for e in path) / 2), 1 - low), 1 + high) if guard else 1.0
            total = total + max(-a * r * w, -a * r.clamp(1 - low, 1 + high) * w) / 6
    objective = SoftmaxTB(2.0, clip_range=(low, high), guard=guard)
    loss = objective(forest(log_prob, old, mean_shift_sq=shift, c=c)).terms.sum() / 6
    assert loss.item() == pytest.approx(total.item(), rel=1e-10)
    (mine,) = torch.autograd.grad(loss, log_prob)
    torch.testing.assert_close(mine, torch.autograd.grad(total, log_prob)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", [SoftmaxTB(3.0, "squared"), SoftmaxTB(3.0, guard=False)], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_balance_is_zero_where_paths_are_as_likely_as_their_rewards_want(objective, seed):
    """Trunks may have any log-prob, the last edges make up for it; a constant of the group does not matter."""
    log_prob = draw(seed)
    for group, paths in PATHS.items():
        for (trunk, last), value in zip(paths, VALUES[group], strict=True):
            log_prob[last] = 3.0 * value - log_prob[trunk] + (5.0 if group else -1.0)
    log_prob.requires_grad_()
    out = objective(forest(log_prob))
    assert out.terms.abs().max() < 1e-12
    assert torch.autograd.grad(out.terms.sum(), log_prob)[0].abs().max() < 1e-12
    flatter = SoftmaxTB(1.0, objective.form, guard=False)(forest(log_prob))
    assert flatter.terms.abs().max() > 0.1


@pytest.mark.parametrize("objective", [SoftmaxTB(3.0, "squared"), SoftmaxTB(3.0, guard=False)], ids=str)
def test_balance_is_learnt_and_keeps_the_other_paths(objective):
    """Free log-probs descend to softmax(beta R), not to the one best path."""
    log_prob = draw(5)
    for _ in range(200):
        log_prob = log_prob.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(forest(log_prob)).terms.sum(), log_prob)
        log_prob = log_prob - 0.1 * gradient
    for pairs in balance(log_prob, 3.0).values():
        for q, t in pairs:
            assert q.item() == pytest.approx(t.item(), abs=0.02)


def test_the_order_of_edges_does_not_matter_and_paths_without_a_value_are_left_out():
    objective, log_prob = SoftmaxTB(2.0, "squared"), draw(3)
    whole = objective(forest(log_prob)).terms
    order = [5, 0, 8, 3, 1, 7, 2, 6, 4]
    torch.testing.assert_close(objective(forest(log_prob, rows=order)).terms, whole[order], rtol=1e-12, atol=0)
    e = forest(log_prob)
    paths = e.paths.clone()
    paths[3:6, 0] = NONE  # the first leaf of the second tree has no value, so its last edge carries no path
    gaps = objective(EdgeScalars(**{**vars(e), "paths": paths})).terms
    assert gaps[4] == 0
    sums = [log_prob[a] + log_prob[b] for a, b in ([0, 1], [0, 2], [3, 5])]
    q = torch.stack(sums).log_softmax(0)
    error = (q - (2 * vector([0.3, -0.2, 0.1])).log_softmax(0)) ** 2
    torch.testing.assert_close(gaps[[1, 2, 3, 5]], error[[0, 1, 2, 2]] * vector([0.5, 0.5, 1, 0.5]))
    torch.testing.assert_close(gaps[6:], whole[6:], rtol=1e-12, atol=0)  # the other prompt's group


def test_bad_balances():
    with pytest.raises(UserError, match="beta"):
        SoftmaxTB(0.0)
    with pytest.raises(UserError, match="form"):
        SoftmaxTB(form="l2")
    with pytest.raises(ValueError, match=r"EdgeScalars\.paths"):
        SoftmaxTB()(edges([1.0], [1.0]))
