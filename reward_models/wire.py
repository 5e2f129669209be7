"""What travels between a reward's client and its server: images as PNG, everything else as JSON.

JSON with PNG in base64, and not multipart: one document can be checked as a whole, carries one digest, can be written
with curl, and needs no second parser. The PNG files are stored and not packed, because packing costs as much time as
many a scorer takes: with base64 that makes four bytes for a pixel. Nothing is pickled and nothing is lossy, so a remote
reward is the same function as the local one:

* 8-bit images survive PNG, and `to_8bit` puts scored images on that grid;
* a float32 written as the shortest decimal of its float64 value reads back as the same float32; NaN is null;
* tensors of other shapes travel as their bytes, little-endian, with dtype and shape.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .protocol import RewardError, RewardResult, RewardSpec

PROTOCOL = 1  # changes whenever an older client or server would misread a message
DIGEST = "content-digest"  # RFC 9530
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_HEADER = struct.Struct(">8sI4sIIBB")  # signature, length and name of the first chunk, width, height, depth, colour
PNG_RGB = 2  # colour type of the PNG standard: three samples per pixel, no palette, no alpha


def encode_png(image: Tensor) -> bytes:
    """An image as PNG, stored and not packed: time matters more than bytes here.

    A tenth of the time of Pillow, which tries several filters on each row even where it packs nothing.

    Args:
        image: (3, H, W) uint8 on the CPU.
    """
    _, height, width = image.shape
    rows = torch.zeros((height, 1 + 3 * width), dtype=torch.uint8)  # each row begins with its filter: 0, none
    rows[:, 1:].view(height, width, 3).copy_(image.permute(1, 2, 0))

    def chunk(name: bytes, data: bytes) -> list[bytes]:
        return [struct.pack(">I", len(data)), name, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(name)))]

    header = struct.pack(">IIBBBBB", width, height, 8, PNG_RGB, 0, 0, 0)
    pixels = zlib.compress(rows.numpy().data, 0)
    return b"".join([PNG_SIGNATURE, *chunk(b"IHDR", header), *chunk(b"IDAT", pixels), *chunk(b"IEND", b"")])


def room(height: int, width: int) -> int:
    """Bytes that are enough for an image in a request: PNG makes 3 W + 1 of a row, base64 four of three."""
    return int(1.35 * height * (3 * width + 1)) + 2000


def png_size(data: bytes) -> tuple[int, int]:
    """(width, height) that a PNG says it has, read from its first 26 bytes; nothing is decompressed.

    Raises:
        ValueError: not a PNG of 8-bit RGB, or an empty one.
    """
    if len(data) < PNG_HEADER.size or not data.startswith(PNG_SIGNATURE):
        raise ValueError("got bytes that are no PNG, expected a PNG file. Save the image as PNG")
    _, _, chunk, width, height, depth, colour = PNG_HEADER.unpack_from(data)
    if chunk != b"IHDR" or width < 1 or height < 1:
        raise ValueError("got a PNG with a broken header, expected a whole file. Save the image again")
    if depth != 8 or colour != PNG_RGB:
        raise ValueError(
            f"got a PNG of {depth} bits and colour type {colour}, expected 8-bit RGB (8, {PNG_RGB}), without alpha or "
            "palette. Convert the image to RGB"
        )
    return width, height


def decode_png(data: bytes) -> Tensor:
    """(3, H, W) uint8 of a PNG whose `png_size` has been found acceptable.

    Raises:
        ValueError: the file is broken, or unpacks to something other than its header says.
    """
    size = png_size(data)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.size != size or image.mode != "RGB":  # a second header after the one that was checked
                raise ValueError("the file has two headers")
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size[1], size[0], 3)
    except Exception as error:  # a decoder may raise anything on bytes that were made to break it
        raise ValueError(f"got a PNG that cannot be read ({type(error).__name__}), expected a whole file") from error
    return pixels.permute(2, 0, 1)


def base64_of(data: bytes) -> str:
    """Bytes as base64."""
    return base64.b64encode(data).decode("ascii")


def from_base64(text: str) -> bytes:
    """Raises ValueError where the text is not base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("got an image that is no base64, expected a PNG file in base64") from error


