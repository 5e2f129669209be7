"""GenEval's results file beside the scores: what a detector found in each image, to be judged again anywhere."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from flowrl.errors import UserError
from flowrl.score_table import replace as write
from reward_models.geneval import Judgement, result_of
from reward_models.geneval_hf import KINDS, GenevalReward
from reward_models.geneval_stored import GenevalStoredReward, read_rows, row_of
from reward_models.protocol import Metadata, Reward, RewardResult

FILE = "results.jsonl"
DECISION = "geneval-stored"  # the kind that official files decide, too
OURS = ("number", "filename")  # metadata that is ours and not the benchmark's


def wrap(folder: Path, reward: Reward) -> Reward:
    """A reward with a detector writes what it finds to the folder's results file; one of stored detections reads it."""
    if isinstance(reward, GenevalReward):
        return Recording(reward, folder / FILE)
    if isinstance(reward, GenevalStoredReward):
        return FromFile(reward, folder / FILE)
    return reward


def by_image(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a results file by `00000/samples/0000.png`; the benchmark writes whatever folder lies before that.

    Raises:
        UserError: a line is not one of a results file.
    """
    try:
        return {"/".join(Path(row["filename"]).parts[-3:]): row for row in read_rows(path)}
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: {error}; expected a results file of GenEval; move it away or restore it") from error


class Recording:
    """A GenEval reward that also keeps its detections, in the benchmark's own form.

    Raises:
        UserError: the file there is another tool's.
    """

    def __init__(self, inner: GenevalReward, path: Path) -> None:
        self.inner, self.path, self.spec = inner, path, inner.spec
        self.rows = by_image(path) if path.exists() else {}
        if not all("colors" in row for row in self.rows.values()):  # which only we write
            raise UserError(
                f"{path} was written by another tool; expected none, or one of {inner.spec.name!r}, which writes its "
                "own there; move the file away, or score with geneval-stored, which reads it"
            )

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``."""
        judged = self.inner.judge(images, metadata)
        for given, (answer, colours) in zip(metadata, judged, strict=True):
            if isinstance(answer, Judgement):
                asked = {key: value for key, value in given.items() if key not in OURS}
                self.rows[given["filename"]] = row_of(given["filename"], asked, answer, colours)
        write(self.path, "".join(json.dumps(row) + "\n" for row in self.rows.values()))
        return result_of([answer for answer, _ in judged], KINDS, self.inner.kind)


class FromFile:
    """GenEval's decision from the folder's results file; an image that the file does not have is missing.

    The official file does not hold the colours that were seen: where the decision asks for them, it is the file's own.
    """

    def __init__(self, inner: GenevalStoredReward, path: Path) -> None:
        if not path.exists():
            raise UserError(
                f"{path} is not there; expected the detections, one row of GenEval's results per image; put the file "
                "there, or score with geneval-hf, which writes it"
            )
        self.inner, self.rows = inner, by_image(path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.spec = replace(inner.spec, version=f"{inner.spec.version}, detections {sha256[:16]}")

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``."""
        rows = [self.rows.get(given["filename"], {}) for given in metadata]
        absent = [row.get("prompt") != prompt for row, prompt in zip(rows, prompts, strict=True)]
        known: list[Metadata] = [{} if gone else row for row, gone in zip(rows, absent, strict=True)]
        result = self.inner.score(images, prompts, known, groups)
        for at in result.missing.nonzero().flatten().tolist():
            if absent[at]:
                result.reasons[at] = f"{FILE} has no row of this image and prompt"
            elif self.inner.kind == DECISION and isinstance(rows[at].get("correct"), bool):
                result.values[at] = float(rows[at]["correct"])
                result.reasons[at] = rows[at].get("reason") or None
        return result
