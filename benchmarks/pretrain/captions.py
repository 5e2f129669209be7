"""Captions of Shapes scenes: near misses of a caption, and which captions are true of which scenes.

A caption is handled by its words after the phrase ("a red star and a blue circle"); the phrase says nothing about the
picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np

from reward_models.shapes.grammar import (
    COLOURS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    SPLITS,
    Metadata,
    describe,
    prompts,
)
from reward_models.shapes.render import Scene

SEEN = ("train", "test")
UNCLEAR = math.tan(math.radians(55))  # scenes are drawn within 35 degrees of a relation's axis; beyond 55 it is false
Misses = dict[str, tuple[str, ...]]


@cache
def captions(splits: tuple[str, ...] = SEEN) -> dict[str, Metadata]:
    """Captions without their phrase, and their metadata, in alphabetical order."""
    found = {describe(m["tag"], m["include"]): m for split in splits for m in prompts(split)}
    return dict(sorted(found.items()))


@cache
def near_misses(caption: str, splits: tuple[str, ...] = SEEN) -> Misses:
    """Captions of the same splits that differ in one thing, by what differs.

    "colour", "shape", "count", "relation" (another one), "swap" (of the colours of two shapes, or of the two ends of a
    relation), "missing" and "extra" (an object less, an object more).
    """
    table = captions(splits)
    found: dict[str, dict[str, None]] = {}
    for kind, tag, include in _changes(table[caption]):
        text = describe(tag, include)
        if text in table and text != caption:
            found.setdefault(kind, {})[text] = None
    return {kind: tuple(texts) for kind, texts in found.items()}


def _changes(metadata: Metadata) -> Iterator[tuple[str, str, list[Metadata]]]:
    """(what differs, task, clauses) of every caption next to this one, in the grammar or not."""
    tag, include = metadata["tag"], metadata["include"]
    present = {clause["class"] for clause in include}
    others = [shape for shape in SHAPES if shape not in present]
    for i, clause in enumerate(include):
        changes: list[tuple[str, str, object]] = [("shape", "class", shape) for shape in others]
        if "color" in clause:
            changes += [("colour", "color", colour) for colour in COLOURS]
        if "position" in clause:
            changes += [("relation", "position", [relation, clause["position"][1]]) for relation in RELATIONS]
        for kind, key, value in changes:
            yield kind, tag, [*include[:i], {**clause, key: value}, *include[i + 1 :]]
    first = include[0]
    if len(include) == 1:
        for count in NUMBERS:
            yield "count", "counting", [{**first, "count": count}]
        yield "count", "colors" if "color" in first else "single_object", [{**first, "count": 1}]
        if first["count"] == 1:
            for shape in others:
                if "color" not in first:
                    yield "extra", "two_object", [first, {"class": shape, "count": 1}]
                    continue
                for colour in COLOURS:
                    yield "extra", "color_attr", [first, {"class": shape, "count": 1, "color": colour}]
        return
    second = include[1]
    for clause in include:
        alone = {k: v for k, v in clause.items() if k != "position"}
        yield "missing", "colors" if "color" in alone else "single_object", [alone]
    if tag == "position":
        yield "swap", tag, [{**first, "class": second["class"]}, {**second, "class": first["class"]}]
    if tag == "color_attr":
        yield "swap", tag, [{**first, "color": second["color"]}, {**second, "color": first["color"]}]


def one_near_miss(caption: str, rng: np.random.Generator, splits: tuple[str, ...] = SEEN) -> str:
    """A near miss, each kind of difference being equally likely."""
    kinds = list(near_misses(caption, splits).values())
    texts = kinds[int(rng.integers(len(kinds)))]
    return texts[int(rng.integers(len(texts)))]


def true_of(texts: Sequence[str], scenes: Sequence[Scene], splits: tuple[str, ...] = SPLITS) -> np.ndarray:
    """(scenes, captions) bool: whether a caption describes a scene, and leaves out no object of it.

    A relation counts as true up to 55 degrees from its axis, so that no unclear case is called false.
    """
    table = captions(splits)
    said = [table[text] for text in texts]
    counts = np.zeros((len(scenes), len(SHAPES), 1 + len(COLOURS)), int)  # [..., 0]: in any colour
    related = np.zeros((len(scenes), len(SHAPES), len(SHAPES), len(RELATIONS)), bool)
    for i, scene in enumerate(scenes):
        for a in scene.shapes:
            counts[i, SHAPES.index(a.name), [0, 1 + COLOURS.index(a.colour)]] += 1
            for b in scene.shapes:
                for r, (along, across) in enumerate(_offsets(a.x - b.x, a.y - b.y)):
                    if along > 0 and abs(across) <= UNCLEAR * along:
                        related[i, SHAPES.index(a.name), SHAPES.index(b.name), r] = True
    wanted = np.zeros((len(said), len(SHAPES), 1 + len(COLOURS)), int)
    relation = np.ones((len(scenes), len(said)), bool)
    for j, metadata in enumerate(said):
        for clause in metadata["include"]:
            shape = SHAPES.index(clause["class"])
            wanted[j, shape, 0] += clause["count"]
            if "color" in clause:
                wanted[j, shape, 1 + COLOURS.index(clause["color"])] += clause["count"]
            if "position" in clause:
                name, target = clause["position"]
                end = SHAPES.index(metadata["include"][target]["class"])
                relation[:, j] = related[:, shape, end, RELATIONS.index(name)]
    same_shapes = (counts[:, None, :, 0] == wanted[None, :, :, 0]).all(-1)
    enough_colours = (counts[:, None, :, 1:] >= wanted[None, :, :, 1:]).all((-1, -2))
    return same_shapes & enough_colours & relation


def _offsets(dx: float, dy: float) -> tuple[tuple[float, float], ...]:
    """(along, across) the axis of each relation, for the offset of the first object from the second; y downwards."""
    return (-dx, dy), (dx, dy), (-dy, dx), (dy, dx)


assert RELATIONS == ("left of", "right of", "above", "below")
