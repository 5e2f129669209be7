"""Recipes side by side on the tiny world: same base model, prompts, evaluation and seconds of training.

    flowrl bench methods flow_grpo dynamic_tree_rpo diffusion_nft --seeds 0 1 2 --budget 300 --out runs/methods

Every run is a process of its own, `flowrl train` as a user starts it, in a folder under --out. Seeds are the outer
loop, so that a slow hour of the machine meets all methods alike. Finished runs are kept, and a stopped benchmark goes
on when the same command is given again. More methods or seeds, also other seeds for other methods, may be added by
further commands with the same --out: `summary.json`, `table.md`, `curves.png` and `report.html` are of all runs there.

A method chooses its recipe: rollout, credit, objective, optimiser, LoRA, reward, group and batch sizes. What all have
in common is in `COMMON`. The seconds are of training alone, without evaluation, samples and checkpoints.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks import methods_report, methods_results, runs
from benchmarks.runs import Session
from flowrl.config import Config, load_config, shipped_config, shipped_configs
from flowrl.errors import UserError
from flowrl.runlog import METRICS, TIMINGS, duration, read_jsonl

BASELINES = ("flow_grpo", "flow_grpo_fast")  # whose final scores are the targets, where they take part
TASKS = "[two_object, counting, colors, position]"
COMMON = (
    "threads=1",
    "updates=5000",  # the budget ends a run
    "policy.dtype=auto",
    f"prompts={{source: 'shapes:train', tasks: {TASKS}, limit: 288}}",
    f"eval={{prompts: 'shapes:test', tasks: {TASKS}, images_per_prompt: 3, steps: 20, guidance: 1.0, every_s: 20.0, "
    "rewards: {shapes: 1.0}, judge: tiny-clip}",
    "checkpoint.every=0",
    "logging.samples_every=0",
    "logging.sample_prompts=0",
)
OPTIONS = {"seed": "--seeds", "budget_s": "--budget", "clock": "--clock", "output_dir": "--out"}
SAME = ("policy.path", "policy.revision", "policy.dtype", "threads", "prompts", "eval", "budget_s", "clock")
LOOK_S, SAY_S = 0.2, 30.0


@dataclass(frozen=True)
class Job:
    """One run: its name under --out, its method, and its config."""

    name: str
    method: str
    config: Config


class Process(Protocol):
    """A run that goes on, see `benchmarks.runs.Running`."""

    def poll(self) -> Session | None: ...

    def stop(self) -> None: ...


Start = Callable[[list[str], Path, Sequence[int] | None], Process]
Say = Callable[[str], object]


# ------------------------------------------------------------------------------------------------------------- the runs
def source(method: str) -> tuple[str, str]:
    """(label, config) of a method: a path to a YAML file, NAME for the shipped NAME/tiny_sd3, or a shipped name."""
    if method.endswith((".yaml", ".yml")) or Path(method).is_file():
        return Path(method).stem, method
    name = f"{method}/tiny_sd3"
    if name not in shipped_configs() and method in shipped_configs():
        name = method
    shipped_config(name)  # UserError with the nearest name
    return name.removesuffix("/tiny_sd3").replace("/", "-"), name


def jobs(
    methods: Sequence[str], seeds: Sequence[int], out: Path, *, budget_s: float, clock: str, overrides: Sequence[str]
) -> list[Job]:
    """All runs, seed by seed.

    Raises:
        UserError: there is no method, a config or an override cannot be used, two methods have one name, or they would
            not be compared on the same model, prompts and evaluation.
    """
    for override in overrides:
        if (key := override.partition("=")[0]) in OPTIONS:
            raise UserError(f"got the override {override!r}; expected {key} as an option; use {OPTIONS[key]}")
    if not methods:
        raise UserError("got no method; expected at least one, such as flow_grpo; name it")
    if len(set(seeds)) < len(seeds) or not seeds or min(seeds) < 0:
        raise UserError(f"got seeds {list(seeds)}; expected different numbers from 0 on; correct --seeds")
    common = [*COMMON, f"budget_s={float(budget_s)}", f"clock={clock}", *overrides]
    configs: dict[str, Config] = {}
    for method in methods:
        label, path = source(method)
        if label in configs:
            raise UserError(f"got two methods called {label}; expected different names; rename a YAML file")
        configs[label] = load_config(path, common)
        if configs[label].eval is None:
            raise UserError(f"{label} has no eval section, so nothing would be measured; leave out eval=null")
    _check_alike(configs)
    made = []
    for seed in seeds:
        for label, config in configs.items():
            name = f"{label}-{seed}"
            made.append(Job(name, label, config.model_copy(update={"seed": seed, "output_dir": str(out / name)})))
    return made


def earlier(out: Path, todo: Sequence[Job]) -> list[Job]:
    """The runs that other commands left in OUT. UserError where they cannot be compared with those of this one."""
    names = {job.name for job in todo}
    found: dict[str, Job] = {}
    for row in read_jsonl(out / runs.SESSIONS):
        name, path = row["run"], out / f"{row['run']}.yaml"
        if name not in names and path.exists():
            config = load_config(path).model_copy(update={"output_dir": str(out / name)})  # the folder may have moved
            found[name] = Job(name, row["method"], config)
    _check_alike({job.name: job.config for job in [*found.values(), *todo]})
    return list(found.values())


def _check_alike(configs: dict[str, Config]) -> None:
    """UserError unless all methods start from the same model and are measured alike."""
    for key in SAME:
        found: dict[str, Any] = {}
        for label, config in configs.items():
            item: Any = config
            for part in key.split("."):
                item = getattr(item, part)
            found[label] = item
        first = next(iter(found))
        for label, item in found.items():
            if item != found[first]:
                raise UserError(
                    f"{key} is {item!r} in {label} and {found[first]!r} in {first}; expected the same in all methods; "
                    f"set {key}=... for all of them"
                )


def slots(processes: int, threads: int) -> list[list[int] | None]:
    """The CPU cores of each of the runs that go on at once: as many as a run has threads; None where no system call
    can keep a process on its cores. UserError where they do not suffice.
    """
    if not hasattr(os, "sched_setaffinity"):
        return [None] * processes
    cores = sorted(os.sched_getaffinity(0))
    if processes * threads > len(cores):
        raise UserError(
            f"got --processes {processes} of {threads} thread(s) each; expected at most the {len(cores)} CPU core(s) "
            "that this process may use, or runs would slow each other; lower --processes"
        )
    return [cores[i * threads : (i + 1) * threads] for i in range(processes)]


def run_all(
    todo: Sequence[Job], out: Path, places: Sequence[Sequence[int] | None], start: Start, say: Say,
    on_end: Callable[[], object],
) -> dict[str, int]:  # fmt: skip
    """Bring all runs to their end, `len(places)` at once. Returns the exit codes of those that failed.

    A run that fails ends none of the others. SIGTERM and Ctrl-C end all, with their state saved, and then this process
    with code 143 or 130.
    """
    for job in todo:
        runs.check(job.name, job.config, out)
    waiting = [(job, arguments) for job in todo if (arguments := runs.prepare(job.name, job.config, out)) is not None]
    if kept := len(todo) - len(waiting):
        say(f"{kept} of {len(todo)} runs are finished already")
    free = list(places)
    failed: dict[str, int] = {}
    going: dict[str, tuple[Job, Process, Sequence[int] | None]] = {}
    walls: list[float] = []
    said = time.monotonic()

    def take_ended() -> Iterator[tuple[Job, Session]]:
        for job, process, cores in list(going.values()):
            if session := process.poll():
                del going[job.name]
                free.append(cores)
                pinned = cores is not None
                runs.record(job.name, out, session, method=job.method, processes=len(places), pinned=pinned)
                yield job, session

    with _signals() as got:
        try:
            while (waiting or going) and not got:
                while waiting and free:
                    (job, arguments), cores = waiting.pop(0), free.pop(0)
                    say(f"{job.name}: {'continued' if '--resume' in arguments else 'started'}")
                    going[job.name] = job, start(arguments, out / f"{job.name}.log", cores), cores
                time.sleep(LOOK_S)
                for job, session in take_ended():
                    if session.exit_code:
                        failed[job.name] = session.exit_code
                        say(f"{job.name}: FAILED with code {session.exit_code}, see {out / f'{job.name}.log'}")
                    else:
                        walls.append(session.seconds)
                        say(f"{job.name}: finished in {duration(session.seconds)}, {standing(job)}")
                    on_end()
                if going and time.monotonic() - said > SAY_S:
                    said = time.monotonic()
                    state = "; ".join(f"{job.name} {standing(job)}" for job, _, _ in going.values())
                    say(f"{state}; {len(waiting)} more wait{_left(len(going), len(waiting), walls, len(places))}")
        finally:  # also where the table cannot be written: no run is left behind
            asked = -1
            while going:
                if asked < len(got):  # once, and again at every further signal, at which a run stops at once
                    asked = len(got)
                    for _, process, _ in going.values():
                        process.stop()
                time.sleep(LOOK_S)
                list(take_ended())
    if got:
        say("stopped, everything is saved; the same command goes on")
        raise SystemExit(128 + got[0])
    return failed


def standing(job: Job) -> str:
    """How far a run is, in words: seconds trained and the newest score."""
    folder, e = Path(job.config.output_dir), job.config.eval
    timed = [row["train_s"] for row in read_jsonl(folder / TIMINGS) if row.get("train_s") is not None]
    score = methods_results.newest_score(read_jsonl(folder / METRICS), e) if e else None
    trained = f"{timed[-1] if timed else 0:.0f} of {job.config.budget_s:.0f} s trained"
    return trained + ("" if score is None else f", last score {score:.3f}")


def _left(going: int, waiting: int, walls: Sequence[float], processes: int) -> str:
    """The time left, once a run has shown how long one takes; those that go on count as half done."""
    if not walls:
        return ""
    return f", about {duration((waiting + going / 2) * sum(walls) / len(walls) / processes)} left"


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The SIGTERMs and SIGINTs that came within the block. They are noted and interrupt nothing, so that no run is
    started and forgotten.
    """
    got: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, _: got.append(number)) for number in numbers]
    try:
        yield got
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------------------- the result
def measure(
    methods: Sequence[str],
    seeds: Sequence[int],
    out: str | Path,
    *,
    budget_s: float = 300.0,
    processes: int = 1,
    clock: str = "wall",
    overrides: Sequence[str] = (),
    baselines: Sequence[str] | None = None,
    start: Start = runs.start,
    say: Say = print,
) -> dict[str, Any]:
    """Run everything that is not there yet; returns what is written to `summary.json`.

    Args:
        methods: names of recipes or paths of YAML files, see `source`.
        out: folder of the runs; those of earlier commands are shown beside the new ones.
        budget_s: seconds of training of each run, by `clock` ("wall" or "cpu": of the run's process).
        processes: runs at once, each on a core of its own.
        overrides: `key=value`, applied to every method after `COMMON`.
        baselines: methods whose final scores are targets for the others; default: those of `BASELINES` that take part.

    Raises:
        UserError: see `jobs` and `runs.check`; also when runs failed, after all others were finished and written.
    """
    out = Path(out)
    todo = jobs(methods, seeds, out, budget_s=budget_s, clock=clock, overrides=overrides)
    shown = [*earlier(out, todo), *todo]
    labels = list(dict.fromkeys(job.method for job in shown))
    if missing := sorted(set(baselines or ()) - {*labels}):
        raise UserError(f"got the baseline {', '.join(missing)}; expected some of {', '.join(labels)}")
    targets = [label for label in labels if label in (BASELINES if baselines is None else baselines)]
    places = slots(processes, todo[0].config.threads or 1)
    out.mkdir(parents=True, exist_ok=True)

    def write(failed: dict[str, int], pictures: bool) -> dict[str, Any]:
        summary = methods_results.summarise([(j.name, j.method, j.config) for j in shown], out, targets, failed)
        methods_report.write(out, summary, pictures=pictures)
        return summary

    # while runs go on nothing is drawn, which would take time from them
    failed = run_all(todo, out, places, start, say, lambda: write({}, pictures=False))
    summary = write(failed, pictures=True)
    if failed:
        raise UserError(
            f"{', '.join(f'{name} (code {code})' for name, code in failed.items())} failed, see the .log files in "
            f"{out}; expected code 0; the same command goes on with them; the others are in {out / 'table.md'}"
        )
    return summary
