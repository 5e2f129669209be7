"""What a scorer is trained on: JSON lines of pairs, triplets or counts, all read as labelled pairs.

    {"prompt": ..., "images": [FIRST, SECOND], "label": 0.75}                        share of votes for the first
    {"prompt": ..., "images": [FIRST, SECOND], "label": {"aesthetic": 1, ...}}       one label for each aspect
    {"prompt": ..., "positive": IMAGE, "negative": IMAGE}                            a triplet with its prompt
    {"prompt": ..., "image": IMAGE, "count": 12, "exposure": 400}                    implicit feedback, see ``counts``

Images are files relative to the manifest. Other keys are ignored (provenance, say); a file holds one of the three
kinds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Pair:
    """Two images of a prompt. labels: aspect -> share for the first, in [0, 1]; "" is the aspect of a plain label."""

    prompt: str
    first: str
    second: str
    labels: Mapping[str, float]


def read(path: str | Path, **options: Any) -> list[Pair]:
    """The pairs of a manifest, with the files of their images.

    Args:
        path: a .jsonl file as above. options: of ``counts.pairs_of_counts``, for a file of counts.

    Raises:
        ValueError: no such file, a line that is none of the three, kinds that are mixed, an image that is not there.
    """
    from .counts import Counted, pairs_of_counts

    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"cannot read the manifest {str(file)!r} ({error}). Give a .jsonl file of pairs.") from error
    kinds: dict[str, list[Any]] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            kind, row = _line(line, file, number)
            kinds.setdefault(kind, []).append(row)
    if len(kinds) != 1:
        raise ValueError(
            f"got {' and '.join(kinds) or 'nothing'} in {str(file)!r}, expected lines of one kind. Split the file."
        )
    ((kind, rows),) = kinds.items()
    if kind != "counts":
        if options:
            raise ValueError(
                f"got options {options} for {kind} in {str(file)!r}, which are for counts. Leave them out."
            )
        return rows
    return pairs_of_counts([Counted(**row) for row in rows], **options)


def _line(line: str, file: Path, number: int) -> tuple[str, Any]:
    try:
        row = json.loads(line)
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            raise TypeError(f"prompt is {prompt!r}")
        if "positive" in row:
            return "triplets", Pair(prompt, _image(file, row["positive"]), _image(file, row["negative"]), {"": 1.0})
        if "images" in row:
            first, second = row["images"]
            return "pairs", Pair(prompt, _image(file, first), _image(file, second), _labels(row["label"]))
        counted = {"prompt": prompt, "image": _image(file, row["image"]), "count": float(row["count"])}
        return "counts", counted | ({"exposure": float(row["exposure"])} if "exposure" in row else {})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"got {line[:100]!r} in line {number} of {str(file)!r}, expected a pair (prompt, images, label), a triplet "
            f"(prompt, positive, negative) or a count (prompt, image, count, exposure): {error!r}. Correct the line."
        ) from error


def _labels(given: Any) -> dict[str, float]:
    labels = {str(k): v for k, v in given.items() if v is not None} if isinstance(given, Mapping) else {"": given}
    for aspect, label in labels.items():
        if isinstance(label, bool) or not isinstance(label, int | float) or not 0 <= label <= 1:
            raise ValueError(f"label {label!r} {aspect} is not in [0, 1]")
    if not labels:
        raise ValueError("no label")
    return {aspect: float(label) for aspect, label in labels.items()}


def _image(file: Path, name: Any) -> str:
    path = file.parent / name
    if not path.is_file():
        raise ValueError(f"there is no image {str(path)!r}")
    return str(path)


def aspects(pairs: Sequence[Pair]) -> list[str]:
    """The names of all aspects, in order; [""] for plain pairs.

    Raises:
        ValueError: plain labels beside named ones.
    """
    names = sorted({aspect for pair in pairs for aspect in pair.labels})
    if "" in names and len(names) > 1:
        raise ValueError(f"got plain labels beside those of {names[1:]}, expected one form. Name the aspect of all.")
    return names


def split(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(to learn from, held out) by prompt: one prompt is wholly on one side, the same whatever else is in the file."""

    def held_out(prompt: str) -> bool:
        digest = hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 < share

    return [p for p in pairs if not held_out(p.prompt)], [p for p in pairs if held_out(p.prompt)]


def fingerprint(pairs: Sequence[Pair]) -> str:
    """Hash of prompts, file names and labels in their order: whether a run goes on with the data that it began with."""
    rows = [[p.prompt, Path(p.first).name, Path(p.second).name, sorted(p.labels.items())] for p in pairs]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def prompt_weights(pairs: Sequence[Pair]) -> list[float]:
    """1 / number of pairs of the same prompt (PickScore's weights), scaled to mean 1."""
    count: dict[str, int] = {}
    for pair in pairs:
        count[pair.prompt] = count.get(pair.prompt, 0) + 1
    scale = len(pairs) / len(count) if count else math.nan
    return [scale / count[pair.prompt] for pair in pairs]
