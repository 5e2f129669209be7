"""The quickstart benchmark: its controls, its resumption, its verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gaussian_runs
import pytest
import torch
from torch import Tensor

import reward_models
from benchmarks import quickstart
from benchmarks.quickstart import Job, Session, ShuffledReward
from flowrl import train
from flowrl.config import load_config
from flowrl.errors import UserError
from flowrl.policies.gaussian import GaussianPolicy
from reward_models import recipe
from reward_models.protocol import RewardResult, RewardSpec


# ------------------------------------------------------------------------------------------------------------ shuffling
class Brightness:
    """Mean of an image; missing for black ones."""

    spec = RewardSpec("brightness")

    def score(self, images: Tensor, prompts: Any, metadata: Any, groups: Tensor | None = None) -> RewardResult:
        values = images.mean((1, 2, 3))
        dark = values == 0
        return RewardResult(values.masked_fill(dark, float("nan")), reasons=["black" if d else None for d in dark])


@pytest.fixture
def shuffled(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(quickstart, "load", lambda reward, device: Brightness())
    return lambda images, groups, seed=0: ShuffledReward("brightness", seed).score(
        images, ["p"] * len(images), [{}] * len(images), groups
    )


def pictures(n: int, seed: int = 0) -> Tensor:
    levels = torch.randint(1, 256, (n, 3, 2, 2), generator=torch.Generator().manual_seed(seed))
    return levels / 255


def test_values_stay_in_their_group_and_are_otherwise_mixed(shuffled: Any) -> None:
    groups = torch.arange(300).repeat_interleave(4)[torch.randperm(1200, generator=torch.Generator().manual_seed(1))]
    images = pictures(1200)
    before, after = images.mean((1, 2, 3)), shuffled(images, groups).values
    for group in groups.unique():
        assert torch.equal(before[groups == group].sort().values, after[groups == group].sort().values)
    stayed = (before == after).float().mean()
    assert 0.19 < stayed < 0.31  # one in four; five standard deviations are 0.06
    centre = torch.zeros(300).index_add_(0, groups, before) / 4
    product = ((before - centre[groups]) * (after - centre[groups])).sum() / (before - centre[groups]).square().sum()
    assert abs(product) < 0.15  # the share of the value that the image still gets: 0 on average, deviation about 0.03


def test_the_permutation_is_a_function_of_the_images(shuffled: Any) -> None:
    images, groups = pictures(40), torch.arange(5).repeat_interleave(8)
    found = shuffled(images, groups).values
    assert torch.equal(found, shuffled(images, groups).values)
    half = groups < 2  # another process with fewer groups
    assert torch.equal(found[half], shuffled(images[half], groups[half]).values)
    assert not torch.equal(found, shuffled(images, groups, seed=1).values)


def test_missing_values_take_their_reason_along(shuffled: Any) -> None:
    images = pictures(8)
    images[3] = 0
    result = shuffled(images, torch.zeros(8, dtype=torch.long))
    assert result.missing.sum() == 1
    assert [reason == "black" for reason in result.reasons] == result.missing.tolist()


def test_shuffling_needs_groups(shuffled: Any) -> None:
    with pytest.raises(ValueError, match="no groups"):
        shuffled(pictures(2), None)


def test_control_rewards_are_loaded_like_any_other() -> None:
    reward = reward_models.load(quickstart.control("shuffle", {"jpeg": 2.0}))
    images, groups = pictures(8), torch.zeros(8, dtype=torch.long)
    result = reward.score(images, ["p"] * 8, [{}] * 8, groups)
    plain = reward_models.load({"jpeg": 2.0}).score(images, ["p"] * 8, [{}] * 8, groups)
    assert torch.equal(result.values.sort().values, plain.values.sort().values)
    assert not torch.equal(result.values, plain.values)


def test_flipping_negates_every_weight() -> None:
    assert quickstart.flipped("shapes") == {"shapes": -1.0}
    assert quickstart.flipped({"a": 2.0, "b": {"weight": -0.5, "x": 1}}) == {"a": -2.0, "b": {"weight": 0.5, "x": 1}}
    product = {"combine": "product", "of": ["shapes", "jpeg"]}
    node = recipe.parse(quickstart.flipped(product))
    assert node == recipe.Combination("sum", {"flipped": (recipe.parse(product), -1.0)}, {})


# ------------------------------------------------------------------------------------------------------------- the runs
def test_jobs_are_the_recipe_with_seeds_and_controls(tmp_path: Path) -> None:
    config = load_config("quickstart", ["updates=7"])
    made = quickstart.jobs(config, [3, 4], ["flip", "shuffle"], tmp_path)
    assert [job.name for job in made] == ["seed-3", "seed-4", "flip-3", "shuffle-3"]
    assert [job.config.seed for job in made] == [3, 4, 3, 3]
    assert all(job.config.updates == 7 and job.config.output_dir == str(tmp_path / job.name) for job in made)
    assert made[2].config.reward == {"shapes-soft": -1.0}
    assert made[1].config == config.model_copy(update={"seed": 4, "output_dir": str(tmp_path / "seed-4")})


def job(folder: Path, kind: str = "seed") -> Job:
    return Job(f"{kind}-0", kind, gaussian_runs.config(folder, f"output_dir={folder / 'out' / f'{kind}-0'}"))


def test_a_run_is_started_continued_or_left_alone(tmp_path: Path) -> None:
    one, out = job(tmp_path), tmp_path / "out"
    out.mkdir()
    started: list[list[str]] = []

    def start(code: int) -> Any:
        return lambda arguments: started.append(arguments) or Session(1.0, 10.0, code)

    path = str(out / "seed-0.yaml")
    with pytest.raises(UserError, match="seed-0 ended with code 143"):
        quickstart.run(one, out, start(143))
    folder = Path(one.config.output_dir)
    folder.mkdir()
    (folder / "config.yaml").write_text("x")
    quickstart.run(one, out, start(0))
    (folder / "summary.json").write_text("{}")
    quickstart.run(one, out, start(0))
    assert started == [["train", path], ["train", path, "--resume"]]
    assert [json.loads(line)["exit_code"] for line in (out / "sessions.jsonl").read_text().splitlines()] == [143, 0]
    other = Job(one.name, one.kind, one.config.model_copy(update={"updates": 9}))
    with pytest.raises(UserError, match="another benchmark"):
        quickstart.run(other, out, start(0))


def test_launch_measures_a_process_of_its_own() -> None:
    session = quickstart.launch(["--version"])
    assert session.exit_code == 0 and 0 < session.seconds < 60
    assert 5 < session.peak_rss_mb < 2000
    assert quickstart.launch(["no-such-verb"]).exit_code == 2


# ---------------------------------------------------------------------------------------------------------- the result
def summary(gain: list[float], judge: list[float] | None, wall: float = 100.0, peak: float = 1000.0) -> dict[str, Any]:
    def estimate(mean: float) -> dict[str, Any]:
        return {"mean": mean, "ci95": [mean - 0.1, mean + 0.1]}

    def difference(ends: list[float]) -> dict[str, Any]:
        return {"mean_diff": sum(ends) / 2, "ci95": ends}

    return {
        "seed": 0, "updates": 5, "wall_s": wall, "peak_rss_mb": peak, "alarms": [],
        "eval": {
            "before": {"shapes": estimate(0.5), "diversity": 0.4}, "before_guided": {"shapes": estimate(0.6)},
            "after": {"shapes": estimate(0.7), "diversity": 0.3},
            "paired": {"shapes": difference(gain), "held_out": {} if judge is None else {"clip": difference(judge)}},
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "gain", "met"),
    [
        ("seed", [0.06, 0.3], True),
        ("seed", [-0.01, 0.3], False),
        ("flip", [-0.3, -0.01], True),
        ("flip", [-0.3, 0.01], False),
        ("shuffle", [-0.1, 0.1], True),
        ("shuffle", [-0.3, -0.1], True),
        ("shuffle", [0.01, 0.1], False),
    ],
)
def test_the_direction_that_each_kind_must_take(tmp_path: Path, kind: str, gain: list[float], met: bool) -> None:
    one = job(tmp_path, kind)
    folder = Path(one.config.output_dir)
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary(gain, None)))
    found = quickstart.row(one, tmp_path / "out")
    assert found["targets"]["direction"] is met
    assert ("missed" in quickstart.markdown([found])) is not met


def test_targets_of_a_seed(tmp_path: Path) -> None:
    one, out = job(tmp_path), tmp_path / "out"
    folder = Path(one.config.output_dir)
    folder.mkdir(parents=True)

    def targets(**changes: Any) -> dict[str, Any]:
        given = {"gain": [0.06, 0.26], "judge": [-0.02, 0.0], **changes}
        (folder / "summary.json").write_text(json.dumps(summary(**given)))
        return quickstart.row(one, out)["targets"]

    assert targets() == {"direction": True, "gain": True, "judge": True, "wall": True, "memory": True}
    assert targets(gain=[0.06, 0.22])["gain"] is False and targets(gain=[0.04, 0.40])["gain"] is False
    assert targets(judge=[-0.02, -0.01])["judge"] is False
    assert targets(judge=None)["judge"] is None
    assert targets(wall=481.0)["wall"] is False
    assert targets(peak=2501.0)["memory"] is False
    (out / "sessions.jsonl").write_text(
        '{"run": "seed-0", "seconds": 400, "peak_rss_mb": 900, "exit_code": 143}\n'
        '{"run": "seed-0", "seconds": 300, "peak_rss_mb": 2600, "exit_code": 0}\n'
        '{"run": "seed-1", "seconds": 9, "peak_rss_mb": 9000, "exit_code": 0}\n'
    )
    found = quickstart.row(one, out)
    assert (found["wall_s"], found["peak_rss_mb"], found["sessions"]) == (700, 2600, 2)
    assert quickstart.markdown([found]).count("\n") == 3


def test_a_benchmark_from_end_to_end_and_again(tmp_path: Path) -> None:
    config = gaussian_runs.config(tmp_path, "updates=2", gaussian_runs.evaluated(tmp_path))
    started: list[str] = []

    def start(arguments: list[str]) -> Session:
        assert arguments[0] == "train"
        started.append(Path(arguments[1]).stem)
        train(load_config(arguments[1]), policy=GaussianPolicy(2))
        return Session(1.0, 500.0, 0)

    out = tmp_path / "bench"
    result = quickstart.measure(config, [0, 1], ["flip", "shuffle"], out, start)
    assert started == ["seed-0", "seed-1", "flip-0", "shuffle-0"]
    assert json.loads((out / "results.json").read_text()) == result
    assert [r["run"] for r in result["runs"]] == started
    assert (out / "results.md").read_text().count("\n") == 2 + 4
    again = quickstart.measure(config, [0, 1], ["flip", "shuffle"], out, start)
    assert len(started) == 4 and again == result


def test_a_config_without_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no eval section"):
        quickstart.measure(gaussian_runs.config(tmp_path), [0], [], tmp_path / "bench")
