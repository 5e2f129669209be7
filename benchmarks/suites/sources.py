"""Prompt files of the benchmarks: from a folder, or from the hub."""

from __future__ import annotations

from pathlib import Path

from flowrl.errors import UserError


def fetch(source: str, name: str) -> Path:
    """The file `name` of a source: a folder (or the file itself), or `hub:owner/dataset[/folder]`.

    Raises:
        UserError: it is not there.
    """
    if source.startswith("hub:"):
        return _from_hub(source, name)
    path = Path(source)
    if path.is_dir():
        path = path / name
    if not path.is_file():
        raise UserError(f"{path} is not there; expected the benchmark's file {name}; give its folder with --prompts")
    return path


def _from_hub(source: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    owner, _, rest = source.removeprefix("hub:").partition("/")
    dataset, _, folder = rest.partition("/")
    if not dataset:
        raise UserError(f"got {source!r}; expected hub:owner/dataset or hub:owner/dataset/folder")
    try:
        return Path(hf_hub_download(f"{owner}/{dataset}", f"{folder}/{name}" if folder else name, repo_type="dataset"))
    except (OSError, ValueError, HfHubHTTPError) as error:  # missing, gated, or offline
        raise UserError(
            f"cannot load {name} of {source} from the hub: {error}; expected a connection; or give a folder that has "
            "the file with --prompts"
        ) from error
