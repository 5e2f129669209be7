"""Reading reference images: order, missing files, seeded draws, pixels."""

import json

import pytest
import torch
from PIL import Image

from reward_models.references import References, load_references, read_image, read_images


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("b/2.png", "red"), ("b/1.PNG", "blue"), ("a.jpg", "green")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (6, 4), colour).save(path)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_folder_serves_every_prompt_in_sorted_order(folder):
    found = load_references(folder)
    assert [f.relative_to(folder).as_posix() for f in found.files] == ["a.jpg", "b/1.PNG", "b/2.png"]
    assert found.of("anything") == found.files and load_references(found) is found


@pytest.mark.parametrize("form", ["mapping", "list", "lines"])
def test_manifests_of_every_form_say_the_same(folder, form):
    entries = {"two": ["b/2.png", "b/1.PNG"], "one": ["a.jpg"]}
    rows = [{"prompt": p, "files": f} for p, f in entries.items()]
    path = folder / ("m.jsonl" if form == "lines" else "m.json")
    path.write_text(
        "\n".join(map(json.dumps, rows)) + "\n\n"
        if form == "lines"
        else json.dumps(entries if form == "mapping" else rows)
    )
    found = load_references(path)
    assert list(found.by_prompt) == ["two", "one"] and found.of("two") == (folder / "b/2.png", folder / "b/1.PNG")
    assert found.of("three") == () and len(found.files) == 3


def test_missing_files_are_counted_and_named(folder):
    path = folder / "m.json"
    path.write_text(json.dumps({"one": ["a.jpg", "gone.png"], "two": ["lost.png"]}))
    with pytest.raises(ValueError, match=r"2 files that are not there.*gone\.png.*lost\.png"):
        load_references(path)


@pytest.mark.parametrize("text", ["{", "3", '[{"prompt": "a"}]', '{"a": [1]}', '{"a": {"b": 1}}', "{}"])
def test_other_manifests_are_refused(folder, text):
    path = folder / "m.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="manifest"):
        load_references(path)


def test_sources_that_are_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="without images"):
        load_references(tmp_path)
    with pytest.raises(ValueError, match="expected a folder"):
        load_references(tmp_path / "nowhere")


def test_draws_depend_on_key_and_prompt_alone_and_repeat_only_when_they_must():
    files = tuple(range(8))
    references = References({"a": files}, shared=files)
    assert references.draw("a", 5, 1) == references.draw("a", 5, 1)
    assert len({tuple(references.draw(p, 5, k)) for p in "abc" for k in range(3)}) == 9
    assert sorted(references.draw("a", 8, 7)) == list(range(8))
    assert sorted(references.draw("a", 16, 7)) == sorted(2 * files)
    with pytest.raises(ValueError, match="without reference images"):
        References({"a": files}).draw("b", 1, 0)


def test_subset_keeps_order_and_size():
    references = References({"a": tuple(range(20)), "b": (1, 2)}, shared=tuple(range(9)))
    some = references.subset(4, seed=1)
    assert list(map(len, some.by_prompt.values())) == [4, 2] and len(some.shared) == 4
    assert list(some.of("a")) == sorted(some.of("a"))
    assert some == references.subset(4, seed=1) != references.subset(4, seed=2)


def test_images_are_cut_to_the_ratio_and_transparency_is_white(tmp_path):
    image = Image.new("RGBA", (8, 4), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 2, 4))
    image.save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png")
    assert (
        pixels.shape == (3, 4, 8) and pixels[:, 0, 0].tolist() == [255] * 3 and pixels[:, 0, 5].tolist() == [255, 0, 0]
    )
    square = read_images([tmp_path / "a.png"], (4, 4))  # the middle four columns, all red
    assert torch.equal(square[0], torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 4, 4))
    assert read_images([], (4, 4)).shape == (0, 3, 4, 4)
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(ValueError, match="b.png"):
        read_image(tmp_path / "b.png")
