"""The picture sheets of a run: fixed prompts with fixed noise, while it trains and side by side at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from flowrl.config import Config
from flowrl.evaluate import settings_of
from flowrl.prompts import Prompt
from flowrl.sampling import generate
from flowrl.sheets import before_after_sheet, sheet
from flowrl.summary import EvalRow, by_prompt

if TYPE_CHECKING:
    from flowrl.policies import Policy

SEEDS = 4  # pictures of one prompt on a sheet
PROMPTS = 8  # rows of the before/after sheet


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` prompts that take turns among the tags, in their old order."""
    seen: dict[object, int] = {}
    turns = []
    for number, prompt in enumerate(prompts):
        tag = prompt.metadata.get("tag")
        turns.append((seen.get(tag, 0), number))
        seen[tag] = seen.get(tag, 0) + 1
    return [prompts[number] for _, number in sorted(turns)[:count]]


def draw(policy: Policy, prompts: Sequence[Prompt], config: Config, folder: Path, update: int) -> Path:
    """Write `samples/update_<number>.png` and return its path."""
    assert config.eval is not None
    chosen = spread(prompts, config.logging.sample_prompts)
    section = config.eval.model_copy(update={"images_per_prompt": SEEDS})
    settings = settings_of(section, config.seed, config.rollout.chunk)
    texts = [prompt.text for prompt in chosen]
    rows = [list(images) for _, images in generate(policy, texts, settings, purpose="eval")]
    path = folder / "samples" / f"update_{update:06d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    titles = [f"seed {k}" for k in range(SEEDS)]
    sheet(rows, row_captions=texts, column_titles=titles, title=f"After {update} updates").save(path)
    return path


def before_after(folder: Path, before: Sequence[EvalRow], after: Sequence[EvalRow]) -> Path | None:
    """Write `samples/before_after.png` from the pictures of the two evaluations; None where they are missing."""
    old, new = by_prompt(before), by_prompt(after)
    tagged = [Prompt(rows[0]["prompt"], {"tag": rows[0]["tag"], "id": key}) for key, rows in old.items() if key in new]
    prompts, captions = [], []
    columns: tuple[list[list[Image.Image]], list[list[Image.Image]]] = ([], [])
    for prompt in spread(tagged, PROMPTS):
        key = prompt.metadata["id"]
        pairs = [(a, b) for a, b in zip(old[key], new[key], strict=False) if a["path"] and b["path"]][:SEEDS]
        if not pairs:
            continue
        prompts.append(prompt.text)
        for column, rows in zip(columns, zip(*pairs, strict=True), strict=True):
            column.append([Image.open(folder / str(row["path"])) for row in rows])
        captions.append([(_caption(a), _caption(b)) for a, b in pairs])
    if not prompts:
        return None
    path = folder / "samples" / "before_after.png"
    before_after_sheet(prompts, columns[0], columns[1], captions).save(path)
    return path


def _caption(row: EvalRow) -> str:
    name, score = next(iter(row["scores"].items()))
    return f"{name} {'missing' if score is None else f'{score:.2f}'}"
