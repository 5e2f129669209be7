"""Log-probs and KL against torch.distributions, and their bits against batch size and threads."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import samplers
from samplers import Density

N, SHAPE = 5, (3, 4, 6)


def example(seed=0):
    g = torch.Generator().manual_seed(seed)
    x_next, mean = (torch.randn(N, *SHAPE, generator=g, dtype=torch.float64) for _ in range(2))
    return x_next, mean, torch.rand(N, generator=g, dtype=torch.float64) + 0.1


def spread(c):
    return c.view(-1, 1, 1, 1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gaussian_is_the_normal_density(reduction):
    x_next, mean, c = example()
    reference = getattr(Normal(mean, spread(c)).log_prob(x_next).flatten(1), reduction)(1)
    ours = samplers.log_prob(x_next.float(), mean.float(), c, reduction)
    assert ours.dtype == torch.float32 and ours.shape == (N,)
    torch.testing.assert_close(ours, reference.float(), rtol=1e-5, atol=1e-5)


def test_unscaled_is_minus_the_squared_error():
    x_next, mean, c = example()
    reference = -((x_next - mean) ** 2)
    torch.testing.assert_close(samplers.log_prob(x_next, mean, c, density="unscaled"), reference.mean((1, 2, 3)))
    torch.testing.assert_close(samplers.log_prob(x_next, mean, c, "sum", "unscaled"), reference.sum((1, 2, 3)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_is_that_of_two_normals(reduction):
    v, v_ref, c = example()
    b, d = -0.3 * c, 0.07
    exact = kl_divergence(Normal(spread(b) * v, spread(c)), Normal(spread(b) * v_ref, spread(c))).flatten(1)
    exact = getattr(exact, reduction)(1)
    torch.testing.assert_close(samplers.kl(v, v_ref, b, c, reduction=reduction), exact)
    published = samplers.kl(v, v_ref, b, c, d, form="published", reduction=reduction)
    torch.testing.assert_close(published, d * exact)


def test_published_flow_grpo_kl():
    """flow_grpo divides by 2 q^2 with q = level sqrt(s / (1 - s)), which does not contain sqrt(d)."""
    s, s_next, level = 0.6, 0.45, 0.7
    v, v_ref, _ = example()
    _, b, c = samplers.get_kernel("flow").coefficients(s, s_next, level)
    q = level * math.sqrt(s / (1 - s))
    reference = ((b * (v - v_ref)) ** 2).mean((1, 2, 3)) / (2 * q * q)
    torch.testing.assert_close(samplers.kl(v, v_ref, b, c, s - s_next, form="published"), reference)
    # and the exact one is the closed form d/2 (q (1 - s) / (2 s) + 1 / q)^2 <(v - v_ref)^2>
    closed = (s - s_next) / 2 * (q * (1 - s) / (2 * s) + 1 / q) ** 2 * ((v - v_ref) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(samplers.kl(v, v_ref, b, c), closed)


def test_gradient_is_that_of_the_normal_density():
    x_next, mean, c = example()
    mean.requires_grad_()
    (ours,) = torch.autograd.grad(samplers.log_prob(x_next, mean, c).sum(), mean)
    expected = (x_next - mean) / spread(c) ** 2 / math.prod(SHAPE)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 3, 3), (12, 8, 8), (16, 64, 64), (1, 1, 7), (2, 1, 1)])
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_of_a_row_do_not_depend_on_the_batch(shape, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x_next, mean = torch.randn(2, 9, *shape)
        c = torch.rand(9, dtype=torch.float64) + 0.1
        whole = samplers.log_prob(x_next, mean, c)
        for rows in ([0], [3], [8, 2], [1, 0, 7, 6, 5], [4] * 8):
            assert torch.equal(samplers.log_prob(x_next[rows], mean[rows], c[rows]), whole[rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("c", [0.0, torch.tensor([0.1, 0.0]), -1.0, math.nan])
def test_no_noise_no_policy(c):
    x = torch.zeros(2, 1, 2, 2)
    for call in (lambda: samplers.log_prob(x, x, c), lambda: samplers.kl(x, x, -0.1, c)):
        with pytest.raises(ValueError, match="expected c > 0"):
            call()


def test_density_is_an_identity():
    cps = Density("cps", "mean", "unscaled")
    assert cps == Density("cps", "mean", "unscaled")
    assert cps not in (Density("flow", "mean", "unscaled"), Density("cps", "sum", "unscaled"), Density("cps"))
    x_next, mean, c = example()
    assert torch.equal(cps.log_prob(x_next, mean, c), samplers.log_prob(x_next, mean, c, "mean", "unscaled"))


def test_unknown_names():
    x = torch.zeros(1, 1, 1, 1)
    for bad in (
        lambda: samplers.log_prob(x, x, 1.0, reduction="avg"),
        lambda: samplers.log_prob(x, x, 1.0, density="laplace"),
        lambda: samplers.kl(x, x, 1.0, 1.0, form="approximate"),
        lambda: Density("flow", "median"),
        lambda: Density("ode"),
        lambda: Density("nothing"),
    ):
        with pytest.raises(ValueError, match="got '.*expected|got kernel 'nothing'"):
            bad()
    with pytest.raises(ValueError, match="got no d"):
        samplers.kl(x, x, 1.0, 1.0, form="published")
