"""When and how strongly the averaged weights follow the trained ones.

    ema <- decay_n ema + (1 - decay_n) current,    decay_n = min(decay, (1 + n) / (10 + n)),

n counting optimizer steps from 0, as flow_grpo's wrapper does; averaging happens in every ``every``-th step. The
weights live in the policy. diffusers' EMAModel has the same ramp but owns a copy of its parameters, which the policy,
its checkpoints and ``weights("ema")`` would then have to be kept equal to; two lines of arithmetic are simpler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from flowrl.errors import UserError


class HasWeights(Protocol):
    def copy_weights(self, source: str, target: str, decay: float | None = None) -> None: ...


@dataclass
class Ema:
    """Call `start` once, then `step` after every optimizer step.

    Args:
        decay: in [0, 1), the largest share of the old average that is kept.
        ramp: let the decay grow as above; False uses ``decay`` from the beginning.
        every: optimizer steps between two averagings, >= 1.
    """

    decay: float = 0.9
    ramp: bool = True
    every: int = 1
    steps: int = 0  # optimizer steps so far

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"ema.decay is {self.decay!r}; expected 0 <= decay < 1; flow_grpo uses 0.9.")
        if self.every < 1:
            raise UserError(f"ema.every is {self.every!r}; expected a whole number >= 1; flow_grpo uses 8.")

    def start(self, policy: HasWeights) -> None:
        """The average begins at the current weights."""
        policy.copy_weights("current", "ema")

    def step(self, policy: HasWeights) -> bool:
        """Count one optimizer step and average if it is time; True if it was."""
        n, self.steps = self.steps, self.steps + 1
        if self.steps % self.every:
            return False
        policy.copy_weights("current", "ema", decay=self.decay_at(n))
        return True

    def decay_at(self, n: int) -> float:
        """decay_n of the n-th optimizer step, counted from 0."""
        return min(self.decay, (1 + n) / (10 + n)) if self.ramp else self.decay

    def state_dict(self) -> dict[str, Any]:
        """The count; the averaged weights are in ``policy.named_states()``."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
