"""What trees cost: forwards of an update against other ways to train as many images, and the engine's own overhead.

See `benchmarks.trees` for the commands.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import samplers
from benchmarks.gradient_signal import configure
from benchmarks.overhead import Bench, Ratio, interleaved
from flowrl.config import Config
from flowrl.policies import PipelinePolicy

START, SPLITS, LEAVES = 2, 4, 16  # a window of four splits in two after two steps
TARGETS = ((16, 1.15), (1, 1.5))  # (smallest frontier, largest ratio): frontiers of 16 rows and more, and below


def window(start: int, size: int) -> str:
    """The override that puts noise and training on the steps [start, start + size), in every update."""
    return f"rollout.window={{size: {size}, low: {start}, high: {start + size}, move: frozen}}"


# ------------------------------------------------------------------------------------------------------------- forwards
class Way(NamedTuple):
    """A way to train 16 images: overrides of the config, and whether every edge has a forward of its own."""

    name: str
    overrides: tuple[str, ...]
    per_edge: bool = False


WINDOW = window(START, SPLITS)
WAYS = (
    Way("tree, one forward per parent", (WINDOW, "rollout.tree={branch: 2}")),
    Way("tree, one forward per edge", (WINDOW, "rollout.tree={branch: 2}"), per_edge=True),
    Way("independent paths, same window", (WINDOW, "rollout.tree=null")),
    Way("independent paths, all steps but the last", ("rollout.window=null", "rollout.tree=null")),
)


def one_state_per_edge(tree: samplers.Tree) -> samplers.Tree:
    """The same rollout with a state, and so a training forward, for every edge: siblings share nothing."""
    edges, states, rows = tree.edges, tree.states, tree.edges.state
    copied = samplers.States(
        x=samplers.Latents(states.x.pool, states.x.index[rows]),
        s=states.s[rows.to(states.s.device)],
        root=states.root[rows],
        node=states.node[rows],
        call=states.call[rows],
        row=states.row[rows],
    )
    return replace(tree, states=copied, edges=replace(edges, state=torch.arange(len(edges))))


def forwards(base: Config, policy: PipelinePolicy, trees: int, repeats: int, clock: str = "wall") -> dict[str, Any]:
    """Sampling calls and training forwards for 16 images in each of WAYS, and the seconds they take beside each other.

    trees: how many times 16 images are drawn and trained at once, each time another prompt.
    """
    benches: dict[str, Bench] = {}
    for way in WAYS:
        config = configure(base, [*way.overrides, f"group_size={LEAVES}", f"prompts_per_update={trees}"])
        bench = Bench(config, policy, config.optimizer.micro_batch)
        benches[way.name] = bench.with_tree(one_state_per_edge(bench.tree)) if way.per_edge else bench
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, bench in benches.items():
        runs[name, "sampling"], runs[name, "training"] = bench.rollout, bench.gradients
    taken = interleaved(runs, repeats, policy, clock)
    rows = []
    for name, bench in benches.items():
        row: dict[str, Any] = {"way": name}
        for part, calls in (("sampling", sum(bench.tree.calls)), ("training", len(bench.tree.states))):
            ratio = Ratio(taken[name, part], taken[WAYS[0].name, part])
            row[part] = _measured(ratio) | {"calls": calls / trees}
        both = Ratio(*(_sum(taken[n, "sampling"], taken[n, "training"]) for n in (name, WAYS[0].name)))
        rows.append(row | {"both": _measured(both)})
    return {"steps": base.rollout.steps, "images": trees * LEAVES, "repeats": repeats, "clock": clock, "rows": rows}


def _sum(a: Sequence[float], b: Sequence[float]) -> tuple[float, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _measured(ratio: Ratio) -> dict[str, Any]:
    low, middle, high = ratio.quartiles
    return {"seconds": statistics.median(ratio.ours), "ratio": middle, "quartiles": [low, high]}


def forwards_lines(found: dict[str, Any]) -> list[str]:
    """The result as a Markdown table."""
    out = [
        "| 16 images as | training forwards | seconds | ratio | sampling calls | seconds | ratio | both, ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        cells = [row["way"]]
        for part in ("training", "sampling"):
            cells += [f"{row[part]['calls']:g}", f"{row[part]['seconds']:.2f}", _ratio(row[part])]
        out.append(f"| {' | '.join([*cells, _ratio(row['both'])])} |")
    return out


def _ratio(found: dict[str, Any]) -> str:
    low, high = found["quartiles"]
    return f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"


# ------------------------------------------------------------------------------------------------------------- overhead
CASES = ((1, 1), (1, 3), (1, 4), (4, 1), (4, 2), (16, 1), (16, 4))  # (roots, splits in two)


def overhead(
    base: Config, policy: PipelinePolicy, cases: Sequence[tuple[int, int]], repeats: int, clock: str = "wall"
) -> dict[str, Any]:
    """Rollout and gradients of trees over the bare network calls that their plans count.

    cases: (roots, splits in two), splitting from step START on.
    """
    benches: dict[tuple[int, int], Bench] = {}
    for roots, splits in cases:
        images = roots * 2**splits
        shape = [window(START, splits), "rollout.tree={branch: 2}", f"group_size={images}", "prompts_per_update=1"]
        config = configure(base, shape)
        benches[roots, splits] = Bench(config, policy, config.rollout.chunk)
    runs: dict[tuple[tuple[int, int], str, str], Callable[[], object]] = {}
    for case, bench in benches.items():
        runs[case, "rollout", "ours"], runs[case, "rollout", "bare"] = bench.rollout, bench.bare_rollout
        runs[case, "update", "ours"], runs[case, "update", "bare"] = bench.gradients, bench.bare_update
    taken = interleaved(runs, repeats, policy, clock)
    rows = []
    for case, bench in benches.items():
        fronts = [len(front.parents) * case[0] for front in bench.plan.frontiers]
        for what, sizes in (("rollout", fronts), ("update", [len(bench.tree.states)])):
            ratio = Ratio(taken[case, what, "ours"], taken[case, what, "bare"])
            target = next(most for rows_, most in TARGETS if min(sizes) >= rows_)
            rows.append(
                {"roots": case[0], "leaves": 2 ** case[1], "part": what, "frontiers": [min(sizes), max(sizes)]}
                | _measured(ratio)
                | {"bare_s": statistics.median(ratio.bare), "target": target, "within": ratio.quartiles[1] <= target}
            )
    return {"steps": base.rollout.steps, "repeats": repeats, "clock": clock, "rows": rows}


def overhead_lines(found: dict[str, Any]) -> list[str]:
    """The result as a Markdown table."""
    out = [
        "| roots x leaves | part | latents of a frontier, states of an update | ours | bare | ratio | target | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        low, high = row["frontiers"]
        out.append(
            f"| {row['roots']} x {row['leaves']} | {row['part']} | {low if low == high else f'{low} to {high}'} "
            f"| {1e3 * row['seconds']:.0f} ms | {1e3 * row['bare_s']:.0f} ms | {_ratio(row)} "
            f"| {row['target']:g} | {'within' if row['within'] else 'above'} |"
        )
    return out
