"""The CLIP judge on a random tiny CLIPModel that is built here."""

import json

import pytest
import torch

from reward_models import checked_score, load
from reward_models.clip_score import ClipScore, bundled_model

SIZE = 32
PROMPTS = ["a red circle", "a blue star", "a red circle", "two hearts"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    words = ["a", "red", "blue", "circle", "star", "two", "hearts"]
    vocabulary = [c + end for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[])
    assert tokenizer(words[1])["input_ids"][1:-1]
    last = len(vocabulary) - 1
    text = {"vocab_size": last + 1, "max_position_embeddings": 16, "bos_token_id": last - 1, "eos_token_id": last}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text | small, vision_config={"image_size": SIZE, "patch_size": 8} | small, projection_dim=12
    )
    path = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]})
    )
    return path


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def test_score_is_the_model_s_own_cosine(folder, images):
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    grid = (images * 255).round() / 255
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=(grid - mean) / std, **tokens).logits_per_image / model.logit_scale.exp()
    got = checked_score(load("clip", path=str(folder)), images, PROMPTS).values
    assert torch.allclose(got, logits.diagonal(), atol=1e-5)


def test_neither_batch_nor_order_matters(folder, images):
    one, chunked = ClipScore(folder), ClipScore(folder, chunk=3)
    whole = one.score(images, PROMPTS, [{}] * 4).values
    assert torch.allclose(chunked.score(images, PROMPTS, [{}] * 4).values, whole, atol=1e-6)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(
        one.score(images[order], [PROMPTS[i] for i in order], [{}] * 4).values, whole[order], atol=1e-6
    )


def test_features_are_normalised_and_repeatable(folder, images):
    clip = ClipScore(folder)
    features = clip.features(images)
    assert features.shape == (4, 12) and torch.allclose(features.norm(dim=1), torch.ones(4), atol=1e-6)
    assert torch.equal(features, clip.features(images))


def test_larger_and_oblong_images_are_resized_and_cropped(folder, images):
    clip = ClipScore(folder)
    large = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.nn.functional.cosine_similarity(clip.features(large), clip.features(images)).min() > 0.99
    wide = torch.cat([torch.zeros(4, 3, SIZE, 10), images, torch.zeros(4, 3, SIZE, 10)], dim=3)
    assert torch.allclose(clip.features(wide), clip.features(images), atol=1e-6)  # the centre crop drops the margins


def test_gradient_is_that_of_the_score(folder, images):
    clip = ClipScore(folder)
    x = images[:1].clone().requires_grad_()
    value = clip.differentiable(x, PROMPTS[:1])
    (gradient,) = torch.autograd.grad(value.sum(), x)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        change = clip.differentiable(x + step, PROMPTS[:1]) - clip.differentiable(x - step, PROMPTS[:1])
    assert change.item() == pytest.approx(2e-2 * gradient.norm().item(), rel=0.05)
    assert value.item() == pytest.approx(clip.score(images[:1], PROMPTS[:1], [{}]).values.item(), abs=1e-6)


def test_long_prompts_are_cut_and_versions_follow_the_weights(folder):
    clip = ClipScore(folder)
    assert clip.text_features(["red " * 50]).isfinite().all()
    assert len(clip.spec.version) == 12 and ClipScore(folder).spec == clip.spec
    assert clip.spec.differentiable and clip.spec.range == (-1, 1)


def test_a_prefix_stands_before_every_prompt(folder, images):
    plain, with_prefix = ClipScore(folder), ClipScore(folder, prefix="a photo ")
    expected = checked_score(plain, images, ["a photo " + prompt for prompt in PROMPTS]).values
    assert torch.allclose(checked_score(with_prefix, images, PROMPTS).values, expected, atol=1e-6)
    assert plain.spec.version != with_prefix.spec.version


def test_wrong_folders_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="no-such-model"):
        bundled_model("no-such-model")
    with pytest.raises(ValueError, match="config.json"):
        ClipScore(tmp_path)
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        (tmp_path / name).write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert'"):
        ClipScore(tmp_path)


def test_inference_mode(folder, images):
    """Such tensors count no changes, so that nothing may be remembered of them."""
    clip = ClipScore(folder)
    expected = checked_score(clip, images, PROMPTS).values
    with torch.inference_mode():
        assert torch.equal(checked_score(clip, images, PROMPTS).values, expected)
        mine = images.clone()
        before = clip.features(mine)
        mine.mul_(0.5)
        assert not torch.allclose(clip.features(mine), before)


def test_what_the_preprocessor_says_is_done_or_refused(folder, tmp_path):
    import shutil

    def with_settings(name, **said):
        other = shutil.copytree(folder, tmp_path / name)
        settings = {"image_mean": [0.5] * 3, "image_std": [0.2] * 3} | said
        (other / "preprocessor_config.json").write_text(json.dumps(settings))
        return other

    said = {"resample": 2, "do_center_crop": False, "size": {"height": SIZE, "width": SIZE}}
    squeezed = ClipScore(with_settings("squeezed", **said)).preprocessing
    assert (squeezed.fit, squeezed.mode, squeezed.size) == ("squeeze", "bilinear", SIZE)
    usual = ClipScore(with_settings("usual", resample=3, size=SIZE, crop_size=SIZE)).preprocessing
    assert (usual.fit, usual.mode) == ("crop", "bicubic")
    for name, wrong in (("large", {"size": {"shortest_edge": 2 * SIZE}}), ("nearest", {"resample": 0})):
        with pytest.raises(ValueError, match=r"preprocessor_config\.json resizes"):
            ClipScore(with_settings(name, **wrong))
