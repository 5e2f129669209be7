"""Each CLIP-type scorer against an independent path through the library that published its pieces.

Fixtures are small models of the true architecture with random weights, biases and gains included.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_scorers import HPS, IMAGE, LENGTH, aesthetic_file, clip_folder, head_state, hps_file, pictures, siglip_folder

from reward_models import load
from reward_models.affine_head import fold
from reward_models.clip_score import FORMULAS, ClipScore
from reward_models.preprocess import HALF, OPENAI_MEAN, OPENAI_STD
from reward_models.weights import OFFICIAL, locate_file, read

PROMPTS = ["a red circle", "Two blue stars, on the left of a heart", "ein gruenes Haus"]
SHARED = Path(__file__).parents[2].parent / "shared"
SHAPES = [(IMAGE, IMAGE), (48, 83), (80, 41)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return siglip_folder(tmp_path_factory.mktemp("siglip") / "model")


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    return hps_file(tmp_path_factory.mktemp("hps") / "hps.pt")


def close(got, expected, rel=1e-5):
    return torch.allclose(got, expected, rtol=rel, atol=rel * float(expected.abs().max()))


@torch.no_grad()
def transformers_logits(folder, kind, images):
    """The diagonal of logits_per_image along the library's own pipeline, and the model."""
    import transformers

    model = getattr(transformers, f"{kind}Model").from_pretrained(folder).eval()
    pixels = getattr(transformers, f"{kind}ImageProcessor").from_pretrained(folder)(
        list(images), do_rescale=False, return_tensors="pt"
    )["pixel_values"]
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        PROMPTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    if kind == "Siglip":
        tokens = {"input_ids": tokens["input_ids"]}
    return model(pixel_values=pixels, **tokens).logits_per_image.diagonal(), model


@pytest.mark.parametrize("shape", SHAPES)
def test_clip_formulas_against_transformers_pipeline(clip, shape):
    images = pictures(3, *shape)
    logits, model = transformers_logits(clip, "CLIP", images)
    cosine = logits / model.logit_scale.detach().exp()
    assert cosine.std() > 0.01
    for name, options, expected in (
        ("clip", {}, cosine),
        ("clip-cosine", {}, cosine),
        ("clip-score", {}, 2.5 * cosine.clamp(min=0)),
        ("pickscore", {"processor": str(clip)}, logits),
        ("pickscore", {"processor": str(clip), "scale": 1 / 26}, logits / 26),
    ):
        assert close(load(name, path=str(clip), **options).score(images, PROMPTS, []).values, expected), name


def test_uint8_pipeline_differs_by_its_rounding_only(clip):
    """The published pipeline rounds to 8 bits after the resize; ours does not, so that it has a gradient."""
    from transformers import CLIPImageProcessor

    images = pictures(3, 512, 512)
    published = CLIPImageProcessor.from_pretrained(clip)(list((images * 255).byte()), return_tensors="pt")
    ours = ClipScore(clip).preprocessing(images)
    level = 1 / 255 / min(OPENAI_STD)
    assert (published["pixel_values"] - ours).abs().max() < 1.1 * level


