"""The prompts of the Shapes world: GenEval's six tasks over six shapes and eight colours.

Every prompt is a GenEval metadata dictionary: ``tag`` (the task), ``include`` (clauses with ``class``, ``count`` and
optionally ``color`` or ``position = [relation, index of an earlier clause]``), ``exclude`` and ``prompt``.
As in GenEval, "a A left of a B" lists B first, and a counting prompt excludes one more than it asks for.

Differences from GenEval: four phrasings instead of one ("a photo of", "a picture of", ...), and counting prompts may
carry a colour ("three red stars"), so that every task has enough prompts for an interval.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import permutations, product
from typing import Any

Metadata = dict[str, Any]

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SPLITS = ("train", "test", "held_out")
PHRASES = ("a photo of", "a picture of", "a drawing of", "an image of")
TEST_SHARE = 0.25  # of the seen contents of each task
NUMBERS = {2: "two", 3: "three", 4: "four"}


def article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _clause(shape: str, count: int = 1, colour: str | None = None, position: list | None = None) -> Metadata:
    clause: Metadata = {"class": shape, "count": count}
    if colour is not None:
        clause["color"] = colour
    if position is not None:
        clause["position"] = position
    return clause


def _name(clause: Metadata) -> str:
    return f"{clause['color']} {clause['class']}" if "color" in clause else clause["class"]


def describe(tag: str, include: list[Metadata]) -> str:
    """The words of a prompt after its phrase ("a red star and a blue circle")."""
    first = include[0]
    if tag == "counting":
        colour = f"{first['color']} " if "color" in first else ""
        return f"{NUMBERS[first['count']]} {colour}{plural(first['class'])}"
    if tag == "position":
        relation, target = include[1]["position"]
        return f"{article(_name(include[1]))} {relation} {article(_name(include[target]))}"
    return " and ".join(article(_name(clause)) for clause in include)


def _metadata(phrase: str, tag: str, include: list[Metadata]) -> Metadata:
    metadata: Metadata = {"tag": tag, "include": include, "prompt": f"{phrase} {describe(tag, include)}"}
    if tag == "counting":
        metadata["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
    return metadata


def _contents() -> list[tuple[str, list[Metadata]]]:
    pairs = list(permutations(SHAPES, 2))
    return [
        *(("single_object", [_clause(a)]) for a in SHAPES),
        *(("two_object", [_clause(a), _clause(b)]) for a, b in pairs),
        *(("counting", [_clause(a, n, c)]) for a, n, c in product(SHAPES, NUMBERS, (None, *COLOURS))),
        *(("colors", [_clause(a, 1, c)]) for a, c in product(SHAPES, COLOURS)),
        *(("position", [_clause(b), _clause(a, position=[r, 0])]) for (a, b), r in product(pairs, RELATIONS)),
        *(
            ("color_attr", [_clause(a, 1, c), _clause(b, 1, d)])
            for (a, b), (c, d) in product(pairs, permutations(COLOURS, 2))
        ),
    ]


def seen_colours(shape: str) -> tuple[str, ...]:
    """The colours in which a shape is seen in training; one colour of each shape is held out."""
    i = SHAPES.index(shape)
    return tuple(c for j, c in enumerate(COLOURS) if (3 * i + j) % len(COLOURS) != 0)


def has_held_out_combination(metadata: Metadata) -> bool:
    """Whether a prompt holds a combination that no model of the box has seen in training.

    Held out: one colour for each shape; the ordered pairs of shapes two places apart in ``SHAPES`` ("a A and a B",
    "a A above a B"; not where colours are attributed); and three of the eighteen (shape, count) pairs.
    """
    include = metadata["include"]
    for clause in include:
        shape = SHAPES.index(clause["class"])
        if "color" in clause and clause["color"] not in seen_colours(clause["class"]):
            return True
        if clause["count"] > 1 and (shape + clause["count"]) % 6 == 0:
            return True
    if metadata["tag"] in ("two_object", "position"):
        a, b = (SHAPES.index(clause["class"]) for clause in include)
        return (a - b) % len(SHAPES) == 2
    return False


def _digest(text: str, purpose: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=purpose).digest(), "big")


def _body(content: tuple[str, list[Metadata]]) -> str:
    return describe(*content)


@lru_cache(maxsize=1)
def _by_split() -> dict[str, tuple[Metadata, ...]]:
    """Splits are made of contents ("two red stars"): a test prompt is never a training prompt in other words."""
    train: list[Metadata] = []
    test: list[Metadata] = []
    held_out: list[Metadata] = []

    def once(content: tuple[str, list[Metadata]]) -> Metadata:
        return _metadata(PHRASES[_digest(_body(content), b"phrase") % len(PHRASES)], *content)

    for task in TASKS:
        contents = [content for content in _contents() if content[0] == task]
        held_out += [once(c) for c in contents if has_held_out_combination(_metadata("", *c))]
        seen = [c for c in contents if not has_held_out_combination(_metadata("", *c))]
        seen.sort(key=lambda content: _digest(_body(content), b"split"))
        cut = math.ceil(TEST_SHARE * len(seen))
        test += [once(content) for content in seen[:cut]]
        train += [_metadata(phrase, *content) for content in seen[cut:] for phrase in PHRASES]
    return {"train": tuple(train), "test": tuple(test), "held_out": tuple(held_out)}


def prompts(split: str, tasks: Sequence[str] | None = None, per_task: int | None = None) -> list[Metadata]:
    """All prompts of a split, in a fixed order that mixes the phrasings and combinations of a task.

    Args:
        split: "train" (three quarters of the contents that a model of the box has seen in pretraining, in every
            phrasing), "test" (the other seen contents, each in one phrasing: independent units for intervals) or
            "held_out" (contents with a combination that was never seen, each in one phrasing).
        tasks: the tasks to keep, default all of ``TASKS``.
        per_task: keep at most this many prompts of each task.

    Raises:
        ValueError: unknown split or task.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown Shapes split {split!r}; expected one of {', '.join(SPLITS)}")
    wanted = TASKS if tasks is None else tuple(tasks)
    if unknown := [task for task in wanted if task not in TASKS]:
        raise ValueError(f"unknown Shapes task {unknown[0]!r}; expected some of {', '.join(TASKS)}")
    chosen: list[Metadata] = []
    for task in TASKS:
        if task in wanted:
            found = [metadata for metadata in _by_split()[split] if metadata["tag"] == task]
            chosen += sorted(found, key=lambda metadata: _digest(metadata["prompt"], b"order"))[:per_task]
    return chosen


