"""Loading rewards on behalf of a user: what is wrong with their specification is their input, not a bug of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flowrl.errors import UserError

if TYPE_CHECKING:
    import torch

    from flowrl.config import Config
    from reward_models.protocol import Reward, RewardSpec


def load_reward(spec: str | Mapping[str, Any], device: str | torch.device = "cpu", **options: Any) -> Reward:
    """`reward_models.load`, with its complaints about the specification as UserError."""
    import reward_models

    try:
        return reward_models.load(spec, device=device, **options)
    except ValueError as error:
        raise UserError(str(error)) from error


def ask_elsewhere(*specs: Any) -> dict[str, RewardSpec]:
    """Ask the servers that rewards need, in seconds and before any weights load: name -> spec of each such reward.

    specs: rewards as `reward_models.load` takes them; None and empty ones are passed over.

    Raises:
        UserError: a server does not answer, or not as expected.
    """
    from reward_models import RewardError, elsewhere

    try:
        return elsewhere.ask_elsewhere(*filter(None, specs))
    except (RewardError, ValueError) as error:
        raise UserError(str(error)) from error


def named_in(config: Config) -> list[Any]:
    """All rewards that a config names."""
    return [config.reward, *((config.eval.rewards, config.eval.judge) if config.eval is not None else ())]
