"""The discriminator: formulas by hand, learning, exact resume, the preference critic, replay, schedules."""

import dataclasses
import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save
from torch.nn.functional import interpolate
from toy_backbone import toy_features

from flowrl.checkpoint import flatten_state, unflatten_state
from reward_models import RewardError, checked_score
from reward_models.adversarial import ALARM_WINDOW, AdversarialReward, _minibatch, accuracy, discriminator_loss
from reward_models.critics import unit_rms
from reward_models.references import seed_of
from reward_models.replay import Replay
from reward_models.turns import Turn, alternate, trigger


def images(seed, n=6, low=0.0, high=1.0, size=16):
    x = low + (high - low) * torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return (x * 255).round() / 255


def make(**options):
    return AdversarialReward(**{"features": toy_features(), "hidden": 8, "lr": 1e-2} | options)


def scores(reward, x, prompts=None):
    return checked_score(reward, x, prompts or ["a"] * len(x)).values


# ---- formulas


def test_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0, 1.0])
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx((0.5 / 2 + (0 + 1 + 2) / 3) / 2)
    soft = lambda x: math.log1p(math.exp(x))  # noqa: E731
    bce = ((soft(-2) + soft(-0.5)) / 2 + (soft(-3) + soft(0) + soft(1)) / 3) / 2
    assert discriminator_loss(real, fake, "bce").item() == pytest.approx(bce)
    every = [soft(f - r) for r in (2, 0.5) for f in (-3, 0, 1)]
    assert discriminator_loss(real, fake, "pairwise").item() == pytest.approx(sum(every) / 6)
    pairs = torch.tensor([[True, False, False], [False, False, True]])
    assert discriminator_loss(real, fake, "pairwise", pairs).item() == pytest.approx((soft(-5) + soft(0.5)) / 2)
    assert discriminator_loss(real, fake, "pairwise", ~pairs & False).item() == 0
    patches = torch.stack([fake, fake + 2]).T  # means of the patches are fake + 1
    assert discriminator_loss(real, patches, "pairwise").item() == pytest.approx(
        discriminator_loss(real, fake + 1, "pairwise").item()
    )


def test_accuracies_by_hand():
    real, fake = torch.tensor([2.0, -0.5]), torch.tensor([-3.0, 0.0, 1.0])
    assert accuracy(real, fake, "hinge") == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert accuracy(real, fake, "pairwise") == pytest.approx(4 / 6)
    assert accuracy(real, fake, "pairwise", torch.eye(2, 3).bool()) == pytest.approx(1 / 2)


def test_reward_is_the_published_mix_of_one_head():
    reward, x = make(patch_weight=0.3), images(1)
    head = reward.critic.modules["head"]
    cls, patches = toy_features().tokens(x)
    scale = lambda t: t / t.square().mean(-1, keepdim=True).sqrt()  # noqa: E731
    with torch.no_grad():
        h = lambda t: head.last(torch.nn.functional.gelu(head.first(scale(t))))[..., 0]  # noqa: E731
        want = 0.7 * h(cls) + 0.3 * h(patches).mean(1)
    result = checked_score(reward, x, ["a"] * 6)
    assert torch.allclose(result.values, want, atol=1e-5)
    assert torch.allclose(0.7 * result.parts["cls"] + 0.3 * result.parts["patches"], result.values, atol=1e-6)
    assert unit_rms(torch.full((2, 3), 5.0)).tolist() == [[pytest.approx(1.0)] * 3] * 2


