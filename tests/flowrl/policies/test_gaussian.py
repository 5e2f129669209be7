"""The closed forms of the Gaussian flow against numerical integration, simulation and the code that uses them."""

import math

import pytest
import torch

from flowrl.errors import UserError
from flowrl.policies import GaussianPolicy, Policy
from flowrl.policies.gaussian import (
    LinearChain,
    gaussian_kl,
    marginal,
    quadratic_reward,
    tilted,
    velocity_coefficients,
)
from samplers import log_prob

TARGET = torch.tensor([1.0, -0.5])


def z(samples: torch.Tensor, expected: torch.Tensor | float) -> float:
    """Largest |mean - expected| in standard errors over the first axis."""
    error = samples.double().std(0) / math.sqrt(len(samples))
    return float(((samples.double().mean(0) - expected) / error).abs().max())


def density(x, mean, std):
    return torch.exp(-((x - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))


def test_velocity_is_the_conditional_mean_of_noise_minus_data():
    generator = torch.Generator().manual_seed(0)
    mean, std, n = 0.7, 0.4, 200_000
    x0 = mean + std * torch.randn(n, generator=generator, dtype=torch.float64)
    e = torch.randn(n, generator=generator, dtype=torch.float64)
    for s in (0.05, 0.4, 0.95):
        x = (1 - s) * x0 + s * e
        k, h = velocity_coefficients(s, std)
        residual = (e - x0) - (k * x + h * mean)
        # a conditional mean leaves a residual that no function of x explains
        assert z(residual, 0.0) < 4 and z(residual * x, 0.0) < 4 and z(residual * x**2, 0.0) < 4
        m, sd = marginal(s, mean, std)
        assert z(x, m) < 4 and z((x - m) ** 2, sd**2) < 4


def test_marginals_solve_the_flow_equation():
    # x0 as a function of x_1 along dx/ds = v: fourth-order Runge-Kutta against the quantile map of Gaussians
    mean, std, steps = -0.6, 0.3, 400
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    start = x.clone()
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def v(x, s):
        k, h = velocity_coefficients(s, std)
        return k * x + h * mean

    for s, s_next in zip(grid[:-1], grid[1:], strict=True):
        d = s_next - s
        k1 = v(x, s)
        k2 = v(x + d / 2 * k1, s + d / 2)
        k3 = v(x + d / 2 * k2, s + d / 2)
        k4 = v(x + d * k3, s_next)
        x = x + d / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    torch.testing.assert_close(x, mean + std * start, atol=1e-7, rtol=0)


def test_kl_and_tilt_by_numerical_integration():
    x = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
    p, q = density(x, 0.3, 0.7), density(x, -0.4, 1.1)
    expected = torch.trapezoid(p * (p.clamp_min(1e-300).log() - q.clamp_min(1e-300).log()), x)
    mean, mean_ref = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    torch.testing.assert_close(gaussian_kl(mean, 0.7, mean_ref, 1.1), expected, atol=1e-9, rtol=0)

    reference, target, curvature, beta = density(x, -0.4, 1.1), 0.9, 2.0, 0.6
    weight = reference * torch.exp(-curvature / 2 * (x - target) ** 2 / beta)
    total = torch.trapezoid(weight, x)
    best = weight / total
    m = torch.trapezoid(best * x, x)
    sd = torch.trapezoid(best * (x - m) ** 2, x).sqrt()
    mine = tilted(mean_ref[None], 1.1, torch.tensor([target], dtype=torch.float64), curvature, beta)
    assert mine[0].item() == pytest.approx(m.item(), abs=1e-9) and mine[1] == pytest.approx(sd.item(), abs=1e-9)
    assert mine[2].item() == pytest.approx(beta * total.log().item(), abs=1e-9)
    # and it is a maximum of E[r] - beta KL with that value
    reward = -curvature / 2 * ((mine[0] - target) ** 2 + mine[1] ** 2)
    value = reward - beta * gaussian_kl(mine[0], mine[1], mean_ref, 1.1)
    torch.testing.assert_close(value.sum(), mine[2], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("kernel", "level"), [("ode", 0.0), ("flow", 0.7), ("dance", 0.4), ("cps", 0.6)])
def test_moments_of_every_state_by_simulation(kernel, level):
    policy = GaussianPolicy(dim=2, std=0.5)
    chain = LinearChain.make(policy.sigmas(5), 0.5, kernel, level)
    n, generator = 40_000, torch.Generator().manual_seed(1)
    cond = policy.encode(["mean 0.8 -1.5"])[torch.zeros(n, dtype=torch.long)]
    means, stds = chain.moments(torch.tensor([0.8, -1.5]))
    x = torch.randn(n, 2, 1, 1, generator=generator)
    with torch.no_grad():
        for i in range(5):
            v = policy.predict(x, chain.sigmas[i].float().expand(n), cond)
            noise = torch.randn(x.shape, generator=generator)
            x = chain.a[i].float() * x + chain.b[i].float() * v + chain.c[i].float() * noise
            assert z(x.flatten(1), means[i + 1]) < 4.5
            assert z((x.flatten(1) - means[i + 1]) ** 2, stds[i + 1] ** 2) < 4.5


def test_gain_and_path_kl_against_the_policy_itself():
    policy = GaussianPolicy(dim=2, std=0.5)
    chain = LinearChain.make(policy.sigmas(6), 0.5, "flow", 0.7)
    shift = torch.tensor([0.3, -0.2])
    m = torch.tensor([0.4, 1.0], dtype=torch.float64)
    torch.testing.assert_close(chain.moments(m)[0][-1], chain.gain() * m, atol=1e-12, rtol=0)
    parts = [chain.gain([i]) for i in range(6)]
    assert sum(parts) == pytest.approx(chain.gain(), abs=1e-12)
    with torch.no_grad():
        policy.bias.copy_(shift)
    cond = policy.encode(["0.4 1.0"])
    x = torch.randn(1, 2, 1, 1, generator=torch.Generator().manual_seed(3))
    total = {"exact": 0.0, "published": 0.0}
    with torch.no_grad():
        for i in range(5):
            s = chain.sigmas[i].float().expand(1)
            v = policy.predict(x, s, cond)
            with policy.weights("reference"):
                v_ref = policy.predict(x, s, cond)
            kl = (chain.b[i] ** 2 * (v - v_ref).square().sum() / (2 * chain.c[i] ** 2)).item()
            total["exact"] += kl
            total["published"] += kl * (chain.sigmas[i] - chain.sigmas[i + 1]).item()
    for form, value in total.items():
        assert chain.kl_curvature(range(5), form) * shift.square().sum().item() / 2 == pytest.approx(value, rel=1e-5)


def gradients(policy, chain, trained, group_size, kl_weight, batches, seed, sign=1.0):
    """Per batch: gradient of the ascent objective A log p - kl_weight KL, by autograd through the policy."""
    generator = torch.Generator().manual_seed(seed)
    prompts = ["0.5 -1", "-1 0.3", "0 0.8", "1.5 1"]
    cond = policy.encode(prompts)[torch.arange(4).repeat_interleave(8 * group_size)]
    n, rows = len(cond), []
    for _ in range(batches):
        x, terms = torch.randn(n, 2, 1, 1, generator=generator), []
        for i in range(len(chain.a)):
            a, b, c = (value[i].float() for value in (chain.a, chain.b, chain.c))
            s = chain.sigmas[i].float().expand(n)
            v = policy.predict(x, s, cond)
            mean = a * x + b * v
            x_next = (mean + c * torch.randn(x.shape, generator=generator)).detach()
            if i in trained:
                with torch.no_grad(), policy.weights("reference"):
                    v_ref = policy.predict(x, s, cond)
                kl = b**2 * (v - v_ref).square().sum((1, 2, 3)) / (2 * c**2)
                terms.append((log_prob(x_next, mean, c.expand(n), reduction="sum"), kl))
            x = x_next
        reward = sign * quadratic_reward(x.flatten(1), TARGET, 1.0).view(-1, group_size)
        advantage = (reward - reward.mean(1, keepdim=True)).flatten()
        loss = sum((advantage * lp - kl_weight * kl).mean() for lp, kl in terms)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [p for _, p in policy.trainable()])]))
    return torch.stack(rows)


