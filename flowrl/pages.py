"""Self-contained result pages: a table, charts, pictures. All text from outside is escaped by the template."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from flowrl.sheets import visible

if TYPE_CHECKING:
    from markupsafe import Markup

THUMBNAIL = 192  # pixels of the longer side, about: larger pictures are reduced, small ones enlarged by a whole factor


def render(
    *, title: str, lead: str, heads: Sequence[str], lines: Sequence[Sequence[str]],
    charts: Sequence[tuple[str, Markup]] = (), sections: Sequence[dict[str, Any]] = (),
) -> str:  # fmt: skip
    """The page as text. `charts`: titles and drawings; `sections`: title and `cards` (see `card`)."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("flowrl"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return pages.get_template("scores.html.j2").render(
        title=title, lead=lead, heads=heads, lines=lines, charts=charts, sections=sections
    )


def card(prompt: str, *shown: tuple[Path | None, Sequence[str]]) -> dict[str, Any]:
    """A prompt over one picture or more, each with its lines; a file that cannot be read costs its picture only."""
    pictures = [{"picture": None if path is None else thumbnail(path), "lines": list(lines)} for path, lines in shown]
    return {"prompt": prompt, "pictures": pictures}


def means_chart(numbers: Mapping[str, Mapping[str, Any]], *, zero: bool = False) -> Markup:
    """Means with their intervals, one line each. numbers: label -> what `score_table.as_dict` gives. zero: mark it."""
    from flowrl import charts
    from flowrl.statistics import Estimate

    def read(value: float | None) -> float:
        return math.nan if value is None else value

    rows = []
    for label, number in numbers.items():
        low, high = map(read, number["ci95"])
        rows.append((label, Estimate(read(number["mean"]), low, high), charts.AFTER))
    return charts.interval_chart(rows, zero=zero)


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
