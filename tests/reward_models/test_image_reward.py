"""ImageReward against its network written out by hand on the published tensor names, at small sizes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_scorers import BLIP, HEAD, IMAGE, PATCH, SMALL, image_reward_options, image_reward_state, pictures

from reward_models import load
from reward_models.image_reward import TEXT, TEXT_LENGTH, VISION, vision_name
from reward_models.preprocess import OPENAI_MEAN, OPENAI_STD

PROMPTS = ["a red circle", "two blue stars on a very long road that does not end", ""]
LAYERS, HEADS = SMALL["num_hidden_layers"], SMALL["num_attention_heads"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return image_reward_options(tmp_path_factory.mktemp("imagereward"))


@pytest.fixture(scope="module")
def scorer(options):
    return load("imagereward", **options)


def attention(q, k, v, keep=None):
    """softmax(q k^T / sqrt(d)) v for each head; ``keep`` (n, keys): which keys there are."""
    split = [x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v)]
    weights = split[0] @ split[1].transpose(2, 3) / math.sqrt(split[0].shape[-1])
    if keep is not None:
        weights = weights.masked_fill(keep[:, None, None, :] == 0, -math.inf)
    return (weights.softmax(-1) @ split[2]).transpose(1, 2).flatten(2)


def by_hand(state, pixels, ids, mask):
    """BLIP's image encoder (pre-norm), its text encoder with cross-attention (post-norm), head and two constants."""

    def linear(name, x):
        return F.linear(x, state[f"blip.{name}.weight"], state[f"blip.{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"blip.{name}.weight"], state[f"blip.{name}.bias"], eps)

    v, t = "visual_encoder", "text_encoder"
    patch = {kind: state[f"blip.{v}.patch_embed.proj.{kind}"] for kind in ("weight", "bias")}
    x = F.conv2d(pixels, patch["weight"], patch["bias"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"blip.{v}.cls_token"].expand(len(x), -1, -1), x], 1) + state[f"blip.{v}.pos_embed"]
    for i in range(LAYERS):
        b = f"{v}.blocks.{i}"
        q, k, w = linear(f"{b}.attn.qkv", norm(f"{b}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{b}.attn.proj", attention(q, k, w))
        x = x + linear(f"{b}.mlp.fc2", F.gelu(linear(f"{b}.mlp.fc1", norm(f"{b}.norm2", x, 1e-6))))
    image = norm(f"{v}.norm", x, 1e-6)

    words = state[f"blip.{t}.embeddings.word_embeddings.weight"][ids]
    places = state[f"blip.{t}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = norm(f"{t}.embeddings.LayerNorm", words + places, 1e-12)
    for i in range(LAYERS):
        b = f"{t}.encoder.layer.{i}"
        for name, source, keep in (("attention", None, mask), ("crossattention", image, None)):
            keys = y if source is None else source
            q, k, w = (
                linear(f"{b}.{name}.self.{part}", z) for part, z in (("query", y), ("key", keys), ("value", keys))
            )
            y = norm(
                f"{b}.{name}.output.LayerNorm", y + linear(f"{b}.{name}.output.dense", attention(q, k, w, keep)), 1e-12
            )
        inner = linear(f"{b}.output.dense", F.gelu(linear(f"{b}.intermediate.dense", y)))
        y = norm(f"{b}.output.LayerNorm", y + inner, 1e-12)

    z = y[:, 0]
    for i in HEAD:
        z = F.linear(z, state[f"mlp.layers.{i}.weight"], state[f"mlp.layers.{i}.bias"])
    return (z[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.mark.parametrize("shape", [(IMAGE, IMAGE), (48, 83), (80, 41)])
def test_against_the_network_by_hand(scorer, options, shape):
    from torchvision.transforms import functional as T
    from transformers import AutoTokenizer

    images = pictures(3, *shape)
    resized = T.resize(images, IMAGE, T.InterpolationMode.BICUBIC, antialias=True)
    pixels = T.normalize(T.center_crop(resized, IMAGE), OPENAI_MEAN, OPENAI_STD)
    tokens = AutoTokenizer.from_pretrained(options["tokenizer"])(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    state = image_reward_state()
    in_double = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    expected = by_hand(in_double, pixels.double(), tokens["input_ids"], tokens["attention_mask"]).float()
    got = scorer.score(images, PROMPTS, []).values
    assert expected.std() > 0.05
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_text_is_cut_at_35_tokens(scorer):
    images = pictures(1, IMAGE, IMAGE).expand(2, -1, -1, -1)
    start = "a" + " b" * (TEXT_LENGTH - 3)  # with [CLS] and [SEP] exactly 35
    same = scorer.score(images, [start, start + " c d e"], []).values
    assert same[0] == same[1]
    other = scorer.score(images, [start, start[:-1] + "c"], []).values
    assert other[0] != other[1]


def test_published_sizes_give_the_published_names():
    """With the true configuration every tensor of BLIP has a published name: none is left over, none is invented."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    with torch.device("meta"):
        vision = BlipVisionModel(BlipVisionConfig(**VISION))
        text = BlipTextModel(
            BlipTextConfig(**TEXT | {"encoder_hidden_size": 1024, "is_decoder": True}), add_pooling_layer=False
        )
    blocks = (
        f"blocks.{i}.{n}.{k}"
        for i in range(24)
        for n in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for k in ("weight", "bias")
    )
    published = {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "norm.weight",
        "norm.bias",
        *blocks,
    }
    assert {vision_name(name) for name in published} == set(vision.state_dict())
    count = sum(p.numel() for model in (vision, text) for p in model.parameters())
    assert 440e6 < count < 450e6  # the package has 445 M with the head
    assert vision.state_dict()["embeddings.position_embedding"].shape == (1, 197, 1024)
    cross = text.state_dict()["encoder.layer.11.crossattention.self.key.weight"]
    assert cross.shape == (768, 1024) and text.config.num_attention_heads == 12


def test_a_missing_head_or_tensor_is_an_error(options, tmp_path):
    state = image_reward_state()
    for lost, match in (
        ("mlp.layers.7.bias", "mlp.layers.7.bias"),
        ("blip.visual_encoder.norm.weight", "post_layernorm.weight"),
        ("blip.text_encoder.encoder.layer.1.crossattention.self.key.bias", "crossattention"),
    ):
        file = tmp_path / "lost.safetensors"
        save_file({k: v for k, v in state.items() if k != lost}, file)
        with pytest.raises(ValueError, match=match):
            load("imagereward", **options | {"path": str(file)})
    with pytest.raises(ValueError, match="of another shape"):
        load(
            "imagereward",
            **options | {"config": {"vision": BLIP["vision"] | {"intermediate_size": 8}, "text": BLIP["text"]}},
        )


def test_recomputing_activations_changes_no_gradient(options):
    images = pictures(3, 40, 40).requires_grad_()
    gradients = [
        torch.autograd.grad(
            load("imagereward", **options, chunk=2, checkpoint=checkpoint).differentiable(images, PROMPTS).sum(), images
        )[0]
        for checkpoint in (False, True)
    ]
    assert torch.equal(*gradients) and float(gradients[0].norm()) > 0
