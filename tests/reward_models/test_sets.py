"""Rewards of sets: credits against brute force, pairs, groups, single images, texts."""

import dataclasses

import pytest
import torch
from PIL import Image
from toy_backbone import toy_features

from reward_models import checked_score, load
from reward_models.distributions import Frechet, Gaussian, Mmd, Vendi, frechet, gaussian, vendi
from reward_models.sets import SetReward, pairs_of

N = 8
PROMPTS = ["a", "a", "a", "b", "b", "c", "c", "c"]


def images(seed, n=N):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 1, 1, generator=generator) * torch.rand(n, 3, 16, 16, generator=generator)
    return (x * 255).round() / 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("exemplars")
    for i, picture in enumerate(images(100, 12)):
        Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(path / f"{i:02}.png")
    return path


def statistic(name, x):
    reference = toy_features().features(images(100, 12))
    return {"frechet": lambda: Frechet(x, Gaussian.of(reference)), "kid": lambda: Mmd(x, reference)}.get(
        name, lambda: Vendi(x)
    )()


def make(name, folder, **options):
    return SetReward(name, None if name == "vendi" else folder, features=toy_features(), **options)


@pytest.mark.parametrize(("name", "sign"), [("frechet", -1), ("kid", -1), ("vendi", 1)])
def test_leave_one_out_is_what_the_set_loses_and_its_mean_is_the_set_s_value(folder, name, sign):
    x = images(1)
    result = checked_score(make(name, folder), x, PROMPTS)
    features = toy_features().features(x)
    total = sign * statistic(name, features).value()
    rest = torch.tensor(
        [sign * statistic(name, torch.cat([features[:i], features[i + 1 :]])).value() for i in range(N)]
    )
    assert torch.allclose(result.parts["credit"], total - rest, atol=1e-5)
    assert torch.allclose(result.parts["set_value"], torch.full((N,), total), atol=1e-5)
    assert result.values.mean().item() == pytest.approx(total, abs=1e-5)
    assert torch.allclose(result.values.diff(), (total - rest).diff(), atol=1e-5)


def test_the_outlier_earns_least_and_a_copy_adds_no_variety(folder):
    x = images(100, 12)[:N]
    x[3] = torch.tensor([1.0, 0, 0])[:, None, None]
    assert make("frechet", folder).score(x, PROMPTS, [{}] * N).values.argmin() == 3
    three = x[[0, 0, 1]]
    credit = make("vendi", folder).score(three, PROMPTS[:3], [{}] * 3).parts["credit"]
    assert credit.argmax() == 2 and credit[0].item() == pytest.approx(credit[1].item(), abs=1e-6)


@pytest.mark.parametrize("name", ["frechet", "kid", "vendi"])
def test_order_does_not_matter(folder, name):
    x, order = images(2), torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
    reward = make(name, folder)
    values = reward.score(x, PROMPTS, [{}] * N).values
    assert torch.allclose(reward.score(x[order], PROMPTS, [{}] * N).values, values[order], atol=1e-5)


def test_groups_are_sets_of_their_own_and_small_ones_are_missing(folder):
    x = images(3)
    result = make("vendi", folder, scope="group").score(x, PROMPTS, [{}] * N)
    features = toy_features().features(x)
    for index in (slice(0, 3), slice(3, 5), slice(5, 8)):
        assert torch.allclose(result.parts["set_value"][index], torch.tensor(vendi(features[index])), atol=1e-5)
    numbered = make("vendi", folder, scope="group").score(
        x, ["same"] * N, [{}] * N, torch.tensor([4, 4, 4, 0, 0, 9, 9, 9])
    )
    assert torch.equal(numbered.values, result.values)
    small = checked_score(make("frechet", folder, scope="group"), x, PROMPTS)
    assert small.missing.tolist() == [False] * 3 + [True] * 2 + [False] * 3 and "needs at least 3" in str(
        small.reasons[3]
    )


