"""Reference images: a folder of them, or a manifest that lists some for each prompt.

A manifest is JSON, ``{"a red star": ["star/1.png", ...], ...}``, or JSON Lines (or a JSON list) of entries
``{"prompt": "a red star", "files": ["star/1.png", ...]}``. Paths are relative to the manifest's folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class References:
    """Files of reference images, in a fixed order.

    Attributes:
        by_prompt: prompt -> files; empty where the images belong to no prompt (a style, a domain).
        shared: files for any prompt that has none of its own.
    """

    by_prompt: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    shared: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All files, each once: those of the prompts in the manifest's order, then the shared ones."""
        listed = [file for files in self.by_prompt.values() for file in files]
        return tuple(dict.fromkeys([*listed, *self.shared]))

    def of(self, prompt: str) -> tuple[Path, ...]:
        """Files for a prompt: its own, else the shared ones; () where there are none."""
        return self.by_prompt.get(prompt, self.shared)

    def draw(self, prompt: str, count: int, key: int) -> list[Path]:
        """`count` of a prompt's files, a function of (prompt, key) alone.

        Without replacement as long as there are enough; then from the start again, in another order.

        Raises:
            ValueError: the prompt has none.
        """
        files = self.of(prompt)
        if not files:
            raise ValueError(
                f"got prompt {prompt!r} without reference images, expected some in the manifest "
                f"({len(self.by_prompt)} prompts). Add them, or give a folder that serves all prompts."
            )
        generator = torch.Generator().manual_seed(seed_of(key, "references", prompt))
        drawn: list[Path] = []
        while len(drawn) < count:
            order = torch.randperm(len(files), generator=generator).tolist()
            drawn += [files[i] for i in order[: count - len(drawn)]]
        return drawn

    def subset(self, count: int, seed: int = 0) -> References:
        """At most `count` files for each prompt and of the shared ones, chosen by the seed, in the old order."""

        def some(files: tuple[Path, ...], name: str) -> tuple[Path, ...]:
            generator = torch.Generator().manual_seed(seed_of(seed, "subset", name))
            chosen = torch.randperm(len(files), generator=generator)[:count].sort().values
            return tuple(files[i] for i in chosen.tolist())

        return References({p: some(f, p) for p, f in self.by_prompt.items()}, some(self.shared, ""))


def seed_of(*parts: object) -> int:
    """31-bit seed of a draw that these parts name. torch's CPU generator reads 32 bits of a seed."""
    text = json.dumps([str(part) for part in parts]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1


def load_references(source: str | Path | References) -> References:
    """Read a folder (with its subfolders, sorted by path) or a manifest (in its own order).

    Args:
        source: folder, ``.json`` or ``.jsonl`` file; References are handed through.

    Raises:
        ValueError: nothing there, a manifest of another form, or missing files (all are counted, the first are named).
    """
    if isinstance(source, References):
        return source
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        if not files:
            raise ValueError(f"got folder {str(path)!r} without images, expected some of {', '.join(SUFFIXES)}.")
        return References(shared=tuple(files))
    if not path.is_file() or path.suffix.lower() not in (".json", ".jsonl"):
        raise ValueError(f"got references {str(source)!r}, expected a folder, a .json or a .jsonl file. Correct it.")
    listed = {prompt: [path.parent / file for file in files] for prompt, files in _entries(path).items()}
    gone = tuple(dict.fromkeys(f for files in listed.values() for f in files if not f.is_file()))
    if gone:
        raise ValueError(
            f"got manifest {str(path)!r} with {len(gone)} files that are not there "
            f"({', '.join(str(f) for f in gone[:5])}{', ...' if len(gone) > 5 else ''}), expected all. "
            "Correct the paths, which are relative to the manifest, or take them out."
        )
    kept = {prompt: tuple(files) for prompt, files in listed.items() if files}
    if not kept:
        raise ValueError(f"got manifest {str(path)!r} that names no files, expected some. Correct it.")
    return References(kept)


def _entries(path: Path) -> dict[str, list[str]]:
    """prompt -> files as written. A prompt that comes twice has the files of both."""
    try:
        text = path.read_text(encoding="utf-8")
        lines = path.suffix.lower() == ".jsonl"
        content: Any = [json.loads(t) for t in text.splitlines() if t.strip()] if lines else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"got manifest {str(path)!r} with text that is no JSON ({error}), expected one document in a .json and one "
            "on each line of a .jsonl file. Correct it."
        ) from error
    rows: Iterable[tuple[Any, Any]]
    if isinstance(content, dict):
        rows = content.items()
    elif isinstance(content, list) and all(isinstance(row, dict) for row in content):
        rows = [(row.get("prompt"), row.get("files")) for row in content]
    else:
        rows = [(None, None)]
    entries: dict[str, list[str]] = {}
    for prompt, files in rows:
        files = [files] if isinstance(files, str) else files
        if not isinstance(prompt, str) or not isinstance(files, list) or not all(isinstance(f, str) for f in files):
            raise ValueError(
                f"got manifest {str(path)!r} with an entry of another form (prompt {prompt!r}, files {files!r}), "
                'expected {"prompt": [files]} or {"prompt": ..., "files": [...]}. Correct it.'
            )
        entries.setdefault(prompt, []).extend(files)
    return entries


def read_image(file: Path, size: tuple[int, int] | None = None) -> Tensor:
    """One image as uint8 (3, H, W): turned as its EXIF says, transparency on white.

    Args:
        file: anything Pillow reads.
        size: (H, W) to scale to, bicubic, after cutting the longer side to the ratio; None: as it is.

    Raises:
        ValueError: the file is no image, or is broken.
    """
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if "A" in image.getbands() or "transparency" in image.info:
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            image = image.convert("RGB")
    except OSError as error:
        raise ValueError(f"got reference {str(file)!r}, which cannot be read ({error}). Replace it.") from error
    if size is not None and image.size != (size[1], size[0]):
        image = ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def read_images(files: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Images of one size, (N, 3, H, W) float32 in [0, 1] on the 8-bit grid; see ``read_image``."""
    if not files:
        return torch.zeros(0, 3, *size)
    return torch.stack([read_image(file, size) for file in files]).float() / 255
