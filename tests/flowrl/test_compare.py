"""`flowrl compare`: hand-computed differences and win shares, pairing, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from flowrl.cli import app
from flowrl.commands.compare import compare, compared, pairs, read_side, win
from flowrl.errors import UserError


def table(path: Path, rows: list[dict[str, Any]], specs: dict[str, Any] | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if specs is not None:
        (path / "scores.meta.json").write_text(json.dumps({"columns": specs}))
    return path


def row(prompt: str, seed: int, tag: str | None = None, image: str | None = None, **scores: float | None) -> Any:
    return {
        "prompt": prompt,
        "seed_index": seed,
        "tag": tag,
        "image": image or f"{prompt}_{seed}.png",
        "scores": scores,
    }


def test_hand_computed_difference_wins_and_tasks(tmp_path: Path) -> None:
    a = [row("p", 0, "x", s=1.0), row("p", 1, "x", s=2.0), row("q", 0, "y", s=5.0), row("r", 0, "x", s=0.0)]
    b = [row("p", 0, "x", s=2.0), row("p", 1, "x", s=2.0), row("q", 0, "y", s=4.0), row("r", 0, "x", s=3.0)]
    found = compared(read_side(table(tmp_path / "a", a)), read_side(table(tmp_path / "b", b)))
    value = found["scores"]["s"]
    assert found["pairs"] == 4 and found["unpaired"] == 0
    # task x: differences 1, 0, 3 (mean 4/3) and wins 1, 1/2, 1; task y: -1 and 0; then the plain mean of both tasks
    assert value["all"]["difference"]["mean"] == pytest.approx((4 / 3 - 1) / 2)
    assert value["all"]["win_share"]["mean"] == pytest.approx((2.5 / 3 + 0) / 2)
    assert value["x"]["difference"]["mean"] == pytest.approx(4 / 3) and value["y"]["difference"]["mean"] == -1
    assert value["x"]["a"]["mean"] == 1.0 and value["x"]["b"]["mean"] == pytest.approx(7 / 3)
    low, high = value["x"]["difference"]["ci95"]  # the two prompts of x: means 1/2 (two images) and 3
    assert low == pytest.approx(0.5) and high == pytest.approx(3)
    assert value["y"]["difference"]["ci95"] == [None, None]  # one prompt says nothing about others


def test_missing_scores_and_images_leave_pairs_out_of_both_means(tmp_path: Path) -> None:
    a = [row("p", 0, s=1.0), row("q", 0, s=None), row("r", 0, s=3.0), row("only a", 0, s=100.0)]
    b = [row("p", 0, s=2.0), row("q", 0, s=50.0), row("r", 0, s=3.0)]
    found = compared(read_side(table(tmp_path / "a", a)), read_side(table(tmp_path / "b", b)))
    everything = found["scores"]["s"]["all"]
    assert (found["pairs"], found["unpaired"], everything["pairs"]) == (3, 1, 2)
    assert (everything["a"]["mean"], everything["b"]["mean"], everything["difference"]["mean"]) == (2.0, 2.5, 0.5)


def test_pairs_by_file_where_seeds_do_not_meet(tmp_path: Path) -> None:
    a = table(tmp_path / "a", [row("p", 0, image="1.png", s=1.0), row("p", 1, image="2.png", s=2.0)])
    b = table(tmp_path / "b", [row("p", 5, image="2.png", s=2.5), row("p", 6, image="1.png", s=1.5)])
    found = pairs(read_side(a), read_side(b))
    assert [(old.numbers["s"], new.numbers["s"]) for old, new in found] == [(1.0, 1.5), (2.0, 2.5)]
    c = table(tmp_path / "c", [row("other", 0, s=1.0)])
    with pytest.raises(UserError, match="no image in common"):
        pairs(read_side(a), read_side(c))


def unnumbered(prompt: str, image: str, **scores: float) -> Any:
    """A row of a plain folder, in which nothing says which image of its prompt it is."""
    return {key: value for key, value in row(prompt, 0, image=image, **scores).items() if key != "seed_index"}


def test_a_plain_folder_that_lacks_an_image_is_paired_by_names(tmp_path: Path) -> None:
    a = [unnumbered("p", f"{name}.png", s=value) for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    b = [unnumbered("p", f"{name}.png", s=value) for name, value in (("b", 20.0), ("c", 30.0), ("d", 40.0))]
    left, right = read_side(table(tmp_path / "a", a)), read_side(table(tmp_path / "b", b))
    assert [(old.numbers["s"], new.numbers["s"]) for old, new in pairs(left, right)] == [(2.0, 20.0), (3.0, 30.0)]
    assert compared(left, right)["unpaired"] == 2
    other = [unnumbered("p", f"{name}.jpg", s=0.0) for name in "xy"]  # no name in common: by order
    assert len(pairs(left, read_side(table(tmp_path / "c", other)))) == 2


def test_a_table_that_was_interrupted_counts_each_image_once(tmp_path: Path) -> None:
    first = [row(f"p{i}", 0, s=0.0) for i in range(3)]  # the last row of an image counts
    last = [row(f"p{i}", 0, s=1.0) for i in range(3)]
    a, b = table(tmp_path / "a", first + last), table(tmp_path / "b", last)
    found = compared(read_side(a), read_side(b))
    assert found["pairs"] == 3 and found["scores"]["s"]["all"]["difference"]["mean"] == 0


def test_a_score_that_the_first_image_lacks_is_compared_and_one_text_may_have_two_tasks(tmp_path: Path) -> None:
    a = [row("p", 0, "x"), row("p", 0, "y", image="2.png", s=1.0), row("q", 0, "x", s=3.0)]
    b = [row("p", 0, "x"), row("p", 0, "y", image="2.png", s=2.0), row("q", 0, "x", s=7.0)]
    value = compared(read_side(table(tmp_path / "a", a)), read_side(table(tmp_path / "b", b)))["scores"]["s"]
    assert value["all"]["difference"]["mean"] == pytest.approx((1 + 4) / 2)
    assert value["x"]["pairs"] == 1 and value["y"]["difference"]["mean"] == 1


def test_equal_prompts_of_a_run_stay_apart(tmp_path: Path) -> None:
    """A prompt that occurs twice gives two images of one seed; both are paired, in order."""
    for name, values in (("a", (1.0, 2.0)), ("b", (4.0, 8.0))):
        rows = [{**row("p", 0, s=value), "image": None, "path": None} for value in values]
        table(tmp_path / name, rows)
    found = pairs(read_side(tmp_path / "a"), read_side(tmp_path / "b"))
    assert [new.numbers["s"] - old.numbers["s"] for old, new in found] == [3.0, 6.0]


def test_run_folders_compare_their_last_evaluation_with_its_judge(tmp_path: Path) -> None:
    for name, value in (("a", 0.5), ("b", 0.75)):
        (tmp_path / name).mkdir()
        rows = [
            {"prompt": f"p{i}", "prompt_id": i, "tag": None, "seed_index": 0, "scores": {"s": value + i}, "path": None,
             "judge": {"held": -value}}
            for i in range(3)
        ]  # fmt: skip
        text = "".join(json.dumps(each) + "\n" for each in rows)
        (tmp_path / name / "eval_after.jsonl").write_text(text)
        (tmp_path / name / "eval_before.jsonl").write_text(text.replace(str(value), "0.0", 1))
    found = compared(read_side(tmp_path / "a"), read_side(tmp_path / "b"))
    assert found["scores"]["s"]["all"]["difference"]["mean"] == pytest.approx(0.25)
    assert found["scores"]["held"]["all"]["difference"]["mean"] == pytest.approx(-0.25)
    before = compared(read_side(tmp_path / "a/eval_before.jsonl"), read_side(tmp_path / "a"), ["s"])
    assert before["scores"]["s"]["all"]["difference"]["mean"] == pytest.approx(0.5 / 3)


def test_scores_of_two_versions_are_refused_and_costs_are_won_by_less(tmp_path: Path) -> None:
    one = {"s": {"name": "s", "version": "1", "higher_is_better": False}}
    rows = [row("p", 0, s=1.0), row("q", 0, s=2.0)]
    a = table(tmp_path / "a", rows, one)
    b = table(tmp_path / "b", [row("p", 0, s=0.5), row("q", 0, s=3.0)], one)
    assert compared(read_side(a), read_side(b))["scores"]["s"]["all"]["win_share"]["mean"] == 0.5
    assert [win(1.0, 0.5, higher=False), win(1.0, 0.5), win(1.0, 1.0)] == [1.0, 0.0, 0.5]
    c = table(tmp_path / "c", rows, {"s": {**one["s"], "version": "2"}})
    with pytest.raises(UserError, match="not the same reward"):
        compared(read_side(a), read_side(c))
    with pytest.raises(UserError, match="no score 'x' in both"):
        compared(read_side(a), read_side(b), ["x"])
    d = table(tmp_path / "d", [row("p", 0, other=1.0)])
    with pytest.raises(UserError, match="no score in common"):
        compared(read_side(a), read_side(d))
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(UserError, match="has no scores"):
            read_side(wrong)


@given(st.floats(-5, 5) | st.just(math.nan), st.floats(-5, 5) | st.just(math.nan))
def test_wins_of_both_sides_sum_to_one(a: float, b: float) -> None:
    total = win(a, b) + win(b, a)
    assert math.isnan(total) if math.isnan(a + b) else total == 1.0
    assert math.isnan(total) or win(a, b) == win(b, a, higher=False)


def test_the_three_outputs(tmp_path: Path) -> None:
    a = table(tmp_path / "a", [row(f"<b>{i}", 0, s=float(i)) for i in range(4)])
    b = table(tmp_path / "b", [row(f"<b>{i}", 0, s=float(2 * i)) for i in range(4)])
    for side in (a, b):
        for i in range(4):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(side / f"<b>{i}_0.png")
    outs = [tmp_path / f"new/c{suffix}" for suffix in (".md", ".html", ".json")]
    text = compare(str(a), str(b), outs=outs)
    assert outs[0].read_text() == text and "| s | all | 4 | 1.5000 | 3.0000 | +1.5000 |" in text
    page = outs[1].read_text()
    assert "<b>" not in page and "&lt;b&gt;3" in page and page.count("data:image/png") == 6  # of 3 gains, both sides
    assert "Where B gains most by s" in page and "Where B loses" not in page and "s: B - A" in page
    assert json.loads(outs[2].read_text())["scores"]["s"]["all"]["win_share"]["mean"] == pytest.approx(0.875)
    with pytest.raises(UserError, match=r"ends in \.md"):
        compare(str(a), str(b), outs=[tmp_path / "c.pdf"])


def test_the_verb_prints_the_table_and_explains_wrong_folders(tmp_path: Path) -> None:
    a = table(tmp_path / "a", [row("p", 0, s=1.0, t=3.0), row("q", 0, s=1.0, t=3.0)])
    b = table(tmp_path / "b", [row("p", 0, s=3.0, t=3.0), row("q", 0, s=1.0, t=4.0)])
    done = CliRunner().invoke(app, ["compare", str(a), str(b), "--score", "s", "--out", str(tmp_path / "c.json")])
    assert done.exit_code == 0 and "| s | all | 2 | 1.0000 | 2.0000 | +1.0000 |" in done.output
    assert list(json.loads((tmp_path / "c.json").read_text())["scores"]) == ["s"]
    wrong = CliRunner().invoke(app, ["compare", str(a), str(tmp_path)])
    assert wrong.exit_code == 2 and "has no scores" in wrong.output
