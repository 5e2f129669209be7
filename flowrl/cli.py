"""The command line: verbs, their options and exit codes. What a verb does is in `flowrl.commands` and the library.

Exit codes: 0 done; 2 the input is wrong; 3 a guard stopped the run; 130 and 143 ended by a signal, state saved; 1 else.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

from flowrl import __version__, cli_reward
from flowrl.commands.suites import SUITES
from flowrl.errors import GuardStop, UserError

# Loggers of libraries that speak of extras which nobody needs here, and of long prompts before they are cut (of the cut
# itself diffusers warns).
CHATTER = ("transformers.utils.import_utils", "transformers.tokenization_utils_base", "bitsandbytes.backends.cpu.ops")

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    name="flowrl",
    help="Align text-to-image diffusion and flow models with rewards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure a model on a benchmark. Example: flowrl bench shapes tiny-sd3", no_args_is_help=True)
app.add_typer(bench, name="bench")
reward_app = typer.Typer(
    help="Train and judge rewards. Example: flowrl reward bench imagereward test.json --images DIR --reward clip",
    no_args_is_help=True,
)
app.add_typer(reward_app, name="reward")


def main() -> None:
    """Entry point of the console script."""
    _quiet_libraries()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("flowrl").setLevel(logging.INFO)  # such as the memory that full fine-tuning takes
    app()


def _quiet_libraries() -> None:
    """Silence loading bars and CHATTER, unless the environment asks for them; other warnings stay.

    By variables and names, because importing these libraries takes seconds.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of hub downloads do not heed it, and stay
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        for name in CHATTER:
            logging.getLogger(name).setLevel(logging.ERROR)


def verb(command: Callable[P, R]) -> Callable[P, R]:
    """Turn the errors that are meant for people into a message and an exit code; all others keep their traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (UserError, GuardStop) as error:
            raise _exit(error, error.exit_code) from error
        except _reward_errors() as error:
            raise _exit(error, 1) from error
        except KeyboardInterrupt as error:
            raise _exit("interrupted", 130) from error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise _exit(f"the disk is full ({error}); free some space, then continue a run with --resume", 1) from error

    return run


def _reward_errors() -> tuple[type[Exception], ...]:
    """RewardError, where something could have raised it: importing it would bring torch."""
    module = sys.modules.get("reward_models.protocol")
    return () if module is None else (module.RewardError,)


def _exit(message: object, code: int) -> typer.Exit:
    typer.echo(f"flowrl: {message}", err=True)
    return typer.Exit(code)


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(line)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"flowrl {__version__}")
        raise typer.Exit()


Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped config.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, with dotted keys.")
]
PolicyPath = Annotated[
    str, typer.Argument(metavar="POLICY", help="A bundled model, a pipeline folder, a hub id, or the folder of a run.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
LoraPath = Annotated[str | None, typer.Option("--lora", help="File or folder of a LoRA to apply.")]
Steps = Annotated[int, typer.Option(min=1, help="ODE steps.")]
Guidance = Annotated[float, typer.Option(min=0.0, help="Guidance scale; 1 is none.")]
Height = Annotated[int | None, typer.Option(min=8, help="Pixels; default: what the model was made for.")]
Width = Annotated[int | None, typer.Option(min=8, help="Pixels; default: what the model was made for.")]
Images = Annotated[int, typer.Option("--images", min=1, help="Images per prompt.")]
RewardNames = Annotated[
    str,
    typer.Option(
        "--reward", help="Names with commas (a column each), module:attribute, '{shapes: 1, jpeg: 0.1}' (a sum)."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the noise.")]
Chunk = Annotated[int, typer.Option(min=1, help="Rows per model call.")]


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
@verb
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in output_dir.")] = False,
) -> None:
    """Fine-tune a model with a reward, and report what it did to it.

    Example: flowrl train quickstart seed=1 output_dir=runs/second
    """
    from flowrl.config import load_config

    loaded = load_config(config, overrides or [], processes=_processes())
    from flowrl.trainer import Stopped
    from flowrl.trainer import train as run

    try:
        run(loaded, resume=resume)
    except Stopped as stopped:
        raise _exit(stopped, stopped.exit_code) from stopped


@app.command()
@verb
def sample(
    policy: PolicyPath,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A prompt source, such as prompts.txt or shapes:test.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many prompts of the source.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the images; must be new.")] = Path("samples"),
    images: Images = 4,
    steps: Steps = 20,
    guidance: Guidance = 1.0,
    height: Height = None,
    width: Width = None,
    seed: Seed = 0,
    chunk: Chunk = 64,
    lora: LoraPath = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Draw images of prompts into a folder, with a sheet and a listing.

    Example: flowrl sample tiny-sd3 --prompt "a photo of a red star" --out stars
    """
    from flowrl.commands import pictures
    from flowrl.sampling import SampleSettings

    chosen = pictures.given_prompts(prompt or [], prompts, limit)
    pictures.check_new(out)
    model = pictures.open_policy(policy, lora=lora, device=device, dtype=dtype)
    settings = SampleSettings(steps, guidance, height, width, images, seed, chunk)
    folder = pictures.sample(model, chosen, settings, out)
    typer.echo(f"{len(chosen) * images} images in {folder}, at a glance in {folder / 'sheet.png'}")


