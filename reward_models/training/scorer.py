"""What is trained: a head on the frozen features of a two-tower model, or the model itself; and how it is opened again.

A folder of a trained scorer holds ``reward.json`` and either ``head.safetensors`` (a head; the body is named in the
JSON, with the hash of its weights) or a model as transformers saves it. ``reward_models.load(FOLDER)`` opens both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from .. import weights
from ..clip_score import ClipScore
from ..protocol import Metadata, RewardResult, RewardSpec

DESCRIPTION, HEAD = "reward.json", "head.safetensors"
INPUTS = ("image_text", "image")


class Head(nn.Module):
    """Linear layers with GELU between them on unit-length features, one number for each aspect.

    Inputs are scaled by the square root of their width, so that their entries are of the order of 1.

    Args:
        width: of the features. hidden: widths of the layers between. aspects: how many numbers.
        inputs: "image_text": image, prompt and their product (whose sum is the cosine); "image": the image alone.
        seed: of the first weights.

    Raises:
        ValueError: unknown inputs, widths below 1.
    """

    def __init__(
        self, width: int, hidden: Sequence[int] = (), aspects: int = 1, inputs: str = "image_text", seed: int = 0
    ) -> None:
        super().__init__()
        if inputs not in INPUTS or any(h < 1 for h in hidden):
            raise ValueError(
                f"got a head with inputs {inputs!r} and hidden layers {list(hidden)}, expected inputs "
                f"{' or '.join(INPUTS)} and widths from 1 on. Correct them."
            )
        self.inputs, self.scale = inputs, math.sqrt(width)
        widths = [width * (3 if inputs == "image_text" else 1), *hidden, aspects]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
        nn.init.zeros_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)
        self.layers = nn.ModuleList(layers)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(N, D) features of images and of prompts, both of unit length -> (N, A)."""
        image = image * self.scale
        if self.inputs == "image_text":
            text = text * self.scale
            image = torch.cat([image, text, image * text], 1)
        for layer in self.layers[:-1]:
            image = nn.functional.gelu(layer(image))
        return self.layers[-1](image)


