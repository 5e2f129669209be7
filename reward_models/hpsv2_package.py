"""The official `hpsv2` package as a reward.

Its use is to compare: the built-in rewards ``hpsv2`` and ``hpsv2.1`` load the same weights without the package. It is
slow, as it reads its checkpoint of several GB again for every prompt, after fetching the weights that it was trained
from; and release 1.2.0 lacks its vocabulary, which open_clip has.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import torchvision_ops
from .protocol import Metadata, RewardResult, RewardSpec, pixels_of

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


class Hpsv2Package:
    """HPSv2 as its authors' package computes it, one image at a time; under float16 autocast if there is a GPU.

    Args:
        version: "v2.0" or "v2.1".
        path: of the checkpoint; default: fetched by the package.

    Raises:
        ValueError: the package or its vocabulary is not there.
    """

    def __init__(self, version: str = "v2.1", path: str | None = None) -> None:
        torchvision_ops.ready()
        try:
            from hpsv2 import img_score
        except FileNotFoundError as error:
            source = Path((found := importlib.util.find_spec("open_clip")) and found.origin or "open_clip").parent
            raise ValueError(
                f"got the package hpsv2 without its vocabulary ({error}), which its release left out, expected it "
                f"there. Copy open_clip's: cp '{source / VOCABULARY}' '{error.filename}'"
            ) from error
        except ImportError as error:
            raise ValueError(
                f"got no package hpsv2 ({error}), expected it. Install it where pytest 8 is not: "
                "pip install 'flowrl[hpsv2]'"
            ) from error
        if version not in img_score.hps_version_map:
            raise ValueError(
                f"got version {version!r}, expected one of {', '.join(img_score.hps_version_map)}. Use one of these."
            )
        self.package: Any = img_score
        self.version, self.path = version, path
        self.spec = RewardSpec(
            name="hpsv2-package",
            version=f"{importlib.metadata.version('hpsv2')} {version}",
            range=(-1.0, 1.0),
            licence="Apache-2.0",
            preprocessing="longest side to 224 px, bicubic on float tensors, antialias as torchvision's default; zeros",
        )

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``."""
        values = torch.zeros(len(images))
        for prompt in dict.fromkeys(prompts):  # one reading of the checkpoint for each
            rows = [i for i, other in enumerate(prompts) if other == prompt]
            pictures = [Image.fromarray(pixels_of(images[i])) for i in rows]
            found = self.package.score(pictures, prompt, cp=self.path, hps_version=self.version)
            values[rows] = torch.tensor([float(value) for value in found])
        return RewardResult(values)
