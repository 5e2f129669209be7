"""The loop: what it draws, counts, logs and optimises."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gaussian_runs
import pytest
import torch
from gaussian_runs import PROMPTS, config

import samplers
from flowrl import trainer
from flowrl.checkpoint import load_latest
from flowrl.errors import GuardStop, UserError
from flowrl.policies import GaussianPolicy
from flowrl.prompts import prompt_batch
from flowrl.runlog import read_jsonl
from flowrl.trainer import train


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The report is tested elsewhere and costs as much as 50 updates."""
    monkeypatch.setattr("flowrl.report.write_report", lambda folder: folder / "report.html")


@pytest.fixture
def trees(monkeypatch) -> list[samplers.Tree]:
    """The trees of a run, one per update."""
    found: list[samplers.Tree] = []
    rollout = trainer._rollout

    def recorded(*arguments: Any) -> samplers.Tree:
        found.append(rollout(*arguments))
        return found[-1]

    monkeypatch.setattr(trainer, "_rollout", recorded)
    return found


def rows(folder: Path) -> list[dict]:
    return read_jsonl(folder / "run" / "metrics.jsonl")


def run(folder: Path, *overrides: str, policy: GaussianPolicy | None = None) -> dict:
    return train(config(folder, *overrides), policy=policy or GaussianPolicy())


# --------------------------------------------------------------------------------------------------- what is drawn
def test_each_group_is_k_images_of_one_prompt(tmp_path, trees):
    run(tmp_path, "updates=3", "prompts_per_update=5", "group_size=4")
    for update, tree in enumerate(trees):
        slots = prompt_batch(len(PROMPTS), 5, 0, update)
        expected = [(slot.prompt, slot.occurrence, k) for slot in slots for k in range(4)]
        assert [(key.prompt, key.occurrence, key.root) for key in tree.keys] == expected
        assert {(key.seed, key.purpose, key.update) for key in tree.keys} == {(0, "rollout", update)}
        start = tree.states.x[tree.states.node == 0].flatten(1)
        assert len(start.unique(dim=0)) == 20
    assert not torch.equal(trees[0].leaves, trees[1].leaves)


def test_shared_noise_gives_a_group_one_start(tmp_path, trees):
    run(tmp_path, "updates=1", "rollout={steps: 4, shared_noise: true}")
    start = trees[0].states.x[trees[0].states.node == 0].flatten(1).view(4, 8, 2)
    assert all(len(group.unique(dim=0)) == 1 for group in start) and len(start[:, 0].unique(dim=0)) == 4
    assert len(trees[0].leaves.flatten(1).unique(dim=0)) == 32


def test_images_depend_on_nothing_but_their_keys(tmp_path, trees):
    for name, options in {"a": [], "b": ["rollout.chunk=3"], "c": ["optimizer.micro_batch=5"]}.items():
        run(tmp_path / name, "updates=2", *options)
    for other in (trees[2:4], trees[4:6]):
        assert all(torch.equal(a.leaves, b.leaves) for a, b in zip(trees[:1], other[:1], strict=True))
        torch.testing.assert_close(trees[1].leaves, other[1].leaves, atol=1e-5, rtol=0)


def test_two_equal_runs_are_equal_and_another_seed_is_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, f"seed={seed}", "updates=3", "optimizer.inner_updates=2")
    first, second, third = ((tmp_path / n / "run" / "metrics.jsonl").read_bytes() for n in "abc")
    assert first == second != third


# -------------------------------------------------------------------------------------------------- what is counted
@pytest.mark.parametrize(
    ("options", "forwards"),
    [
        ([], 4),  # four of five steps are trained
        (["rollout={steps: 5, train_fraction: 0.5}"], 2),
        (["rollout={steps: 6, window: {size: 2}}"], 2),
        (["optimizer.epochs=3"], 12),
    ],
)
def test_cost_is_what_was_computed(tmp_path, options, forwards):
    calls = {"rows": 0, "trained": 0}

    class Counted(GaussianPolicy):
        def predict(self, latents, s, cond, guidance=1.0):
            calls["trained" if torch.is_grad_enabled() else "rows"] += len(latents)
            return super().predict(latents, s, cond, guidance)

    settings = config(tmp_path, "updates=3", "self_check.enabled=false", *options)
    cost = train(settings, policy=Counted())["cost"]
    images = 3 * 4 * 8
    assert cost["images"] == images and cost["sampling_calls"] == images * settings.rollout.steps == calls["rows"]
    assert cost["training_forwards"] == cost["training_backwards"] == images * forwards == calls["trained"]
    assert cost["calls_per_image"] == settings.rollout.steps + forwards


def test_guidance_costs_two_calls_where_the_network_sees_two_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(GaussianPolicy, "calls", lambda self, guidance: 1 if guidance == 1 else 2)
    cost = run(tmp_path, "updates=1", "rollout={steps: 5, guidance: 2.0}")["cost"]
    assert cost["sampling_calls"] == 2 * 32 * 5 and cost["training_forwards"] == 2 * 32 * 4


