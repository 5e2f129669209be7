"""From the settings of an update to its parts: the objective and the supervised term of LayerTuning-RL."""

from __future__ import annotations

from typing import Any

from flowrl.config import Config
from flowrl.layer_tuning import LayerTuning, Supervised
from flowrl.objectives import Objective, get_objective


def make_objective(config: Config) -> Objective:
    """The objective that `config.objective` names, with the supervised term around it where there is one."""
    o = config.objective
    settings: dict[str, Any] = {"kl_weight": o.kl.weight}
    if o.name in ("clipped", "guard", "tmpo"):
        settings["clip_range"] = o.clip
    if o.adaptive_clip is not None:
        a = o.adaptive_clip
        settings |= {"clip_range_max": (a.max, a.max_high or a.max), "sensitivity": a.sensitivity}
    options = {"guard": o.guard, "dppo": o.dppo, "tmpo": o.tmpo, "nft": o.nft}.get(o.name)
    if options is not None:
        settings |= options.model_dump(exclude={"decay_rate", "decay_max"})
    objective = get_objective(o.name, **settings)
    return objective if o.layer_tuning is None else Supervised(objective)


def make_layer_tuning(config: Config) -> LayerTuning | None:
    """The settings of the supervised term; None without one."""
    section = config.objective.layer_tuning
    return None if section is None else LayerTuning(**section.model_dump())
