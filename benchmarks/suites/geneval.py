"""GenEval: objects, counts, colours, positions (Ghosh et al. 2023, arXiv 2310.11513), in its own folder layout.

The headline is the mean of the six task means over images, not the mean over images. Any reward that gives the official
decision (0 or 1) scores it: `geneval-hf` with its detector, `geneval-stored` from stored detections, or a detector of
the user's (`{geneval-hf: {detector: ...}}`). Images lie in `00000/samples/0000.png` beside `00000/metadata.jsonl`, so
that the original tool can read the folder, too. What a detector finds is written to `results.jsonl` in the benchmark's
form, and `geneval-stored` reads such a file, also an official one that was put there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.suites.geneval_prompts import records
from benchmarks.suites.geneval_results import OURS, wrap
from benchmarks.suites.suite import Numbers, Suite, means
from flowrl import score_table as table
from flowrl.errors import UserError
from flowrl.prompts import Prompt, load_prompts
from flowrl.score_table import ScoreRow
from flowrl.statistics import mean_ci


def prompts(source: str | None) -> list[Prompt]:
    """The 553 prompts, or those of a metadata file."""
    if source is None:
        found = [Prompt(record["prompt"], record) for record in records()]
    else:
        found = load_prompts(source)
    for prompt in found:
        if "tag" not in prompt.metadata or "include" not in prompt.metadata:
            raise UserError(
                f"{source}: {prompt.text!r} has no 'tag' and 'include'; expected GenEval's metadata, one JSON object "
                "per line; leave --prompts out for the 553 of the benchmark"
            )
    return [Prompt(prompt.text, {**prompt.metadata, "number": n}) for n, prompt in enumerate(found)]


def file(metadata: Mapping[str, Any], index: int) -> str:
    """Where an image lies."""
    return f"{metadata['number']:05d}/samples/{index:04d}.png"


def extra_files(metadata: Mapping[str, Any]) -> dict[str, str]:
    """`metadata.jsonl` of a prompt's folder."""
    record = {key: value for key, value in metadata.items() if key not in OURS}
    return {f"{metadata['number']:05d}/metadata.jsonl": json.dumps(record)}


def numbers(rows: Sequence[ScoreRow], column: str) -> Numbers:
    """The headline and each task; of decisions (0 or 1) also the shares of correct images and of prompts with one."""
    found = means(rows, column, by_task=True)
    if not {row["scores"][column] for row in rows} <= {0.0, 1.0, None}:
        return found
    best = [[_best([table.number(row, column) for row in group])] for group in table.by_prompt(rows)]
    return {
        **found,
        "correct_images": table.as_dict(table.estimate(rows, column, by_task=False)),
        "prompts_with_a_correct_image": table.as_dict(mean_ci(best)),
    }


def _best(values: Sequence[float]) -> float:
    return max((value for value in values if not math.isnan(value)), default=math.nan)


SUITE = Suite(
    "geneval", 4, prompts, file, numbers, "geneval-hf", extra_files, wrap, size=553, headline="mean of the task means"
)
