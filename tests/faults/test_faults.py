"""What goes wrong is said clearly and loses nothing: damaged files, full disks, bad rewards, bad numbers, no memory."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gaussian_reference as reference
import gaussian_runs
import pytest
import torch
from gaussian_runs import config, evaluated
from typer.testing import CliRunner

from flowrl import checkpoint, runlog, trainer
from flowrl.cli import app
from flowrl.config import resolved_yaml
from flowrl.distributed import World
from flowrl.errors import GuardStop, UserError
from flowrl.guards import ScaleSkips
from flowrl.policies import GaussianPolicy
from flowrl.runlog import read_jsonl
from flowrl.trainer import train
from reward_models.protocol import RewardError

RUN = ["updates=5", "checkpoint={every: 2, keep: 3}", "objective.kl.weight=0.1", "ema={decay: 0.8}"]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The report is tested elsewhere and costs as much as 50 updates."""
    monkeypatch.setattr("flowrl.report.write_report", lambda folder: folder / "report.html")


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "run" / "checkpoints").glob("step_??????"))


def final(folder: Path) -> tuple[bytes, bytes]:
    """Tensors of the last checkpoint, and the metrics."""
    run = folder / "run"
    last = run / "checkpoints" / f"step_{steps(folder)[-1]:06d}"
    return (last / "tensors.safetensors").read_bytes(), (run / "metrics.jsonl").read_bytes()


def log(folder: Path) -> str:
    return (folder / "run" / "run.log").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[bytes, bytes]:
    """The end of RUN when nothing goes wrong."""
    folder = tmp_path_factory.mktemp("whole")
    train(config(folder, *RUN), policy=GaussianPolicy())
    return final(folder)


# ------------------------------------------------------------------------------------------------ damaged checkpoints
def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [cut, flip, empty, Path.unlink])
@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path, whole, harm, file):
    train(config(tmp_path, *RUN, "updates=4"), policy=GaussianPolicy())
    assert steps(tmp_path) == [0, 2, 4]
    harm(tmp_path / "run" / "checkpoints" / "step_000004" / file)
    train(config(tmp_path, *RUN), resume=True, policy=GaussianPolicy())
    said = log(tmp_path)
    assert "WARNING: skipping the checkpoint of step_000004" in said and f"step_000004/{file}" in said
    assert "resumed after update 2" in said
    assert final(tmp_path) == whole


def test_when_no_checkpoint_is_intact_nothing_is_thrown_away(tmp_path):
    train(config(tmp_path, *RUN, "updates=2"), policy=GaussianPolicy())
    for step in steps(tmp_path):
        flip(tmp_path / "run" / "checkpoints" / f"step_{step:06d}" / "tensors.safetensors")
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="no checkpoint in .* is intact"):
        train(config(tmp_path, *RUN, "updates=2"), resume=True, policy=GaussianPolicy())
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


def test_a_full_disk_during_a_save_leaves_the_old_checkpoint(tmp_path, whole, monkeypatch):
    original, calls = checkpoint.save_file, []

    def full(tensors: Any, path: Path) -> None:
        calls.append(1)
        if len(calls) == 3:  # after those of updates 0 and 2
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"could not save the checkpoint of step 4 .*No space left.*Earlier"):
        train(config(tmp_path, *RUN), policy=GaussianPolicy())
    assert steps(tmp_path) == [0, 2]
    monkeypatch.undo()
    train(config(tmp_path, *RUN), resume=True, policy=GaussianPolicy())
    assert final(tmp_path) == whole


# ------------------------------------------------------------------------------------------------------- bad rewards
def crashes(values: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("the scorer has crashed")


def infinite(values: torch.Tensor) -> torch.Tensor:
    return values.index_fill(0, torch.tensor([3]), math.inf)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (crashes, "raised RuntimeError: the scorer has crashed"),
        (lambda values: values[:-1], r"values has shape \(31,\), expected \(32,\)"),
        (lambda values: [None] * len(values), "gave NaN for all images"),
        (infinite, r"values is \+inf for image 3"),
        (lambda values: "good", "returned a str, expected 32 numbers"),
    ],
)
def test_a_bad_reward_is_named_and_loses_nothing(tmp_path, whole, monkeypatch, spoil, message):
    """The reward breaks in the fourth update and is mended: the run ends as if it had always worked."""
    good, calls = gaussian_runs.quadratic, []

    def reward(images, prompts, metadata):
        calls.append(1)
        values = good(images, prompts, metadata)
        return spoil(values) if len(calls) == 4 else values

    monkeypatch.setattr(gaussian_runs, "quadratic", reward)
    with pytest.raises(RewardError, match=f"'gaussian_runs:quadratic'.*{message}"):
        train(config(tmp_path, *RUN), policy=GaussianPolicy())
    assert steps(tmp_path)[-1] == 3  # not due for a checkpoint, but saved
    monkeypatch.undo()
    train(config(tmp_path, *RUN), resume=True, policy=GaussianPolicy())
    assert final(tmp_path) == whole


