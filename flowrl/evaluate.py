"""Score what a policy draws on held-out prompts: one row per image, the same noise before and after training."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flowrl.distributed import World
from flowrl.policies import Policy
from flowrl.prompts import Prompt, split
from flowrl.sampling import SampleSettings, generate
from flowrl.sheets import save_png
from flowrl.summary import ROW_FILES, EvalRow, value
from flowrl.update import with_halving
from reward_models.image_stats import image_statistics, in_group_diversity
from reward_models.protocol import Reward, checked_score

log = logging.getLogger(__name__)

SMALL = 128  # pictures up to this many pixels a side are all kept; of larger ones the first of each prompt
BATCH = 64  # images scored together


class Judge(Reward, Protocol):
    """A scorer that also gives the features in which diversity is measured."""

    def features(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Scorers:
    """What is measured: `rewards` (a weighted sum; its parts are reported) and the held-out `judge`, or None."""

    rewards: Reward
    judge: Judge | None


def evaluate(
    policy: Policy,
    prompts: Sequence[Prompt],
    settings: SampleSettings,
    scorers: Scorers,
    *,
    world: World,
    pictures: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] = log.info,
) -> list[EvalRow]:
    """Draw `settings.images_per_prompt` images of each prompt and score them.

    Returns the rows of all prompts on every process that had one (the first always has).
    pictures: folder for PNGs (named by prompt and seed number), or None for none. on_progress: gets the numbers of this
    process's prompts that are done, and of all of them. note: gets a line when memory runs out and smaller model calls
    go on.
    """
    numbers = split(range(len(prompts)), world.rank, world.size)

    def draw(chunk: int) -> tuple[list[tuple[str, str]], list[Tensor]]:
        return _draw(policy, prompts, numbers, replace(settings, chunk=chunk), scorers, pictures, on_progress)

    with world.together():
        (names, table), _ = with_halving(draw, settings.chunk, "the evaluation", note)
    k = settings.images_per_prompt
    columns = int(world.max(torch.tensor([len(names)])))
    everything = world.gather(torch.cat(table).double() if table else torch.zeros(0, k, columns).double())
    if not names:
        return []
    side = max(settings.height or policy.resolution, settings.width or policy.resolution)
    return [
        _row(number, seed, prompt, names, everything[number, seed].tolist(), pictures, side)
        for number, prompt in enumerate(prompts)
        for seed in range(k)
    ]


def _draw(
    policy: Policy, prompts: Sequence[Prompt], numbers: Sequence[int], settings: SampleSettings, scorers: Scorers,
    pictures: Path | None, on_progress: Callable[[int, int], None] | None,
) -> tuple[list[tuple[str, str]], list[Tensor]]:  # fmt: skip
    """Draw and measure the prompts of these numbers: (kind, name) of the columns, and (P, K, columns) in parts."""
    mine = [prompts[number] for number in numbers]
    names: list[tuple[str, str]] = []
    table: list[Tensor] = []
    waiting: list[tuple[int, Tensor]] = []
    done = 0
    texts = [prompt.text for prompt in prompts]
    first = numbers[0] if numbers else 0
    for at, images in generate(policy, [prompt.text for prompt in mine], settings, "eval", before=texts[:first]):
        waiting.append((at, images))
        if pictures is not None:
            kept = images if max(images.shape[-2:]) <= SMALL else images[:1]
            for k, image in enumerate(kept):
                save_png(pictures / _file(numbers[at], k), image)
        if len(waiting) * len(images) >= BATCH or at == len(mine) - 1:
            measured = _measure(waiting, mine, scorers)
            names = list(measured)
            table.append(torch.stack(list(measured.values()), -1).view(len(waiting), len(images), -1))
            done += len(waiting)
            waiting = []
            if on_progress is not None:
                on_progress(done, len(mine))
    return names, table


def _measure(
    waiting: Sequence[tuple[int, Tensor]], prompts: Sequence[Prompt], scorers: Scorers
) -> dict[tuple[str, str], Tensor]:
    """(kind, name) -> (n,) of the images of some prompts."""
    images = torch.cat([part for _, part in waiting])
    at = [number for number, part in waiting for _ in part]
    texts, metadata = [prompts[i].text for i in at], [prompts[i].metadata for i in at]
    groups = torch.tensor(at, dtype=torch.long)
    result = checked_score(scorers.rewards, images, texts, metadata, groups, all_missing="allow")
    parts = result.parts or {scorers.rewards.spec.name: result.values}
    measured = {("scores", name): part for name, part in parts.items()}
    if scorers.judge is not None:
        judged = checked_score(scorers.judge, images, texts, metadata, groups, all_missing="allow")
        measured["judge", scorers.judge.spec.name] = judged.values
    measured |= {("stats", name): stat for name, stat in image_statistics(images).items()}
    if scorers.judge is not None:
        measured["stats", "diversity"] = _spread(in_group_diversity(scorers.judge.features(images), groups), groups)
    return measured


def _spread(per_group: Tensor, groups: Tensor) -> Tensor:
    """The value of each image's group, per image."""
    return per_group[groups.unique(return_inverse=True)[1]]


def _row(
    number: int, seed: int, prompt: Prompt, names: Sequence[tuple[str, str]], values: list[float],
    pictures: Path | None, side: int,
) -> EvalRow:  # fmt: skip
    kinds: dict[str, dict[str, float | None]] = {"scores": {}, "judge": {}, "stats": {}}
    for (kind, name), number_ in zip(names, values, strict=True):
        kinds[kind][name] = number_ if number_ == number_ else None
    kept = pictures is not None and (side <= SMALL or seed == 0)
    return EvalRow(
        prompt=prompt.text,
        prompt_id=number,
        tag=prompt.metadata.get("tag"),
        seed_index=seed,
        scores=kinds["scores"],
        judge=kinds["judge"],
        stats=kinds["stats"],
        path=f"{pictures.parent.name}/{pictures.name}/{_file(number, seed)}" if kept and pictures else None,
    )


def _file(number: int, seed: int) -> str:
    return f"{number:05d}_{seed}.png"


def write_rows(folder: Path, stage: str, rows: Sequence[EvalRow]) -> None:
    """Write `eval_<stage>.jsonl` in one step."""
    path = folder / ROW_FILES[stage]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(part, path)


def means(rows: Sequence[EvalRow]) -> dict[str, float]:
    """Plain means over images under the names of the log: `eval/<score>`, `eval/judge/<name>`."""
    found: dict[str, float] = {}
    for kind, prefix in (("scores", "eval/"), ("judge", "eval/judge/")):
        for name in rows[0][kind] if rows else ():  # type: ignore[literal-required]
            numbers: list[float] = [value(row, kind, name) for row in rows]
            valid = [x for x in numbers if x == x]
            found[prefix + name] = sum(valid) / len(valid) if valid else float("nan")
    return found


def settings_of(section: Any, seed: int, chunk: int) -> SampleSettings:
    """Sampling settings from the config's `eval` section."""
    return SampleSettings(
        steps=section.steps,
        guidance=section.guidance,
        height=section.height,
        width=section.width,
        images_per_prompt=section.images_per_prompt,
        seed=seed,
        chunk=chunk,
    )
