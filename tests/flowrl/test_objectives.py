"""Objectives against hand arithmetic, and the scalar route against plain autograd."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl.errors import UserError
from flowrl.layer_tuning import Supervised
from flowrl.objectives import (
    DPPO,
    NEEDS,
    NFT,
    OBJECTIVES,
    Clipped,
    EdgeScalars,
    Guard,
    LossTerms,
    MetricMeans,
    SoftmaxTB,
    get_objective,
    scalar_gradients,
    surrogate,
)


def edges(ratio, advantage, weight=None, **more):
    """Edges whose ratio is given; the old log-prob is not zero, so that a swapped sign would show."""
    ratio = torch.as_tensor(ratio, dtype=torch.float64)
    old = torch.linspace(-1.5, -0.5, len(ratio), dtype=torch.float64)
    advantage = torch.as_tensor(advantage, dtype=torch.float64)
    weight = torch.ones_like(ratio) if weight is None else torch.as_tensor(weight, dtype=torch.float64)
    return EdgeScalars((old + ratio.log()).requires_grad_(), old, advantage, weight, **more)


# --- both branches, both signs (clip range 0.2; the slope in log p is -A r where not clipped) ----------------------

CASES = [
    # ratio, advantage, term, d term / d log p
    (1.1, 2.0, -2.2, -2.2),  # inside
    (1.5, 2.0, -2.4, 0.0),  # too far up: clipped at 1.2
    (0.5, 2.0, -1.0, -1.0),  # moved the wrong way: not clipped
    (1.1, -2.0, 2.2, 2.2),
    (1.5, -2.0, 3.0, 3.0),  # moved the wrong way: not clipped
    (0.5, -2.0, 1.6, 0.0),  # too far down: clipped at 0.8
    (1.5, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "term", "slope"), CASES)
def test_clipped_terms_and_slopes_by_hand(ratio, advantage, term, slope):
    e = edges([ratio], [advantage])
    out = Clipped(0.2)(e)
    assert out.terms.item() == pytest.approx(term, rel=1e-12)
    (gradient,) = torch.autograd.grad(out.terms.sum(), e.log_prob)
    assert gradient.item() == pytest.approx(slope, rel=1e-12)


def test_a_pair_of_bounds():
    out = Clipped((0.1, 0.3))(edges([1.5, 0.5], [1.0, -1.0]))
    assert out.terms.tolist() == pytest.approx([-1.3, 0.9], rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=8), st.floats(1e-6, 0.9))
def test_at_ratio_one_the_gradient_is_reinforce_exactly(advantage, clip_range):
    """d/d log p of E[A log p] is A; the loss is its negative. Exactly: no tie of the maximum may halve it."""
    e = edges([1.0] * len(advantage), advantage)
    e = EdgeScalars(e.old_log_prob.clone().requires_grad_(), e.old_log_prob, e.advantage, e.weight)
    out = Clipped(clip_range)(e)
    (gradient,) = torch.autograd.grad(out.terms.sum(), e.log_prob)
    assert torch.equal(gradient, -e.advantage)
    assert torch.equal(out.terms, -e.advantage)
    assert (out.metrics["ratio"] == 1).all() and not out.metrics["clip_fraction"].any()


@settings(max_examples=50, deadline=None)
@given(st.floats(0.3, 3), st.floats(-5, 5), st.floats(0.01, 0.9))
def test_clipping_is_pessimistic(ratio, advantage, clip_range):
    assert Clipped(clip_range)(edges([ratio], [advantage])).terms.item() >= -advantage * ratio - 1e-12


def test_weights_and_kl_enter_linearly_and_weight_zero_takes_both_out():
    kl = torch.tensor([3.0, 5.0, 7.0], dtype=torch.float64)
    e = edges([1.1, 1.0, 1.0], [2.0, -1.0, 4.0], weight=[0.5, 1, 0], kl=kl)
    out = Clipped(0.2, kl_weight=0.1)(e)
    assert out.terms.tolist() == pytest.approx([0.5 * (-2.2 + 0.3), 1.0 + 0.5, 0.0], rel=1e-12)


def test_needs():
    assert Clipped().needs == {"edges"} and not Clipped.coupled
    assert Clipped(kl_weight=0.1).needs == {"edges", "reference"} <= NEEDS
    with pytest.raises(ValueError, match=r"EdgeScalars\.kl"):
        Clipped(kl_weight=0.1)(edges([1.0], [1.0]))
    assert Guard().needs == DPPO().needs == {"edges", "old_mean"} and Guard(ratio_norm=False).needs == {"edges"}
    assert SoftmaxTB().needs == {"edges", "paths", "old_mean"} and SoftmaxTB(form="squared").needs == {"edges", "paths"}
    assert NFT().needs == {"leaves", "old", "reference"} and NFT(kl_weight=0).needs == {"leaves", "old"}
    assert Supervised(Guard(kl_weight=1)).needs == {"edges", "old_mean", "reference", "target"}


def test_nothing_flows_into_the_old_log_prob_or_the_advantage():
    e = edges([1.1], [2.0])
    old, advantage = e.old_log_prob.clone().requires_grad_(), e.advantage.clone().requires_grad_()
    Clipped(0.2)(EdgeScalars(e.log_prob, old, advantage, e.weight)).terms.sum().backward()
    assert old.grad is None and advantage.grad is None


# --- metrics ------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    e = edges([1.1, 1.5, 0.5, 9.0], [1.0, -1.0, -1.0, 1.0], weight=[1, 1, 0.5, 0])
    out = Clipped(0.2)(e)
    means = MetricMeans()
    means.add(e, out)
    got = means.result()
    assert got["ratio/mean"] == pytest.approx(3.1 / 3)
    assert got["ratio/max_dev"] == pytest.approx(0.5)  # the 9.0 has weight 0
    assert got["clip_fraction"] == pytest.approx(2 / 3)  # 1.5 and 0.5 lie outside
    assert got["clip_active"] == pytest.approx(1 / 3)  # only 0.5 has moved in its advantage's direction
    assert got["approx_kl"] == pytest.approx(
        (math.log(1.1) ** 2 + math.log(1.5) ** 2 + math.log(0.5) ** 2) / 6, rel=1e-6
    )
    assert got["loss"] == pytest.approx((-1.1 + 1.5 + 0.5 * 0.8) / 2.5)
    assert got["policy_loss"] == pytest.approx((-1.1 + 1.5 + 0.8) / 3)
    assert got["edges"] == 3 and "kl" not in got


def test_metrics_of_parts_and_processes_are_those_of_the_whole():
    e = edges([1.1, 1.5, 0.5, 0.9, 1.3], [1, -1, -1, 2, 0.5], weight=[1, 0.5, 0, 1, 0.25])
    objective = Clipped(0.2)
    whole = MetricMeans()
    whole.add(e, objective(e))
    parts = []
    for split in ([[0, 1], []], [[2], [3, 4]]):  # two processes of two micro-batches, one empty
        parts.append(MetricMeans())
        for rows in split:
            part = e[torch.tensor(rows, dtype=torch.long)]
            parts[-1].add(part, objective(part))
    local = []
    parts[1].result(reduce_sum=lambda x: local.append(x) or x, reduce_max=lambda x: local.append(x) or x)
    got = parts[0].result(reduce_sum=lambda x: x + local[0], reduce_max=lambda x: torch.maximum(x, local[1]))
    assert got == pytest.approx(whole.result(), rel=1e-12)


def test_no_edges_and_non_finite_ratios_are_visible():
    empty = MetricMeans()
    e = edges([1.0], [1.0], weight=[0.0])
    empty.add(e, Clipped()(e))
    assert math.isnan(empty.result()["loss"]) and empty.result()["edges"] == 0
    bad = MetricMeans()
    for ratio in ([float("nan")], [1.0]):  # in this order: a plain max would forget the NaN
        e = edges(ratio, [1.0])
        bad.add(e, Clipped()(e))
    assert math.isnan(bad.result()["ratio/max_dev"])


# --- the scalar route ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoftmaxMatch:
    """A coupled objective: squared distance of log softmax(log p) to that of A within each group."""

    name: ClassVar[str] = "softmax_match"
    coupled: ClassVar[bool] = True
    needs: frozenset = frozenset({"edges"})

    def __call__(self, e):
        terms = torch.zeros_like(e.log_prob)
        for group in e.group.unique():
            rows = (e.group == group).nonzero().flatten()
            error = (e.log_prob[rows].log_softmax(0) - e.advantage[rows].log_softmax(0)) ** 2
            terms = terms.index_add(0, rows, error)
        return LossTerms(e.weight * terms, {})


NONE = math.nan
# values of the two leaves of an edge's root, where they lie below the edge
PATHS = [[1.0, -0.5], [0.3, 2.0], [1.0, NONE], [NONE, 2.0], [-1.0, NONE], [NONE, NONE]]
EVERY = [
    Clipped(1e-3, kl_weight=0.3),
    Clipped(1e-3),
    Clipped(1e-3, clip_range_max=(0.1, 0.2)),
    SoftmaxMatch(),
    Guard(0.01),
    Guard(0.01, 0.3, reweight="step"),
    DPPO(1e-4, kl_weight=0.3),
    SoftmaxTB(2.0, clip_range=0.01, kl_weight=0.3),
    SoftmaxTB(2.0, "squared"),
    Supervised(Clipped(1e-3)),
    Supervised(SoftmaxTB(2.0)),
]


def toy(seed):
    """A model of two parameters and the data of six edges of 5 elements: m = a x + b v, v = theta_0 + theta_1 x."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, eps = draw(6, 5), draw(6, 5)
    a, b, c = 0.9 + 0.1 * draw(6), -0.2 - 0.05 * draw(6).abs(), 0.3 + 0.2 * draw(6).abs()
    theta = draw(2).requires_grad_()
    old = theta.detach() + 0.01 * draw(2)

    def mean(t):
        return a[:, None] * x + b[:, None] * (t[0] + t[1] * x)

    x_next = mean(old) + c[:, None] * eps

    def scalars(rows):
        def log_prob(t):
            return -((x_next - mean(t)) ** 2).mean(1) / (2 * c**2) - c.log() - 0.5 * math.log(2 * math.pi)

        shift = ((mean(theta) - mean(old)) ** 2).mean(1)
        all_edges = EdgeScalars(
            log_prob(theta),
            log_prob(old).detach(),
            advantage=torch.tensor([1.0, -2, 0.5, 3, -1, 0.2], dtype=torch.float64),
            weight=torch.tensor([1, 0.5, 0.5, 1, 1, 0], dtype=torch.float64),
            kl=shift / (2 * c**2),
            jacobian=b.abs(),
            c=c,
            d=0.1 + 0.05 * c,
            mean_shift_sq=shift,
            target_sq=((theta[0] + theta[1] * x - 0.3) ** 2).mean(1),
            target_weight=torch.tensor([0.0, 0, 2, 0.5, 0, 3], dtype=torch.float64),
            group=torch.tensor([0, 1, 0, 1, 1, 0]),
            root=torch.tensor([0, 1, 0, 1, 3, 2]),
            paths=torch.tensor(PATHS, dtype=torch.float64),
        )
        return all_edges[rows]

    return theta, scalars, (x, eps, b, c, old, mean)


