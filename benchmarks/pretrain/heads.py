"""Heads that help tiny-clip to learn and are thrown away afterwards: what is in a picture, and what a caption claims.

Contrast alone is slow to find out who wears which colour and who stands where: of two captions that differ in the order
of their words alone, each is as often right as the other. So heads on the common space read counts, colours and places
out of the features of pictures *and* of captions, and one more names shape and colour in each patch of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from reward_models.shapes.grammar import COLOURS, SHAPES, Metadata
from reward_models.shapes.render import SIZE, Scene

MOST = 4  # shapes of a kind
APART = 0.9  # typical distance between the two shapes of a relation, in half sides of the picture
AXES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # coordinate, sign; y downwards


class Heads(nn.Module):
    def __init__(self, width: int, features: int) -> None:
        """width: of the patch tokens; features: of the space that pictures and captions share."""
        super().__init__()
        self.patches = nn.Linear(width, len(SHAPES) + 1 + len(COLOURS) + 1)
        self.counts = nn.Linear(features, len(SHAPES) * (MOST + 1))
        self.colours = nn.Linear(features, len(SHAPES) * len(COLOURS))
        self.places = nn.Linear(features, len(SHAPES) * 2)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, D) to logits of counts (N, shapes, 5), of colours (N, shapes, colours), and places (N, shapes, 2)."""
        n = len(features)
        outs = (self.counts(features), self.colours(features), self.places(features))
        counts, colours, places = (out.float().view(n, len(SHAPES), -1) for out in outs)
        return counts, colours, places


def patch_loss(logits: Tensor, scenes: Sequence[Scene], patch: int) -> Tensor:
    """Cross-entropy of shape and of colour in each patch, logits (N, patches, 16); most patches show the ground."""
    side = SIZE // patch
    y, x = (np.indices((side, side)).reshape(2, -1) + 0.5) * patch
    target = np.tile([[len(SHAPES)], [len(COLOURS)]], (len(scenes), 1, side * side))
    for i, scene in enumerate(scenes):
        for s in scene.shapes:
            inside = np.hypot(x - s.x, y - s.y) < 0.8 * s.radius
            target[i, :, inside] = (SHAPES.index(s.name), COLOURS.index(s.colour))
    shapes, colours = torch.from_numpy(target).to(logits.device).unbind(1)
    names = logits.float().flatten(0, 1).split((len(SHAPES) + 1, len(COLOURS) + 1), 1)
    return cross_entropy(names[0], shapes.flatten()) + cross_entropy(names[1], colours.flatten())


def scene_loss(said: tuple[Tensor, Tensor, Tensor], scenes: Sequence[Scene]) -> Tensor:
    """How wrong the heads are about pictures; a place is asked for where a shape is the only one of its kind."""
    count = np.zeros((len(scenes), len(SHAPES)), int)
    worn = np.zeros((len(scenes), len(SHAPES), len(COLOURS)), np.float32)
    place = np.zeros((len(scenes), len(SHAPES), 2), np.float32)
    for i, scene in enumerate(scenes):
        for s in scene.shapes:
            a = SHAPES.index(s.name)
            count[i, a] += 1
            worn[i, a, COLOURS.index(s.colour)] = 1
            place[i, a] = (2 * s.x / SIZE - 1, 2 * s.y / SIZE - 1)
    off = (said[2] - torch.from_numpy(place).to(said[2])).square().sum(-1)
    return _counted(said[0], count) + _coloured(said[1], worn, count > 0) + _mean(off, count == 1)


def caption_loss(said: tuple[Tensor, Tensor, Tensor], captions: Sequence[Metadata]) -> Tensor:
    """How far the heads are from what captions claim: counts, the colours that are named, and relations, as a distance
    of APART along their axis between the two places."""
    count = np.zeros((len(captions), len(SHAPES)), int)
    worn = np.zeros((len(captions), len(SHAPES), len(COLOURS)), np.float32)
    relations: list[tuple[int, int, int, int, int]] = []  # caption, its two shapes, coordinate, sign
    for i, metadata in enumerate(captions):
        for clause in metadata["include"]:
            a = SHAPES.index(clause["class"])
            count[i, a] += clause["count"]
            if "color" in clause:
                worn[i, a, COLOURS.index(clause["color"])] = 1
            if "position" in clause:
                name, target = clause["position"]
                relations.append((i, a, SHAPES.index(metadata["include"][target]["class"]), *AXES[name]))
    value = _counted(said[0], count) + _coloured(said[1], worn, worn.max(-1) > 0)
    if not relations:
        return value
    row, first, second, axis, sign = torch.tensor(relations, device=said[2].device).unbind(1)
    distance = said[2][row, first, axis] - said[2][row, second, axis]
    return value + (distance - APART * sign).square().mean()


def _counted(logits: Tensor, count: np.ndarray) -> Tensor:
    return 2 * cross_entropy(logits.flatten(0, 1), torch.from_numpy(count).to(logits.device).flatten())


def _coloured(logits: Tensor, worn: np.ndarray, where: np.ndarray) -> Tensor:
    target = torch.from_numpy(worn).to(logits)
    return 2 * _mean(binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1), where)


def _mean(values: Tensor, where: np.ndarray) -> Tensor:
    weight = torch.from_numpy(where).to(values)
    return (values * weight).sum() / weight.sum().clamp(min=1)
