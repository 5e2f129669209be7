"""Command line of the pretraining: one verb for each stage, and one for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from safetensors.torch import load_file

from flowrl.cli import verb
from flowrl.errors import UserError

from . import clip as clip_stage
from . import export as export_stage
from . import flow as flow_stage
from . import vae as vae_stage
from .text import write_tokenizer

app = typer.Typer(
    help="Make the models in the box from rendered Shapes scenes. Every stage is seeded and goes on where it was "
    "stopped. Example: python -m benchmarks.pretrain all --out runs/pretrain",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Out = Annotated[Path, typer.Option(help="Folder of all stages: checkpoints, latents, measurements.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of weights, scenes and noise.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps.")]
Scenes = Annotated[int, typer.Option(min=256, help="How many scenes become latents; a multiple of 256.")]
To = Annotated[Path, typer.Option(help="Folder for tiny-sd3 and tiny-clip.")]
Limit = Annotated[int, typer.Option(min=6, help="Prompts of each measurement, spread evenly over the tasks.")]
Images = Annotated[int, typer.Option(min=1, help="Pictures per prompt in the measurements.")]
RUNS, MODELS = Path("runs/pretrain"), Path("runs/pretrain/models")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not (name.startswith("cuda") and torch.cuda.is_available()):
        raise UserError(f"got device {name!r}; expected auto, cpu, or cuda where there is one; choose another --device")
    return torch.device(name)


@app.command()
@verb
def vae(out: Out = RUNS, seed: Seed = 0, device: Device = "auto", steps: Steps = 3000) -> None:
    """Train the autoencoder.

    Example: python -m benchmarks.pretrain vae --out runs/pretrain
    """
    vae_stage.train(out / "vae", seed=seed, steps=steps, device=_device(device))


@app.command()
@verb
def latents(out: Out = RUNS, seed: Seed = 0, device: Device = "auto", scenes: Scenes = 65536) -> None:
    """Turn scenes into latents, once.

    Example: python -m benchmarks.pretrain latents --scenes 65536
    """
    if scenes % 256:
        raise UserError(f"got {scenes} scenes; expected a multiple of 256; try {scenes // 256 * 256}")
    autoencoder, tokenizer = vae_stage.load(out / "vae", _device(device)), write_tokenizer(out / "tokenizer")
    flow_stage.encode_latents(autoencoder, tokenizer, out / "latents", seed=seed, scenes=scenes)


@app.command()
@verb
def flow(out: Out = RUNS, seed: Seed = 0, device: Device = "auto", steps: Steps = 4700) -> None:
    """Train the text encoders and the transformer of tiny-sd3 on the latents.

    Example: python -m benchmarks.pretrain flow --device cuda
    """
    path = out / "latents" / "latents.safetensors"
    if not path.exists():
        raise UserError(f"{path} does not exist; expected the latents; run the stage latents first")
    tokenizer = write_tokenizer(out / "tokenizer")
    flow_stage.train(load_file(path), tokenizer, out / "flow", seed=seed, steps=steps, device=_device(device))


@app.command()
@verb
def clip(out: Out = RUNS, seed: Seed = 0, device: Device = "auto", steps: Steps = 2500) -> None:
    """Train tiny-clip, the held-out judge; it learns to see through the autoencoder if there is one.

    Example: python -m benchmarks.pretrain clip --steps 2500
    """
    where = _device(device)
    autoencoder = vae_stage.load(out / "vae", where) if (out / "vae").exists() else None
    tokenizer = write_tokenizer(out / "tokenizer")
    clip_stage.train(out / "clip", tokenizer, autoencoder, seed=seed, steps=steps, device=where)


@app.command()
@verb
def export(
    out: Out = RUNS,
    to: To = MODELS,
    device: Device = "auto",
    limit: Limit = 400,
    images: Images = 4,
    only: Annotated[Literal["tiny-sd3", "tiny-clip"] | None, typer.Option(help="Leave the other one as it is.")] = None,
) -> None:
    """Write tiny-sd3 and tiny-clip (whichever is trained), measure them and write their model cards.

    Example: python -m benchmarks.pretrain export --to flowrl/models
    """
    stages = {"flow": "tiny-sd3", "clip": "tiny-clip"}
    trained = [stage for stage, model in stages.items() if (out / stage).exists() and only in (None, model)]
    if not trained:
        raise UserError(f"{out} holds no trained {only or 'flow or clip'}; expected its stage; run that first")
    where, measured = str(_device(device)), out / "measured"
    command = f"python -m benchmarks.pretrain all --out {RUNS}"
    if "flow" in trained:
        facts = export_stage.export_sd3(out, to) | {"command": command}
        export_stage.measure_sd3(to / "tiny-sd3", measured, facts, device=where, limit=limit, images=images)
    if "clip" in trained:
        facts = export_stage.export_clip(out, to) | {"command": command}
        export_stage.measure_clip(to / "tiny-clip", measured, facts, device=where, per_task=min(limit, 100))


@app.command(name="all")
@verb
def everything(out: Out = RUNS, to: To = MODELS, seed: Seed = 0, device: Device = "auto") -> None:
    """All stages with their usual settings, and the export.

    Example: python -m benchmarks.pretrain all --out runs/pretrain --to flowrl/models
    """
    vae(out, seed, device)
    latents(out, seed, device)
    flow(out, seed, device)
    clip(out, seed, device)
    export(out, to, device)


if __name__ == "__main__":
    app()