@pytest.mark.parametrize("group_size", [2, 8])
def test_the_optimum_is_where_the_policy_gradient_vanishes(group_size):
    policy = GaussianPolicy(dim=2, std=0.5)
    chain = LinearChain.make(policy.sigmas(5), 0.5, "flow", 0.7)
    trained = [0, 1, 2]  # one step moves the sample without being trained, one has no noise
    optimum = chain.optimum(TARGET, 1.0, 0.2, trained, group_size)
    with torch.no_grad():
        policy.weight.copy_(optimum.weight * torch.eye(2))
        policy.bias.copy_(optimum.bias)
    assert z(gradients(policy, chain, trained, group_size, 0.2, 60, 7), 0.0) < 4.5
    # not for want of power: at the start, and with the factor 1 - 1/K left out, it does not vanish
    wrong = (
        chain.optimum(TARGET, 1.0, 0.2, trained) if group_size == 2 else chain.optimum(TARGET, 1.0, 0.2, [0, 1, 2, 3])
    )
    with torch.no_grad():
        policy.weight.copy_(wrong.weight * torch.eye(2))
        policy.bias.copy_(wrong.bias)
    assert z(gradients(policy, chain, trained, group_size, 0.2, 60, 8), 0.0) > 6


def test_gradient_ascent_arrives_there_and_a_flipped_reward_leads_away():
    chain = LinearChain.make(GaussianPolicy().sigmas(5), 0.5, "flow", 0.7)
    trained = [0, 1, 2, 3]
    optimum = chain.optimum(TARGET, 1.0, 0.3, trained, 8)
    ends = {}
    for sign in (1.0, -1.0):
        policy = GaussianPolicy()
        for update in range(60):
            step = 0.3 / (1 + update / 10)
            grad = gradients(policy, chain, trained, 8, 0.3, 1, update, sign)[0]
            with torch.no_grad():
                policy.weight.add_(step * grad[:4].view(2, 2))
                policy.bias.add_(step * grad[4:])
        ends[sign] = torch.cat([policy.weight.detach().flatten(), policy.bias.detach()]).double()
    expected = torch.cat([optimum.weight * torch.eye(2, dtype=torch.float64).flatten(), optimum.bias])
    torch.testing.assert_close(ends[1.0], expected, atol=0.05, rtol=0)
    assert torch.dot(ends[-1.0], expected) < 0


