"""Command line of the pretraining: one verb for each stage, and one for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from flowrl.cli import verb
from flowrl.distributed import World
from flowrl.errors import UserError

from . import clip as clip_stage
from . import diffusion as sd_stage
from . import export as export_stage
from . import flow as flow_stage
from . import vae as vae_stage
from .loop import load_ema
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
To = Annotated[Path, typer.Option(help="Folder for tiny-sd3, tiny-sd and tiny-clip.")]
Limit = Annotated[int, typer.Option(min=6, help="Prompts of each measurement, spread evenly over the tasks.")]
Images = Annotated[int, typer.Option(min=1, help="Pictures per prompt in the measurements.")]
RUNS, MODELS = Path("runs/pretrain"), Path("runs/pretrain/models")


@contextmanager
def _world(device: str) -> Iterator[World]:
    """The processes that torchrun started, or this one alone."""
    world = World.join(device)
    try:
        yield world
    finally:
        world.leave()


@app.command()
@verb
def vae(out: Out = RUNS, seed: Seed = 0, device: Device = "auto", steps: Steps = 3000) -> None:
    """Train the autoencoder.

    Example: python -m benchmarks.pretrain vae --out runs/pretrain
    """
    with _world(device) as world:
        vae_stage.train(out / "vae", seed=seed, steps=steps, world=world)


@app.command()
@verb
def latents(out: Out = RUNS, seed: Seed = 0, device: Device = "auto", scenes: Scenes = 65536) -> None:
    """Turn scenes into latents, once.

    Example: python -m benchmarks.pretrain latents --scenes 65536
    """
    with _world(device) as world:
        if world.main:
            _latents(out, seed, world.device, scenes)


@app.command()
@verb
def flow(out: Out = RUNS, seed: Seed = 0, device: Device = "auto", steps: Steps = 8500) -> None:
    """Train the text encoders and the transformer of tiny-sd3 on the latents. On a CPU one process per core is fastest.

    Example: OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.pretrain flow --out runs/pretrain
    """
    with _world(device) as world:
        _flow(out, seed, world, steps)


@app.command()
@verb
def sd(out: Out = RUNS, seed: Seed = 0, device: Device = "auto", steps: Steps = 8000) -> None:
    """Train the UNet and the text encoder of tiny-sd on the latents, after the stage flow, whose text it starts from.

    Example: OMP_NUM_THREADS=1 python -m benchmarks.pretrain sd --out runs/pretrain
    """
    with _world(device) as world:
        _sd(out, seed, world, steps)


@app.command()
@verb
def clip(out: Out = RUNS, seed: Seed = 0, device: Device = "auto", steps: Steps = 2500) -> None:
    """Train tiny-clip, the held-out judge; it learns to see through the autoencoder if there is one.

    It is one process's work: its loss compares all pictures of a batch.

    Example: python -m benchmarks.pretrain clip --steps 2500
    """
    with _world(device) as world:
        if world.main:
            _clip(out, seed, world.device, steps)


@app.command()
@verb
def export(
    out: Out = RUNS,
    to: To = MODELS,
    device: Device = "auto",
    limit: Limit = 400,
    images: Images = 4,
    only: Annotated[
        Literal["tiny-sd3", "tiny-sd", "tiny-clip"] | None, typer.Option(help="Leave the others as they are.")
    ] = None,
) -> None:
    """Write tiny-sd3, tiny-sd and tiny-clip (whichever is trained), measure them and write their model cards.

    Example: python -m benchmarks.pretrain export --to flowrl/models
    """
    stages = {"flow": "tiny-sd3", "sd": "tiny-sd", "clip": "tiny-clip"}
    trained = [stage for stage, model in stages.items() if (out / stage).exists() and only in (None, model)]
    if not trained:
        raise UserError(f"{out} holds no trained {only or 'flow, sd or clip'}; expected its stage; run that first")
    with _world(device) as world:
        if world.main:
            _export(out, to, str(world.device), trained, limit, images)


def _export(out: Path, to: Path, where: str, trained: list[str], limit: int = 400, images: int = 4) -> None:
    measured = out / "measured"
    command = f"OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.pretrain all --out {RUNS}"
    if "flow" in trained:
        facts = export_stage.export_sd3(out, to) | {"command": command}
        export_stage.measure_sd3(to / "tiny-sd3", measured, facts, device=where, limit=limit, images=images)
    if "sd" in trained:
        facts = export_stage.export_sd(out, to) | {"command": command}
        export_stage.measure_sd(to / "tiny-sd", measured, facts, device=where, limit=limit, images=images)
    if "clip" in trained:
        facts = export_stage.export_clip(out, to) | {"command": command}
        export_stage.measure_clip(to / "tiny-clip", measured, facts, device=where, per_task=min(limit, 100))


@app.command(name="all")
@verb
def everything(out: Out = RUNS, to: To = MODELS, seed: Seed = 0, device: Device = "auto") -> None:
    """All stages with their usual settings, and the export. On a CPU one process per core is fastest.

    Example: OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.pretrain all --to flowrl/models
    """
    with _world(device) as world:
        vae_stage.train(out / "vae", seed=seed, world=world)
        with world.together():
            if world.main:
                _latents(out, seed, world.device)
        _flow(out, seed, world)
        _sd(out, seed, world)
    if world.main:
        _clip(out, seed, world.device)
        _export(out, to, str(world.device), ["flow", "sd", "clip"])


def _latents(out: Path, seed: int, device: torch.device, scenes: int = 65536) -> None:
    if scenes % 256:
        raise UserError(f"got {scenes} scenes; expected a multiple of 256; try {scenes // 256 * 256}")
    autoencoder, tokenizer = vae_stage.load(out / "vae", device), write_tokenizer(out / "tokenizer")
    flow_stage.encode_latents(autoencoder, tokenizer, out / "latents", seed=seed, scenes=scenes)


def _flow(out: Path, seed: int, world: World, steps: int = 8500) -> None:
    data, tokenizer = _pairs(out, world)
    flow_stage.train(data, tokenizer, out / "flow", seed=seed, steps=steps, world=world)


def _sd(out: Path, seed: int, world: World, steps: int = 8000) -> None:
    data, tokenizer = _pairs(out, world)
    finished = flow_stage.TextToImage(tokenizer)
    load_ema(finished, out / "flow")
    text = finished.text.layers_1.text_model.state_dict()
    sd_stage.train(data, tokenizer, out / "sd", text=text, seed=seed, steps=steps, world=world)


def _pairs(out: Path, world: World) -> tuple[dict[str, torch.Tensor], CLIPTokenizer]:
    """The latents with their prompts, and the tokenizer."""
    path = out / "latents" / "latents.safetensors"
    with world.together():
        if not path.exists():
            raise UserError(f"{path} does not exist; expected the latents; run the stage latents first")
        if world.main:
            write_tokenizer(out / "tokenizer")
    return load_file(path), CLIPTokenizer.from_pretrained(out / "tokenizer")


def _clip(out: Path, seed: int, device: torch.device, steps: int = 2500) -> None:
    autoencoder = vae_stage.load(out / "vae", device) if (out / "vae").exists() else None
    tokenizer = write_tokenizer(out / "tokenizer")
    clip_stage.train(out / "clip", tokenizer, autoencoder, seed=seed, steps=steps, device=device)


if __name__ == "__main__":
    app()
