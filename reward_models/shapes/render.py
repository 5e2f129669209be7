"""Scenes of the Shapes world: drawn so that they satisfy their prompt, anti-aliased, on a plain light ground."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .grammar import COLOURS, SHAPES, Metadata, seen_colours

SIZE = 64  # pixels
GAP = 3.0  # least distance between the circles around two shapes, pixels
SUPERSAMPLING = 4
PALETTE = {
    "red": (219, 31, 31),
    "orange": (245, 133, 13),
    "yellow": (245, 219, 26),
    "green": (38, 158, 56),
    "blue": (33, 77, 217),
    "purple": (133, 46, 168),
    "pink": (247, 133, 189),
    "black": (20, 20, 20),
}


def _regular(points: int, start: float, radii: tuple[float, ...] = (1.0,)) -> list[tuple[float, float]]:
    angles = [start + 2 * math.pi * i / points for i in range(points)]
    return [(radii[i % len(radii)] * math.cos(t), radii[i % len(radii)] * math.sin(t)) for i, t in enumerate(angles)]


def _heart() -> list[tuple[float, float]]:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return [(float(a) / 16.5, float(b) / 16.5 - 0.1) for a, b in zip(x, y, strict=True)]


def _cross(arm: float = 0.34, reach: float = 0.98) -> list[tuple[float, float]]:
    a, r = arm, reach
    return [(-a, -r), (a, -r), (a, -a), (r, -a), (r, a), (a, a), (a, r), (-a, r), (-a, a), (-r, a), (-r, -a), (-a, -a)]


# Outlines in a circle of about unit radius, y downwards.
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _regular(48, 0.0, (0.92,)),
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": [(x, y + 0.2) for x, y in _regular(3, -math.pi / 2, (1.15,))],
    "star": [(x, y + 0.05) for x, y in _regular(10, -math.pi / 2, (1.12, 0.45))],
    "cross": _cross(),
    "heart": _heart(),
}
assert tuple(OUTLINES) == SHAPES and tuple(PALETTE) == COLOURS


@dataclass(frozen=True)
class Shape:
    """One shape: centre and radius of the circle around it in pixels, rotation in radians, 8-bit colour."""

    name: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]

    def outline(self) -> np.ndarray:
        """(points, 2) in pixels."""
        c, s = math.cos(self.angle), math.sin(self.angle)
        points = np.array(OUTLINES[self.name]) * self.radius
        return points @ np.array([[c, s], [-s, c]]) + (self.x, self.y)


@dataclass(frozen=True)
class Scene:
    shapes: tuple[Shape, ...]
    ground: tuple[int, int, int]


def _jitter(rgb: tuple[int, int, int], rng: np.random.Generator, spread: int = 8) -> tuple[int, int, int]:
    r, g, b = (int(np.clip(value + rng.integers(-spread, spread + 1), 0, 255)) for value in rgb)
    return r, g, b


def _fits(x: float, y: float, radius: float, placed: list[tuple[float, float, float]]) -> bool:
    return all(math.hypot(x - a, y - b) > radius + r + GAP for a, b, r in placed)


def _place(radii: list[float], rng: np.random.Generator) -> list[tuple[float, float, float]] | None:
    placed: list[tuple[float, float, float]] = []
    for radius in radii:
        margin = 1.2 * radius + 1
        for _ in range(40):
            x, y = rng.uniform(margin, SIZE - margin, 2)
            if _fits(x, y, radius, placed):
                placed.append((float(x), float(y), radius))
                break
        else:
            return None
    return placed


def _holds(relation: str, a: tuple[float, float, float], b: tuple[float, float, float]) -> bool:
    """A clear case of the relation: within 35 degrees of its axis."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along > 0 and abs(across) < math.tan(math.radians(35)) * along


def sample_scene(metadata: Metadata, rng: np.random.Generator) -> Scene:
    """A random scene that satisfies the prompt and holds nothing else.

    Args:
        metadata: a Shapes prompt (see ``grammar``).
        rng: numpy generator; the scene is a function of its state.
    """
    wanted: list[tuple[str, str]] = []
    relation: str | None = None
    for clause in metadata["include"]:
        if "position" in clause:
            relation = clause["position"][0]
        for _ in range(clause["count"]):
            wanted.append((clause["class"], clause.get("color") or str(rng.choice(seen_colours(clause["class"])))))
    small, large = (7.5, 13.5) if len(wanted) == 1 else (7.5, 11.5) if len(wanted) == 2 else (6.5, 9.0)
    while True:
        placed = _place([float(rng.uniform(small, large)) for _ in wanted], rng)
        if placed is not None and (relation is None or _holds(relation, placed[1], placed[0])):
            break
    shapes = tuple(
        Shape(name, colour, x, y, radius, float(rng.uniform(-0.12, 0.12)), _jitter(PALETTE[colour], rng))
        for (name, colour), (x, y, radius) in zip(wanted, placed, strict=True)
    )
    level = int(rng.integers(222, 246))
    return Scene(shapes, _jitter((level, level, level), rng, 5))


def render(scene: Scene, size: int = SIZE) -> np.ndarray:
    """The picture, uint8 (size, size, 3)."""
    scale = SUPERSAMPLING * size / SIZE
    image = Image.new("RGB", (SUPERSAMPLING * size, SUPERSAMPLING * size), scene.ground)
    draw = ImageDraw.Draw(image)
    for shape in scene.shapes:
        draw.polygon([(float(x), float(y)) for x, y in shape.outline() * scale], fill=shape.rgb)
    return np.asarray(image.reduce(SUPERSAMPLING))


def mask(shape: Shape, size: int = SIZE) -> np.ndarray:
    """Pixels at least half covered by a shape, bool (size, size)."""
    scale = SUPERSAMPLING * size / SIZE
    image = Image.new("L", (SUPERSAMPLING * size, SUPERSAMPLING * size), 0)
    ImageDraw.Draw(image).polygon([(float(x), float(y)) for x, y in shape.outline() * scale], fill=255)
    return np.asarray(image.reduce(SUPERSAMPLING)) >= 128
