"""The folder of a run and what happens around its loop: opening, resuming, evaluating, saving, finishing."""

from __future__ import annotations

import os
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowrl import evaluate as evaluation
from flowrl import samples
from flowrl.checkpoint import load_latest, save_checkpoint, writer_lock
from flowrl.config import Config, parse_yaml, read_yaml, resolved_yaml
from flowrl.distributed import World
from flowrl.environment import write_environment
from flowrl.errors import UserError
from flowrl.guards import Change, StopSignals, find_alarms
from flowrl.policies import PipelinePolicy, Policy
from flowrl.prompts import Prompt, load_prompts, prompt_batch
from flowrl.runlog import METRICS, RunLog
from flowrl.schema import EvalConfig
from flowrl.state import State
from flowrl.summary import ROW_FILES, EvalRow, build_summary, headline, names, paired, read_rows, write_summary
from reward_models.protocol import RewardSpec

CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"
# What may differ when a run is resumed: nothing that a number of its metrics depends on, but for `spanning` settings.
FREE_ON_RESUME = ("output_dir", "updates", "checkpoint", "logging", "threads")
# Nor these, beyond rounding: they bound the memory.
MEMORY = (("rollout", "chunk"), ("optimizer", "micro_batch"))


class Stopped(Exception):
    """A signal ended the run after its state was saved; `exit_code` is 143 (SIGTERM) or 130 (SIGINT)."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Run:
    """A run folder held by this process (and its peers), with its log."""

    config: Config
    folder: Path
    world: World
    resumed: bool
    chunk: int
    micro_batch: int
    stop: StopSignals
    log: RunLog | None = None
    started: float = field(default_factory=time.monotonic)
    committed: bool = False  # the weights have left the last boundary that can be saved
    snapshot: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    notes: list[str] = field(default_factory=list)  # for the log, once it is open

    # ---- opening

    @staticmethod
    @contextmanager
    def open(config: Config, world: World, *, resume: bool, rewards: Sequence[RewardSpec] = ()) -> Iterator[Run]:
        """Claim `config.output_dir` for this run. `rewards`: what is trained on and the judge, for the model card.

        Raises UserError when it holds another run, holds this one and `resume` is not set, or has nothing to resume.
        """
        folder = Path(config.output_dir)
        notes: list[str] = []
        with ExitStack() as stack:
            with world.together():
                if world.main:
                    notes += _claim(config, folder, resume, stack)
                    write_environment(folder, str(world.device), world.size, rewards)
            stop = stack.enter_context(StopSignals())
            run = Run(config, folder, world, resume, config.rollout.chunk, config.optimizer.micro_batch, stop)
            run.notes = notes
            try:
                yield run
            finally:
                if run.log is not None:
                    run.log.close()

    def load(self, state: State, policy: Policy) -> None:
        """Bring state and policy to the newest checkpoint, if there is one, and open the log there."""
        with warnings.catch_warnings(record=True) as told:  # of damaged checkpoints, of another thread count
            warnings.simplefilter("always")
            found = load_latest(self.folder / CHECKPOINTS) if self.resumed else None
        if found is not None:
            state.unpack(policy, found)
        self.log = RunLog(
            self.folder,
            self.config.logging.trackers,
            total=self.config.updates,
            budget_s=self.config.budget_s,
            resumed=(found.step if found else -1) if self.resumed else None,
            project=self.config.logging.project,
            config=self.config.model_dump(mode="json", by_alias=True),
            active=self.world.main,
        )
        for text in [*self.notes, *(str(warning.message) for warning in told)]:
            self.note(f"WARNING: {text}")
        if self.resumed:
            self.note(f"resumed after update {found.step}" if found else "nothing was saved yet, this is the start")

    def note(self, text: str) -> None:
        """One line for a person."""
        if self.log is not None:
            self.log.note(text)

    def write(self, update: int, values: dict[str, float], timings: dict[str, float], alarms: list[str]) -> None:
        """One update in the logs."""
        if self.log is not None:
            self.log.write(update, values, timings, alarms)

    def encode_once(self, policy: Policy, prompts: list[Prompt]) -> None:
        """Fill the embedding cache with every prompt the run will use, then drop the text encoders."""
        if not isinstance(policy, PipelinePolicy) or policy.cache_dir is None:
            return
        places = range(self.config.updates)
        n, per_update, seed = len(prompts), self.config.prompts_per_update, self.config.seed
        used = dict.fromkeys(slot.prompt for update in places for slot in prompt_batch(n, per_update, seed, update))
        texts = [prompts[i].text for i in used] + [prompt.text for prompt in self.eval_prompts()]
        mine = list(dict.fromkeys(texts))[self.world.rank :: self.world.size]
        with self.world.together():
            for start in range(0, len(mine), 64):
                self.check()
                policy.encode(mine[start : start + 64])
                if self.log is not None:
                    self.log.stage("encoding prompts", min(start + 64, len(mine)), len(mine))
        policy.drop_text_encoders()

    # ---- evaluation

    def eval_prompts(self) -> list[Prompt]:
        e = self.config.eval
        return [] if e is None else load_prompts(e.prompts, tasks=e.tasks, text_column=e.text_column, limit=e.limit)

    def evaluate(self, policy: Policy, scorers: evaluation.Scorers | None, stage: str) -> list[EvalRow]:
        """Rows of "before", "before_guided" or "after", drawn once and kept in the run folder.

        Before training the weights are those the run starts from; after it, the moving average where there is one.
        """
        e = self.config.eval
        if e is None or scorers is None:
            return []
        if (self.folder / ROW_FILES[stage]).exists() and stage != "after":
            return read_rows(self.folder, stage)
        if stage == "before_guided":
            if e.baseline_guidance is None:
                return []
            e = e.model_copy(update={"guidance": e.baseline_guidance})

        def progress(done: int, total: int) -> None:
            if self.log is not None:
                self.log.stage(f"evaluating ({stage})", done, total)
            self.check()

        with self._trained(policy) if stage == "after" else nullcontext():
            rows = self._draw(policy, scorers, e, pictures=self.folder / "samples" / stage, on_progress=progress)
        with self.world.together():
            if self.world.main:
                evaluation.write_rows(self.folder, stage, rows)
                self.note(f"{stage.replace('_', ', ')}: {_spoken(rows)}")
        return rows

    def evaluate_now(self, policy: Policy, scorers: evaluation.Scorers | None) -> dict[str, float]:
        """Means of an evaluation during training, for the log."""
        if self.config.eval is None or scorers is None:
            return {}
        with self._trained(policy):
            return evaluation.means(self._draw(policy, scorers, self.config.eval))

    def _draw(
        self, policy: Policy, scorers: evaluation.Scorers, section: EvalConfig, **options: Any
    ) -> list[EvalRow]:  # fmt: skip
        """Rows of an evaluation with these settings."""
        return evaluation.evaluate(
            policy, self.eval_prompts(), evaluation.settings_of(section, self.config.seed, self.chunk), scorers,
            world=self.world, note=self.note, **options,
        )  # fmt: skip

    def _trained(self, policy: Policy) -> Any:
        """The weights that are evaluated and exported: the moving average where there is one."""
        return policy.weights("ema") if self.config.ema else nullcontext()

    def samples(self, policy: Policy, update: int) -> None:
        """Draw the fixed prompts with their fixed noise on one sheet, `samples/update_000020.png`."""
        if not self.config.logging.sample_prompts or self.config.eval is None:
            return
        with self.world.together():
            if self.world.main:
                with self._trained(policy) if update else nullcontext():
                    samples.draw(policy, self.eval_prompts(), self.config, self.folder, update)

    # ---- saving and stopping

    def begin(self, state: State, policy: Policy) -> None:
        """Start of an update. Where it changes something before its end, a copy is kept, to save if a guard stops it:
        with several optimizer steps, or a reward that learns."""
        self.committed = False
        o = self.config.optimizer
        early = o.inner_updates * o.epochs > 1 or state.adversary is not None
        if early and self.config.policy.train == "lora" and self.world.main:
            tensors, counters = state.pack(policy)
            self.snapshot = {name: tensor.detach().clone() for name, tensor in tensors.items()}, counters

    def check(self) -> None:
        """Raise Stopped if a signal came and the weights are still those of the last boundary.

        Several processes stop together, between two updates.
        """
        if self.stop.requested and not self.committed and self.world.size == 1:
            raise self.stopped()

    def save(self, state: State, policy: Policy) -> None:
        """Write a checkpoint of the boundary that `state` is at."""
        with self.world.together():  # a full disk ends them all
            if self.world.main:
                self._write(*state.pack(policy), state)
        self.committed = False

    def save_last_good(self, state: State, policy: Policy) -> None:
        """Write the state of the last update boundary, if memory still holds it; else the last checkpoint stands."""
        if not self.world.main:
            return
        if not self.committed:
            self._write(*state.pack(policy), state)
        elif self.snapshot is not None:
            self._write(*self.snapshot, state)

    def _write(self, tensors: dict[str, Tensor], counters: dict[str, Any], state: State) -> None:
        if self.log is not None:
            self.log.sync()
        wall = state.wall_s + time.monotonic() - self.started
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_checkpoint(
            self.folder / CHECKPOINTS, state.update, tensors, {**counters, "wall_s": wall}, self.config.checkpoint.keep
        )

    def signalled(self) -> bool:
        """Whether any process got a signal; then all of them stop as if they had got it."""
        number = int(self.world.max(torch.tensor([self.stop.requested or 0])))
        self.stop.requested = self.stop.requested or number or None
        return bool(number)

    def stopped(self) -> Stopped:
        """The exception that ends a run after a signal."""
        return Stopped(self.stop.exit_code, "stopped by a signal, everything is saved; continue with --resume")

    # ---- the end

    def finish(self, state: State, policy: Policy) -> dict[str, Any]:
        """Alarms of the whole run, summary, adapter, sheets and report; returns the summary (others: nothing)."""
        with self.world.together():
            return self._finish(state, policy) if self.world.main else {}

    def _finish(self, state: State, policy: Policy) -> dict[str, Any]:
        before, after = (read_rows(self.folder, stage) for stage in ("before", "after"))
        found = find_alarms(_changes(before, after), state.alarms.limits)
        alarms = [*state.alarms.raised, *(f"after training: {text}" for text in found.values())]
        for text in found.values():
            self.note(f"ALARM after training: {text}")
        e = self.config.eval
        summary = build_summary(
            method=self.config.method,
            policy=self.config.policy.path,
            seed=self.config.seed,
            updates=state.update,
            wall_s=state.wall_s + time.monotonic() - self.started,
            peak_rss_mb=peak_rss_mb(),
            cost=asdict(state.cost),  # type: ignore[arg-type]
            eval_settings=None
            if e is None
            else {"split": e.prompts.removeprefix("shapes:"), "steps": e.steps, "guidance": e.guidance},
            before=before,
            before_guided=read_rows(self.folder, "before_guided"),
            after=after,
            on_policy_ratio_max_dev=state.ratio_max_dev,
            alarms=alarms,
        )
        write_summary(self.folder, summary)
        samples.before_after(self.folder, before, after)
        if isinstance(policy, PipelinePolicy):
            from flowrl.export import export_policy

            export_policy(policy, self.folder, self.folder / "adapter", sheet=False)
        from flowrl.report import write_report

        self.note(f"report: {write_report(self.folder)}")
        return summary


def _claim(config: Config, folder: Path, resume: bool, stack: ExitStack) -> list[str]:
    """Check the folder, lock it for this process until the stack ends, and write the config; returns what to note."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        notes = _check_folder(config, folder, resume)
        stack.enter_context(writer_lock(folder / CHECKPOINTS))
        part = folder / f"{CONFIG}.part"  # renamed, so that a kill leaves the old file or the new one
        part.write_text(resolved_yaml(config), encoding="utf-8")
        os.replace(part, folder / CONFIG)
    except OSError as error:
        raise UserError(
            f"cannot use output_dir {folder}: {error.strerror}; expected a folder that can be written; name another"
        ) from error
    return notes


