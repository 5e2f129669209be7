"""Similarity to references: closed forms, the assignment problem of scipy, and the reward around them."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize
from toy_backbone import toy_features

from reward_models import checked_score
from reward_models.exemplar import EPSILON, ExemplarReward, nearest_patch, transport, transport_plan

PROMPTS = ["a", "a", "b", "c"]


def images(seed, n=4, size=16):
    x = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return (x * 255).round() / 255


def save(image, path):
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Two references of prompt a and one of b; c has none. -> (file, images)."""
    folder, pictures = tmp_path_factory.mktemp("references"), images(9, 3)
    for i, picture in enumerate(pictures):
        save(picture, folder / f"{i}.png")
    file = folder / "m.json"
    file.write_text(json.dumps({"a": ["0.png", "1.png"], "b": ["2.png"]}))
    return file, pictures


@settings(max_examples=10)
@given(st.integers(0, 10_000), st.integers(1, 8))
def test_transport_is_the_assignment_of_scipy_up_to_its_bound(seed, m):
    cost = torch.rand(m, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows, columns = linear_sum_assignment(cost.numpy())
    best = cost.numpy()[rows, columns].mean()
    plan = transport_plan(cost, 0.005)
    found = float((plan * cost).sum())
    assert best - 1e-12 <= found <= best + 0.005 * np.log(m) + 1e-3
    assert torch.allclose(plan.sum(0), torch.full((m,), 1 / m, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(plan.sum(1), torch.full((m,), 1 / m, dtype=torch.float64), atol=1e-12)


def test_transport_between_unequal_numbers_of_points():
    """Two points onto four at the same places: each splits in two, at no cost."""
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    y = torch.tensor([[0.0], [0.0], [1.0], [1.0]], dtype=torch.float64)
    plan = transport_plan((x - y.T).square(), 1e-3)
    assert torch.allclose(plan, torch.tensor([[0.25, 0.25, 0, 0], [0, 0, 0.25, 0.25]], dtype=torch.float64), atol=1e-9)


def test_patch_similarities_by_hand():
    """Patches (e1, e1) against (e1, e2): the second finds no partner in e2, whose nearest has cosine 0."""
    e = torch.eye(2)
    x, reference = e[[0, 0]], e[None]
    assert nearest_patch(x, reference).tolist() == pytest.approx([(1 + 0.5) / 2])
    assert transport(x, reference).tolist() == pytest.approx([0.5], abs=EPSILON)
    assert nearest_patch(e[[1, 0]], reference).tolist() == [1.0]  # places do not matter
    assert transport(e[[1, 0]], reference).tolist() == pytest.approx([1.0], abs=EPSILON)


@pytest.mark.parametrize("over", ["max", "mean"])
def test_cosine_over_the_references_of_the_prompt(manifest, over):
    file, pictures = manifest
    backbone, x = toy_features(), images(1)
    result = checked_score(ExemplarReward(file, features=backbone, over=over), x, PROMPTS)
    cosine = normalize(backbone.features(x), dim=1) @ normalize(backbone.features(pictures), dim=1).T
    own = cosine[:2, :2].amax(1) if over == "max" else cosine[:2, :2].mean(1)
    assert torch.allclose(result.values[:3], torch.cat([own, cosine[2, 2:]]), atol=1e-6)
    assert result.values[3].isnan() and "'c'" in str(result.reasons[3]) and result.reasons[:3] == [None] * 3


@pytest.mark.parametrize("similarity", ["cosine", "patch", "transport"])
def test_a_reference_is_like_itself_and_neither_order_nor_chunk_matters(manifest, similarity):
    file, pictures = manifest
    reward = ExemplarReward(file.parent, features=toy_features(), similarity=similarity)
    itself = reward.score(pictures, ["any"] * 3, [{}] * 3).values
    assert torch.allclose(itself, torch.ones(3), atol=EPSILON * np.log(4) + 1e-3)
    x, order = images(2), torch.tensor([2, 0, 3, 1])
    values = reward.score(x, PROMPTS, [{}] * 4).values
    assert values.max() < 1 - 1e-3
    one = ExemplarReward(file.parent, features=toy_features(chunk=1), similarity=similarity)
    assert torch.allclose(one.score(x[order], PROMPTS, [{}] * 4).values, values[order], atol=1e-6)


@pytest.mark.parametrize("similarity", ["patch", "transport"])
def test_references_may_be_compared_a_few_at_a_time(manifest, monkeypatch, similarity):
    file, _ = manifest
    reward, x = ExemplarReward(file.parent, features=toy_features(), similarity=similarity), images(2)
    values = reward.score(x, PROMPTS, [{}] * 4).values
    monkeypatch.setattr("reward_models.exemplar.PAIRS", 2 * 4 * 4)  # of four patches each: two references, then one
    assert torch.allclose(reward.score(x, PROMPTS, [{}] * 4).values, values, atol=1e-3)


@pytest.mark.parametrize(("similarity", "tolerance"), [("cosine", 0.01), ("patch", 0.01), ("transport", 0.3)])
def test_gradient_is_that_of_the_score(manifest, similarity, tolerance):
    file, _ = manifest
    reward = ExemplarReward(file.parent, features=toy_features(), similarity=similarity)
    x = images(3, 1).requires_grad_()
    value = reward.differentiable(x, ["any"])
    assert torch.allclose(value.detach(), reward.score(x.detach(), ["any"], [{}]).values, atol=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        change = reward.differentiable(x + step, ["any"]) - reward.differentiable(x - step, ["any"])
    assert change.item() == pytest.approx(2e-2 * gradient.norm().item(), rel=tolerance)


def test_texts_are_exemplars_too(tmp_path):
    backbone, x = toy_features(), images(4)
    (tmp_path / "t.txt").write_text("red\n\nblue star\n")
    reward = ExemplarReward(texts=tmp_path / "t.txt", features=backbone)
    assert backbone.text is not None
    want = normalize(backbone.features(x), dim=1) @ normalize(backbone.text(["red", "blue star"]), dim=1).T
    assert torch.allclose(reward.score(x, PROMPTS, [{}] * 4).values, want.amax(1), atol=1e-6)
    assert reward.spec == ExemplarReward(texts=["red", "blue star"], features=backbone).spec
    with pytest.raises(ValueError, match="no text tower"):
        ExemplarReward(texts=["red"], features=dataclasses.replace(backbone, text=None))


def test_version_follows_the_references(manifest, tmp_path):
    file, pictures = manifest
    save(pictures[0], tmp_path / "0.png")
    one = ExemplarReward(tmp_path, features=toy_features()).spec
    save(1 - pictures[0], tmp_path / "0.png")
    assert one != ExemplarReward(tmp_path, features=toy_features()).spec


def test_options_that_do_not_fit(manifest):
    file, _ = manifest
    for wrong in ({"similarity": "sine"}, {"over": "min"}, {"texts": ["a"]}):
        with pytest.raises(ValueError, match="expected one of"):
            ExemplarReward(file, features=toy_features(), **wrong)
    with pytest.raises(ValueError, match="expected one of them"):
        ExemplarReward(features=toy_features())
    with pytest.raises(ValueError, match="no patches"):
        ExemplarReward(texts=["a"], features=toy_features(), similarity="patch")
    with pytest.raises(ValueError, match="no texts"):
        ExemplarReward(texts=[], features=toy_features())
