"""UniGenBench: questions, answers and the table made of them."""

import json
import math
from pathlib import Path

import pytest
from judge_server import greys, serve

from reward_models import checked_score, load
from reward_models.judges import build
from reward_models.judges.unigenbench import primary_dimension, tally
from reward_models.judges.wording import TEMPLATES

POINTS = ["Attribute - Color", "Action - Full-body (Character/Anthropomorphic)", "Attribute - Shape", "Style"]


def test_tally_by_hand():
    table = tally(
        [
            (POINTS, [1, 0, 0, 1]),
            (POINTS[:1], [1]),
            (POINTS[2:], None),
            (["Attribute - Color", "Style "], [0, 2]),
        ]
    )
    assert table.primary == {"Attribute": (2, 4), "Action": (0, 1), "Style": (1, 2)}
    assert table.sub["Attribute - Color"] == (2, 3) and table.sub["Style"] == (1, 2)
    assert (table.rows, table.invalid) == (4, 1)
    assert table.micro == pytest.approx(3 / 7)
    assert table.mean_of_primary == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert math.isnan(tally([]).micro) and math.isnan(tally([(POINTS, None)]).mean_of_primary)
    with pytest.raises(ValueError, match="expected one each"):
        tally([(POINTS, [1])])


def test_the_ten_dimensions_and_twenty_seven_kinds():
    definitions = json.loads((TEMPLATES / "unigenbench_definitions_en.json").read_text())
    assert len(definitions) == 27
    assert {primary_dimension(point) for point in definitions} == {
        "Action",
        "Style",
        "Attribute",
        "Relationship",
        "Compound",
        "Grammar",
        "World Knowledge",
        "Entity Layout",
        "Logical Reasoning",
        "Text Generation",
    }


def test_chinese_prompts_are_asked_about_in_chinese():
    points = ["属性-颜色", "动作-人物/拟人手部动作", "风格"]
    row = {"testpoints": points, "descriptions": ["亮黄色", "捏着一个寿司", "浮世绘风格"]}
    definitions = json.loads((TEMPLATES / "unigenbench_definitions_zh.json").read_text(encoding="utf-8"))
    assert len(definitions) == 27 and len({primary_dimension(point) for point in definitions}) == 10
    with serve(lambda *_: "<analysis>['是', '否', '是']</analysis><score>[1, 0, 1]</score>") as server:
        reward = load("unigenbench", endpoint=server.url, model="judge", language="zh")
        result = checked_score(reward, greys(0.3), ["一只猫"], [row])
        text = server.bodies[0]["messages"][0]["content"][-1]["text"]
        assert reward.spec.version != load("unigenbench", endpoint=server.url, model="judge").spec.version
    assert result.values.tolist() == pytest.approx([2 / 3])
    assert {name: float(part) for name, part in result.parts.items()} == {
        "属性": 1, "属性-颜色": 1, "动作": 0, "动作-人物/拟人手部动作": 0, "风格": 1
    }  # fmt: skip
    assert "「一只猫」" in text and f"属性-颜色: {definitions['属性-颜色']}" in text and "风格: 浮世绘风格" in text


ROWS = Path(__file__).parents[3].parent / "shared" / "data" / "unigenbench"


@pytest.mark.skipif(not ROWS.is_dir(), reason="the shared data are not here")
@pytest.mark.parametrize(("file", "language"), [("en", "en"), ("en_long", "en"), ("zh", "zh")])
def test_every_test_point_of_the_release_has_a_definition(file, language):
    from benchmarks.suites.unigenbench import prompts

    reward = build.unigenbench(endpoint="http://127.0.0.1:9", model="judge", language=language)
    found = prompts(str(ROWS / f"test_prompts_{file}.csv"))
    for prompt in found:
        assert reward.question(prompt.text, prompt.metadata["testpoints"], prompt.metadata["descriptions"])
    assert {point for prompt in found for point in prompt.metadata["testpoints"]} == set(reward.definitions)


def metadata(count):
    return {"testpoints": POINTS[:count], "descriptions": [f"about {i}" for i in range(count)]}


def test_judging():
    """Passes as many points as the image is bright; the darkest one gets no usable answer."""

    def says(text, images, body):
        level = round(float(images[0].mean()) / 255 * 10)
        if level == 0:
            return "<score>[1]</score>"
        count = text.count("about ")
        return f"<analysis>{['seen'] * count}</analysis><score>{[int(i < level) for i in range(count)]}</score>"

    rows = [metadata(4), metadata(2), metadata(3), {}]
    with serve(says) as server:
        reward = load("unigenbench", endpoint={"url": server.url, "pause": 0.01}, model="judge")
        result = checked_score(reward, greys(0.3, 0.1, 0.0, 0.5), ["a", "b", "c", "d"], rows)
        text = server.bodies[0]["messages"][0]["content"][-1]["text"]
    assert result.values[:2].tolist() == [0.75, 0.5] and result.values[2:].isnan().all()
    assert "no <analysis>" in result.reasons[2] and "no test points" in result.reasons[3]
    assert result.parts["Attribute"].tolist()[:2] == [1, 1] and math.isnan(result.parts["Attribute"][2])
    assert result.parts["Action"].tolist()[:2] == [1, 0] and result.parts["Style"][0] == 0
    assert (
        result.parts[POINTS[0]][0] == 1 and result.parts[POINTS[2]][0] == 1 and math.isnan(result.parts[POINTS[2]][1])
    )
    assert all(point in text for point in POINTS[:1]) and "about 0" in text and "the colours of things" in text


def test_answers_that_cannot_be_used_are_asked_for_again():
    said = iter(["no", "<analysis>['a']</analysis><score>[2]</score>", "<analysis>['a']</analysis><score>[1]</score>"])
    with serve(lambda *_: next(said)) as server:
        reward = load("unigenbench", endpoint={"url": server.url, "temperature": 0.7}, model="judge", attempts=11)
        assert checked_score(reward, greys(0.3), ["a"], [metadata(1)]).values.tolist() == [1]
    assert len(server.bodies) == 3


def test_wrong_metadata_and_definitions(tmp_path):
    dead = {"endpoint": "http://127.0.0.1:9", "model": "judge"}
    reward = build.unigenbench(**dead)
    with pytest.raises(ValueError, match="as many of both"):
        reward.question("a", POINTS, ["one"])
    with pytest.raises(ValueError, match="definitions_path"):
        reward.question("a", ["Mood"], ["one"])
    own = tmp_path / "own.json"
    own.write_text('{"Mood": "how it feels"}')
    other = build.unigenbench(**dead, definitions_path=str(own))
    assert "Mood: how it feels" in other.question("a", ["Mood"], ["one"]) and other.spec.version != reward.spec.version
    own.write_text("[]")
    for path in (tmp_path / "none", own):
        with pytest.raises(ValueError, match="expected a JSON file"):
            load("unigenbench", **dead, definitions_path=str(path))
    with pytest.raises(ValueError, match="'en' or 'zh'"):
        load("unigenbench", **dead, language="fr")
