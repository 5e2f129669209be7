"""Makes torchvision importable beside a torch that it was not built for.

The torchvision wheels of PyPI are CUDA builds. Beside a CPU torch their compiled operators cannot be loaded, and then
``import torchvision`` raises ``operator torchvision::nms does not exist``, because it describes two operators that
nobody has defined. timm, open_clip and the models of transformers import torchvision and fail with it. None of the
rewards here needs these operators; their names are enough.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

_STAND_INS: list[torch.library.Library] = []  # a definition lives as long as its library object


def _registered() -> bool:
    return hasattr(torch.ops.torchvision, "nms")


def ready() -> bool:
    """Call right before importing torchvision, timm, open_clip or a model of transformers. Repeated calls do nothing.

    Where torchvision is absent or its operators can be loaded, nothing changes. Where they cannot, their names are
    defined without code: everything but ``torchvision.ops`` then works, and ``torchvision.ops.nms`` itself refuses.

    Returns:
        Whether the names had to be defined here.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or _registered():
        return bool(_STAND_INS)
    try:
        for file in Path(found.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(file))
    except OSError:
        pass  # built for another torch: the case this function is for
    if not _registered():
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _STAND_INS.append(library)
    return bool(_STAND_INS)


def optional(module: str, package: str, extra: str) -> ModuleType:
    """Import a library that only some rewards need.

    Args:
        module: its import name.
        package: its name on PyPI.
        extra: of flowrl, which brings it.

    Raises:
        ValueError: it is not installed.
    """
    ready()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ValueError(
            f"got a reward that needs {module}, which is not installed, expected it to be there. Install it with "
            f"`pip install 'flowrl[{extra}]'` or `pip install {package}`."
        ) from error