def test_groups_of_equal_rewards_cost_no_forward_and_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gaussian_runs, "quadratic", lambda images, prompts, metadata: torch.full((len(images),), 0.3))
    policy = GaussianPolicy()
    summary = run(tmp_path, "updates=2", policy=policy)
    assert summary["cost"]["training_forwards"] == 0 and not policy.weight.any() and not policy.bias.any()
    row = rows(tmp_path)[1]
    assert row["advantage/zero_variance_groups"] == 4 and row["grad_norm"] == 0 and row["loss"] == 0
    found = load_latest(tmp_path / "run" / "checkpoints")
    assert found.tensors["optimizer/state/0/step"].item() == 2  # steps with gradient 0, as with any other split


def test_log_has_the_reward_of_all_images(tmp_path, trees):
    run(tmp_path, "updates=2", "reward={gaussian_runs:quadratic: 2.0, gaussian_runs:flipped: 0.5}")
    for tree, row in zip(trees, rows(tmp_path), strict=True):
        x = tree.leaves.flatten(1).double()
        values = -0.5 * (x - gaussian_runs.TARGET).square().sum(1)
        assert row["reward/mean"] == pytest.approx(1.5 * values.mean().item(), rel=1e-4)
        assert row["reward/std"] == pytest.approx(1.5 * values.std(correction=0).item(), rel=1e-4)
        assert row["reward/gaussian_runs:quadratic/mean"] == pytest.approx(values.mean().item(), rel=1e-4)
        assert row["reward/gaussian_runs:flipped/mean"] == pytest.approx(-values.mean().item(), rel=1e-4)


# ---------------------------------------------------------------------------------------------- what is optimised
def test_optimizer_steps_and_warm_up(tmp_path):
    run(
        tmp_path, "updates=5", "optimizer.inner_updates=2", "optimizer.epochs=3", "optimizer.warmup=4",
        "optimizer.lr=0.01",
    )  # fmt: skip
    assert [row["lr"] for row in rows(tmp_path)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    found = load_latest(tmp_path / "run" / "checkpoints")
    assert found.tensors["optimizer/state/0/step"].item() == 5 * 2 * 3


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", [0.5 * 4, 0.75 * 4, 0.5 * 4, 0.25 * 4]),  # the first is half of lr by the warm-up
        ("cosine", [0.5 * 4, (1 + math.cos(math.pi / 4)) / 2 * 4, 0.5 * 4, (1 - math.cos(math.pi / 4)) / 2 * 4]),
        ("constant", [2.0, 4.0, 4.0, 4.0]),
    ],
)
def test_schedules_of_the_learning_rate(tmp_path, schedule, rates):
    """lr 0.004, two updates of warm-up, four updates: f(0), f(1/4), f(1/2), f(3/4)."""
    run(tmp_path, "updates=4", "optimizer.warmup=2", "optimizer.lr=0.004", f"optimizer.schedule={schedule}")
    assert [1000 * row["lr"] for row in rows(tmp_path)] == pytest.approx(rates)


def test_gradients_are_clipped_to_their_norm(tmp_path):
    seen = []

    class Watched(torch.optim.AdamW):
        def step(self, closure=None):
            gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
            seen.append(torch.cat(gradients).norm().item())
            return super().step(closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowrl.state.torch.optim.AdamW", Watched)
        run(tmp_path, "updates=3", "optimizer.grad_clip=0.01")
    assert seen == pytest.approx([0.01] * 3, rel=1e-4)
    assert all(row["grad_norm"] > 0.05 for row in rows(tmp_path))  # the log tells the norm before


def test_the_first_inner_update_is_on_policy_and_later_ones_are_not(tmp_path):
    run(tmp_path / "one", "updates=2")
    assert [row["ratio/max_dev"] for row in rows(tmp_path / "one")] == [0.0, 0.0]
    run(tmp_path / "two", "updates=2", "optimizer.epochs=2")
    assert all(row["ratio/max_dev"] > 1e-4 for row in rows(tmp_path / "two"))


def test_eight_bit_adam_where_it_cannot_run(tmp_path):
    with pytest.raises(UserError, match="adamw8bit.*optimizer.name=adamw"):
        run(tmp_path, "optimizer.name=adamw8bit")


def test_a_judge_needs_features(tmp_path):
    with pytest.raises(UserError, match="eval.judge 'jpeg', which has no image features"):
        run(tmp_path, gaussian_runs.evaluated(tmp_path), "eval.judge=jpeg")


def test_alarms_can_stop_the_run(tmp_path, monkeypatch):
    def raised(self, update, metrics):
        return ["update 2: the reward rose, but"] if update == 2 else []

    monkeypatch.setattr("flowrl.guards.Alarms.add", raised)
    with pytest.raises(GuardStop, match="alarms.stop is set, and update 2: the reward rose"):
        run(tmp_path, "alarms.stop=true")
    assert load_latest(tmp_path / "run" / "checkpoints").step == 2 and len(rows(tmp_path)) == 2
