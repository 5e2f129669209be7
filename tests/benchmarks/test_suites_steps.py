"""The three steps of a suite: what each leaves in the folder, that each can be resumed, and every number by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import tiny_sd3
from typer.testing import CliRunner

from benchmarks.suites import geneval, geneval_results, hpsv2, plain, suite, suites, unigenbench
from benchmarks.suites.by_task import ByTask
from benchmarks.suites.run import load_scorers, run, scorers
from flowrl.cli import app
from flowrl.commands import scoring
from flowrl.errors import UserError
from flowrl.prompts import Prompt
from flowrl.sampling import SampleSettings
from flowrl.score_table import ScoreRow
from reward_models.geneval import Detection
from reward_models.geneval_hf import GenevalReward
from reward_models.protocol import RewardResult, RewardSpec

SETTINGS = SampleSettings(steps=2)


def row(prompt: int, index: int, score: float | None, tag: str | None = None, **more: Any) -> ScoreRow:
    metadata = more.pop("metadata", {})
    parts = more.pop("parts", {})
    return ScoreRow(
        image=f"{prompt}_{index}.png", prompt=f"p{prompt}", prompt_id=prompt, tag=tag, sha256="0", seed_index=index,
        scores={"s": score}, parts={"s": parts}, reasons={}, metadata=metadata,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- numbers
def test_genevals_headline_is_the_mean_of_the_tasks_and_not_of_the_images() -> None:
    rows = [row(0, i, float(i < 3), "a") for i in range(4)]  # 3 of 4
    rows += [row(1, i, 0.0, "a") for i in range(4)]  # 0 of 4
    rows += [row(2, i, 1.0, "b") for i in range(2)]  # 2 of 2
    found = geneval.numbers(rows, "s")
    assert found["overall"]["mean"] == pytest.approx((3 / 8 + 1) / 2)
    assert found["tasks"]["a"]["mean"] == 3 / 8 and found["tasks"]["a"]["ci95"] == [0, 0.75]  # of two prompts
    assert found["correct_images"]["mean"] == 5 / 10
    assert found["prompts_with_a_correct_image"]["mean"] == pytest.approx(2 / 3)
    assert "correct_images" not in geneval.numbers([row(0, 0, 0.3, "a")], "s")  # no decision


def test_missing_images_are_not_wrong_ones() -> None:
    found = geneval.numbers([row(0, 0, None, "a"), row(0, 1, 1.0, "a"), row(1, 0, 0.0, "b")], "s")
    assert found["overall"]["mean"] == 1 / 2 and found["tasks"]["a"]["mean"] == 1
    found = geneval.numbers([row(0, 0, None, "a"), row(0, 1, 1.0, "a"), row(1, 0, None, "b")], "s")
    assert found["overall"]["mean"] is None  # the mean of the tasks that are left would be another number
    assert found["tasks"]["a"]["mean"] == 1 and found["tasks"]["b"]["mean"] is None
    assert found["prompts_with_a_correct_image"] == {"mean": 1.0, "ci95": [None, None], "prompts": 1}


def test_hpsv2_spreads_are_those_of_groups_of_eighty() -> None:
    values = np.random.default_rng(0).normal(size=200)
    groups = [values[:80].mean(), values[80:160].mean(), values[160:].mean()]
    middle = sum(groups) / 3
    assert hpsv2.group_std(values) == pytest.approx(math.sqrt(sum((g - middle) ** 2 for g in groups) / 3))
    rows = [row(i, 0, 0.25 + 0.01 * (i // 80), "anime", metadata={"number": i}) for i in range(160)]
    rows += [row(200, 0, 0.5, "photo", metadata={"number": 0})]
    found = hpsv2.numbers(rows[::-1], "s")  # the order of the rows does not matter: the number does
    assert found["std_of_groups_of_80"] == {"photo": 0.0, "anime": pytest.approx(0.5)}
    assert found["overall"]["mean"] == pytest.approx((80 * 25 + 80 * 26 + 50) / 161)
    assert found["tasks"]["anime"]["mean"] == pytest.approx(25.5)


def test_unigenbench_by_hand_from_test_points_and_from_dimensions() -> None:
    points = ["Attribute - Color", "Attribute - Size", "Style"]
    meta = {"testpoints": points}
    verdicts = [(1, 0, 1), (1, 1, 1), (0, 0, 0)]
    single = [row(i, 0, 0.5, parts=dict(zip(points, v, strict=True)), metadata=meta) for i, v in enumerate(verdicts)]
    shares = [
        row(i, 0, 0.5, parts={"Attribute": (a + b) / 2, "Style": c}, metadata=meta)
        for i, (a, b, c) in enumerate(verdicts)
    ]
    style = row(3, 0, 1.0, parts={"Style": 1.0}, metadata={"testpoints": ["Style"]})
    invalid = row(4, 0, None, metadata=meta)
    for rows in (single, shares):
        found = unigenbench.numbers([*rows, style, invalid], "s")
        assert found["tasks"]["Attribute"]["mean"] == 3 / 6 and found["tasks"]["Style"]["mean"] == 3 / 4
        assert found["overall"]["mean"] == pytest.approx((3 / 6 + 3 / 4) / 2)
        assert found["micro"]["mean"] == 6 / 10
        assert found["tasks"]["Attribute"]["prompts"] == 3 and found["tasks"]["Style"]["prompts"] == 4
    assert unigenbench.numbers(single, "s")["test_points"]["Attribute - Color"]["mean"] == 2 / 3
    assert "test_points" not in unigenbench.numbers(shares, "s")
    twice = row(5, 0, 0.5, parts={"A - B": 0.5, "A - C": 0.0}, metadata={"testpoints": ["A - B", "A - B", "A - C"]})
    found = unigenbench.numbers([twice], "s")
    assert found["tasks"]["A"]["mean"] == 1 / 3 and found["test_points"]["A - B"]["mean"] == 1 / 2
    with pytest.raises(UserError, match="no score of any image"):
        unigenbench.numbers([invalid], "s")


def test_a_scorer_without_test_points_may_stand_beside_unigenbenchs() -> None:
    rows = [row(i, 0, value, metadata={"testpoints": ["Style"]}) for i, value in enumerate((0.5, 1.5, None))]
    found = unigenbench.numbers(rows, "s")
    assert found["overall"]["mean"] == 1.0 and found["overall"]["prompts"] == 2 and found["tasks"] == {}


def test_dimensions_share_the_prompts_that_are_drawn() -> None:
    """Two dimensions with equal verdicts are one: the interval of their mean is that of either, not narrower."""
    rng = np.random.default_rng(1)
    right, total = rng.integers(0, 2, size=(40, 1)).astype(float), np.ones((40, 1))
    one = unigenbench.mean_of_accuracies(right, total)
    two = unigenbench.mean_of_accuracies(np.hstack([right, right]), np.hstack([total, total]))
    assert one == two and one.low < one.mean < one.high
    # 95 % of the draws of a mean of 40 coins: about +- 2 sqrt(p (1 - p) / 40)
    spread = math.sqrt(one.mean * (1 - one.mean) / 40)
    assert one.high - one.low == pytest.approx(2 * 1.96 * spread, rel=0.2)
    assert math.isnan(unigenbench.mean_of_accuracies(right, 0 * total).mean)


def test_plain_suites_report_categories_and_challenges() -> None:
    rows = [row(i, 0, float(i), "xy"[i % 2], metadata={"challenge": "c" if i < 2 else "d"}) for i in range(4)]
    found = plain.numbers(rows, "s")
    assert found["overall"]["mean"] == 1.5 and found["tasks"]["x"]["mean"] == 1.0 and found["tasks"]["y"]["mean"] == 2.0
    assert found["challenges"]["c"]["mean"] == 0.5 and found["challenges"]["d"]["mean"] == 2.5


def test_each_task_goes_to_its_scorer() -> None:
    class Constant:
        def __init__(self, value: float, **spec: Any) -> None:
            self.value, self.spec = value, RewardSpec(f"c{value}", **spec)

        def score(self, images: Any, prompts: Any, metadata: Any, groups: Any = None) -> RewardResult:
            return RewardResult(torch.full((len(images),), self.value))

    routed = ByTask({"a": Constant(1.0), "b": Constant(2.0)})
    result = routed.score(torch.zeros(4, 3, 2, 2), ["p"] * 4, [{"tag": t} for t in "abac"])
    assert result.values[:3].tolist() == [1, 2, 1] and math.isnan(result.values[3])
    assert result.reasons[3] == "there is no scorer for 'c'" and routed.spec.version == "a=1, b=1"
    with pytest.raises(UserError, match="scorer of single images"):
        ByTask({"a": Constant(1.0, scope="set")})
    numbered = routed.score(torch.zeros(1, 3, 2, 2), ["p"], [{"tag": 7}])
    assert numbered.reasons == ["there is no scorer for '7'"]


def loaded(name: str, texts: Sequence[str], tags: Sequence[str] = ()) -> dict[str, Any]:
    ours = suites()[name]
    return load_scorers(ours, scorers(ours, texts, tags), "cpu")


def test_what_reward_may_say_in_a_benchmark() -> None:
    columns = loaded("t2i-compbench", ["color=jpeg", "3d_spatial=jpeg", "jpeg-incompress"], ["color", "3d_spatial"])
    assert list(columns) == ["jpeg-incompress", "t2i-compbench"]
    assert list(loaded("parti", ["Food & Beverage=jpeg"], ["Food & Beverage"])["parti"].rewards) == ["Food & Beverage"]
    for texts, said in (
        (["colour=jpeg"], "expected TASK=REWARD with one of the tasks color"), (["color=jpeg,jpeg-incompress"], "one"),
        (["color=jpeg", "color=jpeg-incompress"], "expected one scorer for color"), ([], "has no scorer of its own"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            loaded("t2i-compbench", texts, ["color"])
    assert scorers(suites()["geneval"], [], []) == {None: ["geneval-hf"]}


# ---------------------------------------------------------------------------------------------------------------- steps
TEXTS = ["a", "b", "a", "c"]  # the third is drawn as the second occurrence of its text
SUITE = suite.Suite(
    "prompts", 2,
    lambda source: [Prompt(t, {"prompt": t, "tag": t, "number": n}) for n, t in enumerate(TEXTS)],
    plain.file, plain.numbers,
)  # fmt: skip


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Instead of a model: an image tells its prompt, its occurrence and its number; the calls are kept."""
    calls: list[Any] = []

    def draw(policy: Any, texts: Sequence[str], settings: SampleSettings, purpose: str, before: Sequence[str]) -> Any:
        calls.append((list(texts), list(before)))
        for at, text in enumerate(texts):
            occurrence = [*before, *texts[:at]].count(text)
            pixels = torch.zeros(settings.images_per_prompt, 3, 2, 2)
            for k in range(settings.images_per_prompt):
                pixels[k, :, 0, 0] = torch.tensor([ord(text), 50 * occurrence, 50 * k]) / 255
            yield at, pixels

    monkeypatch.setattr("flowrl.sampling.generate", draw)
    return calls


