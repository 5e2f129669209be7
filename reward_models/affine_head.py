"""The head that the LAION aesthetic predictor and ImageReward share: five linear layers with nothing between them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

LAYERS = (0, 2, 4, 6, 7)  # of the published Sequential; the rest is dropout


def fold(state: Mapping[str, Tensor], prefix: str, source: str | Path) -> tuple[Tensor, Tensor]:
    """Five affine maps as one: ``head(x) = x @ w + b``, folded in float64.

    Dropout is not active when scoring, so nothing is lost.

    Args:
        state: weights named ``{prefix}{layer}.weight`` and ``.bias`` for the five layers, the last one to a number.
        prefix: for example "layers.".
        source: named in the error.

    Returns:
        w (D,) and b (), float32.

    Raises:
        ValueError: tensors are absent, or their shapes do not follow one another.
    """
    names = [f"{prefix}{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")]
    if missing := [name for name in names if name not in state]:
        raise ValueError(f"got head {str(source)!r} that lacks {', '.join(missing)}, expected five linear layers.")
    matrices = [state[name].double() for name in names[::2]]
    widths = [tuple(m.shape) for m in matrices]
    chained = all(a[0] == b[1] for a, b in zip(widths, widths[1:], strict=False))
    if not chained or widths[-1][0] != 1:
        raise ValueError(f"got head {str(source)!r} with layers of {widths}, expected a chain that ends in one number.")
    total, shift = torch.eye(widths[0][1], dtype=torch.float64), torch.zeros(widths[0][1], dtype=torch.float64)
    for matrix, bias in zip(matrices, names[1::2], strict=True):
        total, shift = matrix @ total, matrix @ shift + state[bias].double()
    return total[0].float(), shift[0].float()