class HeadScore:
    """A trained head on a frozen body. Values: the weighted mean of its aspects, which are in ``parts``.

    Args:
        body: features of images and prompts. head: on top. aspects: their names, "" for a single one.
        aspect_weights: of the mean, 0 where none is given; None: all alike.
        name, version: for the spec. licence: of body and data.

    Raises:
        ValueError: weights of other aspects, below 0, or all 0.
    """

    def __init__(
        self, body: ClipScore, head: Head, aspects: Sequence[str], *, aspect_weights: Mapping[str, float] | None = None,
        name: str = "trained", version: str = "untrained", licence: str = "that of the body and of the data",
    ) -> None:  # fmt: skip
        self.body, self.head, self.aspects = body, head.to(body.device).eval().requires_grad_(False), list(aspects)
        mix = dict.fromkeys(self.aspects, 1.0) if aspect_weights is None else dict(aspect_weights)
        if not set(mix) <= set(self.aspects) or not all(w >= 0 for w in mix.values()) or not any(mix.values()):
            raise ValueError(
                f"got aspect_weights {mix}, expected numbers from 0 for {', '.join(self.aspects)}, one above 0. "
                "Correct them."
            )
        share = torch.tensor([float(mix.get(aspect, 0.0)) for aspect in self.aspects])
        self.share = (share / share.sum()).to(body.device)
        self.spec = RewardSpec(
            name=name,
            version=version + ("" if aspect_weights is None else f" {mix}"),
            licence=licence,
            preprocessing=body.spec.preprocessing,
            differentiable=True,
        )

    def features(self, images: Tensor) -> Tensor:
        """Image features of the body, see ``ClipScore.features``."""
        return self.body.features(images)

    def differentiable(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The score with a gradient with respect to the images: (N, 3, H, W), N prompts -> (N,)."""
        text = self.body.text_features(prompts).to(self.body.device)
        return self.head(self.body.differentiable_features(images), text) @ self.share

    @torch.no_grad()
    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Metadata], groups: Tensor | None = None
    ) -> RewardResult:
        """See ``Reward.score``; metadata is not read."""
        device = self.body.device
        image, text = self.body.features(images).to(device), self.body.text_features(prompts).to(device)
        found = self.head(image, text)
        named = {f"{self.spec.name}/{a}": found[:, i].cpu() for i, a in enumerate(self.aspects) if a}
        return RewardResult((found @ self.share).cpu(), named)


def open_trained(
    path: str | Path,
    device: str | torch.device = "cpu",
    chunk: int = 64,
    aspect_weights: Mapping[str, float] | None = None,
) -> ClipScore | HeadScore:
    """The scorer in a folder that ``fit.save`` wrote.

    Args:
        path: the folder. device: where it computes. chunk: images of a forward pass.
        aspect_weights: of a head with aspects, see ``HeadScore``.

    Raises:
        ValueError: no such folder, another form, a body whose weights are not those it was trained on, or weights that
            do not fit.
    """
    folder = Path(path).expanduser()
    try:
        about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        kind, name = about["kind"], about["name"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"got {str(folder)!r} without a usable {DESCRIPTION} ({error!r}), expected a folder that `flowrl reward "
            "train` wrote. Give such a folder."
        ) from error
    if kind == "model":
        if aspect_weights is not None:
            raise ValueError(f"got aspect_weights for {str(folder)!r}, which has no aspects. Leave them out.")
        return ClipScore(folder, device=device, chunk=chunk, name=name, licence=about["licence"])
    body = ClipScore(about["body"], device=device, chunk=chunk)
    if body.towers.digest != about["body_digest"]:
        raise ValueError(
            f"got body {about['body']!r} with weights {body.towers.digest[:12]}, expected {about['body_digest'][:12]}, "
            f"on which the head in {str(folder)!r} was trained. Restore that model, or train the head anew."
        )
    head = Head(body.towers.dimension, about["hidden"], len(about["aspects"]), about["inputs"])
    head.load_state_dict(load_file(folder / HEAD))
    version = weights.sha256([folder / HEAD])[:12]
    return HeadScore(
        body, head, about["aspects"], aspect_weights=aspect_weights, name=name, version=version,
        licence=about["licence"],
    )  # fmt: skip


# --- while it is trained ----------------------------------------------------------------------------------------------

Read = Callable[[str], Tensor]  # file -> (3, H, W) in [0, 1]


class HeadTraining:
    """A head that learns; features of all images and prompts are computed once and kept.

    Args:
        body: frozen. head: to train. read: an image of a file.
    """

    def __init__(self, body: ClipScore, head: Head, read: Read) -> None:
        self.body, self.head, self.read = body, head.to(body.device), read
        self._image: dict[str, Tensor] = {}
        self._text: dict[str, Tensor] = {}

    def about(self) -> dict[str, Any]:
        """What tells this training from others, as JSON."""
        widths = [layer.out_features for layer in self.head.layers]
        return {"body": self.body.towers.digest, "inputs": self.head.inputs, "widths": widths}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained."""
        return dict(self.head.named_parameters())

    def prepare(self, files: Sequence[str], prompts: Sequence[str], say: Callable[[int, int], None]) -> None:
        """Compute all features, some images at a time; ``say(done, of)`` after each."""
        new = [file for file in dict.fromkeys(files) if file not in self._image]
        for start in range(0, len(new), self.body.chunk):
            part = new[start : start + self.body.chunk]
            with torch.no_grad():
                pixels = torch.cat([self.body.preprocessing(self.read(file)[None]) for file in part])
                features = normalize(self.body.towers.encode_image(pixels.to(self.body.device)), dim=1)
            self._image |= dict(zip(part, features, strict=True))
            say(start + len(part), len(new))
        texts = list(dict.fromkeys(prompts))
        if texts:
            self._text |= dict(zip(texts, self.body.text_features(texts).to(self.body.device), strict=True))

    def scores(self, files: Sequence[str], prompts: Sequence[str]) -> Tensor:
        """(N, A) with a gradient for the head."""
        image = torch.stack([self._image[file] for file in files])
        return self.head(image, torch.stack([self._text[prompt] for prompt in prompts]))


class ModelTraining:
    """A two-tower model that learns: its cosine, times its logit scale unless the loss has a margin on cosines.

    Args:
        body: from ``ClipScore``; its model is changed in place. train: "all", "layers" (the last ``layers`` blocks of
            both towers, their last norms and projections) or "lora" (on the attention projections, of ``rank``).
        read: an image of a file. scaled: whether scores are logits. seed: of the first LoRA weights.

    Raises:
        ValueError: unknown ``train``, or more layers than there are.
    """

    def __init__(
        self, body: ClipScore, read: Read, *, train: str, layers: int = 2, rank: int = 8, scaled: bool = True, seed:
        int = 0
    ) -> None:  # fmt: skip
        self.body, self.read, self.scaled = body, read, scaled
        self.how = {"train": train, "layers": {"layers": layers, "lora": rank}.get(train)}
        self.model: Any = body.model
        self.peft: Any = None
        if train == "all":
            self.model.requires_grad_(True)
        elif train == "layers":
            _unfreeze_last(self.model, layers)
        elif train == "lora":
            from peft import LoraConfig, get_peft_model  # heavy, and needed here alone

            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
                self.peft = get_peft_model(self.model, config)
            self.peft.eval()
        else:
            raise ValueError(f"got train {train!r}, expected head, layers, all or lora. Use one of these.")

    def about(self) -> dict[str, Any]:
        """What tells this training from others, as JSON."""
        return {"body": self.body.towers.digest, **self.how}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def prepare(self, files: Sequence[str], prompts: Sequence[str], say: Callable[[int, int], None]) -> None:
        """Nothing: the features change with every step."""

    def scores(self, files: Sequence[str], prompts: Sequence[str]) -> Tensor:
        """(N, 1) with a gradient for the trained weights."""
        towers, device = self.body.towers, self.body.device
        pixels = torch.cat([self.body.preprocessing(self.read(file)[None]) for file in files])
        image = normalize(towers.encode_image(pixels.to(device)), dim=1)
        texts = list(dict.fromkeys(prompts))
        text = normalize(towers.encode_text(texts), dim=1)
        row = {prompt: i for i, prompt in enumerate(texts)}
        cosine = (image * text[torch.tensor([row[p] for p in prompts], device=device)]).sum(1, keepdim=True)
        return cosine * self.model.logit_scale.exp() if self.scaled else cosine

    def merged(self) -> Any:
        """The model with what was learnt in it."""
        return self.model if self.peft is None else self.peft.merge_and_unload()


def _unfreeze_last(model: Any, layers: int) -> None:
    blocks = [model.vision_model.encoder.layers, model.text_model.encoder.layers]
    if not 1 <= layers <= min(map(len, blocks)):
        raise ValueError(f"got {layers} layers to train, expected 1 to {min(map(len, blocks))}. Correct the number.")
    parts = [block for tower in blocks for block in list(tower)[-layers:]]
    names = ("vision_model.post_layernorm", "text_model.final_layer_norm", "visual_projection", "text_projection",
             "vision_model.head", "text_model.head")  # fmt: skip
    modules = dict(model.named_modules())
    for part in [*parts, *(modules[name] for name in names if name in modules)]:
        part.requires_grad_(True)
