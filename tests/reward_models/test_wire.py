"""What travels between client and server survives exactly, and what is broken is refused."""

from __future__ import annotations

import io
import json
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.service import bad_files
from reward_models import RewardError, RewardResult, RewardSpec, to_8bit, wire

FLOATS = st.floats(width=32, allow_infinity=False, allow_nan=True)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit but those of a NaN's payload."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_png_keeps_every_pixel_and_the_8_bit_grid(height: int, width: int, seed: int) -> None:
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    data = wire.encode_png(pixels)
    assert wire.png_size(data) == (width, height)
    back = wire.decode_png(data)
    assert torch.equal(back, pixels)
    assert torch.equal(back.float() / 255, to_8bit(image[None])[0])
    with Image.open(io.BytesIO(data)) as opened:  # channel order and orientation as everybody else has them
        assert (np.asarray(opened) == pixels.permute(1, 2, 0).numpy()).all()


def test_a_request_is_the_json_that_it_says() -> None:
    images = torch.rand(3, 3, 5, 4, generator=torch.Generator().manual_seed(1)) * 1.2 - 0.1  # some out of range
    entries = [{"prompt": f'"{i}"\\ ü', "metadata": {"a": [i]}, "group": i} for i in range(3)]
    pieces = wire.request('x"y', "id-1", [wire.to_json(entry) for entry in entries], images)
    found = json.loads(b"".join(pieces))
    assert (found["reward"], found["id"]) == ('x"y', "id-1")
    sent = [wire.decode_png(wire.from_base64(item.pop("image"))) for item in found["items"]]
    assert torch.equal(torch.stack(sent).float() / 255, to_8bit(images)) and found["items"] == entries
    assert wire.digest(*pieces) == wire.digest(b"".join(pieces))
    in_bytes = (to_8bit(images) * 255).round().byte()
    assert wire.request('x"y', "id-1", [wire.to_json(entry) for entry in entries], in_bytes) == pieces


@pytest.mark.parametrize("name", bad_files(0))
def test_bad_images_are_refused_before_they_are_unpacked(name: str) -> None:
    data = bad_files(0)[name]
    if name in ("huge", "bomb"):
        width, height = wire.png_size(data)
        assert width * height > 10**9  # which the server refuses without looking further
        return
    if name == "more pixels than said":
        assert wire.decode_png(data).shape == (3, 8, 8)  # as many as the header says, and no more
        return
    with pytest.raises(ValueError, match="got"):
        wire.decode_png(data)


def test_the_header_is_where_the_standard_says() -> None:
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 300, 200) + bytes([8, 2])
    assert wire.png_size(header) == (300, 200)


@given(st.data())
def test_results_come_back_to_the_last_bit(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 5))

    def numbers() -> torch.Tensor:
        return torch.tensor(data.draw(st.lists(FLOATS, min_size=n, max_size=n)), dtype=torch.float32)

    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    whole = RewardResult(
        numbers(),
        {name: numbers() for name in data.draw(st.sets(st.text(), max_size=3))},
        data.draw(st.lists(st.none() | st.text(), min_size=n, max_size=n)),
        data.draw(st.none() | st.just(numbers().to(dtype))),
        data.draw(st.none() | st.just(torch.full((n, 2, 3), math.inf, dtype=dtype))),
    )
    back = wire.result_from_json(wire.from_json(wire.to_json(wire.result_to_json(whole))), n)
    assert same(back.values, whole.values) and back.reasons == whole.reasons
    assert list(back.parts) == list(whole.parts) and all(same(back.parts[k], whole.parts[k]) for k in whole.parts)
    for a, b in ((back.uncertainty, whole.uncertainty), (back.region_map, whole.region_map)):
        assert (a is None and b is None) or (a is not None and b is not None and same(a, b))


