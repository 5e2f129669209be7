"""Evaluation: each row against what its prompt, seed and sampler say it must be."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_reference import velocity
from gaussian_runs import TARGET, quadratic
from PIL import Image

import samplers
from flowrl import evaluate
from flowrl.distributed import World
from flowrl.evaluate import Scorers
from flowrl.policies import GaussianPolicy
from flowrl.prompts import Prompt
from flowrl.sampling import SampleSettings
from reward_models import RewardResult, RewardSpec
from reward_models.loading import UserReward

ALONE = World(0, 1, torch.device("cpu"))
TEXTS = ["mean 0.5 -1", "mean -1 0.3", "mean 0.5 -1", "mean 2 2"]  # the first comes twice
PROMPTS = [Prompt(text, {"prompt": text, "tag": f"tag {i % 2}"}) for i, text in enumerate(TEXTS)]
SETTINGS = SampleSettings(steps=4, guidance=1.0, images_per_prompt=3, seed=7, chunk=5)
SCORERS = Scorers(UserReward("quadratic", quadratic), None)


class Judge:
    """A judge whose features are the coordinates themselves."""

    spec = RewardSpec("coordinates")

    def score(self, images, prompts, metadata, groups=None):
        return RewardResult(GaussianPolicy.read(images)[:, 0])

    def features(self, images):
        return GaussianPolicy.read(images)


def moved_policy() -> GaussianPolicy:
    policy = GaussianPolicy()
    with torch.no_grad():
        policy.bias.copy_(torch.tensor([0.3, -0.1]))
    return policy


def run(policy=None, prompts=PROMPTS, settings=SETTINGS, scorers=SCORERS, **options):
    return evaluate.evaluate(policy or moved_policy(), prompts, settings, scorers, world=ALONE, **options)


def drawn(text: str, occurrence: int, image: int, guidance: float = 1.0) -> torch.Tensor:
    """x0 of one image by Euler steps in float64, from the noise that its key names."""
    key = samplers.Key(SETTINGS.seed, "eval", None, text, occurrence, image)
    x = samplers.noise([key], (2,))[0].double()
    mean = torch.tensor([float(number) for number in text.split()[1:]], dtype=torch.float64)
    zero, bias = torch.zeros(2, dtype=torch.float64), torch.tensor([0.3, -0.1], dtype=torch.float64)
    weights = (torch.zeros(2, 2, dtype=torch.float64), bias)
    for i in range(SETTINGS.steps):
        s = 1 - i / SETTINGS.steps
        free, with_prompt = velocity(x, s, zero, weights), velocity(x, s, mean, weights)
        x = x - (free + guidance * (with_prompt - free)) / SETTINGS.steps
    return x


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_rows_are_what_their_keys_say(guidance):
    rows = run(settings=SampleSettings(4, guidance, None, None, 3, 7, 5))
    assert [(row["prompt_id"], row["seed_index"]) for row in rows] == [(p, k) for p in range(4) for k in range(3)]
    for row in rows:
        number = row["prompt_id"]
        assert row["prompt"] == TEXTS[number] and row["tag"] == f"tag {number % 2}" and row["path"] is None
        x = drawn(TEXTS[number], int(number == 2), row["seed_index"], guidance)
        expected = -0.5 * (x - TARGET.double()).square().sum().item()
        assert row["scores"] == {"quadratic": pytest.approx(expected, abs=1e-4)}
        assert row["judge"] == {} and set(row["stats"]) == {"saturation", "sharpness", "dark_fraction"}


def test_neither_chunks_nor_other_prompts_change_a_row():
    rows = run()
    assert run(settings=SampleSettings(4, 1.0, None, None, 3, 7, 64)) == rows
    alone = run(prompts=PROMPTS[3:])
    assert [row["scores"] for row in alone] == [row["scores"] for row in rows[9:]]
    other = run(settings=SampleSettings(4, 1.0, None, None, 3, 8, 5))
    assert all(a["scores"] != b["scores"] for a, b in zip(rows, other, strict=True))


def test_pictures_are_what_was_scored(tmp_path):
    folder = tmp_path / "samples" / "before"
    rows = run(pictures=folder)
    for row in rows:
        assert row["path"] == f"samples/before/{row['prompt_id']:05d}_{row['seed_index']}.png"
        pixels = torch.tensor(list(Image.open(tmp_path / row["path"]).getdata())).view(1, 1, 2, 3)
        image = pixels.permute(0, 3, 1, 2).float() / 255
        assert quadratic(image, [""], [{}]).item() == pytest.approx(row["scores"]["quadratic"], abs=1e-6)


def test_of_large_pictures_the_first_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "SMALL", 0)
    rows = run(pictures=tmp_path / "samples" / "after")
    assert [row["path"] is not None for row in rows] == [True, False, False] * 4
    assert len(list((tmp_path / "samples" / "after").iterdir())) == 4


def test_judge_and_diversity():
    rows = run(scorers=Scorers(UserReward("quadratic", quadratic), Judge()))
    for number, text in enumerate(TEXTS):
        x = torch.stack([drawn(text, int(number == 2), k) for k in range(3)])
        unit = x / x.norm(dim=1, keepdim=True)
        pairs = [(0, 1), (0, 2), (1, 2)]
        spread = sum(1 - float(unit[i] @ unit[j]) for i, j in pairs) / 3
        for k, row in enumerate(rows[3 * number : 3 * number + 3]):
            assert row["judge"]["coordinates"] == pytest.approx(x[k, 0].item(), abs=1e-4)
            assert row["stats"]["diversity"] == pytest.approx(spread, abs=1e-4)


def test_missing_scores_are_null_and_out_of_the_means(tmp_path):
    def gaps(images, prompts, metadata):
        values = quadratic(images, prompts, metadata)
        return torch.where(torch.tensor([prompt == TEXTS[1] for prompt in prompts]), math.nan, values)

    rows = run(scorers=Scorers(UserReward("gaps", gaps), None))
    scores = [row["scores"]["gaps"] for row in rows]
    assert [score is None for score in scores] == [False] * 3 + [True] * 3 + [False] * 6
    valid = [score for score in scores if score is not None]
    assert evaluate.means(rows) == {"eval/gaps": pytest.approx(sum(valid) / 9)}
    evaluate.write_rows(tmp_path, "before", rows)
    from flowrl.summary import read_rows

    assert read_rows(tmp_path, "before") == rows


def test_progress_counts_prompts():
    said = []
    run(on_progress=lambda done, total: said.append((done, total)))
    assert said[-1] == (4, 4) and [done for done, _ in said] == sorted(done for done, _ in said)
