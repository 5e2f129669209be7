"""From a config's words to rewards."""

import subprocess
import sys
import textwrap

import pytest
import torch

from reward_models import RewardError, checked_score, load, names

IMAGES, PROMPTS = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), ["a photo of a circle"] * 4

USER = """
from __future__ import annotations
import torch
from reward_models import RewardResult, RewardSpec

def brightness(images, prompts, metadata, scale=1.0):
    return [scale * float(image.mean()) for image in images]

def grouped(images, prompts, metadata, groups):
    return groups.float()

def raises(images, prompts, metadata):
    raise RuntimeError("no camera")

def two(images, prompts):
    return [0.0]

class Redness:
    def __init__(self, weight=1.0, device="cpu"):
        self.weight, self.device = weight, device
    def score(self, images, prompts, metadata):
        return self.weight * images[:, 0].mean((1, 2))

class Whole:
    spec = RewardSpec("whole", licence="mine")
    def score(self, images, prompts, metadata, groups=None):
        return RewardResult(torch.ones(len(images)))

from dataclasses import dataclass

@dataclass
class Darkness:
    power: float = 1.0
    def score(self, images, prompts, metadata):
        return (1 - images.mean((1, 2, 3))) ** self.power

darkness = Darkness()

class Broken:
    def __init__(self):
        raise ValueError("no weights")

number = 3
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(USER))
    (tmp_path / "half_written.py").write_text("def f(:")
    (tmp_path / "needy.py").write_text("import no_such_library")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    for module in ("my_rewards", "half_written", "needy"):
        sys.modules.pop(module, None)


def score(spec, **options):
    return checked_score(load(spec, **options), IMAGES, PROMPTS, groups=torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("name", ["shapes", "shapes-strict", "shapes-soft", "jpeg", "jpeg-incompress"])
def test_built_in_names(name):
    assert name in names() and load(name).spec.name == name
    assert score(name).values.shape == (4,)


def test_unknown_names_get_the_nearest_one():
    with pytest.raises(ValueError, match="Did you mean 'shapes-soft'"):
        load("shape-soft")
    with pytest.raises(ValueError, match="module:function"):
        load("qqqq")
    with pytest.raises(ValueError, match="type int"):
        load(3)
    with pytest.raises(ValueError, match="colour"):
        load("shapes", colour=1)
    with pytest.raises(ValueError, match="path"):
        load("clip")


def test_functions_and_classes_of_the_user(user):
    grid = (IMAGES * 255).round() / 255
    mean = grid.mean((1, 2, 3))
    assert torch.allclose(score("my_rewards:brightness").values, mean)
    assert torch.allclose(score("my_rewards.py:brightness", scale=2.0).values, 2 * mean)
    assert score("my_rewards:grouped").values.tolist() == [0, 0, 1, 1]
    assert torch.allclose(score("my_rewards:Redness", weight=3.0).values, 3 * grid[:, 0].mean((1, 2)))
    assert load("my_rewards:Redness", "meta").function.__self__.device == "meta"
    assert load("my_rewards:Whole").spec.licence == "mine" and score("my_rewards:Whole").values.tolist() == [1] * 4
    assert torch.allclose(score("my_rewards.py:Darkness", power=2).values, (1 - mean) ** 2)
    assert torch.allclose(score("my_rewards:darkness").values, 1 - mean)
    assert load("my_rewards:brightness").spec.name == "my_rewards:brightness"
    both = score({"my_rewards:brightness": {"weight": 2, "scale": 10.0}, "my_rewards:grouped": 1.0})
    assert torch.allclose(both.values, 20 * mean + torch.tensor([0.0, 0, 1, 1]))
    assert torch.allclose(both.parts["my_rewards:brightness"], 10 * mean)


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        ("my_rewards:brightnes", ValueError, "Did you mean 'brightness'"),
        ("my_reward:brightness", ValueError, "no module 'my_reward'"),
        ("absent.py:f", ValueError, "no file"),
        ("my_rewards:number", ValueError, "neither a function nor a class"),
        ("my_rewards:two", ValueError, r"expected \(images, prompts, metadata\)"),
        ("my_rewards:Broken", RewardError, "ValueError while it was built: no weights"),
        ("half_written:f", RewardError, "SyntaxError"),
        ("needy:f", RewardError, "'no_such_library', which is not installed"),
    ],
)
def test_import_paths_that_lead_nowhere(user, spec, error, said):
    with pytest.raises(error, match=said):
        load(spec)


def test_a_function_that_raises_is_named(user):
    with pytest.raises(RewardError, match="'my_rewards:raises' raised RuntimeError: no camera"):
        score({"my_rewards:raises": 1.0})
    with pytest.raises(ValueError, match="scale_"):
        load("my_rewards:Redness", scale_=1)
    with pytest.raises(ValueError, match="scale_"):
        load({"my_rewards:brightness": {"weight": 1, "scale_": 2}})


@pytest.mark.parametrize("entry", ["1.0", None, True, {"scale": 2}, {"weight": "high"}])
def test_a_weight_must_be_a_number(entry):
    with pytest.raises(ValueError, match="expected a weight"):
        load({"jpeg": entry})


def test_importing_is_cheap():
    heavy = "('transformers', 'diffusers', 'scipy', 'flowrl', 'samplers')"
    code = f"import sys, reward_models; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
