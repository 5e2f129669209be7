"""The comparison of methods: which runs it makes, what it reads off them, and what it says where one falls short."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import gaussian_runs
import pytest
import yaml
from typer.testing import CliRunner

from benchmarks import methods, methods_report, methods_results, runs
from benchmarks.methods_results import Point
from benchmarks.runs import Session
from flowrl import evaluate, train
from flowrl.cli import app
from flowrl.config import Config, load_config
from flowrl.errors import UserError
from flowrl.policies.gaussian import GaussianPolicy
from flowrl.statistics import Estimate

FEW = "updates=9"  # the check of a config looks at the plan of every update


# ---------------------------------------------------------------------------------------------------------- the configs
def planned(names: Sequence[str], seeds: Sequence[int], out: Path, *overrides: str) -> list[methods.Job]:
    return methods.jobs(names, seeds, out, budget_s=30, clock="cpu", overrides=[FEW, *overrides])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of one's own, outside the box."""
    data = load_config("flow_grpo/tiny_sd3", ["optimizer.lr=1e-3", "prompts_per_update=4"]).model_dump(by_alias=True)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(data))))
    return path


def test_all_methods_of_one_seed_come_before_the_next_seed(tmp_path: Path, recipe: Path) -> None:
    made = planned(["flow_grpo", str(recipe)], [3, 1], tmp_path)
    assert [job.name for job in made] == ["flow_grpo-3", "mine-3", "flow_grpo-1", "mine-1"]
    assert [job.config.seed for job in made] == [3, 3, 1, 1]
    assert all(job.config.output_dir == str(tmp_path / job.name) for job in made)


def test_methods_share_what_is_compared_and_keep_what_they_are(tmp_path: Path, recipe: Path) -> None:
    theirs, mine = (job.config for job in planned(["flow_grpo", str(recipe)], [0], tmp_path))
    assert theirs.prompts == mine.prompts and theirs.eval == mine.eval
    assert theirs.eval is not None and theirs.eval.every_s == 20 and theirs.eval.baseline_guidance is None
    assert (theirs.budget_s, theirs.clock, theirs.threads, theirs.checkpoint.every) == (30, "cpu", 1, 0)
    shipped = load_config("flow_grpo/tiny_sd3")
    assert theirs.rollout == shipped.rollout and theirs.prompts_per_update == shipped.prompts_per_update
    assert (mine.optimizer.lr, mine.prompts_per_update) == (1e-3, 4)


def test_overrides_reach_every_method_after_the_common_settings(tmp_path: Path, recipe: Path) -> None:
    for job in planned(["flow_grpo", str(recipe)], [0], tmp_path, "eval.limit=5", "threads=2"):
        assert job.config.eval is not None and job.config.eval.limit == 5 and job.config.threads == 2


