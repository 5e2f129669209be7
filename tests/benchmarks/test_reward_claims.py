"""The benchmark of rewards' claims: its scorers, its arms, its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gaussian_runs
import pytest
import torch

from benchmarks import reward_claims
from benchmarks.quickstart import Job
from benchmarks.reward_claims import HackableReward, NoisyJudge, NoisyReward, arms, jobs, measure, noise_of
from benchmarks.runs import Session
from flowrl import train
from flowrl.config import load_config
from flowrl.errors import UserError
from flowrl.policies.gaussian import GaussianPolicy
from flowrl.prompts import load_prompts
from reward_models import load
from reward_models.protocol import RewardResult, RewardSpec


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 2, 2), generator=torch.Generator().manual_seed(seed)) / 255


def test_noise_is_normal_and_a_function_of_the_pixels() -> None:
    images = pictures(4000)
    noise = noise_of(images)
    assert abs(float(noise.mean())) < 0.08 and abs(float(noise.std()) - 1) < 0.06  # five standard errors
    assert torch.equal(noise_of(images.flip(0)).flip(0), noise) and not torch.equal(noise_of(images, 1), noise)
    pairs = [(0, 1), (1, 0), (0, 2)]
    assert len(set(noise_of(images, 0, pairs).tolist())) == 3


def test_scorers_say_what_they_are_made_of() -> None:
    prompts = load_prompts("shapes:train", limit=6)
    texts, data = [p.text for p in prompts], [p.metadata for p in prompts]
    images = (torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    exact = load("shapes-soft").score(images, texts, data).values
    noisy = NoisyReward(scale=0.25).score(images, texts, data)
    torch.testing.assert_close(noisy.values, exact + 0.25 * noise_of(images).float())
    assert torch.equal(noisy.parts["exact"], exact)
    hacked = HackableReward(2.0).score(images, texts, data)
    torch.testing.assert_close(hacked.values, exact + 2 * hacked.parts["saturation"])


class Brightness:
    """Mean of an image in 8-bit levels."""

    spec = RewardSpec("brightness")

    def score(self, images: Any, prompts: Any, metadata: Any, groups: Any = None) -> RewardResult:
        return RewardResult(images.flatten(1).mean(1) * 255)


def test_a_judge_errs_as_its_noise_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_claims, "load", lambda reward, device: Brightness())
    images = (torch.arange(1, 41) / 255).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    pairs = [(i, j) for i in range(40) for j in range(40) if i != j]
    better = torch.tensor([float(i > j) for i, j in pairs]).double()

    def right(scale: float) -> float:
        said = NoisyJudge("brightness", scale).compare(images, pairs, [""] * 40, [{}] * 40)
        return float((said.preference == better).double().mean())

    gaps = torch.tensor([abs(i - j) for i, j in pairs]).double()
    assert right(0.0) == 1
    assert right(10.0) == pytest.approx(float(torch.special.ndtr(gaps / (2**0.5 * 10)).mean()), abs=0.05)


@pytest.mark.parametrize("claim", ["pref", "adv"])
def test_arms_differ_in_their_reward_and_guard_only(claim: str, tmp_path: Path) -> None:
    made = jobs(claim, [0, 1], tmp_path, overrides=["updates=3"])
    assert len(made) == 2 * len(arms(claim)) and {job.config.updates for job in made} == {3}
    own = {"reward", "adversary", "method", "output_dir", "seed"}
    rest = [job.config.model_dump(exclude=own | {"advantage", "objective"}) for job in made]
    assert all(one == rest[0] for one in rest)
    with pytest.raises(UserError, match="--arms"):
        jobs(claim, [0], tmp_path, chosen=["nothing"])


def test_a_table_from_finished_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On `GaussianPolicy`, in this process: the second arm learns, the first has its sign turned."""
    monkeypatch.setattr("flowrl.report.write_report", lambda folder: folder / "report.html")

    def made(claim: str, seeds: Any, out: Path, **options: Any) -> list[Job]:
        return [
            Job(f"{arm}-{seed}", arm, gaussian_runs.config(
                tmp_path, f"output_dir={out / f'{arm}-{seed}'}", f"seed={seed}", f"reward=gaussian_runs:{reward}",
                f"method={arm}", "updates=8", gaussian_runs.evaluated(tmp_path),
            ))
            for seed in seeds
            for arm, reward in (("pointwise", "flipped"), ("win_rate", "quadratic"))
        ]  # fmt: skip

    def start(arguments: list[str]) -> Session:
        train(load_config(arguments[1]), policy=GaussianPolicy())
        return Session(1.0, 1.0, 0)

    monkeypatch.setattr(reward_claims, "jobs", made)
    result = measure("pref", [0, 1], tmp_path / "out", start=start)
    rows = result["arms"]
    assert list(rows) == ["pointwise", "win_rate"] and rows["win_rate"]["seeds"] == [0, 1]
    assert rows["pointwise"]["gain"]["mean"] < 0 < rows["win_rate"]["gain"]["mean"]
    ends = [rows[arm]["final"]["mean"] for arm in rows]
    assert rows["win_rate"]["against"]["mean"] == pytest.approx(ends[1] - ends[0], abs=1e-6)
    table = (tmp_path / "out" / "results.md").read_text()
    assert table.count("\n") == 4 and "| win_rate | 2 |" in table