def prepared(folder: Path, **options: Any) -> None:
    suite.prepare(SUITE, folder, **{"source": None, "limit": None, "images": None, "drawn": {"seed": 0}, **options})


def pixels(folder: Path) -> dict[str, list[int]]:
    return {path.name: list(Image.open(path).getpixel((0, 0))) for path in sorted(folder.glob("*.png"))}


def test_only_missing_images_are_drawn_and_they_are_the_same(tmp_path: Path, drawing: list[Any]) -> None:
    prepared(tmp_path)
    assert suite.generate(tmp_path, None, SETTINGS) == 8 and drawing == [(TEXTS, [])]  # type: ignore[arg-type]
    whole = pixels(tmp_path)
    assert whole["00002_01.png"] == [ord("a"), 50, 50]
    for name in ("00000_00.png", "00002_01.png", "00003_00.png"):
        (tmp_path / name).unlink()
    assert len(suite.missing(tmp_path)) == 3
    with pytest.raises(UserError, match="3 images are missing"):
        suite.listed(tmp_path)
    prepared(tmp_path)
    assert suite.generate(tmp_path, None, SETTINGS) == 3  # type: ignore[arg-type]
    assert drawing[1:] == [(["a"], []), (["a", "c"], ["a", "b"])] and pixels(tmp_path) == whole