def spanning(config: Config) -> list[str]:
    """Names of the settings by which something goes from the first update to the last, whatever their number."""
    r, o = config.rollout, config.objective
    spans = {
        "optimizer.schedule": config.optimizer.schedule != "constant",
        "objective.tmpo.beta_from": o.tmpo is not None and o.tmpo.beta_from is not None and o.tmpo.beta_over is None,
        "rollout.tree.moves_to": r.tree is not None and r.tree.moves_to is not None and r.tree.moves_over is None,
        "rollout.fork": r.fork is not None and r.fork.over is None,
    }
    return [name for name, applies in spans.items() if applies]


def _check_folder(config: Config, folder: Path, resume: bool) -> list[str]:
    path = folder / CONFIG
    traces = (METRICS, *ROW_FILES.values(), f"{CHECKPOINTS}/step_*")
    begun = any(any(folder.glob(trace)) for trace in traces)
    if not path.exists() or not (begun or resume):  # a run that failed before it measured anything blocks nothing
        if resume:
            raise UserError(
                f"got --resume, but {folder} holds no run; expected one with {CONFIG}; check output_dir, or leave out "
                "--resume"
            )
        return []
    old = read_yaml(path)
    new = parse_yaml(resolved_yaml(config), CONFIG)
    for section, name in MEMORY:
        old.get(section, {}).pop(name, None), new[section].pop(name)
    different = sorted(k for k in {*old, *new} - {*FREE_ON_RESUME} if old.get(k) != new.get(k))
    if not resume or different:
        what = f"a different run (its {', '.join(different)} differ)" if different else "this run already"
        how = "choose another output_dir" if different else "continue it with --resume, or choose another output_dir"
        raise UserError(f"{folder} holds {what}; expected a new or empty folder; {how}")
    names = spanning(config)
    if old["updates"] == new["updates"] or not names:
        return []
    return [
        f"updates was {old['updates']} and is {new['updates']}: {', '.join(names)} jumps to its value of a run of that "
        "length"
    ]


def _changes(before: list[EvalRow], after: list[EvalRow]) -> dict[str, Change]:
    """What changed from the first to the last evaluation, under the names of the alarms."""
    if not before or not after:
        return {}
    changes: dict[str, Change] = {}
    for kind, prefix in (("scores", "reward/"), ("judge", "judge/"), ("stats", "images/")):
        for i, name in enumerate(names(before, kind)):
            key = "reward/mean" if kind == "scores" and i == 0 else prefix + name
            changes[key] = Change.paired(headline(before, kind, name).mean, paired(before, after, kind, name))
    return changes


def _spoken(rows: list[EvalRow]) -> str:
    parts = []
    for kind in ("scores", "judge"):
        for name in names(rows, kind):
            e = headline(rows, kind, name)
            parts.append(f"{name} {e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]")
    return "  ".join(parts)


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MB of 1e6 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6  # bytes there, KiB elsewhere
