"""What the models of the box score: the numbers of their model cards."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from torch import Tensor

from benchmarks import shapes
from flowrl import load_policy
from flowrl.prompts import load_prompts
from flowrl.sampling import SampleSettings
from flowrl.statistics import Estimate, mean_ci, task_mean_ci
from reward_models.clip_score import ClipScore
from reward_models.protocol import to_8bit
from reward_models.shapes.grammar import SPLITS, TASKS, Metadata, describe, prompts
from reward_models.shapes.render import Scene, render, sample_scene
from reward_models.shapes.reward import ShapesReward

from .captions import captions, near_misses, one_near_miss, true_of
from .data import scene_batch, to_tensor

# (split, ODE steps, guidance)
SETTINGS = (("test", 20, 1.0), ("test", 20, 3.5), ("test", 8, 1.0), ("held_out", 20, 1.0))
CANDIDATES = 8  # near misses that a caption or a picture is compared with
Table = dict[str, Any]


def weights_hash(folder: Path) -> str:
    """Of all safetensors files of a model folder, so that numbers cannot be shown for other weights."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _entry(found: Estimate) -> Table:
    low, high = (None if math.isnan(x) else x for x in (found.low, found.high))  # no interval from a single prompt
    return {"mean": found.mean, "ci95": [low, high]}


# ------------------------------------------------------------------------------------------------ tiny-sd3 and tiny-sd
@torch.no_grad()
def vae_numbers(vae: AutoencoderKL, seed: int = 0, scenes: int = 512) -> Table:
    """Mean absolute error of reconstructions, and how often the detector agrees with the prompt before and after."""
    metadata, pictures = scene_batch(seed, 5, 0, scenes)
    inputs = 2 * pictures.to(vae.device) - 1
    parts = [vae.decode(vae.encode(x).latent_dist.mode()).sample.cpu() for x in inputs.split(64)]
    decoded = to_8bit((torch.cat(parts) + 1) / 2)
    reward, texts = ShapesReward(), [m["prompt"] for m in metadata]
    right = {
        name: mean_ci([[value] for value in reward.score(images, texts, list(metadata)).values.tolist()])
        for name, images in (("rendered", pictures), ("reconstructed", decoded))
    }
    l1 = (decoded - pictures).abs().mean().item()
    return {"scenes": scenes, "l1": l1, "detector_right": {name: _entry(found) for name, found in right.items()}}


def folder_name(split: str, steps: int, guidance: float) -> str:
    return f"{split}_steps{steps}_guidance{guidance:g}"


def load_vae(model: Path, device: str) -> AutoencoderKL:
    """The autoencoder as it ships."""
    return AutoencoderKL.from_pretrained(model, subfolder="vae").to(device)