def test_scores_of_a_benchmark_survive_another_score_of_its_folder(tmp_path: Path, drawing: list[Any]) -> None:
    prepared(tmp_path)
    suite.generate(tmp_path, None, SETTINGS)  # type: ignore[arg-type]
    before = suite.score(tmp_path, loaded("prompts", ["jpeg"])).rows
    scoring.score([tmp_path], "jpeg-incompress", say=str)
    after = suite.score(tmp_path, loaded("prompts", ["jpeg"]))
    assert after.new == 0 and [row["scores"]["jpeg"] for row in after.rows] == [r["scores"]["jpeg"] for r in before]
    assert set(after.rows[0]["scores"]) == {"jpeg", "jpeg-incompress"}


def test_images_of_something_else_are_not_taken_for_drawn_ones(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "00001_00.png")
    with pytest.raises(UserError, match=r"drawn by something else, such as 00001_00\.png"):
        prepared(tmp_path)


def test_another_measurement_in_the_folder_is_refused(tmp_path: Path) -> None:
    prepared(tmp_path, drawn={"policy": "a name with a fault"})
    prepared(tmp_path)  # with which nothing was drawn
    Image.new("RGB", (8, 8)).save(tmp_path / "00001_00.png")
    prepared(tmp_path)
    for other, said in (
        ({"drawn": {"seed": 1}}, "drawn is {'seed': 0} there"), ({"images": 3}, "images_per_prompt is 2 there"),
        ({"limit": 2}, "prompts is 4 there"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            prepared(tmp_path, **other)
    assert suite.read_facts(tmp_path)["complete"]
    prepared(tmp_path / "part", limit=2)
    assert not suite.read_facts(tmp_path / "part")["complete"]
    other = dataclasses.replace(SUITE, size=5)  # four prompts are not its prompts
    suite.prepare(other, tmp_path / "other", source=None, limit=None, images=None, drawn={"seed": 0})
    assert not suite.read_facts(tmp_path / "other")["complete"]
    with pytest.raises(UserError, match=r"holds no benchmark\.json"):
        suite.listed(tmp_path / "none")


def test_a_limit_takes_turns_among_the_tags_and_keeps_the_numbers() -> None:
    found = suite.spread([Prompt(str(n), {"tag": "aaab"[n], "number": n}) for n in range(4)], 3)
    assert [prompt.metadata["number"] for prompt in found] == [0, 1, 3]


def test_images_from_elsewhere_may_be_jpegs_but_must_all_be_there(tmp_path: Path) -> None:
    for n in range(4):
        for k in range(2):
            Image.new("RGB", (8, 8), (40 * n, 0, 0)).save(tmp_path / f"{n:05d}_{k:02d}.jpg")
    (tmp_path / "00003_01.jpg").rename(tmp_path / "elsewhere.jpg")
    with pytest.raises(UserError, match="1 images are missing"):
        prepared(tmp_path, drawn={})
    assert not (tmp_path / "benchmark.json").exists()  # nothing is settled yet: a model may still draw them
    (tmp_path / "elsewhere.jpg").rename(tmp_path / "00003_01.jpg")
    prepared(tmp_path, drawn={})
    assert [item.image[-4:] for item in suite.listed(tmp_path)] == [".jpg"] * 8
    (tmp_path / "00001_01.jpg").unlink()
    with pytest.raises(UserError, match=r"1 images are missing, such as 00001_01\.jpg"):
        suite.listed(tmp_path)


def test_a_report_needs_all_scores(tmp_path: Path, drawing: list[Any]) -> None:
    prepared(tmp_path)
    suite.generate(tmp_path, None, SETTINGS)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="holds no scores"):
        suite.report(SUITE, tmp_path)
    rewards = loaded("prompts", ["jpeg"])
    suite.score(tmp_path, rewards)
    lines = (tmp_path / "scores.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "scores.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="1 of 8 images have no 'jpeg' yet"):
        suite.report(SUITE, tmp_path)
    suite.score(tmp_path, rewards)
    summary = suite.report(SUITE, tmp_path)
    assert summary["scores"]["jpeg"]["missing"] == 0 and summary["images"] == 8 and summary["complete"]
    assert summary["rewards"]["jpeg"]["version"] == rewards["jpeg"].spec.version
    for name in ("summary.json", "report.md", "report.html"):
        assert "jpeg" in (tmp_path / name).read_text()
    with pytest.raises(UserError, match="holds 'prompts'; expected 'geneval'"):
        suite.report(suites()["geneval"], tmp_path)


# ---------------------------------------------------------------------------------------------------- geneval, detected
class Sees:
    """Finds the objects that the blue level of an image asks for: that many of the first class of all."""

    classes = ("person", "bench", "cow")
    version = "fake"

    def __init__(self) -> None:
        self.asked = 0

    def detect(self, images: torch.Tensor) -> list[list[Detection]]:
        self.asked += len(images)
        counts = [round(float(image[2].max()) * 255) for image in images]
        return [[Detection("bench", (0.0, 0.0, 4.0, 4.0), 0.9)] * count for count in counts]


class Red:
    colours = ("red", "blue")
    version = "fake"

    def classify(self, image: torch.Tensor, objects: Sequence[Detection]) -> list[str]:
        return ["red"] * len(objects)


def test_detections_are_stored_and_judged_again(tmp_path: Path) -> None:
    records = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"},
        {"tag": "colors", "include": [{"class": "bench", "count": 1, "color": "red"}], "prompt": "a red bench"},
    ]
    source = tmp_path / "m.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    folder = tmp_path / "out"
    for n in range(3):
        for k in range(4):  # half of the images show one bench
            path = folder / f"{n:05d}" / "samples" / f"{k:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (0, 0, k % 2)).save(path)
    ours = suites()["geneval"]
    suite.prepare(ours, folder, source=str(source), limit=None, images=None, drawn={})
    assert json.loads((folder / "00001" / "metadata.jsonl").read_text()) == records[1]
    detector = Sees()
    reward = GenevalReward("geneval-hf", detector, Red())
    suite.score(folder, {"geneval-hf": ours.wrap(folder, reward)})
    summary = suite.report(ours, folder)
    numbers = summary["scores"]["geneval-hf"]
    assert numbers["tasks"]["single_object"]["mean"] == 1 / 4 and numbers["tasks"]["colors"]["mean"] == 1 / 2
    assert numbers["overall"]["mean"] == 3 / 8 and numbers["correct_images"]["mean"] == 4 / 12
    assert numbers["prompts_with_a_correct_image"]["mean"] == pytest.approx(2 / 3)

    stored = geneval_results.by_image(folder / "results.jsonl")
    assert len(stored) == 12 and json.loads(stored["00002/samples/0001.png"]["metadata"]) == records[2]
    assert json.loads(stored["00000/samples/0001.png"]["details"]) == {"bench": [[0, 0, 4, 4, 0.9]]}
    asked = detector.asked
    again = loaded("geneval", ["geneval-stored"])
    suite.score(folder, {name: ours.wrap(folder, reward) for name, reward in again.items()})
    both = suite.report(ours, folder)["scores"]
    assert both["geneval-stored"] == both["geneval-hf"] == numbers and detector.asked == asked

    items = suite.listed(folder)
    asked_for = torch.zeros(12, 3, 8, 8), [item.prompt for item in items], [item.metadata for item in items]
    rows = [{key: value for key, value in row.items() if key != "colors"} for row in stored.values()]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))  # as the official tool does
    official = ours.wrap(folder, again["geneval-stored"]).score(*asked_for)
    assert official.values.tolist() == [0, 1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 1]
    with pytest.raises(UserError, match="written by another tool"):  # it must not be lost
        ours.wrap(folder, reward)
    asked_for[1][0] = "another prompt"
    official = ours.wrap(folder, again["geneval-stored"]).score(*asked_for)
    assert math.isnan(official.values[0]) and "no row of this image and prompt" in str(official.reasons[0])
    (folder / "results.jsonl").unlink()
    with pytest.raises(UserError, match=r"results\.jsonl is not there"):
        ours.wrap(folder, again["geneval-stored"])


