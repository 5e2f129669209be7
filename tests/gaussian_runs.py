"""Training runs on `GaussianPolicy`: the whole trainer in milliseconds per update. Rewards are named by import path."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowrl.config import apply_overrides, parse_config
from flowrl.policies.gaussian import GaussianPolicy, quadratic_reward
from flowrl.schema import Config

TARGET = torch.tensor([1.0, -0.5])
PROMPTS = ("mean 0.5 -1", "mean -1 0.3", "mean 0 0.8", "mean 1.5 1", "mean 0.2 0.4", "mean -0.7 -0.6")
Metadata = Sequence[dict[str, Any]]


def config(folder: Path, *overrides: str, processes: int = 1) -> Config:
    """A short Flow-GRPO run in `folder`/run on six prompts, without evaluation unless overrides (`key=value`) ask."""
    prompts = folder / "prompts.txt"
    if not prompts.exists():
        folder.mkdir(parents=True, exist_ok=True)
        prompts.write_text("\n".join(PROMPTS) + "\n")
    data = {
        "output_dir": str(folder / "run"),
        "policy": {"path": "gaussian", "device": "cpu", "dtype": "float32"},
        "reward": "gaussian_runs:quadratic",
        "prompts": {"source": str(prompts)},
        "updates": 4,
        "prompts_per_update": 4,
        "group_size": 8,
        "rollout": {"steps": 5},
        "advantage": {"std": "none", "clip": None},
        "objective": {"clip_range": 0.2},
        "optimizer": {"lr": 0.02, "weight_decay": 0.0, "grad_clip": None},
        "eval": None,
        "logging": {"samples_every": 0},
    }
    data, problems = apply_overrides(data, overrides)
    return parse_config(data, processes=processes, already=problems)


EVAL = (  # overrides that switch an evaluation of two prompts on
    "eval={prompts: '%s', limit: 2, images_per_prompt: 2, steps: 4, judge: null, rewards: 'gaussian_runs:quadratic'}"
)


def evaluated(folder: Path) -> str:
    """The override that switches an evaluation on."""
    return EVAL % (folder / "prompts.txt")


def quadratic(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    """-1/2 |x - TARGET|^2."""
    return quadratic_reward(GaussianPolicy.read(images), TARGET, 1.0)


def flipped(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    """The same with its sign turned."""
    return -quadratic(images, prompts, metadata)


def with_gaps(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    """The same, missing wherever the first coordinate is above 1."""
    x = GaussianPolicy.read(images)
    return torch.where(x[:, 0] > 1, math.nan, quadratic_reward(x, TARGET, 1.0))


def shuffled(images: Tensor, prompts: Sequence[str], metadata: Metadata, groups: Tensor) -> Tensor:
    """The same numbers, handed out in a fixed random order within each group: they say nothing about the images."""
    values, mixed = quadratic(images, prompts, metadata), torch.empty(len(images))
    seed = int(GaussianPolicy.read(images).double().sum().item() * 1e6) % 2**31  # another order in every update
    generator = torch.Generator().manual_seed(seed)
    for group in groups.unique():
        rows = (groups == group).nonzero().flatten()
        mixed[rows] = values[rows[torch.randperm(len(rows), generator=generator)]]
    return mixed


def unrelated(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    """Normal numbers. A mean over a shuffled group still says how good its images are, this says nothing at all."""
    seed = int(GaussianPolicy.read(images).double().sum().item() * 1e6) % 2**31
    return torch.randn(len(images), generator=torch.Generator().manual_seed(seed))


_calls = 0


def failing(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    """`quadratic`, but raises at the call whose number is in the variable FAIL_ON_CALL."""
    global _calls
    _calls += 1
    if _calls == int(os.environ.get("FAIL_ON_CALL", "0")):
        raise RuntimeError("the scorer has crashed")
    return quadratic(images, prompts, metadata)