@pytest.mark.parametrize("std", ["none", "prompt", "global"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_missing_rewards_are_left_out_of_everything(tmp_path, monkeypatch, std, kl_weight):
    """Statistics, loss, KL and denominators of an update with NaN rewards, against formulas over the valid ones."""
    seen: dict[str, Any] = {}
    rollout, sum_gradients, score = trainer._rollout, World.sum_gradients, trainer.score_update

    def recorded_rollout(*arguments):
        seen["tree"] = rollout(*arguments)
        return seen["tree"]

    def recorded_score(*arguments):
        result = score(*arguments)
        values = result.values.view(4, 8)
        values[1, 1:] = math.nan  # one reward left: no group to compare with
        values[2] = 0.25  # equal rewards
        values[3, 2:5] = math.nan
        seen["rewards"] = values.double().clone()
        return result

    def recorded_sum(self, parameters):
        sum_gradients(self, parameters)
        seen["gradient"] = torch.cat([p.grad.flatten().double() for p in parameters])

    monkeypatch.setattr(trainer, "_rollout", recorded_rollout)
    monkeypatch.setattr(trainer, "score_update", recorded_score)
    monkeypatch.setattr(World, "sum_gradients", recorded_sum)
    policy = GaussianPolicy(std=reference.STD)
    with torch.no_grad():
        policy.weight += 0.2  # away from the reference, or the KL would be 0
    policy.copy_weights("current", "start")
    settings = config(
        tmp_path, "updates=1", f"advantage={{std: {std}, eps: 0.01, clip: 1.5}}",
        f"objective.kl.weight={kl_weight}",
    )  # fmt: skip
    train(settings, policy=policy)

    rewards = seen["rewards"]
    kept = rewards.clone()
    kept[1] = math.nan
    valid = kept[~kept.isnan()]
    assert len(valid) == 8 + 8 + 5
    advantages = torch.full_like(kept, math.nan)
    for row, group in enumerate(kept):
        rest = group[~group.isnan()]
        if len(rest):
            spread = {"prompt": rest, "global": valid}.get(std)
            scale = 1.0 if spread is None else spread.std(correction=0) + 0.01
            advantages[row] = ((group - rest.mean()) / scale).clamp(-1.5, 1.5)
    start = {name: policy.sets.sets["start"][name].double().requires_grad_() for name in ("weight", "bias")}
    weights = (start["weight"], start["bias"])
    old = tuple(w.detach() for w in weights)
    tree = seen["tree"]
    means = policy.encode([key_prompt(settings, key) for key in tree.keys]).rows["mean"]
    loss = reference.loss(weights, old, tree, means, advantages.view(32, 1), clip=0.2, kl_weight=kl_weight)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
    torch.testing.assert_close(seen["gradient"], expected, rtol=1e-4, atol=1e-6)

    row = read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]
    assert row["advantage/missing"] == rewards.isnan().sum() and row["advantage/dropped_groups"] == 1
    assert row["advantage/zero_variance_groups"] == 1
    assert row["reward/mean"] == pytest.approx(rewards.nanmean().item(), rel=1e-5)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-6)
    assert row["edges"] == 4 * (len(valid) if kl_weight else int((advantages.nan_to_num() != 0).sum()))


def key_prompt(settings: Any, key: Any) -> str:
    return Path(settings.prompts.source).read_text().splitlines()[key.prompt]


