"""Two gloo processes are one process: same images, same gradients, same log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import child_runs
import processes
import pytest
import torch
from gaussian_runs import config, evaluated
from safetensors.torch import load_file
from tiny_pipelines import tiny_sd3

from flowrl.checkpoint import load_latest
from flowrl.config import config_folder, resolved_yaml
from flowrl.distributed import World
from flowrl.errors import UserError
from flowrl.prompts import prompt_batch, split
from flowrl.runlog import read_jsonl

ROOT = Path(__file__).parents[2]
ALONE = World(0, 1, torch.device("cpu"))


def compare(folder: Path, overrides: list[str], policy: str = "gaussian", size: int = 2, tolerance: float = 1e-5):
    """Run with one process and with `size`; returns both run folders after checking images, gradients and weights."""
    one, many = folder / "one", folder / "many"
    codes = processes.wait(processes.start(child_runs.record, one, overrides, policy))
    codes += processes.launched(child_runs.record, many, overrides, policy, size=size)
    assert codes == [0] * (1 + size)
    alone = load_file(one / "rank_0.safetensors")
    ranks = [load_file(many / f"rank_{rank}.safetensors") for rank in range(size)]
    assert all(rank.keys() == alone.keys() for rank in ranks) and len(alone) >= 4
    for name, expected in alone.items():
        if name.startswith("leaves"):
            joined = torch.cat([rank[name] for rank in ranks])  # in the order of ranks: the order of one process
            assert joined.shape == expected.shape and min(len(rank[name]) for rank in ranks) > 0
            torch.testing.assert_close(joined, expected, atol=tolerance, rtol=0)
        else:
            assert expected.norm() > 0
            for rank in ranks:
                assert torch.equal(rank[name], ranks[0][name])
                assert (rank[name] - expected).norm() <= tolerance * expected.norm()
    first, second = (load_latest(run / "run" / "checkpoints") for run in (one, many))
    assert first.step == second.step
    for name, tensor in first.tensors.items():
        torch.testing.assert_close(second.tensors[name], tensor, rtol=1e-3, atol=1e-6)
    return one / "run", many / "run"


def same_log(one: Path, many: Path, rel: float = 1e-4) -> list[dict]:
    rows, others = (read_jsonl(run / "metrics.jsonl") for run in (one, many))
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            assert other[name] == (value if value is None else pytest.approx(value, rel=rel, abs=1e-6)), name
    cost = [json.loads((run / "summary.json").read_text())["cost"] for run in (one, many)]
    assert cost[0] == cost[1]
    return rows


def test_an_uneven_split(tmp_path):
    """Five groups on two processes (3 + 2), three evaluation prompts (2 + 1), KL, EMA and a global std."""
    options = ["updates=3", "prompts_per_update=5", "objective.kl.weight=0.2", "advantage.std=global", "ema={}"]
    options += [evaluated(tmp_path / "one").replace("limit: 2", "limit: 3"), "eval.every=2"]
    one, many = compare(tmp_path, options)
    same_log(one, many)
    for stage in ("before", "after"):
        rows, others = (read_jsonl(run / f"eval_{stage}.jsonl") for run in (one, many))
        assert [(r["prompt_id"], r["seed_index"]) for r in rows] == [(p, s) for p in range(3) for s in range(2)]
        for row, other in zip(rows, others, strict=True):
            assert other["scores"] == pytest.approx(row["scores"], abs=1e-5) and other["path"] == row["path"]
            assert (many / row["path"]).is_file()


def test_missing_rewards_inner_updates_and_epochs(tmp_path):
    """And an evaluation of a single prompt, of which the second process gets nothing."""
    options = ["updates=2", "optimizer.inner_updates=2", "optimizer.epochs=2", "reward=gaussian_runs:with_gaps"]
    options += [evaluated(tmp_path / "one").replace("limit: 2", "limit: 1")]
    rows = same_log(*compare(tmp_path, options))
    assert sum(row["advantage/missing"] for row in rows) > 0 and rows[0]["ratio/max_dev"] > 0


def test_three_processes_and_a_prompt_that_comes_twice(tmp_path):
    """Seven groups from six prompts: some prompt has two groups in one update, possibly on two processes."""
    same_log(*compare(tmp_path, ["updates=2", "prompts_per_update=7"], size=3))


STRUCTURES = {
    "trees, history and imitation": [
        "rollout={steps: 6, window: {size: 2, high: 5, move: progressive, every: 1}, tree: {branch: 2}, "
        "levels: {shape: growth, reward_driven: {memory: 0.5}}}",
        "advantage={std: history, updates: 2}", "credit={rule: depth_z_score, shrink: 2.0, floor: 0.01}",
        "objective.layer_tuning={weight: 0.5}",
    ],
    "forks and their best and worst": [
        "rollout.fork={branches: 4, first: 3, last: 5}", "advantage={std: history, updates: 2}",
        "credit={select: branch_best_worst, threshold: 0.2}",
    ],
    "DiffusionNFT": ["rollout.kernel=ode", "objective={name: nft, nft: {decay_rate: 0.1}, kl: {weight: 0.1}}"],
    "trajectory balance": [
        "rollout.tree={at: [0, 2], branch: 2, noise: splits}", "objective={name: tmpo, tmpo: {beta: 1.0}}",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(tmp_path, name):
    """Five groups on two processes, several optimizer steps per rollout, missing rewards."""
    options = ["updates=3", "prompts_per_update=5", "optimizer.epochs=2", "reward=gaussian_runs:with_gaps"]
    same_log(*compare(tmp_path, [*options, *STRUCTURES[name]]))


def test_a_network(tmp_path):
    """A small SD3 with LoRA: model calls have other shapes on two processes."""
    options = [
        "updates=2", "prompts_per_update=3", "group_size=3", "rollout.steps=3", "reward=jpeg",
        "objective={clip_range: 1.0e-4, kl: {weight: 0.01}}", "optimizer.lr=1e-4",
    ]  # fmt: skip
    one, many = compare(tmp_path, options, policy="sd3")
    rows, others = (read_jsonl(run / "metrics.jsonl") for run in (one, many))
    assert rows[0]["reward/mean"] == pytest.approx(others[0]["reward/mean"], rel=1e-3)


@pytest.mark.slow
def test_the_launcher_of_the_readme(tmp_path):
    """`accelerate launch` with the shipped two-process config, through the command line."""
    tiny_sd3(tmp_path / "tokenizers").save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo dogs\na cat\n")
    path = tmp_path / "config.yaml"
    model = f"{{path: '{tmp_path / 'model'}', device: cpu, dtype: float32}}"
    settings = config(
        tmp_path, f"policy={model}", f"prompts.source={tmp_path / 'prompts.txt'}", "reward=jpeg", "updates=2",
        "prompts_per_update=3", "group_size=3", "rollout.steps=3",
    )  # fmt: skip
    path.write_text(resolved_yaml(settings))
    python, gloo = [sys.executable, "-m"], config_folder() / "accelerate" / "cpu_gloo_2.yaml"
    launch = [*python, "accelerate.commands.launch", "--config_file", str(gloo), "-m"]
    for name, start in (("one", python), ("many", launch)):
        command = [*start, "flowrl", "train", str(path), f"output_dir={tmp_path / name}"]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    rows, others = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "many"))
    assert len(rows) == len(others) == 2
    for row, other in zip(rows, others, strict=True):
        assert other["reward/mean"] == pytest.approx(row["reward/mean"], rel=1e-3)
    assert rows[0]["grad_norm"] == pytest.approx(others[0]["grad_norm"], rel=1e-3)
    assert json.loads((tmp_path / "many" / "environment.json").read_text())["processes"] == 2


def test_a_failure_on_one_process_ends_all_with_the_state_saved(tmp_path):
    options = ["reward=gaussian_runs:failing", "checkpoint.every=0"]
    codes = processes.launched(child_runs.train_with_failing_rank, tmp_path, options)
    assert codes == [1, 1]
    assert load_latest(tmp_path / "run" / "checkpoints").step == 1  # the first update was complete
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    ("where", "own"),
    [("before", "RewardError"), ("after", "RewardError"), ("finish", "UserError: no report")],
)
def test_a_failure_at_either_end_is_told_to_all(tmp_path, where, own):
    """The last process cannot score its share of an evaluation, or the first cannot write the report."""
    options = ["updates=1", evaluated(tmp_path).replace("'gaussian_runs:quadratic'", "'gaussian_runs:failing'")]
    assert processes.launched(child_runs.train_and_say_what_failed, tmp_path, options, where) == [0, 0]
    said = [(tmp_path / f"rank_{rank}.txt").read_text() for rank in range(2)]
    failed = 0 if where == "finish" else 1
    assert own in said[failed]
    assert said[1 - failed] == "UserError: another process of this run has stopped; its message says why"
    if where != "before":  # nothing is lost: what failed can be done again
        assert load_latest(tmp_path / "run" / "checkpoints").step == 1


def test_a_signal_to_one_process_ends_all_with_the_state_saved(tmp_path):
    options = ["checkpoint.every=0", "optimizer.inner_updates=2"]
    assert processes.launched(child_runs.train_with_signalled_rank, tmp_path, options) == [143, 143]
    assert load_latest(tmp_path / "run" / "checkpoints").step == 2  # together, at the end of that update
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 2


def test_a_folder_in_use_ends_all_processes(tmp_path):
    options = ["updates=1"]
    assert processes.wait(processes.start(child_runs.train, tmp_path, options)) == [0]
    assert processes.launched(child_runs.train, tmp_path, options) == [1, 1]  # the same run again, without resume


def test_whole_groups_for_any_number_of_processes():
    for prompts, update in ((6, 0), (6, 5), (64, 3)):
        slots = list(enumerate(prompt_batch(prompts, 10, 0, update)))
        for size in (1, 2, 3, 7, 10):
            shares = [split(slots, rank, size) for rank in range(size)]
            assert [slot for share in shares for slot in share] == slots  # every group once, whole, in order
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


# ------------------------------------------------------------------------------------------------------------- alone
def test_alone_every_exchange_is_the_identity():
    values = torch.tensor([1.0, float("nan")])
    for exchange in (ALONE.sum, ALONE.max, ALONE.gather):
        assert exchange(values) is values
    assert ALONE.any(True) and not ALONE.any(False) and ALONE.main
    ALONE.barrier()
    ALONE.leave()
    with ALONE.together():
        pass
    with pytest.raises(ValueError, match="mine"), ALONE.together():
        raise ValueError("mine")


def test_a_parameter_without_gradient_gets_zeros():
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    parameters[0].grad = torch.tensor([1.0, 2.0])
    ALONE.sum_gradients(parameters)
    assert [p.grad.tolist() for p in parameters] == [[1.0, 2.0], [0.0, 0.0, 0.0]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_where_there_is_none(device):
    with pytest.raises(UserError, match=rf"got device '{device}'.*sees no CUDA device.*expected 'cpu' or 'auto'"):
        World.join(device)
    assert World.join("auto") == ALONE
