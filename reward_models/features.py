"""Vision backbones behind one small interface: tokens and features of images, with a gradient.

    features = load_features("dino")                     # or {"kind": "transformers", "path": FOLDER, "size": 224}
    cls, patches = features.tokens(images)               # (N, D), (N, M, D), after the backbone's final norm
    vectors = features.features(images)                  # (N, E): what similarity is measured in, not normalised

What the two mean depends on the family. DINO: the CLS token is also the feature. CLIP and PickScore: the final norm,
which the model itself gives to its CLS token only, is put on the patches as well; the feature is the projected one.
SigLIP has no CLS token: its pooled output takes the place.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .clip_score import bundled_model
from .preprocess import HALF, IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD, Numbers, Preprocessing
from .torchvision_ops import optional

Network = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

TEXT_CHUNK = 256


@dataclass(frozen=True)
class ImageFeatures:
    """A frozen vision backbone in float32.

    Attributes:
        network: prepared pixels (n, 3, size, size) -> CLS (n, D), patches (n, M, D), feature (n, E).
        text: texts -> (n, E) in the space of the feature, not normalised; None where the model has no text tower.
        model: the module behind both.
        name, version: what it is, and a hash of its weights.
        prepare: images in [0, 1] -> pixels for the network.
        width: D.
        licence: of the weights.
        device: where it computes.
        chunk: images per forward.
    """

    network: Network
    text: Callable[[list[str]], Tensor] | None
    model: Any
    name: str
    version: str
    prepare: Preprocessing
    width: int
    licence: str
    device: torch.device
    chunk: int

    def _all(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if not len(images):
            raise ValueError("got no images, expected at least one. Do not ask for features of nothing.")
        # one by one: who wants features only does not hold the tokens of all images
        return (self.network(self.prepare(part.to(self.device).float())) for part in images.split(self.chunk))

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) in [0, 1] -> CLS (N, D), patches (N, M, D) float32, row by row of the picture."""
        cls, patches, _ = zip(*self._all(images), strict=True)
        return torch.cat(cls), torch.cat(patches)

    def features(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] -> (N, E) float32, one vector each, not normalised."""
        return torch.cat([feature for _, _, feature in self._all(images)])


def weights_hash(model: torch.nn.Module) -> str:
    """12 hexadecimal digits that change with any parameter or buffer of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def timm_features(
    model: str,
    path: str | Path | None = None,
    *,
    size: int | None = None,
    device: str | torch.device = "cpu",
    chunk: int = 32,
    **architecture: Any,
) -> ImageFeatures:
    """Any vision transformer of timm. Images are squeezed into the square.

    Args:
        model: timm's name, for instance "vit_base_patch14_dinov2.lvd142m" (518 px, 1369 patches of 768 numbers).
        path: weights in timm's or the authors' layout (.safetensors, or .pt read with ``weights_only``); None: from the
            hub. All weights but a classifier's must fit.
        size: pixels, if other than the model's own; the position embedding is resampled.
        architecture: further arguments of the model ("depth", "embed_dim", ...).

    Raises:
        ValueError: timm is missing, does not know the name, or the weights do not fit.
    """
    timm = optional("timm", "timm", "clip")
    from timm.models import load_state_dict, load_state_dict_from_hf
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    if not timm.is_model(model):
        near = timm.list_models(f"*{model.partition('.')[0][:12]}*")[:3]
        raise ValueError(f"got timm model {model!r}, which timm {timm.__version__} does not have. Nearest: {near}.")
    network = timm.create_model(
        model, pretrained=False, num_classes=0, **({} if size is None else {"img_size": size}), **architecture
    )
    if not isinstance(network, VisionTransformer):
        raise ValueError(f"got timm model {model!r} ({type(network).__name__}), expected a VisionTransformer.")
    if path is not None and not Path(path).expanduser().is_file():
        raise ValueError(f"got weights {str(path)!r} for {model!r}, but there is no such file. Correct the path.")
    config: Any = network.pretrained_cfg
    if path is None:
        try:
            weights = load_state_dict_from_hf(config.get("hf_hub_id") or model, weights_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"got timm model {model!r}, whose weights are not within reach ({error}). Give the file of its weights "
                "as path."
            ) from error
    else:
        weights = load_state_dict(str(Path(path).expanduser()), weights_only=True)
    weights = checkpoint_filter_fn(weights, network)
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"got weights {str(path)!r} that do not fit {model!r}: {error}") from error
    network.eval().requires_grad_(False).to(device)

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, prefix = network.forward_features(x), network.num_prefix_tokens
        pooled = network.forward_head(tokens, pre_logits=True)
        return tokens[:, 0] if prefix else pooled, tokens[:, prefix:], pooled

    prepare = Preprocessing(
        network.patch_embed.img_size[0], "squeeze", mean=tuple(config["mean"]), std=tuple(config["std"])
    )
    return ImageFeatures(
        forward, None, network, model, weights_hash(network), prepare, network.embed_dim,
        config.get("license") or "see the model card", torch.device(device), chunk,
    )  # fmt: skip


