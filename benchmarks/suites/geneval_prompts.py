"""The 553 prompts of GenEval, drawn anew from their seed.

Source: Ghosh et al. 2023 (arXiv 2310.11513, github.com/djghosh13/geneval). The six tasks are drawn in turn by one numpy
generator, 100 draws each (single objects: a permutation of the classes), and repeated records are dropped, which is why
the tasks differ in size. The result is compared with the digest of the released file, so that a change of numpy's
streams is an error and never another benchmark.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from flowrl.errors import UserError
from reward_models.detectors import COCO_CLASSES
from reward_models.geneval import RELATIONS
from reward_models.geneval_hf import COLOURS

SEED = 43
DRAWS = 100
SHA256 = "f23de0226e3f1136e39efa732c76a34ca7703686c30edd999019223c5fe9a98f"
NUMBERS = {2: "two", 3: "three", 4: "four"}

Record = dict[str, Any]
Rng = np.random.Generator


def article(words: str) -> str:
    """ "a cat", "an apple": by the letter alone, as in the benchmark."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(word: str) -> str:
    """As in the benchmark: "toothbrushs", "persons"."""
    return f"{word}es" if word.endswith("s") else f"{word}s"


def _object(name: str, **more: Any) -> Record:
    return {"class": name, "count": 1, **more}


def _pick(rng: Rng, options: tuple[str, ...], size: int, but_first: bool = False) -> list[str]:
    """`size` different ones; `but_first` leaves the first out (a person has no colour)."""
    numbers = rng.choice(len(options) - but_first, size=size, replace=False) + but_first
    return [options[number] for number in numbers]


def _one(rng: Rng, options: tuple[str, ...], but_first: bool = False) -> str:
    return options[rng.choice(len(options) - but_first) + but_first]


def _two_object(rng: Rng) -> Record:
    a, b = _pick(rng, COCO_CLASSES, 2)
    return {"include": [_object(a), _object(b)], "prompt": f"a photo of {article(a)} and {article(b)}"}


def _counting(rng: Rng) -> Record:
    name = _one(rng, COCO_CLASSES)
    count = int(rng.integers(2, 4, endpoint=True))
    return {
        "include": [{"class": name, "count": count}],
        "exclude": [{"class": name, "count": count + 1}],
        "prompt": f"a photo of {NUMBERS[count]} {plural(name)}",
    }


def _colors(rng: Rng) -> Record:
    name = _one(rng, COCO_CLASSES, but_first=True)
    colour = _one(rng, COLOURS)
    return {"include": [_object(name, color=colour)], "prompt": f"a photo of {article(colour)} {name}"}


def _position(rng: Rng) -> Record:
    a, b = _pick(rng, COCO_CLASSES, 2)
    relation = _one(rng, RELATIONS)
    return {
        "include": [_object(b), _object(a, position=[relation, 0])],
        "prompt": f"a photo of {article(a)} {relation} {article(b)}",
    }


def _color_attr(rng: Rng) -> Record:
    a, b = _pick(rng, COCO_CLASSES, 2, but_first=True)
    colour_a, colour_b = _pick(rng, COLOURS, 2)
    return {
        "include": [_object(a, color=colour_a), _object(b, color=colour_b)],
        "prompt": f"a photo of {article(colour_a)} {a} and {article(colour_b)} {b}",
    }


TASKS: dict[str, Callable[[Rng], Record]] = {
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}


def _draw() -> Iterator[Record]:
    rng = np.random.default_rng(SEED)
    for name in _pick(rng, COCO_CLASSES, len(COCO_CLASSES)):
        yield {"tag": "single_object", "include": [_object(name)], "prompt": f"a photo of {article(name)}"}
    for tag, draw in TASKS.items():
        seen: list[Record] = []
        for _ in range(DRAWS):
            record = {"tag": tag, **draw(rng)}
            if record not in seen:
                seen.append(record)
        yield from seen


@lru_cache(maxsize=1)
def lines() -> tuple[str, ...]:
    """The lines of the benchmark's metadata file.

    Raises:
        UserError: this numpy draws something else.
    """
    found = tuple(json.dumps(record) for record in _draw())
    if hashlib.sha256("\n".join(found).encode()).hexdigest() != SHA256:
        raise UserError(
            f"numpy {np.__version__} does not draw GenEval's 553 prompts from the seed; expected the streams of numpy "
            "1.17 to 2.4; give the benchmark's own file with --prompts evaluation_metadata.jsonl"
        )
    return found


def records() -> list[Record]:
    """One object per prompt: tag, include, perhaps exclude, prompt."""
    return [json.loads(line) for line in lines()]
