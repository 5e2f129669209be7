"""The picture of docs/noise.md: what noise each kernel leaves in the image.

    python -m benchmarks.noise_picture [--steps 10] [--out docs/noise.png]

Everything is closed form, no model is loaded. Data are N(picture, 0.05^2) per pixel, a picture of the Shapes world with
a little grain; the exact velocity of such data is linear in the state, v = k x + h picture. Top: what each kernel makes
of one and the same initial noise in that many steps of SD3's schedule, and the std of what differs from the picture.
Bottom: the std of each step, and the std of the result against the number of steps by exact recursion, for that grain
and for data as wide as the noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import samplers
from flowrl.policies.gaussian import LinearChain, velocity_coefficients
from reward_models.shapes.grammar import parse
from reward_models.shapes.render import render, sample_scene

GRAIN = 0.05
PROMPT = "a photo of a red star above a blue circle"
KERNELS = ("ode", "flow", "dance", "cps", "precise", "dance_precise", "ddim", "consistency")
STEPS = (5, 7, 10, 14, 20, 28, 40, 56, 80)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="denoising steps of the pictures")
    parser.add_argument("--out", type=Path, default=Path("docs/noise.png"), help="where the picture goes")
    return parser


def picture() -> Tensor:
    """(3, 64, 64) in [-1, 1]."""
    metadata = parse(PROMPT)
    assert metadata is not None  # the prompt is one of the grammar's
    pixels = render(sample_scene(metadata, np.random.default_rng(3)))
    return torch.tensor(pixels).permute(2, 0, 1) / 127.5 - 1


def denoised(mean: Tensor, kernel: str, steps: int) -> Tensor:
    """What a kernel at its default level makes of N(mean, GRAIN^2) in `steps` steps of SD3's schedule, as `mean`."""

    def predict(x: Tensor, s: Tensor, index: Tensor) -> Tensor:
        k, h = (t.float().view(-1, 1, 1, 1) for t in velocity_coefficients(s, GRAIN))
        return k * x + h * mean

    plan = samplers.plans.straight(samplers.sd3_sigmas(steps), kernel, trained=[])
    key = samplers.Key(0, "noise_picture", None, kernel, 0, None)
    shared = key._replace(prompt="")  # one initial noise for all
    return samplers.rollout(predict, plan, [key], latent_shape=mean.shape, init_keys=[shared]).leaves[0, 0]


def result_std(kernel: str, steps: int, data_std: float) -> float:
    """Exact std of the result of `steps` steps for data of that std, the last step without noise."""
    level = samplers.get_kernel(kernel).default_level
    chain = LinearChain.make(samplers.sd3_sigmas(steps), data_std, kernel, level)
    return float(chain.moments(0.0)[1][-1])


def figure(steps: int) -> Any:
    """The matplotlib figure."""
    from matplotlib.figure import Figure

    colours = dict(zip(KERNELS, ("black", *(f"C{i}" for i in range(len(KERNELS) - 1))), strict=True))
    fig = Figure(figsize=(12, 5.6), layout="constrained")
    parts: Any = fig.subfigures(2, 1, height_ratios=(1, 1.5))
    top, bottom = parts
    mean = picture()
    shown = {"the data": mean + GRAIN * samplers.noise([samplers.Key(0, "data", None, "", 0, None)], mean.shape)[0]}
    shown |= {kernel: denoised(mean, kernel, steps) for kernel in KERNELS}
    for ax, (name, image) in zip(top.subplots(1, len(shown)), shown.items(), strict=True):
        level = f" {samplers.get_kernel(name).default_level:g}" if name in KERNELS[1:] else ""
        ax.imshow(((image.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy(), interpolation="nearest")
        ax.set_title(f"{name}{level}", fontsize=9)
        ax.set_xlabel(f"std {float((image - mean).std()):.3f}", fontsize=9)
        ax.set(xticks=[], yticks=[])
    top.suptitle(
        f"{steps} steps of SD3's schedule; exact velocity of data with std {GRAIN} around a picture", fontsize=10
    )

    per_step, grain, wide = bottom.subplots(1, 3)
    sigmas = samplers.sd3_sigmas(steps)
    for kernel in KERNELS:
        style = {"color": colours[kernel], "label": kernel, "linewidth": 1.2, "marker": ".", "markersize": 4}
        if kernel != "ode":
            per_step.plot(
                range(steps - 1), samplers.get_kernel(kernel).coefficients(sigmas[:-1], sigmas[1:]).c[:-1], **style
            )
        for ax, std in ((grain, GRAIN), (wide, 1.0)):
            ax.plot(STEPS, [result_std(kernel, n, std) for n in STEPS], **style)
    per_step.plot(range(steps - 1), sigmas[1:-1], ":", color="grey", label="noise that should remain")
    per_step.set(yscale="log", xlabel="step", title=f"std of a step, {steps} steps")
    for ax, std in ((grain, GRAIN), (wide, 1.0)):
        ax.axhline(std, linestyle=":", color="grey")
        ax.set(xscale="log", xlabel="steps", title=f"std of the result; the data's is {std:g} (dotted)")
        ax.set_xticks([5, 10, 20, 40, 80], ["5", "10", "20", "40", "80"])
        ax.minorticks_off()
    grain.set(yscale="log")
    for ax in (per_step, grain, wide):
        ax.title.set_fontsize(10)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = per_step.get_legend_handles_labels()
    ode = grain.get_lines()[0]
    bottom.legend([ode, *handles], ["ode", *labels], loc="outside right center", fontsize=8, frameon=False)
    return fig


def main() -> None:
    arguments = parser().parse_args()
    figure(arguments.steps).savefig(arguments.out, dpi=100)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
