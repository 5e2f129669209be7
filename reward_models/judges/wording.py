"""What judges are told: text files with ``{prompt}`` and other places to fill.

The files in ``templates`` are our own wording. A judge that was fine-tuned on one exact text wants that one: give its
file as ``template_path``, with the same places.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Wording:
    """A template.

    Attributes:
        name: of the shipped template that it is or stands for.
        text: with places such as ``{prompt}``.
    """

    name: str
    text: str

    @property
    def digest(self) -> str:
        """Short hash of the text; part of a reward's version."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:8]

    def fill(self, **values: str) -> str:
        """The text with its places filled in one pass: braces within a prompt, and all others, stay as they are."""
        return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), self.text)


def load(name: str, path: str | Path | None = None) -> Wording:
    """A shipped template, or the user's own in its place.

    Args:
        name: of the shipped one, without ``.txt``.
        path: text file that stands in its place; it must have the places that the shipped one has.

    Raises:
        ValueError: no such file, or one without a place that is needed.
    """
    own = TEMPLATES / f"{name}.txt"
    file = Path(path).expanduser() if path else own
    if not file.is_file():
        shipped = ", ".join(sorted(found.stem for found in TEMPLATES.glob("*.txt")))
        raise ValueError(f"got template {str(path or name)!r}, expected a text file, or one of {shipped}. Correct it.")
    text = file.read_text(encoding="utf-8").strip()
    places = set(re.findall(r"\{(\w+)\}", own.read_text(encoding="utf-8")))
    if missing := {place for place in places if f"{{{place}}}" not in text}:
        raise ValueError(
            f"got template {str(file)!r} without {', '.join(f'{{{p}}}' for p in sorted(missing))}, expected the "
            f"places of {own.name}. Write them where the values belong."
        )
    return Wording(name, text)
