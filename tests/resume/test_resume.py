"""A run that was killed and resumed is the run that was not: final weights and metrics, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import child_runs
import processes
import pytest
import torch
import yaml
from gaussian_runs import config, evaluated
from tiny_pipelines import tiny_sd3

from flowrl import trainer
from flowrl.checkpoint import load_latest
from flowrl.policies import GaussianPolicy
from flowrl.run import Run, Stopped
from flowrl.runlog import read_jsonl
from flowrl.trainer import train

ROOT = Path(__file__).parents[2]
# Everything that has a state: moving average, several optimizer steps per update, warm-up, KL to the start, a random
# window, missing rewards, evaluations on the way, and prompts that come round again.
OPTIONS = [
    "updates=10", "prompts_per_update=4", "group_size=6", "checkpoint={every: 2, keep: 2}", "ema={decay: 0.8}",
    "optimizer.inner_updates=2", "optimizer.epochs=2", "optimizer.warmup=2", "optimizer.weight_decay=0.01",
    "objective.kl.weight=0.1", "reward=gaussian_runs:with_gaps", "advantage.std=global",
    "rollout.window={size: 2, low: 0, high: 4}",
]  # fmt: skip


def options(folder: Path) -> list[str]:
    return [*OPTIONS, evaluated(folder), "eval.every=4"]


def result(run: Path) -> dict:
    """All that must be equal: the final weights and optimizer, the counters, the metrics, the evaluations."""
    found = load_latest(run / "checkpoints")
    state = {name: value for name, value in found.state.items() if name not in ("wall_s", "train_s")}
    summary = json.loads((run / "summary.json").read_text())
    return {
        "step": found.step,
        "tensors": (found.path / "tensors.safetensors").read_bytes(),
        "state": state,
        "metrics": (run / "metrics.jsonl").read_bytes(),
        "before": (run / "eval_before.jsonl").read_bytes(),
        "after": (run / "eval_after.jsonl").read_bytes(),
        "cost": summary["cost"],
        "eval": {name: value for name, value in summary["eval"].items() if name != "split"},  # that is a path here
    }


def uninterrupted(folder: Path) -> tuple[dict, float]:
    """The result of the run in one piece, and how long it took in a child process."""
    clock = time.monotonic()
    assert processes.wait(processes.start(child_runs.train, folder, options(folder))) == [0]
    return result(folder / "run"), time.monotonic() - clock


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The report is tested elsewhere and costs as much as 50 updates."""
    monkeypatch.setattr("flowrl.report.write_report", lambda folder: folder / "report.html")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict, float]:
    uninterrupted(tmp_path_factory.mktemp("warm"))  # the first child also starts the server that forks them
    return uninterrupted(tmp_path_factory.mktemp("whole"))


def started(folder: Path) -> bool:
    return (folder / "run" / "config.yaml").exists()


def kill_at_random(folder: Path, duration: float, generator: random.Random, kills: int) -> int:
    """Run in `folder` until it is complete, killing it up to `kills` times; returns how often it was killed."""
    done = 0
    while True:
        child = processes.start(child_runs.train, folder, options(folder), started(folder))
        if done < kills:
            child.join(duration * generator.random())
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
        code = processes.wait(child)[0]
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            return done
        done += 1


def test_ten_kills_at_random_moments(tmp_path, whole):
    expected, duration = whole
    generator = random.Random(int(os.environ.get("KILL_SEED", "0")))
    kills, runs = 0, 0
    while kills < 10:
        folder = tmp_path / str(runs)
        kills += kill_at_random(folder, duration, generator, kills=10 - kills)
        assert result(folder / "run") == expected
        runs += 1
        assert runs < 30, "the runs are too short to be killed"


