"""Rules that join several settings. Each check yields problems; none of them loads weights or touches a device.

Those about the rollout, and every plan that it makes, are in `flowrl.plan_checks`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from flowrl.plan_checks import Problem, plan_problems
from flowrl.schema import Config, RewardSpec

# (section, setting, other setting of the section, its values, or None for any): without them nothing looks at it
LOOKED_AT = (
    ("rollout.levels", "growth", "shape", ("growth",)),
    ("rollout.levels", "low", "shape", ("cosine",)),
    ("rollout.window", "decay", "move", ("progressive",)),
    ("rollout.window", "least", "move", ("progressive",)),
    ("rollout.tree", "moves_over", "moves_to", None),
    ("credit", "shrink", "rule", ("depth_z_score",)),
    ("credit", "floor", "rule", ("depth_z_score",)),
    ("credit", "fraction", "select", ("extremes", "top_bottom")),
    ("credit", "threshold", "select", ("branch_best_worst",)),
    ("advantage", "updates", "std", ("history",)),
)


def problems(config: Config, processes: int = 1) -> Iterator[Problem]:
    """All impossible combinations in a config that is to run on `processes` processes."""
    yield from _groups(config, processes)
    yield from plan_problems(config)
    yield from _objective(config)
    yield from _options(config)
    yield from _not_looked_at(config)
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


def _not_looked_at(config: Config) -> Iterator[Problem]:
    """Settings that were changed beside others that leave them without effect."""
    for path, name, other, values in LOOKED_AT:
        section: Any = config
        for part in path.split("."):
            section = None if section is None else getattr(section, part)
        if section is None or getattr(section, name) == type(section).model_fields[name].default:
            continue
        found = getattr(section, other)
        if found is None if values is None else found not in values:
            expected = "a value" if values is None else " or ".join(values)
            yield Problem(
                (f"{path}.{name}", f"{path}.{other}"),
                f"{path}.{name} is {getattr(section, name)} with {other} {found!r}, where it has no effect; expected "
                f"{other} {expected}; set that, or remove {name}",
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
