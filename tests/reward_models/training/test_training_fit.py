"""Scorers that learn on the small CLIP and Shapes images: a planted preference, and nothing where there is none."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import reward_models
from flowrl.cli import app
from flowrl.commands import reward as commands
from flowrl.errors import UserError
from flowrl.statistics import mean_ci
from reward_models import RewardError, checked_score
from reward_models.clip_score import ClipScore
from reward_models.shapes.grammar import COLOURS, PHRASES, SHAPES
from reward_models.shapes.render import render, sample_scene
from reward_models.training.fit import CHECKPOINT, Settings, fit, gaps, outcomes, save
from reward_models.training.manifest import Pair, aspects, prompt_weights, read, split
from reward_models.training.scorer import Head, HeadTraining, ModelTraining, open_trained

FAST = Settings(steps=150, batch=64, lr=0.02, held_out=0.3, save_every=50)
PER_PROMPT = 8


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(folder, file -> colour, prompt -> files): 24 prompts, each with a shape in eight colours."""
    folder = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    colours, by_prompt = {}, {}
    for shape in SHAPES:
        for phrase in PHRASES:
            prompt = f"{phrase} a {shape}"
            for colour in COLOURS:
                scene = sample_scene({"include": [{"class": shape, "count": 1, "color": colour}]}, rng)
                file = folder / f"{len(colours):03d}.png"
                Image.fromarray(render(scene)).save(file)
                colours[str(file)] = COLOURS.index(colour)
                by_prompt.setdefault(prompt, []).append(str(file))
    return folder, colours, by_prompt


@pytest.fixture(scope="module")
def body():
    return ClipScore("tiny-clip")


@pytest.fixture(scope="module")
def images():
    cache = {}

    def read_cached(file):
        if file not in cache:
            cache[file] = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float() / 255
        return cache[file]

    return read_cached


def liking(drawn, like, seed=0, aspect=""):
    """Pairs of every prompt whose label says which colour is liked more."""
    _, colours, by_prompt = drawn
    rng = np.random.default_rng(seed)
    found = []
    for prompt, files in by_prompt.items():
        for _ in range(12):
            first, second = rng.choice(files, 2, replace=False)
            label = float(like(colours[first]) > like(colours[second]))
            found.append(Pair(prompt, str(first), str(second), {aspect: label}))
    return found


def utility(colour):
    return (5 * colour) % 8  # an order of the colours that no feature knows


def accuracy(fitted):
    return mean_ci(list(fitted.outcomes.values()))


# --- what is learnt ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(drawn, body, images, tmp_path_factory):
    training = HeadTraining(body, Head(body.towers.dimension), images)
    return training, fit(training, liking(drawn, utility), FAST, tmp_path_factory.mktemp("fit"))


def test_a_head_learns_a_planted_preference_and_a_control_does_not(drawn, body, images, learnt, tmp_path):
    found = accuracy(learnt[1])
    assert found.mean > 0.9 and found.low > 0.8
    rng = np.random.default_rng(1)
    pairs = liking(drawn, utility)
    shuffled = [replace(p, labels={"": float(rng.random() < 0.5)}) for p in pairs]
    control = HeadTraining(body, Head(body.towers.dimension), images)
    control.prepare([], [], lambda *_: None)
    nothing = accuracy(fit(control, shuffled, FAST, tmp_path))
    assert abs(nothing.mean - 0.5) < 0.2 and nothing.mean < found.low
    # and against the truth it has learnt nothing either
    _, judge = split(pairs, FAST.held_out, FAST.seed)
    assert abs(mean_ci(list(outcomes(control, judge, [""])[0].values())).mean - 0.5) < 0.25