def test_policy_protocol_and_images():
    policy = GaussianPolicy(dim=3)
    assert isinstance(policy, Policy)
    assert policy.latent_shape(512, 512) == (3, 1, 1) and policy.sigmas(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    x = torch.tensor([[-7.99, 0.0, 3.3], [0.123456, -0.5, 9.0]]).view(2, 3, 1, 1)
    images = policy.decode(x)
    assert images.shape == (2, 3, 1, 3) and 0 <= images.min() and images.max() <= 1
    on_grid = (255 * images.clamp(0, 1)).round() / 255  # what scoring does to every image
    expected = x.flatten(1).clamp(-8, 8)
    torch.testing.assert_close(policy.read(on_grid), expected, atol=2e-6, rtol=0)
    x.requires_grad_(True)
    policy.read(policy.decode(x)).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_prompts_are_means():
    policy = GaussianPolicy()
    cond = policy.encode(["mean 0.5 -1", "-.25,3e-1"])
    torch.testing.assert_close(cond.rows["mean"], torch.tensor([[0.5, -1.0], [-0.25, 0.3]]))
    with pytest.raises(UserError, match="'a cat' with 0 numbers; expected 2"):
        policy.encode(["a cat"])


def test_guidance_mixes_conditional_and_free_velocity():
    policy = GaussianPolicy()
    with torch.no_grad():
        policy.bias.copy_(torch.tensor([0.2, 0.1]))
    x, s = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.5, 0.1])
    cond, free = policy.encode(["1 2", "0 1", "-1 0"]), policy.encode(["0 0"] * 3)
    with torch.no_grad():
        v_cond, v_free = policy.predict(x, s, cond), policy.predict(x, s, free)
        torch.testing.assert_close(policy.predict(x, s, cond, 3.0), v_free + 3.0 * (v_cond - v_free))


def test_weight_sets():
    policy = GaussianPolicy()
    with torch.no_grad():
        policy.bias.fill_(1.0)
    policy.copy_weights("current", "ema", decay=0.5)
    fresh = GaussianPolicy()
    fresh.load_named_states({key: value.clone() for key, value in policy.named_states().items()})
    with fresh.weights("ema"):
        assert fresh.bias.tolist() == [1, 1]
    with fresh.weights("reference"):
        assert fresh.bias.tolist() == [0, 0]
