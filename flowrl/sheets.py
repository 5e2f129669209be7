"""Contact sheets: pictures with captions on one PNG, so that a person judges by eye first.

Pictures are `(3, H, W)` float tensors in [0, 1] or PIL images. Small ones (64 px) are enlarged by a whole factor
without smoothing, so that every pixel of the model stays visible as one square.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

Picture = torch.Tensor | Image.Image
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
MIN_SIDE, MAX_SIDE = 160, 512  # pixels a picture takes up on a sheet
INK, SOFT, PAPER = "#1b1f24", "#68717b", "#ffffff"
MARGIN, GAP = 20, 8


def to_pil(picture: Picture) -> Image.Image:
    """An 8-bit RGB image; tensors are clamped to [0, 1] and rounded to the 8-bit grid."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(
            f"got a picture of shape {tuple(picture.shape)}, expected (3, H, W); pass one image at a time, as RGB"
        )
    levels = (picture.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(levels.permute(1, 2, 0).cpu().numpy()))


def visible(picture: Picture, min_side: int = MIN_SIDE, max_side: int = MAX_SIDE) -> Image.Image:
    """A size that a person sees: small pictures times a whole number (nearest neighbour), large ones reduced."""
    image = to_pil(picture)
    longest = max(image.size)
    if longest < min_side:
        factor = -(-min_side // longest)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if longest > max_side:
        size = (max(1, image.width * max_side // longest), max(1, image.height * max_side // longest))
        return image.resize(size, Image.Resampling.LANCZOS)
    return image


def save_png(path: str | Path, picture: Picture) -> Path:
    """Save one picture in its own size, losslessly; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(picture).save(path)
    return path


def sheet(
    rows: Sequence[Sequence[Picture | None]],
    *,
    row_captions: Sequence[str],
    column_titles: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
    title: str = "",
    note: str = "",
    column_gaps: Sequence[int] = (),
) -> Image.Image:
    """A table of pictures: `rows[i][j]` under `column_titles[j]`, with `row_captions[i]` (the prompt) above row i.

    `captions[i][j]` goes below a picture (scores). None leaves a cell empty. `column_gaps`: columns that stand apart
    from the one before them. `title` and `note` head the sheet.
    """
    columns = len(column_titles)
    if len(row_captions) != len(rows) or any(len(row) != columns for row in rows):
        raise ValueError(
            f"got {len(rows)} rows of {[len(row) for row in rows]} pictures for {len(row_captions)} captions and "
            f"{columns} column titles, expected one caption per row and one title per column"
        )
    shown = [[None if cell is None else visible(cell) for cell in row] for row in rows]
    side = max((max(cell.size) for row in shown for cell in row if cell), default=MIN_SIDE)
    left = [MARGIN + j * (side + GAP) + 2 * GAP * sum(g <= j for g in column_gaps) for j in range(columns)]
    width = max(left[-1] + side + MARGIN if columns else 0, 360)
    heading, body, small = font(22), font(15), font(13)
    per_line = max(20, (width - 2 * MARGIN) // 8)  # the body font is about 8 pixels wide
    below = 20 if captions else 0

    blocks: list[tuple[str, Font, str, int]] = []
    blocks += [(line, heading, INK, 28) for line in wrap(title, max(12, per_line * 2 // 3))]
    blocks += [(line, small, SOFT, 18) for line in wrap(note, per_line)]
    prompts = [wrap(_one_line(caption), per_line) or [""] for caption in row_captions]
    top = MARGIN + sum(block[3] for block in blocks) + (24 if any(column_titles) else 0)
    height = top + sum(20 * len(lines) + side + below + 2 * GAP for lines in prompts) + MARGIN // 2

    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    y = MARGIN
    for text, face, colour, step in blocks:
        draw.text((MARGIN, y), text, font=face, fill=colour)
        y += step
    for j, text in enumerate(column_titles):
        draw.text((left[j], y + 2), _fitted(text, side, small), font=small, fill=SOFT)
    y = top
    for i, row in enumerate(shown):
        for line in prompts[i]:
            draw.text((MARGIN, y), line, font=body, fill=INK)
            y += 20
        for j, cell in enumerate(row):
            if cell:
                page.paste(cell, (left[j], y))
            if captions and captions[i][j]:
                draw.text((left[j], y + side + 2), _fitted(captions[i][j], side, small), font=small, fill=SOFT)
        y += side + below + 2 * GAP
    return page


def before_after_sheet(
    prompts: Sequence[str],
    before: Sequence[Sequence[Picture]],
    after: Sequence[Sequence[Picture]],
    captions: Sequence[Sequence[tuple[str, str]]] | None = None,
    *,
    title: str = "Before and after",
    note: str = "same prompt and same noise in each pair",
) -> Image.Image:
    """Prompts x seeds, each seed as the pair before | after. `captions[i][k]` = (below before, below after)."""
    seeds = len(before[0]) if before else 0
    rows = [
        [picture for k in range(seeds) for picture in (old[k], new[k])] for old, new in zip(before, after, strict=True)
    ]
    below = None if captions is None else [[text for pair in row for text in pair] for row in captions]
    return sheet(
        rows,
        row_captions=prompts,
        column_titles=["before", "after"] * seeds,
        captions=below,
        title=title,
        note=note,
        column_gaps=range(2, 2 * seeds, 2),
    )


def strength_sheet(
    prompts: Sequence[str],
    pictures: Sequence[Sequence[Picture]],
    labels: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
    *,
    title: str = "LoRA strength",
    note: str = "same prompt and same noise in each row",
) -> Image.Image:
    """Prompts x strengths: `pictures[i][j]` is prompt i drawn as `labels[j]` says, such as "0.5"."""
    return sheet(pictures, row_captions=prompts, column_titles=labels, captions=captions, title=title, note=note)


def font(size: int) -> Font:
    """The typeface of all sheets; it knows the letters of English."""
    return ImageFont.load_default(size)


def wrapped(text: str, face: Font, width: float) -> list[str]:
    """Lines of a text that are at most `width` pixels long; a longer word is cut. White space counts as one space."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if face.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and face.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _fitted(text: str, width: int, face: Font) -> str:
    text = _one_line(text)
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
