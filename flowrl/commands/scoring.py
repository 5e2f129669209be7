"""`flowrl score`: images in, a table of scores out; also the scoring step of every benchmark."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl import score_table as table
from flowrl.config import parse_yaml
from flowrl.errors import UserError
from flowrl.images import Item, Unreadable, digest, find, read_image
from flowrl.score_table import ScoreRow
from flowrl.statistics import Estimate

if TYPE_CHECKING:
    from torch import Tensor

    from reward_models.protocol import Reward, RewardResult

BATCH = 64  # images scored together, where a reward does not need them all
READERS = 4  # threads that decode the next batch while one is scored
OUTPUTS = (".jsonl", ".csv", ".json", ".html")
CARDS = 120  # pictures in each section of the page


@dataclass(frozen=True)
class Scored:
    """A table and what it cost: `kept` scores were there before, `new` were computed, in `seconds`."""

    rows: list[ScoreRow]
    columns: dict[str, table.Spec]
    kept: int
    new: int
    seconds: float

    def throughput(self) -> str:
        """A line about time."""
        rate = f" ({self.new / self.seconds:.1f} a second)" if self.seconds > 0 and self.new else ""
        return f"{self.new} scores computed in {self.seconds:.1f} s{rate}, {self.kept} kept from before"


def load_rewards(text: str, device: str = "auto") -> dict[str, Reward]:
    """Column name -> reward, from what `--reward` says.

    text: names with commas between them (a column each), a mapping `{name: weight}` (one column, their weighted sum),
    or a YAML list of names and mappings. `{name: {option: value}}` without a weight is one reward with options.
    """
    from flowrl.policies.loading import find_device
    from flowrl.rewards import load_reward

    entries = parse_yaml(text, "--reward") if text.lstrip().startswith(("{", "[")) else text.split(",")
    target = find_device(device)
    found: dict[str, Reward] = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        if isinstance(entry, str):
            name, reward = entry.strip(), load_reward(entry.strip(), target)
        elif isinstance(entry, dict) and len(entry) == 1 and _options_only(next(iter(entry.values()))):
            ((name, options),) = entry.items()
            reward = load_reward(name, target, **options)
        else:
            reward = load_reward(entry, target)
            name = reward.spec.name
        if name in found:
            raise UserError(f"--reward names {name!r} twice; expected each once; score the second into another --out")
        found[name] = reward
    return found


def _options_only(options: object) -> bool:
    return isinstance(options, dict) and "weight" not in options


def score(
    sources: Sequence[str | Path], reward: str, *, prompts: str | None = None, texts: Sequence[str] = (),
    outs: Sequence[Path] = (), device: str = "auto", say: Callable[[str], None] = print,
) -> Path:  # fmt: skip
    """Score images and write the tables that `outs` ask for; returns the path of the JSON-lines one.

    Images whose file, prompt and metadata are those of a row that has the score already are not scored again.
    """
    found = find(sources, prompts, texts)
    written = [*outs] or [(Path(sources[0]) if Path(sources[0]).is_dir() else Path()) / "scores.jsonl"]
    for out in written:
        if out.suffix not in OUTPUTS:
            raise UserError(f"got --out {out}; expected a name that ends in {', '.join(OUTPUTS)}")
    store = next((out for out in written if out.suffix == ".jsonl"), written[0].with_suffix(".jsonl"))
    done = score_items(found, load_rewards(reward, device), store)
    for out in written:
        if out.suffix == ".csv":
            table.replace(out, table.to_csv(done.rows))
        elif out.suffix == ".json":
            table.replace(out, table.to_json(done.columns, done.rows))
        elif out.suffix == ".html":
            table.replace(out, page(done, {item.image: item.path for item in found}))
    for name in done.columns:
        missing = sum(row["scores"].get(name) is None for row in done.rows)
        say(f"{name} of {len(done.rows)} images, {missing} without a score")
        for label, part in [("score", None), *((part, part) for part in _parts(done.rows, name))]:
            value = table.estimate(done.rows, name, part)
            say(f"  {label:<20}{value.mean:.4f}{_interval(value)}")
    say(done.throughput())
    say(f"written to {', '.join(map(str, dict.fromkeys([store, *written])))}")
    return store


def score_items(found: Sequence[Item], rewards: Mapping[str, Reward], store: Path, *, batch: int = BATCH) -> Scored:
    """Score items with each reward into the table at `store`, which is resumed.

    An image that cannot be read, or that alone makes a reward raise, is missing with the reason.

    Raises:
        UserError: the table has other images, or a column from another version of a reward; images of different sizes
            where a reward needs them together.
        RewardError: a reward failed for every image of its first batch.
    """
    specs = {name: table.spec_dict(reward.spec) for name, reward in rewards.items()}
    old = _matching(store, found)
    table.open_columns(store, specs)
    rows = {item.image: _row(item, old.get(item.image)) for item in found}
    todo = {name: _to_score(name, reward.spec.scope, found, rows) for name, reward in rewards.items()}
    new = sum(map(len, todo.values()))
    start = time.perf_counter()
    for sets in (False, True):  # rewards of the whole set come last, in one batch
        chosen = {name: reward for name, reward in rewards.items() if (reward.spec.scope == "set") == sets}
        wanted = [item for item in found if any(item.image in todo[name] for name in chosen)]
        for part, pictures in _loaded(_batches(wanted, len(wanted) if sets else batch)):
            for name, reward in chosen.items():
                _score_batch(name, reward, [item for item in part if item.image in todo[name]], pictures, rows)
            table.append(store, [rows[item.image] for item in part])
    table.finish(store, list(rows.values()))
    columns, _ = table.read(store)
    seconds = time.perf_counter() - start
    return Scored(list(rows.values()), columns, len(found) * len(rewards) - new, new, seconds)


def _matching(store: Path, found: Sequence[Item]) -> dict[str, ScoreRow]:
    """The rows of the table by image, all of them of images that are to be scored."""
    old = {row["image"]: row for row in table.read(store)[1]}
    names = {item.image for item in found}
    if other := [name for name in old if name not in names]:
        raise UserError(
            f"{store} has scores of {len(other)} images that are not among these, such as {other[0]}; expected the "
            "same images; name another --out"
        )
    return old


def _row(item: Item, old: ScoreRow | None) -> ScoreRow:
    """The row of an image: with the scores it has, if file, prompt and metadata are the same as then."""
    sha256, tag = digest(item.path), item.metadata.get("tag")
    row = ScoreRow(
        image=item.image, prompt=item.prompt, prompt_id=item.prompt_id, tag=None if tag is None else str(tag),
        sha256=sha256, scores={}, parts={}, reasons={}, metadata=item.metadata, seed_index=item.seed_index,
    )  # fmt: skip
    same = ("prompt", "sha256", "metadata")
    if old is not None and sha256 is not None and all(old[key] == row[key] for key in same):  # type: ignore[literal-required]
        row |= {"scores": dict(old["scores"]), "parts": dict(old["parts"]), "reasons": dict(old["reasons"])}
    return row


def _to_score(name: str, scope: str, found: Sequence[Item], rows: Mapping[str, ScoreRow]) -> set[str]:
    """Images without this score, and those that must be scored together with one of them.

    A missing score is tried again: what stood in its way may have been a server that was down.
    """
    lacking = {item.image for item in found if rows[item.image]["scores"].get(name) is None}
    if scope == "point":
        return lacking
    prompts = {item.prompt_id for item in found if item.image in lacking}
    return {item.image for item in found if item.prompt_id in prompts or (lacking and scope == "set")}


def _batches(found: Sequence[Item], size: int) -> list[list[Item]]:
    """About `size` images each, without cutting the images of one prompt apart (group-wise rewards need them)."""
    groups: dict[int, list[Item]] = {}
    for item in found:
        groups.setdefault(item.prompt_id, []).append(item)
    batches: list[list[Item]] = []
    for group in groups.values():
        if not batches or len(batches[-1]) + len(group) > size:
            batches.append([])
        batches[-1] += group
    return batches


def _loaded(batches: Sequence[list[Item]]) -> Iterator[tuple[list[Item], dict[str, Tensor | Unreadable]]]:
    """Each batch with its pictures; the files of the next one are read meanwhile."""

    def read(item: Item) -> Tensor | Unreadable:
        try:
            return read_image(item.path)
        except Unreadable as reason:
            return reason

    with ThreadPoolExecutor(READERS) as pool:
        ahead: list[list[Future[Tensor | Unreadable]]] = [[pool.submit(read, item) for item in b] for b in batches[:1]]
        for number, batch in enumerate(batches):
            current = ahead.pop()
            ahead.append([pool.submit(read, item) for item in batches[number + 1]] if number + 1 < len(batches) else [])
            yield batch, {item.image: future.result() for item, future in zip(batch, current, strict=True)}


def _score_batch(
    name: str, reward: Reward, batch: Sequence[Item], pictures: Mapping[str, Tensor | Unreadable],
    rows: Mapping[str, ScoreRow],
) -> None:  # fmt: skip
    """Enter the scores of a batch into its rows."""
    by_size: dict[tuple[int, ...], list[Item]] = {}
    for item in batch:
        picture = pictures[item.image]
        if isinstance(picture, Unreadable):
            _enter(rows[item.image], name, None, {}, str(picture))
        else:
            by_size.setdefault(tuple(picture.shape), []).append(item)
    if len(by_size) > 1 and reward.spec.scope != "point":
        raise UserError(
            f"got images of different sizes for {name!r}, which scores images together; expected one size; score each "
            "size by itself"
        )
    for same in by_size.values():
        for item, result, at in _answers(reward, same, pictures):
            if isinstance(result, str):
                _enter(rows[item.image], name, None, {}, result)
            else:
                parts = {part: _number(values[at]) for part, values in result.parts.items()}
                _enter(rows[item.image], name, _number(result.values[at]), parts, result.reasons[at])


def _answers(
    reward: Reward, batch: Sequence[Item], pictures: Mapping[str, Any]
) -> list[tuple[Item, RewardResult | str, int]]:
    """(image, result, place in it) for each image; what the reward raised, where it raises for this image alone.

    Raises:
        RewardError: images scored together, or every single one of the batch.
    """
    from reward_models.protocol import RewardError

    try:
        result = _ask(reward, batch, pictures)
    except RewardError as error:
        if reward.spec.scope != "point" or len(batch) == 1:
            raise
        first = error
    else:
        return [(item, result, at) for at, item in enumerate(batch)]
    single: list[RewardResult | str] = []
    for item in batch:  # one of them spoils the batch: find out which
        try:
            single.append(_ask(reward, [item], pictures))
        except RewardError as error:
            single.append(str(error))
    if all(isinstance(answer, str) for answer in single):
        raise first
    return [(item, answer, 0) for item, answer in zip(batch, single, strict=True)]


def _ask(reward: Reward, batch: Sequence[Item], pictures: Mapping[str, Any]) -> RewardResult:
    import torch

    from reward_models.protocol import checked_score

    return checked_score(
        reward,
        torch.stack([pictures[item.image] for item in batch]),
        [item.prompt for item in batch],
        [item.metadata for item in batch],
        torch.tensor([item.prompt_id for item in batch]),
        all_missing="allow",
    )


def _enter(row: ScoreRow, name: str, value: float | None, parts: dict[str, float | None], reason: str | None) -> None:
    row["scores"][name], row["parts"][name] = value, parts
    row["reasons"].pop(name, None)
    if reason:
        row["reasons"][name] = reason


def _number(value: Any) -> float | None:
    number = float(value)
    return None if math.isnan(number) else number


def _parts(rows: Sequence[ScoreRow], name: str) -> list[str]:
    return list(dict.fromkeys(part for row in rows for part in row["parts"].get(name, ())))


def _interval(value: Estimate) -> str:
    return "" if math.isnan(value.low) else f"   95 % interval {value.low:.4f} to {value.high:.4f}"


# ----------------------------------------------------------------------------------------------------------------- page
def page(done: Scored, paths: Mapping[str, Path], title: str = "Scores") -> str:
    """A self-contained page: means with intervals, and thumbnails from the highest score to the lowest."""
    from flowrl.pages import card, render

    names = list(done.columns)
    lines = []
    for name in names:
        value = table.estimate(done.rows, name)
        missing = sum(row["scores"].get(name) is None for row in done.rows)
        lines.append([name, f"{value.mean:.4f}{_interval(value)}", str(missing)])

    def cards(rows: Sequence[ScoreRow]) -> list[dict[str, Any]]:
        return [card(paths[row["image"]], row["prompt"], _lines(row, names)) for row in rows]

    ranked = sorted(done.rows, key=lambda row: -_rank(row, names[0]))
    sections = [{"title": f"By {names[0]}, highest first", "cards": cards(ranked[:CARDS])}]
    if rest := ranked[max(CARDS, len(ranked) - CARDS) :]:
        sections.append({"title": "The other end", "cards": cards(rest)})
    return render(
        title=title, lead=f"{len(done.rows)} images; intervals (95 %) are bootstrap over prompts.",
        heads=["score", "mean", "missing"], lines=lines, sections=sections,
    )  # fmt: skip


def _rank(row: ScoreRow, name: str) -> float:
    value = row["scores"].get(name)
    return -math.inf if value is None else value


def _lines(row: ScoreRow, names: Sequence[str]) -> list[str]:
    found = [row["image"]]
    for name in names:
        value = row["scores"].get(name)
        found.append(f"{name}: {'missing' if value is None else f'{value:.4f}'}")
        if reason := row["reasons"].get(name):
            found.append(reason)
    return found