def digest(*pieces: bytes | bytearray) -> str:
    """The value of the header Content-Digest (RFC 9530) of a body, which may come in pieces."""
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return f"sha-256=:{base64_of(found.digest())}:"


def request(reward: str | None, name: str, rows: Sequence[bytes], images: Iterable[Tensor]) -> list[bytes]:
    """The body of a request to score images, in pieces: sending one long string would copy it at every step.

    Args:
        reward: its name; None for the only one of a server.
        name: the request's id.
        rows: of each image, the JSON of all that goes with it (`to_json` of an object that is not empty).
        images: (3, H, W) each, uint8, or floats that are rounded as `to_8bit` does; on any device.
    """
    pieces, before = [], to_json({"reward": reward, "id": name})[:-1] + b',"items":['
    for row, image in zip(rows, images, strict=True):
        if image.dtype != torch.uint8:  # one image at a time: its floats stay in the cache
            image = image.detach().float().mul(255).clamp_(0, 255).round_().to(torch.uint8)
        text = base64.b64encode(encode_png(image.cpu()))  # needs no escapes in JSON
        pieces.append(b"".join([before, row[:-1], b',"image":"', text, b'"}']))
        before = b","
    return [*pieces, b"]}"]


def to_json(message: Any) -> bytes:
    """Strict JSON in ASCII. Raises ValueError (TypeError) for NaN and for what JSON does not know."""
    return json.dumps(message, allow_nan=False, separators=(",", ":")).encode("ascii")


def from_json(body: bytes) -> Any:
    """Inverse of `to_json`. Raises ValueError for all that is no JSON, also where it is nested too deeply."""
    try:
        return json.loads(body)
    except RecursionError as error:
        raise ValueError("got JSON that is nested too deeply") from error


def check_metadata(value: Any, where: str = "metadata") -> None:
    """Refuse what would not come back from JSON as it was; tuples pass, and arrive as lists.

    Raises:
        ValueError: names the place.
    """
    if value is None or isinstance(value, bool | int | str):
        return
    if isinstance(value, float):
        if math.isfinite(value):
            return
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"got the key {key!r} in {where}, expected a string, as JSON has no others")
            check_metadata(inner, f"{where}.{key}")
        return
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            check_metadata(inner, f"{where}[{i}]")
        return
    raise ValueError(
        f"got {value!r} of type {type(value).__name__} as {where}, expected what JSON can hold: text, finite numbers, "
        "true, false, null, lists and mappings. Convert it where the prompts are made"
    )


def spec_to_json(spec: RewardSpec) -> dict[str, Any]:
    """A spec as a JSON object; unbounded ends of the range are null."""
    return asdict(spec) | {"range": [end if math.isfinite(end) else None for end in spec.range]}


def spec_from_json(found: Mapping[str, Any]) -> RewardSpec:
    """Inverse of `spec_to_json`, but for `differentiable`: no gradient comes back over a network.

    Raises:
        ValueError: fields are missing or unknown.
    """
    try:
        low, high = found["range"]
        ends = (-math.inf if low is None else float(low), math.inf if high is None else float(high))
        return RewardSpec(**{**found, "range": ends, "differentiable": False})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"got the spec {found!r}, which is none that this version knows ({error})") from error


def result_to_json(result: RewardResult) -> dict[str, Any]:
    """Scores as a JSON object, as `checked_score` gives them (float32 on the CPU, a reason or None for each)."""
    return {
        "values": _numbers(result.values),
        "parts": {name: _numbers(part) for name, part in result.parts.items()},
        "reasons": result.reasons,
        "uncertainty": _packed(result.uncertainty),
        "region_map": _packed(result.region_map),
    }


def result_from_json(found: Any, n: int) -> RewardResult:
    """Inverse of `result_to_json` for n images.

    Raises:
        ValueError: anything but a complete result of n images.
    """
    fields = {"values", "parts", "reasons", "uncertainty", "region_map"}
    if not isinstance(found, dict) or not fields <= set(found) or not isinstance(found["parts"], dict):
        raise ValueError(f"got an answer without all of {', '.join(sorted(fields))}")
    reasons = found["reasons"]
    if not isinstance(reasons, list) or len(reasons) != n or not all(r is None or isinstance(r, str) for r in reasons):
        raise ValueError(f"got reasons that are not {n} texts or nulls")
    parts = {str(name): _tensor(part, n) for name, part in found["parts"].items()}
    uncertainty, region_map = (_unpacked(found[key], n) for key in ("uncertainty", "region_map"))
    return RewardResult(_tensor(found["values"], n), parts, reasons, uncertainty, region_map)