# ----------------------------------------------------------------------------------------------------------- end to end
def command(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_a_suite_from_the_command_line_with_a_model(tmp_path: Path) -> None:
    tiny_sd3(tmp_path / "tokenizer").save_pretrained(tmp_path / "tiny")
    out = tmp_path / "out"
    words = ("bench", "geneval", tmp_path / "tiny", "--limit", 6, "--images", 1, "--steps", 1, "--reward", "jpeg")
    first = command(*words, "--step", "generate", "--out", out)
    assert first.exit_code == 0, first.output
    assert "6 images drawn" in first.output and not (out / "scores.jsonl").exists()
    assert len(list(out.glob("*/samples/*.png"))) == 6 and (out / "00000" / "metadata.jsonl").is_file()
    second = command("bench", "geneval", "--step", "score", "--reward", "jpeg", "--out", out)
    assert second.exit_code == 0 and "6 scores computed" in second.output and not (out / "summary.json").exists()
    third = command("bench", "geneval", "--step", "report", "--out", out)
    assert third.exit_code == 0 and "overall" in third.output
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["scores"]["jpeg"]["tasks"]) == {
        "single_object", "two_object", "counting", "colors", "position", "color_attr"
    }  # fmt: skip
    assert not summary["complete"] and "not comparable" in (out / "report.md").read_text()
    assert "Overall is the mean of the task means" in (out / "report.html").read_text()
    again = command(*words, "--out", out)
    assert again.exit_code == 0 and "images drawn" not in again.output and "0 scores computed" in again.output
    other = command(*words, "--seed", 1, "--out", out)
    assert other.exit_code == 2 and "another measurement" in other.output
    assert "expected one of generate, score, report" in command(*words, "--step", "draw", "--out", out).output