def test_a_step_is_adam_on_the_formula():
    """One update equals Adam on hinge(cls) + 0.3 hinge(patches), computed here."""
    reward, twin = make(replay=0), make(replay=0)
    fakes, reals = images(1), images(2, 4, 0.3, 0.9)
    head = twin.critic.modules["head"]
    adam = torch.optim.Adam(head.parameters(), lr=1e-2, betas=(0.5, 0.999))
    for _ in range(2):
        (rc, rp), (fc, fp) = (tuple(head(unit_rms(t)) for t in toy_features().tokens(x)) for x in (reals, fakes))
        hinge = lambda r, f: ((1 - r).relu().mean() + (1 + f).relu().mean()) / 2  # noqa: E731
        adam.zero_grad()
        (hinge(rc, fc) + 0.3 * hinge(rp, fp)).backward()
        adam.step()
    metrics = reward.update(fakes, reals, 0, steps=2)
    for a, b in zip(reward.critic.modules["head"].parameters(), head.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert metrics["gap"] == pytest.approx(float(metrics["reward_real"] - metrics["reward_fake"]))


def test_published_paths_of_features():
    """Scored: no antialias, L2 norm 1, patches with replacement. Trained: Pillow, raw tokens."""
    x = images(3, 5, size=24)
    reward = make(compat="adv_grpo", patches=3, seed=4)
    head = reward.critic.modules["head"]
    cls, patches = toy_features().tokens(interpolate(x, (16, 16), mode="bicubic", align_corners=False))
    places = torch.randint(4, (5, 3), generator=torch.Generator().manual_seed(seed_of(4, "score", 0)))
    chosen = torch.stack([p[i] for p, i in zip(patches, places, strict=True)])
    unit = lambda t: t / (t.norm(dim=-1, keepdim=True) + 1e-6)  # noqa: E731
    with torch.no_grad():
        want = 0.7 * head(unit(cls)) + 0.3 * head(unit(chosen)).mean(1)
    assert torch.equal(scores(reward, x), want)
    small = [Image.fromarray((i * 255).round().byte().permute(1, 2, 0).numpy()) for i in x]
    resized = [torch.tensor(list(s.resize((16, 16), Image.Resampling.BICUBIC).tobytes())) for s in small]
    pixels = torch.stack(resized).reshape(5, 16, 16, 3).permute(0, 3, 1, 2) / 255
    trained = reward.critic.inputs(x, None, True)
    for a, b in zip(trained, toy_features().tokens(pixels), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert "adv_grpo" in reward.spec.preprocessing and len(reward.replay) == 0


# ---- scoring


@pytest.mark.parametrize("patches", [None, 2])
def test_neither_chunk_nor_order_matters_and_a_second_call_gives_the_same(patches):
    x, order = images(5), torch.tensor([4, 2, 0, 5, 1, 3])
    reward = make(patches=patches)
    values = scores(reward, x)
    assert torch.equal(scores(reward, x), values)
    chunked = make(features=toy_features(chunk=4), patches=patches)
    assert torch.allclose(scores(chunked, x[order]), values[order], atol=1e-6)
    assert torch.allclose(reward.differentiable(x, ["a"] * 6).detach(), values, atol=1e-6)


def test_no_images_have_the_same_parts():
    none = make().score(images(1)[:0], [], [])
    assert none.values.shape == (0,) and none.parts.keys() == make().score(images(1), ["a"] * 6, [{}] * 6).parts.keys()


def test_gradient_is_that_of_the_score():
    reward = make()
    x = images(6, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.differentiable(x, ["a"]).sum(), x)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        change = reward.differentiable(x + step, ["a"]) - reward.differentiable(x - step, ["a"])
    assert change.item() == pytest.approx(2e-2 * gradient.norm().item(), rel=0.02)


# ---- learning


@pytest.mark.parametrize("loss", ["hinge", "bce", "pairwise"])
def test_learns_to_tell_references_from_samples(loss):
    """Bright references, dark samples; judged on images that it never saw."""
    reward = make(loss=loss)
    for key in range(25):
        metrics = reward.update(images(key, 8, 0.0, 0.6), images(1000 + key, 8, 0.4, 1.0), key, steps=2)
    real, fake = scores(reward, images(77, 50, 0.4, 1.0)), scores(reward, images(78, 50, 0.0, 0.6))
    assert (real[:, None] > fake).float().mean() > 0.97
    assert metrics["accuracy"] > 0.9 and metrics["gap"] > 0 and metrics["alarm"] == 0


def test_metrics_are_of_new_images_and_the_alarm_needs_ten_updates():
    reward = make(lr=1e-8)
    x = images(1)
    seen = [reward.update(x, x, key) for key in range(ALARM_WINDOW)]
    assert all(m["accuracy"] == pytest.approx(0.5) and m["gap"] == pytest.approx(0, abs=1e-6) for m in seen)
    assert [m["alarm"] for m in seen] == [0.0] * (ALARM_WINDOW - 1) + [1.0]
    assert seen[-1]["accuracy_recent"] == pytest.approx(0.5)


def test_minibatches_are_drawn_by_the_key():
    fakes, reals = images(1, 12), images(2, 12, 0.4)
    one, same, other = make(batch=4), make(batch=4), make(batch=4)
    one.update(fakes, reals, 1)
    same.update(fakes, reals, 1)
    other.update(fakes, reals, 2)
    assert one.spec == same.spec != other.spec
    assert one.spec.version != make(batch=4).spec.version


def test_a_broken_loss_stops_before_the_step():
    reward = make()
    with torch.no_grad():
        reward.critic.modules["head"].last.bias.fill_(torch.nan)
    with pytest.raises(RewardError, match="loss is nan"):
        reward.update(images(1), images(2), 0)


def test_resume_is_exact_through_safetensors_and_json():
    def train(reward, keys):
        return [reward.update(images(k, 5), images(50 + k, 4, 0.3), k, steps=2) for k in keys]

    options = {"replay": 8, "replay_share": 0.5, "patches": 2, "batch": 4}
    straight, first, second = make(**options), make(**options), make(**options)
    whole = train(straight, range(6))
    train(first, range(3))
    tensors, skeleton = flatten_state(first.state_dict(), "reward")
    state = unflatten_state(
        load(save({k: v.contiguous() for k, v in tensors.items()})), json.loads(json.dumps(skeleton))
    )
    second.load_state_dict(state)
    assert second.spec == first.spec
    assert train(second, range(3, 6)) == whole[3:]
    assert torch.equal(scores(second, images(9)), scores(straight, images(9)))
    final = [flatten_state(r.state_dict())[0] for r in (straight, second)]
    assert final[0].keys() == final[1].keys() and all(torch.equal(final[0][k], final[1][k]) for k in final[0])


def test_a_state_is_a_copy_and_foreign_ones_are_refused():
    reward = make()
    state = reward.state_dict()
    version = reward.spec.version
    reward.update(images(1), images(2), 0)
    fresh = make()
    fresh.load_state_dict(state)
    assert fresh.spec.version == version
    with pytest.raises(ValueError, match="format"):
        fresh.load_state_dict(state | {"format": 0})
    with pytest.raises(ValueError, match="backbone"):
        AdversarialReward(dataclasses.replace(toy_features(), version="2"), hidden=8).load_state_dict(state)
    with pytest.raises(ValueError, match="same options"):
        make(hidden=9).load_state_dict(state)


# ---- preference critic


@pytest.fixture(scope="module")
def preference():
    return AdversarialReward({"kind": "tiny-clip"}, critic="preference", lr=1e-4, layers=1)


def test_preference_critic_is_the_scorer_until_it_is_trained(preference):
    from reward_models.clip_score import ClipScore

    x, prompts = images(1, 4, size=64), ["a photo of a red star", "a photo of a blue circle"] * 2
    judge = ClipScore("tiny-clip")
    want = judge.score(x, prompts, [{}] * 4).values * judge.model.logit_scale.exp()
    assert torch.allclose(scores(preference, x, prompts), want, atol=1e-4)
    frozen = {k: v.clone() for k, v in preference.backbone.model.state_dict().items()}
    fakes, reals = images(2, 4, 0.0, 0.5, 64), images(3, 4, 0.5, 1.0, 64)
    first = preference.update(fakes, reals, 0, prompts=prompts, steps=3)
    assert first["gap_after"] > first["gap"] and "prompts" not in first
    changed = {k for k, v in preference.backbone.model.state_dict().items() if not torch.equal(v, frozen[k])}
    assert changed and all("vision_model.encoder.layers.3." in name for name in changed)
    x.requires_grad_()
    assert torch.autograd.grad(preference.differentiable(x, prompts).sum(), x)[0].abs().sum() > 0
    with pytest.raises(ValueError, match="Pass prompts"):
        preference.update(fakes, reals, 0)


def test_preference_critic_needs_clip_and_its_own_copy():
    with pytest.raises(ValueError, match="expected its name"):
        AdversarialReward(toy_features(), critic="preference")


def test_pairwise_compares_images_of_one_prompt():
    reward = make(loss="pairwise", replay=0)
    fakes, reals = images(1, 4), images(2, 2)
    metrics = reward.update(fakes, reals, 0, prompts=["a", "b", "c", "b"], real_prompts=["b", "x"])
    twin = make(loss="pairwise", replay=0)
    alone = twin.update(fakes[[1, 3]], reals[:1], 0)
    assert metrics["accuracy"] == alone["accuracy"]
    for a, b in zip(reward.critic.modules.parameters(), twin.critic.modules.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    with pytest.raises(ValueError, match="share no prompt"):
        reward.update(fakes, reals, 0, prompts=["a"] * 4, real_prompts=["b", "x"])


def test_minibatches_of_pairs_hold_images_with_a_partner():
    pairs = torch.eye(40).bool()
    i, j = _minibatch(40, 40, 8, pairs, torch.Generator().manual_seed(0))
    assert i.tolist() == j.tolist() and len(i) == 8
    pairs = torch.zeros(6, 40).bool()
    pairs[2, 5] = pairs[2, 7] = pairs[4, 7] = True
    i, j = _minibatch(6, 40, 8, pairs, torch.Generator().manual_seed(0))
    assert i.tolist() == [2, 4] and j.tolist() == [5, 7]


# ---- what does not fit


def test_wrong_options_and_images():
    for wrong in ({"critic": "x"}, {"loss": "l2"}, {"compat": "x"}, {"patches": 0}, {"lr": -1.0}, {"batch": 0},
                  {"hidden": 0}, {"patch_weight": 1.5}, {"patch_loss": -0.1}):  # fmt: skip
        with pytest.raises(ValueError, match="Correct the options"):
            make(**wrong)
    reward = make()
    with pytest.raises(ValueError, match="Divide 8-bit"):
        reward.update(images(1).mul(255).byte(), images(2), 0)
    with pytest.raises(ValueError, match="at least one"):
        reward.update(images(1), images(2)[:0], 0)
    with pytest.raises(ValueError, match="NaN"):
        reward.update(images(1), images(2) * torch.nan, 0)
    with pytest.raises(ValueError, match="0 steps"):
        reward.update(images(1), images(2), 0, steps=0)
    with pytest.raises(ValueError, match="real_prompts"):
        reward.update(images(1), images(2, 3), 0, prompts=["a"] * 6)


# ---- replay


def test_replay_is_bounded_uniform_and_in_the_state():
    kept = torch.zeros(40)
    for seed in range(300):
        replay = Replay(8)
        for start in range(0, 40, 10):
            values = torch.arange(start, start + 10)[:, None, None, None].expand(10, 3, 2, 2) / 255
            replay.add(values, [str(v) for v in range(start, start + 10)], 100 * seed + start)
        assert len(replay) == 8 and replay.seen == 40
        numbers = replay.images[:, 0, 0, 0].long()
        assert replay.prompts == [str(n) for n in numbers.tolist()]
        kept[numbers] += 1
    expected = 300 * 8 / 40
    assert ((kept - expected).square() / expected).sum() < 80  # chi square of 39: 1 - p = 1e-4
    drawn, prompts = replay.draw(3, 5)
    assert drawn.shape == (3, 3, 2, 2) and [str(round(v)) for v in (drawn[:, 0, 0, 0] * 255).tolist()] == prompts
    assert torch.equal(replay.draw(3, 5)[0], drawn) and len(replay.draw(99, 5)[0]) == 8
    other = Replay(8)
    other.load_state_dict(replay.state_dict())
    assert torch.equal(other.draw(4, 1)[0], replay.draw(4, 1)[0])
    with pytest.raises(ValueError, match="at most"):
        Replay(4).load_state_dict(replay.state_dict())
    with pytest.raises(ValueError, match="one size"):
        replay.add(images(1, size=8), None, 0)


def test_old_fakes_take_part_in_training():
    """Replayed images change the step; a reward without replay is a function of the new images alone."""
    reward, without = make(replay=8, replay_share=1.0), make(replay=0)
    for r in (reward, without):
        r.update(images(1), images(2), 0)
    assert reward.spec.version == without.spec.version and len(reward.replay) == 6
    for r in (reward, without):
        r.update(images(3), images(2), 1)
    assert reward.spec.version != without.spec.version


# ---- schedules


def test_alternation_as_published_and_without_waste():
    published = [alternate(u, 9, 1, reuse=False) for u in range(20)]
    assert [t.generator for t in published] == [(u + 1) % 10 == 0 for u in range(20)]
    assert all(t.discriminator == (not t.generator) for t in published)
    ours = [alternate(u, 2, 3) for u in range(12)]
    assert all(t.generator for t in ours) and [t.discriminator for t in ours] == [2, 0, 0] * 4
    for n_d, n_g in ((9, 1), (2, 3), (1, 1)):
        period = [alternate(u, n_d, n_g) for u in range(n_g)]
        assert sum(t.discriminator for t in period) / sum(t.generator for t in period) == n_d / n_g
    with pytest.raises(ValueError, match="generator >= 1"):
        alternate(0, 1, 0)


def test_trigger_trains_the_discriminator_only_when_it_is_fooled():
    assert trigger(1.0, 0.5) == Turn(0, True) == trigger(1.0, 0.5, reuse=False) == trigger(1.0, 1.0)
    assert trigger(0.5, 1.0, steps=4) == Turn(4, True) and trigger(0.5, 1.0, reuse=False) == Turn(1, False)
    with pytest.raises(ValueError, match="finite"):
        trigger(math.nan, 1.0)