def test_a_spec_comes_back_but_for_the_gradient() -> None:
    spec = RewardSpec("n", "v", "group", (-math.inf, 1.0), False, "MIT", "resize", True)
    back = wire.spec_from_json(json.loads(wire.to_json(wire.spec_to_json(spec))))
    assert back == RewardSpec("n", "v", "group", (-math.inf, 1.0), False, "MIT", "resize", False)
    with pytest.raises(ValueError, match="none that this version knows"):
        wire.spec_from_json({"name": "n", "range": [0, 1], "colour": "red"})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"values": [1.0]}, "2 numbers"),
        ({"values": [1.0, True]}, "neither finite"),
        ({"values": [1.0, "2"]}, "neither finite"),
        ({"values": [1.0, math.inf]}, "neither finite"),
        ({"parts": []}, "without all of"),
        ({"parts": {"a": [0.0]}}, "2 numbers"),
        ({"reasons": ["a"]}, "2 texts"),
        ({"reasons": [1, 2]}, "2 texts"),
        ({"region_map": {"dtype": "float32", "shape": [2, 9], "data": ""}}, "unpacked"),
        ({"region_map": {"dtype": "object", "shape": [2], "data": ""}}, "unpacked"),
        ({"region_map": {"dtype": "float32", "shape": [3], "data": "AAAAAAAAAAAAAAAA"}}, "unpacked"),
        ({"uncertainty": [1, 2]}, "unpacked"),
    ],
)
def test_answers_that_are_not_complete_are_refused(change: dict[str, object], match: str) -> None:
    sound = wire.result_to_json(RewardResult(torch.tensor([1.0, 2.0]), {}, [None, None]))
    wire.result_from_json(sound, 2)
    with pytest.raises(ValueError, match=match):
        wire.result_from_json(sound | change, 2)
    with pytest.raises(ValueError, match="nested"):
        wire.from_json(b"[" * 10**6)


@settings(max_examples=20)
@given(st.dictionaries(st.text(), JSON))
def test_metadata_that_passes_comes_back(entry: dict[str, object]) -> None:
    wire.check_metadata(entry)
    assert wire.from_json(wire.to_json(entry)) == entry


@pytest.mark.parametrize("value", [math.nan, math.inf, {1: 2}, {"a": {2, 3}}, torch.ones(1), np.float32(1), b"a"])
def test_metadata_that_would_change_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"metadata 3\.a"):
        wire.check_metadata({"a": [value]} if not isinstance(value, dict) else {"a": value}, "metadata 3")


@given(st.permutations(range(7)), st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_taking_apart_and_joining_changes_nothing(order: list[int], cuts: list[int]) -> None:
    x = torch.arange(7.0)
    x[3] = math.nan
    whole = RewardResult(x, {"a": -x}, [str(i) for i in range(7)], x.double(), x[:, None] * torch.ones(7, 2))
    pieces, start = [], 0
    for cut in [*cuts, 7]:
        index = order[start : start + cut]
        pieces.append((index, wire.take(whole, index)))
        start += cut
    back = wire.join(7, [piece for piece in pieces if piece[0]])
    assert same(back.values, x) and same(back.parts["a"], -x) and back.reasons == whole.reasons
    assert back.uncertainty is not None and same(back.uncertainty, x.double())
    assert back.region_map is not None and same(back.region_map, x[:, None] * torch.ones(7, 2))


def test_joining_fills_what_a_piece_lacks_and_never_loses_or_doubles() -> None:
    known = RewardResult(torch.tensor([1.0]), {"a": torch.tensor([2.0])}, [None], torch.ones(1), torch.ones(1, 2, 2))
    lost = wire.missing(2, "gone")
    whole = wire.join(3, [([1], known), ([2, 0], lost)])
    assert whole.values.isnan().tolist() == [True, False, True] and whole.reasons == ["gone", None, "gone"]
    assert whole.parts["a"].isnan().tolist() == [True, False, True]
    assert whole.region_map is not None and whole.region_map.shape == (3, 2, 2)
    for pieces in ([([1], known)], [([0], known), ([0, 1], lost)], [([0], known), ([1, 3], lost)]):
        with pytest.raises(RewardError, match="each of 3 images once"):
            wire.join(3, pieces)


def test_nothing_is_pickled_or_lossy() -> None:
    import reward_models

    folder = __import__("pathlib").Path(reward_models.__file__).parent
    for name in ("wire", "batching", "service", "server", "remote"):
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        assert "import pickle" not in text and "torch.load" not in text and '"JPEG"' not in text and "eval(" not in text
