"""What the trainer, the evaluator and the samplers may ask of a policy."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flowrl.policies.conditioning import Conditioning


@runtime_checkable
class Policy(Protocol):
    """A text-conditioned flow with trainable weights. Time s runs from 1 (noise) to 0 (data), v = e - x0.

    Shapes: N rows, latents (N, C, h, w) float32, s (N,), images (N, 3, H, W) float in [0, 1].
    """

    name: str
    device: torch.device
    resolution: int  # side of the square image the model was made for, in pixels

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of one latent of a height x width image (None: `resolution`)."""

    def sigmas(self, steps: int, height: int | None = None, width: int | None = None) -> Tensor:
        """The policy's own s-grid: float64, (steps + 1,), falling to 0 (or to the time that `decode` takes as done)."""

    def prior_std(self, s: float) -> float:
        """Std of the initial noise where s is the first time."""

    def encode(self, prompts: Sequence[str], negative: str = "") -> Conditioning:
        """One row of conditioning per prompt, and what the unguided half of guidance needs."""

    def predict(self, latents: Tensor, s: Tensor, cond: Conditioning, guidance: float = 1.0) -> Tensor:
        """Velocity v (N, C, h, w) float32 at latents and s; row i is conditioned on cond's row i."""

    def calls(self, guidance: float = 1.0) -> int:
        """How many network rows one predicted row costs (2 under classifier-free guidance)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images of finished latents (at the last of `sigmas`); differentiable."""

    def weights(self, name: str) -> AbstractContextManager[None]:
        """Use another weight set inside the block: "current", "reference", "old", "ema" or any copied name."""

    def copy_weights(self, source: str, target: str, decay: float | None = None) -> None:
        """target <- source, or target <- decay * target + (1 - decay) * source."""

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names and parameters that an optimizer may change (float32)."""

    def named_states(self) -> dict[str, Tensor]:
        """Every trained weight set as "set/parameter": what a checkpoint must hold."""

    def load_named_states(self, states: dict[str, Tensor]) -> None:
        """Inverse of `named_states`, in place."""