def drawing_numbers(model: Path, work: Path, *, device: str, limit: int, images: int, seed: int = 0) -> list[Table]:
    """The official score at each of SETTINGS; finished measurements in `work` are read, not repeated."""
    tables = []
    for split, steps, guidance in SETTINGS:
        folder = work / folder_name(split, steps, guidance)
        if (folder / "summary.json").exists():
            tables.append(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
            continue
        print(f"measuring {split}, {steps} steps, guidance {guidance:g}", flush=True)
        policy = load_policy(str(model), device=device, train="none")
        settings = SampleSettings(steps=steps, guidance=guidance, images_per_prompt=images, seed=seed)
        tables.append(shapes.run(policy, settings, folder, split=split, limit=limit, judge=None))
    return tables


def plain_numbers(model: Path, *, device: str, limit: int, seed: int = 0, steps: int = 20) -> Table:
    """The official score of ``pipe(prompt)`` in plain diffusers; one image a prompt."""
    rows = load_prompts("shapes:test", limit=limit)
    pipe = DiffusionPipeline.from_pretrained(model).to(device)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    values: list[float] = []
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        texts = [row.text for row in part]
        out = pipe(texts, num_inference_steps=steps, guidance_scale=1.0, generator=generator, output_type="pt").images
        scored = ShapesReward().score(to_8bit(out.float().cpu()), texts, [row.metadata for row in part])
        values += scored.values.tolist()
    found = task_mean_ci([[value] for value in values], [row.metadata["tag"] for row in rows])
    return {"split": "test", "steps": steps, "guidance": 1.0, "prompts": len(rows), **_entry(found)}


# ----------------------------------------------------------------------------------------------------------- tiny-clip
def clip_numbers(model: Path, *, device: str, seed: int = 0, per_task: int = 100) -> Table:
    """Retrieval among near misses by split and task, and by what differs.

    caption: the picture's own caption scores above all (at most 8) near-miss captions. picture: the caption's own
    picture scores above those of the near misses. Captions true of the picture are no candidates.
    """
    judge = ClipScore(model, device=device)
    splits: dict[str, Table] = {}
    pairs: dict[str, list[list[float]]] = {}
    for split in ("test", "held_out"):
        splits[split] = {}
        for task in TASKS:
            cases = list(_cases(split, task, seed, per_task))
            if not cases:
                continue
            caption, picture, chances = [], [], []
            for texts, kinds, scenes in cases:
                images = judge.features(to_tensor([render(scene) for scene in scenes]))
                cosine = images @ judge.text_features(texts).T  # (pictures, captions), its own first
                false_captions = ~torch.from_numpy(true_of(_bodies(texts), scenes[:1], SPLITS))[0]
                false_pictures = ~torch.from_numpy(true_of(_bodies(texts[:1]), scenes, SPLITS))[:, 0]
                caption.append([float((cosine[0, 0] > cosine[0, false_captions]).all())])
                picture.append([float((cosine[0, 0] > cosine[false_pictures, 0]).all())])
                chances.append(1 / (1 + int(false_captions.sum())))
                for kind, value, false in zip(kinds, cosine[0, 1:].tolist(), false_captions[1:].tolist(), strict=True):
                    if false:
                        pairs.setdefault(kind, []).append([float(cosine[0, 0].item() > value)])
            splits[split][task] = {
                "prompts": len(cases),
                "chance": float(np.mean(chances)),
                "caption": _entry(mean_ci(caption)),
                "picture": _entry(mean_ci(picture)),
            }
    return {"retrieval": splits, "pairs": {kind: {"pairs": len(v), **_entry(mean_ci(v))} for kind, v in pairs.items()}}


def _bodies(texts: list[str]) -> list[str]:
    """Captions without their phrase ("a photo of")."""
    return [text.split(" of ", 1)[1] for text in texts]


def _cases(split: str, task: str, seed: int, per_task: int) -> Iterator[tuple[list[str], list[str], list[Scene]]]:
    """(captions, what differs in each but the first, scenes), the prompt itself being the first of each list."""
    table: dict[str, Metadata] = captions(SPLITS)
    for number, metadata in enumerate(prompts(split, [task], per_task)):
        rng = np.random.default_rng([seed, 6, SPLITS.index(split), TASKS.index(task), number])
        own = describe(metadata["tag"], metadata["include"])
        phrase = metadata["prompt"].removesuffix(own)
        others = list(dict.fromkeys(one_near_miss(own, rng, SPLITS) for _ in range(CANDIDATES)))
        kind_of = {text: kind for kind, texts in near_misses(own, SPLITS).items() for text in texts}
        scenes = [sample_scene(table[text], rng) for text in (own, *others)]
        yield [phrase + text for text in (own, *others)], [kind_of[text] for text in others], scenes


def judge_numbers(model: Path, drawn: Path, *, device: str) -> Table:
    """On pictures that tiny-sd3 drew (a measurement's folder): how often, of two pictures of one prompt, the right one
    has the higher cosine. By the official and the strict decision, by task and over all, intervals over prompts."""
    judge = ClipScore(model, device=device)
    rows = [json.loads(line) for line in (drawn / "images.jsonl").read_text(encoding="utf-8").splitlines()]
    pictures = torch.cat([_read(drawn.parent / row["path"]) for row in rows])
    cosine = judge.score(pictures, [row["prompt"] for row in rows], [{}] * len(rows)).values.tolist()
    tables: Table = {}
    for decision in ("shapes", "shapes-strict"):
        groups: dict[tuple[str, int], tuple[list[float], list[float]]] = {}
        for row, value in zip(rows, cosine, strict=True):
            wrong_and_right = groups.setdefault((row["tag"], row["prompt_id"]), ([], []))
            wrong_and_right[int(row["scores"][decision])].append(value)
        wins = {
            key: [float(good > bad) for good in right for bad in wrong]
            for key, (wrong, right) in groups.items()
            if right and wrong
        }
        tables[decision] = {
            task: {"prompts": len(found), **_entry(mean_ci(found))}
            for task in TASKS
            if (found := [value for (tag, _), value in wins.items() if tag == task])
        }
        everything = task_mean_ci(list(wins.values()), [tag for tag, _ in wins])
        tables[decision]["mean of the tasks"] = {"prompts": len(wins), **_entry(everything)}
    return tables


def _read(path: Path) -> Tensor:
    return to_tensor([np.asarray(Image.open(path).convert("RGB"))])
