"""Weights of learned scorers: found, checked, converted, loaded.

A ``path`` in a config is a file, a folder, a hub repository ("owner/name"), or one file of it ("owner/name:file").
Pickled checkpoints (.pt, .pth, .bin, .ckpt) are read once, with ``weights_only=True``, and kept as safetensors under
``$XDG_CACHE_HOME/flowrl/weights`` (``~/.cache`` by default), named by the SHA-256 of the original.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Official:
    """A published checkpoint.

    Attributes:
        path: as a config would name it.
        licence: of the weights.
        sha256: of the file, checked whenever a file of this name is loaded; None: not known to us, not checked.
    """

    path: str
    licence: str
    sha256: str | None = None


OFFICIAL = {
    "hpsv2": Official(
        "xswu/HPSv2:HPS_v2_compressed.pt",
        "Apache-2.0",
        "07cb0d20626232204ca3a6ec53ff5984e7e53212a8a7b0e0ec2bac1bdaf125a1",
    ),
    "hpsv2.1": Official(
        "xswu/HPSv2:HPS_v2.1_compressed.pt",
        "Apache-2.0",
        "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
    ),
    "imagereward": Official(
        "THUDM/ImageReward:ImageReward.pt",
        "Apache-2.0",
        "d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
    ),
    "pickscore": Official("yuvalkirstain/PickScore_v1", "see the model card"),
    "pickscore-processor": Official("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "MIT"),
    "clip-l14": Official("openai/clip-vit-large-patch14", "MIT"),
    "clip-b32": Official("openai/clip-vit-base-patch32", "MIT"),
    "siglip": Official("google/siglip-so400m-patch14-384", "Apache-2.0"),
    "aesthetic": Official(
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/"
        "6934dd81792f086e613a121dbce43082cb8be85e/sac+logos+ava1-l14-linearMSE.pth",
        "Apache-2.0",
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    ),
}
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<file>.+))?")
OLD_WEIGHTS = "pytorch_model.bin"
PICKLED = (".pt", ".pth", ".bin", ".ckpt")


def cache() -> Path:
    """Folder of converted and downloaded files; made on use."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "flowrl" / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256(files: Iterable[Path]) -> str:
    """SHA-256 of the contents of files one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while part := stream.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()


def locate_file(path: str | Path) -> Path:
    """The file that a path names, fetched if it is not here yet.

    Raises:
        ValueError: there is no such file, or it cannot be had offline.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return local
    if str(path).startswith("https://"):
        return _fetch(str(path))
    named = HUB_ID.fullmatch(str(path))
    if named is None or named["file"] is None:
        raise ValueError(
            f"got weights {str(path)!r}, which is no file here, expected one, or 'owner/name:file' on the hub. "
            "Correct the path."
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(named["repo"], named["file"]))
    except OSError as error:
        raise _unreachable(path, f"hf download {named['repo']} {named['file']}", error) from error


