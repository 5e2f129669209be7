"""Backbones with random weights against the forward passes of timm and transformers themselves."""

import dataclasses
import json
import weakref

import pytest
import torch
from torch.nn.functional import interpolate
from toy_backbone import toy_features

from reward_models.features import load_features, weights_hash
from reward_models.torchvision_ops import ready

SIZE = 28
SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2}
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A small DINOv2 of timm with random weights, and its file."""
    ready()
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch14_dinov2.lvd142m", img_size=SIZE, num_classes=0, **SMALL).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("dino") / "model.safetensors"
    save_file(model.state_dict(), path)
    return model, path, {"kind": "dino", "path": path, "size": SIZE, **SMALL}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Small models of transformers with random weights: kind -> (model, folder)."""
    ready()
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 14}
    registers = Dinov2WithRegistersConfig(**small, num_register_tokens=3)
    models = {"dinov2": Dinov2Model(Dinov2Config(**small)), "registers": Dinov2WithRegistersModel(registers)}
    found = {}
    for kind, model in models.items():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        folder = tmp_path_factory.mktemp(kind)
        model.eval().save_pretrained(folder)
        found[kind] = model, folder
    return found


def test_timm_tokens_are_those_of_its_own_forward(dino, images):
    model, _, spec = dino
    features = load_features(spec)
    with torch.no_grad():
        tokens, own = model.forward_features((images - MEAN) / STD), model((images - MEAN) / STD)
    cls, patches = features.tokens(images)
    assert torch.allclose(cls, tokens[:, 0], atol=1e-6) and torch.allclose(patches, tokens[:, 1:], atol=1e-6)
    assert torch.equal(features.features(images), cls) and torch.allclose(cls, own, atol=1e-6)
    assert cls.shape == (3, features.width) and patches.shape == (3, 4, 24)
    assert features.version == weights_hash(model)


def test_timm_weights_of_another_size_are_resampled_and_misfits_refused(dino, images):
    _, path, spec = dino
    assert load_features(spec | {"size": 2 * SIZE}).tokens(images)[1].shape == (3, 16, 24)
    with pytest.raises(ValueError, match="do not fit"):
        load_features(spec | {"depth": 3})
    with pytest.raises(ValueError, match="no such file"):
        load_features(spec | {"path": path.parent / "no.safetensors"})
    with pytest.raises(ValueError, match="does not have"):
        load_features({"kind": "timm", "model": "vit_base_patch14_dinov9"})
    with pytest.raises(ValueError, match="VisionTransformer"):
        load_features({"kind": "timm", "model": "resnet18", "path": path})


