"""`flowrl reward bench`: label files of preference data sets, their images scored, and the numbers of `preferences`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.preference_judges import ask
from benchmarks.preferences import VOTES, Record, best_threshold, numbers, numbers_of_judge, preference
from flowrl import score_table as table
from flowrl.errors import UserError
from flowrl.images import Item
from flowrl.runlog import read_jsonl


# -------------------------------------------------------------------------------------------------------------- formats
def _imagereward(row: Mapping[str, Any]) -> Record:
    """`prompt`, `generations` (files), `ranking` (1 is best, ties allowed)."""
    return Record(row["prompt"], tuple(row["generations"]), tuple(-float(rank) for rank in row["ranking"]))


def _hpdv2(row: Mapping[str, Any]) -> Record:
    """`prompt`, `image_path` (files), `rank` (less is better)."""
    return Record(row["prompt"], tuple(row["image_path"]), tuple(-float(rank) for rank in row["rank"]))


def _pickapic(row: Mapping[str, Any]) -> Record:
    """`caption`, `image_0`, `image_1` (files; default: uids with .jpg), `label_0`, `label_1` (1, 0, or 0.5 each)."""
    files = tuple(row[f"image_{i}"] if f"image_{i}" in row else f"{row[f'image_{i}_uid']}.jpg" for i in (0, 1))
    return Record(row["caption"], files, (float(row["label_0"]), float(row["label_1"])))


def _genai(row: Mapping[str, Any]) -> Record:
    """`prompt`, `left_image`, `right_image` (files), `vote_type` (leftvote, rightvote, tievote or bothbad_vote)."""
    return Record(row["prompt"], (row["left_image"], row["right_image"]), VOTES[row["vote_type"]])


def _genai_cmu(row: Mapping[str, Any]) -> Record:
    """`prompt`, `images` (files), `human` (per image the mean score, or a list of scores)."""
    return Record(row["prompt"], tuple(row["images"]), tuple(float(np.mean(score)) for score in row["human"]))


FORMATS: dict[str, Callable[[Mapping[str, Any]], Record]] = {
    "imagereward": _imagereward,
    "hpdv2": _hpdv2,
    "pickapic": _pickapic,
    "genai": _genai,
    "genai-cmu": _genai_cmu,
}


def read(form: str, path: Path) -> list[Record]:
    """The records of a .json (a list) or .jsonl file in one of FORMATS.

    Raises:
        UserError: unknown format, or a row without what it needs.
    """
    if form not in FORMATS:
        raise UserError(f"got the format {form!r}; expected one of {', '.join(FORMATS)}")
    try:
        rows = read_jsonl(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; expected a .json or .jsonl file of labels") from error
    records = []
    for number, row in enumerate(rows, start=1):
        try:
            record = FORMATS[form](row)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}, record {number}: {type(error).__name__} {error}; expected {form}: {FORMATS[form].__doc__}"
            ) from error
        if len(record.images) != len(record.labels) or len(record.images) < 2:
            raise UserError(
                f"{path}, record {number}: {len(record.images)} images and {len(record.labels)} labels; expected as "
                "many of one as of the other, at least two"
            )
        records.append(record)
    if not records:
        raise UserError(f"{path} holds no records; expected at least one")
    return records


# ------------------------------------------------------------------------------------------------------------------ run
def run(
    form: str, labels: Path, images: Path, reward: str, out: Path, *, validation: Path | None = None,
    scale: float = 1.0, limit: int | None = None, device: str = "auto", say: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Score the images of the labels (resumed in `out`) and write and return the summary: numbers for each scorer.

    A reward that is the win rate of a judge is asked for its judge's verdicts on all pairs, in both orders. Without
    `validation`, equal scores alone are a tie for pickapic.

    Raises:
        UserError: unreadable labels, missing images, validation data that the rule has no use for.
    """
    from flowrl.commands.scoring import load_rewards, score_items
    from flowrl.summary import write_summary
    from reward_models.judges.win_rate import WinRate

    if form != "pickapic" and (validation is not None or scale != 1):
        raise UserError(f"got --validation or --scale with {form}; expected them with pickapic; leave them out")
    records = _limited(read(form, labels), limit)
    tuning = read(form, validation) if validation is not None else []
    found, names = _items([*records, *tuning], images)
    loaded = load_rewards(reward, device)
    judges = {name: each.judge for name, each in loaded.items() if isinstance(each, WinRate)}
    rewards = {name: each for name, each in loaded.items() if name not in judges}
    specs = {name: table.spec_dict(judge.spec) for name, judge in judges.items()}
    rows: dict[str, table.ScoreRow] = {}
    if rewards:
        done = score_items(found, rewards, out / "scores.jsonl")
        say(done.throughput())
        rows, specs = {row["image"]: row for row in done.rows}, specs | done.columns
    summary: dict[str, Any] = {
        "benchmark": f"preferences {form}", "labels": str(labels), "complete": limit is None, "rewards": specs,
        "scores": {},
    }  # fmt: skip
    for name, judge in judges.items():
        verdicts = ask(judge, records, images, out / f"pairs_{re.sub(r'[^A-Za-z0-9_-]+', '_', name)}.jsonl")
        summary["scores"][name] = numbers_of_judge(form, records, verdicts)
    for name, scorer in rewards.items():
        sign = 1 if scorer.spec.higher_is_better else -1

        def scores(some: Sequence[Record], name: str = name, sign: int = sign) -> list[list[float]]:
            return [[sign * table.number(rows[names[file, r.prompt]], name) for file in r.images] for r in some]

        threshold = 0.0
        if tuning:
            differences = [preference(each, scale) for each in scores(tuning)]
            threshold = best_threshold([record.labels for record in tuning], differences)
        summary["scores"][name] = numbers(form, records, scores(records), threshold=threshold, scale=scale)
    write_summary(out, summary)
    return summary


