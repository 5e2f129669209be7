"""Prompts: where they come from, in which order they are trained on, and how processes share them.

The order is a pure function of (seed, update): no iterator has a state to save, and a resumed run or a run on another
number of processes sees the same prompts. Whole groups (all images of one prompt) stay on one process.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from flowrl.errors import UserError

Metadata = dict[str, Any]
T = TypeVar("T")


class Prompt(NamedTuple):
    """A prompt and what came with it. `metadata["prompt"]` equals `text`; `metadata["tag"]` is its task, if any."""

    text: str
    metadata: Metadata


class Slot(NamedTuple):
    """One group of an update: which prompt, and the how-manieth time this prompt is drawn in the run (from 0)."""

    prompt: int
    occurrence: int


# ------------------------------------------------------------------------------------------------------------ sources
def load_prompts(
    source: str, *, tasks: Sequence[str] | None = None, text_column: str | None = None, limit: int | None = None
) -> list[Prompt]:
    """Read all prompts of a source, in its order.

    Args:
        source: "shapes:train|test|held_out"; a .txt file (one prompt per line); a .jsonl file (objects with the key
            "prompt"; all keys become metadata); a .csv file with a header; or "hub:dataset[:split]#column".
        tasks: keep prompts whose `tag` is one of these.
        text_column: name of the key or column with the text, default "prompt".
        limit: keep this many, spread evenly over the tags where prompts have tags (the first of each).

    Raises:
        UserError: the source is missing, empty, not text, or lacks the column.
    """
    column = text_column or "prompt"
    if source.startswith("shapes:"):
        rows = _shapes(source)
    elif source.startswith("hub:"):
        rows, column = _hub(source, text_column)
    else:
        rows = _file(Path(source), column)
    prompts = [_prompt(row, column, f"{source}, prompt {number}") for number, row in enumerate(rows, start=1)]
    if not prompts:
        raise UserError(f"{source} holds no prompts; expected at least one; add a prompt or name another source")
    if tasks is not None:
        prompts = _with_tags(prompts, tasks, source)
    return prompts if limit is None else _spread(prompts, limit)


def _prompt(row: Metadata, column: str, where: str) -> Prompt:
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        got = f"{column} = {text!r}" if column in row else f"the keys {', '.join(map(str, row)) or '(none)'}"
        raise UserError(
            f"{where}: got {got}; expected a text under {column!r}; rename the column, or set text_column in a config"
        )
    return Prompt(text.strip(), {**row, "prompt": text.strip()})


def _shapes(source: str) -> list[Metadata]:
    from reward_models.shapes import grammar

    split = source.removeprefix("shapes:")
    if split not in grammar.SPLITS:
        raise UserError(f"{source!r} names no Shapes split; expected shapes:{', shapes:'.join(grammar.SPLITS)}")
    return grammar.prompts(split)


def _file(path: Path, column: str) -> list[Metadata]:
    if path.suffix not in (".txt", ".jsonl", ".csv"):
        raise UserError(
            f"prompt source {str(path)!r} is not one that flowrl reads; expected a .txt, .jsonl or .csv file, "
            "shapes:train, or hub:dataset#column; rename or convert it"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read prompts from {path}: {error.strerror}; expected a readable file") from error
    try:
        text = content.decode("utf-8-sig")  # a byte-order mark, as spreadsheets write it, is no part of the text
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{content[error.start]:02x}); expected one; "
            "convert it, for example with `iconv -f LATIN1 -t UTF-8`, or check that it is the right file"
        ) from error
    if "\0" in text:
        raise UserError(f"{path} is a binary file (it holds a zero byte); expected prompts as UTF-8 text")
    if path.suffix == ".txt":
        return [{column: line.strip()} for line in text.splitlines() if line.strip()]
    return list(_jsonl(text, path) if path.suffix == ".jsonl" else _csv(text, path, column))


def _jsonl(text: str, path: Path) -> Iterator[Metadata]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: {error.msg}; expected one JSON object per line") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: got a {type(row).__name__}; expected a JSON object per line")
        yield row


def _csv(text: str, path: Path, column: str) -> Iterator[Metadata]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if reader.fieldnames is not None and column not in reader.fieldnames:
        raise UserError(
            f"{path} has the columns {', '.join(reader.fieldnames)}; expected one called {column!r}; rename one, "
            "or set text_column in a config"
        )
    try:
        for row in reader:
            yield {key: value for key, value in row.items() if key is not None and value is not None}
    except csv.Error as error:  # such as a quotation mark that is never closed
        raise UserError(
            f"{path}, line {reader.line_num}: {error}; expected comma-separated values; correct the quotation marks"
        ) from error


def _hub(source: str, text_column: str | None) -> tuple[list[Metadata], str]:
    name, _, column = source.removeprefix("hub:").partition("#")
    name, _, split = name.partition(":")
    column = column or text_column or "prompt"
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source!r} needs the package datasets; install it with `pip install flowrl[hub]`") from error
    from huggingface_hub.errors import HfHubHTTPError

    try:
        loaded = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, HfHubHTTPError) as error:  # missing, gated, offline, or without that split
        raise UserError(
            f"cannot load {source!r} from the hub: {error}; expected a data set that is public, or that your token may "
            "read, and a connection; check the name and split, run `hf auth login`, or use a local file"
        ) from error
    if column not in loaded.column_names:
        raise UserError(
            f"{source!r} has the columns {', '.join(loaded.column_names)}; expected {column!r}; name one after '#'"
        )
    return [{column: text} for text in loaded[column]], column


def _with_tags(prompts: list[Prompt], tasks: Sequence[str], source: str) -> list[Prompt]:
    tags = sorted({str(p.metadata["tag"]) for p in prompts if "tag" in p.metadata})
    if missing := [task for task in tasks if task not in tags]:
        raise UserError(
            f"no prompt of {source} has the tag {missing[0]!r}; expected tasks among: {', '.join(tags) or '(no tags)'}"
        )
    return [prompt for prompt in prompts if prompt.metadata.get("tag") in tasks]


def _spread(prompts: list[Prompt], limit: int) -> list[Prompt]:
    """At most `limit` prompts, taken in turn from each tag, returned in their old order."""
    by_tag: dict[Any, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_tag.setdefault(prompt.metadata.get("tag"), []).append(index)
    in_turn = [index for round_ in zip_longest(*by_tag.values()) for index in round_ if index is not None]
    return [prompts[index] for index in sorted(in_turn[:limit])]


# -------------------------------------------------------------------------------------------------------------- order
@lru_cache(maxsize=4)  # a run asks for the same pass in every update
def permutation(n_prompts: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of all prompts in one pass over them, a function of its arguments alone."""
    digest = blake2b(f"prompts|{n_prompts}|{seed}|{epoch}".encode(), digest_size=16).digest()
    order = list(range(n_prompts))
    random.Random(int.from_bytes(digest, "big")).shuffle(order)
    return tuple(order)


