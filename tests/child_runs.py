"""What child processes of the tests run: training with recordings, kills and injected faults."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gaussian_runs
import torch
from safetensors.torch import save_file
from torch import Tensor

from flowrl import checkpoint, report, trainer
from flowrl.distributed import World
from flowrl.errors import UserError
from flowrl.policies import GaussianPolicy, PipelinePolicy, Policy
from flowrl.run import Stopped
from reward_models.protocol import RewardError


def make_policy(name: str) -> Policy:
    """A `GaussianPolicy` for "gaussian", a small random `StableDiffusion3Pipeline` for "sd3"."""
    if name == "gaussian":
        return GaussianPolicy()
    from tiny_pipelines import tiny_sd3

    with tempfile.TemporaryDirectory() as folder:
        return PipelinePolicy(tiny_sd3(Path(folder)))


def train(folder: Path, overrides: Sequence[str], resume: bool = False, policy: str = "gaussian") -> None:
    """Run a config of `gaussian_runs` in this process; exits as the command line would after a signal."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    config = gaussian_runs.config(folder, *overrides, processes=size)
    report.write_report = lambda folder: folder / "report.html"  # tested elsewhere; it costs as much as 50 updates
    try:
        trainer.train(config, resume=resume, policy=make_policy(policy))
    except Stopped as stopped:
        raise SystemExit(stopped.exit_code) from None


def record(folder: Path, overrides: Sequence[str], policy: str) -> None:
    """`train`, with the images (as latents) and gradients of every update in `folder`/rank_<n>.safetensors."""
    found: dict[str, Tensor] = {}
    rollout, sum_gradients = trainer._rollout, World.sum_gradients

    def recorded_rollout(*arguments: Any) -> Any:
        tree = rollout(*arguments)
        found[f"leaves/{len(found):03d}"] = tree.leaves.flatten(0, 1)
        return tree

    def recorded_sum(self: World, parameters: list[torch.nn.Parameter]) -> None:
        sum_gradients(self, parameters)
        gradients = [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
        found[f"gradient/{len(found):03d}"] = torch.cat(gradients)

    trainer._rollout, World.sum_gradients = recorded_rollout, recorded_sum  # type: ignore[method-assign]
    train(folder, overrides, policy=policy)
    save_file(found, folder / f"rank_{os.environ.get('RANK', '0')}.safetensors")


def train_with_failing_rank(folder: Path, overrides: Sequence[str]) -> None:
    """The last process's reward raises in the second update."""
    os.environ["FAIL_ON_CALL"] = "2" if os.environ["RANK"] == "1" else "0"
    train(folder, overrides)


def train_and_say_what_failed(folder: Path, overrides: Sequence[str], where: str) -> None:
    """`train` that fails in the evaluation "before" or "after" on the last process, or in "finish" on the first.

    What each process raised goes to `folder`/rank_<n>.txt.
    """
    rank = os.environ["RANK"]
    if rank == "1":
        os.environ["FAIL_ON_CALL"] = {"before": "1", "after": "2", "finish": "0"}[where]

    def no_report(folder: Path) -> Path:
        if where == "finish":
            raise UserError("no report")
        return folder / "report.html"

    report.write_report = no_report
    try:
        trainer.train(gaussian_runs.config(folder, *overrides, processes=2), policy=GaussianPolicy())
    except (RewardError, UserError) as error:
        (folder / f"rank_{rank}.txt").write_text(f"{type(error).__name__}: {error}")


def train_with_signalled_rank(folder: Path, overrides: Sequence[str]) -> None:
    """The last process alone gets SIGTERM, while it scores the second update."""
    score, calls = trainer.score_update, []

    def signalled(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return score(*arguments)

    trainer.score_update = signalled
    train(folder, overrides)


def train_and_die_in_a_save(folder: Path, overrides: Sequence[str], resume: bool, operation: int) -> None:
    """SIGKILL before the `operation`-th file operation (sync, rename) of this process's checkpoints."""
    left = operation

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return run

    checkpoint._sync = counted(checkpoint._sync)
    checkpoint._write = counted(checkpoint._write)
    checkpoint._publish = counted(checkpoint._publish)
    checkpoint.save_file = counted(checkpoint.save_file)
    checkpoint.os.replace = counted(os.replace)
    train(folder, overrides, resume)
