"""A run folder made of nothing, for tests of reports and summaries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from flowrl import runlog, summary
from flowrl.sheets import save_png

TASKS = ("single_object", "two_object", "counting", "position")
COST = {"images": 3840, "sampling_calls": 38400, "training_forwards": 19200, "training_backwards": 19200}
CONFIG = """\
method: flow_grpo
output_dir: runs/fake
seed: 0
policy: {path: tiny-sd3, dtype: float32}
reward: {shapes-soft: 1.0}
updates: 60
eval: {prompts: "shapes:test", images_per_prompt: 4, steps: 20, guidance: 1.0}
"""


def eval_rows(stage: str, rate: float, *, prompts: int = 40, images: int = 4, seed: int = 0) -> list[summary.EvalRow]:
    """Rows in which a share of about `rate` is right; difficulty depends on prompt, the rest on prompt, seed, stage."""
    difficulty = np.random.default_rng(seed).normal(0, 0.25, prompts)
    noise = np.random.default_rng(seed + 1).random((prompts, images))
    extra = np.random.default_rng([seed, *stage.encode()]).normal(0, 0.2, (prompts, images))
    rows = []
    for p in range(prompts):
        for k in range(images):
            spoilt = 0.6 if stage == "after" and p % 10 == 9 else 0.0  # some prompts get worse
            right = float(noise[p, k] + extra[p, k] < rate + difficulty[p] - spoilt)
            rows.append(
                summary.EvalRow(
                    prompt=f"a photo of <b>shape {p}</b> & more",
                    prompt_id=p,
                    tag=TASKS[p % len(TASKS)],
                    seed_index=k,
                    scores={"shapes": right},
                    judge={"tiny-clip": 0.3 + 0.1 * rate + 0.1 * float(extra[p, k])},
                    path=None,
                    stats={"saturation": 0.4, "sharpness": 0.02, "dark_fraction": 0.1, "diversity": 0.5 - 0.1 * rate},
                )
            )
    return rows


def draw(row: summary.EvalRow, stage: str) -> Image.Image:
    """A square whose colour tells the stage and the score."""
    picture = np.full((64, 64, 3), 235, dtype=np.uint8)
    left = 5 + 7 * row["seed_index"]
    picture[14:46, left : left + 32] = (40, 160, 60) if row["scores"]["shapes"] else (200, 60, 40)
    if stage == "before":
        picture[:6] = 120
    return Image.fromarray(picture)


def write_rows(folder: Path, stage: str, rows: list[summary.EvalRow], pictures_of: int = 16) -> None:
    for row in rows:
        if isinstance(row["prompt_id"], int) and row["prompt_id"] < pictures_of:
            row["path"] = f"samples/{stage}/p{row['prompt_id']:04d}_s{row['seed_index']}.png"
            save_png(folder / row["path"], draw(row, stage))
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / summary.ROW_FILES[stage]).write_text("".join(lines))


def fake_run(folder: Path, *, updates: int = 60, finished: bool = True, alarms: bool = False) -> Path:
    """Write a complete run folder, or one that stopped after `updates` without the final evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    rng = np.random.default_rng(0)
    with runlog.RunLog(folder, console=False) as log:
        for update in range(1, updates + 1):
            share = update / 60
            metrics = {
                "reward/mean": 0.5 + 0.3 * share + 0.05 * rng.normal(),
                "reward/std": 0.2,
                "reward/shapes-soft/mean": 0.5 + 0.3 * share + 0.05 * rng.normal(),
                "reward/shapes-soft/std": 0.2,
                "judge/tiny-clip": 0.3 + 0.02 * rng.normal(),
                "ratio/max_dev": 0.001 * rng.random(),
                "clip_fraction": 0.2 * rng.random(),
                "kl": 0.01 * share,
                "grad_norm": 0.5 + 0.1 * rng.normal(),
                "images/diversity": 0.5 - 0.1 * share,
                "images/saturation": 0.4 + 0.02 * rng.normal(),
                "groups_dropped": 0,
            }
            spent = {"rollout_s": 1.2, "update_s": 1.5, "reward_s": 0.1, "images_per_s": 43.0, "peak_rss_mb": 1400}
            said = [f"update {update}: saturation <rose> by 60 %"] if alarms and update in (30, 31) else []
            log.write(update, metrics, spent, said)
    rows = {"before": eval_rows("before", 0.55), "before_guided": eval_rows("before_guided", 0.65)}
    if finished:
        rows["after"] = eval_rows("after", 0.8)
    for stage, stage_rows in rows.items():
        write_rows(folder, stage, stage_rows)
    if finished:
        facts = summary.build_summary(
            method="flow_grpo", policy="tiny-sd3", seed=0, updates=updates, wall_s=171.2, peak_rss_mb=1400.4, cost=COST,
            eval_settings={"split": "shapes:test", "steps": 20, "guidance": 1.0}, **rows,
            on_policy_ratio_max_dev=0.0, alarms=["after training: the judge fell"] if alarms else [],
        )  # fmt: skip
        summary.write_summary(folder, facts)
    return folder
