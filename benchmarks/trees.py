"""What trees cost and what they keep, on the model in the box, in a minute or a few per command.

    python -m benchmarks.trees forwards     training forwards of 16 images in four ways, and their times
    python -m benchmarks.trees overhead     the engine's time over that of the bare network calls
    python -m benchmarks.trees diversity    how different the images of a group are, for many plans
    python -m benchmarks.trees noise        growing, falling and constant levels of equal budget

Each prints Markdown tables, and writes JSON with everything they depend on where --out names a file. Settings of the
config may be given as KEY=VALUE; --quick makes a small version of the command, to see that it works.

Times are of runs that alternate in one process: medians, and quartiles of the ratios. Intervals of diversity and
rewards are 95 % ones over prompts, those of cosines a jackknife over updates (see `benchmarks.gradient_signal`).
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from benchmarks import tree_costs, tree_diversity
from benchmarks.gradient_signal import FEWEST, load
from flowrl.cli import verb
from flowrl.config import Config, load_config
from flowrl.policies import PipelinePolicy

CONFIG = "flow_grpo/tiny_sd3"  # plain trajectories, to which every plan adds what makes it one
BASE = ("rollout.steps=10", "group_size=16")

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="What trees cost and what they keep. Example: python -m benchmarks.trees forwards --out forwards.json",
)
Changes = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the config.")]
Settings = Annotated[str, typer.Option("--config", help="A YAML file or the name of a shipped config.")]
Quick = Annotated[bool, typer.Option("--quick", help="A small version, to see that it works.")]
Out = Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")]
Clock = Annotated[
    Literal["wall", "cpu"], typer.Option(help="cpu counts processor time, where other jobs disturb less.")
]
Repeats = Annotated[int, typer.Option(min=1, help="Measurements of each; one more comes first and is thrown away.")]


@app.command()
@verb
def forwards(
    overrides: Changes = None,
    config: Settings = CONFIG,
    trees: Annotated[int, typer.Option(min=1, help="Groups of 16 images drawn and trained at once.")] = 8,
    repeats: Repeats = 7,
    clock: Clock = "wall",
    quick: Quick = False,
    out: Out = None,
) -> None:
    """Training forwards of 16 images: shared by siblings, one per edge, independent paths, all steps.

    Example: python -m benchmarks.trees forwards rollout.steps=16
    """
    base, policy = _load(config, overrides)
    found = tree_costs.forwards(base, policy, 1 if quick else trees, 1 if quick else repeats, clock)
    _finish("forwards", found, tree_costs.forwards_lines(found), policy, base, out)


@app.command()
@verb
def overhead(
    overrides: Changes = None,
    config: Settings = CONFIG,
    repeats: Repeats = 9,
    clock: Clock = "wall",
    quick: Quick = False,
    out: Out = None,
) -> None:
    """Rollouts and gradients of trees over the network calls that their plans count.

    Example: python -m benchmarks.trees overhead --repeats 15
    """
    base, policy = _load(config, overrides)
    cases = tree_costs.CASES[:2] if quick else tree_costs.CASES
    found = tree_costs.overhead(base, policy, cases, 1 if quick else repeats, clock)
    _finish("overhead", found, tree_costs.overhead_lines(found), policy, base, out)


@app.command()
@verb
def diversity(
    overrides: Changes = None,
    config: Settings = CONFIG,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts, with a group of images each.")] = 24,
    quick: Quick = False,
    out: Out = None,
) -> None:
    """Diversity and calls of groups of 16 images, against independent trajectories of the same kernel.

    Example: python -m benchmarks.trees diversity --prompts 48 rollout.level=0.6
    """
    base, policy = _load(config, [f"prompts.limit={2 if quick else prompts}", *(overrides or [])])
    plans = {part: dict(list(rows.items())[: 1 if quick else None]) for part, rows in tree_diversity.PLANS.items()}
    found = tree_diversity.diversity(base, policy, plans, _say)
    _finish("diversity", found, tree_diversity.diversity_lines(found), policy, base, out)


@app.command()
@verb
def noise(
    overrides: Changes = None,
    config: Settings = CONFIG,
    updates: Annotated[int, typer.Option(min=FEWEST, help="Updates drawn for each schedule.")] = 12,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of an update, with a tree of 16 images each.")] = 8,
    quick: Quick = False,
    out: Out = None,
) -> None:
    """Growing, falling and constant levels of equal budget: spread of siblings, diversity, gradient signal.

    Example: python -m benchmarks.trees noise --updates 24
    """
    base, policy = _load(config, [f"prompts_per_update={2 if quick else prompts}", *(overrides or [])])
    schedules = {k: dict(list(rows.items())[: 2 if quick else None]) for k, rows in tree_diversity.SCHEDULES.items()}
    found = tree_diversity.noise(base, policy, schedules, FEWEST if quick else updates, _say)
    _finish("noise", found, tree_diversity.noise_lines(found), policy, base, out)


def _load(name: str, overrides: list[str] | None) -> tuple[Config, PipelinePolicy]:
    config = load_config(name, [*BASE, *(overrides or [])])
    if config.threads:
        torch.set_num_threads(config.threads)
    return config, load(config)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _finish(
    what: str, found: dict[str, Any], lines: list[str], policy: PipelinePolicy, base: Config, out: Path | None
) -> None:
    """Print the tables; write the result with what it depends on."""
    result = {
        "benchmark": f"trees {what}",
        "policy": policy.name,
        "dtype": str(policy.dtype).removeprefix("torch."),
        "device": policy.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seed": base.seed,
        **found,
    }
    typer.echo("\n".join(lines))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        typer.echo(f"written to {out}")


if __name__ == "__main__":
    app()