# ------------------------------------------------------------------------------------- numbers that are not finite
class Spoiled(GaussianPolicy):
    """A policy that misbehaves while `active` says so; `spoil` gets the velocity it would have given."""

    def __init__(self, active: Callable[[], bool], spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.active, self.spoil = active, spoil

    def predict(self, latents, s, cond, guidance=1.0):
        v = super().predict(latents, s, cond, guidance)
        return self.spoil(v) if self.active() else v


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


SPOILS = {
    "loss": (lambda v: v * math.nan, "the loss is nan"),
    "gradient": (InfiniteGradient.apply, "the gradient norm is (nan|inf)"),
}


@pytest.mark.parametrize("what", SPOILS)
@pytest.mark.parametrize("step", [1, 2])
def test_bad_numbers_stop_before_the_step_with_the_last_good_state(tmp_path, monkeypatch, what, step):
    """In the second update, in its first or second optimizer step: what is saved is the end of the first update."""
    options = [*RUN, "updates=3", "optimizer.inner_updates=2", "checkpoint.every=0"]
    train(config(tmp_path / "whole", *options), policy=GaussianPolicy())
    calls: list[int] = []
    inner = trainer._inner_update

    def counted(*arguments):
        calls.append(1)
        return inner(*arguments)

    monkeypatch.setattr(trainer, "_inner_update", counted)
    spoil, message = SPOILS[what]
    policy = Spoiled(lambda: len(calls) == 2 + step and torch.is_grad_enabled(), spoil)
    with pytest.raises(GuardStop, match=f"update 2: {message}.*optimizer step was not taken.*good state is saved"):
        train(config(tmp_path, *options), policy=policy)
    assert steps(tmp_path)[-1] == 1
    assert all(tensor.isfinite().all() for tensor in policy.named_states().values())
    monkeypatch.undo()
    train(config(tmp_path, *options), resume=True, policy=GaussianPolicy())
    assert final(tmp_path) == final(tmp_path / "whole")


def test_bad_latents_stop_before_they_are_scored(tmp_path):
    calls: list[int] = []

    def spoil(v: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return v * (math.nan if len(calls) > 30 else 1.0)

    with pytest.raises(GuardStop, match=r"update \d: the latents is nan .*, the images is nan"):
        train(config(tmp_path, "updates=9"), policy=Spoiled(lambda: not torch.is_grad_enabled(), spoil))


def test_fp16_skips_are_counted_and_ten_in_a_row_stop(tmp_path):
    """A float16 run whose gradient is infinite three times goes on; one whose gradient always is stops."""
    calls: list[int] = []

    def sometimes(v: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return InfiniteGradient.apply(v) if len(calls) in (1, 2, 4) else v

    options = ["policy.dtype=float16", "updates=6", "self_check.enabled=false", "optimizer.micro_batch=128"]
    train(config(tmp_path / "some", *options), policy=Spoiled(torch.is_grad_enabled, sometimes))
    found = checkpoint.load_latest(tmp_path / "some" / "run" / "checkpoints")
    assert found.state["skips"] == {"in_a_row": 0, "total": 3}
    assert found.state["scaler"]["scale"] == 2.0**16 / 8  # halved at every skip
    state = found.tensors["optimizer/state/0/step"]
    assert state.item() == 3  # steps that were taken
    rows = read_jsonl(tmp_path / "some" / "run" / "metrics.jsonl")
    assert [row["grad_norm"] is None for row in rows] == [True, True, False, True, False, False]

    always = Spoiled(torch.is_grad_enabled, InfiniteGradient.apply)
    with pytest.raises(GuardStop, match="skipped 10 optimizer steps in a row"):
        train(config(tmp_path / "always", *options, "updates=20"), policy=always)
    assert steps(tmp_path / "always")[-1] == 9
    assert not always.weight.any()


def test_a_skip_in_between_starts_the_count_again():
    skips = ScaleSkips()
    for skipped in [True] * 9 + [False] + [True] * 9:
        skips.add(skipped)
    assert (skips.in_a_row, skips.total) == (9, 18)
    with pytest.raises(GuardStop):
        skips.add(True)


@pytest.mark.parametrize("in_update", [False, True])
def test_out_of_memory_halves_the_chunk_and_changes_nothing(tmp_path, in_update):
    """Model calls of more than 10 rows fail, in the rollout or in the update; 64 -> 32 -> 16 -> 8 rows go on."""
    options = ["updates=2", evaluated(tmp_path / "whole")]
    train(config(tmp_path / "whole", *options), policy=GaussianPolicy())

    class Small(GaussianPolicy):
        def predict(self, latents, s, cond, guidance=1.0):
            if len(latents) > 10 and torch.is_grad_enabled() == in_update:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            return super().predict(latents, s, cond, guidance)

    settings = config(tmp_path, *options, *(["rollout.chunk=8"] if in_update else []))
    train(settings, policy=Small())
    said = log(tmp_path)
    what = "the update" if in_update else "the rollout"
    assert f"out of memory: {what} goes on with 8 rows per model call" in said and said.count("out of memory") == 3
    ours, theirs = (checkpoint.load_latest(f / "run" / "checkpoints") for f in (tmp_path, tmp_path / "whole"))
    for name, tensor in theirs.tensors.items():
        torch.testing.assert_close(ours.tensors[name], tensor, rtol=1e-5, atol=1e-7)
    rows, others = (read_jsonl(f / "run" / "metrics.jsonl") for f in (tmp_path, tmp_path / "whole"))
    assert [row["reward/mean"] for row in rows] == pytest.approx([row["reward/mean"] for row in others], rel=1e-6)


def test_out_of_memory_at_one_row_ends_with_the_state_saved(tmp_path):
    calls: list[int] = []

    def fail(v: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("no memory at all")
        return v

    with pytest.raises(torch.OutOfMemoryError):
        train(config(tmp_path, "updates=9", "checkpoint.every=0"), policy=Spoiled(torch.is_grad_enabled, fail))
    assert steps(tmp_path)[-1] >= 1


def test_self_check_stops_before_the_first_step(tmp_path):
    """A network that is not the same in two calls: nothing is trained, the start is saved."""
    generator = torch.Generator().manual_seed(0)
    policy = Spoiled(lambda: True, lambda v: v + 1e-3 * torch.randn(v.shape, generator=generator))
    with pytest.raises(GuardStop, match="before the first optimizer step.*two equal calls differ"):
        train(config(tmp_path), policy=policy)
    assert not policy.weight.any() and not policy.bias.any() and steps(tmp_path) == [0]


# -------------------------------------------------------------------------------------------------- the command line
def command(*arguments: str | Path) -> Any:
    terminal = {"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, ["train", *map(str, arguments)], env=terminal)


def written(folder: Path, *overrides: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(resolved_yaml(config(folder, *overrides)))
    return path


def says(result: Any, code: int, *parts: str) -> None:
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output and result.output.startswith("flowrl: ")
    for part in parts:
        assert part in result.output


@pytest.fixture
def gaussian(monkeypatch):
    """`flowrl train` with a GaussianPolicy in place of a pipeline."""
    monkeypatch.setattr(trainer, "load_policy", lambda *arguments, **options: GaussianPolicy())


def test_prompt_files_that_cannot_be_used(tmp_path):
    path = written(tmp_path)
    prompts = tmp_path / "prompts.txt"
    for content, message in ((b"", "holds no prompts"), (b"\xff\xfe\x00\x80", "not UTF-8"), (b"a\0b", "binary")):
        prompts.write_bytes(content)
        says(command(path), 2, str(prompts), message)
    prompts.unlink()
    says(command(path), 2, str(prompts), "No such file")
    assert not (tmp_path / "run").exists()


def test_models_that_cannot_be_used(tmp_path):
    path = written(tmp_path, f"policy.path={tmp_path / 'nowhere'}")
    says(command(path), 2, "nowhere")
    (tmp_path / "empty").mkdir()
    says(command(path, f"policy.path={tmp_path / 'empty'}", f"output_dir={tmp_path / 'b'}"), 2, "empty", "model_index")
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    result = command(path, f"policy.path={other}", f"output_dir={tmp_path / 'c'}")
    says(result, 2, "KandinskyPipeline", "StableDiffusion3Pipeline", "FluxPipeline")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(tmp_path):
    says(command(written(tmp_path), "policy.device=cuda"), 2, "got device 'cuda'", "expected 'cpu' or 'auto'")
    assert not (tmp_path / "run").exists()


def test_rewards_that_cannot_be_loaded(tmp_path):
    path = written(tmp_path)
    says(command(path, "reward=gaussian_runs:quadratik"), 2, "quadratik", "Did you mean 'quadratic'?")
    says(command(path, "reward=no_such_module:score"), 2, "no_such_module")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    says(command(path, f"reward={tmp_path / 'broken.py'}:score"), 1, "ZeroDivisionError")
    assert not (tmp_path / "run").exists()


def test_exit_codes_of_a_run_that_went_wrong(tmp_path, gaussian, monkeypatch):
    path = written(tmp_path, "updates=3")
    good, calls = gaussian_runs.quadratic, []

    def reward(images, prompts, metadata):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the scorer has crashed")
        return good(images, prompts, metadata)

    monkeypatch.setattr(gaussian_runs, "quadratic", reward)
    result = command(path)
    assert result.exit_code == 1 and "RuntimeError: the scorer has crashed" in result.output
    assert "Traceback" not in result.output
    monkeypatch.setattr(gaussian_runs, "quadratic", good)
    bad = Spoiled(torch.is_grad_enabled, lambda v: v * math.nan)
    monkeypatch.setattr(trainer, "load_policy", lambda *arguments, **options: bad)
    result = command(path, "--resume")
    assert result.exit_code == 3 and "the loss is nan" in result.output and "Traceback" not in result.output
    monkeypatch.setattr(trainer, "load_policy", lambda *arguments, **options: GaussianPolicy())
    assert command(path, "--resume").exit_code == 0


def test_ctrl_c_and_sigterm_give_their_exit_codes(tmp_path, gaussian, monkeypatch):
    good = gaussian_runs.quadratic
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):

        def reward(images, prompts, metadata, number=number):
            os.kill(os.getpid(), number)
            return good(images, prompts, metadata)

        folder = tmp_path / str(code)
        path = written(folder, "updates=3")
        monkeypatch.setattr(gaussian_runs, "quadratic", reward)
        result = command(path)
        assert result.exit_code == code and "continue with --resume" in result.output
        monkeypatch.setattr(gaussian_runs, "quadratic", good)
        assert command(path, "--resume").exit_code == 0
        assert steps(folder)[-1] == 3


def test_a_full_disk_while_the_log_is_written(tmp_path, gaussian, monkeypatch, whole):
    path, append, calls = written(tmp_path, *RUN), runlog._append, []

    def full(file: Any, row: Any) -> None:
        calls.append(1)
        if len(calls) == 7:  # two lines per update: the fourth
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(file, row)

    monkeypatch.setattr(runlog, "_append", full)
    result = command(path)
    assert result.exit_code == 1 and "the disk is full" in result.output and "--resume" in result.output
    assert "Traceback" not in result.output and steps(tmp_path) == [0, 2]
    monkeypatch.setattr(runlog, "_append", append)
    assert command(path, "--resume").exit_code == 0
    assert final(tmp_path) == whole


def test_a_folder_that_holds_another_run(tmp_path, gaussian):
    path = written(tmp_path, "updates=2")
    says(command(path, "--resume"), 2, "holds no run")
    assert command(path).exit_code == 0
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    says(command(path), 2, "holds this run already", "--resume", "another output_dir")
    for resume in ([], ["--resume"]):
        result = command(path, "group_size=4", "optimizer.lr=1e-3", *resume)
        says(result, 2, "holds a different run (its group_size, optimizer differ)", "choose another output_dir")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
    memory = ("rollout.chunk=3", "optimizer.micro_batch=7")  # no number depends on these beyond rounding
    assert command(path, "updates=3", *memory, "--resume").exit_code == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes().startswith(metrics) and steps(tmp_path)[-1] == 3


def test_a_folder_in_which_a_run_never_began_is_free(tmp_path, gaussian):
    path = written(tmp_path)
    says(command(path, "rollout.height=64"), 2, "rollout.width")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(resolved_yaml(config(tmp_path, "seed=9")))
    assert command(path).exit_code == 0  # what stood there had measured nothing


def test_a_folder_that_cannot_be_written(tmp_path, gaussian):
    path = written(tmp_path)
    (tmp_path / "run").write_text("a file")
    says(command(path), 2, "cannot use output_dir", "File exists")


def test_a_folder_in_use(tmp_path, gaussian):
    path = written(tmp_path)
    with checkpoint.writer_lock(tmp_path / "run" / "checkpoints"):
        says(command(path), 2, "being written by another run", str(os.getpid()))
