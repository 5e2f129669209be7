"""Diffusion models in the coordinates of a flow: formulas, the schedulers' grids, and the network's clock."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from flowrl.errors import UserError
from flowrl.policies.vp import Clock, consistency_velocity, flow_time, velocity, vp_scale
from samplers import get_kernel

LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ddim(**settings):
    return DDIMScheduler(**LEVELS, **{"steps_offset": 1, "set_alpha_to_one": False} | settings)


@given(st.floats(0.001, 0.999), st.integers(0, 99))
def test_every_prediction_of_one_state_is_the_same_velocity(abar, seed):
    g = torch.Generator().manual_seed(seed)
    x0, e = torch.randn(2, 3, 4, generator=g, dtype=torch.float64).unbind()
    signal, noise = math.sqrt(abar), math.sqrt(1 - abar)
    s = flow_time(torch.tensor(abar, dtype=torch.float64)).expand(3)
    x_vp = signal * x0 + noise * e
    x = x_vp / (signal + noise)
    assert torch.allclose(vp_scale(s)[:, None] * x, x_vp) and torch.allclose((1 - s[0]) * x0 + s[0] * e, x)
    said = {"epsilon": e, "sample": x0, "v_prediction": signal * e - noise * x0}
    for name, output in said.items():
        torch.testing.assert_close(velocity(output, x, s, name), e - x0, rtol=1e-6, atol=1e-6)


def test_consistency_function_is_the_identity_at_time_zero_and_x0_hat_far_from_it():
    g = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, 4, generator=g).unbind()
    s = torch.full((3,), 0.4)
    here = consistency_velocity(v, x, s, torch.zeros(3))
    torch.testing.assert_close(x - 0.4 * here, vp_scale(s)[0] * x)  # f = x_vp
    torch.testing.assert_close(consistency_velocity(v, x, s, torch.full((3,), 1e6)), v, rtol=1e-4, atol=1e-4)


def test_numbers_of_stable_diffusion():
    # abar of timesteps 0 and 999 of the scaled-linear table: 1 - 0.00085, and 0.004660 (published SD configs)
    clock = Clock(ddim())
    assert clock.table[0].item() == pytest.approx(
        math.sqrt(0.00085) / (math.sqrt(0.00085) + math.sqrt(1 - 0.00085)), rel=1e-4
    )
    assert 1 / (1 + math.sqrt(0.004660 / (1 - 0.004660))) == pytest.approx(clock.table[-1].item(), abs=1e-5)
    assert (clock.table.diff() > 0).all()


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_grids_are_those_of_the_scheduler(spacing, one, steps):
    scheduler = ddim(timestep_spacing=spacing, set_alpha_to_one=one)
    clock = Clock(scheduler)
    scheduler.set_timesteps(steps)
    sigmas = clock.sigmas(steps)
    expected = flow_time(scheduler.alphas_cumprod[scheduler.timesteps])
    assert torch.equal(sigmas[:-1], expected) and sigmas.dtype == torch.float64 and len(sigmas) == steps + 1
    assert (sigmas.diff() < 0).all()
    last = int(scheduler.timesteps[-1])
    assert sigmas[-1].item() == (0.0 if one or last == 0 else clock.table[0].item())
    assert torch.equal(clock.timestep(sigmas[:-1].float()), scheduler.timesteps.float())  # exact


def test_any_diffusion_scheduler_gives_the_times_of_ddim_and_others_are_refused():
    expected = Clock(ddim()).sigmas(10)
    for kind in (PNDMScheduler, EulerDiscreteScheduler, DDPMScheduler):
        scheduler = kind.from_config(ddim().config)
        assert torch.equal(Clock(scheduler).sigmas(10), expected)
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler.*table of noise levels"):
        Clock(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(UserError, match="noise alone"):
        Clock(ddim(rescale_betas_zero_snr=True))
    zero = Clock(ddim(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"))
    assert zero.sigmas(5)[0] == 1
    for steps in (1000, 1001):  # the spacing "leading" begins at 1 and would end beyond the table
        with pytest.raises(UserError, match=f"got {steps} denoising steps"):
            Clock(ddim()).sigmas(steps)
    assert len(Clock(ddim(timestep_spacing="trailing")).sigmas(61)) == 62  # 1000 - 61 * (1000 / 61) > 0 in floats


def test_lcm_times_are_its_schedulers_and_end_at_the_consistency_function():
    scheduler = LCMScheduler(**LEVELS)
    clock = Clock(scheduler)
    for steps in (1, 2, 4, 8):
        scheduler.set_timesteps(steps)
        sigmas = clock.sigmas(steps)
        assert torch.equal(sigmas[:-1], flow_time(scheduler.alphas_cumprod[scheduler.timesteps])) and sigmas[-1] == 0
    with pytest.raises(UserError, match="got 51 denoising steps"):
        clock.sigmas(51)  # of 50 times that it learned


def test_the_clock_is_exact_at_the_table_and_linear_between():
    clock = Clock(ddim())
    every = torch.arange(1000)
    assert torch.equal(clock.timestep(clock.table.float()), every.float())
    between = clock.table[:-1] + 0.25 * clock.table.diff()
    torch.testing.assert_close(clock.timestep(between.float()), every[:-1] + 0.25, rtol=0, atol=2e-3)
    assert clock.timestep(torch.tensor([0.0, clock.table[0] / 2])).tolist() == [0.0, 0.0]
    with pytest.raises(UserError, match="got time 1 for a diffusion model whose noisiest state is at 0.935958"):
        clock.timestep(torch.tensor([0.5, 1.0]))


@given(st.floats(0.01, 0.98), st.floats(0.02, 0.95), st.floats(0, 1), st.integers(0, 99))
def test_ddim_kernel_is_the_formula_of_the_paper(low, share, eta, seed):
    # arXiv 2010.02502 eq. 12 and 16 in its own variables, for an abar before (noisier) and after
    before, after = low, low + share * (0.99 - low)
    x_vp, e, noise = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x0 = (x_vp - math.sqrt(1 - before) * e) / math.sqrt(before)
    sigma = eta * math.sqrt((1 - after) / (1 - before) * (1 - before / after))
    expected = math.sqrt(after) * x0 + math.sqrt(1 - after - sigma**2) * e + sigma * noise
    s, s_next = flow_time(torch.tensor([before, after], dtype=torch.float64)).tolist()
    a, b, c = get_kernel("ddim").coefficients(s, s_next, eta)
    x = x_vp / vp_scale(s)
    v = velocity(e[None], x[None], torch.tensor([s], dtype=torch.float64), "epsilon")[0].double()
    found = (a * x + b * v + c * noise) * vp_scale(s_next)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
