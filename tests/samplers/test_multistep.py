"""DPM-Solver++ 2M segments: against diffusers, against the order of a linear ODE, and what the engine remembers."""

import math
import weakref

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

import samplers
from samplers import Key, rollout
from samplers.plans import PlanBuilder, sliding_tree, straight
from samplers.recipes import coarse_tail

SHAPE = (2, 3, 4)


def keys(n):
    return [Key(1, "multistep", 0, 0, 0, root) for root in range(n)]


def velocity(x, s, index=None):
    """Any smooth field, elementwise, so that its bits do not depend on the batch."""
    return torch.tanh(1.3 * x) * s.view(-1, 1, 1, 1) + 0.3 * torch.sin(x + 2 * x.flip(-1)) - 0.1


def sample(plan, n=3, **kwargs):
    return rollout(velocity, plan, keys(n), latent_shape=SHAPE, **kwargs)


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_is_the_diffusers_scheduler(steps):
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    x = samplers.noise(keys(3), SHAPE)
    theirs = x
    for s, t in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        theirs = scheduler.step(velocity(theirs, s.expand(3)), t, theirs).prev_sample
    ours = sample(straight(scheduler.sigmas.double(), "ode2", 0.0), x_init=x).leaves[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6)


@pytest.mark.parametrize(("solver", "order"), [("ode", 1), ("ode2", 2)])
def test_order_of_convergence(solver, order):
    """Data N(0, 0.5^2): the ODE through x from s to u ends at x std_u / std_s. Halving the step divides the error by
    2 or 4."""

    def std(s):
        return math.sqrt(0.25 * (1 - s) ** 2 + s**2)

    def linear(x, s, index):
        return ((s - (1 - s) * 0.25) / (0.25 * (1 - s) ** 2 + s**2)).view(-1, 1, 1, 1) * x

    errors = []
    for steps in (16, 32, 64):
        plan = straight(torch.linspace(0.9, 0.1, steps + 1).double(), solver, 0.0)
        out = rollout(linear, plan, keys(1), latent_shape=SHAPE, x_init=torch.ones(1, *SHAPE))
        errors.append(abs(float(out.leaves[0, 0, 0, 0, 0]) - std(0.1) / std(0.9)))
    assert errors[2] < errors[1] < errors[0]
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.2)


def test_a_segment_begins_with_first_order():
    """After noise and after Euler steps there is no history, by definition; then there is."""
    builder, node = PlanBuilder(0.95), 0
    for s, kernel, level in [
        (0.9, "flow", 0.7), (0.8, "ode2", 0), (0.7, "ode2", 0), (0.6, "cps", 0.5), (0.5, "ode2", 0), (0.4, "ode", 0),
        (0.3, "ode2", 0), (0.2, "ode2", 0), (0.1, "ode2", 0), (0.0, "ode2", 0),
    ]:  # fmt: skip
        node = builder.add(node, s, kernel, level)
    plan = builder.build()
    assert [i for i in range(len(plan)) if plan.memory[i] != 0] == [3, 8, 9]  # not 10: to s = 0 is of first order
    assert plan.remembered == {1, 6, 7}
    assert straight([1.0, 0.8, 0.6, 0.4], "ode2", 0.0).memory[:3] == (0, 0, 0)  # the prediction at s = 1 weighs nothing


def by_hand(plan, leaf, key):
    """One leaf of a tree in float64, step by step, from the definitions alone."""
    x, x0_before = samplers.noise([key], SHAPE).double(), None
    branch = plan.branch(leaf)
    for i in range(1, len(branch)):
        s, s_next = branch.s[i], branch.s_next[i]
        v = velocity(x, torch.tensor([s], dtype=torch.float64))
        x0 = x - s * v
        if branch.kernel[i] == "ode2":
            first = s_next == 0 or branch.kernel[i - 1] != "ode2" or branch.s[i - 1] == 1
            if first:
                x = x - (s - s_next) * v
            else:
                lam = [math.log((1 - t) / t) for t in (branch.s[i - 1], s, s_next)]
                r = (lam[1] - lam[0]) / (lam[2] - lam[1])
                data = x0 + (x0 - x0_before) / (2 * r)
                x = s_next / s * x - (1 - s_next) * math.expm1(lam[1] - lam[2]) * data
        else:
            a, b, c = samplers.get_kernel(branch.kernel[i]).coefficients(s, s_next, branch.level[i])
            draw = samplers.noise([key._replace(path=branch.paths[i], step=i - 1)], SHAPE)
            x = a * x + b * v + c * draw
        x0_before = x0
    return x


def mixed_siblings():
    """Below one node: noise, and two second-order ways on different grids, one of them beside a first-order step."""
    builder = PlanBuilder(1.0)
    node = builder.add(builder.add(0, 0.9, "ode2"), 0.8, "ode2")
    for path, kernel in (([0.6, 0.4, 0.0], "ode2"), ([0.5, 0.3, 0.0], "ode2"), ([0.7, 0.35, 0.0], "ode")):
        end = node
        for s in path:
            end = builder.add(end, s, kernel)
    noisy = builder.add(node, 0.6, "precise", 1.0, trained=True)
    for _ in range(2):
        end = builder.add(noisy, 0.4, "precise", 1.0, trained=True)
        for s in (0.3, 0.2, 0.0):
            end = builder.add(end, s, "ode2")
    return builder.build()


PLANS = {
    "all": straight(samplers.sd3_sigmas(7), "ode2", 0.0),
    "around a window": sliding_tree(samplers.linear_shift_sigmas(9, 3.0), (3, 5), solver="ode2"),
    "after a window": coarse_tail(sliding_tree(samplers.linear_shift_sigmas(12, 3.0), (1, 3)), 0.5),
    "siblings": mixed_siblings(),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_leaf_is_its_definition(plan):
    assert any(plan.memory)
    out = sample(plan)
    for root, key in enumerate(keys(3)):
        for at, leaf in enumerate(plan.leaves):
            expected = by_hand(plan, leaf, key)[0].float()
            torch.testing.assert_close(out.leaves[root, at], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_bits(plan):
    """A leaf alone, and other chunks, give the same bits; the training steps replay exactly."""
    out = sample(plan)
    assert torch.equal(sample(plan, chunk=2).leaves, out.leaves)
    for at, leaf in enumerate(plan.leaves):
        assert torch.equal(sample(plan.branch(leaf)).leaves[:, 0], out.leaves[:, at])
    assert out.cost == plan.cost() * 3
    for call in out.replay_chunks():
        edges, _, log_prob = out.log_prob(velocity(call.x, call.s)[call.rows], call.states)
        assert torch.equal(log_prob, out.edges.log_prob[edges])


def test_second_order_is_nearer_to_the_end():
    """What a coarse tail is for: at 8 steps, much nearer to the exact end than Euler."""
    start = samplers.noise(keys(3), SHAPE) * 0.5

    def end(solver, steps):
        return sample(straight(torch.linspace(0.8, 0, steps + 1).double(), solver, 0.0), x_init=start).leaves

    exact = end("ode2", 200)
    assert (end("ode2", 8) - exact).norm() < 0.3 * (end("ode", 8) - exact).norm()


def test_history_is_kept_for_one_step_only():
    seen = []

    def watching(x, s, index):
        alive = sum(ref() is not None for ref in seen)
        assert alive <= 1  # the latents of the frontier before: x0_hat is a tensor of its own
        seen.append(weakref.ref(x._base))
        return velocity(x, s)

    rollout(watching, PLANS["all"], keys(2), latent_shape=SHAPE)
    assert len(seen) == 7
