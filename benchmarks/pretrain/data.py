"""Batches of Shapes scenes, each a function of (seed, purpose, index) only."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from reward_models.shapes import grammar
from reward_models.shapes.grammar import TASKS, Metadata
from reward_models.shapes.render import render, sample_scene

# Shares of the tasks in pretraining: hard tasks are seen more often.
TASK_SHARES = {
    "single_object": 0.08,
    "two_object": 0.14,
    "counting": 0.24,
    "colors": 0.14,
    "position": 0.20,
    "color_attr": 0.20,
}


@lru_cache(maxsize=1)
def seen_prompts() -> dict[str, list[Metadata]]:
    """The prompts of pretraining by task: everything but the held-out combinations."""
    return {task: grammar.seen_prompts(task) for task in TASKS}


def draw_scene(table: dict[str, list[Metadata]], rng: np.random.Generator) -> tuple[Metadata, np.ndarray]:
    """A prompt by task share and a picture of it, uint8 (64, 64, 3)."""
    task = str(rng.choice(list(TASK_SHARES), p=list(TASK_SHARES.values())))
    metadata = table[task][int(rng.integers(len(table[task])))]
    return metadata, render(sample_scene(metadata, rng))


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """uint8 pictures to float (N, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def scene_batch(seed: int, purpose: int, step: int, size: int) -> tuple[list[Metadata], Tensor]:
    """The batch of a step: prompts and pictures in [0, 1], the same whenever it is asked for."""
    table = seen_prompts()
    rng = np.random.default_rng([seed, purpose, step])
    metadata, pictures = zip(*(draw_scene(table, rng) for _ in range(size)), strict=True)
    return list(metadata), to_tensor(list(pictures))
