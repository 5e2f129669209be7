"""Sizes without weights, against the same sizes counted on real modules, and memory against torch's own profiler."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import tiny_flux, tiny_lcm, tiny_sd, tiny_sd3, tiny_sdxl
from torch.profiler import ProfilerActivity, profile

from flowrl.config import parse_config
from flowrl.errors import UserError
from flowrl.estimate import _flops, _Live, describe, estimate
from flowrl.policies import LoraSettings, PipelinePolicy


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    root = tmp_path_factory.mktemp("models")
    made = {"sd3": tiny_sd3(root / "a"), "flux": tiny_flux(root / "b"), "sd": tiny_sd(root / "c")}
    made |= {"sdxl": tiny_sdxl(root / "d"), "lcm": tiny_lcm(root / "e")}
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


@pytest.mark.parametrize("name", ["sd3", "flux", "sd", "sdxl", "lcm"])
@pytest.mark.parametrize("train", ["lora", "full"])
def test_parameters_are_those_of_the_real_modules(pipelines: dict, name: str, train: str) -> None:
    pipeline, folder = pipelines[name]
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    found = describe(config_of(folder, policy={"path": str(folder), "lora": {"rank": 4}, "train": train}))
    assert found.parameters == sum(p.numel() for p in network.parameters())
    policy = PipelinePolicy(copy.deepcopy(pipeline), train=train, lora=LoraSettings(rank=4))
    assert found.trainable == sum(p.numel() for _, p in policy.trainable())
    assert found.latent == torch.Size(policy.latent_shape(16, 16)).numel()
    assert found.other["vae"] == sum(p.numel() for p in pipeline.vae.parameters())
    assert found.other["text_encoder"] == sum(p.numel() for p in pipeline.text_encoder.parameters())


def test_flops_of_a_network_counted_by_hand() -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(
            torch.nn.Linear(3, 5, bias=False), torch.nn.ReLU(), torch.nn.Linear(5, 2, bias=False)
        )
    assert _flops(_Takes(model), lambda rows: {"x": torch.zeros(7 * rows, 3)}) == 2 * 7 * (3 * 5 + 5 * 2)


class _Takes(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_bytes_alive_counted_by_hand() -> None:
    given = torch.zeros(100, device="meta")
    with _Live([given]) as live:
        view = given.view(10, 10)  # of something that was there: 0
        a = torch.zeros(10, device="meta")  # 40
        b = a + 1  # 80
        del a  # 40
        c = (b * 2).view(5, 2)  # 80: a view is no second copy
        b.add_(1)  # 80
        del b, c, view
        assert (live.now, live.peak) == (0, 80)


def peak_bytes(run: Callable[[], Any], file: Path) -> int:
    """Most bytes that torch's allocator has given to `run` at once, by its log of every allocation."""
    run()  # what is made once and stays
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    found.export_chrome_trace(str(file))
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event["name"] == "[memory]"]
    alive = torch.tensor([event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]).cumsum(0)
    assert len(alive) > 50
    return int(alive.max())


@pytest.mark.parametrize("name", ["sd3", "flux", "sd", "sdxl", "lcm"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_of_a_real_micro_batch(
    pipelines: dict, tmp_path: Path, name: str, checkpointing: bool
) -> None:
    pipeline, folder = pipelines[name]
    policy = PipelinePolicy(copy.deepcopy(pipeline), lora=LoraSettings(rank=4), gradient_checkpointing=checkpointing)
    x, s, cond = torch.randn(13, *policy.latent_shape(16, 16)), torch.full((13,), 0.5), policy.encode(["a cat"] * 13)

    def micro_batch() -> None:
        policy.predict(x, s, cond).square().mean().backward()

    changes = {"policy": {"path": str(folder), "lora": {"rank": 4}, "gradient_checkpointing": checkpointing}}
    found = describe(config_of(folder, optimizer={"micro_batch": 13}, **changes))
    assert found.rows == 16
    off = 0.15 if hasattr(pipeline, "unet") else 0.05  # workspaces of convolutions are not counted
    assert found.activations == pytest.approx(peak_bytes(micro_batch, tmp_path / "trace.json"), rel=off)


@pytest.mark.parametrize("pixels", [16, 64])
def test_decoding_is_that_of_a_real_chunk(pipelines: dict, tmp_path: Path, pixels: int) -> None:
    pipeline, folder = pipelines["sd3"]
    policy = PipelinePolicy(copy.deepcopy(pipeline), train="none")
    latents = torch.randn(20, *policy.latent_shape()[:1], pixels // 2, pixels // 2)

    @torch.no_grad()
    def decode() -> None:
        policy.decode(latents)

    size = {"height": pixels, "width": pixels}
    found = describe(config_of(folder, rollout={**size, "chunk": 20}, eval=None))
    assert found.decoding == pytest.approx(peak_bytes(decode, tmp_path / "trace.json"), rel=0.1)
    small = describe(config_of(folder, rollout={"chunk": 20}, eval=size))  # the larger size of the two
    assert small.decoding == found.decoding


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
    padded = estimate(config_of(folder, rollout={"chunk": 4}, optimizer={"micro_batch": 2}))  # to 8 rows both
    assert padded.network.rows == 8
    assert padded.seconds == {
        name: pytest.approx(found.seconds[name] * n) for name, n in [("sampling", 2), ("update", 4)]
    }


def test_memory_and_disk_follow_the_settings(pipelines: dict, untimed: None) -> None:
    _, folder = pipelines["sd3"]
    base = estimate(config_of(folder))
    assert base.memory["optimizer"] == 8 * base.network.trainable
    assert base.memory["network"] == 4 * base.network.parameters
    assert base.memory["activations of 64 rows"] == base.network.activations
    assert base.disk["3 checkpoints"] == 3 * 12 * base.network.trainable
    assert "embeddings of 30 prompts" in base.disk
    averaged = estimate(config_of(folder, ema={}))
    assert averaged.memory["gradients and average"] == 2 * base.memory["gradients and average"]
    saving = estimate(config_of(folder, policy={"path": str(folder), "gradient_checkpointing": True}))
    assert saving.network.activations < base.network.activations
    drawing = estimate(
        config_of(folder, rollout={"guidance": 3.0}, optimizer={"micro_batch": 1}, eval={"height": 128, "width": 128})
    )
    activations, decoding = drawing.memory["activations of 16 rows"], drawing.memory["more, while decoding"]
    assert activations + decoding == drawing.network.decoding > drawing.network.activations
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
