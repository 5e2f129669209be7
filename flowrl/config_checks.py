"""Rules that join several settings. Each check yields problems; none of them loads weights or touches a device."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from typing import NamedTuple

from flowrl.errors import UserError
from flowrl.schema import Config, Levels, RewardSpec

MOST_UPDATES = 4_000  # of which each one's plan is checked; of more, some evenly spaced ones and the last


class Problem(NamedTuple):
    """One thing that is wrong: the dotted names it involves and a message (got, expected, how to fix)."""

    names: tuple[str, ...]
    message: str


def problems(config: Config, processes: int = 1) -> Iterator[Problem]:
    """All impossible combinations in a config that is to run on `processes` processes."""
    yield from _groups(config, processes)
    found = [*_steps(config), *_kernel(config), *_structure(config), *_draws(config)]
    yield from found or _plans(config)  # a plan would only repeat them
    yield from _objective(config)
    yield from _options(config)
    yield from _combined_advantages(config)
    yield from _policy(config)
    yield from _evaluation(config)
    yield from _rewards(config)


def reward_names(spec: RewardSpec) -> list[str]:
    """The names of all rewards in a specification; none where it cannot be read."""
    from reward_models import recipe  # imported late: it brings torch

    try:
        return list(recipe.names(recipe.parse(spec)))
    except ValueError:  # `_rewards` says what is wrong
        return []


def _groups(config: Config, processes: int) -> Iterator[Problem]:
    prompts, inner = config.prompts_per_update, config.optimizer.inner_updates
    if prompts % inner:
        yield Problem(
            ("prompts_per_update", "optimizer.inner_updates"),
            f"prompts_per_update {prompts} cannot be split into optimizer.inner_updates {inner} equal parts of whole "
            f"groups; expected a multiple of {inner}, for example {inner * (prompts // inner + 1)}",
        )
    elif prompts // inner < processes:
        yield Problem(
            ("prompts_per_update", "optimizer.inner_updates"),
            f"{prompts // inner} groups per optimizer step (prompts_per_update {prompts} / inner_updates {inner}) "
            f"leave some of the {processes} processes without one; expected at least {processes}; "
            f"set prompts_per_update={inner * processes} or start fewer processes",
        )
    if config.optimizer.warmup >= config.updates and config.optimizer.warmup > 0:
        yield Problem(
            ("optimizer.warmup", "updates"),
            f"optimizer.warmup {config.optimizer.warmup} lasts the whole run of updates {config.updates}; "
            "expected a shorter warm-up; lower it or set it to 0",
        )


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
    if r.window is not None and r.window.least is not None and r.window.move != "progressive":
        yield Problem(
            ("rollout.window.least", "rollout.window.move"),
            f"rollout.window.least is {r.window.least} with move {r.window.move!r}, whose positions last one update or "
            "all; expected move progressive; remove least",
        )
    if r.train_choice == "random":
        other = [name for name in ("window", "trunk", "fork") if getattr(r, name) is not None]
        other += ["tree.noise=splits"] * (t is not None and t.noise == "splits")
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
    images = math.prod([t.branch] * len(t.at) if isinstance(t.branch, int) else t.branch)
    if t.promote is not None and config.group_size % images:
        yield Problem(
            ("group_size", "rollout.tree.branch", "rollout.tree.promote"),
            f"group_size {config.group_size} with trees of {images} images, if a draw does not promote the first "
            f"split; expected a multiple of {images}",
        )


def _plans(config: Config) -> Iterator[Problem]:
    """Every plan that the run would use, built on a stand-in for the model's own times."""
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


def _objective(config: Config) -> Iterator[Problem]:
    rollout, objective = config.rollout, config.objective
    drawn = (rollout.kernel, rollout.reduction, rollout.density)
    measured = (objective.measured_with.kernel, objective.measured_with.reduction, objective.measured_with.density)
    if drawn != measured and objective.name != "nft":  # which has no ratio
        yield Problem(
            (
                *("rollout.kernel", "rollout.reduction", "rollout.density"),
                *(f"objective.measured_with.{name}" for name in ("kernel", "reduction", "density")),
            ),
            f"objective.clip_range {objective.clip_range:g} and kl.weight {objective.kl.weight:g} were chosen for "
            f"(kernel, reduction, density) = ({', '.join(measured)}), but the rollout draws with ({', '.join(drawn)}); "
            "expected the same, because the scale of a log-probability depends on all three; choose both numbers for "
            "the new density and say so in objective.measured_with",
        )
    if objective.name == "nft":
        if objective.guidance is not None:
            yield Problem(
                ("objective.guidance", "objective.name"),
                f"objective.guidance is {objective.guidance:g}, but objective nft matches velocities without guidance; "
                "expected null; remove objective.guidance",
            )
    elif objective.guidance is not None and objective.guidance != rollout.guidance:
        yield Problem(
            ("objective.guidance", "rollout.guidance"),
            f"objective.guidance is {objective.guidance:g} and rollout.guidance is {rollout.guidance:g}; expected the "
            f"same, because objective {objective.name} needs the likelihood of the policy that drew the images; "
            "remove objective.guidance",
        )
    if objective.kl.weight > 0.0 and config.policy.train == "full" and not config.policy.reference:
        yield Problem(
            ("objective.kl.weight", "policy.reference", "policy.train"),
            f"objective.kl.weight is {objective.kl.weight:g} but policy.reference is false, so there is nothing to "
            "stay close to; expected a reference; set policy.reference=true (one more copy of the weights) or "
            "objective.kl.weight=0",
        )


