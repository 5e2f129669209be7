"""`flowrl sample` draws images into a folder, `flowrl score` scores such a folder.

A folder of images holds PNG files and `samples.jsonl`, one line per image: its file name under "image", its prompt, and
what else came with the prompt (which rewards may need).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.config import parse_yaml, read_yaml
from flowrl.errors import UserError
from flowrl.prompts import Prompt, load_prompts

if TYPE_CHECKING:
    from flowrl.policies import Policy
    from flowrl.sampling import SampleSettings

LISTING = "samples.jsonl"
BATCH = 64  # images scored together, where a reward does not need them all


def open_policy(path: str, *, lora: str | None = None, device: str = "auto", dtype: str = "float32") -> Policy:
    """A policy to draw from: a pipeline (bundled name, folder, hub id) or the folder of a run, with what it trained."""
    from flowrl.policies import LoraSettings, load_policy

    run, revision, whole = Path(path), None, None
    if lora is None and (run / "config.yaml").is_file() and not (run / "model_index.json").exists():  # a merged export
        adapter = run / "adapter"
        if not adapter.is_dir():
            raise UserError(
                f"{path} is a run without a finished adapter/; expected one that `flowrl train` has ended; "
                f"finish it with --resume, or export it with `flowrl export {path}`"
            )
        chosen = read_yaml(run / "config.yaml")["policy"]
        path, revision = chosen["path"], chosen.get("revision")
        if chosen.get("train") == "full":
            whole = adapter / "transformer"
        else:
            lora = str(adapter)
    settings = None if lora is None else LoraSettings(source=lora)
    policy = load_policy(path, device=device, dtype=dtype, lora=settings, train="none", revision=revision)
    if whole is not None:
        transformer = policy.pipeline.transformer
        transformer.load_state_dict(type(transformer).from_pretrained(whole).state_dict())
    return policy


def given_prompts(texts: Sequence[str], source: str | None, limit: int | None) -> list[Prompt]:
    """Prompts from the command line, from a source, or from both."""
    prompts = [Prompt(text, {"prompt": text}) for text in texts]
    if source is not None:
        prompts += load_prompts(source, limit=limit)
    if not prompts:
        raise UserError('no prompt given; expected --prompt "a red star" (any number of times) or --prompts FILE')
    return prompts


def check_new(out: str | Path) -> None:
    """Refuse a folder that holds samples. Cheap, so that it comes before a model is loaded."""
    if (Path(out) / LISTING).exists():
        raise UserError(f"{out} already holds samples; expected a new folder; choose another --out")


def sample(policy: Policy, prompts: Sequence[Prompt], settings: SampleSettings, out: str | Path) -> Path:
    """Draw images of all prompts into the folder `out`, with a listing and a sheet. Returns the folder."""
    from flowrl.sampling import generate
    from flowrl.sheets import save_png, sheet

    check_new(out)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    rows, shown = [], []
    for number, images in generate(policy, [prompt.text for prompt in prompts], settings):
        for index, image in enumerate(images):
            name = f"{number:05d}_{index:02d}.png"
            save_png(folder / name, image)
            rows.append({**prompts[number].metadata, "image": name, "prompt_id": number, "index": index})
        if number < 16:
            shown.append((prompts[number].text, list(images[:4])))
    (folder / LISTING).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    columns = len(shown[0][1])
    sheet(
        [images for _, images in shown],
        row_captions=[text for text, _ in shown],
        column_titles=[f"image {i}" for i in range(columns)],
    ).save(folder / "sheet.png")
    return folder


def score(
    images: str | Path, reward: str, prompts: str | None, out: str | Path | None, device: str = "auto"
) -> dict[str, Any]:
    """Score a folder of images. Writes one line per image and returns means with 95 % intervals over prompts."""
    import torch

    import reward_models
    from flowrl.policies.loading import find_device
    from flowrl.rewards import load_reward
    from flowrl.statistics import task_mean_ci

    folder = Path(images)
    rows = _rows(folder, prompts)
    scorer = load_reward(parse_yaml(reward, "--reward"), find_device(device))
    results: list[dict[str, Any]] = []
    together = len(rows) if scorer.spec.scope == "set" else BATCH  # a score of a set is not one of its parts
    for group in _batches(rows, together):
        pictures = [_read(folder / row["image"]) for row in group]
        if len({picture.shape for picture in pictures}) > 1:
            raise UserError(f"{folder} holds images of different sizes; expected one size; score each size by itself")
        pixels = torch.stack(pictures)
        texts = [row["prompt"] for row in group]
        groups = torch.tensor([row["prompt_id"] for row in group])
        result = reward_models.checked_score(scorer, pixels, texts, group, groups, all_missing="allow")
        for i, row in enumerate(group):
            parts = {name: _number(values[i]) for name, values in result.parts.items()}
            found = {"score": _number(result.values[i]), "parts": parts, "reason": result.reasons[i]}
            results.append({"image": row["image"], "prompt": row["prompt"], **found})
    path = Path(out) if out else folder / "scores.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in results), encoding="utf-8")

    def estimate(name: str | None) -> dict[str, float]:
        by_prompt: dict[int, list[float]] = {}
        tags: dict[int, str] = {}
        for row, result in zip(rows, results, strict=True):
            value = result["score"] if name is None else result["parts"][name]
            by_prompt.setdefault(row["prompt_id"], []).append(math.nan if value is None else value)
            tags[row["prompt_id"]] = str(row.get("tag", ""))
        found = task_mean_ci(list(by_prompt.values()), list(tags.values()))
        return {"mean": found.mean, "low": found.low, "high": found.high}

    return {
        "reward": scorer.spec.name,
        "images": len(results),
        "missing": sum(row["score"] is None for row in results),
        "score": estimate(None),
        "parts": {name: estimate(name) for name in results[0]["parts"]},
        "written": str(path),
    }


def _rows(folder: Path, prompts: str | None) -> list[dict[str, Any]]:
    """One row per image with at least image, prompt, prompt_id."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected one with PNG images, such as `flowrl sample` writes")
    if prompts is None and (folder / LISTING).is_file():
        found = load_prompts(str(folder / LISTING))
        rows = [dict(prompt.metadata) for prompt in found]
    else:
        files = sorted(path.name for path in folder.glob("*.png") if path.name != "sheet.png")
        if prompts is None:
            raise UserError(
                f"{folder} has no {LISTING}, so the prompts are unknown; expected --prompts FILE with one prompt for "
                "each image, in the order of the file names"
            )
        given = load_prompts(prompts)
        if len(given) != len(files):
            raise UserError(
                f"{folder} has {len(files)} PNG images and {prompts} has {len(given)} prompts; expected one prompt for "
                "each image, in the order of the file names"
            )
        rows = [{**prompt.metadata, "image": name} for prompt, name in zip(given, files, strict=True)]
    numbers: dict[str, int] = {}
    for row in rows:
        if not isinstance(row.get("image"), str) or not (folder / row["image"]).is_file():
            raise UserError(
                f"{folder}: the image {row.get('image')!r} is missing; expected every file that {LISTING} names; "
                "sample again"
            )
        row["prompt_id"] = numbers.setdefault(row["prompt"], len(numbers))
    return rows


def _batches(rows: list[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    """Rows of about `size` images, without cutting the images of one prompt apart (group-wise rewards need them)."""
    by_prompt: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    rows[:] = [row for group in by_prompt.values() for row in group]
    batches: list[list[dict[str, Any]]] = [[]]
    for group in by_prompt.values():
        if batches[-1] and len(batches[-1]) + len(group) > size:
            batches.append([])
        batches[-1] += group
    return batches


def _read(path: Path) -> Any:
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"cannot read {path} as an image ({error}); expected a PNG; sample it again") from error
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def _number(value: Any) -> float | None:
    number = float(value)
    return None if math.isnan(number) else number
