"""The cosine estimator on gradients of known signal, and the gradients themselves against the trainer's own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian_runs import config
from tiny_pipelines import tiny_sd3
from typer.testing import CliRunner

from benchmarks import gradient_signal
from flowrl.config import load_config
from flowrl.errors import UserError
from flowrl.policies.gaussian import GaussianPolicy
from flowrl.prompts import load_prompts
from flowrl.rewards import load_reward
from flowrl.state import State
from flowrl.trainer import train


# ------------------------------------------------------------------------------------------------------------ estimator
def test_three_gradients_by_hand() -> None:
    angles = torch.tensor([0.0, 60.0, 90.0]).deg2rad()
    found = gradient_signal.mean_cosine(
        torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [5], [0.1]])
    )
    pairs = [0.5, 0.0, math.sqrt(3) / 2]  # of 0 and 60, 0 and 90, 60 and 90 degrees: what is left without one of three
    mean = sum(pairs) / 3
    se = math.sqrt(2 / 3 * sum((cosine - mean) ** 2 for cosine in pairs))
    reach = 4.302653 * se  # Student's t with two degrees of freedom, from a table
    assert found == pytest.approx((mean, se, mean - reach, mean + reach), abs=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_a_known_share_of_signal_is_found(share: float) -> None:
    """U gradients mu + e with |mu|^2 / (|mu|^2 + E |e|^2) = share, drawn again and again."""
    trials, updates, size = 400, 8, 300
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(trials, updates, size, generator=generator) * ((1 - share) / size) ** 0.5
    signal = torch.nn.functional.normalize(torch.randn(trials, 1, size, generator=generator), dim=-1) * share**0.5
    found = [gradient_signal.mean_cosine(gradients) for gradients in signal + noise]
    means, errors = torch.tensor([c.mean for c in found]), torch.tensor([c.se for c in found])
    assert float(means.mean()) == pytest.approx(share, abs=0.005)
    # the jackknife's error is the true one or somewhat larger; see the module for sqrt(2 (U - 1) / (U - 2)) at share 0
    assert 0.9 < float(errors.square().mean().sqrt() / means.std()) < 1.7
    assert sum(c.low <= share <= c.high for c in found) / trials > 0.93


def test_gradients_of_zeros_have_no_signal() -> None:
    assert gradient_signal.mean_cosine(torch.zeros(4, 5)) == (0.0, 0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="at least 3"):
        gradient_signal.mean_cosine(torch.ones(2, 5))


# -------------------------------------------------------------------------------------------------------------- updates
def drawn(settings: Any, seed: int) -> gradient_signal.Update:
    prompts = load_prompts(**settings.prompts.model_dump())
    return gradient_signal.draw(settings, GaussianPolicy(), prompts, load_reward(settings.reward), seed)


@pytest.mark.parametrize("window", [None, "rollout.window={size: 2, low: 1, high: 3}"])
def test_the_gradient_is_that_of_the_trainers_first_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: str | None
) -> None:
    settings = config(tmp_path, "updates=1", "seed=7", "rollout.shared_noise=true", *([window] if window else []))
    seen: list[torch.Tensor] = []
    step = State.step

    def spy(state: State, config: Any, policy: Any, parameters: list, *args: Any, **options: Any) -> float | None:
        seen.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
        return step(state, config, policy, parameters, *args, **options)

    monkeypatch.setattr(State, "step", spy)
    monkeypatch.setattr("flowrl.report.write_report", lambda folder: folder / "report.html")
    train(settings, policy=GaussianPolicy())
    found = drawn(settings, seed=7)
    torch.testing.assert_close(found.gradient, seen[0], rtol=1e-4, atol=1e-6)
    assert sorted(found.steps) == ([1, 2] if window else [0, 1, 2, 3])
    assert all(bool(gradient.any()) for gradient in found.steps.values())


def test_equal_seeds_have_cosine_one_and_others_not(tmp_path: Path) -> None:
    settings = config(tmp_path)
    same = gradient_signal.measure(settings, GaussianPolicy(), [3, 3, 3])
    for row in (same, *same["steps"]):
        assert row["cosine"] == pytest.approx(1, abs=1e-6) and row["se"] < 1e-6
    other = gradient_signal.measure(settings, GaussianPolicy(), [3, 4, 5])
    assert other["cosine"] < 0.999


def test_more_images_carry_more_signal(tmp_path: Path) -> None:
    few, many = (
        gradient_signal.measure(config(tmp_path, f"group_size={size}"), GaussianPolicy(), range(8)) for size in (2, 128)
    )
    assert many["ci95"][0] > few["cosine"]


def test_a_random_window_counts_its_steps(tmp_path: Path) -> None:
    settings = config(tmp_path, "rollout.window={size: 1, low: 0, high: 4}")
    seeds = range(12)
    visits = [next(iter(drawn(settings, seed).steps)) for seed in seeds]
    found = gradient_signal.measure(settings, GaussianPolicy(), seeds)
    assert {row["step"]: row["updates"] for row in found["steps"]} == {
        step: visits.count(step) for step in sorted(set(visits)) if visits.count(step) >= 3
    }


# ------------------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize("overrides", gradient_signal.SETTINGS.values(), ids=gradient_signal.SETTINGS)
def test_the_built_in_settings_fit_the_default_recipe(overrides: tuple[str, ...]) -> None:
    found = gradient_signal.configure(load_config("flow_grpo_fast/tiny_sd3"), overrides)
    given = dict(override.split("=", 1) for override in overrides)
    assert (found.rollout.kernel, found.rollout.density) == (given["rollout.kernel"], given["rollout.density"])
    assert (found.rollout.window is None) == (given["rollout.window"] == "null")


def test_a_kernel_comes_with_its_level() -> None:
    base = load_config("flow_grpo_fast/tiny_sd3")
    assert gradient_signal.configure(base, ["rollout.kernel=precise"]).rollout.level == 1.5
    assert gradient_signal.configure(base, ["rollout.kernel=precise", "rollout.level=0.4"]).rollout.level == 0.4
    assert gradient_signal.configure(base, ["rollout.steps=6"]).rollout.level == base.rollout.level


def test_one_of_them_is_flow_grpo_fast() -> None:
    base = load_config("flow_grpo_fast/tiny_sd3")
    configs = [gradient_signal.configure(base, overrides) for overrides in gradient_signal.SETTINGS.values()]
    assert configs.count(base) == 1


def test_mistakes_in_settings_are_explained() -> None:
    for text in ("rollout.kernel=flow", ": rollout.kernel=flow", "a: 'open"):
        with pytest.raises(UserError, match="--setting"):
            gradient_signal.parse_settings([text])
    with pytest.raises(UserError, match="of its own"):
        gradient_signal.parse_settings(["a: seed=1", "a: seed=2"])
    assert gradient_signal.parse_settings(["a: 'x={b: 1, c: 2}' y=2", "b:"]) == {
        "a": ("x={b: 1, c: 2}", "y=2"),
        "b": (),
    }
    with pytest.raises(UserError, match="rollout.kernel"):
        gradient_signal.configure(load_config("flow_grpo_fast/tiny_sd3"), ["rollout.kernel=ode"])
    with pytest.raises(UserError, match="rollout"):
        gradient_signal.configure(load_config("flow_grpo_fast/tiny_sd3"), ["rollout=3"])
    with pytest.raises(UserError, match="loss scale"):
        gradient_signal.load(load_config("flow_grpo_fast/tiny_sd3", ["policy.dtype=float16"]))


# --------------------------------------------------------------------------------------------------------- command line
def test_the_command_prints_and_writes_cosines(tmp_path: Path) -> None:
    tiny_sd3(tmp_path / "parts").save_pretrained(tmp_path / "model")
    out = tmp_path / "deep" / "signal.json"
    arguments = [
        f"policy.path={tmp_path / 'model'}", "reward=jpeg", "prompts.limit=4", "prompts_per_update=2", "group_size=4",
        "rollout.steps=4", "rollout.window.low=1", "rollout.window.high=3", "policy.lora.rank=2",
        "--setting", "as it is:", "--setting", "flow: rollout.kernel=flow rollout.density=gaussian rollout.window=null",
        "--updates", "3", "--seed", "5", "--out", str(out),
    ]  # fmt: skip
    result = CliRunner().invoke(gradient_signal.app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert [row["name"] for row in found["settings"]] == ["as it is", "flow"]
    assert [[step["step"] for step in row["steps"]] for row in found["settings"]] == [[1, 2], [0, 1, 2]]
    assert (found["seeds"], found["images_per_update"]) == ([5, 6, 7], 8)
    for row in found["settings"]:
        assert row["ci95"][0] <= row["cosine"] <= row["ci95"][1] and row["norm"] > 0
        assert f"{row['name']}: update 3 of 3" in result.output
        assert f"{row['cosine']:.3f}" in result.output


def test_the_command_refuses_too_few_updates_and_shows_an_example() -> None:
    assert CliRunner().invoke(gradient_signal.app, ["--updates", "2"]).exit_code == 2
    text = CliRunner().invoke(gradient_signal.app, ["--help"]).output
    assert "python -m benchmarks.gradient_signal" in text and "--setting" in text
