"""`flowrl score`: images in, a table of scores out; also the scoring step of every benchmark."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl import score_table as table
from flowrl.commands.progress import Progress
from flowrl.config import parse_yaml
from flowrl.errors import UserError
from flowrl.images import MANIFESTS, Item, Unreadable, digest, find, read_image
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
    from flowrl.rewards import ask_elsewhere, load_reward

    entries = reward_entries(text)
    target = find_device(device)
    found: dict[str, Reward] = {}
    ask_elsewhere(*entries)
    for entry in entries:
        if isinstance(entry, str):
            name, reward = entry, load_reward(entry, target)
        elif _is_one_with_options(entry):
            ((name, options),) = entry.items()
            reward = load_reward(name, target, **options)
        else:
            reward = load_reward(entry, target)
            name = reward.spec.name
        if name in found:
            raise UserError(f"--reward names {name!r} twice; expected each once; score the second into another --out")
        found[name] = reward
    return found


def reward_entries(text: str) -> list[Any]:
    """What `--reward` names: a specification of a reward for each column."""
    parsed = parse_yaml(text, "--reward") if text.lstrip().startswith(("{", "[")) else text.split(",")
    entries = [
        each.strip() if isinstance(each, str) else each for each in (parsed if isinstance(parsed, list) else [parsed])
    ]
    if not entries:
        raise UserError("--reward names no reward; expected at least one, such as --reward jpeg")
    return entries


def _is_one_with_options(entry: Any) -> bool:
    """Whether it is `{name: {option: value}}` without a weight."""
    if not isinstance(entry, dict) or len(entry) != 1:
        return False
    (options,) = entry.values()
    return isinstance(options, dict) and "weight" not in options


def check_rewards(text: str) -> None:
    """Refuse in seconds what `load_rewards` would: unknown names, bad grammar, servers that are not there.

    No weights are loaded; a reward of one's own is looked for when it is loaded.
    """
    from flowrl.rewards import ask_elsewhere, load_reward
    from reward_models import loading, recipe

    entries = reward_entries(text)
    ask_elsewhere(*entries)
    for entry in entries:
        try:
            names = [*entry] if _is_one_with_options(entry) else list(recipe.names(recipe.parse(entry)))
        except ValueError as error:
            raise UserError(str(error)) from error
        for name in names:
            if ":" not in name and name not in loading.BUILT_IN and not loading.is_folder(name):
                load_reward(name)  # raises, and says which is the nearest


def score(
    sources: Sequence[str | Path], reward: str, *, prompts: str | None = None, texts: Sequence[str] = (),
    outs: Sequence[Path] = (), device: str = "auto", say: Callable[[str], None] = print,
) -> Path:  # fmt: skip
    """Score images and write the tables that `outs` ask for; returns the path of the JSON-lines one.

    Images whose file, prompt and metadata are those of a row that has the score already are not scored again.
    """
    found = find(sources, prompts, texts)
    written = [*outs] or [_home(sources) / "scores.jsonl"]
    for out in written:
        if out.suffix not in OUTPUTS:
            raise UserError(f"got --out {out}; expected a name that ends in {', '.join(OUTPUTS)}")
    tables = [out for out in written if out.suffix == ".jsonl"] or [written[0].with_suffix(".jsonl")]
    if len(set(tables)) > 1:
        raise UserError(f"got --out {tables[0]} and {tables[1]}; expected one table that ends in .jsonl")
    store = tables[0]
    read = {Path(source).resolve() for source in (*sources, *filter(None, [prompts]))}
    if lost := [out for out in (store, *written) if out.resolve() in read]:
        raise UserError(f"{lost[0]} is what is read; expected another file to write to; name it with --out")
    for out in (store, *written):
        table.make_folder(out.parent)  # now, and not when everything is scored
    done = score_items(found, load_rewards(reward, device), store, say=say)
    for out in written:
        if out.suffix == ".csv":
            table.replace(out, table.to_csv(done.rows))
        elif out.suffix == ".json":
            table.replace(out, table.to_json(done.columns, done.rows))
        elif out.suffix == ".html":
            table.replace(out, page(done, {item.image: item.path for item in found}))
    for name in done.columns:
        missing = sum(row["scores"].get(name) is None for row in done.rows)
        say(f"{name} of {len(done.rows)} images, {missing} without a score{_why(done.rows, name)}")
        for label, part in [("score", None), *((part, part) for part in _parts(done.rows, name))]:
            value = table.estimate(done.rows, name, part)
            say(f"  {label:<20}{_mean(value)}{_interval(value)}")
    say(f"{_what(done.rows)}; {done.throughput()}")
    say(f"written to {', '.join(map(str, dict.fromkeys([store, *written])))}")
    return store


def _home(sources: Sequence[str | Path]) -> Path:
    """Where the table goes unless told otherwise: to which its names of images are relative."""
    source = Path(sources[0])
    if source.is_dir():
        return source
    return source.parent if source.suffix.lower() in MANIFESTS else Path()


def _why(rows: Sequence[ScoreRow], name: str) -> str:
    """The most common reason of a missing score."""
    reasons = Counter(row["reasons"].get(name) for row in rows if row["scores"].get(name, 0.0) is None)
    return f" ({reasons.most_common(1)[0][0]})" if reasons else ""


def score_items(
    found: Sequence[Item], rewards: Mapping[str, Reward], store: Path, *, batch: int = BATCH,
    say: Callable[[str], None] = lambda line: None,
) -> Scored:  # fmt: skip
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
    new, over = sum(map(len, todo.values())), 0
    tell = Progress(say, new, "scores computed")
    start = time.perf_counter()
    for sets in (False, True):  # rewards of the whole set come last, in one batch
        chosen = {name: reward for name, reward in rewards.items() if (reward.spec.scope == "set") == sets}
        wanted = [item for item in found if any(item.image in todo[name] for name in chosen)]
        whole = any(reward.spec.scope == "group" for reward in chosen.values())
        for part, pictures in _loaded([wanted] if sets and wanted else _batches(wanted, batch, whole)):
            for name, reward in chosen.items():
                some = [item for item in part if item.image in todo[name]]
                _score_batch(name, reward, some, pictures, rows)
                tell(over := over + len(some))
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
        sha256=sha256, scores={}, parts={}, reasons={}, metadata=item.metadata,
    )  # fmt: skip
    if item.seed_index is not None:
        row["seed_index"] = item.seed_index
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


def _batches(found: Sequence[Item], size: int, whole: bool) -> list[list[Item]]:
    """About `size` images each. whole: never cut the images of one prompt apart, as group-wise rewards need them."""
    if not whole:
        return [list(found[start : start + size]) for start in range(0, len(found), size)]
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


def _mean(value: Estimate) -> str:
    return "–" if math.isnan(value.mean) else f"{value.mean:.4f}"


def _interval(value: Estimate, before: str = "   95 % interval ") -> str:
    return "" if math.isnan(value.low) else f"{before}{value.low:.4f} to {value.high:.4f}"


def _what(rows: Sequence[ScoreRow]) -> str:
    """What `score_table.estimate` gives the mean of."""
    tags = {row["tag"] for row in rows}
    return f"Means are those of the {len(tags)} task means" if len(tags) > 1 and all(tags) else "Means are over images"


# ----------------------------------------------------------------------------------------------------------------- page
def page(done: Scored, paths: Mapping[str, Path], title: str = "Scores") -> str:
    """A self-contained page: means with intervals, those of the tasks, and thumbnails from the highest score down."""
    from flowrl.pages import card, means_chart, render

    names = list(done.columns)
    by_task: dict[str, list[ScoreRow]] = {}
    for row in done.rows:
        by_task.setdefault(row["tag"] or "no task", []).append(row)
    lines, drawn = [], []
    for name in names:
        value = table.estimate(done.rows, name)
        missing = sum(row["scores"].get(name) is None for row in done.rows)
        lines.append([name, _mean(value), _interval(value, ""), str(missing)])
        if len(by_task) > 1 and missing < len(done.rows):
            tasks = {task: table.as_dict(table.estimate(rows, name, by_task=False)) for task, rows in by_task.items()}
            drawn.append((f"{name}: mean of each task", means_chart(tasks)))

    def cards(rows: Sequence[ScoreRow]) -> list[dict[str, Any]]:
        return [card(row["prompt"], (paths[row["image"]], _lines(row, names))) for row in rows]

    ranked = sorted(done.rows, key=lambda row: -_rank(row, names[0]))
    sections = [{"title": f"By {names[0]}, highest first", "cards": cards(ranked[:CARDS])}]
    if rest := ranked[max(CARDS, len(ranked) - CARDS) :]:
        sections.append({"title": "The other end", "cards": cards(rest)})
    return render(
        title=title, lead=f"{len(done.rows)} images. {_what(done.rows)}; intervals are bootstrap over prompts.",
        heads=["score", "mean", "95 % interval", "missing"], lines=lines, charts=drawn, sections=sections,
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
