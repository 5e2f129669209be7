"""Step kernels against published tables, other libraries and their own algebra."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import samplers
from samplers.kernels import SOLVERS, second_order

SD3 = [1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0]
# std of every step on that schedule, as published (four digits)
STD = {
    ("flow", 0.7): [0.7000, 0.7430, 0.5362, 0.4459, 0.3918, 0.3528, 0.3191, 0.2820, 0.2254, 0.0063],
    ("cps", 0.8): [0.9131, 0.8686, 0.8157, 0.7517, 0.6727, 0.5727, 0.4421, 0.2644, 0.0085, 0.0],
    ("precise", 1.5): [0.9601, 0.8392, 0.7256, 0.6382, 0.5625, 0.4858, 0.3926, 0.2548, 0.0089, 0.0],
}
NOISY = [name for name in samplers.kernel_names() if name not in SOLVERS]
SCHEDULES = {
    "sd3": samplers.sd3_sigmas(10),
    "sd3-40": samplers.sd3_sigmas(40),
    "linear": samplers.linear_shift_sigmas(16, 3.0),
    "flux": samplers.flux_sigmas(6, 1024),
}
times = st.tuples(st.floats(0.01, 1.0), st.floats(0.0, 0.99)).map(lambda p: (p[0], p[0] * p[1]))


@pytest.mark.parametrize(("kernel", "level"), STD)
def test_std_table_sd3(kernel, level):
    sigmas = SCHEDULES["sd3"]
    assert [round(s, 4) for s in sigmas.tolist()] == SD3
    c = samplers.get_kernel(kernel).coefficients(sigmas[:-1], sigmas[1:], level).c
    assert [round(value, 4) for value in c.tolist()] == STD[kernel, level]


def test_std_table_flux():
    sigmas = SCHEDULES["flux"]
    assert [round(s, 4) for s in sigmas.tolist()] == [1.0, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0.0]
    c = samplers.get_kernel("flow").coefficients(sigmas[:-1], sigmas[1:], 0.9).c
    assert [round(value, 4) for value in c[:5].tolist()] == [0.9000, 0.9312, 0.6460, 0.5059, 0.4008]
    assert c[5].item() == pytest.approx(0.2882, abs=1e-4)


def published_mean(kernel, x, v, s, s_next, h, s_max):
    """The step means as their papers write them, in plain numbers."""
    d, x0, e = s - s_next, x - s * v, x + (1 - s) * v
    if kernel == "flow":
        q = h * math.sqrt(s / (1 - (s_max if s == 1 else s)))
        return x * (1 - q**2 * d / (2 * s)) - v * (1 + q**2 * (1 - s) / (2 * s)) * d
    if kernel == "dance":
        score = -(x - (1 - s) * x0) / s**2
        return x - d * v + 0.5 * h**2 * d * score
    c = {
        "cps": lambda: s_next * math.sin(h * math.pi / 2),
        "precise": lambda: s_next * math.sqrt(1 - (s_next * (1 - s) / (s * (1 - s_next))) ** (h * h)),
        "dance_precise": lambda: s_next * math.sqrt(1 - math.exp(-0.5 * h**2 * (1 / s_next - 1 / s)) ** 2),
    }[kernel]()
    return (1 - s_next) * x0 + math.sqrt(max(s_next**2 - c**2, 0)) * e


@pytest.mark.parametrize("kernel", ["flow", "dance", "cps", "precise", "dance_precise"])
def test_mean_is_the_published_formula(kernel):
    x, v, h = 0.37, -1.21, samplers.get_kernel(kernel).default_level
    for sigmas in SCHEDULES.values():
        grid = sigmas.tolist()
        last = len(grid) - 1 - (kernel == "dance_precise")  # the paper's 1 / s_next has no value at 0
        for s, s_next in zip(grid[:last], grid[1 : last + 1], strict=True):
            a, b, _ = samplers.get_kernel(kernel).coefficients(s, s_next)
            assert float(a * x + b * v) == pytest.approx(published_mean(kernel, x, v, s, s_next, h, grid[1]), abs=1e-12)


@pytest.mark.parametrize("kernel", samplers.kernel_names())
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_level_zero_is_the_ode_step_bit_for_bit(kernel, schedule):
    sigmas = SCHEDULES[schedule]
    s, s_next = sigmas[:-1], sigmas[1:]
    a, b, c = samplers.get_kernel(kernel).coefficients(s, s_next, 0.0)
    assert torch.equal(a, torch.ones_like(s)) and torch.equal(b, s_next - s) and not c.any()
    x, v = torch.randn(len(s), 4, 5), torch.randn(len(s), 4, 5)
    d = (s - s_next).to(torch.float32).view(-1, 1, 1)
    assert torch.equal(samplers.affine(x, v, a, b), x - d * v)


@given(times, st.sampled_from(NOISY))
def test_level_zero_anywhere(pair, kernel):
    s, s_next = pair
    a, b, c = samplers.get_kernel(kernel).coefficients(s, s_next, 0.0)
    assert (a.item(), b.item(), c.item()) == (1.0, s_next - s, 0.0)


def test_ode_step_is_the_diffusers_scheduler_step():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    sigmas = samplers.sd3_sigmas(10)
    x = torch.randn(2, 4, 8, 8)
    for i, t in enumerate(scheduler.timesteps):
        v = torch.randn_like(x)
        a, b, _ = samplers.get_kernel("ode").coefficients(sigmas[i], sigmas[i + 1], 0.0)
        ours = samplers.affine(x, v, a, b)
        x = scheduler.step(v, t, x).prev_sample
        assert torch.equal(ours, x)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_the_diffusers_scheduler_step(eta):
    """A DDIM step in variance-preserving coordinates, converted at both ends, is ours."""
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps[:-1]:
        abar, abar_next = (scheduler.alphas_cumprod[i].double() for i in (t, t - 1000 // 20))
        k, k_next = (m.sqrt() + (1 - m).sqrt() for m in (abar, abar_next))
        s, s_next = (1 - abar).sqrt() / k, (1 - abar_next).sqrt() / k_next
        x_vp, e_hat, z = (torch.randn(1, 2, 3, 3, dtype=torch.float64) for _ in range(3))
        theirs = scheduler.step(e_hat, int(t), x_vp, eta=eta, variance_noise=z).prev_sample / k_next
        x = x_vp / k
        x0 = (x_vp - (1 - abar).sqrt() * e_hat) / abar.sqrt()
        a, b, c = samplers.get_kernel("ddim").coefficients(s, s_next, eta)
        torch.testing.assert_close(a * x + b * (e_hat - x0) + c * z, theirs, rtol=1e-5, atol=1e-5)


@given(times)
def test_named_coincidences(pair):
    """DDIM eta = 1 is Precise at sqrt 2; LCM re-noising is CPS at level 1."""
    get = samplers.get_kernel
    for one, other in (
        (get("ddim").coefficients(*pair, 1.0), get("precise").coefficients(*pair, math.sqrt(2))),
        (get("consistency").coefficients(*pair, 1.0), get("cps").coefficients(*pair, 1.0)),
    ):
        torch.testing.assert_close(torch.stack(one), torch.stack(other), rtol=0, atol=1e-7)


@given(times)
def test_lcm_mean_is_the_shrunk_prediction(pair):
    s, s_next = pair
    a, b, c = samplers.get_kernel("consistency").coefficients(s, s_next)
    x, v = 0.3, -0.8
    assert float(a * x + b * v) == pytest.approx((1 - s_next) * (x - s * v), abs=1e-12) and c.item() == s_next


@settings(deadline=None)
@given(st.tuples(*[st.floats(0.02, 0.99)] * 3).map(sorted), st.sampled_from(["precise", "dance_precise", "ddim"]))
def test_integrated_noise_does_not_depend_on_the_grid(three, kernel):
    """rho = sqrt(1 - c^2 / s_next^2) is the correlation of a step's noise with the last one's: two steps multiply."""
    low, mid, high = three
    if high - mid < 1e-3 or mid - low < 1e-3:
        return

    def rho(s, s_next):
        return math.sqrt(max(0.0, 1 - (samplers.get_kernel(kernel).coefficients(s, s_next).c.item() / s_next) ** 2))

    assert rho(high, mid) * rho(mid, low) == pytest.approx(rho(high, low), abs=1e-7)


# std of a step at the two ends of the schedule, d = s - s_next, as the kernels' table states
AT_START = {
    "flow": lambda u, h: h,
    "dance": lambda u, h: h * math.sqrt(1 - u),
    "cps": lambda u, h: u * math.sin(h * math.pi / 2),
    "precise": lambda u, h: u if h > 0 else 0.0,
    "dance_precise": lambda u, h: u * math.sqrt(1 - math.exp(-h * h * (1 - u) / u)),
    "ddim": lambda u, h: h * u,
    "consistency": lambda u, h: h * u,
}
AT_END = {"flow": lambda s, h: h * s / math.sqrt(1 - s), "dance": lambda s, h: h * math.sqrt(s)}


@given(st.floats(0.01, 0.99), st.floats(0.1, 1.0))
@pytest.mark.parametrize("kernel", NOISY)
def test_ends_of_the_schedule(kernel, time, level):
    get = samplers.get_kernel(kernel).coefficients
    assert get(1.0, time, level).c.item() == pytest.approx(AT_START[kernel](time, level), abs=1e-12)
    assert get(1.0, time, 0.0).c.item() == 0
    a, b, c = (float(t) for t in get(time, 0.0, level))
    assert c == pytest.approx(AT_END[kernel](time, level) if kernel in AT_END else 0.0, abs=1e-12)
    if kernel not in AT_END:  # the step is x0_hat
        assert (a, b) == (1.0, -time)
    assert all(math.isfinite(float(t)) for t in get(1.0, 0.0, level))


@pytest.mark.parametrize("kernel", samplers.kernel_names())
def test_densities(kernel):
    """What a step without noise has none of."""
    assert samplers.get_kernel(kernel).densities == (() if kernel in SOLVERS else ("gaussian", "unscaled"))


@given(st.tuples(*[st.floats(0.02, 0.98)] * 3).map(sorted))
def test_second_order_weight(three):
    """k = d / s / (2 r0) with r0 = h_prev / h, as in the published update of DPM-Solver++ 2M."""
    s_next, s, s_prev = three
    if s - s_next < 1e-3 or s_prev - s < 1e-3:
        return
    lam = [math.log((1 - t) / t) for t in (s_prev, s, s_next)]
    h_prev, h = lam[1] - lam[0], lam[2] - lam[1]
    alpha = 1 - s_next
    published = -alpha * math.expm1(-h) * 0.5 / (h_prev / h)  # times (D0 - D1)
    assert float(second_order(s_prev, s, s_next)) == pytest.approx(published, rel=1e-9)
    assert float(second_order(1.0, s, s_next)) == float(second_order(s_prev, s, 0.0)) == 0
    for bad in ((s, s_prev, s_next), (s_prev, s_next, s), (1.1, s, s_next), (s_prev, s, -0.1)):
        with pytest.raises(ValueError, match="expected 1 >= s_prev > s > s_next >= 0"):
            second_order(*bad)


def test_dance_precise_is_dance_on_a_fine_grid():
    fine = samplers.get_kernel("dance_precise").coefficients(0.5, 0.5 - 1e-6, 0.3).c.item()
    assert fine == pytest.approx(0.3 * math.sqrt(1e-6), rel=1e-4)


def final_std(sigmas, kernel, level, data_std):
    """Exact std of the final latent when x0 ~ N(0, data_std^2) and the model is optimal (v linear in x)."""
    s, variance = sigmas[:-1], 1.0
    slope = (s - (1 - s) * data_std**2) / ((1 - s) ** 2 * data_std**2 + s**2)  # v = slope x
    a, b, c = samplers.get_kernel(kernel).coefficients(s, sigmas[1:], level)
    for factor, noise in zip((a + b * slope).tolist(), c.tolist(), strict=True):
        variance = factor**2 * variance + noise**2
    return math.sqrt(variance)


COLUMNS = [("ode", 0.0), ("flow", 0.7), ("flow", 0.9), ("dance", 0.3), ("cps", 0.8), ("precise", 1.5)]
FINAL_STD = {
    "sd3": [0.015, 0.238, 0.335, 0.133, 0.012, 0.011],
    "sd3-40": [0.030, 0.057, 0.070, 0.072, 0.025, 0.024],
    "linear": [0.012, 0.135, 0.189, 0.127, 0.012, 0.012],
    "flux": [0.007, 0.252, 0.364, 0.162, 0.007, 0.007],
}


@pytest.mark.parametrize("schedule", FINAL_STD)
@pytest.mark.parametrize("column", range(6))
def test_final_std_of_near_delta_data(schedule, column):
    std = final_std(SCHEDULES[schedule], *COLUMNS[column], 0.05)
    assert std == pytest.approx(FINAL_STD[schedule][column], abs=0.00051)


@pytest.mark.parametrize(
    ("kernel", "level", "expected"), [("ode", 0, 0.955), ("precise", 1.5, 0.900), ("cps", 0.8, 0.763)]
)
def test_final_std_of_unit_data(kernel, level, expected):
    assert final_std(SCHEDULES["sd3-40"], kernel, level, 1.0) == pytest.approx(expected, abs=0.00051)


STEPS = (160, 640, 2560)
# weak order of the final std in 1 / steps. flow's first step has std h however short it is: its error is forgotten as
# steps^(-h^2) only. dance_precise forgets all near s = 0.
ORDERS = {"ode": 1.0, "dance": 1.0, "precise": 1.0, "ddim": 1.0}


@pytest.mark.parametrize("data_std", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("kernel", [name for name in samplers.kernel_names() if name != "ode2"])
def test_limit_of_many_steps(kernel, data_std):
    """All kernels reach the data's true std as steps are added, but those whose noise per step does not shrink."""
    level = samplers.get_kernel(kernel).default_level
    errors = [final_std(samplers.linear_shift_sigmas(n, 3.0), kernel, level, data_std) - data_std for n in STEPS]
    if kernel in ("cps", "consistency"):
        assert errors[-1] < -0.09 * data_std and abs(errors[-1]) > 0.85 * abs(errors[-2])
        return
    assert abs(errors[-1]) < 0.004
    if kernel in ORDERS and data_std > 0.1:
        assert math.log(errors[-2] / errors[-1], 4) == pytest.approx(ORDERS[kernel], abs=0.06)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_consistency_function_is_exact_for_any_number_of_steps(steps):
    """With x0_hat the end of the ODE through x (here x data_std / std_s), re-noising keeps every marginal."""
    data_std, variance = 0.5, 1.0
    grid = samplers.linear_shift_sigmas(steps, 3.0).tolist()
    for s, s_next in zip(grid[:-1], grid[1:], strict=True):
        slope = (1 - data_std / math.sqrt((1 - s) ** 2 * data_std**2 + s**2)) / s  # v = (x - x0_hat) / s
        a, b, c = (float(t) for t in samplers.get_kernel("consistency").coefficients(s, s_next))
        variance = (a + b * slope) ** 2 * variance + c**2
        assert variance == pytest.approx((1 - s_next) ** 2 * data_std**2 + s_next**2)