def locate_folder(path: str | Path, patterns: Iterable[str]) -> Path:
    """The folder that a path names; of a hub repository only the files that match are fetched.

    Where safetensors are among the patterns and the repository has none (older ones, as CLIP ViT-B/32), its pickled
    weights are fetched instead, see ``pretrained``.

    Raises:
        ValueError: there is no such folder, or it cannot be had offline.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    named = HUB_ID.fullmatch(str(path))
    if named is None or named["file"] is not None:
        raise ValueError(
            f"got model {str(path)!r}, which is no folder here, expected one, or 'owner/name' on the hub. "
            "Correct the path."
        )
    from huggingface_hub import snapshot_download

    wanted = list(patterns)
    try:
        folder = Path(snapshot_download(named["repo"], allow_patterns=wanted))
        if any(pattern.endswith(".safetensors") for pattern in wanted) and not any(folder.glob("*.safetensors")):
            wanted.append(OLD_WEIGHTS)
            folder = Path(snapshot_download(named["repo"], allow_patterns=wanted))
        return folder
    except OSError as error:
        include = " ".join(f"--include '{p}'" for p in wanted)
        raise _unreachable(path, f"hf download {named['repo']} {include}", error) from error


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _unreachable(path: str | Path, command: str, error: Exception) -> ValueError:
    why = "HF_HUB_OFFLINE is set and it is not in the cache" if _offline() else str(error).strip().splitlines()[0]
    return ValueError(
        f"got weights {str(path)!r}, which cannot be had ({why}), expected them on this machine or reachable. "
        f"Run `{command}` where there is a network, or give `path` as a local file or folder."
    )


def _fetch(url: str) -> Path:
    """A file from the web, under its own name in the cache; only files with a known hash are taken from there."""
    known = _official_hash(url.rpartition("/")[2])
    target = cache() / url.rpartition("/")[2]
    if target.is_file():
        return target
    command = f"curl -L -o '{target.name}' '{url}'"
    if known is None:
        raise ValueError(f"got weights {url!r} of unknown hash, expected a local file. Run `{command}`.")
    if _offline():
        raise _unreachable(url, command, OSError("offline"))
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        part = Path(folder) / target.name
        try:
            torch.hub.download_url_to_file(url, str(part), progress=False)
        except OSError as error:
            raise _unreachable(url, command, error) from error
        _check_hash(part, sha256([part]))
        part.replace(target)
    return target


def _official_hash(name: str) -> str | None:
    return next(
        (o.sha256 for o in OFFICIAL.values() if o.path.endswith(f"/{name}") or o.path.endswith(f":{name}")), None
    )


def _check_hash(file: Path, digest: str) -> None:
    known = _official_hash(file.name)
    if known is not None and digest != known:
        raise ValueError(
            f"got {str(file)!r} with SHA-256 {digest}, expected the published file, {known}. "
            "Fetch it again, or rename it if it is meant to be another one."
        )


def read(file: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors of a checkpoint and the SHA-256 of the file.

    A pickled checkpoint may wrap its tensors in "state_dict"; whatever else it holds is dropped.

    Raises:
        ValueError: another format, not the published file of this name, or no plain tensors inside.
    """
    from safetensors.torch import load_file, save_file

    digest = sha256([file])
    _check_hash(file, digest)
    if file.suffix == ".safetensors":
        return load_file(file), digest
    if file.suffix not in PICKLED:
        raise ValueError(f"got weights {str(file)!r}, expected .safetensors or one of {', '.join(PICKLED)}.")
    converted = cache() / f"{digest}.safetensors"
    if not converted.is_file():
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"got weights {str(file)!r}, which torch.load(weights_only=True) refuses ({error}), expected a plain "
                "dictionary of tensors. Fetch the file again; if you trust it, save its state_dict as safetensors."
            ) from error
        if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
            found = found["state_dict"]
        tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
        if not tensors:
            raise ValueError(f"got weights {str(file)!r} without tensors, expected a state dictionary.")
        with tempfile.TemporaryDirectory(dir=converted.parent) as folder:  # moved into place whole, or not at all
            save_file({k: v.clone().contiguous() for k, v in tensors.items()}, Path(folder) / "w.safetensors")
            (Path(folder) / "w.safetensors").replace(converted)
    return load_file(converted), digest


def fill(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load tensors into a model; further tensors are ignored, but every one of the model's must be there.

    Raises:
        ValueError: a tensor of the model is absent or has another shape.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    wrong = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or wrong:
        raise ValueError(
            f"got weights {str(source)!r} that lack {len(missing)} of {len(own)} tensors ({', '.join(missing[:4])}) "
            f"and have {len(wrong)} of another shape ({'; '.join(wrong[:4])}), expected all of them. Give the "
            "checkpoint that belongs to this architecture."
        )
    model.load_state_dict({key: state[key] for key in own})


def pretrained(kind: type, folder: Path) -> tuple[nn.Module, str]:
    """A transformers model from its folder in float32, frozen, in eval mode, and the SHA-256 of its weights.

    Raises:
        ValueError: the folder holds no weights, or they do not fill the model.
    """
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if files:
        digest, given = sha256(files), {}
        where: Path | None = folder
    elif (folder / OLD_WEIGHTS).is_file():
        state, digest = read(folder / OLD_WEIGHTS)
        where, given = None, {"state_dict": state, "config": kind.config_class.from_pretrained(folder)}  # type: ignore[attr-defined]
    else:
        raise ValueError(
            f"got model folder {str(folder)!r} without a .safetensors file or {OLD_WEIGHTS}, expected one. Fetch it or "
            "save the model with save_pretrained()."
        )
    model, told = kind.from_pretrained(where, dtype=torch.float32, output_loading_info=True, **given)  # type: ignore[attr-defined]
    if missing := sorted(told["missing_keys"]) + sorted(map(str, told["mismatched_keys"])):
        raise ValueError(
            f"got model folder {str(folder)!r} whose weights lack {', '.join(missing[:4])} ({len(missing)} in all) of "
            f"{kind.__name__}, expected all of them. Check that config.json belongs to the weights."
        )
    return model.eval().requires_grad_(False), digest
