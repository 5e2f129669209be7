"""Checkpoints that survive a kill at any instant, and tell when a file was damaged.

A checkpoint is a folder ``step_000123`` with ``tensors.safetensors``, ``state.json`` and ``manifest.json`` (sizes and
SHA-256 of both, versions, thread count, and a hash of itself). It is written to ``step_000123.tmp-<pid>``, every file
and the folder are fsynced, the manifest comes last, and one rename makes it visible: a reader sees all of it or
nothing. Nothing is pickled.

    with writer_lock(folder):                       # one writer per folder; clears what a killed run left behind
        found = load_latest(folder)                 # None, or the newest intact checkpoint
        save_checkpoint(folder, step, tensors, state, keep=2)
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowrl import __version__
from flowrl.errors import UserError

FORMAT_VERSION = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
LOCK = ".lock"
# A replaced folder is one that a save of the same step is about to supersede; until then it still counts.
_STEP = re.compile(r"step_(\d{6,})(\.replaced-\d+)?")
_LEFTOVER = re.compile(r"step_\d{6,}\.(tmp|replaced)-\d+")
_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "safetensors")


class DamagedCheckpoint(Exception):
    """A checkpoint is not what was written; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: ``tensors`` on the CPU, ``state`` as JSON gives it (tuples have become lists)."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    path: Path
    manifest: dict[str, Any]


# --- writing ------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path | str, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int = 2
) -> Path:
    """Write ``folder/step_<step>`` and remove all but the newest ``keep``.

    Folders of later steps belong to a history that this save has left (a run resumed from an older checkpoint), and go
    too. A folder of the same step is replaced; the old one stays loadable until the new one is complete.

    Args:
        tensors: any dtypes and devices; names are free strings.
        state: what JSON can hold, and NaN; floats come back to the bit.
        keep: >= 1; with 1, a damaged checkpoint has nothing to fall back on.

    Raises:
        UserError: the files could not be written (disk full, no permission); the checkpoints of before are untouched.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; expected at least 1")
    folder = Path(folder)
    final = folder / f"step_{step:06d}"
    work = folder / f"{final.name}.tmp-{os.getpid()}"
    text = json.dumps(state, indent=1)  # before anything is written: it may refuse
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        save_file(_storable(tensors), work / TENSORS)
        _sync(work / TENSORS)
        _write(work / STATE, text)
        _write(work / MANIFEST, json.dumps(_manifest(work, step), indent=1))
        _sync(work)
        _publish(work, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(work, ignore_errors=True)
        raise UserError(_save_failed(error, folder, step, tensors)) from error
    _prune(folder, step, keep)
    return final


def _storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them; copied only where needed."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        x = tensor.detach().to("cpu").contiguous()
        storage = x.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != x.numel() * x.element_size():
            x = x.clone()
        seen.add(x.untyped_storage().data_ptr())
        out[name] = x
    return out


def _manifest(work: Path, step: int) -> dict[str, Any]:
    manifest = {
        "format": "flowrl-checkpoint",
        "version": FORMAT_VERSION,
        "step": step,
        "files": {n: {"size": (work / n).stat().st_size, "sha256": _sha256(work / n)} for n in (TENSORS, STATE)},
        "threads": torch.get_num_threads(),
        "versions": {
            "flowrl": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _LIBRARIES},
        },
    }
    return {**manifest, "sha256": _own_hash(manifest)}


def _publish(work: Path, final: Path) -> None:
    """Rename ``work`` to ``final``. A rename cannot replace a folder with files, so an old one steps aside first."""
    aside = final.with_name(f"{final.name}.replaced-{os.getpid()}")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(final, aside)
    os.replace(work, final)
    _sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)  # what is left of it is cleared by the next run


def _prune(folder: Path, step: int, keep: int) -> None:
    """Delete what is not among the newest ``keep`` up to ``step``. A failure costs disk space, not the run."""
    steps = [(int(m[1]), p) for p in folder.iterdir() if (m := _STEP.fullmatch(p.name)) and not m[2]]
    past = sorted((s for s, _ in steps if s <= step), reverse=True)
    for s, path in steps:
        if s in past[:keep]:
            continue
        try:
            # Out of sight first: a half-deleted folder must not look like a damaged checkpoint.
            doomed = path.with_name(f"{path.name}.tmp-{os.getpid()}")
            os.replace(path, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            warnings.warn(f"could not delete the old checkpoint {path}: {error}; delete it by hand.", stacklevel=3)


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _save_failed(error: Exception, folder: Path, step: int, tensors: dict[str, Tensor]) -> str:
    need = sum(t.numel() * t.element_size() for t in tensors.values())
    exists = next((p for p in (folder, *folder.parents) if p.exists()), Path("."))
    return (
        f"could not save the checkpoint of step {step} in {folder}: {error}. It needs about {_mb(need)}; "
        f"{_mb(shutil.disk_usage(exists).free)} are free there. Earlier checkpoints are untouched. "
        "Free some space (or raise the quota, or lower checkpoint.keep), then continue with --resume."
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


# --- one writer ---------------------------------------------------------------------------------------------------


@contextmanager
def writer_lock(folder: Path | str) -> Iterator[None]:
    """Hold the folder for one writing process, and clear what killed runs left in it.

    The lock is the kernel's (flock): it ends with the process, however that ends, so no stale lock needs removing.

    Raises:
        UserError: another process holds it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder} is being written by another run (process {file.read().strip() or 'unknown'}); expected to "
                "be the only writer; wait for that run, stop it, or choose another output_dir."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            warnings.warn(f"{folder} is on a file system without locks; start no second run in it.", stacklevel=3)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        _clear_leftovers(folder)
        yield