@pytest.mark.parametrize("level", [-0.1, 1.1, math.nan, math.inf])
@pytest.mark.parametrize("kernel", ["cps", "ddim", "consistency"])
def test_bounded_kernels_refuse_levels_outside(kernel, level):
    with pytest.raises(ValueError, match=f"kernel '{kernel}' got noise level .* expected .*0.0, 1.0"):
        samplers.get_kernel(kernel).coefficients(0.5, 0.4, level)


def test_bad_input():
    flow = samplers.get_kernel("flow")
    with pytest.raises(ValueError, match="got kernel 'flwo'; expected one of ode, ode2, flow"):
        samplers.get_kernel("flwo")
    with pytest.raises(ValueError, match="level -0.1"):
        flow.coefficients(0.5, 0.4, -0.1)
    for s, s_next in ((0.4, 0.5), (0.5, 0.5), (1.5, 0.5), (0.5, -0.1), (math.nan, 0.1)):
        with pytest.raises(ValueError, match="expected 1 >= s > s_next >= 0"):
            flow.coefficients(s, s_next)
    with pytest.raises(ValueError, match="kernel 'ode' got noise level 0.7"):
        samplers.get_kernel("ode").coefficients(0.5, 0.4, 0.7)


def test_coefficients_broadcast_in_float64():
    a, b, c = samplers.get_kernel("flow").coefficients(
        torch.tensor([0.9, 0.8]), 0.5, torch.tensor([[0.1], [0.2], [0.3]])
    )
    assert a.shape == b.shape == c.shape == (3, 2) and {a.dtype, b.dtype, c.dtype} == {torch.float64}
