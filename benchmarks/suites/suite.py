"""What a prompt suite is, and its three steps over one folder: generate, score, report.

Each step can be run alone, again, or on a folder that something else filled: `generate` draws the images that are not
there, `score` scores those without a score, `report` reads nothing but the scores. The folder holds

    benchmark.json   which prompts, how many images, how they were drawn; another measurement is refused
    samples.jsonl    one line per image: file, prompt, metadata, its number
    (images)         where the benchmark wants them
    scores.jsonl     see `flowrl.score_table`
    summary.json, report.md, report.html
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl import score_table as table
from flowrl.errors import UserError
from flowrl.images import LISTING, SUFFIXES, Item, check_entry, items
from flowrl.prompts import Prompt
from flowrl.runlog import read_jsonl
from flowrl.score_table import ScoreRow

if TYPE_CHECKING:
    from flowrl.commands.scoring import Scored
    from flowrl.policies import Policy
    from flowrl.sampling import SampleSettings
    from reward_models.protocol import Reward

SCORES = "scores.jsonl"
FACTS = "benchmark.json"
Numbers = dict[str, Any]  # name -> an estimate as `table.as_dict` gives it, a plain number, or a dictionary of these


@dataclass(frozen=True)
class Suite:
    """A benchmark of prompts.

    Attributes:
        name: as in `flowrl bench NAME`.
        images: images per prompt that the benchmark asks for.
        prompts: from what `--prompts` says (or None) to all prompts; each with a `tag` (its task or category) and a
            `number` (which gives it its place in the folder) in the metadata.
        file: (metadata, image number) -> where the image lies in the folder, ending in .png.
        numbers: (rows, column) -> what the report says about one column of scores; "overall" is the headline.
        reward: scored with, unless told otherwise; None: the user must choose.
        extra_files: metadata -> {file: content} that belong to a prompt in the benchmark's layout.
        wrap: (folder, reward) -> the reward as it is used there.
        size: prompts that the benchmark has; None: any number.
        headline: what "overall" is, in words.
    """

    name: str
    images: int
    prompts: Callable[[str | None], list[Prompt]]
    file: Callable[[Mapping[str, Any], int], str]
    numbers: Callable[[Sequence[ScoreRow], str], Numbers]
    reward: str | None = None
    extra_files: Callable[[Mapping[str, Any]], Mapping[str, str]] = lambda metadata: {}
    wrap: Callable[[Path, Reward], Reward] = lambda folder, reward: reward
    size: int | None = None
    headline: str = "mean of all images"


# ------------------------------------------------------------------------------------------------------------- generate
def prepare(
    suite: Suite, folder: Path, *, source: str | None, limit: int | None, images: int | None, drawn: Mapping[str, Any]
) -> None:
    """Write the listing of all images of a measurement, or check that the folder's listing is that of the same one.

    drawn: how the images come about (policy, steps, ...); empty for images from elsewhere, which must be there.

    Raises:
        UserError: the folder holds another measurement, or images from elsewhere are missing; nothing is written then.
    """
    prompts = spread(suite.prompts(source), limit)
    count = images or suite.images
    rows = []
    for prompt in prompts:
        for index in range(count):
            name = _existing(folder, suite.file(prompt.metadata, index))
            # the name is metadata, too: GenEval's detections are kept under it
            rows.append({**prompt.metadata, "image": name, "filename": name, "index": index})
            check_entry(rows[-1])
    listing = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    texts = json.dumps([prompt.metadata for prompt in prompts], sort_keys=True)
    facts = {
        "benchmark": suite.name,
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        "images_per_prompt": count,
        "complete": count >= suite.images and limit is None and suite.size in (None, len(prompts)),
        "drawn": dict(drawn),
    }
    old = read_jsonl(folder / LISTING) if (folder / FACTS).exists() else []
    if len(_lacking(folder, old)) < len(old):  # settings with which nothing was drawn (a wrong policy) settle nothing
        there = read_facts(folder)
        for key in facts:
            if facts[key] != there.get(key):
                raise UserError(
                    f"{folder} holds another measurement: {key} is {there.get(key)!r} there and {facts[key]!r} now; "
                    "expected the same settings to go on with it; choose another --out"
                )
    elif drawn and (strange := [row["image"] for row in rows if (folder / row["image"]).is_file()]):
        raise UserError(
            f"{folder} holds images that were drawn by something else, such as {strange[0]}; expected a new folder; "
            "choose another --out, or leave the policy out to measure what is there"
        )
    if not drawn:
        _check_there(folder, rows)
    table.make_folder(folder)
    for prompt in prompts:
        for name, content in suite.extra_files(prompt.metadata).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            table.replace(folder / name, content)
    table.replace(folder / LISTING, listing)
    table.replace(folder / FACTS, json.dumps(facts, indent=1) + "\n")


def read_facts(folder: Path, suite: Suite | None = None) -> dict[str, Any]:
    """What `prepare` wrote, of this suite."""
    try:
        found: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no {FACTS}; expected the folder of a benchmark; run its first step") from error
    except ValueError as error:
        raise UserError(f"{folder / FACTS} is damaged ({error}); expected JSON; restore it, or start anew") from error
    if suite is not None and found["benchmark"] != suite.name:
        raise UserError(f"{folder} holds {found['benchmark']!r}; expected {suite.name!r}; choose another --out")
    return found


def generate(
    folder: Path, policy: Policy, settings: SampleSettings, say: Callable[[str], None] = lambda line: None
) -> int:
    """Draw the images of the listing that are not there; returns how many.

    An image depends on its prompt, its number and the settings alone, so a folder that was filled in several goes is
    the folder that one go would have filled.
    """
    from flowrl.commands.progress import Progress
    from flowrl.sampling import generate as draw

    tell = Progress(say, len(missing(folder)), "missing images drawn")
    settings = replace(settings, images_per_prompt=read_facts(folder)["images_per_prompt"])
    by_prompt: dict[Any, list[dict[str, Any]]] = {}
    for row in read_jsonl(folder / LISTING):
        by_prompt.setdefault((row["prompt"], os.path.dirname(row["image"]), row["number"]), []).append(row)
    groups = list(by_prompt.values())
    texts = [group[0]["prompt"] for group in groups]
    drawn = 0
    for start, end in _gaps([all((folder / row["image"]).is_file() for row in group) for group in groups]):
        for at, pictures in draw(policy, texts[start:end], settings, "bench", before=texts[:start]):
            for row in groups[start + at]:
                if not (folder / row["image"]).is_file():
                    _save(folder / row["image"], pictures[row["index"]])
                    drawn += 1
            tell(drawn)
    return drawn


def _save(path: Path, picture: Any) -> None:
    """One PNG in one step, so that a file which is there is whole."""
    from flowrl.sheets import to_pil

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    to_pil(picture).save(part, "PNG")
    os.replace(part, path)


def _gaps(done: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of False."""
    start = None
    for at, there in enumerate([*done, True]):
        if not there and start is None:
            start = at
        elif there and start is not None:
            yield start, at
            start = None


