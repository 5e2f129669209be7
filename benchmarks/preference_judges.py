"""Judges on preference data: every pair of a record in both orders, kept on disk, and asked again where it failed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.preferences import Record, Verdicts
from flowrl.images import Unreadable, read_image
from flowrl.runlog import read_jsonl
from flowrl.score_table import append

if TYPE_CHECKING:
    import torch

    from reward_models.judges.pairwise import PairJudge

RECORDS = 32  # asked together, so that an endpoint has questions for all its workers


def ask(judge: PairJudge, records: Sequence[Record], folder: Path, store: Path) -> list[Verdicts]:
    """A judge's verdicts on all pairs of each record, from the file `store` where they are there already.

    folder: to which the images' names are relative. A record with an image that cannot be read has no verdict.
    """
    version = judge.spec.version
    known = {_key(row): row for row in read_jsonl(store) if row["judge"] == version and not any(row["reasons"])}
    open_ = [record for record in dict.fromkeys(records) if (record.prompt, record.images) not in known]
    store.parent.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(open_), RECORDS):
        rows = list(_asked(judge, open_[start : start + RECORDS], folder))
        append(store, rows)
        known |= {_key(row): row for row in rows}
    return [_verdicts(known[record.prompt, record.images]) for record in records]


def _key(row: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    return row["prompt"], tuple(row["images"])


def _verdicts(row: dict[str, Any]) -> Verdicts:
    columns = [row[key] for key in ("preference", "flips", "bias", "good")]
    return Verdicts(*(each and tuple(math.nan if x is None else x for x in each) for each in columns))


def _asked(judge: PairJudge, records: Sequence[Record], folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each record; those whose images have one size are asked together, so that a judge gets one tensor."""
    import torch

    from reward_models.judges.pairwise import judge_pairs

    by_size: dict[frozenset[tuple[int, ...]], list[tuple[Record, list[torch.Tensor]]]] = {}
    for record in records:
        try:
            images = [read_image(folder / name) for name in record.images]
        except Unreadable as reason:
            yield _row(judge, record, str(reason))
            continue
        by_size.setdefault(frozenset(tuple(image.shape) for image in images), []).append((record, images))
    for sizes, some in by_size.items():
        shown = [image for _, images in some for image in images]
        pixels = torch.stack(shown) if len(sizes) == 1 else shown
        prompts = [record.prompt for record, images in some for _ in images]
        starts = torch.tensor([0, *(len(images) for _, images in some)]).cumsum(0).tolist()
        pairs = [
            [(start + i, start + j) for i, j in combinations(range(len(images)), 2)]
            for start, (_, images) in zip(starts[:-1], some, strict=True)
        ]
        found = judge_pairs(judge, pixels, sum(pairs, start=[]), prompts, [{"prompt": prompt} for prompt in prompts])
        at = 0
        for (record, _), own in zip(some, pairs, strict=True):
            part = slice(at, at := at + len(own))
            columns = {"preference": found.preference, "flips": found.flips, "bias": found.bias, "good": found.good}
            yield _row(judge, record, None) | {
                **{
                    key: [None if math.isnan(x) else x for x in values[part].tolist()]
                    for key, values in columns.items()
                    if values is not None
                },
                "reasons": found.reasons[part],
            }


def _row(judge: PairJudge, record: Record, reason: str | None) -> dict[str, Any]:
    pairs = math.comb(len(record.images), 2)
    return {
        "prompt": record.prompt, "images": list(record.images), "judge": judge.spec.version,
        "preference": [None] * pairs, "flips": [None] * pairs, "bias": [None] * pairs, "good": None,
        "reasons": [reason] * pairs,
    }  # fmt: skip
