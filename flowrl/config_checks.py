"""Rules that join several settings. Each check yields problems; none of them loads weights or touches a device."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from typing import NamedTuple

from flowrl.schema import Config, RewardSpec


class Problem(NamedTuple):
    """One thing that is wrong: the dotted names it involves and a message (got, expected, how to fix)."""

    names: tuple[str, ...]
    message: str


def problems(config: Config, processes: int = 1) -> Iterator[Problem]:
    """All impossible combinations in a config that is to run on `processes` processes."""
    yield from _groups(config, processes)
    yield from _steps(config)
    yield from _kernel(config)
    yield from _objective(config)
    yield from _policy(config)
    yield from _evaluation(config)
    yield from _rewards(config)


def reward_names(spec: RewardSpec) -> list[str]:
    """The names a reward specification mentions."""
    return [spec] if isinstance(spec, str) else list(spec)


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
    if rollout.kernel == "ode":
        yield Problem(
            ("rollout.kernel",),
            "rollout.kernel is 'ode', which draws no noise and so has nothing to train; "
            "expected a kernel with noise; set rollout.kernel=flow",
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


def _objective(config: Config) -> Iterator[Problem]:
    rollout, objective = config.rollout, config.objective
    drawn = (rollout.kernel, rollout.reduction, rollout.density)
    measured = (objective.measured_with.kernel, objective.measured_with.reduction, objective.measured_with.density)
    if drawn != measured:
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
    if objective.guidance is not None and objective.guidance != rollout.guidance:
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
    from reward_models.loading import BUILT_IN  # imported late: it brings torch

    specs: dict[str, RewardSpec | None] = {"reward": config.reward}
    if config.eval is not None:
        specs |= {"eval.rewards": config.eval.rewards, "eval.judge": config.eval.judge}
    for where, spec in specs.items():
        names = [] if spec is None else reward_names(spec)
        if spec is not None and not names:
            yield Problem((where,), f"{where} is empty; expected at least one reward; for example {{shapes: 1.0}}")
        for name in names:
            if ":" not in name and name not in BUILT_IN:
                near = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]}?" if near else "or write module:attribute for one of your own"
                yield Problem(
                    (where,), f"{where} names the reward {name!r}; expected one of {', '.join(BUILT_IN)}; {hint}"
                )
        if isinstance(spec, dict):
            weights = {name: value.get("weight") if isinstance(value, dict) else value for name, value in spec.items()}
            for name, weight in weights.items():
                if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                    yield Problem(
                        (where,),
                        f"{where}.{name} is {spec[name]!r}; expected a finite weight; write {name}: 1.0 or "
                        f"{name}: {{weight: 1.0, option: value}}",
                    )
            if weights and all(weight == 0 for weight in weights.values()):
                yield Problem((where,), f"{where} has only zero weights; expected at least one other; set a weight")
