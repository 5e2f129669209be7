"""What trees change in a group of images: how different they are, what a split's noise does, how clear a gradient is.

See `benchmarks.trees` for the commands. Every plan is the config with some overrides, with the prompts and the keys of
all others. It is compared with *its own path* taken alone: as many roots as images, the same kernel, levels and steps,
and nothing shared. Unless the plan has a coarser tail, an image by itself has the same distribution in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import samplers
from benchmarks.gradient_signal import configure, mean_cosine, roll_out, step_gradients
from benchmarks.tree_costs import window
from flowrl.config import Config
from flowrl.credit import sibling
from flowrl.planning import make_plan
from flowrl.policies import Policy
from flowrl.prompts import Prompt, Slot, load_prompts, prompt_batch
from flowrl.rewards import load_reward
from flowrl.statistics import RESAMPLES, Estimate, mean_ci
from reward_models.image_stats import in_group_diversity
from reward_models.protocol import Reward

JUDGE = "tiny-clip"  # whose features tell images apart
AIM_DIVERSITY, AIM_CALLS = 0.9, 0.7  # of independent trajectories

Overrides = tuple[str, ...]
Say = Callable[[str], None]


def _tree(*splits: int, branch: int | str = 2) -> str:
    return f"rollout.tree={{branch: {branch}, at: [{', '.join(map(str, splits))}]}}"


def _levels(shape: str) -> str:
    return f"rollout.levels={{{shape}, equal_budget: true}}"


_WINDOW, _KERNEL = window(2, 4), "rollout.kernel="
_FOUR = _tree(2, 3, 4, 5)
PLANS: dict[str, dict[str, Overrides]] = {
    "window": {
        "steps 0 to 3": (window(0, 4), _tree(0, 1, 2, 3)),
        "steps 2 to 5": (_WINDOW, _FOUR),
        "steps 4 to 7": (window(4, 4), _tree(4, 5, 6, 7)),
        "step 2, 16 children": (window(2, 1), _tree(2, branch=16)),
        "steps 2 and 3, 4 children each": (window(2, 2), _tree(2, 3, branch=4)),
    },
    "roots": {
        "2 roots, splits at 2, 3, 4": (_WINDOW, _tree(2, 3, 4)),
        "2 roots, splits at 3, 4, 5": (_WINDOW, _tree(3, 4, 5)),
        "4 roots, splits at 2, 3": (_WINDOW, _tree(2, 3)),
        "4 roots, splits at 4, 5": (_WINDOW, _tree(4, 5)),
        "8 roots, split at 2": (_WINDOW, _tree(2)),
        "8 roots, split at 5": (_WINDOW, _tree(5)),
        "16 roots": (_WINDOW, "rollout.tree=null"),
    },
    "coarse tail (0.4)": {
        "1 root, splits at 2 to 5": (_WINDOW, _FOUR, "rollout.tail={fraction: 0.4}"),
        "4 roots, splits at 2, 3": (_WINDOW, _tree(2, 3), "rollout.tail={fraction: 0.4}"),
        "8 roots, split at 2": (_WINDOW, _tree(2), "rollout.tail={fraction: 0.4}"),
    },
    "kernel, level": {
        "cps 0.4": (_WINDOW, _FOUR, "rollout.level=0.4"),
        "flow 0.7": (_WINDOW, _FOUR, f"{_KERNEL}flow"),
        "dance 0.3": (_WINDOW, _FOUR, f"{_KERNEL}dance"),
        "precise 1.5": (_WINDOW, _FOUR, f"{_KERNEL}precise"),
    },
    "schedule of cps 0.5": {
        "constant": (_WINDOW, _FOUR, "rollout.level=0.5"),
        "growth 0.5": (_WINDOW, _FOUR, "rollout.level=0.5", _levels("shape: growth, growth: 0.5")),
        "growth 1": (_WINDOW, _FOUR, "rollout.level=0.5", _levels("shape: growth, growth: 1.0")),
        "growth -0.5": (_WINDOW, _FOUR, "rollout.level=0.5", _levels("shape: growth, growth: -0.5")),
        "cosine": (_WINDOW, _FOUR, "rollout.level=0.5", _levels("shape: cosine, low: 0.2")),
    },
}


# ----------------------------------------------------------------------------------------------------------- statistics
def ratio_ci(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of ours over mean of theirs, one number each per prompt, with the 95 % interval of resampling prompts.

    A prompt where either is missing is left out.
    """
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    known = ~np.isnan(a + b)
    a, b = a[known], b[known]
    n = len(a)
    if n < 2:
        return Estimate(a.sum() / b.sum() if n else math.nan, math.nan, math.nan, n)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    low, high = np.quantile((drawn @ a) / (drawn @ b), [0.025, 0.975])
    return Estimate(float(a.sum() / b.sum()), float(low), float(high), n)


