"""rollout.recompute: training as with storage, its cost, and where it is refused."""

from __future__ import annotations

import copy
import signal
from pathlib import Path

import pytest
import torch
from gaussian_runs import config
from safetensors.torch import load_file
from tiny_pipelines import tiny_sd3

from flowrl import estimate, trainer
from flowrl.checkpoint import load_latest
from flowrl.errors import UserError
from flowrl.policies import GaussianPolicy, LoraSettings, PipelinePolicy
from flowrl.run import Stopped
from flowrl.runlog import read_jsonl
from flowrl.trainer import train

RECOMPUTE = "rollout.recompute=true"
TREE = ["rollout.window={size: 2, low: 1, high: 4}", "rollout.tree={branch: 2}"]
GUARD = [
    "objective={name: guard, clip_range: 0.2, kl: {weight: 0.1}}",
    "optimizer={lr: 0.02, inner_updates: 2, epochs: 2}",
]
TMPO = [
    "objective={name: tmpo, clip_range: 0.2, tmpo: {beta: 2.0}}", "rollout.tree={at: [1, 2], noise: splits}",
    "optimizer={lr: 0.02, epochs: 2}",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The report is tested elsewhere and costs as much as 50 updates."""
    monkeypatch.setattr("flowrl.report.write_report", lambda folder: folder / "report.html")


def run(folder: Path, *overrides: str) -> tuple[dict, dict[str, torch.Tensor], list[dict]]:
    """Summary, final tensors and metrics of two updates."""
    summary = train(config(folder, "updates=2", *overrides), policy=GaussianPolicy())
    tensors = load_file(load_latest(folder / "run" / "checkpoints").path / "tensors.safetensors")
    return summary, tensors, read_jsonl(folder / "run" / "metrics.jsonl")


def weights(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for name, value in sorted(tensors.items()) if "current/" in name])


def test_one_block_is_the_same_run_bit_for_bit(tmp_path):
    kept, grown = run(tmp_path / "kept"), run(tmp_path / "grown", RECOMPUTE)
    assert torch.equal(weights(kept[1]), weights(grown[1])) and kept[2] == grown[2]
    assert kept[0]["cost"] == grown[0]["cost"] and grown[0]["on_policy_ratio_max_dev"] == 0.0


@pytest.mark.parametrize("options", [[], TREE, [*TREE, *GUARD], TMPO], ids=["straight", "tree", "guard", "tmpo"])
def test_many_blocks_give_the_same_gradients(tmp_path, options):
    """Blocks of two to four roots, inner updates and epochs with the weights that sampled, two passes where coupled."""
    options = [*options, "rollout.chunk=4", "optimizer.micro_batch=3"]
    kept, grown = run(tmp_path / "kept", *options), run(tmp_path / "grown", *options, RECOMPUTE)
    torch.testing.assert_close(weights(grown[1]), weights(kept[1]), rtol=1e-5, atol=1e-6)
    assert grown[0]["on_policy_ratio_max_dev"] == 0.0
    for mine, theirs in zip(grown[2], kept[2], strict=True):
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert mine["reward/mean"] == pytest.approx(theirs["reward/mean"], rel=1e-6)
        assert mine["ratio/max_dev"] == pytest.approx(theirs["ratio/max_dev"], rel=1e-3, abs=1e-6)
    assert grown[0]["cost"]["sampling_calls"] > kept[0]["cost"]["sampling_calls"]
    assert grown[0]["cost"]["training_forwards"] == kept[0]["cost"]["training_forwards"]


@pytest.mark.parametrize("options", [[], TREE, [*TREE, *GUARD], TMPO], ids=["straight", "tree", "guard", "tmpo"])
def test_the_extra_calls_are_counted_and_foreseen(tmp_path, options):
    settings = [*options, "rollout.chunk=4", "updates=1"]
    plain = run(tmp_path / "kept", *settings)[0]["cost"]["sampling_calls"]
    found = run(tmp_path / "grown", *settings, RECOMPUTE)[0]["cost"]["sampling_calls"]
    foreseen = config(tmp_path, *settings, RECOMPUTE)
    assert found - plain == estimate._regrown_calls(foreseen, 4) > 0
    assert estimate._regrown_calls(config(tmp_path, *settings), 4) == 0
    small, all_ = (estimate._kept_latents(config(tmp_path, *settings, *more), 4) for more in ([RECOMPUTE], []))
    assert 4 * 8 < small < all_  # the images, and one block


def test_a_network_whose_bits_depend_on_the_shape_of_its_calls(tmp_path):
    """Five roots by three: the ratio is exactly 1, the gradients are those with storage; LoRA, two optimizer steps."""
    options = [
        "reward=jpeg", "prompts_per_update=1", "group_size=5", "rollout.chunk=3", "rollout.steps=3",
        "rollout.height=16", "rollout.width=16", "optimizer.epochs=2", "updates=1", "prompts.limit=2",
    ]  # fmt: skip
    pipeline, found = tiny_sd3(tmp_path / "tokenizer"), {}
    for name, more in (("kept", []), ("grown", [RECOMPUTE])):
        policy = PipelinePolicy(copy.deepcopy(pipeline), lora=LoraSettings(rank=2))
        summary = train(config(tmp_path / name, *options, *more), policy=policy)
        assert summary["on_policy_ratio_max_dev"] == 0.0
        found[name] = read_jsonl(tmp_path / name / "run" / "metrics.jsonl")[0]
    for name in ("reward/mean", "grad_norm"):
        assert found["grown"][name] == pytest.approx(found["kept"][name], rel=1e-5)


def test_resume_is_exact(tmp_path, monkeypatch):
    options = [*TREE, *GUARD, RECOMPUTE, "rollout.chunk=4", "checkpoint.every=0"]
    whole = run(tmp_path / "whole", *options, "updates=4")
    score, calls = trainer.score_update, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return score(*arguments)

    settings = config(tmp_path / "stopped", *options, "updates=4")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "score_update", stopping)
        with pytest.raises(Stopped):
            train(settings, policy=GaussianPolicy())
    train(settings, resume=True, policy=GaussianPolicy())
    found = load_file(load_latest(tmp_path / "stopped" / "run" / "checkpoints").path / "tensors.safetensors")
    assert found.keys() == whole[1].keys() and all(torch.equal(found[name], whole[1][name]) for name in found)
    assert read_jsonl(tmp_path / "stopped" / "run" / "metrics.jsonl") == whole[2]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.name=nft", "rollout.kernel=ode"], ("rollout.recompute has no effect", "finished images")),
        (["objective.layer_tuning={}", *TREE], ("velocity", "rollout.recompute=false")),
    ],
)
def test_refused_where_it_cannot_help(tmp_path, overrides, words):
    with pytest.raises(UserError) as error:
        config(tmp_path, RECOMPUTE, *overrides)
    assert all(word in str(error.value) for word in words)
