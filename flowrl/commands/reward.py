"""`flowrl reward train` fits a scorer to preferences, `flowrl reward pairs` makes preferences out of images."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from reward_models.training.fit import Settings

REPORT = "report.json"


def train(
    manifest: str | Path,
    out: str | Path,
    settings: Settings,
    *,
    body: str = "tiny-clip",
    what: str = "head",
    hidden: tuple[int, ...] = (),
    inputs: str = "image_text",
    layers: int = 2,
    rank: int = 8,
    counts: Mapping[str, Any] | None = None,
    name: str | None = None,
    device: str = "auto",
    resume: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Fit a scorer and write its folder; returns the held-out accuracies with 95 % intervals over prompts.

    Args:
        manifest: JSON lines, see `reward_models.training.manifest`. out: new folder, or with `resume` that of a fit
            that was interrupted. settings: of the fit.
        body: a bundled CLIP, a folder or a hub id. what: head, layers, all or lora.
        hidden, inputs: of a head. layers, rank: of the others. counts: options for a manifest of counts.

    Raises:
        UserError: anything about the input that cannot be used.
    """
    from flowrl.policies.loading import find_device
    from reward_models.clip_score import ClipScore
    from reward_models.training import fit as fits
    from reward_models.training.manifest import aspects, read
    from reward_models.training.scorer import Head, HeadTraining, ModelTraining

    folder = Path(out)
    _check_new(folder, resume)
    if what != "head" and (hidden or inputs != "image_text"):
        raise UserError(f"got hidden layers or inputs with --train {what}; expected them with head; leave them out")
    if Path(body).expanduser().is_dir():  # the scorer must find it from anywhere
        body = str(Path(body).expanduser().resolve())
    try:
        pairs = read(manifest, **(counts or {}))
        names = aspects(pairs)
        scorer = ClipScore(body, device=find_device(device), chunk=64)
        training: HeadTraining | ModelTraining
        if what == "head":
            head = Head(scorer.towers.dimension, hidden, len(names), inputs, settings.seed)
            training = HeadTraining(scorer, head, _pixels)
        else:
            scaled = settings.loss != "triplet"  # whose margin is one of cosines
            training = ModelTraining(
                scorer, _pixels, train=what, layers=layers, rank=rank, scaled=scaled, seed=settings.seed
            )
        say(f"{len(pairs)} pairs of {len({pair.prompt for pair in pairs})} prompts")
        fitted = fits.fit(training, pairs, settings, folder, resume=resume, say=say)
    except ValueError as error:
        raise UserError(str(error)) from error
    accuracy = {"": _accuracy(fitted.outcomes)} if fitted.outcomes else {}
    accuracy |= {aspect: _accuracy(outcomes) for aspect, outcomes in fitted.aspect_outcomes.items() if outcomes}
    fits.save(fitted, folder, name=name or folder.name, body=body, held_out=accuracy)
    found = {"learnt": fitted.learnt, "held_out": fitted.held_out, "accuracy": accuracy}
    (folder / REPORT).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def pairs(
    images: str | Path,
    out: str | Path,
    *,
    rank: str,
    score: str,
    order: str = "both",
    seed: int = 0,
    least: float = 0.0,
    device: str = "auto",
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, int]:
    """Preference pairs out of images of the same prompts, as a manifest for `train`; returns what was counted.

    Args:
        images: a folder or manifest with at least two images of each prompt, see `flowrl.images.find`.
        out: the new .jsonl file. rank: see `reward_models.judges.build.as_judge`, with
            the options of a single reward as `{NAME: {option: value}}`.
        score: a pointwise reward. order, seed, least: see `reward_models.training.pairs.sift`.

    Raises:
        UserError: anything about the input that cannot be used.
    """
    import os

    import torch

    from flowrl.config import parse_yaml
    from flowrl.images import Item, find
    from flowrl.policies.loading import find_device
    from flowrl.rewards import ask_elsewhere, load_reward
    from reward_models.judges.build import as_judge
    from reward_models.training.pairs import sift

    target = Path(out)
    if target.exists():
        raise UserError(f"{target} is there already; expected a new file; choose another --out")
    if order not in ("both", "random", "given"):
        raise UserError(f"got order {order!r}; expected both, random or given")
    by_prompt: dict[int, list[Item]] = {}
    for item in find([images]):
        by_prompt.setdefault(item.prompt_id, []).append(item)
    where = find_device(device)
    ranking, scoring = parse_yaml(rank, "--rank"), parse_yaml(score, "--score")
    ask_elsewhere(ranking, scoring)
    scorer = load_reward(scoring, where)
    try:
        judge = as_judge(ranking, where)
    except ValueError as error:
        raise UserError(str(error)) from error
    if scorer.spec.scope != "point":
        raise UserError(
            f"got --score {score!r} of scope {scorer.spec.scope}; expected a pointwise reward; name another"
        )
    counts = {"prompts": len(by_prompt), "pairs": 0, "compared": 0, "ties": 0, "missing": 0, "single": 0, "sizes": 0}
    lines: list[str] = []
    for done, group in enumerate(by_prompt.values(), start=1):
        pixels = [_pixels(str(item.path)) for item in group]
        if len(group) < 2 or len({image.shape for image in pixels}) > 1:
            counts["single" if len(group) < 2 else "sizes"] += 1
            continue
        found = sift(
            torch.stack(pixels), group[0].prompt, [item.metadata for item in group], judge, scorer,
            order=order, seed=seed, least=least,  # type: ignore[arg-type]
        )  # fmt: skip
        for key in ("compared", "ties", "missing"):
            counts[key] += getattr(found, key)
        if found.chosen is not None and found.rejected is not None:
            counts["pairs"] += 1
            best, worst = group[found.chosen], group[found.rejected]
            files = [os.path.relpath(item.path, target.parent) for item in (best, worst)]
            row = {"prompt": best.prompt, "images": files, "label": 1.0}
            row["scores"] = [found.scores[found.chosen], found.scores[found.rejected]]
            row |= {"ranked_by": judge.spec.name, "scored_by": scorer.spec.name, "seed": seed}
            lines.append(json.dumps(row, ensure_ascii=False))
        say(f"{done} of {len(by_prompt)} prompts, {counts['pairs']} pairs")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return counts


