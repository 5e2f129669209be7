"""The verbs `flowrl reward train` and `flowrl reward pairs`; `flowrl.cli` puts them beside `flowrl reward bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option(min=0, help="Of all that is drawn.")]


def add_to(app: typer.Typer, verb: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Register the verbs; `verb` turns errors that are meant for people into messages and exit codes."""
    app.command("train")(verb(train))
    app.command("pairs")(verb(pairs))


def train(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="JSON lines of pairs, triplets or counts.")],
    out: Annotated[Path, typer.Option(help="Folder of the scorer; its path is then the reward's name.")],
    body: Annotated[str, typer.Option(help="A bundled CLIP, a CLIPModel folder or a hub id.")] = "tiny-clip",
    what: Annotated[str, typer.Option("--train", help="head, layers, all or lora.")] = "head",
    loss: Annotated[str, typer.Option(help="cross_entropy, bradley_terry or triplet.")] = "cross_entropy",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="Pairs per step.")] = 64,
    lr: Annotated[float | None, typer.Option(help="Default: 1e-3 head, 1e-4 lora, 3e-6 layers and all.")] = None,
    hidden: Annotated[list[int] | None, typer.Option(min=1, help="Width of a head's layer; may be repeated.")] = None,
    inputs: Annotated[str, typer.Option(help="What a head sees: image_text, or image alone.")] = "image_text",
    layers: Annotated[int, typer.Option(min=1, help="layers: last blocks of each tower.")] = 2,
    rank: Annotated[int, typer.Option(min=1, help="lora: its rank.")] = 8,
    margin: Annotated[float, typer.Option(min=0.0, help="triplet: how far the winner should be ahead.")] = 0.2,
    held_out: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of the prompts only judged on.")] = 0.1,
    confidence: Annotated[float | None, typer.Option(help="counts: how sure a pair must be; default 0.8.")] = None,
    strength: Annotated[float | None, typer.Option(help="counts: the prior's strength, in counts; default 1.")] = None,
    most: Annotated[int | None, typer.Option(min=1, help="counts: pairs per prompt, the surest; default all.")] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 100,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the fit in OUT.")] = False,
    device: Device = "auto",
) -> None:
    """Fit a scorer to preferences; its folder then is a reward.

    Example: flowrl reward train pairs.jsonl --out my-scorer --hidden 256
    """
    from flowrl.commands import reward
    from reward_models.training.fit import Settings

    settings = Settings(
        loss=loss, margin=margin, steps=steps, batch=batch, lr=lr, held_out=held_out, seed=seed, save_every=save_every,  # type: ignore[arg-type]
    )  # fmt: skip
    counts = {"confidence": confidence, "strength": strength, "most": most}
    found = reward.train(
        manifest, out, settings, body=body, what=what, hidden=tuple(hidden or ()), inputs=inputs, layers=layers,
        rank=rank, counts={key: value for key, value in counts.items() if value is not None}, device=device,
        resume=resume, say=typer.echo,
    )  # fmt: skip
    for aspect, accuracy in found["accuracy"].items():
        typer.echo(f"held-out accuracy {aspect}: {reward.describe(accuracy)}".replace(" :", ":"))
    typer.echo(f"written to {out}; for example: flowrl score IMAGES --reward {out}")


def pairs(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="Folder or manifest, some images of each prompt.")],
    rank: Annotated[str, typer.Option(help="The judge of pairs: a win rate, or any pointwise reward.")],
    score: Annotated[str, typer.Option(help="The pointwise reward that sifts winners and losers.")],
    out: Annotated[Path, typer.Option(help="The new manifest.")] = Path("pairs.jsonl"),
    order: Annotated[str, typer.Option(help="both, random or given: in which order the judge sees a pair.")] = "both",
    least: Annotated[float, typer.Option(min=0.0, help="Score difference above which a pair is kept.")] = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Make preference pairs out of images: rank random pairs, keep the best winner and the worst loser.

    Example: flowrl reward pairs samples --rank tiny-clip --score shapes-soft --out pairs.jsonl
    """
    from flowrl.commands import reward

    found = reward.pairs(images, out, rank=rank, score=score, order=order, seed=seed, least=least, device=device)
    typer.echo(", ".join(f"{number} {what}" for what, number in found.items()))
    typer.echo(f"written to {out}")
