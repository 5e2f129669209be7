"""summary.json: stable keys, and numbers that a hand calculation gives too."""

import json
import math

import pytest
from fake_run import COST, eval_rows

import flowrl
from flowrl import summary

SETTINGS = {"split": "shapes:test", "steps": 20, "guidance": 1.0}


def build(**changes):
    arguments = {
        "method": "flow_grpo", "policy": "tiny-sd3", "seed": 0, "updates": 60, "wall_s": 171.23, "peak_rss_mb": 1400.4,
        "cost": COST, "eval_settings": SETTINGS, "before": eval_rows("before", 0.5), "after": eval_rows("after", 0.7),
        "before_guided": eval_rows("before_guided", 0.6), "on_policy_ratio_max_dev": 0.0, "alarms": [],
    }  # fmt: skip
    return summary.build_summary(**{**arguments, **changes})


def row(prompt_id, seed_index, score, judge=0.5, tag=None, **stats):
    return summary.EvalRow(
        prompt=f"prompt {prompt_id}", prompt_id=prompt_id, tag=tag, seed_index=seed_index, scores={"shapes": score},
        judge={"tiny-clip": judge}, path=None, stats=stats,
    )  # fmt: skip


def keys(tree):
    return {key: keys(value) for key, value in tree.items()} if isinstance(tree, dict) else None


def test_keys_are_those_that_were_promised():
    interval = {"mean": None, "ci95": None}
    difference = {"mean_diff": None, "ci95": None}
    stage = {"shapes": interval, "held_out": {"tiny-clip": interval}, "diversity": None}
    assert keys(build()) == {
        "flowrl": None, "method": None, "policy": None, "seed": None, "updates": None, "wall_s": None,
        "peak_rss_mb": None,
        "cost": dict.fromkeys(
            ["images", "sampling_calls", "training_forwards", "training_backwards", "calls_per_image"]
        ),
        "eval": {
            "split": None, "prompts": None, "images_per_prompt": None, "steps": None, "guidance": None,
            "before": stage, "before_guided": stage, "after": stage,
            "paired": {"shapes": difference, "held_out": {"tiny-clip": difference}},
        },
        "on_policy_ratio_max_dev": None, "alarms": None,
    }  # fmt: skip


def test_plain_facts():
    facts = build()
    assert facts["flowrl"] == flowrl.__version__
    assert (facts["wall_s"], facts["peak_rss_mb"]) == (171.2, 1400)
    assert facts["cost"]["calls_per_image"] == (38400 + 19200) / 3840 == 15.0
    assert facts["eval"]["prompts"] == 40 and facts["eval"]["images_per_prompt"] == 4
    assert facts["eval"]["split"] == "shapes:test"


def test_headline_is_the_mean_of_task_means():
    rows = [row(0, 0, 1.0, tag="a"), row(1, 0, 1.0, tag="a"), row(2, 0, 1.0, tag="a"), row(3, 0, 0.0, tag="b")]
    assert build(before=rows, after=())["eval"]["before"]["shapes"]["mean"] == 0.5
    rows[3]["tag"] = None  # without tasks: the mean over images
    assert build(before=rows, after=())["eval"]["before"]["shapes"]["mean"] == 0.75


def test_gain_is_paired_on_prompt_and_seed():
    before = [row(0, 0, 0.0, 0.1), row(0, 1, 1.0, 0.2), row(1, 0, 0.0, 0.3), row(1, 1, None, 0.4)]
    after = [row(1, 1, 1.0, 0.9), row(1, 0, 1.0, 0.3), row(0, 1, 1.0, 0.3), row(0, 0, 0.0, 0.1), row(2, 0, 1.0, 1.0)]
    paired = build(before=before, after=after)["eval"]["paired"]
    assert paired["shapes"]["mean_diff"] == pytest.approx((0 + 0 + 1) / 3)  # the missing one and prompt 2 are left out
    assert paired["shapes"]["ci95"] == [pytest.approx(0.0), pytest.approx(1.0)]
    assert paired["held_out"]["tiny-clip"]["mean_diff"] == pytest.approx((0.0 + 0.1 + 0.0 + 0.5) / 4)


def test_diversity_is_averaged_and_missing_values_are_null():
    rows = [row(0, 0, 1.0, diversity=0.4), row(0, 1, 1.0, diversity=0.4), row(1, 0, 1.0, diversity=None)]
    assert build(before=rows)["eval"]["before"]["diversity"] == pytest.approx(0.4)
    assert build(before=[row(0, 0, 1.0), row(1, 0, 0.0)])["eval"]["before"]["diversity"] is None
    one = build(before=[row(0, 0, 1.0)], after=())["eval"]["before"]["shapes"]
    assert one == {"mean": 1.0, "ci95": [None, None]}  # one prompt says nothing about others


def test_a_run_that_stopped_early_has_all_keys():
    facts = build(after=(), before_guided=())
    assert facts["eval"]["after"] is facts["eval"]["paired"] is facts["eval"]["before_guided"] is None
    assert facts["eval"]["before"]["shapes"]["mean"] is not None
    assert build(eval_settings=None, before=(), after=(), before_guided=())["eval"] is None
    assert build(cost={**COST, "images": 0})["cost"]["calls_per_image"] is None


def test_same_rows_give_the_same_numbers():
    assert build() == build()


def test_file_is_strict_json_and_replaced_in_one_step(tmp_path):
    facts = build(on_policy_ratio_max_dev=math.nan)
    path = summary.write_summary(tmp_path, facts)
    text = path.read_text()
    assert json.loads(text) == facts and "NaN" not in text
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_rows_are_read_back(tmp_path):
    rows = eval_rows("before", 0.5)
    (tmp_path / "eval_before.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert summary.read_rows(tmp_path, "before") == rows
    assert summary.read_rows(tmp_path, "after") == []