def test_the_folder_is_a_reward(learnt, drawn, images, tmp_path):
    training, fitted = learnt
    found = accuracy(fitted)
    card = {"": {"accuracy": found.mean, "low": found.low, "high": found.high, "pairs": 9, "prompts": 3}}
    folder = save(fitted, tmp_path / "liked", name="liked", body="tiny-clip", held_out=card)
    reward = reward_models.load(str(folder))
    files = drawn[2]["a photo of a star"][:4]
    pixels, prompts = torch.stack([images(f) for f in files]), ["a photo of a star"] * 4
    scores = checked_score(reward, pixels, prompts).values
    torch.testing.assert_close(scores, training.scores(files, prompts)[:, 0].detach(), rtol=1e-4, atol=1e-4)
    one_by_one = torch.cat([checked_score(reward, x[None], ["a photo of a star"]).values for x in pixels])
    torch.testing.assert_close(one_by_one, scores, rtol=1e-5, atol=1e-5)
    pixels.requires_grad_(True)
    again = reward.differentiable(pixels, prompts)
    torch.testing.assert_close(again.detach(), scores, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(again.sum(), pixels)[0].abs().max() > 0
    assert reward.spec.name == "liked" and len(reward.spec.version) == 12 and reward.spec.differentiable
    assert (
        "tiny-clip" in (folder / "README.md").read_text() and f"{found.mean:.3f}" in (folder / "README.md").read_text()
    )
    mixed = reward_models.load({str(folder): 1.0, "shapes": {"weight": 0.0}})
    assert torch.equal(checked_score(mixed, pixels.detach(), prompts).values, scores)


def test_a_head_needs_the_body_it_was_trained_on(learnt, tmp_path):
    folder = save(learnt[1], tmp_path, name="x", body="tiny-clip")
    about = json.loads((folder / "reward.json").read_text())
    (folder / "reward.json").write_text(json.dumps({**about, "body_digest": "0" * 64}))
    with pytest.raises(ValueError, match="trained"):
        open_trained(folder)
    with pytest.raises(ValueError, match="reward.json"):
        open_trained(tmp_path / "nowhere")


def test_aspects_are_learnt_apart(drawn, body, images, tmp_path):
    warm = liking(drawn, lambda c: -c, aspect="warm")
    both = [replace(p, labels=p.labels | {"cold": 1 - p.labels["warm"]}) for p in warm[::2]] + warm[1::2]
    assert aspects(both) == ["cold", "warm"]
    training = HeadTraining(body, Head(body.towers.dimension, [16], aspects=2, seed=3), images)
    fitted = fit(training, both, replace(FAST, loss="bradley_terry"), tmp_path)
    for name in ("cold", "warm"):
        assert mean_ci(list(fitted.aspect_outcomes[name].values())).low > 0.7
    save(fitted, tmp_path, name="two", body="tiny-clip")
    alike = reward_models.load(str(tmp_path))
    reward = reward_models.load(str(tmp_path), aspect_weights={"warm": 2.0})
    assert reward.spec.version != alike.spec.version
    for weights in ({"hot": 1.0}, {"warm": 0.0}, {"warm": -1.0, "cold": 2.0}):
        with pytest.raises(ValueError, match="expected numbers from 0 for cold, warm"):
            open_trained(tmp_path, aspect_weights=weights)
    files = drawn[2]["a photo of a heart"][:2]
    out = checked_score(reward, torch.stack([images(f) for f in files]), ["a photo of a heart"] * 2)
    assert set(out.parts) == {"two/cold", "two/warm"}
    torch.testing.assert_close(out.values, out.parts["two/warm"])
    mean = checked_score(alike, torch.stack([images(f) for f in files]), ["a photo of a heart"] * 2).values
    torch.testing.assert_close(mean, (out.parts["two/warm"] + out.parts["two/cold"]) / 2)


# --- the fit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [(), (8,)])
def test_a_fit_that_was_cut_goes_on_bit_for_bit(drawn, body, images, tmp_path, hidden, monkeypatch):
    pairs, short = liking(drawn, utility)[:60], replace(FAST, steps=12, batch=16, save_every=4)
    new = lambda: HeadTraining(body, Head(body.towers.dimension, hidden, seed=5), images)  # noqa: E731
    whole, cut, rest = new(), new(), new()
    fit(whole, pairs, short, tmp_path / "whole")
    first = fit(cut, pairs, short, tmp_path / "cut", stop_after=7)
    assert not first.outcomes and (tmp_path / "cut" / CHECKPOINT).is_file()
    fit(rest, pairs, short, tmp_path / "cut", resume=True)
    for name, wanted in whole.head.state_dict().items():
        assert torch.equal(rest.head.state_dict()[name], wanted), name
    with pytest.raises(ValueError, match="other settings"):
        fit(new(), pairs, replace(short, lr=0.5), tmp_path / "cut", resume=True)
    with pytest.raises(ValueError, match="other data"):
        fit(new(), pairs[1:], short, tmp_path / "cut", resume=True)
    other = HeadTraining(body, Head(body.towers.dimension, (3,), seed=5), images)
    with pytest.raises(ValueError, match="other trained"):
        fit(other, pairs, short, tmp_path / "cut", resume=True)
    monkeypatch.setattr(body, "towers", replace(body.towers, digest="another body"))  # of the same size
    with pytest.raises(ValueError, match="other trained"):
        fit(new(), pairs, short, tmp_path / "cut", resume=True)


def test_first_weights_and_batches_are_seeded(drawn, body, images, tmp_path):
    pairs, short = liking(drawn, utility)[:60], replace(FAST, steps=3, batch=16)
    heads = []
    for seed in (0, 0, 1):
        torch.rand(seed + 1)  # the global generator has no say
        training = HeadTraining(body, Head(body.towers.dimension, [4], seed=seed), images)
        fit(training, pairs, replace(short, seed=seed), tmp_path / str(len(heads)))
        heads.append(torch.cat([p.detach().flatten() for p in training.head.parameters()]))
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_loss_that_is_not_finite_stops(drawn, body, images, tmp_path):
    training = HeadTraining(body, Head(body.towers.dimension), images)
    with torch.no_grad():
        training.head.layers[0].weight.fill_(math.inf)
    with pytest.raises(RewardError, match="finite"):
        fit(training, liking(drawn, utility)[:40], replace(FAST, steps=2, held_out=0.0), tmp_path)


def test_settings_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="loss 'bt'.*steps 0.*held_out 1"):
        Settings(loss="bt", steps=0, held_out=1.0).check()


