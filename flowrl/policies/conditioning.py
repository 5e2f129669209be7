"""Prompt conditioning as batched tensors, and its cache on disk."""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conditioning:
    """What the network is told about N prompts.

    `rows` maps a name to a tensor (N, ...); `uncond` maps the same names to (1, ...), the row that stands for "no
    prompt" in classifier-free guidance and is shared by all, or is None where the model has no such guidance.
    """

    rows: Mapping[str, Tensor]
    uncond: Mapping[str, Tensor] | None = None

    def __len__(self) -> int:
        return next(iter(self.rows.values())).shape[0]

    def __getitem__(self, index: Tensor | slice | Sequence[int]) -> "Conditioning":
        """Rows by LongTensor, slice or list; a row may be taken many times."""
        if not isinstance(index, slice):
            index = torch.as_tensor(index, dtype=torch.long, device=next(iter(self.rows.values())).device)
        return Conditioning({name: rows[index] for name, rows in self.rows.items()}, self.uncond)

    def to(self, device: torch.device | str) -> "Conditioning":
        """The same conditioning on another device."""
        uncond = None if self.uncond is None else {name: row.to(device) for name, row in self.uncond.items()}
        return Conditioning({name: rows.to(device) for name, rows in self.rows.items()}, uncond)

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """Rows of all parts in order. The parts must share their unconditional row (ValueError)."""
        if not parts:
            raise ValueError("got no conditioning to concatenate; expected at least one part")
        first = parts[0]
        for part in parts[1:]:
            if not _same(first.uncond, part.uncond):
                raise ValueError(
                    "got parts with different unconditional rows; expected one negative prompt for all of them; "
                    "encode them with the same `negative`"
                )
        return Conditioning({name: torch.cat([part.rows[name] for part in parts]) for name in first.rows}, first.uncond)


def _same(a: Mapping[str, Tensor] | None, b: Mapping[str, Tensor] | None) -> bool:
    if a is b or a is None or b is None:
        return a is b
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class EmbeddingCache:
    """Prompt embeddings on disk: one safetensors file per prompt, named by a hash of (encoder, prompt).

    `encoder` identifies the text encoders by content, so that changed weights never meet old embeddings. Files are
    written beside their place and renamed, so that several processes may share a folder and none reads half a file.
    """

    def __init__(self, folder: str | os.PathLike, encoder: str):
        self.folder = Path(folder)
        self.encoder = encoder

    def path(self, prompt: str) -> Path:
        """Where the embedding of `prompt` is or would be."""
        key = hashlib.sha256(json.dumps([1, self.encoder, prompt]).encode()).hexdigest()  # 1: format of these files
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, prompt: str) -> dict[str, Tensor] | None:
        """The stored rows (each (1, ...)), or None. A damaged file is reported and counts as absent."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path(prompt)
        if not path.is_file():
            return None
        try:
            return load_file(path)
        except SafetensorError as error:
            log.warning("damaged embedding cache file %s (%s): encoding that prompt again", path, error)
            return None

    def put(self, prompt: str, rows: Mapping[str, Tensor]) -> None:
        """Store the rows (each (1, ...)) of one prompt."""
        from safetensors.torch import save_file

        path = self.path(prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            save_file({name: row.detach().cpu().contiguous() for name, row in rows.items()}, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def content_hash(modules: Sequence[torch.nn.Module | None], tokenizers: Sequence[Any], settings: object) -> str:
    """Hash of weights (values, dtypes), vocabularies and settings: equal exactly when prompts encode equally."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for module in modules:
        digest.update(b"none" if module is None else type(module).__name__.encode())
        for name, tensor in [] if module is None else sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for tokenizer in tokenizers:
        if tokenizer is not None:
            backend = getattr(tokenizer, "backend_tokenizer", None)
            text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
            digest.update(f"{tokenizer.model_max_length} {text}".encode())
    return digest.hexdigest()
