"""Sheets show every pixel of a small picture, and pictures keep their 8-bit values."""

import numpy as np
import pytest
import torch
from PIL import Image

from flowrl.sheets import before_after_sheet, font, save_png, sheet, strength_sheet, to_pil, visible, wrapped


def noise(seed, size=64):
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed))


def contains(page, picture):
    """Where `picture` occurs in `page`, pixel for pixel: (left, top), or None."""
    page, picture = np.asarray(page).astype(np.int16), np.asarray(picture).astype(np.int16)
    h, w = picture.shape[:2]
    corners = np.argwhere((page == picture[0, 0]).all(-1))
    for top, left in corners:
        if page[top : top + h, left : left + w].shape == picture.shape and (
            (page[top : top + h, left : left + w] == picture).all()
        ):
            return int(left), int(top)
    return None


def test_tensors_are_rounded_to_the_8_bit_grid():
    image = torch.tensor([0.0, 1.0, 0.5, 1.7, -0.3, 100.4 / 255]).reshape(1, 1, 6).expand(3, 1, 6)
    assert np.asarray(to_pil(image))[0, :, 0].tolist() == [0, 255, 128, 255, 0, 100]


def test_small_pictures_are_enlarged_by_squares():
    picture = noise(0)
    large = np.asarray(visible(picture))
    assert large.shape == (192, 192, 3)  # 3 is the least whole factor that reaches 160
    for dy in range(3):
        for dx in range(3):
            assert (large[dy::3, dx::3] == np.asarray(to_pil(picture))).all()


@pytest.mark.parametrize(
    ("size", "shown"),
    [((160, 160), (160, 160)), ((512, 300), (512, 300)), ((1024, 768), (512, 384)), ((8, 4), (160, 80))],
)
def test_sizes(size, shown):
    assert visible(Image.new("RGB", size)).size == shown


def test_saved_png_is_lossless(tmp_path):
    picture = noise(1)
    path = save_png(tmp_path / "samples" / "p0.png", picture)
    assert (np.asarray(Image.open(path)) == np.asarray(to_pil(picture))).all()


def test_before_after_pairs_stand_side_by_side():
    before, after = [[noise(0), noise(1)], [noise(2), noise(3)]], [[noise(4), noise(5)], [noise(6), noise(7)]]
    page = before_after_sheet(["first", "second"], before, after, [[("0.00", "1.00")] * 2] * 2)
    places = {}
    for i in range(2):
        for k in range(2):
            old, new = contains(page, visible(before[i][k])), contains(page, visible(after[i][k]))
            assert old and new and old[1] == new[1] and new[0] > old[0]  # same row, after to the right
            places[i, k] = old
    assert places[0, 0][0] == places[1, 0][0] and places[0, 0][1] < places[1, 0][1]
    step = places[0, 1][0] - places[0, 0][0]
    inside = contains(page, visible(after[0][0]))[0] - places[0, 0][0]
    assert step - inside > inside - 192  # the gap between pairs is wider than the one inside a pair


def test_strength_sheet_is_prompts_by_strengths():
    pictures = [[noise(10 * i + j) for j in range(4)] for i in range(2)]
    page = strength_sheet(["a", "b"], pictures, ["0", "0.5", "1", "1.5"])
    lefts = [contains(page, visible(pictures[0][j]))[0] for j in range(4)]
    assert lefts == sorted(set(lefts))
    assert lefts == [contains(page, visible(pictures[1][j]))[0] for j in range(4)]


def test_text_never_breaks_a_sheet():
    prompts = ["", "x" * 500, "many words " * 60, "<b>&amp;</b>\nline\ttab", "красный круг 红色圆圈 🔴"]
    page = sheet(
        [[noise(i), None] for i in range(5)],
        row_captions=prompts,
        column_titles=["a title that is far too long for its column and is cut", ""],
        captions=[["1.000", ""]] * 5,
        title="t" * 300,
        note="n " * 300,
    )
    assert page.width < 600 and all(contains(page, visible(noise(i))) for i in range(5))


def test_mixed_sizes_and_no_rows():
    page = sheet([[noise(0, 64), noise(1, 100)]], row_captions=["p"], column_titles=["a", "b"])
    assert contains(page, visible(noise(1, 100)))
    assert sheet([], row_captions=[], column_titles=[]).size[0] > 0


def test_errors_name_the_trouble():
    with pytest.raises(ValueError, match=r"shape \(1, 3, 8, 8\), expected \(3, H, W\)"):
        to_pil(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="1 rows of .* for 2 captions"):
        sheet([[noise(0)]], row_captions=["a", "b"], column_titles=["x"])
    with pytest.raises(ValueError, match="one title per column"):
        sheet([[noise(0)]], row_captions=["a"], column_titles=["x", "y"])


def test_wrapped_lines_fit_and_lose_no_letter():
    face = font(20)
    text = "some  words\nand " + "W" * 60 + " and one more"
    for width in (60, 150, 400):
        lines = wrapped(text, face, width)
        assert all(face.getlength(line) <= width for line in lines)
        assert "".join(lines).replace(" ", "") == "".join(text.split())
    assert wrapped("some words and more", face, 1000) == ["some words and more"] and wrapped(" ", face, 60) == []
