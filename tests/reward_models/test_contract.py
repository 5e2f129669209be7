"""What every built-in scorer keeps, whatever it computes; learned ones are small random-weight versions of themselves.

A scorer that is registered without a case here fails with a message that says so.
"""

from __future__ import annotations

import inspect
import math
from contextlib import ExitStack
from typing import Any

import pytest
import tiny_scorers
import torch
from judge_server import serve
from torch import Tensor, nn
from toy_backbone import toy_features

from reward_models import checked_score, load
from reward_models.geneval import Detection
from reward_models.loading import BUILT_IN

PROMPTS = [
    'a red circle with the words "Hi 5"',
    "",
    'a long story of a blue star, "the end" ' * 200,
    "红色的圆形 «دائرة» красный круг 🎈",
    "two blue stars",
]
META = {
    "tag": "single_object",
    "include": [{"class": "circle", "count": 1}],
    "layout": [{"class": "circle", "box": [0.1, 0.1, 0.6, 0.6]}],
    "questions": ["is there a circle?", {"question": "is it night?", "answer": "no"}],
    "details": {"circle": [[1, 1, 20, 20, 0.9]]},
}
GROUPS = torch.tensor([0, 0, 1, 1, 1])
SHAPES = [(24, 61), (61, 24), (8, 8), (3, 200), (1, 1)]
AT_REST = {
    "shapes",
    "shapes-strict",
    "shapes-soft",
    "jpeg",
    "jpeg-incompress",
    "tiny-clip",
    "validity",
    "geneval-stored",
}
ENDPOINTS = {
    "unified-reward",
    "unified-reward-think",
    "unified-reward-flex",
    "edit-score",
    "viescore",
    "vlm-judge",
    "unigenbench",
}
OWN_META = {"t2i-compbench": {"tag": "color", "chunks": ["a circle", "a star"]}}  # whose metadata are others


def read_nothing_but_brightness(pixels: Any) -> list[Any]:
    """In place of the OCR model, which has its own tests: the word "hi" in bright images."""
    from reward_models.ocr import Piece

    return [Piece("hi", 0.9, ((0, 0), (1, 0), (1, 1), (0, 1)))] if pixels.mean() > 120 else []


def answer_by_brightness(images: Tensor, questions: list[str]) -> Tensor:
    """In place of a question answering model: the mean of the image."""
    return images.flatten(1).mean(1)


