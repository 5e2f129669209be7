"""Self-contained result pages: one table, pictures under it. All text from outside is escaped by the template."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from flowrl.sheets import visible

THUMBNAIL = 192  # pixels of the longer side, about: larger pictures are reduced, small ones enlarged by a whole factor


def render(
    *, title: str, lead: str, heads: Sequence[str], lines: Sequence[Sequence[str]],
    sections: Sequence[dict[str, Any]] = (),
) -> str:  # fmt: skip
    """The page as text. `sections`: title and `cards` (see `card`)."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("flowrl"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return pages.get_template("scores.html.j2").render(
        title=title, lead=lead, heads=heads, lines=lines, sections=sections
    )


def card(path: Path, prompt: str, lines: Sequence[str]) -> dict[str, Any]:
    """One picture with its prompt and lines; without the picture if the file cannot be read."""
    return {"picture": thumbnail(path), "prompt": prompt, "lines": list(lines)}


def thumbnail(path: Path) -> str | None:
    """The picture as a data URL; None for a file that is no image."""
    try:
        with Image.open(path) as image:
            small = visible(image, THUMBNAIL, THUMBNAIL)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # it costs its place, not the page
        return None
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