def _existing(folder: Path, name: str) -> str:
    """The same with the suffix of a file that is there: images from elsewhere may be JPEGs."""
    if (folder / name).is_file():
        return name
    other = [name.removesuffix(".png") + suffix for suffix in SUFFIXES]
    return next((each for each in other if (folder / each).is_file()), name)


def spread(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """At most `limit` prompts, taken in turn from each tag, in their old order."""
    if limit is None:
        return list(prompts)
    by_tag: dict[Any, list[int]] = {}
    for at, prompt in enumerate(prompts):
        by_tag.setdefault(prompt.metadata.get("tag"), []).append(at)
    in_turn = [at for turn in zip_longest(*by_tag.values()) for at in turn if at is not None]
    return [prompts[at] for at in sorted(in_turn[:limit])]


# ---------------------------------------------------------------------------------------------------------------- score
def listed(folder: Path) -> list[Item]:
    """The images of a folder; each must be there.

    Raises:
        UserError: images are missing. A benchmark over what happens to be there would be another benchmark.
    """
    read_facts(folder)
    rows = read_jsonl(folder / LISTING)
    _check_there(folder, rows)
    return items(folder, rows, LISTING)


def _check_there(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    if lacking := _lacking(folder, rows):
        raise UserError(
            f"{folder}: {len(lacking)} images are missing, such as {lacking[0]}; expected all of them; run the step "
            "`generate` with a policy, or put them there"
        )


def missing(folder: Path) -> list[str]:
    """The images of the listing that are not there."""
    return _lacking(folder, read_jsonl(folder / LISTING))


def _lacking(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [row["image"] for row in rows if not (folder / row["image"]).is_file()]


def tags(folder: Path) -> list[str]:
    """The tasks of the listing."""
    return list(dict.fromkeys(str(row["tag"]) for row in read_jsonl(folder / LISTING) if row.get("tag") is not None))


def score(folder: Path, rewards: Mapping[str, Reward], say: Callable[[str], None] = lambda line: None) -> Scored:
    """Score the images of a folder with each reward (a column each)."""
    from flowrl.commands.scoring import score_items

    return score_items(listed(folder), rewards, folder / SCORES, say=say)


# --------------------------------------------------------------------------------------------------------------- report
def report(suite: Suite, folder: Path) -> dict[str, Any]:
    """Compute every number of a scored folder and write summary.json, report.md and report.html.

    Raises:
        UserError: nothing is scored, or not every image.
    """
    from benchmarks.suites.pages import write_pages
    from flowrl import __version__
    from flowrl.summary import write_summary

    facts = read_facts(folder, suite)
    columns, rows = table.read(folder / SCORES)
    listing = {row["image"] for row in read_jsonl(folder / LISTING)}
    if not rows:
        raise UserError(f"{folder} holds no scores; expected {SCORES}; run the step `score` first")
    for name in columns:
        if lacking := listing - {row["image"] for row in rows if name in row["scores"]}:
            raise UserError(
                f"{folder}: {len(lacking)} of {len(listing)} images have no {name!r} yet, such as {min(lacking)}; "
                "expected all of them; run the step `score` again"
            )
    summary = {
        "flowrl": __version__,
        **facts,
        "images": len(rows),
        "headline": suite.headline,
        "rewards": columns,
        "scores": {name: _numbers(suite, rows, name) for name in columns},
    }
    write_summary(folder, summary)
    write_pages(folder, summary, rows)
    return summary


def _numbers(suite: Suite, rows: Sequence[ScoreRow], name: str) -> Numbers:
    missing = sum(row["scores"][name] is None for row in rows)
    return {**suite.numbers(rows, name), "missing": missing, "missing_share": missing / len(rows)}


def means(rows: Sequence[ScoreRow], column: str, *, by_task: bool = False, scale: float = 1.0) -> Numbers:
    """The numbers that every suite has: `overall` (mean over images, or of the task means), and each tag's mean.

    Where a task has no score at all there is no mean of the task means: that of the others is another number.
    """
    tasks = grouped(rows, column, [row["tag"] for row in rows], scale)
    whole = not by_task or all(task["mean"] is not None for task in tasks.values())
    return {
        "overall": table.as_dict(table.estimate(rows if whole else [], column, by_task=by_task, scale=scale)),
        "tasks": tasks,
    }


def grouped(rows: Sequence[ScoreRow], column: str, labels: Sequence[str | None], scale: float = 1.0) -> Numbers:
    """Of each label (None: of no group) the mean over its images, with its interval over prompts."""
    groups: dict[str, list[ScoreRow]] = {}
    for row, label in zip(rows, labels, strict=True):
        if label is not None:
            groups.setdefault(label, []).append(row)
    return {
        label: table.as_dict(table.estimate(some, column, by_task=False, scale=scale)) for label, some in groups.items()
    }
