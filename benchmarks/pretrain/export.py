"""From the checkpoints of the stages to the folders that ship, their measurements and their model cards."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import CLIPTokenizer

from flowrl.errors import UserError

from . import measure
from .assemble import assemble, assemble_sd, save_half, save_half_clip
from .cards import clip_card, sd3_card, sd_card
from .clip import Trainee
from .diffusion import TextToNoise
from .flow import TextToImage
from .loop import load_ema
from .text import vocabulary_hash, write_tokenizer
from .vae import build as build_vae

MOST_MB = {"tiny-sd3": 12.0, "tiny-sd": 12.0, "tiny-clip": 3.0}  # limits of what ships
MEASURED = "measured.json"


def parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def _finished(model: nn.Module, folder: Path, tokenizer: CLIPTokenizer | None = None) -> dict[str, Any]:
    """Load EMA weights into ``model``; what the stage says of itself. It must have learned with this tokenizer."""
    facts = load_ema(model, folder)
    ours = None if tokenizer is None else vocabulary_hash(tokenizer)
    if ours is not None and facts.get("tokenizer") != ours:
        raise UserError(
            f"{folder} was trained with vocabulary {facts.get('tokenizer')}; expected {ours}, that of the tokenizer "
            "which would ship with it; train the stage again in a new --out"
        )
    if facts["done"] < facts["steps"]:
        raise UserError(
            f"{folder} is at step {facts['done']} of {facts['steps']}; expected a finished stage; run the stage again, "
            "it goes on where it was"
        )
    return facts


def export_sd3(out: Path, to: Path) -> dict[str, Any]:
    """Write ``to/tiny-sd3`` from the stages in ``out``; returns the facts that need no measurement."""
    tokenizer = write_tokenizer(out / "tokenizer")
    vae, model = build_vae(), TextToImage(tokenizer)
    training = {"vae": _finished(vae, out / "vae"), "flow": _finished(model, out / "flow", tokenizer)}
    pipeline = assemble(model, vae, tokenizer, *_shift_and_scale(out))
    sizes = {
        "transformer": parameters(pipeline.transformer),
        "text": parameters(pipeline.text_encoder, pipeline.text_encoder_2),
        "vae": parameters(pipeline.vae),
        "t5": parameters(pipeline.text_encoder_3),
    }
    return _publish(lambda folder: save_half(pipeline, folder), to / "tiny-sd3", sizes, training)


def export_sd(out: Path, to: Path) -> dict[str, Any]:
    """Write ``to/tiny-sd`` from the stages in ``out``; returns the facts that need no measurement."""
    tokenizer = write_tokenizer(out / "tokenizer")
    vae, model = build_vae(), TextToNoise(tokenizer)
    training = {"vae": _finished(vae, out / "vae"), "sd": _finished(model, out / "sd", tokenizer)}
    pipeline = assemble_sd(model, vae, tokenizer, _shift_and_scale(out)[1])
    sizes = {
        "unet": parameters(pipeline.unet),
        "text": parameters(pipeline.text_encoder),
        "vae": parameters(pipeline.vae),
    }
    return _publish(lambda folder: save_half(pipeline, folder), to / "tiny-sd", sizes, training)


def _shift_and_scale(out: Path) -> tuple[float, float]:
    """Of the latents that the models were trained on."""
    with safe_open(out / "latents" / "latents.safetensors", "pt") as file:
        return float(file.get_tensor("shift")), float(file.get_tensor("scale"))


def export_clip(out: Path, to: Path) -> dict[str, Any]:
    """Write ``to/tiny-clip``; returns the facts that need no measurement."""
    tokenizer = write_tokenizer(out / "tokenizer")
    trainee = Trainee(tokenizer)
    training = {"clip": _finished(trainee, out / "clip", tokenizer)}
    sizes = {"all": parameters(trainee.clip)}
    model = trainee.model()
    return _publish(lambda folder: save_half_clip(model, tokenizer, folder), to / "tiny-clip", sizes, training)


def _publish(save: Any, folder: Path, sizes: dict[str, int], training: dict[str, Any]) -> dict[str, Any]:
    """Write beside, check the size, then replace the folder that was there."""
    fresh = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    save(fresh)
    for file in fresh.rglob("*.safetensors"):
        file.chmod(0o644)  # some versions of safetensors let nobody else read what they write
    if (size := megabytes(fresh)) > MOST_MB[folder.name]:
        raise UserError(f"{fresh} has {size:.1f} MB; expected at most {MOST_MB[folder.name]}; make the model smaller")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(fresh, folder)
    print(f"{folder}: {size:.2f} MB", flush=True)
    return {"weights": measure.weights_hash(folder), "megabytes": size, "parameters": sizes, "training": training}


def measure_sd3(folder: Path, work: Path, facts: dict[str, Any], *, device: str, limit: int, images: int) -> None:
    """Measure tiny-sd3, write ``measured.json`` and the card. What is already measured in ``work`` is not repeated."""
    facts |= _drawing_numbers(folder, work, facts, device, limit, images)
    _write(folder, facts, sd3_card(facts))


def measure_sd(folder: Path, work: Path, facts: dict[str, Any], *, device: str, limit: int, images: int) -> None:
    """As `measure_sd3`, of tiny-sd."""
    facts |= _drawing_numbers(folder, work, facts, device, limit, images)
    _write(folder, facts, sd_card(facts))


def _drawing_numbers(
    folder: Path, work: Path, facts: dict[str, Any], device: str, limit: int, images: int
) -> dict[str, Any]:
    here = work / f"{folder.name}-{facts['weights']}-{limit}x{images}"
    return {
        "vae": measure.vae_numbers(measure.load_vae(folder, device)),
        "scores": measure.drawing_numbers(folder, here, device=device, limit=limit, images=images),
        "plain": measure.plain_numbers(folder, device=device, limit=max(limit // 4, 6)),
    }


def measure_clip(folder: Path, work: Path, facts: dict[str, Any], *, device: str, per_task: int) -> None:
    """Measure tiny-clip, write ``measured.json`` and the card; as a judge too, if tiny-sd3 was measured in ``work``."""
    facts |= measure.clip_numbers(folder, device=device, per_task=per_task)
    test = measure.folder_name(*measure.SETTINGS[0])
    drawn = sorted(work.glob(f"tiny-sd3-*/{test}/summary.json"), key=lambda file: file.stat().st_mtime)
    if drawn:
        facts["judge"] = measure.judge_numbers(folder, drawn[-1].parent, device=device)
        facts["judged"] = drawn[-1].parent.parent.name.split("-")[2]
    _write(folder, facts, clip_card(facts))


def _write(folder: Path, facts: dict[str, Any], card: str) -> None:
    (folder / MEASURED).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"{folder / 'README.md'} written", flush=True)
