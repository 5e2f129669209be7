"""Where a run was made, for its report: versions, device, threads. No host name, user or path goes in."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reward_models.protocol import RewardSpec

FILE = "environment.json"
PACKAGES = ("flowrl", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


def environment(device: str = "cpu", processes: int = 1, rewards: Sequence[RewardSpec] = ()) -> dict[str, Any]:
    """Versions and hardware as plain JSON values.

    `device`: where the policy runs ("cpu", "cuda:0"). `rewards`: what the run is trained and judged by.
    """
    import torch

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "processes": processes,
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "packages": versions,
        "commit": _commit(),
        "rewards": [{"name": spec.name, "version": spec.version, "licence": spec.licence} for spec in rewards],
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def write_environment(
    folder: str | Path, device: str = "cpu", processes: int = 1, rewards: Sequence[RewardSpec] = ()
) -> Path:
    """Write `environment.json` into a run folder; arguments as for `environment`."""
    path = Path(folder) / FILE
    path.write_text(json.dumps(environment(device, processes, rewards), indent=1) + "\n", encoding="utf-8")
    return path


def read_environment(folder: str | Path) -> dict[str, Any]:
    """What `write_environment` wrote; empty if there is nothing."""
    path = Path(folder) / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _commit() -> str | None:
    """The git commit of the source, with "+changes" if files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.SubprocessError):  # no git, or a repository without a commit
        return None