def _limited(records: list[Record], limit: int | None) -> list[Record]:
    """The records of the first `limit` prompts."""
    prompts = list(dict.fromkeys(record.prompt for record in records))[:limit]
    return [record for record in records if record.prompt in set(prompts)]


def _items(records: Sequence[Record], folder: Path) -> tuple[list[Item], dict[tuple[str, str], str]]:
    """Each image with each of its prompts once, and the name under which (file, prompt) is in the table of scores."""
    prompts: dict[str, int] = {}
    names: dict[tuple[str, str], str] = {}
    used: dict[str, int] = {}
    found = []
    for record in records:
        number = prompts.setdefault(record.prompt, len(prompts))
        for file in record.images:
            if (file, record.prompt) in names:
                continue
            if not (folder / file).is_file():
                raise UserError(f"{folder / file} is missing; expected every image of the labels; give --images FOLDER")
            used[file] = used.get(file, 0) + 1
            name = file if used[file] == 1 else f"{file}#{used[file]}"
            names[file, record.prompt] = name
            found.append(Item(name, folder / file, record.prompt, number, 0, {"prompt": record.prompt}))
    return found, names


ESTIMATES = (
    "accuracy", "micro", "macro", "ties_wrong", "invalid_wrong", "kendall_tau_b", "pearson", "flipped", "position_bias",
)  # fmt: skip


def brief(summary: Mapping[str, Any]) -> list[str]:
    """The main numbers as lines for a terminal."""
    lines = []
    for name, value in summary["scores"].items():
        lines.append(f"{name}: {value['rule']}")
        for key in ESTIMATES:
            if key in value and value[key]["mean"] is not None:
                low, high = (f"{end:.4f}" if end is not None else "–" for end in value[key]["ci95"])
                lines.append(f"  {key:<16}{value[key]['mean']:.4f}   95 % interval {low} to {high}")
        shares = ", ".join(
            f"{value[key]:.1%} {key.replace('_', ' ')}" for key in ("label_ties", "predicted_ties", "invalid")
        )
        at = f"; threshold of a tie {value['threshold']:g}" if "threshold" in value else ""
        lines.append(f"  {value['pairs']} pairs: {shares}{at}")
    return lines
