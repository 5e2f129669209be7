"""Sigma schedules against diffusers, bit for bit, and against their formulas."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

import samplers


def same_bits(ours, scheduler):
    assert ours.dtype == torch.float64
    assert torch.equal(ours.to(torch.float32), scheduler.sigmas)
    assert torch.equal(
        ours, scheduler.sigmas.double()
    )  # already on the float32 grid: differences are those of diffusers


@pytest.mark.parametrize("shift", [3.0, 1.0, 5.0, 1.7])
def test_sd3_double_shift(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    for steps in range(1, 61):
        scheduler.set_timesteps(steps)
        same_bits(samplers.sd3_sigmas(steps, shift), scheduler)


@pytest.mark.parametrize("tokens", [256, 1024, 1360, 4096, 9216])
def test_flux_dynamic_shift(tokens):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    mu = calculate_shift(tokens)
    assert samplers.dynamic_mu(tokens) == mu
    for steps in range(1, 61):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        same_bits(samplers.flux_sigmas(steps, tokens), scheduler)


def test_published_values():
    assert samplers.sd3_sigmas(10)[-2].item() == pytest.approx(0.0089, abs=5e-5)
    assert samplers.sd3_sigmas(40)[-2].item() == pytest.approx(0.0089, abs=5e-5)
    assert (samplers.dynamic_mu(256), samplers.dynamic_mu(4096)) == (0.5, pytest.approx(1.15))
    assert math.exp(samplers.dynamic_mu(1024)) == pytest.approx(1.878, abs=5e-4)


def test_single_shifts():
    def f(t):
        return 3 * t / (1 + 2 * t)

    once = samplers.sd3_sigmas(5, double_shift=False)
    expected = [f(1 - i * (1 - 0.001) / 4) for i in range(5)] + [0.0]
    torch.testing.assert_close(once, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)
    linear = samplers.linear_shift_sigmas(4, 3.0)
    torch.testing.assert_close(linear, torch.tensor([1, f(0.75), f(0.5), f(0.25), 0], dtype=torch.float64))


@pytest.mark.parametrize("steps", [1, 2, 7, 28])
def test_every_schedule_falls_from_one_to_zero(steps):
    for sigmas in (
        samplers.sd3_sigmas(steps),
        samplers.sd3_sigmas(steps, double_shift=False),
        samplers.linear_shift_sigmas(steps, 3.0),
        samplers.flux_sigmas(steps, 1024),
    ):
        assert sigmas.shape == (steps + 1,) and sigmas[0] == 1 and sigmas[-1] == 0
        assert bool((sigmas.diff() < 0).all())


def test_bad_input():
    for bad in (
        samplers.sd3_sigmas,
        lambda n: samplers.flux_sigmas(n, 64),
        lambda n: samplers.linear_shift_sigmas(n, 3.0),
    ):
        with pytest.raises(ValueError, match="got 0 sampling steps; expected at least 1"):
            bad(0)
    with pytest.raises(ValueError, match="got shift 0"):
        samplers.sd3_sigmas(4, shift=0)
    with pytest.raises(ValueError, match="got 0 latent tokens"):
        samplers.flux_sigmas(4, 0)