def open_clip_twin(folder, quick_gelu):
    """The weights of a transformers CLIPModel in open_clip's classes (the same networks, written independently)."""
    import open_clip
    from transformers import CLIPModel

    theirs = CLIPModel.from_pretrained(folder)
    text, vision = theirs.config.text_config, theirs.config.vision_config
    depth = {"layers": 2, "mlp_ratio": 2}
    model = open_clip.CLIP(
        theirs.config.projection_dim,
        depth | {"image_size": IMAGE, "width": vision.hidden_size, "head_width": 8, "patch_size": 8},
        depth | {"context_length": LENGTH, "vocab_size": text.vocab_size, "width": text.hidden_size, "heads": 2},
        quick_gelu=quick_gelu,
    ).eval()  # fmt: skip
    old = theirs.state_dict()
    new = {
        "logit_scale": old["logit_scale"],
        "token_embedding.weight": old["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": old["text_model.embeddings.position_embedding.weight"],
        "text_projection": old["text_projection.weight"].T,
        "visual.proj": old["visual_projection.weight"].T,
        "visual.class_embedding": old["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": old["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": old["vision_model.embeddings.patch_embedding.weight"],
    }
    for side, tower, norms in (
        ("text_model", "", {"final_layer_norm": "ln_final"}),
        ("vision_model", "visual.", {"pre_layrnorm": "visual.ln_pre", "post_layernorm": "visual.ln_post"}),
    ):
        for kind in ("weight", "bias"):
            new |= {f"{ours}.{kind}": old[f"{side}.{name}.{kind}"] for name, ours in norms.items()}
            for i in range(2):
                block, layer = f"{tower}transformer.resblocks.{i}", f"{side}.encoder.layers.{i}"
                parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
                         "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
                new |= {f"{block}.{ours}.{kind}": old[f"{layer}.{name}.{kind}"] for ours, name in parts.items()}
                qkv = [old[f"{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                new[f"{block}.attn.in_proj_{kind}"] = torch.cat(qkv)
    model.load_state_dict(new)
    return model


def test_clip_and_its_quick_gelu_against_open_clip(clip):
    from open_clip import image_transform
    from PIL import Image
    from transformers import AutoTokenizer

    images = pictures(3, IMAGE, IMAGE)
    transform = image_transform(IMAGE, is_train=False)
    as_pil = [Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()) for image in images]
    pixels = torch.stack([transform(image) for image in as_pil])
    ids = AutoTokenizer.from_pretrained(clip)(
        PROMPTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )["input_ids"]  # the end token has the greatest number and pads, and open_clip reads the first greatest

    def cosine(quick_gelu):
        model = open_clip_twin(clip, quick_gelu)
        with torch.no_grad():
            return (model.encode_image(pixels, True) * model.encode_text(ids, True)).sum(1)

    got = load("clip-cosine", path=str(clip)).score(images, PROMPTS, []).values
    assert close(got, cosine(True))
    assert (got - cosine(False)).abs().max() > 1e-3  # the wrong activation is another model


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_flow_grpo_s_clip_score_against_torchvision(clip, shape, antialias):
    from torchvision import transforms as T
    from transformers import AutoTokenizer, CLIPModel

    images = pictures(3, *shape)
    pixels = T.Compose(
        [T.Resize(IMAGE, antialias=antialias), T.CenterCrop(IMAGE), T.Normalize(OPENAI_MEAN, OPENAI_STD)]
    )(images)
    tokens = AutoTokenizer.from_pretrained(clip)(
        PROMPTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    with torch.no_grad():
        logits = CLIPModel.from_pretrained(clip).eval()(pixel_values=pixels, **tokens).logits_per_image.diagonal()
    for divisor in (30, 100):
        scorer = load(f"clip-logit-{divisor}", path=str(clip), antialias=antialias)
        assert close(scorer.score(images, PROMPTS, []).values, logits / divisor)
        assert scorer.spec.name == f"clip-logit-{divisor}"


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (600, 37)])
def test_hps_against_torchvision_and_open_clip_s_own_forward(hps, shape, antialias):
    import open_clip
    from torchvision.transforms import functional as T

    images = pictures(3, *shape)
    scale = IMAGE / max(shape)
    new = [round(side * scale) for side in shape]
    small = T.resize(images, new, T.InterpolationMode.BICUBIC, antialias=antialias)
    left, top = (IMAGE - new[1]) // 2, (IMAGE - new[0]) // 2
    padded = T.pad(small, [left, top, IMAGE - new[1] - left, IMAGE - new[0] - top], fill=0)
    model = open_clip.CLIP(**HPS).eval()
    model.load_state_dict(torch.load(hps, weights_only=True)["state_dict"])
    with torch.no_grad():
        image, text, scale = model(T.normalize(padded, OPENAI_MEAN, OPENAI_STD), open_clip.tokenize(PROMPTS))
    scorer = load("hpsv2.1", path=str(hps), architecture=HPS, antialias=antialias)
    assert close(scorer.score(images, PROMPTS, []).values, (image @ text.T).diagonal())
    assert f"{'with' if antialias else 'without'} antialias" in scorer.spec.preprocessing


def test_antialias_is_another_spec_and_another_score(hps):
    with_, without = (load("hpsv2", path=str(hps), architecture=HPS, antialias=flag) for flag in (True, False))
    images = torch.rand(3, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert with_.spec != without.spec and with_.spec.name == "hpsv2"
    difference = with_.score(images, PROMPTS, []).values - without.score(images, PROMPTS, []).values
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_siglip_against_transformers_pipeline(siglip, shape):
    images = pictures(3, *shape)
    logits, model = transformers_logits(siglip, "Siglip", images)
    cosine = (logits - model.logit_bias.detach()) / model.logit_scale.detach().exp()
    for formula, expected in (("cosine", cosine), ("logit", logits), ("probability", torch.sigmoid(logits))):
        scorer = load("siglip", path=str(siglip), formula=formula)
        assert close(scorer.score(images, PROMPTS, []).values, expected), formula
        low, high = scorer.spec.range
        assert low < float(expected.min()) and float(expected.max()) < high
    assert scorer.towers.preprocessing.mean == HALF


def test_formulas_by_hand():
    cosine = torch.tensor([-0.1, 0.3])
    values = {name: formula(cosine, 10.0, -2.0).tolist() for name, formula in FORMULAS.items()}
    assert values["hessel"] == pytest.approx([0, 0.75])
    assert values["logit"] == pytest.approx([-3, 1])
    assert values["probability"] == pytest.approx([0.0474259, 0.7310586])
    assert values["cosine"] == cosine.tolist()


def test_a_formula_or_scale_changes_the_version(clip):
    versions = {ClipScore(clip, formula=f, scale=s).spec.version for f in ("cosine", "hessel", "logit") for s in (1, 2)}
    assert len(versions) == 6


def sequential(state, prefix, width):
    """The published head: linear layers with dropout between them."""
    from torch import nn

    sizes = [width] + [len(state[f"{prefix}{i}.bias"]) for i in (0, 2, 4, 6, 7)]
    linear = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    layers = nn.Sequential(
        linear[0], nn.Dropout(0.2), linear[1], nn.Dropout(0.2), linear[2], nn.Dropout(0.1), linear[3], linear[4]
    )
    layers.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return layers.eval()


def test_aesthetic_against_the_published_stack(clip, tmp_path):
    import transformers

    images = pictures(3, 48, 83)
    scorer = load("aesthetic", path=str(aesthetic_file(tmp_path / "head.pth")), clip=str(clip))
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    pixels = transformers.CLIPImageProcessor.from_pretrained(clip)(list(images), do_rescale=False, return_tensors="pt")
    with torch.no_grad():
        out = model.get_image_features(**pixels)
        features = F.normalize(getattr(out, "pooler_output", out), dim=1)
        expected = sequential(head_state(12), "layers.", 12)(features)[:, 0]
    got = scorer.score(images, [""] * 3, []).values
    assert close(got, expected) and float(expected.std()) > 1e-3
    assert scorer.spec.range[0] <= float(got.min()) <= float(got.max()) <= scorer.spec.range[1]
    with pytest.raises(ValueError, match="a head for 7 features"):
        load("aesthetic", path=str(aesthetic_file(tmp_path / "other.pth", 7)), clip=str(clip))


def test_the_real_aesthetic_head():
    file = SHARED / "weights" / "aesthetic" / "sac+logos+ava1-l14-linearMSE.pth"
    if not file.is_file():
        pytest.skip("the published head is not on this machine")
    state, digest = read(locate_file(file))
    assert digest == OFFICIAL["aesthetic"].sha256
    w, b = fold(state, "layers.", file)
    features = F.normalize(torch.randn(64, 768, generator=torch.Generator().manual_seed(0)), dim=1)
    with torch.no_grad():
        expected = sequential(state, "layers.", 768)(features)[:, 0]
    assert w.shape == (768,) and close(features @ w + b, expected)


def test_recomputing_activations_changes_no_gradient(clip):
    images = pictures(3, 40, 40).requires_grad_()
    gradients = []
    for checkpoint in (False, True):
        scorer = load("pickscore", path=str(clip), processor=str(clip), checkpoint=checkpoint, chunk=2)
        gradients.append(torch.autograd.grad(scorer.differentiable(images, PROMPTS).sum(), images)[0])
    assert torch.equal(*gradients) and float(gradients[0].norm()) > 0


def test_wrong_choices_are_named(clip):
    for options, match in (
        ({"formula": "cosin"}, "cosine, hessel"),
        ({"scale": 0.0}, "positive"),
        ({"preprocessing": {"antialiased": True}}, "antialias"),
    ):
        with pytest.raises(ValueError, match=match):
            ClipScore(clip, **options)
    with pytest.raises(ValueError, match="list_models"):
        load("hpsv2", path=str(clip / "model.safetensors"), architecture="ViT-Q")