def test_kills_during_saves(tmp_path, whole):
    """One kill before each kind of file operation of a save, in the first or second save of the process."""
    expected, _ = whole
    for number, operation in enumerate([1, 2, 4, 5, 7, 8, 9, 12, 15, 17, 20]):
        resume = started(tmp_path)
        arguments = (tmp_path, options(tmp_path), resume, operation)
        code = processes.wait(processes.start(child_runs.train_and_die_in_a_save, *arguments))
        assert code == [-signal.SIGKILL], f"attempt {number} was not killed"
        assert len(list((tmp_path / "run" / "checkpoints").glob("step_??????"))) <= 3
    assert processes.wait(processes.start(child_runs.train, tmp_path, options(tmp_path), True)) == [0]
    assert result(tmp_path / "run") == expected
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == [".lock", "step_000008", "step_000010"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_many_more_kills(tmp_path, whole, seed):
    expected, duration = whole
    generator = random.Random(1000 + seed)
    for run in range(4):
        folder = tmp_path / str(run)
        kill_at_random(folder, duration, generator, kills=10)
        assert result(folder / "run") == expected


def test_more_updates_than_first_asked_for(tmp_path, whole):
    expected, _ = whole
    settings = config(tmp_path, *options(tmp_path), "updates=5")
    train(settings, policy=GaussianPolicy())
    longer = config(tmp_path, *options(tmp_path))
    train(longer, resume=True, policy=GaussianPolicy())
    assert result(tmp_path / "run") == expected


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_what_spans_the_run_jumps_with_more_updates_and_says_so(tmp_path, capsys, schedule):
    settings = ["updates=2", f"optimizer.schedule={schedule}"]
    train(config(tmp_path, *settings), policy=GaussianPolicy())
    train(config(tmp_path, *settings, "updates=4"), resume=True, policy=GaussianPolicy())
    said = capsys.readouterr()
    warned = "updates was 2 and is 4: optimizer.schedule jumps" in said.out + said.err
    assert warned == (schedule == "linear")


def test_a_finished_run_resumed_stays_as_it_is(tmp_path):
    settings = config(tmp_path, "updates=2", evaluated(tmp_path))
    train(settings, policy=GaussianPolicy())
    before = result(tmp_path / "run")
    train(settings, resume=True, policy=GaussianPolicy())
    assert result(tmp_path / "run") == before


MOMENTS = {  # name -> (whose function, its name, before its how-manieth call the signal comes, updates then complete)
    "rollout": (trainer, "_rollout", 2, 1, signal.SIGTERM),
    "first optimizer step": (trainer, "_inner_update", 5, 1, signal.SIGINT),  # four steps per update
    "second optimizer step": (trainer, "_inner_update", 6, 2, signal.SIGTERM),
    "scoring": (trainer, "score_update", 2, 1, signal.SIGINT),
    "first evaluation": (Run, "_draw", 1, 0, signal.SIGTERM),
    "last evaluation": (Run, "_draw", 2, 3, signal.SIGINT),
}


def signal_at_call(patch, owner, name: str, call: int, number: int) -> None:
    """This process gets the signal right before the `call`-th call of a function."""
    original, calls = getattr(owner, name), []

    def signalling(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    patch.setattr(owner, name, signalling)


def test_signals_save_and_stop(tmp_path, monkeypatch):
    """Whenever the signal comes, the state of a boundary is saved, and the rest is as if nothing had happened."""
    short = [*OPTIONS, "updates=3", "checkpoint.every=0"]
    train(config(tmp_path / "whole", *short, evaluated(tmp_path / "whole")), policy=GaussianPolicy())
    for when, (owner, name, call, boundary, number) in MOMENTS.items():
        folder = tmp_path / when
        settings = config(folder, *short, evaluated(folder))
        handler = signal.getsignal(number)
        with monkeypatch.context() as patch:
            signal_at_call(patch, owner, name, call, number)
            with pytest.raises(Stopped, match="everything is saved; continue with --resume") as stopped:
                train(settings, policy=GaussianPolicy())
        assert stopped.value.exit_code == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        found = load_latest(folder / "run" / "checkpoints")
        assert (found.step if found else 0) == boundary, when
        assert len(read_jsonl(folder / "run" / "metrics.jsonl")) == boundary
        assert signal.getsignal(number) is handler  # ours are gone again
        train(settings, resume=True, policy=GaussianPolicy())
        assert result(folder / "run") == result(tmp_path / "whole" / "run"), when


# What moves from update to update, and what is remembered from one to the next.
STRUCTURES = {
    "sliding window with a coarse tail": [
        "rollout={steps: 8, tail: {fraction: 0.5}, "
        "window: {size: 2, high: 6, move: progressive, every: 3, decay: 0.5, decay_from: 1}}",
    ],
    "moving fork and history": [
        "rollout={steps: 6, kernel: ddim, fork: {branches: 3, first: 3, last: 6}}",
        "objective.measured_with.kernel=ddim",
        "advantage={std: history, updates: 2}", "credit={select: branch_best_worst, threshold: 0.2}",
    ],
    "moving splits and levels that follow the reward": [
        "rollout.tree={at: [0, 2], moves_to: [1, 3], branch: [3, 2], noise: splits}",
        "rollout.levels={shape: splits, values: [0.5, 0.9], reward_driven: {memory: 0.5}}",
    ],
    "drawn splits that follow the reward, a rising beta and a falling rate": [
        "rollout={steps: 6, kernel: cps, density: unscaled, levels: {reward_driven: {memory: 0.5}}}",
        "rollout.tree={at: [1, 2], branch: [3, 2], noise: splits, draw: {around: success, concentration: 4.0}}",
        "objective={name: tmpo, clip_range: 0.2, tmpo: {beta: 2.0, beta_from: 1.0}}",
        "objective.measured_with={kernel: cps, density: unscaled}", "optimizer.schedule=cosine",
    ],
    "pruned depths and leaves": [
        "rollout.tree={at: [0, 1], branch: [3, 2], untrained_depths: [3, 4], depths_every: 2, depths_stop: 2}",
        "credit={rule: depth_z_score, select: better_half}",
    ],
    "weights that sample for DiffusionNFT": [
        "rollout.kernel=ode", "objective={name: nft, nft: {decay_rate: 0.1, times: 2}}",
    ],
    "weights that sampled for GRPO-Guard": ["objective={name: guard, clip_range: 0.2}", "optimizer.epochs=2"],
    "fading imitation": [
        "rollout.window={size: 1, high: 4}", "rollout.tree={branch: 2}",
        "objective.layer_tuning={weight: 0.5, decay: 6}",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURES)
def test_moving_parts_and_memories(tmp_path, monkeypatch, name):
    """Stopped in the fourth and in the sixth of eight updates."""
    overrides = [*OPTIONS[1:3], "updates=8", "checkpoint.every=0", "optimizer.inner_updates=2", *STRUCTURES[name]]
    overrides += ["ema={decay: 0.8}", "reward=gaussian_runs:with_gaps"]
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    whole, stopped = (config(folder, *overrides, evaluated(folder)) for folder in folders)
    train(whole, policy=GaussianPolicy())
    for calls, resume in ((4, False), (3, True)):
        with monkeypatch.context() as patch:
            signal_at_call(patch, trainer, "score_update", calls, signal.SIGTERM)
            with pytest.raises(Stopped):
                train(stopped, resume=resume, policy=GaussianPolicy())
    assert load_latest(folders[1] / "run" / "checkpoints").step == 5
    train(stopped, resume=True, policy=GaussianPolicy())
    assert result(folders[1] / "run") == result(folders[0] / "run")


# ------------------------------------------------------------------------------------------------- the command line
REWARD = """
import torch
def redness(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
"""


def real_config(folder: Path, name: str, model: Path) -> Path:
    """A config for the command line: a small random SD3 folder, a reward in a file."""
    (folder / "scorer.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("a red circle\ntwo dogs\n")
    data = {
        "output_dir": str(folder / name),
        "policy": {"path": str(model), "device": "cpu", "lora": {"rank": 4}},
        "reward": f"{folder / 'scorer.py'}:redness",
        "prompts": {"source": str(folder / "prompts.txt")},
        "updates": 4,
        "prompts_per_update": 2,
        "group_size": 2,
        "rollout": {"steps": 3},
        "eval": None,
        "threads": 1,
        "checkpoint": {"every": 0},
        "logging": {"samples_every": 0},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def flowrl(*arguments: str | Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "flowrl", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def test_sigterm_through_the_command_line(tmp_path):
    """`flowrl train` on a real pipeline folder: SIGTERM gives 143; `--resume` ends it as if nothing had happened."""
    torch.manual_seed(0)
    tiny_sd3(tmp_path / "tokenizers").save_pretrained(tmp_path / "model")
    long = real_config(tmp_path, "stopped", tmp_path / "model")
    long.write_text(long.read_text().replace("updates: 4", "updates: 100000"))
    process = flowrl("train", long)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + processes.PATIENCE_S
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=processes.PATIENCE_S)
    assert process.returncode == 143, said
    assert "stopped by a signal, everything is saved" in said and "Traceback" not in said
    done = load_latest(tmp_path / "stopped" / "checkpoints").step
    assert done == len(read_jsonl(metrics)) >= 2

    from flowrl.config import load_config

    updates = f"updates={done + 1}"
    train(load_config(long, [updates]), resume=True)
    train(load_config(real_config(tmp_path, "whole", tmp_path / "model"), [updates]))
    for name in ("metrics.jsonl", f"checkpoints/step_{done + 1:06d}/tensors.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (tmp_path / "stopped" / "adapter").is_dir()
