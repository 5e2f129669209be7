"""Loading rewards on behalf of a user: what is wrong with their specification is their input, not a bug of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flowrl.errors import UserError

if TYPE_CHECKING:
    import torch

    from reward_models.protocol import Reward


def load_reward(spec: str | Mapping[str, Any], device: str | torch.device = "cpu", **options: Any) -> Reward:
    """`reward_models.load`, with its complaints about the specification as UserError."""
    import reward_models

    try:
        return reward_models.load(spec, device=device, **options)
    except ValueError as error:
        raise UserError(str(error)) from error