def _check_new(folder: Path, resume: bool) -> None:
    from reward_models.training.fit import CHECKPOINT
    from reward_models.training.scorer import DESCRIPTION

    if (folder / DESCRIPTION).exists():
        raise UserError(f"{folder} holds a trained scorer; expected a new folder; choose another --out")
    if (folder / CHECKPOINT).exists() and not resume:
        raise UserError(f"{folder} holds a fit that was interrupted; go on with --resume, or choose another --out")


def _pixels(file: str) -> Tensor:
    from flowrl.images import Unreadable, read_image

    try:
        return read_image(Path(file))
    except Unreadable as error:
        raise UserError(f"{error}; expected an image; replace it, or take its line out") from error


def _accuracy(outcomes: Mapping[str, list[float]]) -> dict[str, float]:
    from flowrl.statistics import mean_ci

    found = mean_ci(list(outcomes.values()))
    number = sum(len(rows) for rows in outcomes.values())
    ends = {"low": found.low, "high": found.high}  # NaN where one prompt says nothing about others
    return {"accuracy": found.mean, **ends, "pairs": number, "prompts": found.prompts}


def describe(accuracy: Mapping[str, float]) -> str:
    """An accuracy in one line."""
    ends = "" if math.isnan(accuracy["low"]) else f", 95 % interval {accuracy['low']:.3f} to {accuracy['high']:.3f}"
    return f"{accuracy['accuracy']:.3f}{ends} ({accuracy['pairs']:.0f} pairs of {accuracy['prompts']:.0f} prompts)"