def _numbers(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _tensor(values: Any, n: int) -> Tensor:
    if not isinstance(values, list) or len(values) != n:
        raise ValueError(f"got something other than {n} numbers")
    if not all(
        v is None or (isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)) for v in values
    ):
        raise ValueError("got values that are neither finite numbers nor null")
    return torch.tensor([math.nan if v is None else float(v) for v in values], dtype=torch.float32)


def _packed(tensor: Tensor | None) -> dict[str, Any] | None:
    if tensor is None:
        return None
    tensor = tensor.detach().cpu().contiguous()
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise RewardError(f"got an uncertainty or region map of {name}, expected one of {', '.join(DTYPES)}")
    data = tensor.flatten().view(torch.uint8).numpy().tobytes()
    return {"dtype": name, "shape": list(tensor.shape), "data": base64_of(data)}


def _unpacked(found: Any, n: int) -> Tensor | None:
    if found is None:
        return None
    try:
        data, dtype, shape = base64.b64decode(found["data"], validate=True), DTYPES[found["dtype"]], found["shape"]
        if shape[0] != n:
            raise ValueError(f"the first of {shape} is not {n}")
        empty = torch.zeros(shape, dtype=dtype) if 0 in shape else None
        return torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if empty is None else empty
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, binascii.Error) as error:
        raise ValueError(f"got a tensor that cannot be unpacked ({error})") from error


def missing(n: int, reason: str) -> RewardResult:
    """n scores that are missing for the same reason."""
    return RewardResult(torch.full((n,), math.nan), {}, [reason] * n)


def take(result: RewardResult, index: Sequence[int]) -> RewardResult:
    """The scores of some of the images, in the order of `index`."""
    rows = torch.tensor(list(index), dtype=torch.long)

    def pick(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows]

    parts = {name: part[rows] for name, part in result.parts.items()}
    reasons = [result.reasons[i] for i in index]
    return RewardResult(result.values[rows], parts, reasons, pick(result.uncertainty), pick(result.region_map))


def join(n: int, pieces: Sequence[tuple[Sequence[int], RewardResult]]) -> RewardResult:
    """Put scores of disjoint pieces together; what only some pieces have is NaN for the images of the others.

    Args:
        n: number of images.
        pieces: (numbers of the images, their scores) of each piece; together they hold every image once.

    Raises:
        RewardError: an image is in no piece or in two, or shapes do not fit together.
    """
    places = [i for index, _ in pieces for i in index]
    if sorted(places) != list(range(n)):
        raise RewardError(f"got scores for the images {sorted(places)}, expected each of {n} images once")
    back = torch.tensor(places, dtype=torch.long).argsort()

    def stacked(found: Sequence[Tensor | None]) -> Tensor | None:
        given = next((piece for piece in found if piece is not None), None)
        if given is None:
            return None
        shape = given.shape[1:]
        whole = [
            torch.full((len(index), *shape), math.nan, dtype=given.dtype) if piece is None else piece
            for piece, (index, _) in zip(found, pieces, strict=True)
        ]
        if any(piece.shape[1:] != shape for piece in whole):
            raise RewardError(f"got maps of different shapes {[tuple(p.shape[1:]) for p in whole]}, expected one shape")
        return torch.cat(whole)[back]

    values = stacked([result.values for _, result in pieces])
    names = dict.fromkeys(name for _, result in pieces for name in result.parts)
    parts = {name: stacked([result.parts.get(name) for _, result in pieces]) for name in names}
    reasons = [reason for _, result in pieces for reason in result.reasons]
    return RewardResult(
        torch.zeros(0) if values is None else values,
        {name: part for name, part in parts.items() if part is not None},
        [reasons[i] for i in back.tolist()],
        stacked([result.uncertainty for _, result in pieces]),
        stacked([result.region_map for _, result in pieces]),
    )