@pytest.mark.parametrize("train", ["layers", "all", "lora"])
def test_the_model_itself_can_be_trained(train, drawn, images, tmp_path):
    body = ClipScore("tiny-clip")
    before = {name: p.detach().clone() for name, p in body.model.named_parameters()}
    pairs = liking(drawn, utility)[:16]
    training = ModelTraining(body, images, train=train, layers=1, rank=2)
    start = gaps(training, pairs).detach()
    settings = replace(FAST, loss="bradley_terry", steps=4, batch=16, lr=1e-3, held_out=0.0)
    fitted = fit(training, pairs, settings, tmp_path)
    assert list(fitted.losses.values())[-1] < list(fitted.losses.values())[0]
    end = gaps(training, pairs).detach()
    assert not torch.equal(start, end)
    if train == "layers":
        moved = {name for name, p in body.model.named_parameters() if not torch.equal(p, before[name])}
        assert moved and not any("layers.0." in name or "embedding" in name for name in moved)
    folder = save(fitted, tmp_path / "model", name="tuned", body="tiny-clip")
    reward = reward_models.load(str(folder))
    texts = [pair.prompt for pair in pairs]
    first, second = (torch.stack([images(getattr(p, side)) for p in pairs]) for side in ("first", "second"))
    gap = checked_score(reward, first, texts).values - checked_score(reward, second, texts).values
    scale = reward.towers.logit_scale
    torch.testing.assert_close(gap * scale, end[:, 0], rtol=1e-3, atol=1e-3 * scale)
    assert reward.spec.name == "tuned"


def test_a_model_that_cannot_be_trained_so(body):
    with pytest.raises(ValueError, match="head, layers, all or lora"):
        ModelTraining(body, lambda file: None, train="some")
    with pytest.raises(ValueError, match="layers to train"):
        ModelTraining(body, lambda file: None, train="layers", layers=99)


# --- the manifest and the verbs ---------------------------------------------------------------------------------------