def sibling_variance(rewards: Tensor, plan: samplers.Plan, groups: Tensor) -> dict[int, Tensor]:
    """Per step that splits, (G,): mean over the forks of a group of the variance between their children's means.

    rewards: (R, L). groups: (R,). With equal numbers of leaves below all children of a fork, as in the trees of a plan
    here. A child's mean is itself the mean of b children further down, so its variance contains one b-th of theirs.
    """
    step = sibling(rewards.double(), plan, groups).advantages  # V_child - V_parent where the parent forks
    found = {}
    for depth in range(plan.depth):
        forks = [i for i in range(len(plan)) if plan.depths[i] == depth and len(plan.children(i)) > 1]
        if forks:
            of_each = [
                step[:, list(plan.children(fork))].square().sum(1) / (len(plan.children(fork)) - 1) for fork in forks
            ]
            per_root = torch.stack(of_each).mean(0)
            found[depth] = torch.stack([per_root[groups == group].mean() for group in groups.unique()])
    return found


def own_variance(between: Mapping[int, Tensor], plan: samplers.Plan) -> dict[int, Tensor]:
    """Per step that splits, (G,): what its own noise adds to the variance of a leaf's reward.

    The variance between siblings less that of their means, sigma_k^2 = MS_k - MS_{k+1} / b_{k+1} (nested analysis of
    variance). Its expectation is the true one, so a single value may be below 0.
    """
    splits, out = sorted(between), {}
    for place, step in enumerate(splits):
        out[step] = between[step]
        if place + 1 < len(splits):
            below = splits[place + 1]
            children = next(len(plan.children(i)) for i in range(len(plan)) if plan.depths[i] == below)
            out[step] = between[step] - between[below] / children
    return out


class Spread(NamedTuple):
    """Of every group of images: mean pairwise distance of features, std and mean of the rewards; (G,) each."""

    diversity: Tensor
    reward_std: Tensor
    reward: Tensor


def spread(images: Tensor, rewards: Tensor, group_size: int, judge: Any) -> Spread:
    """images: (G K, 3, H, W), groups one after another. rewards: as many; a group with a missing one has none."""
    groups = torch.arange(len(images)) // group_size
    with torch.no_grad():
        features = torch.cat([judge.features(part) for part in images.split(64)])
    values = rewards.reshape(-1, group_size).double()
    return Spread(in_group_diversity(features, groups).double(), values.std(1), values.mean(1))


# ------------------------------------------------------------------------------------------------------------ diversity
def alone(plan: samplers.Plan) -> samplers.Plan:
    """The path to the first leaf, as a plan of its own."""
    return plan.branch(plan.leaves[0])


