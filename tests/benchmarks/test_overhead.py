"""The overhead benchmark compares like with like: both sides call the network with the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import tiny_flux, tiny_sd3

from benchmarks import overhead
from flowrl.config import parse_config
from flowrl.errors import UserError
from flowrl.policies import LoraSettings, PipelinePolicy

IMAGES, STEPS, WINDOW = 16, 3, 2


def recipe(**rollout: Any) -> Any:
    return parse_config(
        {
            "output_dir": "unused",
            "policy": {"path": "unused"},
            "reward": "jpeg",
            "prompts": {"source": "shapes:train", "limit": 4},
            "updates": 1,
            "prompts_per_update": 4,
            "group_size": IMAGES // 4,
            "rollout": {
                "steps": STEPS,
                "height": 16,
                "width": 16,
                "window": {"size": WINDOW, "high": STEPS - 1},
                **rollout,
            },
            "optimizer": {"inner_updates": 2},
            "eval": None,
        }
    )


@pytest.fixture(scope="module", params=["sd3", "flux"])
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PipelinePolicy:
    folder = tmp_path_factory.mktemp("model")
    make = {"sd3": tiny_sd3, "flux": tiny_flux}[request.param]
    return PipelinePolicy(make(folder), name=request.param, lora=LoraSettings(rank=2), max_sequence_length=8)


def rows_of(policy: PipelinePolicy, run: Any) -> list[tuple[int, bool]]:
    """(rows, gradient wanted) of every network call that `run` makes."""
    seen: list[tuple[int, bool]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((len(kwargs["hidden_states"]), torch.is_grad_enabled()))

    handle = policy.network.register_forward_pre_hook(note, with_kwargs=True)
    run()
    handle.remove()
    return seen


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_both_sides_make_the_same_network_calls(policy: PipelinePolicy, guidance: float) -> None:
    bench = overhead.Bench(recipe(guidance=guidance), policy, batch=8)
    calls = policy.calls(guidance)
    rollout = rows_of(policy, bench.rollout)
    assert rollout == rows_of(policy, bench.bare_rollout)
    assert rollout == [(8 * calls, False)] * (IMAGES // 8 * STEPS)
    update = rows_of(policy, bench.update)
    assert update == rows_of(policy, bench.bare_update)
    assert update == [(8 * calls, True)] * (IMAGES // 8 * WINDOW)


def test_the_bare_update_reaches_the_trained_weights(policy: PipelinePolicy) -> None:
    bench = overhead.Bench(recipe(), policy, batch=16)
    touched: list[str] = []
    handles = [p.register_hook(lambda grad, name=name: touched.append(name)) for name, p in policy.trainable()]
    bench.bare_update()
    for handle in handles:
        handle.remove()
    assert set(touched) == {name for name, _ in policy.trainable()}
    assert all(p.grad is None for _, p in policy.trainable())


def test_batches_must_be_multiples_of_eight(policy: PipelinePolicy) -> None:
    with pytest.raises(UserError, match="multiple of 8"):
        overhead.Bench(recipe(), policy, batch=12)


def test_the_ratio_is_the_median_of_the_ratios_of_pairs() -> None:
    ratio = overhead.Ratio(ours=(1.0, 6.0, 2.0, 8.0, 3.0), bare=(1.0, 3.0, 4.0, 2.0, 1.0))  # 1, 2, 0.5, 4, 3
    assert ratio.quartiles == (1.0, 2.0, 3.0)
    assert overhead.Ratio((3.0,), (2.0,)).quartiles == (1.5, 1.5, 1.5)


def test_the_command_prints_and_writes_ratios(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_sd3(tmp_path / "parts").save_pretrained(tmp_path / "model")
    file = tmp_path / "deep" / "overhead.json"
    monkeypatch.chdir(tmp_path)
    result = overhead.main(
        f"policy.path={tmp_path / 'model'} prompts.limit=2 rollout.steps=5 --batches 8 16 --images 16 --repeats 2 "
        f"--clock cpu --json {file}".split()
    )
    assert json.loads(file.read_text()) == result
    assert [(row["batch"], row["part"]) for row in result["rows"]] == [
        (8, "rollout"), (8, "update"), (16, "rollout"), (16, "update"),
    ]  # fmt: skip
    for row in result["rows"]:
        low, high = row["quartiles"]
        assert low <= row["ratio"] <= high and row["repeats"] == 2
        assert row["within"] == (row["ratio"] <= {"rollout": 1.10, "update": 1.15}[row["part"]])
    assert "ratio" in capsys.readouterr().out
