"""Prompt sources and the order in which prompts are trained on."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowrl.errors import UserError
from flowrl.prompts import load_prompts, permutation, prompt_batch, split


def texts(source: object, **options: Any) -> list[str]:
    return [prompt.text for prompt in load_prompts(str(source), **options)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_txt_is_one_prompt_per_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "\ufeffa red circle\r\n\n  a  blue star \r\nein grüner Würfel")
    assert texts(path) == ["a red circle", "a  blue star", "ein grüner Würfel"]


def test_jsonl_keeps_everything_else_as_metadata(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "tag": "x", "include": [{"class": "cat"}]}, {"prompt": " b\u2028c "}]
    path = write(tmp_path / "p.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n")
    first, second = load_prompts(str(path))
    assert first.text == "a" and first.metadata == rows[0]
    assert second.text == "b\u2028c" == second.metadata["prompt"]


def test_csv_has_a_header_and_may_quote(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", 'id,caption\n1,"a, b"\n2,"two\nlines"\n')
    prompts = load_prompts(str(path), text_column="caption")
    assert [p.text for p in prompts] == ["a, b", "two\nlines"]
    assert prompts[0].metadata == {"id": "1", "caption": "a, b", "prompt": "a, b"}


def test_shapes_prompts_carry_their_geneval_metadata() -> None:
    prompts = load_prompts("shapes:test", tasks=["colors", "counting"])
    assert {p.metadata["tag"] for p in prompts} == {"colors", "counting"}
    assert all(p.metadata["prompt"] == p.text and p.metadata["include"] for p in prompts)


def test_a_limit_is_spread_over_the_tags(tmp_path: Path) -> None:
    rows = [{"prompt": f"{tag}{i}", "tag": tag} for tag, n in (("a", 5), ("b", 1), ("c", 5)) for i in range(n)]
    path = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))
    assert texts(path, limit=7) == ["a0", "a1", "a2", "b0", "c0", "c1", "c2"]
    assert texts(path, limit=99) == [row["prompt"] for row in rows]
    counts = Counter(p.metadata["tag"] for p in load_prompts("shapes:test", limit=60))
    assert sum(counts.values()) == 60 and len(counts) == 6
    everything = Counter(p.metadata["tag"] for p in load_prompts("shapes:test"))
    most = max(counts.values())  # a tag gives its share, or all it has
    assert all(counts[tag] >= most - 1 or counts[tag] == everything[tag] for tag in counts)
    assert texts(write(tmp_path / "p.txt", "a\nb\nc"), limit=2) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "holds no prompts"),
        ("blank.txt", "\n  \n", "holds no prompts"),
        ("empty.jsonl", "", "holds no prompts"),
        ("header.csv", "prompt\n", "holds no prompts"),
        ("empty.csv", "", "holds no prompts"),
        ("binary.txt", b"\x89PNG\r\n\x1a\n\x00\x00", "not UTF-8 text (byte 0 is 0x89)"),
        ("zeros.txt", b"abc\x00def", "binary file"),
        ("latin.txt", "grün".encode("latin-1"), "iconv"),
        ("bad.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2"),
        ("list.jsonl", '["a"]\n', "line 1: got a list"),
        ("nokey.jsonl", '{"prompt": "a"}\n{"text": "a"}', "prompt 2: got the keys text"),
        ("number.jsonl", '{"prompt": 3}', "got prompt = 3"),
        ("nocolumn.csv", "text,id\na,1\n", "has the columns text, id"),
        ("quote.csv", 'prompt\na\n"b\n' + "c\n" * 100_000, "correct the quotation marks"),
        ("wrong.parquet", b"PAR1", ".txt, .jsonl or .csv"),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError) as caught:
        texts(write(tmp_path / name, content))
    assert message in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("missing.txt", {}, "No such file"),
        ("shapes:valid", {}, "expected shapes:train, shapes:test, shapes:held_out"),
        ("shapes:test", {"tasks": ["colours"]}, "the tag 'colours'; expected tasks among: color_attr, colors"),
    ],
)
def test_bad_sources_are_explained(source: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        texts(source, **options)
    assert message in str(caught.value)


class _Table(dict[str, list[str]]):
    @property
    def column_names(self) -> list[str]:
        return list(self)


def test_hub_sources_name_data_set_split_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> _Table:
        asked.append((name, split))
        if "missing" in name:
            raise ConnectionError("offline")
        return _Table(caption=["a", "b"], id=["1", "2"])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert texts("hub:org/set:test#caption") == ["a", "b"]
    assert texts("hub:org/set", text_column="caption") == ["a", "b"]
    assert asked == [("org/set", "test"), ("org/set", "train")]
    with pytest.raises(UserError, match="has the columns caption, id; expected 'prompt'"):
        texts("hub:org/set")
    with pytest.raises(UserError, match="offline.*hf auth login"):
        texts("hub:org/missing#x")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"flowrl\[hub\]"):
        texts("hub:org/set#caption")


# -------------------------------------------------------------------------------------------------------------- order
@given(st.integers(1, 40), st.integers(1, 25), st.integers(0, 2**40), st.integers(0, 50))
def test_every_prompt_comes_once_before_any_comes_twice(n: int, m: int, seed: int, update: int) -> None:
    drawn = [slot for u in range(update + 1) for slot in prompt_batch(n, m, seed, u)]
    counts = Counter(slot.prompt for slot in drawn)
    assert max(counts.values()) - min(counts.get(i, 0) for i in range(n)) <= 1
    assert len(set(drawn)) == len(drawn)  # (prompt, occurrence) never repeats, so neither does its noise
    assert all(counts[i] == 1 + max(s.occurrence for s in drawn if s.prompt == i) for i in counts)


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    assert prompt_batch(100, 8, 3, 5) == prompt_batch(100, 8, 3, 5)
    assert prompt_batch(100, 8, 3, 5) != prompt_batch(100, 8, 4, 5)
    assert permutation(100, 3, 0) != permutation(100, 3, 1)
    assert [slot.prompt for u in range(5) for slot in prompt_batch(10, 4, 1, u)] == [
        slot.prompt for u in range(10) for slot in prompt_batch(10, 2, 1, u)
    ]


def test_orders_are_uniform() -> None:
    """All 24 orders of four prompts appear about equally often (chi-square, 23 degrees of freedom: 49.7 is 0.1 %)."""
    counts = Counter(tuple(permutation(4, seed, 0)) for seed in range(2400))
    assert len(counts) == 24
    assert sum((n - 100) ** 2 / 100 for n in counts.values()) < 49.7


@given(st.integers(0, 60), st.integers(1, 17))
def test_shares_join_to_the_batch_and_differ_by_at_most_one(n: int, world: int) -> None:
    batch = list(range(n))
    shares = [split(batch, rank, world) for rank in range(world)]
    assert [item for share in shares for item in share] == batch
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1 and sorted(sizes, reverse=True) == sizes


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 of 2"):
        split([1, 2], 2, 2)
    with pytest.raises(ValueError, match="n_prompts=0"):
        prompt_batch(0, 4, 0, 0)