def test_swap_labels_one_of_each_pair_and_the_good_set_is_better(folder):
    x = images(4)
    result = make("frechet", folder, credit="swap").score(x, PROMPTS, [{}] * N)
    pairs = pairs_of(torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]))
    assert pairs.tolist() == [[0, 1], [3, 4], [5, 6]]
    assert torch.equal(result.values[pairs].sum(1), torch.ones(3))
    assert result.missing.nonzero().flatten().tolist() == [2, 7] and "paired" in str(result.reasons[2])
    features = toy_features().features(x)
    reference = toy_features().features(images(100, 12))
    good, bad = (frechet(features[result.values == v], reference) for v in (1, 0))
    assert good < bad
    few = make("frechet", folder, credit="swap").score(x[:3], PROMPTS[:3], [{}] * 3)
    assert few.missing.all() and "fewer than two pairs" in str(few.reasons[0])


def test_a_single_image_against_the_patches_of_the_references(folder):
    x = images(5)
    reward = make("frechet", folder, scope="image")
    values = reward.score(x, PROMPTS, [{}] * N).values
    reference = toy_features().tokens(images(100, 12))[1].flatten(0, 1)
    want = torch.tensor([-frechet(p, reference) for p in toy_features().tokens(x)[1]])
    assert torch.allclose(values, want, atol=1e-4) and reward.spec.scope == "point"
    assert torch.allclose(reward.score(x[2:3], ["a"], [{}]).values, values[2:3], atol=1e-6)


def test_texts_as_exemplars(folder):
    """A single vector has no spread: |x - m|^2 + tr S."""
    texts, x = ["red", "a blue star", "two hearts on the ground"], images(6)
    backbone = toy_features()
    assert backbone.text is not None
    unit = torch.nn.functional.normalize
    t, f = unit(backbone.text(texts), dim=1), unit(backbone.features(x), dim=1)
    alone = SetReward("frechet", texts=texts, features=backbone, scope="image").score(x, PROMPTS, [{}] * N)
    want = (f - t.mean(0)).square().sum(1) + (t - t.mean(0)).square().sum() / 2
    assert torch.allclose(alone.values, -want, atol=1e-5)
    together = SetReward("kid", texts=texts, features=backbone, kernel="gaussian").score(x, PROMPTS, [{}] * N)
    assert together.parts["set_value"][0].item() == pytest.approx(-Mmd(f, t, gaussian).value(), abs=1e-6)


def test_specs_and_names(folder):
    first = make("frechet", folder).spec
    assert first.scope == "set" and first == make("frechet", folder).spec != make("frechet", folder, unit=True).spec
    assert make("vendi", folder, scope="group").spec.scope == "group"
    reward = load("vendi", features=toy_features())
    assert isinstance(reward, SetReward) and reward.spec.name == "vendi-toy"


def test_options_that_do_not_fit(folder):
    for wrong in ({"statistic": "fid"}, {"credit": "half"}, {"scope": "world"}, {"kernel": "linear"}):
        with pytest.raises(ValueError, match="Correct it"):
            SetReward(**{"statistic": "frechet", "references": folder, "features": toy_features()} | wrong)
    with pytest.raises(ValueError, match="got 0 exemplar sets"):
        SetReward("kid", features=toy_features())
    with pytest.raises(ValueError, match="expected none"):
        SetReward("vendi", folder, features=toy_features())
    with pytest.raises(ValueError, match="nothing to share out"):
        make("kid", folder, scope="image")
    with pytest.raises(ValueError, match="no text tower"):
        SetReward("kid", texts=["a", "b"], features=dataclasses.replace(toy_features(), text=None))
    for name in ("frechet", "kid"):
        with pytest.raises(ValueError, match="at least 2"):
            SetReward(name, texts=["a"], features=toy_features())


def test_no_images_have_the_same_parts(folder):
    some, none = (make("vendi", folder).score(images(1)[:n], PROMPTS[:n], [{}] * n) for n in (3, 0))
    assert none.values.shape == (0,) and none.parts.keys() == some.parts.keys()
