"""Pref-GRPO learns, and what it and Adv-GRPO claim, on `GaussianPolicy`; the tiny world is in
`benchmarks.reward_claims`. That Adv-GRPO alone learns is in tests/flowrl/test_adversary.py.

What is compared is the true expected reward of the trained weights in closed form, sampled by the ODE.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gaussian_adversary import write_references
from gaussian_runs import PROMPTS, TARGET, config

from flowrl.advantages import group_advantages
from flowrl.illusory import illusory
from flowrl.policies.gaussian import GaussianPolicy, LinearChain
from flowrl.trainer import train
from reward_models.judges.win_rate import win_rates

FRAME = [
    "updates=20", "prompts_per_update=6", "group_size=8", "rollout.steps=6", "optimizer.lr=0.02", "checkpoint.every=0",
]  # fmt: skip
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))]


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report is tested elsewhere and costs as much as 50 updates."""
    monkeypatch.setattr("flowrl.report.write_report", lambda folder: folder / "report.html")


def true_reward(policy: GaussianPolicy) -> float:
    """Mean of -1/2 |x - TARGET|^2 over the prompts, up to the variance, which no method can change."""
    gain = LinearChain.make(policy.sigmas(6), policy.std, "ode", 0.0).gain()
    means = policy.encode(PROMPTS).rows["mean"].double()
    learnt = means + means @ policy.weight.detach().double().T + policy.bias.detach().double()
    return float(-0.5 * (gain * learnt - TARGET.double()).square().sum(1).mean())


def change(folder: Path, reward: str, *more: str, seed: int = 0) -> float:
    """What training on this reward does to the true one, of 1.22 that there is to gain."""
    policy = GaussianPolicy()
    train(config(folder, *FRAME, f"seed={seed}", f"reward={reward}", *more), policy=policy)
    return true_reward(policy) - true_reward(GaussianPolicy())


def rates(judge: str, weight: float = 1.0) -> str:
    return f"{{win-rate: {{weight: {weight}, judge: 'gaussian_noisy:{judge}'}}, gaussian_runs:quadratic: 0.0}}"


@pytest.mark.parametrize("seed", SEEDS)
def test_win_rates_of_a_noisy_judge_teach_and_flipped_they_do_not(tmp_path: Path, seed: int) -> None:
    prompt = "advantage.std=prompt"
    assert change(tmp_path / "learnt", rates("noisy"), prompt, seed=seed) > 0.7
    assert change(tmp_path / "flipped", rates("noisy", -1.0), prompt, seed=seed) < -1
    rows = [json.loads(line) for line in (tmp_path / "learnt" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["reward/win-rate/mean"] == pytest.approx(0.5) for row in rows)  # whatever the policy does
    absolute = [row["reward/gaussian_runs:quadratic/mean"] for row in rows]
    assert sum(absolute[-5:]) > sum(absolute[:5])  # the scorer beside it, at weight 0, shows the progress


def test_the_published_mix_learns(tmp_path: Path) -> None:
    mix = "{win-rate: {weight: 0.4, judge: 'gaussian_noisy:noisy'}, gaussian_runs:quadratic: 0.6}"
    together = ["advantage={combine: advantages, renormalise: true, std: prompt}", "rollout.shared_noise=true"]
    assert change(tmp_path, mix, *together) > 0.7


def z_scores(values: torch.Tensor) -> torch.Tensor:
    """(G, n) -> (G, n): advantages within each row."""
    groups = torch.arange(len(values)).repeat_interleave(values.shape[1])
    return group_advantages(values.flatten(), groups, std="prompt", eps=0.0, clip=None).advantages.view_as(values)


def rates_of(scores: torch.Tensor, threshold: float = 0.0) -> torch.Tensor:
    """(G, n) -> (G, n): win rates within each row, of a full round."""
    n = scores.shape[1]
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    rows = []
    for row in scores:
        gap = torch.tensor([float(row[i] - row[j]) for i, j in pairs]).double()
        rows.append(win_rates(n, pairs, torch.where(gap.abs() <= threshold, 0.5, (gap > 0).double())))
    return torch.stack(rows)


def agreement(advantages: torch.Tensor, truth: torch.Tensor) -> float:
    """Correlation of advantages with the true differences within groups."""
    centred = truth - truth.mean(1, keepdim=True)
    return float((advantages * centred).sum() / (advantages.norm() * centred.norm()))


def test_where_win_rates_help() -> None:
    """They are ranks: a little worse than scores under normal noise, better under outliers. Z-scores of a group
    of 8 hold outliers back as well: none is above sqrt(7)."""
    generator = torch.Generator().manual_seed(0)
    truth, noise = (torch.randn(300, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    for scores, low, high in (
        (truth + noise, -0.08, 0.0),
        (truth + torch.tan(torch.pi * (torch.special.ndtr(noise) - 0.5)), 0.04, 0.2),
    ):
        gained = agreement(z_scores(rates_of(scores)), truth) - agreement(z_scores(scores), truth)
        assert low < gained < high


def test_ties_are_what_keeps_noise_small() -> None:
    """Groups of images that are alike: z-scores and bare win rates make their noise as large as any difference; with
    a tie between scores that differ by no more than the noise, most advantages of a group without z-scores vanish."""
    generator = torch.Generator().manual_seed(1)
    scores = 5 + 0.01 * torch.randn(200, 8, generator=generator, dtype=torch.float64)
    groups = torch.arange(200).repeat_interleave(8)

    def amplification(advantages: torch.Tensor) -> float:
        return illusory(scores.flatten(), advantages.flatten(), groups, 0.1, lambda x: x)["amplification"]

    assert amplification(z_scores(scores)) == pytest.approx(float((1 / scores.std(1, correction=0)).mean()), rel=1e-4)
    assert amplification(z_scores(rates_of(scores))) > 90
    spread = [rates_of(scores, threshold).std(1, correction=0).mean() for threshold in (0.0, 0.03)]
    assert spread[1] < 0.4 * spread[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_discriminator_guards_a_hackable_scorer_better_than_a_kl(tmp_path: Path, seed: int) -> None:
    """The slope leads to images that are no better than the first ones. A KL of any weight can only hold the policy
    back; references tell where it should go."""
    references = write_references(tmp_path / "references")
    longer = ["updates=30", "advantage.std=global"]
    hackable = "gaussian_noisy:hackable: 1.0"
    alone = change(tmp_path / "none", f"{{{hackable}}}", *longer, seed=seed)
    kl = [
        change(tmp_path / f"kl {w}", f"{{{hackable}}}", *longer, f"objective.kl.weight={w}", seed=seed)
        for w in (0.1, 0.3, 1.0)
    ]
    guarded = change(
        tmp_path / "adversary",
        f"{{{hackable}, 'gaussian_adversary:Discriminator': 1.0}}",
        *longer, "advantage.combine=advantages",
        f"adversary={{references: {references}, per_prompt: 4, discriminator: 4}}",
        seed=seed,
    )  # fmt: skip
    print(f"seed {seed}: alone {alone:.3f}, KL {', '.join(f'{x:.3f}' for x in kl)}, with a discriminator {guarded:.3f}")
    assert alone < 0.25 and alone < max(kl) < 0.6
    assert guarded > 0.9
