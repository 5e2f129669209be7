"""Sizes without weights, against the same sizes counted on real modules."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import tiny_flux, tiny_sd3

from flowrl.config import parse_config
from flowrl.errors import UserError
from flowrl.estimate import _one_row, describe, estimate
from flowrl.policies import LoraSettings, PipelinePolicy


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    root = tmp_path_factory.mktemp("models")
    made = {"sd3": tiny_sd3(root / "a"), "flux": tiny_flux(root / "b")}
    for name, pipeline in made.items():
        pipeline.save_pretrained(root / name)
    return {name: (pipeline, root / name) for name, pipeline in made.items()}


def config_of(folder: Path, **changes: Any) -> Any:
    data: dict[str, Any] = {
        "output_dir": "x",
        "policy": {"path": str(folder), "lora": {"rank": 4}},
        "reward": "jpeg",
        "prompts": {"source": "shapes:train", "limit": 30},
        "updates": 1,
        "prompts_per_update": 5,
        "group_size": 4,
        "rollout": {"steps": 8, "height": 16, "width": 16},
    }
    for name, section in changes.items():
        data[name] = {**data.get(name, {}), **section} if isinstance(section, dict) else section
    return parse_config(data)


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("train", ["lora", "full"])
def test_parameters_are_those_of_the_real_modules(pipelines: dict, name: str, train: str) -> None:
    pipeline, folder = pipelines[name]
    found = describe(config_of(folder, policy={"path": str(folder), "lora": {"rank": 4}, "train": train}))
    assert found.parameters == sum(p.numel() for p in pipeline.transformer.parameters())
    policy = PipelinePolicy(copy.deepcopy(pipeline), train=train, lora=LoraSettings(rank=4))
    assert found.trainable == sum(p.numel() for _, p in policy.trainable())
    assert found.latent == torch.Size(policy.latent_shape(16, 16)).numel()
    assert found.other["vae"] == sum(p.numel() for p in pipeline.vae.parameters())
    assert found.other["text_encoder"] == sum(p.numel() for p in pipeline.text_encoder.parameters())


def test_flops_and_kept_bytes_of_a_network_counted_by_hand() -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(
            torch.nn.Linear(3, 5, bias=False), torch.nn.ReLU(), torch.nn.Linear(5, 2, bias=False)
        )
    flops, kept = _one_row(_Takes(model), lambda: {"x": torch.zeros(7, 3)})
    assert flops == 2 * 7 * (3 * 5 + 5 * 2)
    assert kept == 4 * 7 * (3 + 5)  # the input of each linear layer; the ReLU's output is the second one's input


class _Takes(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two milliseconds per row instead of a measurement."""
    monkeypatch.setattr("flowrl.estimate._measured", lambda config, network: 0.002)


def test_calls_of_an_update(pipelines: dict, untimed: None) -> None:
    _, folder = pipelines["sd3"]
    found = estimate(config_of(folder))
    assert found.seconds == {"sampling": pytest.approx(0.002 * 160), "update": pytest.approx(3 * 0.002 * 140)}
    plain = found.cost
    assert (plain.images, plain.sampling_calls, plain.training_forwards) == (20, 20 * 8, 20 * 7)
    guided = estimate(config_of(folder, rollout={"guidance": 3.0, "window": {"size": 2}})).cost
    assert (guided.images, guided.sampling_calls, guided.training_forwards) == (20, 2 * 20 * 8, 2 * 20 * 2)
    assert estimate(config_of(folder), processes=2).cost.images == 12  # three of the five groups


def test_memory_and_disk_follow_the_settings(pipelines: dict, untimed: None) -> None:
    _, folder = pipelines["sd3"]
    base = estimate(config_of(folder))
    assert base.memory["optimizer"] == 8 * base.network.trainable
    assert base.memory["network"] == 4 * base.network.parameters
    assert base.memory["activations of 64 rows"] == 64 * base.network.kept
    assert base.disk["3 checkpoints"] == 3 * 12 * base.network.trainable
    assert "embeddings of 30 prompts" in base.disk
    averaged = estimate(config_of(folder, ema={}))
    assert averaged.memory["gradients and average"] == 2 * base.memory["gradients and average"]
    saving = estimate(config_of(folder, policy={"path": str(folder), "gradient_checkpointing": True}))
    assert saving.network.kept < base.network.kept
    full = estimate(config_of(folder, policy={"path": str(folder), "train": "full"}))
    assert full.memory["frozen copy"] == full.memory["network"] == 4 * full.network.parameters


def test_a_small_local_policy_is_timed(pipelines: dict) -> None:
    found = estimate(config_of(pipelines["sd3"][1]))
    assert 0 < found.seconds["sampling"] < found.seconds["update"]
    assert any("measured with this policy" in line for line in found.lines())


def test_an_incomplete_folder_is_explained(pipelines: dict, tmp_path: Path) -> None:
    shutil.copytree(pipelines["sd3"][1], tmp_path, dirs_exist_ok=True)
    (tmp_path / "transformer" / "config.json").unlink()
    with pytest.raises(UserError, match=r"transformer/config\.json.*complete pipeline folder"):
        estimate(config_of(tmp_path))