def prompt_batch(n_prompts: int, prompts_per_update: int, seed: int, update: int) -> list[Slot]:
    """The groups of one update: `prompts_per_update` consecutive places of an endless stream of permutations.

    Place i of the stream lies in epoch i // n_prompts, so every prompt is drawn once before any is drawn twice, and
    the epoch is also the occurrence. Each slot stands for one group of K images of its prompt.

    Args:
        n_prompts: number of prompts, at least 1.
        prompts_per_update: groups per update over all processes, at least 1.
        seed: seed of the run.
        update: number of the update, from 0.
    """
    if min(n_prompts, prompts_per_update) < 1 or update < 0:
        raise ValueError(
            f"got n_prompts={n_prompts}, prompts_per_update={prompts_per_update}, update={update}; "
            "expected at least 1, 1 and 0"
        )
    places = range(update * prompts_per_update, (update + 1) * prompts_per_update)
    orders = {epoch: permutation(n_prompts, seed, epoch) for epoch in {place // n_prompts for place in places}}
    return [Slot(orders[place // n_prompts][place % n_prompts], place // n_prompts) for place in places]


def split(batch: Sequence[T], rank: int, world: int) -> list[T]:
    """The consecutive share of whole groups that one process works on; shares differ by at most one group.

    Joined in the order of ranks, the shares are the batch again.
    """
    if not 0 <= rank < world:
        raise ValueError(f"got rank {rank} of {world} processes; expected 0 <= rank < world")
    size, extra = divmod(len(batch), world)
    start = rank * size + min(rank, extra)
    return list(batch[start : start + size + (rank < extra)])