def _clear_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if match := _LEFTOVER.fullmatch(path.name):
            final = path.with_name(path.name.split(".")[0])
            if match[1] == "replaced" and not final.exists():
                os.replace(path, final)  # killed between the two renames of a replacement: the old one is whole
            else:
                shutil.rmtree(path, ignore_errors=True)


# --- reading ------------------------------------------------------------------------------------------------------


def load_latest(folder: Path | str) -> Checkpoint | None:
    """The newest intact checkpoint, or None where there is none at all.

    A damaged one is skipped with a warning that names the file. Warns if torch's thread count is not that of the save:
    the continuation is then equal to rounding, not to the bit.

    Raises:
        UserError: every checkpoint is damaged (starting over silently would lose the run), or the format is newer.
    """
    folder = Path(folder)
    found = [(int(m[1]), not m[2], p) for p in _entries(folder) if (m := _STEP.fullmatch(p.name))]
    damage: list[str] = []
    for _, _, path in sorted(found, reverse=True):
        try:
            checkpoint = load_checkpoint(path)
        except (DamagedCheckpoint, OSError) as error:  # a bad sector is an OSError, and names the file too
            damage.append(str(error))
            warnings.warn(f"skipping the checkpoint of {path.name}: {error}", stacklevel=2)
            continue
        threads = checkpoint.manifest["threads"]
        if threads != torch.get_num_threads():
            warnings.warn(
                f"{path.name} was saved with {threads} torch threads, now there are {torch.get_num_threads()}; sums "
                f"may differ in the last bits. Set threads: {threads} to continue bit for bit.",
                stacklevel=2,
            )
        return checkpoint
    if damage:
        raise UserError(
            f"no checkpoint in {folder} is intact ({'; '.join(damage)}); expected at least one; restore it from "
            "a copy, or start again in a new output_dir."
        )
    return None


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read one checkpoint folder; every byte is checked against the manifest first.

    Raises:
        DamagedCheckpoint: a file is missing, cut short or changed.
        UserError: the folder does not exist, or was written by a newer format.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; expected a checkpoint folder such as checkpoints/step_000100.")
    manifest = _read_manifest(path / MANIFEST)
    for name in (TENSORS, STATE):
        file, expected = path / name, manifest["files"][name]
        if not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing")
        if file.stat().st_size != expected["size"]:
            raise DamagedCheckpoint(f"{file} has {file.stat().st_size} bytes, expected {expected['size']}")
        if _sha256(file) != expected["sha256"]:
            raise DamagedCheckpoint(f"{file} does not match its SHA-256: its content was changed")
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    return Checkpoint(manifest["step"], load_file(path / TENSORS), state, path, manifest)


def _read_manifest(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise DamagedCheckpoint(f"{file} is missing")
    try:
        manifest = json.loads(file.read_bytes())
        own = manifest.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise DamagedCheckpoint(f"{file} is not readable as a manifest") from None
    if own != _own_hash(manifest):  # every format version keeps this line
        raise DamagedCheckpoint(f"{file} does not match its own SHA-256: its content was changed")
    if manifest["version"] > FORMAT_VERSION:
        raise UserError(
            f"{file.parent} has checkpoint format {manifest['version']}; this flowrl reads up to {FORMAT_VERSION}; "
            f"it was saved with flowrl {manifest.get('versions', {}).get('flowrl')}: install that or newer."
        )
    return manifest


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _own_hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# --- optimizer state ----------------------------------------------------------------------------------------------


def flatten_state(state: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Split a nested state (``optimizer.state_dict()``) into named tensors and a JSON skeleton; nothing is rounded.

    Dicts (keys of any JSON scalar type), lists, tuples, tensors, numbers, strings, None. Tensor names are their paths,
    ``prefix/state/0/exp_avg``.

    Raises:
        TypeError: any other type (it could only be pickled).
    """
    tensors: dict[str, Tensor] = {}

    def walk(x: Any, path: str) -> Any:
        if isinstance(x, Tensor):
            if path in tensors:  # the keys 0 and "0" of one dict
                raise TypeError(f"two tensors of the state are both called {path!r}")
            tensors[path] = x
            return {"tensor": path}
        if isinstance(x, dict):
            return {"dict": [[_scalar(k, path), walk(v, f"{path}/{k}")] for k, v in x.items()]}
        if isinstance(x, (list, tuple)):
            return {type(x).__name__: [walk(v, f"{path}/{i}") for i, v in enumerate(x)]}
        return _scalar(x, path)

    return tensors, walk(state, prefix)


def _scalar(x: Any, path: str) -> Any:
    if x is None or type(x) in (bool, int, float, str):
        return x
    raise TypeError(
        f"{path or 'the state'} holds a {type(x).__name__}; a checkpoint holds numbers, strings and tensors."
    )


def unflatten_state(tensors: dict[str, Tensor], skeleton: Any) -> Any:
    """Inverse of `flatten_state`; ``tensors`` may hold others beside. Tensors are shared, not copied."""
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: unflatten_state(tensors, v) for k, v in content}
    values = [unflatten_state(tensors, v) for v in content]
    return tuple(values) if kind == "tuple" else values
