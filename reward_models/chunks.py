"""Large batches through a network in pieces, with or without their activations kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed


def in_chunks(
    function: Callable[..., Tensor], *tensors: Tensor, chunk: int, device: torch.device, checkpoint: bool = False
) -> Tensor:
    """``function`` on consecutive rows, its answers joined.

    Args:
        function: takes tensors of n rows, answers one of n rows.
        tensors: of N rows each; moved to ``device`` piece by piece, floats to float32.
        chunk: rows at a time, at least 1.
        device: where ``function`` computes.
        checkpoint: in a backward pass compute each piece again instead of keeping its activations: the memory of one
            piece for a third more time.
    """
    answers = []
    for rows in zip(*(tensor.split(chunk) for tensor in tensors), strict=True):
        moved = [row.to(device, torch.float32 if row.is_floating_point() else None) for row in rows]
        if checkpoint and torch.is_grad_enabled():
            answers.append(recomputed(function, *moved, use_reentrant=False))
        else:
            answers.append(function(*moved))
    return torch.cat(answers)