def _options(config: Config) -> Iterator[Problem]:
    """Options of an objective, of credit and of advantages that nothing would look at."""
    o, c = config.objective, config.credit
    for name in ("guard", "dppo", "tmpo", "nft"):
        if getattr(o, name) is not None and o.name != name:
            yield Problem(
                (f"objective.{name}", "objective.name"),
                f"objective.{name} is set, but objective.name is {o.name!r}; expected the options of that one; remove "
                f"them or set objective.name={name}",
            )
    if o.tmpo is not None and o.tmpo.beta_over is not None and o.tmpo.beta_from is None:
        yield Problem(
            ("objective.tmpo.beta_over", "objective.tmpo.beta_from"),
            f"objective.tmpo.beta_over is {o.tmpo.beta_over} without beta_from, so beta does not change; expected both "
            "or neither; give beta_from",
        )
    if o.nft is not None and o.nft.decay_start and not o.nft.decay_rate:
        yield Problem(
            ("objective.nft.decay_start", "objective.nft.decay_rate"),
            f"objective.nft.decay_start is {o.nft.decay_start} with decay_rate 0, where nothing ever starts; expected "
            "a rate above 0; remove decay_start",
        )
    if config.rollout.recompute and o.name == "nft":
        yield Problem(
            ("rollout.recompute", "objective.name"),
            "rollout.recompute has no effect with objective nft, which keeps nothing but finished images; expected "
            "false; remove it",
        )
    if config.rollout.recompute and o.layer_tuning is not None:
        yield Problem(
            ("rollout.recompute", "objective.layer_tuning"),
            "rollout.recompute beside objective.layer_tuning, which keeps a velocity as large as a latent for every "
            "state that imitates; expected one of the two; set rollout.recompute=false",
        )
    if o.adaptive_clip is not None:
        low, high = o.clip
        most = (o.adaptive_clip.max, o.adaptive_clip.max_high or o.adaptive_clip.max)
        if o.name != "clipped":
            yield Problem(
                ("objective.adaptive_clip", "objective.name"),
                f"objective.adaptive_clip is set, but objective.name is {o.name!r}; expected clipped",
            )
        elif most[0] < low or most[1] < high:
            yield Problem(
                ("objective.adaptive_clip", "objective.clip_range", "objective.clip_range_high"),
                f"objective.adaptive_clip goes up to {most[0]:g} below and {most[1]:g} above 1, from {low:g} and "
                f"{high:g}; expected bounds at least as wide; exchange them",
            )
    if o.layer_tuning is not None and o.name in ("nft", "tmpo"):
        yield Problem(
            ("objective.layer_tuning", "objective.name"),
            f"objective.layer_tuning beside objective {o.name!r}; expected clipped, guard or dppo, whose loss is a sum "
            "over edges; set objective.layer_tuning=null",
        )
    if o.name in ("nft", "tmpo") and (c.rule != "leaf_mean" or c.steps is not None):
        yield Problem(
            ("credit.rule", "credit.steps", "objective.name"),
            f"credit.rule {c.rule!r} and steps {c.steps}, but objective {o.name} takes "
            f"{'finished images' if o.name == 'nft' else 'whole paths'} and no advantages of edges; expected "
            "rule leaf_mean and no steps; remove them",
        )
    if isinstance(c.steps, list) and len(c.steps) != config.rollout.steps:
        yield Problem(
            ("credit.steps", "rollout.steps"),
            f"credit.steps has {len(c.steps)} numbers for rollout.steps {config.rollout.steps}; expected one per step",
        )
    if c.rule == "depth_z_score" and c.scope == "tree" and not config.rollout.tree and not config.rollout.fork:
        yield Problem(
            ("credit.rule", "credit.scope", "rollout.tree", "rollout.trunk", "rollout.fork"),
            "credit.rule depth_z_score with scope tree, but a root's edges of one depth are not comparable without a "
            "tree; expected rollout.tree or rollout.fork, or credit.scope=prompt",
        )