@pytest.mark.parametrize(
    ("names", "seeds", "overrides", "message"),
    [
        (["flow_grpoo"], [0], [], "did you mean 'flow_grpo/tiny_sd3'"),
        ([], [0], [], "got no method"),
        (["flow_grpo", "flow_grpo"], [0], [], "two methods called flow_grpo"),
        (["flow_grpo"], [0, 0], [], "different numbers"),
        (["flow_grpo"], [0], ["seed=3"], "use --seeds"),
        (["flow_grpo"], [0], ["budget_s=3"], "use --budget"),
        (["flow_grpo"], [0], ["eval=null"], "no eval section"),
        (["flow_grpo"], [0], ["eval.stepps=3"], "eval.stepps"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, names: list[str], seeds: list[int], overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        planned(names, seeds, tmp_path, *overrides)


def test_another_base_model_is_refused(tmp_path: Path, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("path: tiny-sd3", "path: other/model"))
    with pytest.raises(UserError, match="policy.path is 'other/model' in mine and 'tiny-sd3' in flow_grpo"):
        planned(["flow_grpo", str(recipe)], [0], tmp_path)


def test_every_run_has_cores_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods.os, "sched_getaffinity", lambda pid: {7, 2, 5, 3}, raising=False)
    monkeypatch.setattr(methods.os, "sched_setaffinity", lambda *_: None, raising=False)
    assert methods.slots(3, 1) == [[2], [3], [5]]
    assert methods.slots(2, 2) == [[2, 3], [5, 7]]
    with pytest.raises(UserError, match="at most the 4 CPU core"):
        methods.slots(5, 1)
    monkeypatch.delattr(methods.os, "sched_setaffinity")
    assert methods.slots(2, 1) == [None, None]


# ------------------------------------------------------------------------------------------------------- synthetic runs
Scores = Sequence[float]


def rows(scores: Scores, diversity: float) -> list[dict[str, Any]]:
    """Two images of each prompt, both with its score."""
    return [
        {"prompt": f"p{i}", "prompt_id": i, "tag": "a" if i else "b", "seed_index": k, "scores": {"shapes": score},
         "judge": {"clip": score / 2}, "path": None, "stats": {"diversity": diversity}}
        for i, score in enumerate(scores) for k in (0, 1)
    ]  # fmt: skip


def fake_run(
    folder: Path, seed: int, before: Scores, curve: Sequence[tuple[float, float | None]], after: Scores
) -> None:
    """A finished run of one update per point of `curve`, (seconds, evaluation or None for none); the last is at the
    end. Each update makes 4 images with 10 sampling calls and 6 training forwards.
    """
    folder.mkdir(parents=True)
    metrics, timings = [], []
    for update, (seconds, score) in enumerate(curve, start=1):
        row = {"update": update, "total/images": 4 * update, "total/sampling_calls": 10 * update,
               "total/training_calls": 6 * update, "images/diversity": 1 / update}  # fmt: skip
        metrics.append(row if score is None else row | {"eval/shapes": score})
        timings += [{"update": update, "train_s": 999.0}, {"update": update, "train_s": seconds}]  # done twice
    for name, lines in {
        "metrics.jsonl": metrics, "timings.jsonl": timings,
        "eval_before.jsonl": rows(before, 0.4), "eval_after.jsonl": rows(after, 0.3),
    }.items():  # fmt: skip
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text("")
    (folder / "summary.json").write_text(
        json.dumps({"seed": seed, "wall_s": 99.0, "peak_rss_mb": 900, "alarms": ["<b>look</b>"] if seed else []})
    )


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    fake_run(tmp_path / "r", 0, [0.2, 0.6], [(5.0, None), (11.0, 0.45), (16.0, 0.9)], [0.4, 0.8])
    found = methods_results.read_run(tmp_path / "r")
    assert [point[:3] for point in found["points"]] == [(0, 0, 0), (2, 11.0, 32), (3, 16.0, 48)]
    assert [point.score for point in found["points"]] == pytest.approx([0.4, 0.45, 0.6])  # the last: after training
    assert (found["updates"], found["images"], found["calls"], found["train_s"]) == (3, 12, 48, 16.0)
    assert found["calls_per_image"] == 4.0 and found["images_per_s"] == 0.75
    assert found["gain"].mean == pytest.approx(0.2) and found["judge_gain"].mean == pytest.approx(0.1)
    assert found["gain"].low == pytest.approx(found["gain"].high)  # every prompt gained the same
    assert found["eval_diversity"] == pytest.approx([0.4, 0.3])
    assert found["train_diversity"] == pytest.approx([(1 + 1 / 2 + 1 / 3) / 3] * 2)  # three updates, ends of five


def test_the_score_is_the_one_that_training_logs() -> None:
    """Tasks of unequal size: the log holds means over images, and so must both ends of the curve."""
    some = rows([0.1, 0.5, 0.9], 0.4)
    assert methods_results.mean(some, "scores", "shapes").mean == pytest.approx(evaluate.means(some)["eval/shapes"])
    assert methods_results.headline(some, "scores", "shapes").mean == pytest.approx((0.1 + 0.7) / 2)


def test_a_log_without_the_counters_is_refused(tmp_path: Path) -> None:
    fake_run(tmp_path / "r", 0, [0.2], [(5.0, None)], [0.4])
    text = (tmp_path / "r" / "metrics.jsonl").read_text()
    (tmp_path / "r" / "metrics.jsonl").write_text(text.replace("total/images", "images"))
    (tmp_path / "r" / "timings.jsonl").write_text('{"update": 1}\n')
    with pytest.raises(UserError, match="lacks total/images, train_s"):
        methods_results.read_run(tmp_path / "r")
    (tmp_path / "r" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="without an update"):
        methods_results.read_run(tmp_path / "r")


def test_the_interval_over_seeds_is_students() -> None:
    found = methods_results.over_seeds([Estimate(x, 0, 1) for x in (0.5, 0.7, 0.6)])
    assert found["mean"] == pytest.approx(0.6) and found["median"] == 0.6 and (found["min"], found["max"]) == (0.5, 0.7)
    half = 4.302653 * 0.1 / math.sqrt(3)  # the 97.5 % point of t with two degrees of freedom, deviation 0.1
    assert found["ci95"] == pytest.approx([0.6 - half, 0.6 + half], abs=1e-6)
    assert found["interval"] == "t over seeds"
    alone = methods_results.over_seeds([Estimate(0.5, 0.4, 0.7)])
    assert alone["ci95"] == [0.4, 0.7] and alone["interval"] == "bootstrap over prompts"


# ----------------------------------------------------------------------------------------------------- time to a target
def test_the_first_evaluation_at_or_above_counts() -> None:
    points = [Point(0, 0, 0, 0.2), Point(2, 20, 8, math.nan), Point(4, 41, 16, 0.5), Point(6, 60, 24, 0.4)]
    assert methods_results.first_at(points, 0.3) == points[2]  # not 27 s, where the line crosses 0.3
    assert methods_results.first_at(points, 0.5) == points[2]
    assert methods_results.first_at(points, 0.51) is None
    assert methods_results.first_at(points, 0.1) == points[0]


def run_of(seed: int, *points: tuple[float, float]) -> dict[str, Any]:
    """A run with an evaluation every so many seconds, four calls a second."""
    made = [Point(i, s, round(4 * s), score) for i, (s, score) in enumerate([(0.0, 0.5), *points])]
    return {"seed": seed, "points": made, "final": Estimate(made[-1].score, math.nan, math.nan)}


def test_time_to_target_by_hand() -> None:
    found = {
        "base": [
            run_of(0, (20, 0.55), (40, 0.6), (60, 0.6)),
            run_of(1, (20, 0.5), (40, 0.65), (60, 0.7)),
            run_of(2, (20, 0.5), (40, 0.5), (60, 0.5)),
        ],  # target 0.6: first at 40, 40, never
        "fast": [run_of(0, (20, 0.7), (40, 0.5)), run_of(1, (20, 0.6)), run_of(2, (20, 0.5), (40, 0.61))],
        "slow": [run_of(0, (20, 0.59), (60, 0.6)), run_of(1, (60, 0.59)), run_of(2, (60, 0.59))],
    }
    result = methods_results.time_to_target(found, "base")
    assert result["target"] == pytest.approx(0.6)
    base, fast, slow = (result["methods"][name] for name in ("base", "fast", "slow"))
    assert (base["reached"], base["of"], base["seconds"], base["calls"]) == (2, 3, 40, 160)
    assert base["seconds_of_budget"] == pytest.approx(2 / 3) and base["seconds_of_own"] == 1
    assert (fast["reached"], fast["seconds"], fast["calls"]) == (3, 20, 80)
    assert fast["seconds_of_budget"] == pytest.approx(1 / 3) and fast["seconds_of_own"] == 0.5
    assert fast["calls_of_budget"] == pytest.approx(1 / 3) and fast["calls_of_own"] == 0.5
    assert (slow["reached"], slow["seconds"], slow["calls"], slow["seconds_of_own"]) == (1, None, None, None)
    assert [run["reached"] for run in slow["runs"]] == [True, False, False]
    assert fast["runs"][2] == {"seed": 2, "update": 2, "seconds": 40, "calls": 160, "score": 0.61, "reached": True}


def test_without_a_time_of_its_own_the_baseline_gives_no_ratio() -> None:
    never = {"base": [run_of(0, (60, 0.4)), run_of(1, (60, 0.6)), run_of(2, (60, 0.53))], "x": [run_of(0, (60, 0.9))]}
    result = methods_results.time_to_target(never, "base")  # target 0.51: 1 and 2 reach it, with the median at 60
    assert result["methods"]["base"]["seconds"] == 60
    at_once = {"base": [run_of(0, (60, 0.4))], "x": [run_of(0, (60, 0.9))]}  # it has unlearnt: the start is above
    row = methods_results.time_to_target(at_once, "base")["methods"]["x"]
    assert row["seconds"] == 0 and row["seconds_of_own"] is None and row["seconds_of_budget"] == 0


# ---------------------------------------------------------------------------------------------------- from end to end
class Fake:
    """Stands for a process: it ends with `code` at the n-th look, leaving a finished run if that is 0."""

    def __init__(self, looks: int, code: int, leave: Callable[[], object]) -> None:
        self.looks, self.code, self.leave, self.stops = looks, code, leave, 0

    def poll(self) -> Session | None:
        self.looks -= 1
        if self.looks > 0:
            return None
        if self.code == 0:
            self.leave()
        return Session(10.0, 100.0, self.code)

    def stop(self) -> None:
        self.stops, self.looks, self.code = self.stops + 1, 1, 143


class Runner:
    """Starts fakes: what was started with which words on which cores, and how many went on at once."""

    def __init__(self, looks: Callable[[str], int] = lambda name: 1, codes: dict[str, int] | None = None) -> None:
        self.started: list[str] = []
        self.looks, self.codes, self.made = looks, codes or {}, {}  # type: ignore[var-annotated]
        self.cores: dict[str, Any] = {}
        self.most = 0

    def __call__(self, arguments: list[str], log: Path, cores: Any) -> Fake:
        name = Path(arguments[1]).stem
        config = yaml.safe_load(Path(arguments[1]).read_text())
        seed = config["seed"]
        gain = 0.1 * seed if name.startswith("flow_grpo") else 0.3

        def leave() -> None:
            fake_run(
                Path(config["output_dir"]),
                seed,
                [0.3, 0.5],
                [(20.0, 0.41), (40.0, 0.4 + gain)],
                [0.3 + gain, 0.5 + gain],
            )

        self.started.append(" ".join([name, *arguments[2:]]))
        self.cores[name] = cores
        self.made[name] = Fake(self.looks(name), self.codes.get(name, 0), leave)
        self.most = max(self.most, sum(fake.looks > 0 for fake in self.made.values()))
        return self.made[name]


def measured(
    recipe: Path, out: Path, start: Any, *overrides: str, seeds: Sequence[int] = (1, 2), **options: Any
) -> Any:
    said: list[str] = options.pop("said", [])
    return methods.measure(
        ["flow_grpo", str(recipe)],
        seeds,
        out,
        budget_s=40,
        overrides=[FEW, *overrides],
        start=start,
        say=said.append,
        **options,
    )


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "LOOK_S", 0.001)


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(methods.os, "sched_setaffinity", lambda *_: None, raising=False)


def test_everything_is_run_once_and_written(tmp_path: Path, recipe: Path) -> None:
    out, runner, said = tmp_path / "out", Runner(), []  # type: ignore[var-annotated]
    summary = measured(recipe, out, runner, said=said)
    assert runner.started == ["flow_grpo-1", "mine-1", "flow_grpo-2", "mine-2"]
    assert json.loads((out / "summary.json").read_text()) == summary
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    row = summary["methods"]["mine"]
    assert row["final"]["mean"] == pytest.approx(0.7) and row["gain"]["ci95"] == pytest.approx([0.3, 0.3])
    assert list(summary["targets"]) == ["flow_grpo"]  # the only baseline that takes part
    target = summary["targets"]["flow_grpo"]
    assert target["target"] == pytest.approx((0.5 + 0.6) / 2)
    assert target["methods"]["mine"]["seconds"] == 40 and target["methods"]["mine"]["seconds_of_budget"] == 1
    assert target["methods"]["flow_grpo"]["reached"] == 1 and target["methods"]["flow_grpo"]["seconds"] is None
    table = (out / "table.md").read_text()
    assert "not reached" in table and "1 of 2" in table and "Student's t" in table
    assert "40 s of training on the wall" in table and "runs at once: 1" in table
    assert "flow_grpo-1: started" in said and any("finished" in line for line in said)

    again = measured(recipe, out, runner)
    assert len(runner.started) == 4 and again == summary
    more = measured(recipe, out, runner, seeds=(1, 2, 3))
    assert runner.started[4:] == ["flow_grpo-3", "mine-3"] and more["methods"]["mine"]["seeds"] == [1, 2, 3]


def test_runs_of_other_commands_are_shown_beside_the_new_ones(tmp_path: Path, recipe: Path) -> None:
    out, runner = tmp_path / "out", Runner()
    measured(recipe, out, runner)
    alone = recipe.parent / "alone.yaml"
    alone.write_text(recipe.read_text())
    summary = methods.measure([str(alone)], [1], out, budget_s=40.0, overrides=[FEW], start=runner, say=print)
    assert runner.started[4:] == ["alone-1"]
    assert {name: row["seeds"] for name, row in summary["methods"].items()} == {
        "flow_grpo": [1, 2], "mine": [1, 2], "alone": [1]
    }  # fmt: skip
    assert summary["targets"]["flow_grpo"]["methods"]["alone"]["of"] == 1
    with pytest.raises(UserError, match="budget_s is 50.0 in alone-2 and 40.0 in flow_grpo-1"):
        methods.measure([str(alone)], [2], out, budget_s=50.0, overrides=[FEW], start=runner, say=print)


def test_other_settings_are_refused_before_anything_runs(tmp_path: Path, recipe: Path) -> None:
    out, runner = tmp_path / "out", Runner()
    measured(recipe, out, runner)
    with pytest.raises(UserError, match=r"flow_grpo-1.yaml is of another benchmark \(optimizer.lr differ"):
        measured(recipe, out, runner, "optimizer.lr=0.5", seeds=(7, 1))
    assert len(runner.started) == 4
    measured(recipe, out, runner, seeds=(7, 1))  # and the refused command left nothing in the way
    assert runner.started[4:] == ["flow_grpo-7", "mine-7"]


def test_several_go_on_at_once_each_on_its_core(tmp_path: Path, recipe: Path, four_cores: None) -> None:
    runner = Runner(looks=lambda name: 5 if name == "flow_grpo-1" else 2)
    summary = measured(recipe, tmp_path / "out", runner, processes=2)
    assert runner.most == 2 and len(runner.started) == 4
    assert runner.cores["flow_grpo-1"] == [0]  # which stays its own: all others follow each other on the second
    assert runner.cores["mine-1"] == runner.cores["flow_grpo-2"] == [1]
    assert summary["processes"] == [2] and summary["pinned"] is True


def test_a_run_that_fails_costs_no_other_run(tmp_path: Path, recipe: Path) -> None:
    out, runner = tmp_path / "out", Runner(codes={"mine-1": 3})
    with pytest.raises(UserError, match=r"mine-1 \(code 3\) failed"):
        measured(recipe, out, runner)
    assert len(runner.started) == 4
    summary = json.loads((out / "summary.json").read_text())
    assert summary["unfinished"] == ["mine-1"] and summary["failed"] == {"mine-1": 3}
    assert summary["methods"]["mine"]["seeds"] == [2]
    assert "Not finished and not in these numbers: mine-1." in (out / "table.md").read_text()
    assert "mine-1" in (out / "report.html").read_text()


def at_third_look(monkeypatch: pytest.MonkeyPatch, then: Callable[[], object]) -> None:
    looks = iter(range(10**6))
    monkeypatch.setattr(methods.time, "sleep", lambda _: then() if next(looks) == 3 else None)


def test_an_interruption_ends_the_runs_and_the_next_start_resumes_them(
    tmp_path: Path, recipe: Path, four_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, runner = tmp_path / "out", Runner(looks=lambda name: 1000)
    at_third_look(monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit, match="130"):
        measured(recipe, out, runner, processes=2)
    assert [fake.stops for fake in runner.made.values()] == [1, 1]
    codes = [json.loads(line)["exit_code"] for line in (out / runs.SESSIONS).read_text().splitlines()]
    assert codes == [143, 143]
    for name in runner.made:
        (out / name).mkdir()
        (out / name / "config.yaml").write_text("")
    resumed = Runner()
    resumed_words = []

    def start(arguments: list[str], log: Path, cores: Any) -> Fake:
        resumed_words.append(arguments[2:])
        folder = out / Path(arguments[1]).stem
        if folder.exists():
            (folder / "config.yaml").unlink(), folder.rmdir()
        return resumed(arguments, log, cores)

    measured(recipe, out, start)
    assert resumed_words == [["--resume"], ["--resume"], [], []]


def test_an_unknown_baseline_is_refused(tmp_path: Path, recipe: Path) -> None:
    with pytest.raises(UserError, match="got the baseline mix_grpo; expected some of flow_grpo, mine"):
        measured(recipe, tmp_path / "out", Runner(), baselines=["mix_grpo"])


class Page(HTMLParser):
    """Tags of a page, and what it would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.foreign: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.foreign += [v or "" for k, v in attrs if k in ("src", "href") and not (v or "").startswith(("#", "data:"))]


def test_the_page_is_self_contained_and_escapes_what_it_shows(tmp_path: Path, recipe: Path) -> None:
    hostile = recipe.with_name("<img src=x>&.yaml")
    recipe.rename(hostile)
    out = tmp_path / "out"

    measured(hostile, out, Runner())
    text = (out / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert "img" not in page.tags and page.foreign == [] and "script" not in page.tags
    assert "&lt;img src=x&gt;&amp;" in text and "&lt;b&gt;look&lt;/b&gt;" in text
    assert text.count("<svg") == 1 and "not reached" in text


def test_curves_go_as_far_as_every_seed() -> None:
    found = [
        {"points": [[0, 0, 0, 0.0], [1, 10, 5, 1.0], [2, 20, 9, 1.0]]},
        {"points": [[0, 0, 0, 0.0], [1, 16, 8, 0.8]]},
    ]
    x, scores = methods_report.curve(found, 1)
    assert x.tolist() == [0, 10, 16]
    assert scores.tolist() == [[0, 1, 1], pytest.approx([0, 0.5, 0.8])]


# -------------------------------------------------------------------------------------------------------------- command
def test_numbers_after_seeds_are_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: dict[str, Any] = {}

    def measure(names: list[str], seeds: list[int], out: Path, **options: Any) -> None:
        called.update(names=names, seeds=seeds, **options)
        out.mkdir(exist_ok=True)
        (out / "table.md").write_text("the table\n")

    monkeypatch.setattr(methods, "measure", measure)
    words = ["flow_grpo", "mix_grpo", "--seeds", "4", "1", "--budget", "30", "--clock", "cpu", "eval.steps=8"]
    result = CliRunner().invoke(app, ["bench", "methods", *words, "--out", str(tmp_path / "o")])
    assert result.exit_code == 0 and "the table" in result.output, result.output
    assert (called["names"], called["seeds"], called["overrides"]) == (
        ["flow_grpo", "mix_grpo"],
        [4, 1],
        ["eval.steps=8"],
    )
    assert (called["budget_s"], called["clock"], called["processes"]) == (30.0, "cpu", 1)
    assert CliRunner().invoke(app, ["bench", "methods", "x", "--out", str(tmp_path)]).exit_code == 0
    assert called["seeds"] == [0, 1, 2]
    assert CliRunner().invoke(app, ["bench", "methods", "x", "--seeds", "one"]).exit_code == 2


# ------------------------------------------------------------------------------------------------------------- for real
def test_a_process_is_started_on_its_core_logged_and_ended(tmp_path: Path) -> None:
    running = runs.start(["--version"], tmp_path / "log", None)
    session = running.wait()
    assert session.exit_code == 0 and "flowrl" in (tmp_path / "log").read_text()
    assert running.poll() == running.wait() == session  # it is waited for once
    running.stop()  # nobody is left to be asked
    ending = runs.start(["doctor"], tmp_path / "log", None)
    ending.stop()
    assert ending.wait().exit_code in (-15, 143)


def test_a_second_signal_is_handed_on(tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy(Fake):
        def stop(self) -> None:
            self.stops += 1
            if self.stops == 1:
                signal.raise_signal(signal.SIGTERM)  # the person asks once more while the state is being saved
            else:
                self.looks, self.code = 1, 143

    made = [Busy(1000, 0, lambda: None)]
    at_third_look(monkeypatch, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit, match="143"):
        measured(recipe, tmp_path / "out", lambda *_: made[0])
    assert made[0].stops == 2


def test_an_error_of_the_benchmark_leaves_no_run_behind(tmp_path: Path, recipe: Path, four_cores: None) -> None:
    runner = Runner(looks=lambda name: 1000 if name == "flow_grpo-1" else 1)
    (tmp_path / "out" / "table.md").mkdir(parents=True)  # it cannot be written
    with pytest.raises(IsADirectoryError):
        measured(recipe, tmp_path / "out", runner, processes=2)
    assert runner.made["flow_grpo-1"].stops == 1


def test_sigterm_ends_the_runs_of_a_real_benchmark(tmp_path: Path, recipe: Path) -> None:
    """Two signals in a row to the command itself: its run is gone, and recorded, when it returns."""
    out = tmp_path / "out"
    words = ["bench", "methods", str(recipe), "--seeds", "0", "--out", str(out), FEW]
    command = subprocess.Popen([sys.executable, "-m", "flowrl", *words], stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    assert "mine-0: started" in command.stdout.readline()
    command.send_signal(signal.SIGTERM)
    command.send_signal(signal.SIGTERM)
    assert command.wait(120) == 143
    (session,) = [json.loads(line) for line in (out / runs.SESSIONS).read_text().splitlines()]
    assert session["exit_code"] in (-15, 143)


def test_real_runs_of_two_methods_on_a_small_world(tmp_path: Path) -> None:
    """The trainer itself on a linear-Gaussian policy: budget, evaluations by the clock, and counters come together."""
    made: dict[str, Config] = {}
    for name, rate in (("good", 0.05), ("still", 1e-9)):
        config = gaussian_runs.config(
            tmp_path, gaussian_runs.evaluated(tmp_path), "clock=cpu", "eval.every_s=0.2", "budget_s=0.8",
            "updates=5000", f"optimizer.lr={rate}", "checkpoint.every=0", f"output_dir={tmp_path / name}-0",
        )  # fmt: skip
        train(config, policy=GaussianPolicy(2))
        made[name] = config
    summary = methods_results.summarise([(f"{n}-0", n, c) for n, c in made.items()], tmp_path, ["still"], {})
    methods_report.write(tmp_path, summary)
    good, still = (summary["methods"][name] for name in ("good", "still"))
    assert good["gain"]["mean"] > 0.1 and abs(still["gain"]["mean"]) < 1e-3
    for row in (good, still):
        assert 0.8 <= row["train_s"] < 2
        times = [point[1] for point in row["runs"][0]["points"]]
        assert len(times) >= 4 and times == sorted(times) and times[0] == 0
        # 5 steps, 4 of them trained: 4 forwards of training to 5 of sampling
        assert row["calls_per_image"] == pytest.approx(9)
    assert "good" in (tmp_path / "table.md").read_text()
