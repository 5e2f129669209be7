"""UniGenBench: questions, answers and the table made of them."""

import json
import math

import pytest
from judge_server import greys, serve

from reward_models import checked_score, load
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
    definitions = json.loads((TEMPLATES / "unigenbench_definitions.json").read_text())
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
    assert all(point in text for point in POINTS[:1]) and "about 0" in text and "the colours of things" in text


def test_answers_that_cannot_be_used_are_asked_for_again():
    said = iter(["no", "<analysis>['a']</analysis><score>[2]</score>", "<analysis>['a']</analysis><score>[1]</score>"])
    with serve(lambda *_: next(said)) as server:
        reward = load("unigenbench", endpoint={"url": server.url, "temperature": 0.7}, model="judge", attempts=11)
        assert checked_score(reward, greys(0.3), ["a"], [metadata(1)]).values.tolist() == [1]
    assert len(server.bodies) == 3


def test_wrong_metadata_and_definitions(tmp_path):
    reward = load("unigenbench", endpoint="http://127.0.0.1:9", model="judge")
    with pytest.raises(ValueError, match="as many of both"):
        reward.question("a", POINTS, ["one"])
    with pytest.raises(ValueError, match="definitions_path"):
        reward.question("a", ["Mood"], ["one"])
    own = tmp_path / "own.json"
    own.write_text('{"Mood": "how it feels"}')
    reward = load("unigenbench", endpoint="http://127.0.0.1:9", model="judge", definitions_path=str(own))
    assert "Mood: how it feels" in reward.question("a", ["Mood"], ["one"])
    with pytest.raises(ValueError, match="expected a JSON file"):
        load("unigenbench", endpoint="http://127.0.0.1:9", model="judge", definitions_path=str(tmp_path / "none"))