def _combined_advantages(config: Config) -> Iterator[Problem]:
    a = config.advantage
    if a.combine == "sum":
        if a.renormalise:
            yield Problem(
                ("advantage.renormalise", "advantage.combine"),
                "advantage.renormalise is true with advantage.combine 'sum', which normalises once; expected "
                "combine=advantages or pareto; remove advantage.renormalise",
            )
        return
    from reward_models import recipe

    try:
        node = recipe.parse(config.reward)
    except ValueError:  # `_rewards` says what is wrong
        return
    parts = node.parts if isinstance(node, recipe.Combination) and node.rule == "sum" else {}
    if sum(weight != 0 for _, weight in parts.values()) < 2:
        yield Problem(
            ("advantage.combine", "reward"),
            f"advantage.combine is {a.combine!r}, but the reward is no weighted sum of at least two; expected the "
            "rewards as {name: weight, name: weight}; write them so, or set advantage.combine=sum",
        )
    if a.std == "history":
        yield Problem(
            ("advantage.combine", "advantage.std"),
            f"advantage.combine is {a.combine!r} with advantage.std 'history', which remembers one number per image; "
            "expected std global, prompt or none; choose one of these",
        )


def _policy(config: Config) -> Iterator[Problem]:
    policy = config.policy
    if policy.quantize is not None and policy.train == "full":
        yield Problem(
            ("policy.quantize", "policy.train"),
            f"policy.quantize is {policy.quantize!r} with policy.train: full, but quantised weights cannot be "
            "trained; expected adapters on top of them; set policy.train=lora or policy.quantize=null",
        )
    if policy.quantize is not None and policy.device == "cpu":
        yield Problem(
            ("policy.quantize", "policy.device"),
            f"policy.quantize {policy.quantize!r} does not run on a CPU; set policy.quantize=null",
        )
    if policy.train == "full" and policy.lora.start_from is not None:
        yield Problem(
            ("policy.lora.from", "policy.train"),
            f"policy.lora.from is {policy.lora.start_from!r} with policy.train: full, which uses no adapter; "
            "expected one of the two; set policy.train=lora or remove policy.lora.from",
        )
    if policy.attention != "native" and policy.device == "cpu":
        yield Problem(
            ("policy.attention", "policy.device"),
            f"policy.attention {policy.attention!r} does not run on a CPU; set policy.attention=native",
        )
    if policy.attention == "flash" and policy.dtype == "float32":
        yield Problem(
            ("policy.attention", "policy.dtype"),
            "policy.attention 'flash' does not take float32; expected bfloat16 or float16; set policy.dtype=bfloat16",
        )


def _evaluation(config: Config) -> Iterator[Problem]:
    evaluation = config.eval
    if evaluation is None:
        return
    trained = set(reward_names(config.reward)) - {"clip"}  # clip is any CLIP folder: two of them may differ
    if evaluation.judge is not None and trained & set(reward_names(evaluation.judge)):
        yield Problem(
            ("eval.judge", "reward"),
            f"eval.judge {evaluation.judge!r} is also trained on; expected a scorer held out from training, so that "
            "it can tell whether the reward was hacked; choose another one or set eval.judge=null",
        )
    if (evaluation.height is None) != (evaluation.width is None):
        yield Problem(
            ("eval.height", "eval.width"),
            f"eval.height is {evaluation.height} and eval.width is {evaluation.width}; expected both or neither",
        )


def _rewards(config: Config) -> Iterator[Problem]:
    """Names and weights; that a reward of one's own can be imported is seen when it is loaded."""
    from reward_models import recipe  # imported late: it brings torch
    from reward_models.loading import BUILT_IN, is_folder

    specs: dict[str, RewardSpec | None] = {"reward": config.reward}
    if config.eval is not None:
        specs |= {"eval.rewards": config.eval.rewards, "eval.judge": config.eval.judge}
    for where, spec in specs.items():
        if spec is None:
            continue
        if not spec:
            yield Problem((where,), f"{where} is empty; expected at least one reward; for example {{shapes: 1.0}}")
            continue
        try:  # the judge is one scorer, so it needs no weight
            alone = where == "eval.judge" and isinstance(spec, dict) and len(spec) == 1
            node = recipe.parse({"combine": "sum", "of": spec} if alone else spec)
            recipe.check(node)
        except ValueError as error:
            yield Problem((where,), f"{where}: {error}")
            continue
        for name in recipe.names(node):
            if ":" not in name and name not in BUILT_IN and not is_folder(name):
                near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]}?" if near else "or write module:attribute for one of your own"
                yield Problem(
                    (where,), f"{where} names the reward {name!r}; expected one of {', '.join(BUILT_IN)}; {hint}"
                )