@pytest.mark.parametrize("objective", EVERY, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_scalar_route_in_micro_batches_equals_autograd_through_everything(objective, seed):
    theta, scalars, _ = toy(seed)
    everything = slice(None)
    loss = objective(scalars(everything)).terms.sum() / 4.0
    (expected,) = torch.autograd.grad(loss, theta)

    with torch.no_grad():  # first pass: numbers only
        first = EdgeScalars.cat([scalars(slice(0, 4)), scalars(slice(4, 6))])
    out, gradients = scalar_gradients(objective, first, normaliser=4.0)
    assert out.terms.sum().item() / 4 == pytest.approx(loss.item(), rel=1e-12)
    assert not out.terms.requires_grad and gradients.keys() == {"log_prob", "kl", "mean_shift_sq", "target_sq"}
    assert expected.abs().min() > 0
    got = torch.zeros_like(expected)
    for rows in ([0, 5], [1, 2, 3], [4]):  # second pass, other micro-batches
        got += torch.autograd.grad(surrogate(scalars(rows), {name: g[rows] for name, g in gradients.items()}), theta)[0]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objective", [o for o in EVERY if not o.coupled], ids=str)
def test_an_objective_that_is_not_coupled_looks_at_each_edge_alone(objective):
    _, scalars, _ = toy(0)
    whole = objective(scalars(slice(None))).terms
    alone = torch.cat([objective(scalars([i])).terms for i in range(6)])
    torch.testing.assert_close(whole, alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("objective", [o for o in EVERY if not isinstance(o, SoftmaxMatch)], ids=str)
def test_an_edge_of_weight_zero_changes_nothing(objective):
    """The last edge of the toy has weight 0: its numbers reach neither the loss nor a gradient."""
    theta, scalars, _ = toy(0)
    e = scalars(slice(None))
    (given,) = torch.autograd.grad(objective(e).terms.sum(), theta, retain_graph=True)
    (without,) = torch.autograd.grad(objective(e[:5]).terms.sum(), theta)
    torch.testing.assert_close(given, without, rtol=1e-12, atol=0)
    assert objective(e).terms[5] == 0


def test_scalar_gradients_of_the_clipped_objective_by_hand():
    kl = torch.tensor([3.0, 5.0], dtype=torch.float64)
    e = edges([1.1, 1.5], [2.0, 2.0], weight=[0.5, 1], kl=kl)
    _, got = scalar_gradients(Clipped(0.2, kl_weight=0.1), e, normaliser=2.0)
    assert got["log_prob"].tolist() == pytest.approx([0.5 * -2.2 / 2, 0.0])
    assert got["kl"].tolist() == pytest.approx([0.5 * 0.1 / 2, 0.1 / 2])


def test_the_scalars_carry_what_guard_needs():
    """On-policy algebra: log p - log p_old + <dm^2>/(2 c^2) = <eps dm>/c, so Guard's exponent is <eps dm>."""
    theta, scalars, (_, eps, b, _, old, mean) = toy(3)
    e = scalars(slice(None))
    shift = mean(theta) - mean(old)
    expected = -e.weight * e.advantage * (eps * shift).mean(1).exp() / b.abs()
    torch.testing.assert_close(Guard((0.9, 9.0))(e).terms, expected, rtol=1e-9, atol=1e-12)


# --- errors -------------------------------------------------------------------------------------------------------


def test_get_objective():
    assert get_objective("clipped", clip_range=1e-5, kl_weight=0.04) == Clipped(1e-5, 0.04)
    assert get_objective("guard", clip_range=4e-6) == Guard(4e-6) and get_objective("dppo", threshold=0.1) == DPPO(0.1)
    assert get_objective("tmpo", beta=2.0) == SoftmaxTB(2.0) and get_objective("nft", beta=0.1) == NFT(0.1)
    assert all(get_objective(name).name == name and get_objective(name).needs <= NEEDS for name in OBJECTIVES)
    with pytest.raises(UserError, match="unknown objective 'cliped'.*did you mean 'clipped'"):
        get_objective("cliped")
    with pytest.raises(UserError, match="no setting 'clip_rnge'.*did you mean 'clip_range'"):
        get_objective("clipped", clip_rnge=1e-4)


@pytest.mark.parametrize("bad", [0, -1e-4, 1.5, float("nan"), (0.1, 0.0), (0.1, float("inf"))])
def test_clip_range_out_of_range(bad):
    with pytest.raises(UserError, match="clip_range"):
        Clipped(bad)


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_kl_weight_out_of_range(bad):
    with pytest.raises(UserError, match="KL weight"):
        Clipped(1e-4, bad)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="one vector of one length"):
        EdgeScalars(torch.zeros(3), torch.zeros(3), torch.zeros(1), torch.ones(3))
    with pytest.raises(ValueError, match="one vector of one length"):
        EdgeScalars(*[torch.zeros(3, 1)] * 4)
    with pytest.raises(ValueError, match=r"expected \(edges, leaves\), 3 edges"):
        EdgeScalars(*[torch.zeros(3)] * 4, paths=torch.zeros(2, 3))
