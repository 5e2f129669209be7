"""Images to be scored, and their prompts: a folder, a pattern, a manifest, or files with prompts beside them."""

from __future__ import annotations

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.errors import UserError
from flowrl.prompts import Prompt, load_prompts

if TYPE_CHECKING:
    from torch import Tensor

LISTING = "samples.jsonl"  # of a folder that flowrl wrote: one object per image, its file name under "image"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MANIFESTS = (".jsonl", ".csv", ".json")
FILE_KEYS = ("image", "file", "file_name", "path")  # where a manifest may have the file of an image
SEED_KEYS = ("index", "seed_index")  # where it may say which image of its prompt it is


class Unreadable(Exception):
    """A file that is no image; the message says why."""


@dataclass(frozen=True)
class Item:
    """An image with its prompt.

    Attributes:
        prompt_id: equal for equal prompts of a task.
        seed_index: which image of its prompt, where a listing says so; else None.
    """

    image: str
    path: Path
    prompt: str
    prompt_id: int
    seed_index: int | None
    metadata: dict[str, Any]


def find(sources: Sequence[str | Path], prompts: str | None = None, texts: Sequence[str] = ()) -> list[Item]:
    """The images that a user means.

    Args:
        sources: one folder (with a listing as `flowrl sample` writes it, with GenEval's layout, or plain), one manifest
            (.csv, .jsonl or .json with `prompt` and the file under one of FILE_KEYS), or files and glob patterns.
        prompts: a prompt source with one prompt for each image, in the order of the names.
        texts: prompts for the images, one for all of them or one each. Needed, or `prompts`, where nothing else says.

    Raises:
        UserError: nothing there, a listed file is missing, or the prompts are unknown or of another number.
    """
    given = [Path(source) for source in sources]
    alone = [path for path in given if path.is_dir() or path.suffix.lower() in MANIFESTS]
    if alone and len(given) > 1:
        raise UserError(
            f"got {alone[0]} among {len(given)} sources; expected one folder, one manifest, or image files and "
            "patterns; score each folder by itself, or write a pattern such as '*/*.png'"
        )
    if len(given) == 1 and given[0].is_dir():
        return _of_folder(given[0], prompts, texts)
    if len(given) == 1 and given[0].is_file() and given[0].suffix.lower() in MANIFESTS:
        _only_one(prompts or texts, f"{given[0]} has the prompts in it")
        return items(given[0].parent, _manifest(given[0]), str(given[0]))
    files = [path for source in sources for path in _files(str(source))]
    return _with_prompts(Path(), [path.as_posix() for path in files], prompts, texts, "the images")


def items(folder: Path, rows: Iterable[Mapping[str, Any]], where: str) -> list[Item]:
    """Rows with "image" (relative to `folder`) and "prompt" as items; other keys are metadata."""
    numbers: dict[object, int] = {}
    found: list[Item] = []
    for row in rows:
        name, prompt = row.get("image"), row["prompt"]
        if not isinstance(name, str) or not (folder / name).is_file():
            raise UserError(f"{folder}: the image {name!r} is missing; expected every file that {where} names; add it")
        check_entry(row)
        key = prompt, str(row.get("tag"))  # two tasks may share a text
        metadata = {key: value for key, value in row.items() if key not in ("image", *SEED_KEYS)}
        number = numbers.setdefault(key, len(numbers))
        found.append(Item(name, folder / name, prompt, number, _seed_index(row), metadata))
    if not found:
        raise UserError(f"{where} names no images; expected at least one")
    if twice := [name for name, times in Counter(item.image for item in found).items() if times > 1]:
        raise UserError(f"{where}: the image {twice[0]!r} comes twice; expected each once; leave the second out")
    return found


def _seed_index(row: Mapping[str, Any]) -> int | None:
    """Which image of its prompt; None where the row has no whole number for it (other tables use `index`, too)."""
    given = str(next((row[key] for key in SEED_KEYS if key in row), None))
    return int(given) if given.isdecimal() else None


def check_entry(row: Mapping[str, Any]) -> None:
    """Refuse what no table of scores could hold, before anything is drawn or scored."""
    try:
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:  # NaN, or a file name or text that is not Unicode
        raise UserError(
            f"the entry of the image {row['image']!r} cannot be written as JSON ({error}); expected Unicode text and "
            "finite numbers; write null for a number that is missing, and rename a file whose name is not UTF-8"
        ) from error


