"""`flowrl score`: what counts as images, what is scored again, and what becomes of images that cannot be scored."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowrl import score_table
from flowrl.commands import scoring
from flowrl.commands.progress import Progress
from flowrl.errors import UserError
from flowrl.images import Item, Unreadable, find, items, read_image
from reward_models.protocol import RewardError, RewardResult, RewardSpec


class Red:
    """Mean of the red channel; counts what it is asked, and raises for images that are wholly green."""

    def __init__(self, version: str = "1", scope: Any = "point") -> None:
        self.spec = RewardSpec("red", version=version, scope=scope)
        self.asked: list[int] = []

    def score(self, images: Any, prompts: Any, metadata: Any, groups: Any = None) -> RewardResult:
        self.asked.append(len(images))
        if bool((images[:, 1].flatten(1).min(1).values == 1).any()):
            raise RuntimeError("too green")
        red = images[:, 0].flatten(1).mean(1)
        if self.spec.scope == "group":  # minus the mean of the group
            red = red - torch.stack([red[groups == group].mean() for group in groups])
        missing = torch.tensor([given.get("hide", False) for given in metadata])
        return RewardResult(torch.where(missing, torch.nan, red), {"half": red / 2})


def picture(path: Path, red: int = 0, green: int = 0, size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (red, green, 0)).save(path)
    return path


def folder(path: Path, reds: Sequence[int], prompts: Sequence[str] | None = None, **more: Any) -> Path:
    """Images 0.png, 1.png, ... with a listing."""
    rows = []
    for i, red in enumerate(reds):
        picture(path / f"{i}.png", red)
        rows.append({"image": f"{i}.png", "prompt": prompts[i] if prompts else f"p{i}", **more})
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scored(path: Path, reward: Any, name: str = "red", **options: Any) -> scoring.Scored:
    return scoring.score_items(find([path]), {name: reward}, path / "scores.jsonl", **options)


# --------------------------------------------------------------------------------------------------------------- images
def test_a_folder_with_a_listing_keeps_metadata_and_numbers_of_images(tmp_path: Path) -> None:
    found = find([folder(tmp_path, [1, 2, 3], ["a", "b", "a"], tag="t", index=7)])
    assert [(item.image, item.prompt, item.prompt_id) for item in found] == [
        ("0.png", "a", 0), ("1.png", "b", 1), ("2.png", "a", 0)
    ]  # fmt: skip
    assert found[0].metadata == {"prompt": "a", "tag": "t"} and found[0].seed_index == 7
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match=r"'1\.png' is missing"):
        find([tmp_path])


def test_a_plain_folder_takes_prompts_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.png", "sheet.png", "notes.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    found = find([tmp_path], prompts=str(tmp_path / "p.txt"))
    assert [(item.image, item.prompt) for item in found] == [("a.png", "one"), ("b.jpg", "two")]
    assert [item.prompt for item in find([tmp_path], texts=["same"])] == ["same", "same"]
    with pytest.raises(UserError, match="--prompts FILE"):
        find([tmp_path])
    with pytest.raises(UserError, match="2 images and 3 prompts"):
        find([tmp_path], texts=["1", "2", "3"])
    with pytest.raises(UserError, match="two sources of prompts"):
        find([tmp_path], prompts=str(tmp_path / "p.txt"), texts=["a"])


def test_patterns_and_files_with_prompts(tmp_path: Path) -> None:
    for name in ("x/a.png", "x/b.png", "y/c.webp", "y/d.txt"):
        picture(tmp_path / name) if name[-3:] != "txt" else (tmp_path / name).write_text("x")
    found = find([f"{tmp_path}/*/*"], texts=["a", "b", "c"])
    assert [(Path(item.image).name, item.prompt) for item in found] == [("a.png", "a"), ("b.png", "b"), ("c.webp", "c")]
    assert len(find([tmp_path / "x/a.png", tmp_path / "x/b.png"], texts=["a"])) == 2
    with pytest.raises(UserError, match="matches no image"):
        find([f"{tmp_path}/*.bmp"], texts=["a"])
    with pytest.raises(UserError, match="is not there"):
        find([tmp_path / "none.png"], texts=["a"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.csv", "file_name,prompt,tag\nx/a.png,one,t\nb.png,two,t\n"),
        ("m.jsonl", '{"file": "x/a.png", "prompt": "one", "tag": "t"}\n{"path": "b.png", "prompt": "two", "tag": "t"}'),
        ("m.json", '[{"image": "x/a.png", "prompt": "one", "tag": "t"}, {"image": "b.png", "prompt": "two"}]'),
        ("n.json", '{"x/a.png": "one", "b.png": "two"}'),
    ],
)
def test_manifests_name_files_beside_them(tmp_path: Path, name: str, content: str) -> None:
    picture(tmp_path / "x/a.png")
    picture(tmp_path / "b.png")
    (tmp_path / name).write_text(content)
    found = find([tmp_path / name])
    assert [(item.image, item.prompt) for item in found] == [("x/a.png", "one"), ("b.png", "two")]
    assert all(item.path.is_file() for item in found)
    assert name == "n.json" or found[0].metadata["tag"] == "t"


def test_bad_manifests_are_explained(tmp_path: Path) -> None:
    for content, said in (("[1]", "list of objects"), ("{", "expected JSON"), ('[{"prompt": "a"}]', "no file under")):
        (tmp_path / "m.json").write_text(content)
        with pytest.raises(UserError, match=said):
            find([tmp_path / "m.json"])
    picture(tmp_path / "a.png")
    with pytest.raises(UserError, match="twice"):
        items(tmp_path, [{"image": "a.png", "prompt": "a"}] * 2, "the list")
    for content, said in (
        ('{"a.png": "one", "a.png": "two"}', "the key 'a.png' comes twice"),
        ('{"a.png": " "}', "entry 1: the prompt is ' '"),
        ('[{"image": "a.png", "prompt": "a"}, {"image": "a.png"}]', "entry 2: the prompt is None"),
        ('[{"image": "a.png", "prompt": "a", "rating": NaN}]', "cannot be written as JSON"),
    ):
        (tmp_path / "m.json").write_text(content)
        with pytest.raises(UserError, match=said):
            find([tmp_path / "m.json"])
    (tmp_path / "m.json").write_text('{"a.png": " one "}', encoding="utf-8-sig")  # as spreadsheets write it
    assert find([tmp_path / "m.json"])[0].prompt == "one"


def test_a_column_called_index_need_not_hold_numbers_of_images(tmp_path: Path) -> None:
    for i, index in enumerate(("0", "", "first", "1.5", "7")):
        picture(tmp_path / f"{i}.png")
        (tmp_path / "m.csv").write_text(f"image,prompt,index\n{i}.png,a,{index}\n")
        assert find([tmp_path / "m.csv"])[0].seed_index == {"0": 0, "7": 7}.get(index)


def test_folders_without_images_and_sources_that_do_not_go_together(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for texts in ([], ["a"]):
        with pytest.raises(UserError, match="holds no images"):
            find([tmp_path / "empty"], texts=texts)
    for name in ("x/a.png", "y/b.png"):
        picture(tmp_path / name)
    with pytest.raises(UserError, match="expected one folder"):
        find([tmp_path / "x", tmp_path / "y"], texts=["a"])
    with pytest.raises(UserError, match=r"a\.png' comes twice"):
        find([tmp_path / "x/a.png", f"{tmp_path}/x/*.png"], texts=["a"])


def test_genevals_folders_are_read_and_other_files_ignored(tmp_path: Path) -> None:
    for number in ("00000", "00012", "notes"):
        (tmp_path / number).mkdir()
        (tmp_path / number / "metadata.jsonl").write_text(json.dumps({"prompt": number, "tag": "t", "include": []}))
        for name in ("0000.png", "0001.png", "grid.png"):
            picture(tmp_path / number / "samples" / name)
    found = find([tmp_path])
    assert [(item.image, item.seed_index) for item in found] == [
        (f"{number}/samples/{i:04d}.png", i) for number in ("00000", "00012") for i in (0, 1)
    ]
    assert found[0].metadata == {"prompt": "00000", "tag": "t", "include": []}


def test_images_are_turned_by_their_exif_and_lose_their_alpha(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2), (255, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "t.png", exif=exif)
    assert read_image(tmp_path / "t.png").shape == (3, 4, 2)
    Image.new("RGBA", (2, 2), (51, 0, 0, 9)).save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png")[0], torch.full((2, 2), 51 / 255))


def test_images_of_more_than_eight_bits_are_missing_and_not_white(tmp_path: Path) -> None:
    Image.fromarray(np.arange(0, 40000, 10000, dtype=np.uint16).reshape(2, 2)).save(tmp_path / "deep.png")
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "float.tif")
    for name in ("deep.png", "float.tif"):
        with pytest.raises(Unreadable, match="more than 8 bits"):
            read_image(tmp_path / name)


# -------------------------------------------------------------------------------------------------------------- scoring
def test_rows_hold_scores_parts_and_the_hash_of_the_file(tmp_path: Path) -> None:
    done = scored(folder(tmp_path, [0, 51, 255]), Red())
    assert [row["scores"]["red"] for row in done.rows] == pytest.approx([0, 0.2, 1])
    assert [row["parts"]["red"]["half"] for row in done.rows] == pytest.approx([0, 0.1, 0.5])
    columns, rows = score_table.read(tmp_path / "scores.jsonl")
    assert rows == done.rows and columns["red"]["version"] == "1" and columns["red"]["range"] == [None, None]
    assert len({row["sha256"] for row in rows}) == 3 and done.new == 3 and done.kept == 0
    assert "3 scores computed" in done.throughput() and "a second" in done.throughput()


def test_only_what_changed_is_scored_again(tmp_path: Path) -> None:
    scored(folder(tmp_path, [10, 20, 30]), Red())
    again = Red()
    assert scored(tmp_path, again).kept == 3 and again.asked == []
    picture(tmp_path / "1.png", 200)
    assert scored(tmp_path, again).new == 1 and again.asked == [1]
    listing = (tmp_path / "samples.jsonl").read_text().replace('"p2"', '"another"')
    (tmp_path / "samples.jsonl").write_text(listing)
    done = scored(tmp_path, again)
    assert again.asked == [1, 1] and [row["scores"]["red"] for row in done.rows] == pytest.approx(
        [10 / 255, 200 / 255, 30 / 255]
    )
    both = scored(tmp_path, Red(), name="second")  # a new column: scored, and the first one stays
    assert both.new == 3 and set(both.rows[0]["scores"]) == {"red", "second"} == set(both.columns)


def test_another_version_of_a_reward_is_refused(tmp_path: Path) -> None:
    scored(folder(tmp_path, [10]), Red())
    with pytest.raises(UserError, match=r"another version \('1' there, '2' now\)"):
        scored(tmp_path, Red(version="2"))
    with pytest.raises(UserError, match="scores of 1 images that are not among these"):
        (tmp_path / "samples.jsonl").write_text('{"image": "b.png", "prompt": "p"}\n')
        picture(tmp_path / "b.png")
        scored(tmp_path, Red())


def test_a_killed_run_loses_one_batch_at_most(tmp_path: Path) -> None:
    class Dies(Red):
        def score(self, images: Any, prompts: Any, metadata: Any, groups: Any = None) -> RewardResult:
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().score(images, prompts, metadata, groups)

    folder(tmp_path, range(10))
    with pytest.raises(KeyboardInterrupt):
        scored(tmp_path, Dies(), batch=3)
    with open(tmp_path / "scores.jsonl", "ab") as file:  # a line that the kill cut in half
        file.write(b'{"image": "9.png", "sco')
    last = Red()
    done = scored(tmp_path, last, batch=3)
    assert done.kept == 6 and last.asked == [3, 1]
    whole = [row["scores"] for row in done.rows]
    (tmp_path / "scores.jsonl").unlink()
    assert whole == [row["scores"] for row in scored(tmp_path, Red()).rows]


def test_images_that_cannot_be_scored_are_missing_with_a_reason(tmp_path: Path) -> None:
    folder(tmp_path, [10, 20, 30, 40])
    picture(tmp_path / "1.png", 0, 255)  # makes the reward raise
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[:40])
    (tmp_path / "3.png").write_text("no image")
    done = scored(tmp_path, Red())
    assert [row["scores"]["red"] for row in done.rows] == [pytest.approx(10 / 255), None, None, None]
    assert "too green" in done.rows[1]["reasons"]["red"] and "cannot read 2.png" in done.rows[2]["reasons"]["red"]
    (tmp_path / "2.png").write_bytes(whole)  # mended, so it is scored now
    done = scored(tmp_path, Red())
    assert done.rows[2]["scores"]["red"] == pytest.approx(30 / 255) and "red" not in done.rows[2]["reasons"]


def test_a_reward_that_fails_for_all_images_ends_the_run(tmp_path: Path) -> None:
    folder(tmp_path, [0, 0])
    for i in range(2):
        picture(tmp_path / f"{i}.png", 0, 255)
    with pytest.raises(RewardError, match="too green"):
        scored(tmp_path, Red())


def test_groups_are_scored_whole_and_again_when_one_is_new(tmp_path: Path) -> None:
    folder(tmp_path, [0, 51, 102, 255], ["a", "b", "a", "b"])
    (tmp_path / "samples.jsonl").write_text(
        "".join(line + "\n" for line in (tmp_path / "samples.jsonl").read_text().splitlines()[:3])
    )
    reward = Red(scope="group")
    done = scored(tmp_path, reward, batch=1)  # batches never cut a group
    assert [row["scores"]["red"] for row in done.rows] == pytest.approx([-0.2, 0, 0.2], abs=1e-6)
    assert reward.asked == [2, 1]
    with open(tmp_path / "samples.jsonl", "a") as file:
        file.write('{"image": "3.png", "prompt": "b"}\n')
    done = scored(tmp_path, reward)
    assert reward.asked == [2, 1, 2]
    assert [row["scores"]["red"] for row in done.rows] == pytest.approx([-0.2, -0.4, 0.2, 0.4], abs=1e-6)


def test_many_images_of_one_prompt_are_cut_into_batches_where_they_are_scored_alone(tmp_path: Path) -> None:
    """A folder with one prompt for all: it must not be read at once, nor lost at once."""
    folder(tmp_path, range(10), ["a"] * 10)
    alone, together = Red(), Red(scope="group")
    scored(tmp_path, alone, batch=4)
    scored(tmp_path, together, name="group", batch=4)
    assert alone.asked == [4, 4, 2] and together.asked == [10]


def test_sizes_may_differ_where_images_are_scored_alone(tmp_path: Path) -> None:
    folder(tmp_path, [10, 20, 30], ["a", "a", "a"])
    picture(tmp_path / "1.png", 200, size=16)
    assert scored(tmp_path, Red()).rows[1]["scores"]["red"] == pytest.approx(200 / 255)
    with pytest.raises(UserError, match="different sizes"):
        scored(tmp_path, Red(scope="group"), name="group")


def test_scores_do_not_depend_on_batches(tmp_path: Path) -> None:
    folder(tmp_path, range(0, 250, 10))
    found = find([tmp_path])
    one = scoring.score_items(found, {"red": Red()}, tmp_path / "one.jsonl", batch=1)
    many = scoring.score_items(found, {"red": Red()}, tmp_path / "many.jsonl", batch=7)
    assert one.rows == many.rows


# -------------------------------------------------------------------------------------------------------------- outputs
def test_every_format_is_written_and_prompts_are_escaped(tmp_path: Path) -> None:
    folder(tmp_path / "i", [0, 51, 255], ["<script>alert(1)</script>", 'say "hi", you', "c"], tag="t")
    said: list[str] = []
    outs = [tmp_path / name for name in ("s.csv", "s.json", "s.html")]
    store = scoring.score([tmp_path / "i"], "jpeg,jpeg-incompress", outs=outs, say=said.append)
    assert store == tmp_path / "s.jsonl"
    rows = score_table.read(store)[1]
    table = list(csv.DictReader(open(outs[0], newline="")))
    assert [row["prompt"] for row in table] == [row["prompt"] for row in rows]
    assert [float(row["jpeg"]) for row in table] == [row["scores"]["jpeg"] for row in rows]
    content = json.loads(outs[1].read_text())
    sizes = [row["scores"]["jpeg-incompress"] for row in rows]
    assert content["means"]["jpeg-incompress"]["mean"] == pytest.approx(np.mean(sizes))
    assert content["rows"] == rows and content["columns"]["jpeg"]["name"] == "jpeg"
    page = outs[2].read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and page.count("data:image/png;base64,") == 3
    assert any("jpeg of 3 images, 0 without a score" in line for line in said)
    assert any("6 scores computed" in line for line in said)
    assert "Means are those of" not in page  # one task
    with pytest.raises(UserError, match=r"ends in \.jsonl"):
        scoring.score([tmp_path / "i"], "jpeg", outs=[tmp_path / "x.txt"])
    with pytest.raises(UserError, match="expected one table"):
        scoring.score([tmp_path / "i"], "jpeg", outs=[tmp_path / "x.jsonl", tmp_path / "y.jsonl"])


def test_the_table_lies_where_its_names_are_relative_to_and_folders_are_made(tmp_path: Path) -> None:
    folder(tmp_path / "i", [0, 51])
    (tmp_path / "i/m.json").write_text('{"0.png": "a"}')
    assert scoring.score([tmp_path / "i/m.json"], "jpeg", say=str) == tmp_path / "i/scores.jsonl"
    manifest = (tmp_path / "i/m.json").read_text()
    with pytest.raises(UserError, match="is what is read"):
        scoring.score([tmp_path / "i/m.json"], "jpeg", outs=[tmp_path / "i/m.json"], say=str)
    with pytest.raises(UserError, match=r"scores\.jsonl is what is read"):
        scoring.score([tmp_path / "i/scores.jsonl"], "jpeg", say=str)
    assert (tmp_path / "i/m.json").read_text() == manifest
    (tmp_path / "i/scores.jsonl").unlink()
    new = tmp_path / "new/deep/s.html"
    assert scoring.score([tmp_path / "i"], "jpeg", outs=[new], say=str) == new.with_suffix(".jsonl")
    assert new.is_file()
    with pytest.raises(UserError, match="cannot make the folder"):
        scoring.score([tmp_path / "i"], "jpeg", outs=[new / "under a file" / "s.csv"], say=str)


def test_a_folder_that_cannot_be_written_to_is_said_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path, [0])
    monkeypatch.setattr("os.access", lambda *_: False)  # permissions do not bind the superuser
    with pytest.raises(UserError, match="cannot be written to"):
        scoring.score([tmp_path], "jpeg", say=str)
    assert not (tmp_path / "scores.jsonl").exists()


def test_the_page_shows_each_task_and_what_is_missing(tmp_path: Path) -> None:
    found = find([folder(tmp_path, [0, 51, 255, 9])])
    rows = [Item(**{**vars(item), "metadata": {"tag": ["动作", "<b>$y$"][i % 2]}}) for i, item in enumerate(found)]
    picture(tmp_path / "3.png", 0, 255)  # makes the reward raise
    done = scoring.score_items(rows, {"red": Red()}, tmp_path / "s.jsonl")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as those about glyphs that a font lacks
        page = scoring.page(done, {item.image: item.path for item in rows})
    assert "动作" in page and "<b>" not in page and "&lt;b&gt;$y$" in page
    assert "red: mean of each task" in page and "<svg" in page and "Means are those of the 2 task means" in page
    assert "red: missing" in page and "too green" in page
    assert "without a score (reward" in f"1 without a score{scoring._why(done.rows, 'red')}"


def test_what_reward_names_mean() -> None:
    assert list(scoring.load_rewards("jpeg, jpeg-incompress")) == ["jpeg", "jpeg-incompress"]
    assert list(scoring.load_rewards("{jpeg: 1, jpeg-incompress: 0.5}")) == ["1 jpeg + 0.5 jpeg-incompress"]
    assert list(scoring.load_rewards("[jpeg, {shapes-soft: {flow_grpo_compat: true}}]")) == ["jpeg", "shapes-soft"]
    with pytest.raises(UserError, match="twice"):
        scoring.load_rewards("jpeg,jpeg")
    with pytest.raises(UserError, match="unknown reward 'jpgg'"):
        scoring.load_rewards("jpgg")


@pytest.mark.parametrize(
    "text", ["jpgg", "jpeg,jpgg", "{jpeg: 1, jpgg: 1}", "[jpeg, {jpgg: {path: x}}]", "{jpeg: x}", "{jpeg: ", "[]", ""]
)
def test_what_names_no_reward_is_refused_without_loading(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError):
        scoring.check_rewards(text)


def test_good_rewards_pass_the_check_unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowrl.rewards.load_reward", lambda *_: pytest.fail("loaded"))
    for text in ("jpeg, pickscore", "{hpsv2: 1, jpeg: 0.1}", "[{clip: {path: X}}, my_module:Mine]"):
        scoring.check_rewards(text)


def test_long_work_says_now_and_then_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 11.0, 12.0, 21.5])
    monkeypatch.setattr("flowrl.commands.progress.time.monotonic", lambda: next(clock))
    said: list[str] = []
    tell = Progress(said.append, 9, "images drawn")
    for done in (1, 2, 3, 4):
        tell(done)
    assert said == ["2 of 9 images drawn", "4 of 9 images drawn"]


def test_a_damaged_or_foreign_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text('{"image": "a"}\n')
    with pytest.raises(UserError, match="no 'prompt' and 'scores'"):
        score_table.read(tmp_path / "s.jsonl")
    (tmp_path / "s.meta.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        score_table.read(tmp_path / "s.jsonl")


def test_an_image_that_vanishes_while_scoring_is_missing(tmp_path: Path) -> None:
    item = Item("gone.png", tmp_path / "gone.png", "p", 0, 0, {})
    other = Item("a.png", picture(tmp_path / "a.png", 51), "q", 1, 0, {})
    done = scoring.score_items([item, other], {"red": Red()}, tmp_path / "s.jsonl")
    assert done.rows[0]["scores"]["red"] is None and done.rows[0]["sha256"] is None
    assert done.rows[1]["scores"]["red"] == pytest.approx(0.2)
