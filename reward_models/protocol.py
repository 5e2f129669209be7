"""What a reward is, what it answers, and the one function through which trainers call it.

A reward is any object with ``spec`` and ``score`` (a protocol; there is nothing to inherit). A reward it cannot give is
*missing*: NaN with a reason, never 0. Infinity is an error, because it would survive every later mean.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

Metadata = Mapping[str, Any]


class RewardError(Exception):
    """A reward failed or broke its protocol; the message names it."""


@dataclass(frozen=True)
class RewardSpec:
    """Identity of a reward: two scores are comparable only if their specs are equal.

    Attributes:
        name: as written in a config.
        version: changes whenever the numbers do (for learned rewards a hash of the weights).
        scope: "point" (an image alone), "group" (the images of one prompt) or "set" (all images together).
        range: least and greatest possible value.
        higher_is_better: False for distances and other costs.
        licence: of the weights, or of the code if there are none.
        preprocessing: what happens to an image before it is scored (resize kind, crop, normalisation, dtype).
        differentiable: whether ``differentiable(images, prompts)`` carries a gradient; if not, it is absent or raises.
    """

    name: str
    version: str = "1"
    scope: Literal["point", "group", "set"] = "point"
    range: tuple[float, float] = (-math.inf, math.inf)
    higher_is_better: bool = True
    licence: str = "unknown"
    preprocessing: str = "none"
    differentiable: bool = False


@dataclass
class RewardResult:
    """Scores of N images.

    Attributes:
        values: (N,) float32; NaN where the reward is missing.
        parts: raw values of the pieces that ``values`` was made of, each (N,) float32.
        reasons: N entries: why a value is missing, or free text about it, or None.
        uncertainty: (N,) standard deviation of each value, if the reward knows it.
        region_map: (N, h, w) which regions of the image earned the value, if the reward knows it.
    """

    values: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    reasons: list[str | None] = field(default_factory=list)
    uncertainty: Tensor | None = None
    region_map: Tensor | None = None

    @property
    def missing(self) -> Tensor:
        """(N,) bool."""
        return self.values.isnan()


@runtime_checkable
class Reward(Protocol):
    """Anything that scores images."""

    @property
    def spec(self) -> RewardSpec: ...

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """Score N images.

        Args:
            images: (N, 3, H, W) float in [0, 1], on the 8-bit grid (see ``to_8bit``).
            prompts: N prompts.
            metadata: N dictionaries that came with the prompts (empty ones where nothing did).
            groups: (N,) integers; equal numbers are images of the same prompt. None: not known.
        """
        ...


def preflight(reward: object) -> None:
    """Call ``preflight()`` of a reward, judge or listener that has one: it asks in seconds whether the server that it
    needs is there, and raises RewardError if not. ``load`` does this for every reward that it builds."""
    if callable(ask := getattr(reward, "preflight", None)):
        ask()


def to_8bit(images: Tensor) -> Tensor:
    """Put images on the grid of 8-bit values, ``round(255 clamp(x, 0, 1)) / 255``.

    Scores then agree to the last bit with those of the same images written as PNG and read back. The rounding is to
    even at halves, and applying it twice changes nothing.

    Args:
        images: (N, 3, H, W) floats, meant to be in [0, 1], or bytes (uint8), which are the grid itself.
    """
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    return images.float().clamp(0, 1).mul_(255).round_().div_(255)  # one new tensor: a batch can be hundreds of MB


def pixels_of(image: Tensor) -> np.ndarray:
    """The 8-bit pixels (H, W, 3), red first, of one image (3, H, W) in [0, 1], as PIL and its like take them."""
    return (image.detach().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def checked_score(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Metadata] | None = None,
    groups: Tensor | None = None,
    *,
    all_missing: Literal["error", "allow"] = "error",
) -> RewardResult:
    """Score images and check the answer: the only way in which trainers and evaluations call a reward.

    Puts the images on the 8-bit grid and the answer on the CPU in float32, and completes ``reasons`` to N entries.

    Args:
        reward: see ``Reward``.
        images: (N, 3, H, W), floats in [0, 1] or bytes (uint8) in 0..255; the type decides, not the values.
        prompts: N prompts.
        metadata: N dictionaries, or None for N empty ones.
        groups: (N,) group numbers or None.
        all_missing: whether NaN for every image is an error.

    Raises:
        ValueError: the input is wrong (shape, lengths, images that are not finite).
        RewardError: the reward raised, gave a wrong type or length, an infinity, or (by default) NaN for all.
    """
    _check_input(images, prompts, metadata, groups)
    name, n = reward.spec.name, len(images)
    given = [{} for _ in prompts] if metadata is None else list(metadata)
    rounded = images if getattr(reward, "rounds", False) else to_8bit(images)  # a remote one rounds what it sends
    try:
        result = reward.score(rounded, list(prompts), given, groups)
    except (RewardError, torch.OutOfMemoryError):  # already explained; handled by whoever chose the batch size
        raise
    except Exception as error:  # a reward is anybody's code: whatever it raises is reported under its name
        raise RewardError(
            f"reward {name!r} raised {type(error).__name__}: {error} (while scoring {n} images; first prompt: "
            f"{prompts[0] if n else ''!r}). Expected a RewardResult; give NaN with a reason for an image that cannot "
            "be scored."
        ) from error
    if not isinstance(result, RewardResult):
        raise RewardError(
            f"reward {name!r} returned a {type(result).__name__}, expected a RewardResult. "
            "Return RewardResult(values, ...) from score()."
        )
    reasons = list(result.reasons) or [None] * n
    if len(reasons) != n:
        raise RewardError(
            f"reward {name!r} returned {len(reasons)} reasons for {n} images; expected one (or None) each."
        )
    values = _checked_values(result.values, name, "values", prompts)
    parts = {part: _checked_values(v, name, f"part {part!r}", prompts) for part, v in result.parts.items()}
    uncertainty, region_map = result.uncertainty, result.region_map
    if uncertainty is not None:
        uncertainty = _checked_values(uncertainty, name, "uncertainty", prompts)
    if region_map is not None:
        if region_map.ndim != 3 or len(region_map) != n:
            raise RewardError(
                f"reward {name!r}: region_map has shape {tuple(region_map.shape)}, expected ({n}, h, w): one for each "
                "image."
            )
        region_map = region_map.detach().to("cpu", torch.float32)
    missing = values.isnan()
    reasons = [r or (f"{name} gave NaN" if m else None) for r, m in zip(reasons, missing.tolist(), strict=True)]
    if all_missing == "error" and n and bool(missing.all()):
        common = Counter(reasons).most_common(1)[0][0]
        raise RewardError(
            f"reward {name!r} gave NaN for all {n} images, expected at least one score. Most common reason: {common}. "
            "Check that the reward fits these prompts and their metadata."
        )
    return RewardResult(values, parts, reasons, uncertainty, region_map)


def _check_input(
    images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] | None, groups: Tensor | None
) -> None:
    typed = images.is_floating_point() or images.dtype == torch.uint8
    if images.ndim != 4 or images.shape[1] != 3 or not typed:
        raise ValueError(
            f"got images of shape {tuple(images.shape)} and dtype {images.dtype}, expected shape (N, 3, H, W) and "
            "floats in [0, 1] or uint8. Move the channels to the second place."
        )
    for what, given in (("prompts", prompts), ("metadata", metadata), ("groups", groups)):
        if given is not None and len(given) != len(images):
            raise ValueError(
                f"got {len(given)} {what} for {len(images)} images, expected one each. Repeat a prompt's entry for "
                "each of its images."
            )
    if not images.is_floating_point() or not images.numel():
        return
    low, high = images.detach().amin((1, 2, 3)), images.detach().amax((1, 2, 3))  # NaN is both; nothing is copied
    finite = low.isfinite() & high.isfinite()
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        raise ValueError(
            f"got images with NaN or infinite pixels (numbers {bad[:8]} of {len(images)}), expected finite ones. "
            "If they were decoded in float16, decode in float32 or bfloat16."
        )


def _checked_values(values: Any, name: str, what: str, prompts: Sequence[str]) -> Tensor:
    n = len(prompts)
    if not isinstance(values, Tensor):
        raise RewardError(f"reward {name!r}: {what} is a {type(values).__name__}, expected a tensor of shape ({n},).")
    if values.shape != (n,):
        raise RewardError(
            f"reward {name!r}: {what} has shape {tuple(values.shape)}, expected ({n},): one number for each image, "
            "in the order of the images."
        )
    if values.is_complex():
        raise RewardError(f"reward {name!r}: {what} is complex, expected real numbers.")
    values = values.detach().to("cpu", torch.float32)
    if bool(values.isinf().any()):
        i = int(values.isinf().nonzero()[0])
        raise RewardError(
            f"reward {name!r}: {what} is {values[i]:+} for image {i} (prompt {prompts[i]!r}), expected finite numbers "
            "(NaN for a missing one). Bound the reward, or give NaN with a reason."
        )
    return values


def as_result(answer: Any, n: int, name: str) -> RewardResult:
    """Turn what a user's function returned into a RewardResult.

    Args:
        answer: a RewardResult, a tensor or array of shape (n,), or a sequence of n numbers; None counts as missing.
        n: number of images.
        name: of the reward, for the messages.

    Raises:
        RewardError: anything else.
    """
    if isinstance(answer, RewardResult):
        return answer
    if isinstance(answer, Tensor):
        return RewardResult(answer)
    if hasattr(answer, "tolist"):  # numpy and its like
        answer = answer.tolist()
    if not isinstance(answer, Sequence) or isinstance(answer, str):
        raise RewardError(
            f"reward {name!r} returned a {type(answer).__name__}, expected {n} numbers, one for each image."
        )
    if len(answer) != n:
        raise RewardError(f"reward {name!r} returned {len(answer)} values for {n} images, expected one each.")
    try:
        numbers = [math.nan if value is None else float(value) for value in answer]
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"reward {name!r} returned something that is no number ({error}), expected {n} numbers."
        ) from error
    reasons = [f"{name} gave None" if value is None else None for value in answer]
    return RewardResult(torch.tensor(numbers, dtype=torch.float64), reasons=cast("list[str | None]", reasons))
