"""A bounded memory of generated images, so that a discriminator does not forget what earlier generators drew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .references import seed_of


class Replay:
    """A uniform sample of all images ever offered (reservoir sampling, Vitter 1985), stored as uint8.

    Args:
        capacity: images at most; 0 remembers nothing.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise ValueError(f"got a replay of {capacity} images, expected 0 or more. Correct it.")
        self.capacity, self.seen = capacity, 0
        self.images = torch.zeros(0, 3, 0, 0, dtype=torch.uint8)
        self.prompts: list[str | None] = []

    def __len__(self) -> int:
        return len(self.images)

    def check(self, images: Tensor) -> None:
        """ValueError where images have another size than those remembered."""
        if len(self) and images.shape[1:] != self.images.shape[1:]:
            raise ValueError(
                f"got images of {tuple(images.shape[2:])} px for a replay of {tuple(self.images.shape[2:])} px, "
                "expected one size. Keep the size, or set replay=0."
            )

    def add(self, images: Tensor, prompts: list[str] | None, key: int) -> None:
        """Offer images (N, 3, H, W) in [0, 1]; which are kept is a function of the key and of what was offered before.

        Raises:
            ValueError: another size than before.
        """
        if not self.capacity or not len(images):
            return
        self.check(images)
        pixels = (images.detach().cpu().clamp(0, 1) * 255).round().byte()
        room = min(self.capacity - len(self), len(pixels))
        stored = torch.cat([self.images, pixels[:room]]) if len(self) else pixels[:room].clone()
        self.prompts += prompts[:room] if prompts else [None] * room
        self.seen += room
        generator = torch.Generator().manual_seed(seed_of(key, "replay"))
        for i in range(room, len(pixels)):
            self.seen += 1
            place = int(torch.randint(self.seen, (), generator=generator))
            if place < self.capacity:
                stored[place] = pixels[i]
                self.prompts[place] = prompts[i] if prompts else None
        self.images = stored

    def draw(self, count: int, key: int) -> tuple[Tensor, list[str | None]]:
        """At most `count` different images (n, 3, H, W) float32 in [0, 1], and their prompts."""
        generator = torch.Generator().manual_seed(seed_of(key, "replay draw"))
        chosen = torch.randperm(len(self), generator=generator)[:count]
        return self.images[chosen].float() / 255, [self.prompts[i] for i in chosen.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """A tensor and JSON values."""
        return {"images": self.images.clone(), "prompts": list(self.prompts), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; ValueError where it holds more than this replay may."""
        if len(state["images"]) > self.capacity:
            raise ValueError(
                f"got a saved replay of {len(state['images'])} images for one of {self.capacity}, expected at most as "
                "many. Resume with the same replay."
            )
        self.images, self.prompts = state["images"].clone(), list(state["prompts"])
        self.seen = int(state["seen"])
