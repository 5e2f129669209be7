"""`flowrl validate`: what goes beyond the config's own rules, still without loading weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from flowrl.config import Config
from flowrl.errors import UserError
from flowrl.planning import first_plan
from flowrl.prompts import load_prompts
from flowrl.rewards import ask_elsewhere, named_in
from flowrl.schema import EvalConfig, PromptConfig

NEEDED = {  # setting -> package
    ("policy", "quantize"): "bitsandbytes",
    ("policy", "attention", "xformers"): "xformers",
    ("policy", "attention", "flash"): "flash_attn",
    ("optimizer", "name", "adamw8bit"): "bitsandbytes",
}


def check(config: Config) -> Iterator[str]:
    """Lines about prompts, groups and what this machine lacks for the run. Raises UserError for unusable prompts."""
    yield "the configuration is valid"
    problems: list[str] = []
    counts: dict[str, int] = {}
    sections: list[tuple[str, str, PromptConfig | EvalConfig]] = [
        ("prompts", config.prompts.source, config.prompts),
    ]
    sections += [("eval", config.eval.prompts, config.eval)] if config.eval is not None else []
    for name, source, section in sections:
        if source.startswith("hub:"):
            yield f"{name}: {source} is not fetched here"
            continue
        try:
            loaded = load_prompts(source, tasks=section.tasks, text_column=section.text_column, limit=section.limit)
        except UserError as error:
            problems.append(f"  - {name}: {error}")
            continue
        counts[name] = len(loaded)
        yield f"{name}: {len(loaded)} prompts from {source}"
    if problems:
        raise UserError("\n".join(["the prompts cannot be used:", *problems]))
    yield from served(config)
    images = config.prompts_per_update * config.group_size
    yield f"one update: {config.prompts_per_update} groups of {config.group_size}, {images} images"
    yield from _planned(config)
    if "prompts" in counts:
        yield f"the run: {config.updates * config.prompts_per_update / counts['prompts']:.1f} passes over the prompts"
    yield from (f"note: {line}" for line in lacking(config))


def _planned(config: Config) -> Iterator[str]:
    """The plan of a group in the first update, with its cost."""
    plan = first_plan(config)
    times = "" if config.rollout.shift is not None else ", drawn on even times instead of the model's own"
    yield f"a group of the first update{times}:"
    yield from (f"  {line}" for line in plan.describe(plan.roots(config.group_size)).splitlines())


def served(config: Config) -> Iterator[str]:
    """Asks the reward servers and the judges' endpoints that the config names. UserError where one does not answer."""
    for name, spec in ask_elsewhere(*named_in(config)).items():
        if name.startswith(("http://", "https://")):
            yield f"reward server: {name} serves {spec.name}, version {spec.version}"
        else:
            yield f"judge: {name} is there, version {spec.version}"


def lacking(config: Config) -> Iterator[str]:
    """What the run asks for and this machine does not have."""
    import torch

    from flowrl.adversary import SHAPES

    cuda = torch.cuda.is_available()
    if config.policy.device.startswith("cuda") and not cuda:
        yield f"policy.device is {config.policy.device}, but there is no CUDA device here"
    elif config.policy.device == "auto" and not cuda:
        for name, value in (("quantize", config.policy.quantize), ("attention", config.policy.attention)):
            if value not in (None, "native"):
                yield f"policy.{name} is {value}, which needs a CUDA device; there is none here"
    references = None if config.adversary is None else config.adversary.references
    if references not in (None, SHAPES) and not Path(references).expanduser().exists():
        yield f"adversary.references is {references}, which is not there"
    for (section, field, *values), package in NEEDED.items():
        got = getattr(getattr(config, section), field)
        if got is not None and (not values or got == values[0]) and importlib.util.find_spec(package) is None:
            pip = package.replace("_", "-")
            yield f"{section}.{field} is {got}, which needs the package {package}; pip install {pip}"