def diversity(
    base: Config,
    policy: Policy,
    plans: Mapping[str, Mapping[str, Overrides]],
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Diversity, reward spread and calls of every plan, on all prompts of the config, and their ratios to its paths
    taken alone, without a coarser tail."""
    prompts = load_prompts(**base.prompts.model_dump())
    reward, judge = load_reward(base.reward, device=policy.device), load_reward(JUDGE, device=policy.device)
    configs = {(part, name): configure(base, given) for part, rows in plans.items() for name, given in rows.items()}
    known: dict[samplers.Plan, Spread] = {}

    def measure(config: Config, plan: samplers.Plan) -> Spread:
        if plan not in known:
            slots = [Slot(number, 0) for number in range(len(prompts))]
            drawn = roll_out(config, policy, prompts, reward, slots, plan)
            known[plan] = spread(drawn.images, drawn.rewards, config.group_size, judge)
        return known[plan]

    rows = []
    for (part, name), config in configs.items():
        sigmas = policy.sigmas(config.rollout.steps, config.rollout.height, config.rollout.width)
        plan = make_plan(config, sigmas, 0)
        reference = alone(make_plan(configure(config, ["rollout.tail=null"]), sigmas, 0))
        ours, theirs = measure(config, plan), measure(config, reference)
        cost = plan.cost() * plan.roots(config.group_size)
        paths = reference.cost() * config.group_size
        row: dict[str, Any] = {
            "part": part,
            "plan": name,
            "overrides": list(plans[part][name]),
            "roots": plan.roots(config.group_size),
            "sampling_calls_per_image": cost.sampling_calls / cost.images,
            "calls_per_image": cost.calls_per_image,
            "sampling_ratio": cost.sampling_calls / paths.sampling_calls,
            "calls_ratio": cost.calls_per_image / paths.calls_per_image,
            "diversity": asdict(_mean(ours.diversity)),
            "diversity_alone": asdict(_mean(theirs.diversity)),
            "diversity_ratio": asdict(ratio_ci(ours.diversity.tolist(), theirs.diversity.tolist())),
            "reward_std_ratio": asdict(ratio_ci(ours.reward_std.tolist(), theirs.reward_std.tolist())),
            "reward": asdict(_mean(ours.reward)),
            "reward_alone": asdict(_mean(theirs.reward)),
        }
        row["reached"] = row["diversity_ratio"]["low"] >= AIM_DIVERSITY and row["sampling_ratio"] <= AIM_CALLS
        rows.append(row)
        say(f"{part}, {name}: diversity {_cell(row['diversity_ratio'])} of its paths alone")
    return {"steps": base.rollout.steps, "prompts": len(prompts), "judge": JUDGE, "rows": rows}


def _mean(values: Tensor) -> Estimate:
    return mean_ci([[value] for value in values.tolist()])


def _cell(found: Mapping[str, Any], digits: int = 2) -> str:
    return f"{found['mean']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def diversity_lines(found: dict[str, Any]) -> list[str]:
    """The result as a Markdown table; a star marks plans that keep AIM_DIVERSITY at AIM_CALLS."""
    out = [
        "| plan | roots | sampling calls per image | with training | calls, ratio | with training | diversity "
        "| diversity, ratio | reward std, ratio | reward (alone) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    part = ""
    for row in found["rows"]:
        if row["part"] != part:
            part = row["part"]
            out.append(f"| *{part}* |" + " |" * 9)
        out.append(
            f"| {row['plan']} | {row['roots']} | {row['sampling_calls_per_image']:.2f} | {row['calls_per_image']:.2f} "
            f"| {row['sampling_ratio']:.2f} | {row['calls_ratio']:.2f} | {row['diversity']['mean']:.3f} "
            f"| {_cell(row['diversity_ratio'])}{' *' * row['reached']} | {_cell(row['reward_std_ratio'])} "
            f"| {row['reward']['mean']:.3f} ({row['reward_alone']['mean']:.3f}) |"
        )
    return out


# ---------------------------------------------------------------------------------------------------------------- noise
_CPS, _FLOW = ("rollout.level=0.7",), (f"{_KERNEL}flow", "rollout.density=gaussian", "rollout.level=0.7")
SHAPES = {
    "constant": "shape: constant",  # first: the others are compared with it
    "growing (0.5)": "shape: growth, growth: 0.5",
    "falling (-0.5)": "shape: growth, growth: -0.5",
    "cosine (to 0.2)": "shape: cosine, low: 0.2",
}
SCHEDULES: dict[str, dict[str, Overrides]] = {
    kernel: {name: (_WINDOW, _FOUR, *given, _levels(shape)) for name, shape in SHAPES.items()}
    for kernel, given in (("cps 0.7, unscaled", _CPS), ("flow 0.7, gaussian", _FLOW))
}


class Measured(NamedTuple):
    """Updates of one schedule: gradients (U, D), and of all their groups the spread and the siblings' variances."""

    plan: samplers.Plan
    gradients: Tensor
    spread: Spread
    between: dict[int, Tensor]


def draw_updates(
    config: Config, policy: Policy, prompts: Sequence[Prompt], reward: Reward, judge: Any, seeds: Sequence[int]
) -> Measured:
    """The first updates of runs with these seeds."""
    gradients, spreads, between = [], [], []
    for seed in seeds:
        seeded = config.model_copy(update={"seed": seed})
        slots = prompt_batch(len(prompts), config.prompts_per_update, seed, 0)
        drawn = roll_out(seeded, policy, prompts, reward, slots)
        gradients.append(torch.stack(list(step_gradients(seeded, policy, drawn).values())).sum(0))
        spreads.append(spread(drawn.images, drawn.rewards, config.group_size, judge))
        between.append(sibling_variance(drawn.rewards, drawn.tree.plan, drawn.place))
    together = {step: torch.cat([found[step] for found in between]) for step in between[0]}
    of_all = Spread(*(torch.cat(columns) for columns in zip(*spreads, strict=True)))
    return Measured(drawn.tree.plan, torch.stack(gradients), of_all, together)


def noise(
    base: Config,
    policy: Policy,
    schedules: Mapping[str, Mapping[str, Overrides]],
    updates: int,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Schedules of equal budget in one tree, all with the same seeds; per kernel the first is what the others are
    compared with."""
    prompts = load_prompts(**base.prompts.model_dump())
    reward, judge = load_reward(base.reward, device=policy.device), load_reward(JUDGE, device=policy.device)
    configs = {kernel: {n: configure(base, given) for n, given in some.items()} for kernel, some in schedules.items()}
    rows = []
    for kernel, some in configs.items():
        first: Measured | None = None
        for name, config in some.items():
            found = draw_updates(config, policy, prompts, reward, judge, range(base.seed, base.seed + updates))
            first = first or found
            own = own_variance(found.between, found.plan)
            path = alone(found.plan)
            row: dict[str, Any] = {
                "kernel": kernel,
                "schedule": name,
                "levels": [level for level in path.level if level > 0],
                "steps": {
                    str(step): {
                        "siblings_std": asdict(_root(_mean(found.between[step]))),
                        "own_variance": asdict(_mean(own[step])),
                    }
                    for step in found.between
                },
                "reward": asdict(_mean(found.spread.reward)),
                "reward_std": asdict(_mean(found.spread.reward_std)),
                "diversity": asdict(_mean(found.spread.diversity)),
                "diversity_ratio": asdict(ratio_ci(found.spread.diversity.tolist(), first.spread.diversity.tolist())),
                "reward_std_ratio": asdict(
                    ratio_ci(found.spread.reward_std.tolist(), first.spread.reward_std.tolist())
                ),
                "cosine": mean_cosine(found.gradients)._asdict(),
                "cosine_difference": mean_cosine(found.gradients, first.gradients)._asdict(),
            }
            rows.append(row)
            say(f"{kernel}, {name}: cosine {_cell(row['cosine'], 3)}, diversity {_cell(row['diversity'], 3)}")
    images = base.prompts_per_update * base.group_size
    return {"updates": updates, "images_per_update": images, "judge": JUDGE, "rows": rows}


def _root(found: Estimate) -> Estimate:
    mean, low, high = (math.sqrt(max(0.0, value)) for value in (found.mean, found.low, found.high))
    return Estimate(mean, low, high, found.prompts)


def noise_lines(found: dict[str, Any]) -> list[str]:
    """The result as two Markdown tables: what the splits do to rewards, and what is left of it in the group."""
    steps = list(found["rows"][0]["steps"])
    titles = " | ".join(f"step {step}" for step in steps)
    out = [f"| kernel | schedule | levels | {titles} |", "|---|---|---|" + "---|" * len(steps)]
    for row in found["rows"]:
        cells = [_cell(row["steps"][step]["siblings_std"], 3) for step in steps]
        levels = ", ".join(f"{level:.2f}" for level in row["levels"])
        out.append(f"| {row['kernel']} | {row['schedule']} | {levels} | {' | '.join(cells)} |")
    out += ["", f"| kernel | schedule | {titles} |", "|---|---|" + "---|" * len(steps)]
    for row in found["rows"]:
        cells = [_cell(row["steps"][step]["own_variance"], 4) for step in steps]
        out.append(f"| {row['kernel']} | {row['schedule']} | {' | '.join(cells)} |")
    out += [
        "",
        "| kernel | schedule | reward | reward std | over constant | diversity | over constant | cosine "
        "| minus constant |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        out.append(
            f"| {row['kernel']} | {row['schedule']} | {row['reward']['mean']:.3f} | {row['reward_std']['mean']:.3f} "
            f"| {_cell(row['reward_std_ratio'])} | {row['diversity']['mean']:.3f} | {_cell(row['diversity_ratio'])} "
            f"| {_cell(row['cosine'], 3)} | {_cell(row['cosine_difference'], 3)} |"
        )
    return out
