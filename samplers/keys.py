"""Keyed randomness: every draw is a function of what it is for, never of when or where it is drawn.

A `Key` names a draw by (seed, purpose, update, prompt, occurrence, root, child path, denoising step) and is hashed to
64 bits. Nothing therefore depends on batch size, chunking, rank or world size, and one image can be drawn again
alone. Evaluation keys leave `update` None; initial noise shared by a group leaves `root` None.

Noise is drawn on the CPU in float32. torch's CPU generator reads only the lower 32 bits of its seed, so these fill a
row and the upper 32 turn the plane of each (first half, second half) pair of its elements by an angle: a standard
normal stays a standard normal under rotation, and keys that share half their bits still differ.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Key(NamedTuple):
    """The name of a draw.

    seed: the run's seed. purpose: what is drawn ("rollout", "eval", "window", ...). update: number of the update, None
    in evaluation. prompt: the prompt's id. occurrence: how often this prompt came before in the same update.
    root: which image or tree of the group, None where the group shares the draw. path: sibling number of every edge
    from the root to the node drawn, () for initial noise. step: denoising step of the last of these edges, or None.
    """

    seed: int
    purpose: str
    update: int | None
    prompt: int | str
    occurrence: int
    root: int | None
    path: tuple[int, ...] = ()
    step: int | None = None

    def seed64(self) -> int:
        """64-bit hash of the key, in [0, 2^64)."""
        return child_seed(hash_root(self), child_suffix(self.path, self.step))

    def uniform(self) -> float:
        """A number in [0, 1), for choices that are not latents."""
        return (self.seed64() >> 11) / (1 << 53)

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high), for instance the start of a window. Raises ValueError when there is none."""
        if high <= low:
            raise ValueError(f"got the empty range [{low}, {high}); expected low < high. Widen the range.")
        return low + (self.seed64() * (high - low) >> 64)


def noise(keys: Sequence[Key], shape: Sequence[int]) -> Tensor:
    """Standard normal noise, one row per key: (n, *shape) float32 on the CPU."""
    out = torch.empty(len(keys), *shape)
    return fill_noise(out, [key.seed64() for key in keys])


def fill_noise(out: Tensor, seeds: Sequence[int]) -> Tensor:
    """Fill the rows of `out` (n, ...), contiguous float32 on the CPU, from n 64-bit seeds; returns it."""
    generator = torch.Generator()
    flat = out.view(len(out), -1)
    for row, seed in zip(flat, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(seed & 0xFFFFFFFF))
    half = flat.shape[1] // 2
    angles = [(seed >> 32) * (2 * math.pi / (1 << 32)) for seed in seeds]
    cos = torch.tensor([math.cos(angle) for angle in angles]).unsqueeze(1)
    sin = torch.tensor([math.sin(angle) for angle in angles]).unsqueeze(1)
    first, second = flat[:, :half], flat[:, half : 2 * half]  # an odd last element stays as it is
    turned = first * cos - second * sin
    second.mul_(cos).add_(first * sin)
    first.copy_(turned)
    return out


# A key is hashed in two parts, because all draws of one rollout share the first: JSON text of the six root fields
# (unambiguous: numbers, strings and null differ), then "path|step".


def hash_root(key: Key) -> hashlib.blake2b:
    """Hash state after the root fields of a key (its path and step are not read)."""
    return hashlib.blake2b(json.dumps(key[:6]).encode(), digest_size=8)


def child_suffix(path: tuple[int, ...], step: int | None) -> bytes:
    """The part of a key's encoding that follows its root fields."""
    return f"{json.dumps(path)}|{step}".encode()


def child_seed(root: hashlib.blake2b, suffix: bytes) -> int:
    """64-bit seed of the child `suffix` of a root."""
    state = root.copy()
    state.update(suffix)
    return int.from_bytes(state.digest(), "little")
