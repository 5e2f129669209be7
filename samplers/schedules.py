"""Sigma schedules: grids of `steps + 1` times from 1 (noise) to 0 (data), float64.

`shift` and `exp(mu)` are the same map with another name: s -> k s / (1 + (k - 1) s). Functions that promise parity
with diffusers return values on the float32 grid, so that a float64 difference of two of them, rounded to float32,
is the very `dt` of its scheduler.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sd3_sigmas(steps: int, shift: float = 3.0, double_shift: bool = True) -> Tensor:
    """SD3's schedule: (steps + 1,) float64, equal bit for bit to diffusers' FlowMatchEulerDiscreteScheduler(shift).

    diffusers shifts twice: its training grid ends at f(0.001), f(t) = shift t / (1 + (shift - 1) t), and the linear
    grid from f(1) to f(0.001) is shifted again. With shift 3 the last non-zero sigma is 0.0089 whatever `steps` is.
    `double_shift=False` shifts the linear grid from 1 to 0.001 once (last non-zero sigma 0.0030).
    """
    _check_steps(steps)
    _check_shift(shift)
    # float32 like the constructor of the scheduler, whose last training timestep is 1 / 1000
    low = torch.tensor(1.0, dtype=torch.float32) / 1000
    high = torch.tensor(1.0, dtype=torch.float32)
    if double_shift:
        low, high = _shift(low, shift), _shift(high, shift)
    grid = _linspace(high.item() * 1000, low.item() * 1000, steps) / 1000
    return _close(_shift(grid, shift).to(torch.float32))


def linear_shift_sigmas(steps: int, shift: float) -> Tensor:
    """linspace(1, 0, steps + 1) shifted once: (steps + 1,) float64 (DanceGRPO, MixGRPO, BranchGRPO, SRPO; shift 3)."""
    _check_steps(steps)
    _check_shift(shift)
    return _shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def flux_sigmas(steps: int, tokens: int, mu: float | None = None) -> Tensor:
    """FLUX's schedule for an image of `tokens` latent tokens: (steps + 1,) float64, bit for bit as diffusers' pipeline.

    t_i = 1 - i / steps, s_i = E / (E + 1 / t_i - 1), E = exp(mu), mu = dynamic_mu(tokens) unless given.
    512 x 512 px are 1024 tokens, 1024 x 1024 px 4096.
    """
    _check_steps(steps)
    e = torch.tensor(math.exp(dynamic_mu(tokens) if mu is None else mu), dtype=torch.float32)
    t = _linspace(1.0, 1 / steps, steps).to(torch.float32)
    return _close(e / (e + (1 / t - 1)))


def dynamic_mu(
    tokens: int, base_tokens: int = 256, max_tokens: int = 4096, base_shift: float = 0.5, max_shift: float = 1.15
) -> float:
    """mu of FLUX's dynamic shift: linear in the number of latent tokens, 0.5 at 256 and 1.15 at 4096."""
    if tokens < 1:
        raise ValueError(f"got {tokens} latent tokens; expected at least 1. Check the image size.")
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return tokens * slope + (base_shift - slope * base_tokens)


def _shift(t: Tensor, shift: float) -> Tensor:
    return shift * t / (1 + (shift - 1) * t)


def _linspace(start: float, stop: float, n: int) -> Tensor:
    """numpy.linspace, operation by operation (torch's own counts from both ends)."""
    if n == 1:
        return torch.tensor([start], dtype=torch.float64)
    grid = torch.arange(n, dtype=torch.float64) * ((stop - start) / (n - 1)) + start
    grid[-1] = stop
    return grid


def _close(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas.to(torch.float64), torch.zeros(1, dtype=torch.float64)])


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"got {steps} sampling steps; expected at least 1. Raise the number of steps.")


def _check_shift(shift: float) -> None:
    if not 0 < shift < math.inf:
        raise ValueError(f"got shift {shift}; expected a positive number. SD3 uses 3; 1 leaves the grid unshifted.")
