"""GenEval from stored detections: the official form read and written, and decided again."""

from __future__ import annotations

import json

import pytest
import torch

from reward_models import checked_score, load
from reward_models.geneval import Detection, Options, judge
from reward_models.geneval_stored import judge_row, read_rows, row_of, summary, unpacked, write_rows

BOX = [0.0, 0.0, 10.0, 10.0]
# a line as the benchmark's own script writes it: metadata and details are JSON texts
OFFICIAL_LINE = (
    '{"filename": "out/00000/samples/0000.png", "tag": "position", "prompt": "a photo of a cat right of a dog", '
    '"correct": true, "reason": "", "metadata": "{\\"tag\\": \\"position\\", \\"include\\": [{\\"class\\": \\"dog\\", '
    '\\"count\\": 1}, {\\"class\\": \\"cat\\", \\"count\\": 1, \\"position\\": [\\"right of\\", 0]}], \\"prompt\\": '
    '\\"a photo of a cat right of a dog\\"}", "details": "{\\"cat\\": [[60.0, 0.0, 70.0, 10.0, 0.97]], '
    '\\"dog\\": [[0.0, 0.0, 10.0, 10.0, 0.9], [90.0, 0.0, 99.0, 10.0, 0.4]]}"}'
)
COLOURED = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}


def stored(metadata, **details):
    return {"tag": metadata["tag"], "prompt": "", "correct": True, "metadata": metadata, "details": details}


def test_an_official_line_is_decided_again():
    answer = judge_row(json.loads(OFFICIAL_LINE))
    assert answer.correct and not answer.strict and answer.soft == pytest.approx(1 / 3)  # two dogs, one asked for
    swapped = json.loads(OFFICIAL_LINE.replace("right of", "left of"))
    answer = judge_row(swapped)
    assert not answer.correct and "found right of" in answer.reason


def test_lower_thresholds_bring_nothing_back_and_higher_ones_drop():
    assert judge_row(json.loads(OFFICIAL_LINE), Options(threshold=0.5)).strict  # the second dog is gone
    assert not judge_row(json.loads(OFFICIAL_LINE), Options(threshold=0.95)).correct


def test_what_is_written_is_read_again(tmp_path):
    found = [Detection("cat", (0, 0, 10, 10), 0.95), Detection("cat", (30, 0, 40, 12), 0.8)]
    seen: dict[Detection, str] = {}

    def colours_of(objects):
        seen.update({d: "red" for d in objects})
        return ["red" for _ in objects]

    answer = judge(found, COLOURED, colours_of)
    rows = [row_of("a.png", COLOURED, answer, seen), row_of("b.png", COLOURED, answer)]
    assert list(rows[1]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert json.loads(rows[0]["colors"]) == {"cat": ["red", None]}  # the strict decision asked about one only
    write_rows(tmp_path / "results.jsonl", [*rows, json.loads(OFFICIAL_LINE)])
    again = read_rows(tmp_path / "results.jsonl")
    assert again[:2] == rows and len(again) == 3
    assert unpacked(again[0])[1] == found and unpacked(again[1])[2] is None
    assert judge_row(again[0]) == answer
    assert "colours" in judge_row(again[1])
    figures = summary(again, Options())
    assert figures.judged_again == 2 and figures.changed == ()


def test_the_headline_is_the_mean_of_the_tasks():
    counting = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}
    single = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    two, one = [[*BOX, 0.95], [20, 0, 30, 10, 0.95]], [[*BOX, 0.95]]
    rows = [stored(counting, cat=two), *(stored(counting, cat=one) for _ in range(3))]
    rows += [stored(single, dog=one), stored(single, cat=one)]
    figures = summary(rows, Options())
    assert figures.tasks == {"single_object": 0.5, "counting": 0.25} and list(figures.tasks)[0] == "single_object"
    assert figures.overall == pytest.approx(0.375)  # not 2 / 6
    assert figures.images == pytest.approx(2 / 6) and figures.prompts == 1.0
    assert len(figures.changed) == 4  # stored as correct
    assert summary(rows).overall == 1.0 and summary(rows).judged_again == 0


def test_the_reward_reads_rows_and_metadata():
    rows = [
        json.loads(OFFICIAL_LINE),
        COLOURED | {"details": {"cat": [[*BOX, 0.9]]}, "colors": {"cat": ["red"]}},
        COLOURED | {"details": {"cat": [[*BOX, 0.9]]}},
        COLOURED,
        {"details": {}},
        {"tag": "x", "include": [{"class": "cat"}], "details": {}},
        {
            "tag": "x",
            "include": [{"class": "cat", "count": 1, "position": ["above", 3]}],
            "details": {"cat": [[*BOX, 1]]},
        },
    ]
    result = checked_score(load("geneval-stored"), torch.zeros(7, 3, 2, 2), [""] * 7, rows)
    assert result.values[:2].tolist() == [1, 1] and result.missing.tolist() == [False] * 2 + [True] * 5
    assert "count" in result.reasons[5] and "earlier" in result.reasons[6]
    assert "colours" in result.reasons[2] and "details" in result.reasons[3] and "include" in result.reasons[4]
    soft = checked_score(load("geneval-stored", kind="geneval-stored-soft"), torch.zeros(1, 3, 2, 2), [""], rows[:1])
    assert soft.values.item() == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="geneval-stored"):
        load("geneval-stored", kind="geneval")


@pytest.mark.parametrize(
    "line",
    ["[1]", "{", '{"metadata": {}, "details": {"cat": [[1, 2]]}}', '{"metadata": {"tag": "x"}}', '{"details": 3}'],
)
def test_broken_lines_are_named(tmp_path, line):
    (tmp_path / "results.jsonl").write_text(OFFICIAL_LINE + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match="line 3"):
        read_rows(tmp_path / "results.jsonl")


def test_no_file_and_no_rows(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="no rows"):
        summary([])
