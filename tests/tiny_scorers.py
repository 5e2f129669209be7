"""Small random-weight versions of the published scorers, saved as their official weights are saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE, PATCH, LENGTH = 32, 8, 16  # pixels, pixels, tokens
HPS = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": IMAGE, "layers": 2, "width": 32, "head_width": 16, "patch_size": PATCH},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
BLIP = {"vision": SMALL | {"image_size": IMAGE, "patch_size": PATCH}, "text": SMALL | {"vocab_size": 60}}
HEAD = (0, 2, 4, 6, 7)


def _shaken(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Everything random, biases, gains and class tokens too, so that a tensor put in the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.2 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in state.items()
    }


def clip_tokenizer(length: int = LENGTH) -> Any:
    """CLIP's byte-level tokenizer without merges: any text has tokens, and the vocabulary is small."""
    from transformers import CLIPTokenizer

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [c + end for c in alphabet for end in ("", "</w>")] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(words)}, merges=[], model_max_length=length)


def clip_folder(folder: Path, width: int = 12, act: str = "quick_gelu", seed: int = 0) -> Path:
    """A CLIPModel with its processor, as from_pretrained wants it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = clip_tokenizer()
    last = len(tokenizer) - 1
    text = {"vocab_size": last + 1, "max_position_embeddings": LENGTH, "bos_token_id": last - 1, "eos_token_id": last}
    config = CLIPConfig(
        text_config=SMALL | text | {"hidden_act": act},
        vision_config=SMALL | {"image_size": IMAGE, "patch_size": PATCH, "hidden_act": act},
        projection_dim=width,
    )
    model = CLIPModel(config)
    model.load_state_dict(_shaken(model.state_dict(), seed))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": IMAGE}, crop_size=IMAGE).save_pretrained(folder)
    return folder


def siglip_folder(folder: Path, seed: int = 1) -> Path:
    """A SiglipModel with its processor; the tokenizer is CLIP's, as its own needs a trained vocabulary."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    tokenizer = clip_tokenizer()
    config = SiglipConfig(
        text_config=SMALL | {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH},
        vision_config=SMALL | {"image_size": IMAGE, "patch_size": PATCH},
    )
    model = SiglipModel(config)
    model.load_state_dict(_shaken(model.state_dict(), seed))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessor(size={"height": IMAGE, "width": IMAGE}).save_pretrained(folder)
    return folder


def hps_file(file: Path, seed: int = 2) -> Path:
    """A checkpoint as HPSv2 publishes it: a pickle with a state_dict among training leftovers."""
    import open_clip

    state = _shaken(open_clip.CLIP(**HPS).state_dict(), seed)
    torch.save({"epoch": 3, "name": "hps", "state_dict": state}, file)
    return file


def head_state(width: int, prefix: str = "layers.", seed: int = 3) -> dict[str, Tensor]:
    """The five linear layers of the aesthetic predictor and of ImageReward, on ``width`` features."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (width, 24, 16, 8, 4, 1)
    state = {}
    for layer, inward, outward in zip(HEAD, sizes, sizes[1:], strict=False):
        state[f"{prefix}{layer}.weight"] = torch.randn(outward, inward, generator=generator) / inward**0.5
        state[f"{prefix}{layer}.bias"] = torch.randn(outward, generator=generator)
    return state


def aesthetic_file(file: Path, width: int = 12) -> Path:
    """The head as it is published: a pickled state dictionary."""
    torch.save(head_state(width), file)
    return file


def image_reward_state(seed: int = 4) -> dict[str, Tensor]:
    """Tensors with the names and shapes of ImageReward.pt at the sizes of BLIP above, and some that nobody reads."""
    d, f, n, patches = (
        SMALL["hidden_size"],
        SMALL["intermediate_size"],
        BLIP["text"]["vocab_size"],
        (IMAGE // PATCH) ** 2,
    )
    shapes: dict[str, tuple[int, ...]] = {
        "visual_encoder.cls_token": (1, 1, d),
        "visual_encoder.pos_embed": (1, patches + 1, d),
        "visual_encoder.patch_embed.proj.weight": (d, 3, PATCH, PATCH),
        "visual_encoder.patch_embed.proj.bias": (d,),
        "text_encoder.embeddings.word_embeddings.weight": (n, d),
        "text_encoder.embeddings.position_embeddings.weight": (512, d),
        "vision_proj.weight": (4, d),
    }
    norms = ["visual_encoder.norm", "text_encoder.embeddings.LayerNorm"]
    linear: dict[str, tuple[int, int]] = {}
    for i in range(SMALL["num_hidden_layers"]):
        block, layer = f"visual_encoder.blocks.{i}", f"text_encoder.encoder.layer.{i}"
        linear |= {f"{block}.attn.qkv": (3 * d, d), f"{block}.attn.proj": (d, d)}
        linear |= {f"{block}.mlp.fc1": (f, d), f"{block}.mlp.fc2": (d, f)}
        norms += [f"{block}.norm1", f"{block}.norm2"]
        for attention in ("attention", "crossattention"):
            linear |= {f"{layer}.{attention}.self.{part}": (d, d) for part in ("query", "key", "value")}
            linear[f"{layer}.{attention}.output.dense"] = (d, d)
            norms.append(f"{layer}.{attention}.output.LayerNorm")
        linear |= {f"{layer}.intermediate.dense": (f, d), f"{layer}.output.dense": (d, f)}
        norms.append(f"{layer}.output.LayerNorm")
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(seed)
    state = {f"blip.{name}": torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    for name in norms:
        state[f"blip.{name}.weight"] = 1 + 0.3 * torch.randn(d, generator=generator)
        state[f"blip.{name}.bias"] = 0.3 * torch.randn(d, generator=generator)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    return state | head_state(d, "mlp.layers.", seed)


def bert_folder(folder: Path) -> Path:
    """BERT's word-piece tokenizer over single letters, 57 words."""
    from transformers import BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return folder


def image_reward_options(root: Path) -> dict[str, Any]:
    """What ``load("imagereward", ...)`` needs for a tiny one."""
    save_file(image_reward_state(), root / "ImageReward.safetensors")
    tokenizer = bert_folder(root / "bert")
    return {"path": str(root / "ImageReward.safetensors"), "tokenizer": str(tokenizer), "config": BLIP}


def options(root: Path) -> dict[str, dict[str, Any]]:
    """For each learned scorer the options of ``reward_models.load`` that make it a tiny one, built under ``root``."""
    clip, siglip = str(clip_folder(root / "clip")), str(siglip_folder(root / "siglip"))
    hps, head = str(hps_file(root / "hps.pt")), str(aesthetic_file(root / "head.pth"))
    clips = ("clip", "clip-score", "clip-cosine", "clip-logit-30", "clip-logit-100")
    return {name: {"path": clip} for name in clips} | {
        "pickscore": {"path": clip, "processor": clip},
        "siglip": {"path": siglip},
        "hpsv2": {"path": hps, "architecture": HPS},
        "hpsv2.1": {"path": hps, "architecture": HPS},
        "aesthetic": {"path": head, "clip": clip},
        "imagereward": image_reward_options(root),
    }


def pictures(n: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Images (n, 3, height, width) on the 8-bit grid: smooth colours with noise on them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    noisy = smooth + 0.1 * torch.randn(smooth.shape, generator=generator)
    return (noisy.clamp(0, 1) * 255).round() / 255


def settings(folder: Path, name: str = "preprocessor_config.json") -> dict[str, Any]:
    """A JSON file of a model's folder."""
    return json.loads((folder / name).read_text())
