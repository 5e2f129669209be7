"""`report.html`: one self-contained page that says what got better, what did not, and whether the reward was hacked.

`write_report` reads nothing but the files of the run folder, so a report can be made again at any time, also of a run
that stopped early: config.yaml, metrics.jsonl, timings.jsonl, summary.json, environment.json, eval_*.jsonl, the PNGs
that the evaluation rows point to, and the pictures of trees. All text from outside (prompts, reward names, settings) is
escaped by the template.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from flowrl import charts, environment, runlog, summary
from flowrl.errors import UserError
from flowrl.statistics import Estimate
from flowrl.summary import EvalRow

PAIRS = 12  # prompts shown as before/after pairs
FEW = 6  # with fewer prompts no gain is called better or worse
CHANGED = 6  # prompts shown as most improved, and as many as most worsened
THUMBNAIL = 224  # larger pictures are reduced to this many pixels

# (title, which metrics, how to read it). A metric belongs to the first group that matches it.
CURVES = (
    ("Reward", r"reward/mean", "mean over all images of an update; the band is one standard deviation of the images"),
    ("Parts of the reward", r"reward/(?!mean$|std$).+/mean", "each part before weighting"),
    ("Held-out judge", r"judge/.+", "never trained on: it should not fall while the reward rises"),
    ("Evaluation", r"eval/.+", "on held-out prompts during training"),
    ("Diversity within a group", r"images/diversity", "a fall means that images of one prompt become alike"),
    ("Saturation", r"images/saturation", "a steady rise is a common sign of a hacked reward"),
    ("Sharpness", r"images/sharpness", "a strong change either way is suspicious"),
    ("Dark share", r"images/dark_fraction", "share of nearly black pixels"),
    ("Ratio deviation", r"ratio/max_dev", "largest distance of the ratio from 1 while an update steps"),
    (
        "Clipped share",
        r"clip_fraction|clip_active",
        "ratios outside the clip range; active: those left without gradient",
    ),
    ("KL to the starting weights", r"kl", "how far the policy has moved"),
    ("KL of one update", r"approx_kl", "how far one update moves the policy"),
    ("Gradient norm", r"grad_norm", "before clipping"),
    (
        "Reward that learns: right answers",
        r"adversary/accuracy(_real|_fake|_recent)?",
        "its share on images it has not learned yet; 0.5: it guesses",
    ),
    (
        "Reward that learns: gap",
        r"adversary/gap(_after)?",
        "reward of references minus that of images; after its steps",
    ),
    ("Reward that learns: both sides", r"adversary/reward_\w+", "mean rewards of references and of generated images"),
    ("Spread within a group", r"advantage/spread", "standard deviation of the rewards of a prompt, mean over prompts"),
    ("Narrow groups", r"advantage/narrow_groups", "share of the groups whose rewards hardly differ"),
    ("Amplification", r"advantage/amplification", "advantages over differences of rewards; a rise: noise is enlarged"),
    ("Groups without a signal", r"advantage/zero_variance_groups", "all images of the group have the same reward"),
    ("Loss", r"loss|policy_loss", "says little by itself"),
)


@dataclass(frozen=True)
class Pair:
    """One prompt from one seed, before and after: pictures as data URLs, scores as text."""

    before: str | None
    after: str | None
    before_score: str
    after_score: str


@dataclass(frozen=True)
class PromptCard:
    """A prompt with its mean score before and after and some of its pictures."""

    prompt: str
    tag: str
    before: float
    after: float
    pairs: list[Pair]

    @property
    def change(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class TaskRow:
    """The first score on the prompts of one task."""

    name: str
    prompts: int
    before: Estimate
    after: Estimate | None
    gain: Estimate | None
    verdict: str


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` into the run folder and return its path. Not a run folder: UserError."""
    folder = Path(run_folder)
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder} holds no config.yaml, expected the folder of a run (the output_dir of `flowrl train`); "
            "give the path of such a folder"
        )
    pages = Environment(
        loader=PackageLoader("flowrl"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters.update(number=number, signed=signed, duration=runlog.duration)
    html = pages.get_template("report.html.j2").render(_content(folder))
    part = folder / "report.html.part"
    part.write_text(html, encoding="utf-8")
    os.replace(part, folder / "report.html")
    return folder / "report.html"


def _content(folder: Path) -> dict[str, Any]:
    config_text = (folder / "config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(config_text)
    facts = _json(folder / summary.FILE)
    metrics = runlog.read_jsonl(folder / runlog.METRICS)
    timings = runlog.read_jsonl(folder / runlog.TIMINGS)
    stages = {stage: summary.read_rows(folder, stage) for stage in summary.ROW_FILES}
    before, after = stages["before"], stages["after"]
    scores = summary.names(before or after, "scores")
    alarms = list(
        dict.fromkeys([*(text for row in metrics for text in row.get("alarms", ())), *facts.get("alarms", ())])
    )
    cards = _cards(folder, before, after, scores[0]) if scores else []
    changed = sorted((card for card in cards if math.isfinite(card.change)), key=lambda card: card.change)
    updates = max((row["update"] for row in metrics), default=0)
    return {
        "run": folder.resolve().name,
        "method": config.get("method", ""),
        "policy": model_name((config.get("policy") or {}).get("path", ""))[0],
        "updates": updates,
        "planned": config.get("updates"),
        "compared": bool(after),
        "stopped_early": not after and (config.get("eval", {}) is not None or updates < config.get("updates", 0)),
        "when": _span(timings),
        "alarms": alarms,
        "deviation": facts.get("on_policy_ratio_max_dev"),
        "settings": (facts.get("eval") or {}) or (config.get("eval") or {}),
        "scores": [_headline(stages, "scores", name) for name in scores],
        "judges": [_headline(stages, "judge", name) for name in summary.names(before or after, "judge")],
        "stats": _stats(before, after),
        "main": scores[0] if scores else "",
        "small_pictures": _small(folder, before or after),
        "pairs": _spread([card for card in cards if any(pair.before or pair.after for pair in card.pairs)], PAIRS),
        "improved": [card for card in reversed(changed) if card.change > 0][:CHANGED],
        "worsened": [card for card in changed if card.change < 0][:CHANGED],
        "prompts_changed": [sum(c.change > 0 for c in changed), sum(c.change < 0 for c in changed), len(changed)],
        "tasks": _tasks(before, after, scores[0]) if scores else None,
        "trees": _trees(folder),
        "curves": _curves(metrics),
        "cost": _cost(facts, timings),
        "config": config_text.strip(),
        "environment": {"packages": {}, "rewards": [], **environment.read_environment(folder)},
    }


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _headline(stages: Mapping[str, Sequence[EvalRow]], kind: str, name: str) -> dict[str, Any]:
    """One score or judge: its stages with intervals, the paired gain and what may be said about it."""
    titles = {"before": "before", "before_guided": "before, with guidance", "after": "after"}
    colours = {"before": charts.BEFORE, "before_guided": charts.THIRD, "after": charts.AFTER}
    measured = {
        stage: summary.headline(rows, kind, name)
        for stage, rows in stages.items()
        if rows and name in summary.names(rows, kind)
    }
    gain = None
    if "before" in measured and "after" in measured:
        gain = summary.paired(stages["before"], stages["after"], kind, name)
    return {
        "name": name,
        "stages": [(titles[stage], estimate) for stage, estimate in measured.items()],
        "gain": gain,
        "verdict": verdict(gain),
        "chart": charts.interval_chart([(titles[s], e, colours[s]) for s, e in measured.items()]),
    }


def verdict(gain: Estimate | None) -> str:
    """What may be said about a paired gain."""
    if gain is None or not math.isfinite(gain.mean):
        return ""
    if gain.prompts < FEW:
        return "too few prompts to tell"
    if gain.excludes(0):
        return "better" if gain.mean > 0 else "worse"
    return "no significant difference"


def _stats(before: Sequence[EvalRow], after: Sequence[EvalRow]) -> list[dict[str, Any]]:
    """Image statistics before and after, with the relative change."""
    rows = []
    for name in summary.names(before, "stats"):
        old = summary.headline(before, "stats", name).mean
        new = summary.headline(after, "stats", name).mean if after else math.nan
        rows.append({"name": name, "before": old, "after": new, "change": (new - old) / old if old else math.nan})
    return rows


def _tasks(before: Sequence[EvalRow], after: Sequence[EvalRow], name: str) -> dict[str, Any] | None:
    """Per task: scores with intervals, the paired gain, and a chart; None without tasks."""
    tags = list(dict.fromkeys(row.get("tag") for row in before or after))
    if len(tags) < 2 or not all(tags):
        return None
    rows = []
    for tag in map(str, tags):
        old = [row for row in before if row["tag"] == tag]
        new = [row for row in after if row["tag"] == tag]
        gain = summary.paired(old, new, "scores", name) if old and new else None
        measured = summary.headline(new, "scores", name) if new else None
        prompts = len(summary.by_prompt(old or new))
        rows.append(TaskRow(tag, prompts, summary.headline(old, "scores", name), measured, gain, verdict(gain)))
    chart = charts.task_chart([(row.name, row.before, row.after) for row in rows])
    return {"rows": rows, "flat": [row.name for row in rows if row.verdict != "better"], "chart": chart}


def _cost(facts: Mapping[str, Any], timings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Model calls, clock time by part of the work, speed and memory, and what interruptions cost."""
    wall = sum(row["wall_s"] for row in timings)
    spent: dict[str, float] = {}
    for row in timings:
        for key, seconds in row.items():
            if key.endswith("_s") and key not in ("wall_s", "images_per_s") and seconds is not None:
                spent[key.removesuffix("_s")] = spent.get(key.removesuffix("_s"), 0.0) + seconds
    last: dict[int, Mapping[str, Any]] = {row["update"]: row for row in timings}
    peaks = [row["peak_rss_mb"] for row in timings if row.get("peak_rss_mb")]
    return {
        "calls": facts.get("cost") or {},
        "wall": facts.get("wall_s") or wall,
        "parts": sorted(spent.items(), key=lambda item: -item[1]),
        "logged": wall,
        "peak_mb": facts.get("peak_rss_mb") or max(peaks, default=None),
        "sessions": max((row.get("session", 1) for row in timings), default=0),
        "repeated": sum(row["wall_s"] for row in timings) - sum(row["wall_s"] for row in last.values()),
    }


def _span(timings: Sequence[Mapping[str, Any]]) -> str:
    if not timings:
        return ""
    return datetime.fromtimestamp(timings[-1]["time"], UTC).strftime("%-d %B %Y, %H:%M UTC")


# ---- pictures --------------------------------------------------------------------------------------------------------


def _cards(folder: Path, before: Sequence[EvalRow], after: Sequence[EvalRow], name: str) -> list[PromptCard]:
    """One card per prompt. Means run over the pairs that have both scores; without `after`, over what there is."""
    new = {(row["prompt_id"], row["seed_index"]): row for row in after}
    cards = []
    for prompt_id, rows in summary.by_prompt(before or after).items():
        twins = [new.get((prompt_id, row["seed_index"])) for row in rows]
        pairs, old_scores, new_scores = [], [], []
        for row, twin in zip(rows, twins, strict=True):
            old = summary.value(row, "scores", name) if before else math.nan
            changed = summary.value(twin, "scores", name) if twin else math.nan
            if math.isfinite(old) and (math.isfinite(changed) or not after):
                old_scores.append(old)
                new_scores.append(changed)
            pictures = (_picture(folder, row) if before else None, _picture(folder, twin) if twin else None)
            if any(pictures):
                pairs.append(Pair(*pictures, number(old, 2), number(changed, 2)))
        cards.append(
            PromptCard(rows[0]["prompt"], rows[0].get("tag") or "", _mean(old_scores), _mean(new_scores), pairs)
        )
    return cards


def _small(folder: Path, rows: Sequence[EvalRow]) -> bool:
    """Whether the pictures are so small that a person should see their pixels as squares."""
    for row in rows:
        if picture := _open(folder, row):
            return max(picture.size) <= 128
    return False


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _spread(cards: Sequence[PromptCard], count: int) -> list[PromptCard]:
    """The first `count` cards, taking the tasks in turn, so that no task is left out by its place in the file."""
    by_tag: dict[str, list[PromptCard]] = {}
    for card in cards:
        by_tag.setdefault(card.tag, []).append(card)
    in_turn = [card for turn in zip_longest(*by_tag.values()) for card in turn if card]
    return in_turn[:count]


def _picture(folder: Path, row: EvalRow) -> str | None:
    """The saved PNG as a data URL, reduced if large; None if it cannot be shown."""
    picture = _open(folder, row)
    if picture is None:
        return None
    if max(picture.size) > THUMBNAIL:
        picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _open(folder: Path, row: EvalRow) -> Image.Image | None:
    """The picture of a row; None if none was saved, it is damaged, or it lies outside the run folder."""
    if not row.get("path"):
        return None
    path = (folder / str(row["path"])).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError:  # a damaged picture costs its place on the page, not the page
        return None


def _trees(folder: Path) -> list[dict[str, Any]]:
    """The first and the last picture of `flowrl.tree_sheet` that can be shown; empty where the plan never branched."""
    paths = sorted((folder / "samples" / "trees").glob("update_*.png"))
    first = next(filter(None, map(_tree, paths)), None)
    last = next(filter(None, map(_tree, reversed(paths))), None)
    return [tree for tree in (first, last if last != first else None) if tree]


def _tree(path: Path) -> dict[str, Any] | None:
    """One picture as a data URL, shown at half its size, with the prompt it holds; None if it is damaged."""
    try:
        with Image.open(path) as image:
            image.load()
            prompt, width = image.info.get("prompt", ""), image.width // 2
    except OSError:  # as above
        return None
    source = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    return {"number": path.stem.removeprefix("update_").lstrip("0"), "prompt": prompt, "width": width, "source": source}


# ---- curves ----------------------------------------------------------------------------------------------------------


def _curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Charts of the known groups of metrics ("main"), and of every other metric ("other")."""
    keys = list(dict.fromkeys(key for row in metrics for key, value in row.items() if _is_curve(key, value)))
    main, used = [], {"reward/std"} | {key for key in keys if re.fullmatch(r"reward/.+/std", key)}
    for title, pattern, hint in CURVES:
        names = [key for key in keys if key not in used and re.fullmatch(pattern, key)]
        used.update(names)
        if names:
            main.append({"title": title, "hint": hint, "chart": _chart(metrics, names)})
    other = [{"title": key, "hint": "", "chart": _chart(metrics, [key])} for key in keys if key not in used]
    return {"main": main, "other": other}


def _is_curve(key: str, value: Any) -> bool:
    return key != "update" and isinstance(value, int | float) and not isinstance(value, bool)


def _chart(metrics: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Markup:
    series = []
    for name in names:
        rows = [row for row in metrics if name in row]
        std = name.removesuffix("/mean") + "/std" if name.endswith("/mean") else ""
        spread = [_float(row.get(std)) for row in rows] if any(std in row for row in rows) else None
        label = name if len(names) == 1 else name.removeprefix("reward/").removesuffix("/mean").split("/", 1)[-1]
        series.append(
            charts.Series(label, [row["update"] for row in rows], [_float(row[name]) for row in rows], spread)
        )
    return charts.line_chart(series)


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


# ---- text ------------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: `digits` after the point, or as many in all where that would leave next to nothing.

    Large whole numbers get thin spaces, NaN and None a dash, negative numbers a true minus.
    """
    if value is None or not math.isfinite(value):
        return "–"
    if isinstance(value, int) or value == int(value) and abs(value) >= 1000:
        text = f"{int(value):,}".replace(",", "\u202f")
    elif value and abs(value) < 10 ** (1 - digits):
        text = f"{value:.{digits}g}"
    else:
        text = f"{value:.{digits}f}"
    return text.replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """As `number`, with its sign."""
    text = number(value, digits)
    return text if text[0] in "–−" else "+" + text


def model_name(path: str) -> tuple[str, bool]:
    """(name, whether others can find it): hub ids and bundled models keep theirs, a folder gives its last part only."""
    if path.startswith("tiny-") or path.count("/") == 1 and not path.startswith((".", "~", "/")):
        return path, True
    return Path(path).name, False


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}), expected JSON; move it away to make the report without it"
        ) from error