def seen_prompts(task: str) -> list[Metadata]:
    """The prompts of pretraining: every phrasing of every content of a task without a held-out combination."""
    everything = (_metadata(phrase, *content) for content in _contents() if content[0] == task for phrase in PHRASES)
    return [metadata for metadata in everything if not has_held_out_combination(metadata)]


_WORDS = {plural(s): s for s in SHAPES} | {s: s for s in SHAPES}
_NOUN = rf"(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})"
_COUNTED = re.compile(rf"({'|'.join(NUMBERS.values())}) (?:({'|'.join(COLOURS)}) )?({'|'.join(map(plural, SHAPES))})")
_ONE = re.compile(rf"an? {_NOUN}")
_TWO = re.compile(rf"an? {_NOUN} (and|{'|'.join(RELATIONS)}) an? {_NOUN}")


def parse(prompt: str) -> Metadata | None:
    """GenEval metadata of a prompt in the Shapes grammar (with or without its phrase), or None if it is not in it."""
    text = " ".join(prompt.lower().strip(" .").split())
    body = next((text[len(p) + 1 :] for p in PHRASES if text.startswith(p + " ")), text)
    if match := _COUNTED.fullmatch(body):
        number, colour, shape = match.groups()
        count = next(n for n, word in NUMBERS.items() if word == number)
        include = [_clause(_WORDS[shape], count, colour)]
        return {**_metadata("", "counting", include), "prompt": prompt}
    if match := _ONE.fullmatch(body):
        colour, shape = match.groups()
        tag = "colors" if colour else "single_object"
        return {"tag": tag, "include": [_clause(shape, 1, colour)], "prompt": prompt}
    if match := _TWO.fullmatch(body):
        colour_a, a, link, colour_b, b = match.groups()
        if link == "and":
            tag = "color_attr" if colour_a or colour_b else "two_object"
            include = [_clause(a, 1, colour_a), _clause(b, 1, colour_b)]
        else:
            tag, include = "position", [_clause(b, 1, colour_b), _clause(a, 1, colour_a, [link, 0])]
        return {"tag": tag, "include": include, "prompt": prompt}
    return None