def test_weights_out_of_reach_are_a_matter_of_the_path(monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("no network")

    ready()
    monkeypatch.setattr("timm.models.load_state_dict_from_hf", offline)
    with pytest.raises(ValueError, match="no network.*as path"):
        load_features({"kind": "dino", "size": SIZE, **SMALL})


def test_only_one_chunk_s_tokens_are_held_for_features():
    alive, most = [0], [0]

    class Counted(torch.Tensor):
        pass

    def network(x):
        tokens = torch.zeros(len(x), 4, 6).as_subclass(Counted)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        weakref.finalize(tokens, lambda: alive.__setitem__(0, alive[0] - 1))
        return x.mean((1, 2, 3))[:, None], tokens, x.mean((1, 2, 3))[:, None]

    features = dataclasses.replace(toy_features(chunk=1), network=network)
    assert features.features(torch.rand(6, 3, 16, 16)).shape == (6, 1)
    assert most[0] <= 2  # the next chunk is there before the last one goes


def test_preprocessing_squeezes_with_antialias(dino, images):
    model, _, spec = dino
    features = load_features(spec)
    oblong = torch.rand(2, 3, 60, 45, generator=torch.Generator().manual_seed(2))
    small = interpolate(oblong, (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False)
    with torch.no_grad():
        want = model((small - MEAN) / STD)
    assert torch.allclose(features.features(oblong), want, atol=1e-6)
    assert "squeezed to 28x28" in str(features.prepare)


def test_chunks_change_nothing_and_the_gradient_is_that_of_the_feature(dino, images):
    features, one = load_features(dino[2]), load_features(dino[2] | {"chunk": 1})
    assert torch.allclose(features.tokens(images)[1], one.tokens(images)[1], atol=1e-6)
    x = images[:1].clone().requires_grad_()
    direction = torch.randn(24, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad((features.features(x) @ direction).sum(), x)
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():
        change = (features.features(x + step) - features.features(x - step)) @ direction
    assert change.item() == pytest.approx(2e-3 * gradient.norm().item(), rel=0.02)
    assert not any(p.requires_grad for p in features.model.parameters())


@pytest.mark.parametrize("kind", ["dinov2", "registers"])
def test_transformers_dino_is_its_own_forward(saved, images, kind):
    model, folder = saved[kind]
    features = load_features({"kind": "transformers", "path": folder})
    with torch.no_grad():
        tokens = model((images - MEAN) / STD).last_hidden_state
    cls, patches = features.tokens(images)
    assert torch.allclose(cls, tokens[:, 0], atol=1e-5) and torch.allclose(patches, tokens[:, -4:], atol=1e-5)
    assert patches.shape[1] == 4 and tokens.shape[1] == (5 if kind == "dinov2" else 8)
    assert features.prepare.size == SIZE and features.text is None


def test_timm_and_transformers_agree_on_the_same_dino_weights(dino, tmp_path, images):
    """The file has the names of facebook/dinov2-base."""
    from safetensors.torch import save_file
    from transformers import Dinov2Config

    state = dino[0].state_dict()
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=14, layer_norm_eps=1e-6
    )
    new = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.position_embeddings": state["pos_embed"],
        "embeddings.mask_token": torch.zeros(1, 24),
    }
    renamed = {
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "norm1": "norm1",
        "norm2": "norm2",
    }
    for end in ("weight", "bias"):
        new[f"embeddings.patch_embeddings.projection.{end}"] = state[f"patch_embed.proj.{end}"]
        new[f"layernorm.{end}"] = state[f"norm.{end}"]
        for i in range(2):
            layer = f"encoder.layer.{i}"
            new |= {f"{layer}.{b}.{end}": state[f"blocks.{i}.{a}.{end}"] for a, b in renamed.items()}
            parts = state[f"blocks.{i}.attn.qkv.{end}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                new[f"{layer}.attention.attention.{name}.{end}"] = part
    for i in range(2):
        new |= {f"encoder.layer.{i}.layer_scale{k}.lambda1": state[f"blocks.{i}.ls{k}.gamma"] for k in (1, 2)}
    config.save_pretrained(tmp_path)
    save_file({k: v.clone() for k, v in new.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = load_features({"kind": "transformers", "path": tmp_path}).tokens(images)
    for a, b in zip(ours, load_features(dino[2]).tokens(images), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_tiny_clip_tokens_features_and_texts(images):
    from reward_models.clip_score import ClipScore

    features, judge = load_features("tiny-clip"), ClipScore("tiny-clip")
    pictures = interpolate(images, (64, 64))
    unit = torch.nn.functional.normalize
    assert torch.allclose(unit(features.features(pictures), dim=1), judge.features(pictures), atol=1e-5)
    cls, patches = features.tokens(pictures)
    vision = judge.model.vision_model(pixel_values=(pictures - 0.8) / 0.3)
    assert torch.allclose(cls, vision.pooler_output, atol=1e-5)
    assert torch.allclose(patches, judge.model.vision_model.post_layernorm(vision.last_hidden_state[:, 1:]), atol=1e-5)
    prompts = ["a photo of a red star", "a photo of two blue circles"]
    assert features.text is not None
    assert torch.allclose(unit(features.text(prompts), dim=1), judge.text_features(prompts), atol=1e-5)


def test_siglip_pools_by_attention(tmp_path, images):
    from transformers import CLIPTokenizer, SiglipConfig, SiglipModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 54, "max_position_embeddings": 8, "projection_size": 16}
    vision = {"image_size": SIZE, "patch_size": 14}
    model = SiglipModel(SiglipConfig(text_config=small | text, vision_config=small | vision)).eval()
    model.save_pretrained(tmp_path)
    letters = [c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = [*letters, "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[]).save_pretrained(tmp_path)
    features = load_features({"kind": "siglip", "path": tmp_path})
    with torch.no_grad():
        out = model.vision_model(pixel_values=(images - 0.5) / 0.5)
        own = model.get_image_features(pixel_values=(images - 0.5) / 0.5)
    cls, patches = features.tokens(images)
    assert torch.allclose(cls, out.pooler_output, atol=1e-6) and torch.allclose(
        patches, out.last_hidden_state, atol=1e-6
    )
    assert torch.allclose(features.features(images), getattr(own, "pooler_output", own), atol=1e-6)
    assert features.text is not None and features.text(["abc", "d"]).shape == (2, 16)
    with pytest.raises(ValueError, match="expected its own, 28"):
        load_features({"kind": "siglip", "path": tmp_path, "size": 56})


def test_incomplete_and_foreign_folders_are_refused(saved, tmp_path):
    from safetensors.torch import save_file

    model, folder = saved["dinov2"]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("layernorm")}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="They would be random"):
        load_features({"kind": "transformers", "path": tmp_path})
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "bert"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'bert'"):
        load_features({"kind": "transformers", "path": tmp_path})


def test_wrong_specs_are_named(dino):
    with pytest.raises(ValueError, match="Did you mean 'dino'"):
        load_features("dinoo")
    with pytest.raises(ValueError, match="path"):
        load_features("transformers")
    with pytest.raises(ValueError, match="no images"):
        load_features(dino[2]).features(torch.zeros(0, 3, SIZE, SIZE))
