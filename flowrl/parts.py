"""From the settings of an update to its parts: the objective and the supervised term of LayerTuning-RL."""

from __future__ import annotations

from typing import Any

from flowrl.config import Config
from flowrl.layer_tuning import LayerTuning, Supervised
from flowrl.objectives import Objective, get_objective
from samplers.curricula import ramp


def make_objective(config: Config, update: int = 0) -> Objective:
    """The objective that `config.objective` names, in this update; if asked for, with the supervised term around it."""
    o = config.objective
    settings: dict[str, Any] = {"kl_weight": o.kl.weight}
    if o.name in ("clipped", "guard", "tmpo"):
        settings["clip_range"] = o.clip
    if o.adaptive_clip is not None:
        a = o.adaptive_clip
        settings |= {"clip_range_max": (a.max, a.max_high or a.max), "sensitivity": a.sensitivity}
    options = {"guard": o.guard, "dppo": o.dppo, "tmpo": o.tmpo, "nft": o.nft}.get(o.name)
    if options is not None:
        settings |= options.model_dump(exclude={"decay_rate", "decay_max", "decay_start", "beta_from", "beta_over"})
    if o.name == "tmpo" and o.tmpo is not None and o.tmpo.beta_from is not None:
        settings["beta"] = ramp(update, o.tmpo.beta_from, o.tmpo.beta, o.tmpo.beta_over or config.updates)
    objective = get_objective(o.name, **settings)
    return objective if o.layer_tuning is None else Supervised(objective)


def keeps_sampling_weights(config: Config, objective: Objective) -> bool:
    """Whether a copy of the weights that sampled is needed while an update changes them."""
    steps = config.optimizer.inner_updates * config.optimizer.epochs
    return steps > 1 and ("old_mean" in objective.needs or config.rollout.recompute)


def make_layer_tuning(config: Config) -> LayerTuning | None:
    """The settings of the supervised term; None without one."""
    section = config.objective.layer_tuning
    return None if section is None else LayerTuning(**section.model_dump())
