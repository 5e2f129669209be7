"""flowrl: align text-to-image diffusion and flow models with rewards.

The public surface in one place. Names are imported when first used, so that `import flowrl` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Config": "flowrl.schema",
    "GaussianPolicy": "flowrl.policies.gaussian",
    "GuardStop": "flowrl.errors",
    "Key": "samplers.keys",
    "Prompt": "flowrl.prompts",
    "UserError": "flowrl.errors",
    "get_kernel": "samplers.kernels",
    "get_objective": "flowrl.objectives",
    "group_advantages": "flowrl.advantages",
    "load_config": "flowrl.config",
    "load_policy": "flowrl.policies",
    "load_prompts": "flowrl.prompts",
    "load_reward": "flowrl.rewards",
    "rollout": "samplers.rollout",
    "shipped_config": "flowrl.config",
    "train": "flowrl.trainer",
    "write_report": "flowrl.report",
}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'flowrl' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
