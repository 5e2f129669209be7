"""Rules about the rollout: settings of one structure beside those of another, and every plan that a run would use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from flowrl.errors import UserError
from flowrl.schema import Config, Levels, RolloutConfig

MOST_UPDATES = 4_000  # of which each one's plan is checked; of more, some evenly spaced ones and the last


class Problem(NamedTuple):
    """One thing that is wrong: the dotted names it involves and a message (got, expected, how to fix)."""

    names: tuple[str, ...]
    message: str


def plan_problems(config: Config) -> Iterator[Problem]:
    """All impossible combinations in `rollout`, alone and with what else a plan depends on."""
    found = [*_steps(config), *_kernel(config), *_structure(config), *_draws(config)]
    yield from found or _plans(config)  # a plan would only repeat them


def _steps(config: Config) -> Iterator[Problem]:
    rollout = config.rollout
    trained = rollout.trained_steps
    if trained < 1:
        yield Problem(
            ("rollout.steps", "rollout.train_fraction"),
            f"int(rollout.steps {rollout.steps} * train_fraction {rollout.train_fraction}) = 0 steps are trained; "
            "expected at least one; raise rollout.train_fraction",
        )
    if rollout.window is not None and rollout.window_range is not None:
        low, high = rollout.window_range
        names = ("rollout.window.size", "rollout.window.low", "rollout.window.high", "rollout.steps")
        if high > trained >= 1:
            yield Problem(
                (*names, "rollout.train_fraction"),
                f"rollout.window may reach up to step {high}, but only the first {trained} of {rollout.steps} steps "
                f"are trained; expected rollout.window.high at most {trained}",
            )
        if low + rollout.window.size > high:
            yield Problem(
                names,
                f"rollout.window of {rollout.window.size} steps does not fit between step {low} and step {high} of "
                f"{rollout.steps}; expected low + size at most high; shrink rollout.window.size or raise "
                "rollout.window.high or rollout.steps",
            )
    if (rollout.height is None) != (rollout.width is None):
        yield Problem(
            ("rollout.height", "rollout.width"),
            f"rollout.height is {rollout.height} and rollout.width is {rollout.width}; expected both or neither",
        )


def _kernel(config: Config) -> Iterator[Problem]:
    from samplers.kernels import get_kernel  # imported late: it brings torch

    rollout = config.rollout
    if config.objective.name == "nft" and rollout.kernel == "ode":
        return  # it learns from finished images, however they came about
    if rollout.kernel == "ode":
        yield Problem(
            ("rollout.kernel", "objective.name"),
            "rollout.kernel is 'ode', which draws no noise and so has nothing to train; "
            "expected a kernel with noise, or objective nft; set rollout.kernel=flow",
        )
        return
    kernel = get_kernel(rollout.kernel)
    low, high = kernel.level_range
    if rollout.level is not None and not low <= rollout.level <= high:
        yield Problem(
            ("rollout.kernel", "rollout.level"),
            f"rollout.level is {rollout.level}; expected a level in [{low:g}, {high:g}] for kernel {rollout.kernel}; "
            f"a usual value is {kernel.default_level:g}",
        )
    elif rollout.level == 0.0:
        yield Problem(
            ("rollout.level",),
            "rollout.level is 0, which draws no noise and so has nothing to train; expected more than 0; "
            f"a usual value for kernel {rollout.kernel} is {kernel.default_level:g}",
        )
    if rollout.density not in kernel.densities:
        yield Problem(
            ("rollout.kernel", "rollout.density"),
            f"rollout.density {rollout.density!r} does not exist for kernel {rollout.kernel}; "
            f"expected one of: {', '.join(kernel.densities)}",
        )


def _structure(config: Config) -> Iterator[Problem]:
    """Settings of one structure that make no sense beside those of another."""
    r = config.rollout
    given = [name for name in ("tree", "trunk", "fork") if getattr(r, name) is not None]
    if len(given) > 1:
        yield Problem(
            tuple(f"rollout.{name}" for name in given),
            f"rollout has {' and '.join(given)}; expected at most one of tree, trunk and fork; remove the others",
        )
    if r.window is not None and given and given[0] != "tree":
        yield Problem(
            ("rollout.window", f"rollout.{given[0]}"),
            f"rollout.window beside rollout.{given[0]}, which says itself where noise and training are; expected one "
            "of the two; set rollout.window=null",
        )
    if config.rollout.kernel == "ode" and (given or r.window is not None):
        name = given[0] if given else "window"
        yield Problem(
            ("rollout.kernel", f"rollout.{name}"),
            f"rollout.{name} with rollout.kernel 'ode', which draws no noise; expected a kernel with noise, or plain "
            f"trajectories; set rollout.{name}=null",
        )
    t = r.tree
    if t is not None:
        if t.at is None and r.window is None:
            yield Problem(
                ("rollout.tree.at", "rollout.window"),
                "rollout.tree without steps that split; expected rollout.tree.at, or a rollout.window whose steps "
                "split; for example rollout.window={size: 2, low: 2, high: 4}",
            )
        for name in ("promote", "moves_to"):
            if getattr(t, name) is not None and t.at is None:
                yield Problem(
                    (f"rollout.tree.{name}", "rollout.tree.at"),
                    f"rollout.tree.{name} without rollout.tree.at; expected the steps that split; give them",
                )
        if t.noise == "splits" and t.at is None:
            yield Problem(
                ("rollout.tree.noise", "rollout.tree.at"),
                "rollout.tree.noise is 'splits' without rollout.tree.at; expected the steps that split; a window has "
                "noise on its steps only, so remove rollout.tree.noise",
            )
        if t.promote is not None and t.noise != "splits":
            yield Problem(
                ("rollout.tree.promote", "rollout.tree.noise"),
                f"rollout.tree.promote is {t.promote} with noise on all steps; expected rollout.tree.noise=splits",
            )
        if t.depths_stop is not None and t.untrained_depths is None:
            yield Problem(
                ("rollout.tree.depths_stop", "rollout.tree.untrained_depths"),
                f"rollout.tree.depths_stop is {t.depths_stop} without untrained depths to move; expected "
                "rollout.tree.untrained_depths; give them, or remove depths_stop",
            )
    if (r.levels.values is None) != (r.levels.shape != "splits"):
        yield Problem(
            ("rollout.levels.values", "rollout.levels.shape"),
            f"rollout.levels.shape is {r.levels.shape!r} and values is {r.levels.values}; expected values with shape "
            "splits and with no other; change one of the two",
        )
    if r.fork is not None and r.levels != Levels():
        yield Problem(
            ("rollout.fork", "rollout.levels"),
            f"rollout.levels of shape {r.levels.shape!r} beside rollout.fork, which has one level; expected the "
            "defaults; remove rollout.levels",
        )
    if r.levels.equal_budget and r.levels.reward_driven is not None:
        yield Problem(
            ("rollout.levels.equal_budget", "rollout.levels.reward_driven"),
            "rollout.levels.equal_budget would undo what reward_driven does; expected one of the two; remove the other",
        )
    if t is not None and t.at is not None and t.noise == "splits" and r.window is not None:
        yield Problem(
            ("rollout.window", "rollout.tree.noise"),
            "rollout.window beside rollout.tree.noise 'splits', which says where noise is; expected one of the two; "
            "set rollout.window=null",
        )
    if t is not None and t.promote is not None and r.shared_noise:
        yield Problem(
            ("rollout.shared_noise", "rollout.tree.promote"),
            "rollout.shared_noise gives all trees of a prompt one start, but rollout.tree.promote makes trees so that "
            "starts differ; expected one of the two; set rollout.shared_noise=false",
        )
    splits = None if t is None else len(t.at) if t.at is not None else r.window.size if r.window is not None else None
    if r.levels.values is not None and splits is not None and len(r.levels.values) != splits:
        yield Problem(
            ("rollout.levels.values", "rollout.tree"),
            f"rollout.levels.values has {len(r.levels.values)} levels for {splits} splits; expected one per split",
        )


def _draws(config: Config) -> Iterator[Problem]:
    """Choices of steps and splits that differ from update to update; that any draw makes a plan is seen here."""
    r, t = config.rollout, config.rollout.tree
    elsewhere = [name for name in ("trunk", "fork") if getattr(r, name) is not None]
    elsewhere += ["tree.noise=splits"] * (t is not None and t.noise == "splits")
    if elsewhere and r.train_fraction != RolloutConfig.model_fields["train_fraction"].default:
        yield Problem(
            ("rollout.train_fraction", f"rollout.{elsewhere[0].partition('=')[0]}"),
            f"rollout.train_fraction is {r.train_fraction:g} beside rollout.{elsewhere[0]}, which says itself what is "
            "trained; expected one of the two; remove train_fraction",
        )
    if r.train_choice == "random":
        other = ["window"] * (r.window is not None) + elsewhere
        other += ["tree.untrained_depths"] * (t is not None and t.untrained_depths is not None)
        if other or r.kernel == "ode" or config.objective.name == "nft":
            what = f"rollout.{other[0]}" if other else "objective nft, which trains on images"
            yield Problem(
                ("rollout.train_choice", "objective.name", *(f"rollout.{name.partition('=')[0]}" for name in other)),
                f"rollout.train_choice is 'random' beside {what}, where it has no effect or another choice is made; "
                "expected one of the two; set rollout.train_choice=leading",
            )
        elif r.trained_steps == r.steps - 1:
            yield Problem(
                ("rollout.train_choice", "rollout.train_fraction"),
                f"rollout.train_choice is 'random', but train_fraction {r.train_fraction:g} trains all {r.steps - 1} "
                "steps with noise; expected a smaller share; for example rollout.train_fraction=0.6",
            )
        elif isinstance(config.credit.steps, list) and config.credit.steps[:-1].count(0.0) >= r.trained_steps:
            yield Problem(
                ("rollout.train_choice", "credit.steps"),
                f"credit.steps has {config.credit.steps[:-1].count(0.0)} zeros and {r.trained_steps} random steps are "
                "trained, which may all be among them; expected fewer zeros; raise some",
            )
    if t is not None and t.draw is not None:
        yield from _drawn_splits(config)


def _drawn_splits(config: Config) -> Iterator[Problem]:
    r, t = config.rollout, config.rollout.tree
    assert t is not None and t.draw is not None
    d, last = t.draw, r.steps - 2
    high = last if d.high is None else d.high
    if t.at is None or r.window is not None:
        yield Problem(
            ("rollout.tree.draw", "rollout.tree.at", "rollout.window"),
            "rollout.tree.draw needs rollout.tree.at, whose number of splits it draws, and no rollout.window; expected "
            "both so; give the steps and set rollout.window=null",
        )
        return
    if high > last or d.low + (len(t.at) - 1) * d.gap > high:
        yield Problem(
            ("rollout.tree.draw", "rollout.steps"),
            f"rollout.tree.draw has {len(t.at)} splits at least {d.gap} apart in the steps {d.low} to {high}; expected "
            f"room for them, and at most step {last}, the last one with noise; change low, high or gap",
        )
    if d.around == "success" and t.moves_to is not None:
        yield Problem(
            ("rollout.tree.draw.around", "rollout.tree.moves_to"),
            "rollout.tree.moves_to with draw.around 'success', which looks at no places; expected one of the two; "
            "remove moves_to",
        )
    if d.around == "success" and r.levels.reward_driven is None:
        yield Problem(
            ("rollout.tree.draw.around", "rollout.levels.reward_driven"),
            "rollout.tree.draw.around is 'success', which is that of rollout.levels.reward_driven; expected both; set "
            "rollout.levels.reward_driven={}",
        )
    if t.noise == "splits" and isinstance(config.credit.steps, list) and 0.0 in config.credit.steps[:-1]:
        yield Problem(
            ("rollout.tree.draw", "credit.steps"),
            "credit.steps has zeros, and drawn splits, the only steps that are trained, may all be among them; "
            "expected numbers above 0; raise them",
        )
    if t.noise == "splits" and t.untrained_depths is not None:
        yield Problem(
            ("rollout.tree.draw", "rollout.tree.untrained_depths"),
            "rollout.tree.untrained_depths may hold all drawn splits, the only steps that are trained; expected one of "
            "the two; remove untrained_depths",
        )
    images = math.prod([t.branch] * len(t.at) if isinstance(t.branch, int) else t.branch)
    if t.promote is not None and config.group_size % images:
        yield Problem(
            ("group_size", "rollout.tree.branch", "rollout.tree.promote"),
            f"group_size {config.group_size} with trees of {images} images, if a draw does not promote the first "
            f"split; expected a multiple of {images}",
        )


def _plans(config: Config) -> Iterator[Problem]:
    """Every plan that the run would use, built on a stand-in for the model's own times."""
    import torch

    from flowrl.credit import step_weights  # imported late: they bring torch
    from flowrl.planning import make_plan, moving_parts
    from samplers.recipes import leaf_groups

    r = config.rollout
    sigmas = [1 - i / r.steps for i in range(r.steps + 1)]
    names = ("rollout", "group_size", "objective.name")
    seen: set[tuple[object, ...]] = set()
    driven = r.levels.reward_driven is not None
    evenly = range(0, config.updates, max(1, config.updates // 1000))
    try:
        for update in sorted({*range(min(config.updates, MOST_UPDATES)), *evenly, config.updates - 1}):
            parts = moving_parts(config, update)
            if parts in seen:
                continue
            seen.add(parts)
            for success in (0.0, 1.0) if driven else (0.5,):
                plan = make_plan(config, sigmas, update, success)
                roots = plan.roots(config.group_size)
            if not plan.trained_edges:
                continue
            differ = roots > 1 or bool((plan.share[torch.tensor(plan.trained)] < 1).any())
            if not differ and r.train_choice == "leading":
                yield Problem(
                    names,
                    f"the plan of update {update + 1} trains only steps that all {len(plan.leaves)} images of a prompt "
                    "have in common, so nothing tells good from bad; expected training from a split on, or several "
                    "trees; raise rollout.train_fraction, split earlier, or raise group_size",
                )
                return
            if config.credit.steps is not None:
                step_weights(plan, config.credit.steps, config.credit.weights)
            kind = leaf_groups(plan)
            fewest = roots * int(kind[kind >= 0].bincount().min())
            if fewest < 2:
                yield Problem(
                    names,
                    f"the plan of update {update + 1} has {plan.group_size(roots)} images per prompt, of which only "
                    f"{fewest} may be compared (they left the noise at one step); expected at least 2; raise "
                    "group_size, or let the plan branch more",
                )
                return
    except (ValueError, UserError) as error:
        yield Problem(names, f"rollout, group_size or credit do not fit: {error}")
