"""Flow-GRPO learns: the trainer itself, on `GaussianPolicy`, arrives at the KL-regularised optimum in closed form.

The optimum is an affine map of each prompt's mean, W = weight * 1 and w = bias, of size 0.1 to 0.8. What is compared is
the moving average of the weights; the noise of its last 50 or so updates leaves about 0.02 in each entry.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gaussian_runs import TARGET, config

from flowrl.policies.gaussian import GaussianPolicy, LinearChain
from flowrl.trainer import train

GROUP, KL, STEPS = 16, 0.3, 5
TOLERANCE = 0.06  # of every entry of (W, w); at the start the largest is 0.2 to 0.8 away


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The report is tested elsewhere and costs as much as 50 updates."""
    monkeypatch.setattr("flowrl.report.write_report", lambda folder: folder / "report.html")


def learn(folder: Path, *overrides: str) -> tuple[GaussianPolicy, list[float]]:
    """The trained policy and the mean reward of every update."""
    policy = GaussianPolicy()
    settings = config(
        folder, "updates=180", "prompts_per_update=6", f"group_size={GROUP}", "optimizer.lr=0.03",
        f"objective.kl.weight={KL}", "ema.decay=0.95", "checkpoint.every=0", *overrides,
    )  # fmt: skip
    train(settings, policy=policy)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return policy, [json.loads(line)["reward/mean"] for line in lines]


def learnt(policy: GaussianPolicy) -> torch.Tensor:
    with policy.weights("ema"):
        return torch.cat([policy.weight.detach().flatten(), policy.bias.detach()]).double()


def optimum(kernel: str, level: float, trained: range, form: str) -> torch.Tensor:
    chain = LinearChain.make(GaussianPolicy().sigmas(STEPS), 0.5, kernel, level)
    found = chain.optimum(TARGET, 1.0, KL, trained, GROUP, form)
    return torch.cat([found.weight * torch.eye(2, dtype=torch.float64).flatten(), found.bias])


CASES = {
    "flow": ("flow", 0.7, range(4), "exact", 0),
    "flow, another seed": ("flow", 0.7, range(4), "exact", 1),
    "flow, published KL": ("flow", 0.7, range(4), "published", 0),
    "flow, three of five steps": ("flow", 0.7, range(3), "exact", 0),
    "cps": ("cps", 0.7, range(4), "exact", 0),
    "dance": ("dance", 0.4, range(4), "exact", 0),
}
SLOW = ("flow, another seed", "flow, three of five steps", "dance")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CASES])
def test_training_arrives_at_the_optimum(tmp_path, name):
    kernel, level, trained, form, seed = CASES[name]
    policy, rewards = learn(
        tmp_path, f"seed={seed}", f"rollout.kernel={kernel}", f"rollout.level={level}",
        f"objective.measured_with.kernel={kernel}", f"objective.kl.form={form}",
        f"rollout.train_fraction={len(trained) / STEPS + 0.01}",
    )  # fmt: skip
    expected = optimum(kernel, level, trained, form)
    torch.testing.assert_close(learnt(policy), expected, atol=TOLERANCE, rtol=0)
    assert expected.abs().max() > 3 * TOLERANCE and sum(rewards[-20:]) > sum(rewards[:20])
    # the tolerance tells one setting from the other
    other = optimum(kernel, level, trained, "published" if form == "exact" else "exact")
    assert (learnt(policy) - other).abs().max() > TOLERANCE


def change(rewards: list[float], count: int = 15) -> tuple[float, float]:
    """(last - first, its standard error) of the mean reward over `count` updates at each end."""
    first, last = torch.tensor(rewards[:count]), torch.tensor(rewards[-count:])
    error = ((first.var() + last.var()) / count).sqrt()
    return float(last.mean() - first.mean()), float(error)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_controls(tmp_path, seed):
    """With the reward's sign turned the reward falls; with rewards shuffled within the group it does not rise."""
    ends = {}
    for reward in ("quadratic", "flipped", "shuffled"):
        _, rewards = learn(tmp_path / reward, f"seed={seed}", "updates=50", f"reward=gaussian_runs:{reward}")
        sign = -1.0 if reward == "flipped" else 1.0  # always the same reward, whatever was trained on
        ends[reward] = change([sign * r for r in rewards])
    gain, error = ends["quadratic"]
    assert gain > 5 * error
    fall, error = ends["flipped"]
    assert fall < -5 * error
    drift, error = ends["shuffled"]
    assert drift < 3 * error and abs(drift) < 0.2 * gain