def test_a_later_step_measures_what_is_there_and_nothing_else(tmp_path: Path, drawing: list[Any]) -> None:
    def go(out: str, *steps: str, **options: Any) -> Any:
        return run(
            "prompts", tmp_path / out, steps=steps, settings=SETTINGS, device="cpu", say=str,
            **{"open_policy": None, "drawn": {}, "source": None, "rewards": ["jpeg"], "limit": None, "images": None}
            | options,
        )  # fmt: skip

    source = str(tmp_path / "p.txt")
    Path(source).write_text("a\nb\nc\nd\n")
    new = {"open_policy": lambda: None, "drawn": {"seed": 0}, "source": source, "limit": 3, "images": 1}
    for wrong, said in ((["jpgg"], "unknown reward"), (["sizes=jpeg"], "TASK=REWARD"), ([], "no scorer")):
        with pytest.raises(UserError, match=said):
            go("never drawn", "generate", "score", **new | {"rewards": wrong})
    assert not drawing  # and it is said before anything is drawn
    (tmp_path / "nan.jsonl").write_text('{"prompt": "a", "rating": NaN}\n')
    with pytest.raises(UserError, match="cannot be written as JSON"):
        go("never drawn", "generate", **new | {"source": str(tmp_path / "nan.jsonl")})
    go("o", "generate", **new)
    for other, said in (({"limit": 2, "source": source}, "prompts is 3"), ({"images": 2}, "expected --prompts")):
        with pytest.raises(UserError, match=said):
            go("o", "score", **other)
    go("o", "score")
    assert go("o", "report")["prompts"] == 3
    with pytest.raises(UserError, match="holds 'prompts'; expected 'geneval'"):
        run(
            "geneval", tmp_path / "o", steps=("score",), open_policy=None, settings=SETTINGS, drawn={}, source=None,
            rewards=["jpeg"], limit=None, images=None, device="cpu", say=str,
        )  # fmt: skip


def test_a_forgotten_model_does_not_settle_the_folder(tmp_path: Path, drawing: list[Any]) -> None:
    (tmp_path / "p.txt").write_text("a\nb\n")
    options: dict[str, Any] = {
        "steps": ("generate",), "settings": SETTINGS, "source": str(tmp_path / "p.txt"), "rewards": [], "limit": None,
        "images": 1, "device": "cpu", "say": str,
    }  # fmt: skip
    with pytest.raises(UserError, match="images are missing"):
        run("prompts", tmp_path, open_policy=None, drawn={}, **options)
    run("prompts", tmp_path, open_policy=lambda: None, drawn={"policy": "tiny"}, **options)  # type: ignore[arg-type, return-value]
    assert len(drawing) == 1


def test_steps_without_a_model_need_the_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="images are missing"):
        run(
            "prompts", tmp_path / "o", steps=("generate", "score"), open_policy=None, settings=SETTINGS, drawn={},
            source="shapes:test", rewards=["jpeg"], limit=2, images=1, device="cpu", say=print,
        )  # fmt: skip
