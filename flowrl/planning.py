"""From the rollout's settings to the plan of an update: which tree every root of this update grows.

A plan is a pure function of the settings, the number of the update and, where levels follow the reward, of the success
so far. So a resumed run has the plans of the uninterrupted one, and impossible ones are found before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

import samplers
from flowrl.config import Config
from flowrl.errors import UserError
from flowrl.schema import ForkConfig, RolloutConfig, TreeConfig, TrunkConfig
from samplers import curricula, levels, plans, pruning, recipes
from samplers.levels import Level

Sigmas = Tensor | Sequence[float]


def make_plan(config: Config, sigmas: Sigmas, update: int, success: float = 0.5) -> samplers.Plan:
    """The plan of one root in this update (0 for the first).

    sigmas: the policy's own steps + 1 times from noise to data; those of `rollout.shift` take their place.
    success: in [0, 1], for levels and splits that follow the reward.
    Raises ValueError with the numbers where the settings do not make a plan, UserError where the model's times do not.
    """
    r = config.rollout
    if r.shift is not None:
        first, last = float(sigmas[0]), float(sigmas[-1])
        if (first, last) != (1, 0):
            raise UserError(
                f"got rollout.shift {r.shift:g} for a model whose times begin at {first:.4f} and end at {last:.4f}; "
                "expected a flow, from 1 to 0; set rollout.shift=null"
            )
        sigmas = samplers.linear_shift_sigmas(r.steps, r.shift)
    if r.kernel == "ode":  # for objectives on leaves: nothing is drawn, nothing trained on the way
        plan = plans.straight(sigmas, r.solver, 0.0, trained=())
    elif r.trunk is not None:
        plan = _trunk(r, r.trunk, sigmas, success)
    elif r.fork is not None:
        plan = _fork(r, r.fork, sigmas, update, config.updates)
    elif r.tree is not None:
        plan = _tree(config, r.tree, sigmas, update, success)
    else:
        inside = _inside(config, update)
        plan = _grow(r, sigmas, {}, inside, inside if r.window else None, success)
    return plan if r.tail is None else recipes.coarse_tail(plan, r.tail.fraction, r.tail.solver)


def first_plan(config: Config) -> samplers.Plan:
    """The plan of the first update before a model is loaded: on even times, which stand in for the model's own."""
    return make_plan(config, [1 - i / config.rollout.steps for i in range(config.rollout.steps + 1)], 0)


def window_steps(config: Config, update: int) -> range | None:
    """Steps of the window in this update; None without one."""
    r = config.rollout
    if r.window is None or r.window_range is None:
        return None
    w, (low, high) = r.window, r.window_range
    window = curricula.Window(w.size, high, low, w.move, w.every, w.stride, w.at_end, w.decay, w.decay_from, w.least)
    return range(*window.steps(update, config.seed))


def _inside(config: Config, update: int) -> Sequence[int]:
    """Steps that are trained."""
    r, steps = config.rollout, window_steps(config, update)
    if steps is not None:
        return steps
    if r.train_choice == "random":
        return curricula.chosen_steps(update, config.seed, r.trained_steps, r.steps - 1)
    return range(r.trained_steps)


def _split_steps(config: Config, t: TreeConfig, at: Sequence[int], update: int, success: float) -> Sequence[int]:
    """Steps at which a tree with listed splits splits in this update."""
    if t.moves_to is not None:
        at = curricula.moving_steps(update, t.moves_over or config.updates, at, t.moves_to)
    if t.draw is None:
        return at
    d, key = t.draw, samplers.Key(config.seed, "splits", update, "", 0, None)
    high = config.rollout.steps - 2 if d.high is None else d.high
    if d.around == "places":
        return curricula.scattered_steps(at, d.concentration, d.low, high, d.gap, key)
    return curricula.success_steps(len(at), success, d.concentration, d.low, high, d.gap, key)


def _tree(config: Config, t: TreeConfig, sigmas: Sigmas, update: int, success: float) -> samplers.Plan:
    r, inside = config.rollout, _inside(config, update)
    if t.at is None:
        plan = _grow(r, sigmas, _splits(list(inside), t.branch), inside, inside, success)
    else:
        splits = _splits(_split_steps(config, t, t.at, update, success), t.branch)
        if t.noise == "splits":
            promoted = t.promote is not None and min(splits) <= t.promote and len(splits) > 1
            level = _level(r, splits, sorted(splits)[promoted:], success)  # a promoted split has no noise
            _, plan = recipes.split_tree(sigmas, splits, r.kernel, level, t.promote, r.solver, r.max_leaves)
        else:
            plan = _grow(r, sigmas, splits, inside, inside if r.window else None, success)
    if t.untrained_depths is None:
        return plan
    depths: Sequence[int] = t.untrained_depths
    if t.depths_stop is not None:
        depths = curricula.shallower(update, depths, t.depths_every, t.depths_stop)
    return pruning.prune_depth(plan, depths)