class BrightCircle:
    """In place of a detection network: a circle where the image is brightest, if it is bright anywhere."""

    classes = ("circle", "star")

    def detect(self, images: Tensor) -> list[list[Detection]]:
        found = []
        for image in images.mean(1):
            (h, w), at = image.shape, int(image.argmax())
            box = (float(at % w), float(at // w), float(w), float(h))
            found.append([Detection("circle", box, float(image.max()))] if image.max() > 0.5 else [])
        return found


def judge_by_brightness(text: str, images: list[Any], body: dict[str, Any]) -> str:
    """In place of a language model; a judge that wants another form than these two has no answer."""
    level = [float(image.mean()) / 255 for image in images]
    if len(images) == 2:
        return f"<think>so</think><answer>Image {1 if level[0] > level[1] else 2} is better</answer>"
    return f"Final Score: {1 + 4 * level[0]:.2f}"


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Options of ``load`` for every scorer that needs some."""
    import json

    root = tmp_path_factory.mktemp("contract")
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        judge = {"url": stack.enter_context(serve(judge_by_brightness)).url, "model": "judge"}
        tiny = tiny_scorers.options(root)
        trained = tiny_scorers.clip_folder(root / "trained")
        (trained / "reward.json").write_text(json.dumps({"kind": "model", "name": "mine", "licence": "none"}))
        references = root / "references"
        references.mkdir()
        save_pictures(references, tiny_scorers.pictures(8, 24, 24, seed=9))
        visual = {"features": toy_features()}
        likeness = {**visual, "references": str(references)}
        found = {"detector": BrightCircle(), "colours": tiny["clip"]["path"]}
        yield (
            tiny
            | dict.fromkeys(AT_REST, {})
            | {name: {"endpoint": judge, "model": "judge"} for name in ENDPOINTS}
            | {
                "trained": {"path": str(trained)},
                "ocr": {"reader": read_nothing_but_brightness},
                "checklist": {"answerer": answer_by_brightness},
                "layout-iou": {"detector": BrightCircle()},
                "t2i-compbench": {"answerer": answer_by_brightness, "clip": None},
                "geneval-hf": found,
                "geneval-hf-strict": found,
                "geneval-hf-soft": found,
                "exemplar": likeness,
                "dino-similarity": likeness,
                "adversarial": visual,
                "frechet": likeness,
                "kid": likeness,
                "vendi": visual,
                "win-rate": {"judge": "jpeg"},
            }
        )


def save_pictures(folder, images):
    from PIL import Image

    for i, image in enumerate(images):
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"{i}.png")


@pytest.fixture(scope="module", params=sorted(BUILT_IN))
def case(request, cases):
    """(name, options)"""
    if request.param not in cases:
        pytest.fail(f"the scorer {request.param!r} is registered, but has no case here: add one to `cases`")
    return request.param, cases[request.param]


@pytest.fixture(scope="module")
def reward(case):
    name, options = case
    return load(name, **options)


def pictures():
    return tiny_scorers.pictures(5, 40, 40)


def meta_of(reward):
    return [META | OWN_META.get(reward.spec.name, {})] * 5


def prompts_of(reward):
    """Five prompts; images of a group share one."""
    return PROMPTS if reward.spec.scope == "point" else [PROMPTS[2]] * 2 + [PROMPTS[3]] * 3


def scored(reward, images=None, rows=range(5), metadata=None):
    """Scores of the given rows of the five images."""
    images = pictures()[list(rows)] if images is None else images
    prompts, groups = [prompts_of(reward)[i] for i in rows], GROUPS[list(rows)]
    meta = meta_of(reward)[: len(images)] if metadata is None else metadata
    return checked_score(reward, images, prompts, meta, groups, all_missing="allow").values


def same(got, expected):
    """Equal up to what another shape of a batch changes in float32; missing in the same places."""
    size = 1 + float(expected.nan_to_num().abs().max()) if len(expected) else 1.0
    return torch.allclose(got, expected, rtol=0, atol=2e-6 * size, equal_nan=True)


def parts_of(thing, depth=4, seen=None):
    """Networks reachable from a scorer."""
    seen = set() if seen is None else seen
    if depth == 0 or id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, nn.Module):
        yield thing
    elif type(thing).__module__.startswith(("reward_models", "functools")):
        for value in getattr(thing, "__dict__", {}).values():
            yield from parts_of(value, depth - 1, seen)


def test_the_spec_is_complete(reward):
    spec = reward.spec
    assert spec.name and spec.version and spec.preprocessing and spec.preprocessing != "none"
    assert spec.licence and spec.licence != "unknown"
    assert spec.scope in ("point", "group", "set") and isinstance(spec.higher_is_better, bool)
    low, high = spec.range
    assert low < high and not math.isnan(low + high if math.isfinite(low + high) else 0.0)
    assert spec.differentiable == hasattr(reward, "differentiable")


def test_values_are_in_range_and_missing_ones_have_a_reason(reward):
    images, prompts, meta = pictures(), prompts_of(reward), meta_of(reward)
    before, state = images.clone(), torch.get_rng_state()
    result = reward.score(images, prompts, meta, GROUPS)
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), state)
    assert result.values.shape == (5,)
    missing = result.values.isnan().tolist()
    reasons = list(result.reasons) or [None] * 5
    assert len(reasons) == 5 and all(reason for reason, absent in zip(reasons, missing, strict=True) if absent)
    low, high = reward.spec.range
    kept = result.values[~result.values.isnan()]
    assert bool(((kept >= low - 1e-5) & (kept <= high + 1e-5)).all())
    assert all(part.shape == (5,) for part in result.parts.values())
    again = reward.score(images.clone(), prompts, meta, GROUPS).values
    assert torch.equal(result.values.nan_to_num(7e7), again.nan_to_num(7e7))


def test_order_does_not_matter(reward):
    whole = scored(reward)
    order = [3, 0, 4, 2, 1]
    assert same(scored(reward, rows=order), whole[order])


def test_the_rest_of_the_batch_does_not_matter(reward):
    whole = scored(reward)
    if reward.spec.scope == "point":
        parts = [[i] for i in range(5)] + [[0, 1, 2]]
    elif reward.spec.scope == "group":
        parts = [[0, 1], [2, 3, 4]]
    else:
        pytest.skip("a reward of all images together")
    for rows in parts:
        assert same(scored(reward, rows=rows), whole[rows]), rows


def test_pieces_of_a_batch_do_not_matter(case, reward):
    name, options = case
    if "chunk" not in inspect.signature(_target(name)).parameters:
        pytest.skip("computes nothing in pieces")
    if "features" in options:
        options = options | {"features": toy_features(chunk=2)}
    assert same(scored(load(name, **options | {"chunk": 2})), scored(reward))


def _target(name):
    import importlib

    module, _, attribute = BUILT_IN[name][1].partition(":")
    return getattr(importlib.import_module(f"reward_models.{module}"), attribute)


def test_floats_are_put_on_the_8_bit_grid_and_bytes_score_as_they_do(reward):
    images = pictures()
    off = images + 0.3 / 255 * (torch.rand(images.shape, generator=torch.Generator().manual_seed(1)) - 0.5)
    whole = scored(reward)
    assert torch.equal(scored(reward, off).nan_to_num(7e7), whole.nan_to_num(7e7))
    in_bytes = (images * 255).round().byte()
    assert torch.equal(scored(reward, in_bytes).nan_to_num(7e7), whole.nan_to_num(7e7))
    with pytest.raises(ValueError, match="floats in \\[0, 1\\] or uint8"):
        scored(reward, in_bytes.long())


@pytest.mark.parametrize("shape", SHAPES)
def test_oblong_and_tiny_images(reward, shape):
    assert scored(reward, tiny_scorers.pictures(5, *shape, seed=2)).shape == (5,)


def test_a_group_whose_prompt_is_empty(reward):
    images, group = pictures(), torch.zeros(5, dtype=torch.long)
    assert checked_score(reward, images, [""] * 5, meta_of(reward), group, all_missing="allow").values.shape == (5,)


def test_no_images(reward):
    assert scored(reward, rows=[]).shape == (0,)


def test_no_metadata(reward):
    assert scored(reward, metadata=[{}] * 5).shape == (5,)


def test_the_gradient_path_agrees_with_the_score(reward):
    if not reward.spec.differentiable:
        pytest.skip("has no gradient")
    for shape in ((40, 40), (24, 61)):
        images = tiny_scorers.pictures(5, *shape).requires_grad_()
        values = reward.differentiable(images, list(PROMPTS))
        assert values.shape == (5,)
        expected = reward.score(images.detach(), PROMPTS, [META] * 5, GROUPS).values
        assert same(values.detach().cpu(), expected)
        (gradient,) = torch.autograd.grad(values.nansum(), images)
        assert bool(gradient.isfinite().all())
        flat = values.eq(reward.spec.range[0]).all()  # where a formula clamps, there is no slope
        assert bool(flat) or float(gradient.abs().sum()) > 0


def test_networks_are_frozen_still_and_in_float32_on_the_asked_device(case):
    name, options = case
    if "device" not in inspect.signature(_target(name)).parameters:
        pytest.skip("computes on the CPU")
    reward = load(name, device=torch.device("cpu"), **options)
    trainable = {id(p) for p in _trained(reward)}
    for module in parts_of(reward):
        assert not module.training or any(id(p) in trainable for p in module.parameters())
        for parameter in module.parameters():
            assert parameter.dtype == torch.float32 and parameter.device.type == "cpu"
            assert not parameter.requires_grad or id(parameter) in trainable


def _trained(reward):
    return [p for group in reward.optimizer.param_groups for p in group["params"]] if hasattr(reward, "update") else []


@pytest.mark.gpu
def test_another_device_gives_the_same(case, reward):
    name, options = case
    if "device" not in inspect.signature(_target(name)).parameters or "features" in options:
        pytest.skip("computes on the CPU")
    got, expected = scored(load(name, device="cuda", **options)), scored(reward)
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3, equal_nan=True)