def digest(path: Path) -> str | None:
    """SHA-256 of a file, or None where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:  # the image becomes a missing score, with the reason that `read_image` finds
        return None


def read_image(path: Path) -> Tensor:
    """An image as (3, H, W) float32 in [0, 1], the right way up, without its alpha channel.

    Raises:
        Unreadable: it is no image, damaged, not of 8 bits (PIL would cut its values off at 255), or so large that PIL
            takes it for a decompression bomb.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise Unreadable(f"cannot read {path.name}: its values have more than 8 bits; save it with 8 bits")
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL's, for damaged files
        raise Unreadable(f"cannot read {path.name} as an image ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _of_folder(folder: Path, prompts: str | None, texts: Sequence[str]) -> list[Item]:
    if prompts is None and not texts:
        if (folder / LISTING).is_file():
            return items(folder, [prompt.metadata for prompt in load_prompts(str(folder / LISTING))], LISTING)
        if rows := _geneval_layout(folder):
            return items(folder, rows, "metadata.jsonl")
    files = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not (files := [name for name in files if name != "sheet.png"]):
        raise UserError(f"{folder} holds no images; expected some of {', '.join(SUFFIXES)}; name another folder")
    return _with_prompts(folder, files, prompts, texts, str(folder))


def _geneval_layout(folder: Path) -> list[dict[str, Any]]:
    """GenEval's folders: `00000/metadata.jsonl` (one object) and `00000/samples/<digits>.png`; others are ignored."""
    rows = []
    for meta in sorted(folder.glob("*/metadata.jsonl")):
        if not meta.parent.name.isdigit():
            continue
        (prompt,) = load_prompts(str(meta), limit=1)
        for path in sorted((meta.parent / "samples").glob("*.png")):
            if path.stem.isdigit():
                name = path.relative_to(folder).as_posix()
                rows.append({**prompt.metadata, "image": name, "index": int(path.stem)})
    return rows


def _files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    matches = sorted(Path(name) for name in glob.glob(source, recursive=True))
    matches = [match for match in matches if match.is_file() and match.suffix.lower() in SUFFIXES]
    if not matches:
        what = "matches no image" if glob.has_magic(source) else "is not there"
        raise UserError(
            f"{source} {what}; expected a folder of images, a pattern such as 'out/*.png', a manifest "
            f"({', '.join(MANIFESTS)}) with image and prompt, or image files"
        )
    return matches


def _with_prompts(
    folder: Path, files: Sequence[str], prompts: str | None, texts: Sequence[str], where: str
) -> list[Item]:
    if prompts is not None:
        _only_one(texts, f"--prompts {prompts}")
        given = load_prompts(prompts)
    elif texts:
        given = [Prompt(text, {"prompt": text}) for text in (texts if len(texts) > 1 else [*texts] * len(files))]
    else:
        raise UserError(
            f"nothing says what the prompts of {where} are; expected --prompts FILE with one prompt for each image, in "
            f"the order of the file names, --prompt TEXT, or a folder with a {LISTING}"
        )
    if len(given) != len(files):
        raise UserError(
            f"got {len(files)} images and {len(given)} prompts for {where}; expected one prompt for each image, in the "
            "order of the file names"
        )
    return items(folder, [{**p.metadata, "image": name} for p, name in zip(given, files, strict=True)], where)


def _only_one(extra: object, already: str) -> None:
    if extra:
        raise UserError(f"got two sources of prompts; expected one: {already}; leave the other out")


def _manifest(path: Path) -> list[dict[str, Any]]:
    if path.suffix.lower() != ".json":
        rows = [prompt.metadata for prompt in load_prompts(str(path))]
    else:
        rows = _json_manifest(path)
    found = []
    for number, row in enumerate(rows, start=1):
        key = next((key for key in FILE_KEYS if isinstance(row.get(key), str)), None)
        if key is None:
            raise UserError(
                f"{path}, entry {number}: no file under {', '.join(FILE_KEYS)}; expected the image's path, relative to "
                "the manifest"
            )
        found.append({**row, "image": row[key]})
    return found


def _json_manifest(path: Path) -> list[dict[str, Any]]:
    """A list of objects, or one object `{file: prompt}`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_each_key_once)
    except ValueError as error:
        raise UserError(f"{path}: {error}; expected JSON in which each key comes once") from error
    if isinstance(content, dict):
        content = [{"image": name, "prompt": prompt} for name, prompt in content.items()]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UserError(
            f"{path}: expected a list of objects with image and prompt, or one object that maps files to prompts"
        )
    for number, row in enumerate(content, start=1):
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise UserError(f"{path}, entry {number}: the prompt is {row.get('prompt')!r}; expected a text; add it")
        row["prompt"] = row["prompt"].strip()
    return content


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that comes twice (an image, say) is an error and not the last value."""
    if twice := [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]:
        raise ValueError(f"the key {twice[0]!r} comes twice")
    return dict(pairs)
