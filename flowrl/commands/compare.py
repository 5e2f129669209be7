"""`flowrl compare A B`: two sets of scored images, pair by pair.

Images are paired by prompt and seed, or by prompt and file name where that gives more pairs, or by prompt and order
where neither gives any; what the two of a pair have in common (the difficulty of a prompt, the noise) cancels. Numbers:
the mean of B - A with its interval over prompts, and the share of pairs that B wins (a tie is half a win), of all pairs
and of each task. Headlines are means of the task means where every image has a task.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowrl import score_table as table
from flowrl.errors import UserError
from flowrl.statistics import paired_diff_ci, task_mean_ci
from flowrl.summary import ROW_FILES

OUTPUTS = (".md", ".html", ".json")
HEADS = ("score", "of", "pairs", "A", "B", "B - A", "95 % interval", "B wins", "95 % interval")
CARDS = 12  # pairs of pictures shown on the page for each end of the first score
Key = tuple[str, int | str, int]  # prompt, seed or file, and how often these two came before


@dataclass(frozen=True)
class Image:
    """One scored image: its prompt, task, numbers (NaN: missing) and picture."""

    prompt: str
    tag: str | None
    numbers: dict[str, float]
    path: Path | None = None


@dataclass(frozen=True)
class Side:
    """The images of one side by key, and the specs of their scores where they are known."""

    name: str
    by_seed: dict[Key, Image]
    by_file: dict[Key, Image]
    by_order: dict[Key, Image]
    specs: Mapping[str, table.Spec] = field(default_factory=dict)


def read_side(source: str | Path) -> Side:
    """A scored folder, a score table, the folder of a run (its last evaluation) or one of its evaluation files.

    Raises:
        UserError: there are no scores.
    """
    path = Path(source)
    if path.is_dir():
        candidates = [path / "scores.jsonl", path / ROW_FILES["after"], path / "images.jsonl"]
        found = next((each for each in candidates if each.is_file()), None)
    else:
        found = path if path.is_file() and path.suffix == ".jsonl" else None
    specs, rows = ({}, []) if found is None else table.read(found)
    if found is None or not rows:
        raise UserError(
            f"{source} has no scores; expected a folder that `flowrl score` or `flowrl bench` scored, a scores.jsonl, "
            "the folder of a finished run, or its eval_before.jsonl"
        )
    side = Side(str(source), {}, {}, {}, specs)
    counts: Counter[object] = Counter()
    for row in map(dict[str, Any], rows):  # of a table of scores or of an evaluation
        prompt, file, seed = row["prompt"], row.get("image") or row.get("path"), row.get("seed_index")
        image = Image(prompt, row.get("tag"), _numbers(row), found.parent / file if file else None)
        side.by_order[prompt, counts[prompt], 0] = image
        counts[prompt] += 1
        if seed is not None:
            side.by_seed[prompt, seed, counts[prompt, seed]] = image
            counts[prompt, seed] += 1
        if file:
            side.by_file[prompt, file, 0] = image
    return side


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    both = {**row["scores"], **(row.get("judge") or {})}
    return {name: math.nan if value is None else float(value) for name, value in both.items()}


def pairs(a: Side, b: Side) -> list[tuple[Image, Image]]:
    """The images that both sides have: by seed, or by file where that gives more pairs, or else by order.

    Raises:
        UserError: none.
    """
    by_seed, by_file, by_order = (
        [(one[key], two[key]) for key in one if key in two]
        for one, two in ((a.by_seed, b.by_seed), (a.by_file, b.by_file), (a.by_order, b.by_order))
    )
    found = max(by_seed, by_file, key=len) or by_order
    if not found:
        raise UserError(
            f"{a.name} and {b.name} have no image in common; expected the same prompts and seeds (or files) in both"
        )
    return found


def compared(a: Side, b: Side, names: Sequence[str] = ()) -> dict[str, Any]:
    """All numbers: for each score `all` and, where images have tasks, each task.

    Raises:
        UserError: no common score, an unknown name, or scores of two versions of a reward.
    """
    both = pairs(a, b)
    known = [list(dict.fromkeys(name for pair in both for name in pair[side].numbers)) for side in (0, 1)]
    common = [name for name in known[0] if name in known[1]]
    if missing := [name for name in names if name not in common]:
        raise UserError(f"no score {missing[0]!r} in both; expected one of {', '.join(common) or '(none in common)'}")
    if not common:
        raise UserError(f"{a.name} and {b.name} have no score in common; expected one; score both with the same reward")
    scores = {}
    for name in names or common:
        if name in a.specs and name in b.specs and a.specs[name] != b.specs[name]:
            raise UserError(
                f"{name!r} is not the same reward in {a.name} and {b.name} (their specs differ); expected the same; "
                "score one of them again"
            )
        spec = a.specs.get(name) or b.specs.get(name) or {}
        scores[name] = _one_score(both, name, bool(spec.get("higher_is_better", True)))
    alone = len(a.by_order) + len(b.by_order) - 2 * len(both)
    return {"a": a.name, "b": b.name, "pairs": len(both), "unpaired": alone, "scores": scores}


def _one_score(both: Sequence[tuple[Image, Image]], name: str, higher: bool) -> dict[str, Any]:
    tags = list(dict.fromkeys(old.tag for old, _ in both))
    groups: dict[str, list[tuple[Image, Image]]] = {"all": list(both)}
    if None not in tags and len(tags) > 1:
        groups |= {str(tag): [pair for pair in both if pair[0].tag == tag] for tag in tags}
    return {group: _numbers_of(some, name, higher) for group, some in groups.items()} | {"higher_is_better": higher}


def _numbers_of(both: Sequence[tuple[Image, Image]], name: str, higher: bool) -> dict[str, Any]:
    by_prompt: dict[tuple[str, str | None], list[tuple[float, float]]] = {}  # two tasks may share a text
    for old, new in both:
        pair = (old.numbers.get(name, math.nan), new.numbers.get(name, math.nan))
        whole = not any(map(math.isnan, pair))  # both means are over the same pairs
        by_prompt.setdefault((old.prompt, old.tag), []).append(pair if whole else (math.nan, math.nan))
    tags = [tag for _, tag in by_prompt]
    tasks = [str(tag) for tag in tags] if all(tags) else [""] * len(tags)
    groups = list(by_prompt.values())
    before, after = ([[pair[side] for pair in group] for group in groups] for side in (0, 1))
    wins = [[win(*pair, higher=higher) for pair in group] for group in groups]
    return {
        "pairs": sum(not math.isnan(value) for group in wins for value in group),
        "a": table.as_dict(task_mean_ci(before, tasks)),
        "b": table.as_dict(task_mean_ci(after, tasks)),
        "difference": table.as_dict(paired_diff_ci(before, after, tasks)),
        "win_share": table.as_dict(task_mean_ci(wins, tasks)),
    }


def win(a: float, b: float, *, higher: bool = True) -> float:
    """1 if b is better, 0 if a is, 0.5 for a tie, NaN if one is missing."""
    if math.isnan(a) or math.isnan(b):
        return math.nan
    return 0.5 if a == b else float((b > a) == higher)


# ---------------------------------------------------------------------------------------------------------------- pages
def compare(a: str, b: str, *, names: Sequence[str] = (), outs: Sequence[Path] = ()) -> str:
    """Compare, write what `outs` ask for, and return the table as Markdown."""
    for out in outs:
        if out.suffix not in OUTPUTS:
            raise UserError(f"got --out {out}; expected a name that ends in {', '.join(OUTPUTS)}")
        table.make_folder(out.parent)
    left, right = read_side(a), read_side(b)
    found = compared(left, right, names)
    writers: dict[str, Callable[[], str]] = {
        ".md": lambda: markdown(found),
        ".json": lambda: json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        ".html": lambda: page(found, pairs(left, right)),
    }
    for out in outs:
        table.replace(out, writers[out.suffix]())
    return markdown(found)


def lines(found: Mapping[str, Any]) -> list[list[str]]:
    """One line per score and task."""
    rows = []
    for name, groups in found["scores"].items():
        for group, value in _groups(groups):
            both = [_mean(value["a"]), _mean(value["b"])]
            rows.append([name, group, str(value["pairs"]), *both, *_cells(value["difference"], "+"),
                         *_cells(value["win_share"])])  # fmt: skip
    return rows


def _groups(score: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """`all` and the tasks of a score."""
    return [(name, value) for name, value in score.items() if name != "higher_is_better"]


def _mean(number: Mapping[str, Any], sign: str = "") -> str:
    return "–" if number["mean"] is None else f"{number['mean']:{sign}.4f}"


def _cells(number: Mapping[str, Any], sign: str = "") -> list[str]:
    low, high = number["ci95"]
    return [_mean(number, sign), "–" if low is None else f"{low:{sign}.4f} to {high:{sign}.4f}"]


def lead(found: Mapping[str, Any]) -> str:
    """What was compared."""
    return (
        f"A: {found['a']}. B: {found['b']}. {found['pairs']} pairs of images; {found['unpaired']} images without a "
        "partner are left out. Intervals are bootstrap over prompts."
    )


def markdown(found: Mapping[str, Any]) -> str:
    """The comparison as a Markdown table."""
    return f"{lead(found)}\n\n{table.markdown(HEADS, lines(found))}"


def page(found: Mapping[str, Any], both: Sequence[tuple[Image, Image]]) -> str:
    """A self-contained page with the pairs that differ most in the first score."""
    from flowrl.pages import card, means_chart, render

    name = next(iter(found["scores"]))
    better = 1 if found["scores"][name]["higher_is_better"] else -1

    def gain(old: Image, new: Image) -> float:
        return better * (new.numbers.get(name, math.nan) - old.numbers.get(name, math.nan))

    ranked = sorted((each for each in both if abs(gain(*each)) > 0), key=lambda each: -gain(*each))
    sections = []
    for title, some in (
        (f"Where B gains most by {name}", [each for each in ranked if gain(*each) > 0][:CARDS]),
        (f"Where B loses most by {name}", [each for each in ranked[::-1] if gain(*each) < 0][:CARDS]),
    ):
        cards = [
            card(old.prompt, *((image.path, [f"{side}: {image.numbers[name]:.4f}"])
                               for side, image in (("A", old), ("B", new))))
            for old, new in some
            if old.path is not None or new.path is not None
        ]  # fmt: skip
        if cards:
            sections.append({"title": title, "cards": cards})
    drawn = [
        (f"{score}: B - A", means_chart({group: value["difference"] for group, value in _groups(groups)}, zero=True))
        for score, groups in found["scores"].items()
    ]
    return render(
        title="Comparison", lead=lead(found), heads=HEADS, lines=lines(found), charts=drawn, sections=sections
    )