def transformers_features(
    path: str | Path,
    *,
    processor: str | Path | None = None,
    size: int | None = None,
    device: str | torch.device = "cpu",
    chunk: int = 32,
) -> ImageFeatures:
    """DINOv2 (with or without registers), DINOv3, CLIP or SigLIP in transformers' layout.

    Images are squeezed into the square, for CLIP scaled and cropped. Mean and std are read from
    preprocessor_config.json; the size is the model's own, not that of the processor (which for DINOv2 is 224).

    Args:
        path: folder, name of a bundled model ("tiny-clip") or hub id.
        processor: the same for tokenizer and preprocessor_config.json, if they lie elsewhere.
        size: pixels, for DINO only.

    Raises:
        ValueError: nothing there, another kind of model, weights missing in the file, or a size that cannot be.
    """
    transformers = optional("transformers", "transformers", "all")
    source, name = _source(path), Path(path).name
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"got model {str(path)!r}, which is neither a folder nor within reach ({error}).") from error
    kind = config.model_type
    known = {"clip": "CLIPModel", "siglip": "SiglipModel"}
    known |= {k: "AutoModel" for k in ("dinov2", "dinov2_with_registers", "dinov3_vit")}
    if kind not in known:
        raise ValueError(f"got model {str(path)!r} of type {kind!r}, expected one of {', '.join(known)}.")
    model, info = getattr(transformers, known[kind]).from_pretrained(
        source, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(
            f"got weights in {str(path)!r} without {sorted(map(str, info['missing_keys']))[:3]}, expected all of the "
            "model's. They would be random; get the whole file."
        )
    model.eval().requires_grad_(False).to(device)
    vision = getattr(config, "vision_config", config)
    if size not in (None, vision.image_size) and kind in ("clip", "siglip"):
        raise ValueError(f"got size {size} for {str(path)!r}, expected its own, {vision.image_size}. Leave it out.")
    beside = source if processor is None else _source(processor)
    mean, std = _normalisation(transformers, beside, kind)
    prepare = Preprocessing(size or vision.image_size, "crop" if kind == "clip" else "squeeze", mean=mean, std=std)
    text = _text(transformers, model, beside, kind) if kind in ("clip", "siglip") else None
    return ImageFeatures(
        _network(model, kind), text, model, name, weights_hash(model), prepare, vision.hidden_size,
        "see the model card", torch.device(device), chunk,
    )  # fmt: skip


def _source(path: str | Path) -> str:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if "/" in str(path):
        return str(path)  # a hub id
    return str(bundled_model(str(path)))


def _network(model: Any, kind: str) -> Network:
    def clip(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tower = model.vision_model
        tokens = tower.post_layernorm(tower(pixel_values=x).last_hidden_state)
        return tokens[:, 0], tokens[:, 1:], model.visual_projection(tokens[:, 0])

    def siglip(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = model.vision_model(pixel_values=x)
        return out.pooler_output, out.last_hidden_state, out.pooler_output

    def dino(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = model(pixel_values=x).last_hidden_state
        first = 1 + getattr(model.config, "num_register_tokens", 0)
        return tokens[:, 0], tokens[:, first:], tokens[:, 0]

    return {"clip": clip, "siglip": siglip}.get(kind, dino)


def _text(transformers: Any, model: Any, source: str, kind: str) -> Callable[[list[str]], Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    length = int(model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def text(texts: list[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), TEXT_CHUNK):
            tokens = tokenizer(
                texts[start : start + TEXT_CHUNK], padding="max_length", truncation=True, max_length=length,
                return_tensors="pt",
            ).to(model.device)  # fmt: skip
            mask = {"attention_mask": tokens["attention_mask"]} if kind == "clip" else {}  # SigLIP reads its padding
            out = model.get_text_features(input_ids=tokens["input_ids"], **mask)
            parts.append(getattr(out, "pooler_output", out))  # transformers 4 returned the tensor itself
        return torch.cat(parts)

    return text


def _normalisation(transformers: Any, source: str, kind: str) -> tuple[Numbers, Numbers]:
    default = {"clip": (OPENAI_MEAN, OPENAI_STD), "siglip": (HALF, HALF)}
    mean, std = default.get(kind, (IMAGENET_MEAN, IMAGENET_STD))
    file = transformers.utils.cached_file(
        source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False
    )
    settings = json.loads(Path(file).read_text()) if file else {}
    return tuple(settings.get("image_mean", mean)), tuple(settings.get("image_std", std))


KINDS: dict[str, tuple[Callable[..., ImageFeatures], dict[str, Any]]] = {
    "dino": (timm_features, {"model": "vit_base_patch14_dinov2.lvd142m"}),
    "siglip": (transformers_features, {"path": "google/siglip-so400m-patch14-384"}),
    "clip": (transformers_features, {"path": "openai/clip-vit-large-patch14"}),
    "pickscore": (
        transformers_features,
        {"path": "yuvalkirstain/PickScore_v1", "processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"},
    ),
    "tiny-clip": (transformers_features, {"path": "tiny-clip"}),
    "timm": (timm_features, {}),
    "transformers": (transformers_features, {}),
}


def load_features(
    spec: str | Mapping[str, Any] | ImageFeatures, device: str | torch.device = "cpu", chunk: int = 32
) -> ImageFeatures:
    """A backbone by name, or by ``{"kind": name, option: value, ...}`` with options of the functions above.

    Raises:
        ValueError: unknown name or options that do not fit.
    """
    if isinstance(spec, ImageFeatures):
        return spec
    options = {"kind": spec} if isinstance(spec, str) else dict(spec)
    kind = options.pop("kind", None)
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "A folder: {kind: transformers, path: FOLDER}."
        raise ValueError(f"got features {kind!r}, expected one of {', '.join(KINDS)}. {hint}")
    build, defaults = KINDS[kind]
    try:
        return build(**{"device": device, "chunk": chunk, **defaults, **options})
    except TypeError as error:
        raise ValueError(f"got features {kind!r} with options {options}: {error}. Correct them.") from error