def write(path: Path, rows) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_three_kinds_of_manifest(drawn):
    folder = drawn[0]
    pair = {"prompt": "p", "images": ["000.png", "001.png"], "label": 0.25, "source": "x"}
    assert read(write(folder / "a.jsonl", [pair]))[0].labels == {"": 0.25}
    (found,) = read(write(folder / "b.jsonl", [{"prompt": "p", "positive": "000.png", "negative": "001.png"}]))
    assert found.labels == {"": 1.0} and found.first == str(folder / "000.png")
    rows = [{"prompt": "p", "image": f"00{i}.png", "count": 9 * i, "exposure": 10} for i in (0, 1)]
    (found,) = read(write(folder / "c.jsonl", rows), confidence=0.9)
    assert found.labels[""] < 0.01
    aspect = {**pair, "label": {"style": 1, "harm": None}}
    assert read(write(folder / "d.jsonl", [aspect]))[0].labels == {"style": 1.0}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "p", "images": ["000.png", "nowhere.png"], "label": 1}], "line 1.*nowhere"),
        ([{"prompt": "p", "images": ["000.png", "001.png"], "label": 2}], "not in"),
        ([{"prompt": "p", "images": ["000.png", "001.png"]}], "KeyError"),
        ([{"prompt": 3, "positive": "000.png", "negative": "001.png"}], "prompt is 3"),
        ([{"prompt": "p", "positive": "000.png", "negative": "001.png"},
          {"prompt": "p", "image": "000.png", "count": 1}], "one kind"),
        ([], "nothing"),
    ],
)  # fmt: skip
def test_manifests_that_cannot_be_read(drawn, rows, said):
    with pytest.raises(ValueError, match=said):
        read(write(drawn[0] / "wrong.jsonl", rows))


def test_prompts_are_wholly_on_one_side_and_count_alike():
    pairs = [Pair(f"prompt {i % 50}", "a", "b", {"": 1.0}) for i in range(170)]
    learn, judge = split(pairs, 0.3, seed=0)
    assert len(learn) + len(judge) == 170 and not {p.prompt for p in learn} & {p.prompt for p in judge}
    assert 5 <= len({p.prompt for p in judge}) <= 26
    assert (
        split(pairs[:60], 0.3, 0)[1] == [p for p in judge if pairs.index(p) < 60][: len(split(pairs[:60], 0.3, 0)[1])]
    )
    weights = prompt_weights(pairs)
    assert sum(weights) == pytest.approx(170) and weights[0] / weights[49] == pytest.approx(3 / 4)
    with pytest.raises(ValueError, match="one form"):
        aspects([Pair("p", "a", "b", {"": 1.0}), Pair("p", "a", "b", {"style": 1.0})])


def test_the_verb_trains_resumes_and_reports(drawn, tmp_path):
    rows = [
        {"prompt": p.prompt, "images": [Path(p.first).name, Path(p.second).name], "label": p.labels[""]}
        for p in liking(drawn, utility)
    ]
    manifest = write(drawn[0] / "pairs.jsonl", rows)
    said = []
    out = commands.train(manifest, tmp_path / "fit", FAST, say=said.append)
    assert out["accuracy"][""]["low"] > 0.7 and out["held_out"] == 12 * out["accuracy"][""]["prompts"]
    assert "held_out" in json.loads((tmp_path / "fit" / "report.json").read_text())
    assert not (tmp_path / "fit" / CHECKPOINT).exists() and any("step 150" in line for line in said)
    with pytest.raises(UserError, match="holds a trained scorer"):
        commands.train(manifest, tmp_path / "fit", FAST)
    with pytest.raises(UserError, match="tiny-clp"):
        commands.train(manifest, tmp_path / "other", FAST, body="tiny-clp")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / CHECKPOINT).write_text("")
    with pytest.raises(UserError, match="--resume"):
        commands.train(manifest, tmp_path / "cut", FAST)


def test_the_command_takes_options_of_counts(drawn, tmp_path):
    rows = [{"prompt": "p", "image": f"00{i}.png", "count": 30 * i, "exposure": 100} for i in range(4)]
    manifest = write(drawn[0] / "counts.jsonl", rows)
    words = ["reward", "train", str(manifest), "--out", str(tmp_path / "fit"), "--steps", "1", "--held-out", "0"]
    words += ["--device", "cpu", "--strength", "2", "--confidence", "0.9", "--most", "3"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "3 pairs of 1 prompts" in done.output, done.output
    refused = CliRunner().invoke(app, [*words[:4], str(tmp_path / "b"), "--train", "lora", "--hidden", "8"])
    assert refused.exit_code == 2 and "expected them with head" in refused.output
