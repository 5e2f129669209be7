"""Variance-preserving diffusion models (epsilon, v, consistency) in the coordinates of a flow.

Such a model knows x_vp = sqrt(abar_t) x0 + sqrt(1 - abar_t) e at times t = 0 ... T - 1. With

    k = sqrt(abar) + sqrt(1 - abar),    s = sqrt(1 - abar) / k,    x = x_vp / k

it is x = (1 - s) x0 + s e, a flow's state, and sqrt(abar) = (1 - s) k, sqrt(1 - abar) = s k, k = 1 / sqrt((1 - s)^2 +
s^2): apart from the network's clock everything is a function of s. What the network says becomes v = e - x0 by

    epsilon        v = (e_hat - x) / (1 - s)
    v_prediction   v = k v_hat + k^2 (2 s - 1) x        from v_hat = sqrt(abar) e - sqrt(1 - abar) x0 (arXiv 2202.00512)
    sample         v = (x - x0_hat) / s

In these coordinates DDIM (arXiv 2010.02502) with eta is the kernel `ddim` at that level, and the multistep sampling of
latent consistency models (arXiv 2310.04378) is `consistency` at level 1, whose x0_hat is the consistency function

    f = c_skip(t) x_vp + c_out(t) x0_hat,    c_skip = 0.25 / (u^2 + 0.25),    c_out = u / sqrt(u^2 + 0.25),

u = timestep_scaling * t, so that f = x_vp at t = 0. Hence v = (x - f) / s there.

The times of a run are those of diffusers' DDIMScheduler under the pipeline's scheduler settings (LCMScheduler's own for
consistency models), whichever scheduler the pipeline came with: noise levels and spacing are the model's, the step is
the kernel's. Differences from diffusers:

- A step leads to the next time of the grid. DDIMScheduler leads to t - T // steps instead, which is another time where
  the spacing is "linspace", or "trailing" with a number of steps that does not divide T.
- Where the last step would lead to the time at which it starts (its last time is 0 and so is its final alpha's), it
  leads to s = 0.
- x0_hat is never clipped nor thresholded: these settings are made for pixels.
- Between the times of the table the network's clock is interpolated, linearly in s; at them it is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowrl.errors import UserError
from samplers.kernels import per_row

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SIGMA_DATA = 0.5  # of the boundary condition, as LCMScheduler has it


def flow_time(abar: Tensor) -> Tensor:
    """s of cumulative products abar in [0, 1], float64, elementwise."""
    abar = abar.double()
    noise, signal = (1 - abar).sqrt(), abar.sqrt()
    return noise / (signal + noise)


def vp_scale(s: Tensor | float) -> Tensor:
    """k = 1 / sqrt((1 - s)^2 + s^2), elementwise: x_vp = k x. Its inverse is the std of x where x0 has std 1."""
    s = s if isinstance(s, Tensor) else torch.tensor(s, dtype=torch.float64)
    return ((1 - s) ** 2 + s**2).rsqrt()


def velocity(output: Tensor, x: Tensor, s: Tensor, prediction: str) -> Tensor:
    """v (N, ...) of what the network says about states x (N, ...) at times s (N,); see the module."""
    if prediction == "epsilon":
        return (output - x) / per_row(1 - s, x)
    if prediction == "sample":
        return (x - output) / per_row(s, x)
    k = vp_scale(s)
    return per_row(k, x) * output + per_row(k**2 * (2 * s - 1), x) * x


def consistency_velocity(v: Tensor, x: Tensor, s: Tensor, u: Tensor) -> Tensor:
    """v (N, ...) for which x0_hat = x - s v is the consistency function; u (N,): the scaled timestep."""
    c_skip = SIGMA_DATA**2 / (u**2 + SIGMA_DATA**2)
    c_out = u / (u**2 + SIGMA_DATA**2).sqrt()
    f = per_row(c_out, x) * (x - per_row(s, x) * v) + per_row(c_skip * vp_scale(s), x) * x
    return (x - f) / per_row(s, x)


class Clock:
    """The times of a pipeline's scheduler: which s a step count means, and which timestep the network sees at s.

    table (T,): s of every timestep, float64, rising. final: s at which the last step ends (that of DDIMScheduler's
    `final_alpha_cumprod`: 0, or with `set_alpha_to_one: false` that of timestep 0; 0 for consistency models).
    """

    def __init__(self, scheduler: Any):
        """scheduler: of a loaded pipeline. Raises UserError for one that is not made for diffusion models."""
        from diffusers import DDIMScheduler, LCMScheduler

        name = type(scheduler).__name__
        if not hasattr(scheduler, "alphas_cumprod") or "beta_schedule" not in scheduler.config:
            raise UserError(
                f"got scheduler {name} for a diffusion model; expected one with a table of noise levels (betas), such "
                "as DDIMScheduler; put the scheduler that the model was trained with into its folder"
            )
        self.prediction = scheduler.config.get("prediction_type", "epsilon")
        if self.prediction not in PREDICTIONS:
            raise UserError(f"got prediction_type {self.prediction!r}; expected one of {', '.join(PREDICTIONS)}")
        self.consistent = isinstance(scheduler, LCMScheduler)
        kind = LCMScheduler if self.consistent else DDIMScheduler
        self.scheduler = kind.from_config(scheduler.config)
        self.timestep_scaling = float(self.scheduler.config.get("timestep_scaling", 1.0))
        self.table = flow_time(self.scheduler.alphas_cumprod)
        if self.prediction == "epsilon" and float(self.table[-1]) > 1 - 1e-6:
            raise UserError(
                "got prediction_type 'epsilon' with rescale_betas_zero_snr, whose first state is noise alone and says "
                "nothing of the picture; expected 'v_prediction' there; correct the scheduler's config"
            )
        self.final = 0.0 if self.consistent else float(flow_time(self.scheduler.final_alpha_cumprod))

    def sigmas(self, steps: int) -> Tensor:
        """(steps + 1,) float64, falling to `final`. Raises UserError for more steps than the scheduler has times."""
        try:
            self.scheduler.set_timesteps(steps)
        except ValueError as error:
            raise UserError(f"got {steps} denoising steps; expected fewer for this model ({error})") from error
        timesteps = self.scheduler.timesteps.long()
        timesteps = timesteps[timesteps >= 0]  # by rounding, "trailing" adds a last one of -1 to some numbers of steps
        if len(timesteps) != steps or timesteps[0] >= len(self.table) or not bool((timesteps.diff() < 0).all()):
            raise UserError(
                f"got {steps} denoising steps, which the scheduler's spacing "
                f"{self.scheduler.config.get('timestep_spacing')!r} cannot place among {len(self.table)}; expected "
                f"fewer; try {steps // 2 or 1}"
            )
        times = self.table[timesteps]
        end = self.final if self.final < float(times[-1]) else 0.0
        return torch.cat([times, torch.tensor([end], dtype=torch.float64)])

    def timestep(self, s: Tensor) -> Tensor:
        """The network's timestep (N,), float32, at times s (N,) float32.

        Raises UserError for s above the table's last: the model knows no such state.
        """
        last = float(self.table[-1])
        if float(s.max()) > last + 1e-6:
            raise UserError(
                f"got time {float(s.max()):.6g} for a diffusion model whose noisiest state is at {last:.6g}; expected "
                "times of the policy's own `sigmas`; take the schedule from the model"
            )
        table = self.table.to(s.device)
        above = torch.searchsorted(table, s.double()).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        t = (above - 1 + (s.double() - low) / (high - low)).clamp(0, len(table) - 1)
        near = t.round()  # s comes as float32: 1e-3 of a timestep is what is left of it where the table is dense
        return torch.where((t - near).abs() < 5e-3, near, t).float()

    def velocity(self, output: Tensor, x: Tensor, s: Tensor, timestep: Tensor) -> Tensor:
        """v (N, C, h, w) of the network's float32 output at states x and times s, whose timestep is given."""
        v = velocity(output, x, s, self.prediction)
        return consistency_velocity(v, x, s, self.timestep_scaling * timestep) if self.consistent else v
