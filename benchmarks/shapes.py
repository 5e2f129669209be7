"""GenEval's six tasks in the Shapes world: draw, score, and report with intervals over prompts.

The headline is GenEval's: the official decision, averaged over images within a task, then over tasks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from flowrl.distributed import World
from flowrl.errors import UserError
from flowrl.evaluate import Judge, Scorers, evaluate
from flowrl.policies import Policy
from flowrl.prompts import load_prompts
from flowrl.rewards import load_reward
from flowrl.sampling import SampleSettings
from flowrl.statistics import Estimate, task_mean_ci
from flowrl.summary import EvalRow, by_prompt, measure, value, write_summary
from reward_models.geneval import image_and_prompt_shares


def run(
    policy: Policy,
    settings: SampleSettings,
    out: str | Path,
    *,
    split: str = "test",
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    judge: str | None = "tiny-clip",
    world: World | None = None,
) -> dict[str, Any]:
    """Measure a policy on a split of the Shapes prompts.

    Writes `images.jsonl` (one row per image), the pictures and `summary.json` into `out`, and returns the summary:
    settings, `scores` as in a run's summary, under `tasks` the official decision of each task with its interval, and
    GenEval's two side figures: the share of correct images, and of prompts with at least one correct image.

    Raises:
        UserError: `out` already holds a measurement, or an unknown split or task.
    """
    folder = Path(out)
    if (folder / "summary.json").exists():
        raise UserError(f"{folder} already holds a measurement; expected a new folder; choose another --out")
    prompts = load_prompts(f"shapes:{split}", tasks=tasks, limit=limit)
    scorers = Scorers(
        load_reward({"shapes": 1.0, "shapes-strict": 1.0}),
        None if judge is None else cast(Judge, load_reward(judge, policy.device)),
    )
    folder.mkdir(parents=True, exist_ok=True)
    world = world or World(0, 1, policy.device)
    rows = evaluate(policy, prompts, settings, scorers, world=world, pictures=folder / "images")
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    images, any_image = image_and_prompt_shares(
        [row["prompt_id"] for row in rows], [value(row, "scores", "shapes") for row in rows]
    )
    summary: dict[str, Any] = {
        "benchmark": "shapes",
        "policy": policy.name,
        "split": split,
        "prompts": len(prompts),
        "images_per_prompt": settings.images_per_prompt,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "seed": settings.seed,
        "scores": measure(rows),
        "correct_images": images,
        "prompts_with_a_correct_image": any_image,
        "tasks": {tag: _task(rows, tag) for tag in dict.fromkeys(prompt.metadata["tag"] for prompt in prompts)},
    }
    write_summary(folder, finite(summary))
    return summary


def finite(item: Any) -> Any:
    """The same with null for NaN, which JSON does not know."""
    if isinstance(item, dict):
        return {key: finite(value) for key, value in item.items()}
    if isinstance(item, list):
        return [finite(value) for value in item]
    return None if isinstance(item, float) and math.isnan(item) else item


def _task(rows: Sequence[EvalRow], tag: str) -> dict[str, Any]:
    groups = list(by_prompt(row for row in rows if row["tag"] == tag).values())
    found: Estimate = task_mean_ci(
        [[value(row, "scores", "shapes") for row in group] for group in groups], [tag] * len(groups)
    )
    return {"mean": found.mean, "ci95": [found.low, found.high], "prompts": len(groups)}
