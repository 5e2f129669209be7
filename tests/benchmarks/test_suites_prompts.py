"""Where the prompts of the suites come from, against the released files where these are at hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suites import compbench, geneval, geneval_prompts, hpsv2, plain, suites, unigenbench
from benchmarks.suites.sources import fetch
from flowrl.commands.suites import SUITES
from flowrl.errors import UserError

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not here")


def test_the_command_line_knows_every_suite() -> None:
    assert set(suites()) == set(SUITES) and all(name == suite.name for name, suite in suites().items())


def test_geneval_has_its_tasks_and_counts() -> None:
    records = geneval_prompts.records()
    assert len(records) == 553 and len(set(geneval_prompts.lines())) == 553
    assert Counter(record["tag"] for record in records) == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100
    }  # fmt: skip
    counting = [record for record in records if record["tag"] == "counting"]
    assert Counter(record["include"][0]["count"] for record in counting) == {2: 26, 3: 28, 4: 26}
    assert all(r["exclude"][0]["count"] == r["include"][0]["count"] + 1 for r in counting)
    relations = Counter(r["include"][1]["position"][0] for r in records if r["tag"] == "position")
    assert relations == {"below": 28, "right of": 27, "above": 26, "left of": 19}
    assert not any("color" in c and c["class"] == "person" for r in records for c in r["include"])


@needs_data
def test_geneval_is_the_released_file_byte_for_byte() -> None:
    released = (DATA / "geneval" / "evaluation_metadata.jsonl").read_text()
    assert "\n".join(geneval_prompts.lines()) + "\n" == released
    from_file = geneval.prompts(str(DATA / "geneval" / "evaluation_metadata.jsonl"))
    assert from_file == geneval.prompts(None)


def test_the_grammar_of_geneval_has_its_oddities() -> None:
    assert [geneval_prompts.plural(word) for word in ("bus", "toothbrush", "person")] == [
        "buses", "toothbrushs", "persons"
    ]  # fmt: skip
    assert [geneval_prompts.article(word) for word in ("orange cat", "cat", "umbrella")] == [
        "an orange cat", "a cat", "an umbrella"
    ]  # fmt: skip


def test_a_changed_stream_of_numpy_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    geneval_prompts.lines.cache_clear()
    monkeypatch.setattr(geneval_prompts, "SEED", 44)
    with pytest.raises(UserError, match="does not draw GenEval's 553 prompts"):
        geneval_prompts.lines()
    geneval_prompts.lines.cache_clear()


def test_geneval_needs_metadata(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}\n')
    with pytest.raises(UserError, match="no 'tag' and 'include'"):
        geneval.prompts(str(tmp_path / "p.jsonl"))


def test_hpsv2_reads_four_files_in_order(tmp_path: Path) -> None:
    for number, style in enumerate(hpsv2.STYLES):
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(number + 1)]))
    found = hpsv2.prompts(str(tmp_path))
    assert [hpsv2.file(prompt.metadata, 0) for prompt in found][:3] == [
        "anime/00000.png", "concept-art/00000.png", "concept-art/00001.png"
    ]  # fmt: skip
    assert Counter(prompt.metadata["tag"] for prompt in found) == {s: n for n, s in enumerate(hpsv2.STYLES, start=1)}
    (tmp_path / "photo.json").write_text("{}")
    with pytest.raises(UserError, match="JSON list of prompts"):
        hpsv2.prompts(str(tmp_path))
    with pytest.raises(UserError, match="expected the benchmark's file anime.json"):
        fetch(str(tmp_path / "none"), "anime.json")
    with pytest.raises(UserError, match="expected hub:owner"):
        fetch("hub:owner", "anime.json")


@needs_data
def test_compbench_reads_eight_categories_and_the_kinds_of_complex_prompts() -> None:
    found = compbench.prompts(str(DATA / "t2i_compbench"))
    assert Counter(prompt.metadata["tag"] for prompt in found) == dict.fromkeys(compbench.CATEGORIES, 300)
    kinds = Counter(prompt.metadata.get("complex_kind") for prompt in found)
    assert kinds == {None: 2100, "action": 212, "spatial": 58, "both": 30}
    with pytest.raises(UserError, match="color_val"):
        compbench.prompts(None)


@needs_data
@pytest.mark.parametrize(
    ("name", "points"),
    [("test_prompts_en.csv", 1813), ("test_prompts_zh.csv", 1813), ("test_prompts_en_long.csv", None)],
)
def test_unigenbench_reads_the_released_files(name: str, points: int | None) -> None:
    found = unigenbench.prompts(str(DATA / "unigenbench" / name))
    assert [prompt.metadata["number"] for prompt in found] == list(range(600))
    counted = [point for prompt in found for point in prompt.metadata["testpoints"]]
    assert points is None or len(counted) == points
    assert all(len(p.metadata["testpoints"]) == len(p.metadata["descriptions"]) for p in found)
    assert len({unigenbench.primary(point) for point in counted}) == 10
    if name == "test_prompts_en.csv":  # the sizes of the dimensions as published
        assert Counter(map(unigenbench.primary, counted)) == {
            "Action": 263, "Style": 250, "Attribute": 234, "Relationship": 197, "Compound": 194, "Grammar": 187,
            "World Knowledge": 158, "Entity Layout": 134, "Logical Reasoning": 109, "Text Generation": 87,
        }  # fmt: skip


def test_unigenbench_mends_a_lacking_comma_and_nothing_else(tmp_path: Path) -> None:
    def file(points: str) -> str:
        cell = f'{{"Testpoints": {points}, "Testpoint Description": ["x", "y"]}}'.replace('"', '""')
        (tmp_path / "p.csv").write_text(f'index,prompt_en,sub_dims_en\n7,"a, cat","{cell}"\n')
        return str(tmp_path / "p.csv")

    for points in ('["A - B", "C"]', '["A - B" "C"]'):
        (found,) = unigenbench.prompts(file(points))
        assert found.text == "a, cat" and found.metadata["testpoints"] == ["A - B", "C"]
        assert unigenbench.file(found.metadata, 2) == "7_2.png"
    for points, said in (('["A"]', "as many test points"), ("[", "no JSON object")):
        with pytest.raises(UserError, match=said):
            unigenbench.prompts(file(points))
    whole = (Path(file('["A - B", "C"]'))).read_text()
    for index in ("x", ""):
        (tmp_path / "p.csv").write_text(whole.replace("\n7,", f"\n{index},"))
        with pytest.raises(UserError, match="expected a whole number"):
            unigenbench.prompts(str(tmp_path / "p.csv"))
    (tmp_path / "q.csv").write_text("index,prompt\n1,a\n")
    with pytest.raises(UserError, match="expected index, prompt_en"):
        unigenbench.prompts(str(tmp_path / "q.csv"))


@needs_data
def test_parti_has_its_categories_and_challenges() -> None:
    found = plain.parti(str(DATA / "partiprompts"))
    assert len(found) == 1632 and len({prompt.metadata["tag"] for prompt in found}) == 12
    assert len({prompt.metadata["challenge"] for prompt in found}) == 11
    assert found == plain.parti(str(DATA / "partiprompts" / "PartiPrompts.tsv"))


def test_drawbench_counts_repeated_lines_once(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('Prompts,Category\n"a, b",Colors\nc,Text\n"a, b",Colors\n')
    assert [(p.text, p.metadata["tag"], p.metadata["number"]) for p in plain.drawbench(str(tmp_path / "d.csv"))] == [
        ("a, b", "Colors", 0), ("c", "Text", 1)
    ]  # fmt: skip
    (tmp_path / "d.txt").write_text("a\na\nb\n")
    assert [prompt.text for prompt in plain.drawbench(str(tmp_path / "d.txt"))] == ["a", "b"]
    (tmp_path / "d.csv").write_text("Prompts,Category\na,x\nb\n")
    with pytest.raises(UserError, match="row 2: got"):
        plain.drawbench(str(tmp_path / "d.csv"))
    (tmp_path / "d.csv").write_text("prompt\na\n")
    with pytest.raises(UserError, match="expected Prompts, Category"):
        plain.drawbench(str(tmp_path / "d.csv"))


@pytest.mark.parametrize(
    "reader", [plain.parti, plain.drawbench, plain.any_source, compbench.prompts, unigenbench.prompts]
)
def test_suites_without_prompts_in_the_box_say_where_to_get_them(reader: Any) -> None:
    with pytest.raises(UserError, match="expected --prompts"):
        reader(None)


def test_any_source_takes_its_categories(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,category\na,x\nb,y\n")
    assert [prompt.metadata["tag"] for prompt in plain.any_source(str(tmp_path / "p.csv"))] == ["x", "y"]
    assert plain.any_source("shapes:test")[0].metadata["number"] == 0
