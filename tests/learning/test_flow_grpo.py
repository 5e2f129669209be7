"""Flow-GRPO learns: the trainer itself, on `GaussianPolicy`, arrives at the KL-regularised optimum in closed form.

The optimum is an affine map of each prompt's mean, W = weight * 1 and w = bias. What is compared is the moving average
of the weights; the noise of the 30 or so updates that it averages leaves about 0.02 in each entry.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gaussian_runs import PROMPTS, TARGET, config

from flowrl.policies.gaussian import GaussianPolicy, LinearChain
from flowrl.trainer import train

GROUP, STEPS = 16, 5
TOLERANCE = 0.06  # of every entry of (W, w); at the start the largest is 0.3 to 0.8 away


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The report is tested elsewhere and costs as much as 50 updates."""
    monkeypatch.setattr("flowrl.report.write_report", lambda folder: folder / "report.html")


def learn(folder: Path, *overrides: str) -> GaussianPolicy:
    policy = GaussianPolicy()
    settings = config(
        folder, "updates=220", "prompts_per_update=6", f"group_size={GROUP}", "optimizer.lr=0.03", "ema.decay=0.97",
        "checkpoint.every=0", *overrides,
    )  # fmt: skip
    train(settings, policy=policy)
    return policy


def learnt(policy: GaussianPolicy, weights: str = "ema") -> torch.Tensor:
    """(W, w) flattened, float64."""
    with policy.weights(weights):
        return torch.cat([policy.weight.detach().flatten(), policy.bias.detach()]).double()


CASES = {  # kernel, level, trained steps, KL weight and form, seed
    "flow": ("flow", 0.7, 4, 0.3, "exact", 0),
    "flow, published KL": ("flow", 0.7, 4, 0.3, "published", 0),
    "cps": ("cps", 0.7, 4, 0.2, "exact", 0),
    "dance": ("dance", 0.4, 4, 0.1, "exact", 0),
    "flow, seed 1": ("flow", 0.7, 4, 0.3, "exact", 1),
    "flow, seed 2": ("flow", 0.7, 4, 0.3, "exact", 2),
    "flow, three of five steps": ("flow", 0.7, 3, 0.3, "exact", 3),
    "cps, published KL": ("cps", 0.7, 4, 0.3, "published", 1),
}
DEFAULT = ("flow", "flow, published KL", "cps", "dance")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in DEFAULT else pytest.mark.slow) for n in CASES])
def test_training_arrives_at_the_optimum(tmp_path, name):
    kernel, level, trained, kl_weight, form, seed = CASES[name]
    policy = learn(
        tmp_path, f"seed={seed}", f"rollout.kernel={kernel}", f"rollout.level={level}",
        f"objective.measured_with.kernel={kernel}", f"objective.kl={{form: {form}, weight: {kl_weight}}}",
        f"rollout.train_fraction={trained / STEPS + 0.01}",
    )  # fmt: skip
    chain = LinearChain.make(policy.sigmas(STEPS), policy.std, kernel, level)

    def optimum(form: str) -> torch.Tensor:
        found = chain.optimum(TARGET, 1.0, kl_weight, range(trained), GROUP, form)
        return torch.cat([found.weight * torch.eye(2, dtype=torch.float64).flatten(), found.bias])

    expected = optimum(form)
    torch.testing.assert_close(learnt(policy), expected, atol=TOLERANCE, rtol=0)
    # the tolerance tells this optimum from the start and from that of the other form of the KL
    assert expected.abs().max() > 4 * TOLERANCE
    other = optimum("published" if form == "exact" else "exact")
    assert (other - expected).abs().max() > 2 * TOLERANCE


def expected_reward(policy: GaussianPolicy) -> float:
    """Mean of -1/2 |x - TARGET|^2 over the prompts under the trained weights, in closed form (up to the variance)."""
    chain = LinearChain.make(policy.sigmas(STEPS), policy.std, "flow", 0.7)
    means = policy.encode(PROMPTS).rows["mean"].double()
    w, bias = learnt(policy, "current")[:4].view(2, 2), learnt(policy, "current")[4:]
    result = chain.gain() * (means + means @ w.T + bias)
    return float(-0.5 * (result - TARGET.double()).square().sum(1).mean())


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_controls(tmp_path, seed):
    """Trained on the reward it rises; with its sign turned it falls; shuffled within the groups it does not rise."""
    start = expected_reward(GaussianPolicy())
    change = {}
    for reward in ("quadratic", "flipped", "shuffled"):
        policy = learn(
            tmp_path / reward, f"seed={seed}", "updates=80", "optimizer.lr=0.01", f"reward=gaussian_runs:{reward}"
        )
        change[reward] = expected_reward(policy) - start
    assert change["quadratic"] > 0.5  # of at most 0.98, where every image is at the target
    assert change["flipped"] < -0.5
    assert change["shuffled"] < 0.15 * change["quadratic"]  # a random walk of the weights, a tenth of the way