def _grow(
    r: RolloutConfig, sigmas: Sigmas, splits: Mapping[int, int], trained: Sequence[int], noisy: Sequence[int] | None,
    success: float,
) -> samplers.Plan:  # fmt: skip
    """A tree with these splits (none: one trajectory); noisy None: noise on all steps but the last."""
    with_noise = range(r.steps - 1) if noisy is None else noisy
    level = _level(r, splits, with_noise, success)
    return plans.tree(
        sigmas, splits, r.kernel, level, with_noise, trained, solver=r.solver, max_leaves=r.max_leaves
    )  # fmt: skip


def _trunk(r: RolloutConfig, t: TrunkConfig, sigmas: Sigmas, success: float) -> samplers.Plan:
    level = _level(r, dict.fromkeys(t.at, t.branches), t.at, success)
    return recipes.trunk(sigmas, t.at, t.branches, r.kernel, level, t.strides, t.finish, r.max_leaves, r.solver)


def _fork(r: RolloutConfig, f: ForkConfig, sigmas: Sigmas, update: int, updates: int) -> samplers.Plan:
    interval = curricula.backward(update, f.over or updates, f.first, f.last)
    return recipes.fork(sigmas, interval, f.branches, r.kernel, r.level, r.max_leaves)


def _splits(steps: Sequence[int], branch: int | Sequence[int]) -> dict[int, int]:
    counts = [branch] * len(steps) if isinstance(branch, int) else list(branch)
    if len(counts) != len(steps):
        got = f"{len(counts)} numbers of children {counts} for {len(steps)} splits at steps {list(steps)}"
        raise plans.bad_plan(got, "one per split", "Change rollout.tree.branch.")
    return dict(zip(steps, counts, strict=True))


def _level(r: RolloutConfig, splits: Mapping[int, int], noisy: Sequence[int], success: float) -> Level:
    """Levels over the noisy steps (numbers, rising) of a tree with these splits."""
    s, constant, at = r.levels, levels.constant(r.kernel, r.level), levels.noisy_steps(noisy, splits)
    if s.shape == "constant":
        found = constant
    elif s.shape == "growth":
        found = levels.linear_growth(r.kernel, s.growth, max(1, len(splits)), r.level)
    elif s.shape == "cosine":
        first, last = min(noisy), max(noisy)
        found = levels.cosine_decay(r.kernel, constant(first, 0), s.low, last - first + 1, first)
    else:
        found = levels.by_split(r.kernel, s.values or ())
    if s.reward_driven is not None:
        d = s.reward_driven
        found = levels.reward_driven(found, success, d.rise, d.fall, d.low, d.high)
    return levels.equal_budget(found, constant, at) if s.equal_budget else found


def moving_parts(config: Config, update: int) -> tuple[object, ...]:
    """What of the plan changes from update to update: updates with equal parts have equal plans, success aside.

    And aside from what is drawn of steps and splits, as `plan_checks` sees to it that any draw makes a plan; but not
    where levels of one budget are higher the fewer steps have them."""
    r = config.rollout
    parts: list[object] = [window_steps(config, update)]
    if r.fork is not None:
        parts.append(curricula.backward(update, r.fork.over or config.updates, r.fork.first, r.fork.last))
    if r.tree is not None and r.tree.at is not None and r.tree.moves_to is not None:
        over = r.tree.moves_over or config.updates
        parts.append(curricula.moving_steps(update, over, r.tree.at, r.tree.moves_to))
    if r.tree is not None and r.tree.at is not None and r.tree.draw is not None and r.levels.equal_budget:
        parts.append(tuple(_split_steps(config, r.tree, r.tree.at, update, success=0.5)))
    if r.tree is not None and r.tree.untrained_depths is not None and r.tree.depths_stop is not None:
        t, depths = r.tree, r.tree.untrained_depths
        parts.append(curricula.shallower(update, depths, t.depths_every, r.tree.depths_stop))
    return tuple(parts)
