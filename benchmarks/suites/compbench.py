"""T2I-CompBench: eight categories of 300 prompts (Huang et al. 2023, arXiv 2307.06350).

Each category has a scorer of its own upstream: BLIP-VQA for colour, shape and texture, a detector with rules for 2D and
3D positions and for numbers, CLIP for the non-spatial ones, a mean of several for the complex ones. A category's number
is the mean over its images. The release has no overall number; the one here is the mean over categories. Images lie in
`<category>/<number>_<j>.png`: upstream the prompt is the file name, which breaks for prompts with "/" or "_".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.suites.sources import fetch
from benchmarks.suites.suite import Numbers, Suite, means
from flowrl.errors import UserError
from flowrl.prompts import Prompt, load_prompts
from flowrl.score_table import ScoreRow
from reward_models.compbench import CATEGORIES, complex_kind

COMPLEX = ("spatial", "action")  # lists of the complex prompts of which only some parts are scored


def prompts(source: str | None) -> list[Prompt]:
    """The prompts of `<category>_val.txt` in a folder; the complex ones with `complex_kind`."""
    if source is None:
        raise UserError(
            "t2i-compbench needs its prompt files; expected --prompts FOLDER with color_val.txt and the others, from "
            "examples/dataset of the repository Karine-Huang/T2I-CompBench"
        )
    lists = {kind: [p.text for p in load_prompts(str(fetch(source, f"complex_val_{kind}.txt")))] for kind in COMPLEX}
    found = []
    for category in CATEGORIES:
        for number, prompt in enumerate(load_prompts(str(fetch(source, f"{category}_val.txt")))):
            metadata = {"prompt": prompt.text, "tag": category, "number": number}
            if category == "complex":
                metadata["complex_kind"] = complex_kind(prompt.text, **lists)
            found.append(Prompt(prompt.text, metadata))
    return found


def file(metadata: Mapping[str, Any], index: int) -> str:
    """Where an image lies."""
    return f"{metadata['tag']}/{metadata['number']:05d}_{index}.png"


def numbers(rows: Sequence[ScoreRow], column: str) -> Numbers:
    """Each category's mean over images, and the mean over categories."""
    return means(rows, column, by_task=True)


SUITE = Suite("t2i-compbench", 10, prompts, file, numbers, size=2400, headline="mean of the category means")