@app.command()
@verb
def score(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES...", help="A folder, a manifest (.csv, .jsonl, .json), files or patterns."),
    ],
    reward: RewardNames,
    prompts: Annotated[str | None, typer.Option(help="Prompts of the images in the order of their names.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="The prompt of all images, or one for each.")
    ] = None,
    out: Annotated[
        list[Path] | None,
        typer.Option(help="File that ends in .jsonl (default: IMAGES/scores.jsonl), .csv, .json, .html; repeatable."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Score images with any rewards; what is scored already is kept.

    Example: flowrl score stars --reward shapes,jpeg --out stars/scores.jsonl --out stars/scores.html
    """
    from flowrl.commands import scoring

    scoring.score(images, reward, prompts=prompts, texts=prompt or (), outs=out or (), device=device, say=typer.echo)


@app.command()
@verb
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A scored folder, a scores.jsonl, a run, or its eval file.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What is compared with it.")],
    score: Annotated[list[str] | None, typer.Option(help="Only this score; may be repeated.")] = None,
    out: Annotated[
        list[Path] | None, typer.Option(help="File that ends in .md, .html or .json; may be repeated.")
    ] = None,
) -> None:
    """Compare two sets of scored images pair by pair (same prompt, same seed or file): B minus A, with intervals.

    Example: flowrl compare runs/flow_grpo runs/tree_grpo --out compared.html
    """
    from flowrl.commands import compare as comparing

    typer.echo(comparing.compare(a, b, names=score or (), outs=out or ()))


@bench.command("shapes")
@verb
def bench_shapes(
    policy: PolicyPath,
    split: Annotated[str, typer.Option(help="train, test or held_out.")] = "test",
    task: Annotated[list[str] | None, typer.Option("--task", help="Only this task; may be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many prompts, spread over the tasks.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the result; must be new.")] = Path("bench_shapes"),
    images: Images = 4,
    steps: Steps = 20,
    guidance: Guidance = 1.0,
    seed: Seed = 0,
    chunk: Chunk = 64,
    lora: LoraPath = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """GenEval's tasks in the Shapes world, with 95 % intervals over prompts.

    Example: flowrl bench shapes tiny-sd3 --limit 200 --guidance 3.5
    """
    from benchmarks import shapes
    from flowrl.commands import pictures
    from flowrl.sampling import SampleSettings

    model = pictures.open_policy(policy, lora=lora, device=device, dtype=dtype)
    settings = SampleSettings(steps, guidance, None, None, images, seed, chunk)
    found = shapes.run(model, settings, out, split=split, tasks=task or None, limit=limit)
    for name, value in {"all tasks": found["scores"]["shapes"], **found["tasks"]}.items():
        low, high = value["ci95"]
        typer.echo(f"{name:<16}{value['mean']:.3f}   95 % interval {low:.3f} to {high:.3f}")
    typer.echo(f"written to {out / 'summary.json'}")


def _suite(name: str) -> Callable[..., None]:
    """The command of one prompt suite."""

    @verb
    def run(
        policy: Annotated[
            str | None, typer.Argument(metavar="[POLICY]", help="What draws; none: the images are in --out already.")
        ] = None,
        out: Annotated[Path, typer.Option(help="Folder of the images and results; the same command goes on there.")] = (
            Path(f"bench_{name}")
        ),
        reward: Annotated[
            list[str] | None, typer.Option(help="Scorers as in `flowrl score`, or TASK=SCORER; may be repeated.")
        ] = None,
        prompts: Annotated[str | None, typer.Option(help="The benchmark's prompt file or folder, or hub:...")] = None,
        step: Annotated[list[str] | None, typer.Option(help="Only generate, score or report; may be repeated.")] = None,
        limit: Annotated[
            int | None, typer.Option(min=1, help="At most so many prompts, spread over the tasks.")
        ] = None,
        images: Annotated[int | None, typer.Option(min=1, help="Images per prompt; default: the benchmark's.")] = None,
        steps: Steps = 20,
        guidance: Guidance = 1.0,
        height: Height = None,
        width: Width = None,
        seed: Seed = 0,
        chunk: Chunk = 64,
        lora: LoraPath = None,
        device: Device = "auto",
        dtype: Dtype = "float32",
    ) -> None:
        from benchmarks.suites.pages import brief
        from benchmarks.suites.run import STEPS
        from benchmarks.suites.run import run as measure
        from flowrl.commands import pictures
        from flowrl.sampling import SampleSettings

        drawn = {
            "policy": policy, "lora": lora, "dtype": dtype, "steps": steps, "guidance": guidance, "height": height,
            "width": width, "seed": seed,
        }  # fmt: skip
        summary = measure(
            name, out, steps=step or STEPS, source=prompts, rewards=reward or (), limit=limit, images=images,
            open_policy=functools.partial(pictures.open_policy, policy, lora=lora, device=device, dtype=dtype)
            if policy else None,
            settings=SampleSettings(steps, guidance, height, width, 1, seed, chunk),
            drawn=drawn if policy else {}, device=device, say=typer.echo,
        )  # fmt: skip
        if summary is not None:
            _say(brief(summary))
            typer.echo(f"written to {out / 'summary.json'}, report.md and report.html")

    return run


for _name, (_about, _example) in SUITES.items():
    bench.command(_name, help=f"{_about} Generates, scores and reports.\n\nExample: flowrl bench {_name} {_example}")(
        _suite(_name)
    )


@bench.command("methods")
@verb
def bench_methods(
    words: Annotated[
        list[str],
        typer.Argument(metavar="METHOD... [KEY=VALUE]...", help="Recipes or YAML files, and settings for all of them."),
    ],
    seeds: Annotated[list[str] | None, typer.Option(help="One or more, as in --seeds 0 1 2 (the default).")] = None,
    budget: Annotated[float, typer.Option(min=0.0, help="Seconds of training of each run.")] = 300.0,
    clock: Annotated[str, typer.Option(help="wall, or cpu: of the CPU time of the run's process.")] = "wall",
    processes: Annotated[int, typer.Option(min=1, help="Runs at once, each on CPU cores of its own.")] = 1,
    baseline: Annotated[
        list[str] | None, typer.Option(help="Its final score is a target for all; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs; the same command goes on there.")] = Path(
        "runs/methods"
    ),
) -> None:
    """Recipes side by side on the tiny world: same model, prompts, evaluation and seconds of training.

    Example: flowrl bench methods flow_grpo dynamic_tree_rpo --seeds 0 1 2 --budget 300 --out runs/methods
    """
    from benchmarks import methods

    # An option takes one value, so the numbers after the first seed arrive among the words.
    numbers = [*(seeds or ()), *(word for word in words if seeds and word.isdecimal())]
    names = [word for word in words if word not in numbers]
    if wrong := [text for text in numbers if not text.isdecimal()]:
        raise UserError(f"got --seeds {wrong[0]}; expected whole numbers from 0 on, as in --seeds 0 1 2")
    methods.measure(
        [name for name in names if "=" not in name], [int(text) for text in numbers] or [0, 1, 2], out,
        budget_s=budget, clock=clock, processes=processes, baselines=baseline,
        overrides=[name for name in names if "=" in name], say=typer.echo,
    )  # fmt: skip
    typer.echo((out / "table.md").read_text(encoding="utf-8"))
    typer.echo(f"written to {out / 'summary.json'}, table.md, curves.png and report.html")


@reward_app.command("bench")
@verb
def reward_bench(
    form: Annotated[str, typer.Argument(metavar="FORMAT", help="imagereward, hpdv2, pickapic, genai or genai-cmu.")],
    labels: Annotated[Path, typer.Argument(metavar="LABELS", help="The file with the human judgements.")],
    reward: RewardNames,
    images: Annotated[Path, typer.Option(help="Folder to which the image names of LABELS are relative.")] = Path("."),
    validation: Annotated[
        Path | None, typer.Option(help="pickapic: labels on which the threshold of a tie is chosen.")
    ] = None,
    scale: Annotated[float, typer.Option(help="pickapic: what scores are multiplied by before the softmax.")] = 1.0,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many prompts.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of scores and result; the same command goes on there.")] = Path(
        "reward_bench"
    ),
    device: Device = "auto",
) -> None:
    """How often scorers agree with people, by the rule of each data set, with intervals over prompts.

    Example: flowrl reward bench imagereward test.json --images test --reward pickscore,clip --out agreement
    """
    from benchmarks import preference_bench

    found = preference_bench.run(
        form,
        labels,
        images,
        reward,
        out,
        validation=validation,
        scale=scale,
        limit=limit,
        device=device,
        say=typer.echo,
    )
    _say(preference_bench.brief(found))
    typer.echo(f"written to {out / 'summary.json'}")


@app.command()
@verb
def report(run: RunFolder) -> None:
    """Write report.html of a run anew, also of one that is still going on.

    Example: flowrl report runs/quickstart
    """
    from flowrl.report import write_report

    typer.echo(f"report: {write_report(run)}")


@app.command()
@verb
def validate(
    config: Config,
    overrides: Overrides = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Also estimate memory, time and disk.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the resolved config.")] = False,
) -> None:
    """Check a config and its prompts without training; every problem is reported at once.

    Example: flowrl validate flow_grpo/sd35_medium_24gb rollout.chunk=2 --estimate
    """
    from flowrl.commands.check import check
    from flowrl.config import load_config, resolved_yaml

    loaded = load_config(config, overrides or [], processes=_processes())
    if show:
        typer.echo(resolved_yaml(loaded))
    _say(check(loaded))
    if estimate:
        from flowrl.estimate import estimate as compute

        _say(compute(loaded, _processes()).lines())


@app.command()
@verb
def serve(
    rewards: Annotated[
        list[str],
        typer.Argument(metavar="REWARD...", help="A name or module:attribute; NAME=REWARD serves it as NAME."),
    ],
    host: Annotated[str, typer.Option(help="An address of this machine; others can reach all but 127.0.0.1.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8400,
    token_env: Annotated[
        str | None, typer.Option(help="Environment variable with the token that clients must have.")
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Images of a call that requests share; 1: calls as they come.")
    ] = 32,
    wait_ms: Annotated[float, typer.Option(min=0.0, help="How long a request waits for others.")] = 5.0,
    queue: Annotated[int, typer.Option(min=1, help="Images that may wait.")] = 2048,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 120.0,
    max_items: Annotated[int, typer.Option(min=1, help="Images of a request.")] = 256,
    max_mb: Annotated[int, typer.Option(min=1, help="Size of a request.")] = 256,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of an image.")] = 2**24,
    device: Device = "auto",
) -> None:
    """Serve rewards over HTTP, to trainers on other machines or in other environments.

    Example: flowrl serve hpsv2.1 pickscore --port 8400
    """
    from flowrl.commands import serve as serving

    limits = {
        "queue": queue, "timeout_s": timeout, "items": max_items, "body": max_mb * 2**20, "image_pixels": max_pixels,
        "request_pixels": max(2**26, max_pixels), "memory": max(2**31, 2 * max_mb * 2**20, 6 * max_pixels),
    }  # fmt: skip
    serving.serve(
        rewards, host=host, port=port, token_env=token_env, device=device, limits=limits, say=typer.echo, batch=batch,
        wait_s=wait_ms / 1000,
    )  # fmt: skip


@app.command()
@verb
def doctor() -> None:
    """Show versions, devices, thread settings and which optional parts are usable.

    Example: flowrl doctor
    """
    from flowrl.commands import facts

    _say(facts.doctor())


@app.command("list")
@verb
def list_(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="configs, models, rewards, kernels, ...")] = None,
    path: Annotated[str | None, typer.Option(help="Print the path of the shipped config of this name.")] = None,
) -> None:
    """Show what can be named: shipped configs, models, rewards, kernels, objectives, prompt sources, config keys.

    Example: flowrl list rewards
    """
    from flowrl.commands import facts
    from flowrl.config import shipped_config

    if path is not None:
        typer.echo(str(shipped_config(path)))
        return
    if kind is not None and kind not in facts.KINDS:
        raise UserError(
            f"got list {kind!r}; expected one of {', '.join(facts.KINDS)}; or no kind, for all but the keys"
        )
    for each in (kind,) if kind else facts.KINDS[:-1]:
        if kind is None:
            typer.echo(f"{each}:")
        _say(line if kind else f"  {line}" for line in facts.listing(each))


@app.command()
@verb
def export(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="New folder; default: RUN/export.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Whole pipeline with merged weights, not a LoRA.")] = False,
    sheet: Annotated[bool, typer.Option(help="Draw the same prompts at several LoRA strengths.")] = True,
    device: Device = "auto",
) -> None:
    """Write the weights of a run for diffusers and ComfyUI, with a model card.

    Example: flowrl export runs/quickstart --out my-lora
    """
    from flowrl.export import export as write

    typer.echo(f"exported to {write(run, out or run / 'export', merge=merge, device=device, sheet=sheet)}")


cli_reward.add_to(reward_app, verb)


def _processes() -> int:
    """Number of processes that a launcher (accelerate, torchrun) announced."""
    return int(os.environ.get("WORLD_SIZE", "1"))
