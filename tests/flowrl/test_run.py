"""The folder of a run: what is written when, from which weights, and what is reused."""

from __future__ import annotations

import json
import resource
import sys
import types
from pathlib import Path

import pytest
import torch
from gaussian_runs import config, evaluated, quadratic
from PIL import Image
from tiny_pipelines import tiny_sd3

import reward_models
from flowrl.checkpoint import load_latest, save_checkpoint
from flowrl.config import load_config
from flowrl.distributed import World
from flowrl.errors import UserError
from flowrl.evaluate import Scorers, evaluate, settings_of
from flowrl.policies import GaussianPolicy, PipelinePolicy
from flowrl.prompts import load_prompts
from flowrl.run import Run, peak_rss_mb
from flowrl.state import FORMAT, State
from flowrl.summary import read_rows
from flowrl.trainer import train
from reward_models.loading import UserReward

ALONE = World(0, 1, torch.device("cpu"))


def test_a_run_folder_holds_what_is_promised(tmp_path):
    settings = config(
        tmp_path, "updates=3", evaluated(tmp_path), "eval.baseline_guidance=2.0", "logging={samples_every: 2}",
        "checkpoint.every=2",
    )  # fmt: skip
    summary = train(settings, policy=GaussianPolicy())
    run = tmp_path / "run"
    assert load_config(run / "config.yaml") == settings  # it runs the run again
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "config.yaml", "environment.json", "metrics.jsonl", "timings.jsonl", "run.log", "checkpoints", "samples",
        "eval_before.jsonl", "eval_before_guided.jsonl", "eval_after.jsonl", "summary.json", "report.html",
    }  # fmt: skip
    assert not [name for name in names if name.endswith(".part")]
    sheets = {path.name for path in (run / "samples").glob("*.png")}
    assert sheets == {"update_000000.png", "update_000002.png", "before_after.png"}
    for stage in ("before", "before_guided", "after"):
        assert all(Image.open(run / row["path"]).size == (2, 1) for row in read_rows(run, stage))
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary["updates"] == 3 and summary["seed"] == 0 and summary["policy"] == "gaussian"
    assert summary["eval"]["prompts"] == 2 and summary["eval"]["images_per_prompt"] == 2
    assert summary["wall_s"] > 0 and summary["peak_rss_mb"] > 50 and summary["on_policy_ratio_max_dev"] == 0.0
    gain = summary["eval"]["paired"]["gaussian_runs:quadratic"]["mean_diff"]
    before, after = (summary["eval"][stage]["gaussian_runs:quadratic"]["mean"] for stage in ("before", "after"))
    assert gain == pytest.approx(after - before)
    guided = summary["eval"]["before_guided"]["gaussian_runs:quadratic"]["mean"]
    assert guided != before  # drawn at its own guidance


def scores(policy: GaussianPolicy, settings, weights: str) -> list[float]:
    rows = drawn(policy, settings, weights, UserReward("r", quadratic))
    return [row["scores"]["r"] for row in rows]


def drawn(policy, settings, weights: str, reward) -> list:
    """Rows of an evaluation beside the run's own."""
    prompts = load_prompts(settings.eval.prompts, limit=2)
    with policy.weights(weights):
        return evaluate(policy, prompts, settings_of(settings.eval, 0, 64), Scorers(reward, None), world=ALONE)


@pytest.mark.parametrize("ema", ["null", "{decay: 0.9, ramp: false}"])
def test_what_is_evaluated_are_the_averaged_weights(tmp_path, ema):
    settings = config(tmp_path, "updates=4", f"ema={ema}", evaluated(tmp_path), "eval.every=4")
    policy = GaussianPolicy()
    train(settings, policy=policy)
    found = {
        stage: [row["scores"]["gaussian_runs:quadratic"] for row in read_rows(tmp_path / "run", stage)]
        for stage in ("before", "after")
    }
    assert found["before"] == scores(policy, settings, "reference")
    current = scores(policy, settings, "current")
    expected = current if ema == "null" else scores(policy, settings, "ema")
    assert found["after"] == expected and (ema == "null" or expected != current)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[3]["eval/gaussian_runs:quadratic"] == pytest.approx(sum(expected) / 4)
    assert "eval/gaussian_runs:quadratic" not in rows[2]


def test_the_first_evaluation_is_drawn_once(tmp_path, monkeypatch):
    settings = config(tmp_path, "updates=1", evaluated(tmp_path))
    train(settings, policy=GaussianPolicy())
    before = (tmp_path / "run" / "eval_before.jsonl").stat().st_mtime_ns
    longer = config(tmp_path, "updates=2", evaluated(tmp_path))
    train(longer, resume=True, policy=GaussianPolicy())
    assert (tmp_path / "run" / "eval_before.jsonl").stat().st_mtime_ns == before


def opened(folder: Path, *overrides: str, resume: bool = False):
    settings = config(folder, *overrides)
    return settings, Run.open(settings, ALONE, resume=resume)


def test_the_last_good_state_of_an_update_with_several_steps(tmp_path):
    """Before the first step it is the live one; after it, the copy from the beginning of the update."""
    settings, opening = opened(tmp_path, "optimizer.inner_updates=2")
    policy = GaussianPolicy()
    with opening as run:
        state = State.create(settings, policy)
        run.load(state, policy)
        state.update = 5
        run.begin(state, policy)
        with torch.no_grad():
            policy.bias += 1.0  # the first optimizer step
        run.committed = True
        run.save_last_good(state, policy)
        saved = load_latest(run.folder / "checkpoints")
        assert saved.step == 5 and not saved.tensors["weights/current/bias"].any()
        run.begin(state, policy)  # the next update
        run.save_last_good(state, policy)
        assert load_latest(run.folder / "checkpoints").tensors["weights/current/bias"].tolist() == [1, 1]


def test_with_one_step_no_copy_is_kept_and_the_checkpoint_stands(tmp_path):
    settings, opening = opened(tmp_path)
    policy = GaussianPolicy()
    with opening as run:
        state = State.create(settings, policy)
        run.load(state, policy)
        run.save(state, policy)
        state.update = 1
        run.begin(state, policy)
        assert run.snapshot is None
        run.committed = True
        run.save_last_good(state, policy)
        assert load_latest(run.folder / "checkpoints").step == 0


def test_everything_that_has_a_state_survives_a_checkpoint(tmp_path):
    settings = config(tmp_path, "updates=3", "ema={decay: 0.5}", "optimizer.warmup=2")
    policy = GaussianPolicy()
    train(settings, policy=policy)
    other = GaussianPolicy()
    state = State.create(settings, other)
    found = load_latest(tmp_path / "run" / "checkpoints")
    state.unpack(other, found)
    again, counters = state.pack(other)
    assert again.keys() == found.tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in found.tensors.items())
    assert {**json.loads(json.dumps(counters)), "wall_s": found.state["wall_s"]} == found.state
    assert state.wall_s == found.state["wall_s"] > 0
    assert state.update == 3 and state.ema.steps == 3 and state.cost.images == 3 * 4 * 8
    names = {name.split("/")[1] for name in found.tensors if name.startswith("weights/")}
    assert names == {"current", "ema", "reference"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": FORMAT + 1}, f"of format {FORMAT + 1}"),
        ({"alarms": {"first": {}, "last": {}, "active": [], "raised": []}}, r"without alarms\.held,"),
        ({"skips": None}, r"without skips\.in_a_row, skips\.total,"),
        ({"ema": None}, r"without ema\.steps,"),
    ],
)
def test_the_state_of_another_version_is_refused_and_left_alone(tmp_path, change, said):
    """What a later flowrl keeps, an earlier one did not save: the newest checkpoint is rewritten as that one would."""
    options = ["ema={}", "checkpoint.every=1"]
    train(config(tmp_path, "updates=1", *options), policy=GaussianPolicy())
    found = load_latest(tmp_path / "run" / "checkpoints")
    save_checkpoint(tmp_path / "run" / "checkpoints", 1, found.tensors, {**found.state, **change})
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    message = rf"step_000001 holds the state of a run {said}.*a complete one of format {FORMAT}.*new output_dir"
    with pytest.raises(UserError, match=message):
        train(config(tmp_path, "updates=2", *options), resume=True, policy=GaussianPolicy())
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


def test_a_state_without_a_number_is_of_the_first_format(tmp_path):
    train(config(tmp_path, "updates=1"), policy=GaussianPolicy())
    found = load_latest(tmp_path / "run" / "checkpoints")
    assert found.state.pop("format") == FORMAT > 1
    save_checkpoint(tmp_path / "run" / "checkpoints", 1, found.tensors, found.state)
    with pytest.raises(UserError, match=f"of format 1.*format {FORMAT}"):
        train(config(tmp_path, "updates=2"), resume=True, policy=GaussianPolicy())


@pytest.mark.parametrize(("platform", "peak"), [("linux", 500_000), ("darwin", 512_000_000)])
def test_memory_is_in_megabytes_of_a_million_bytes(monkeypatch, platform, peak):
    """getrusage counts KiB on Linux and bytes on macOS: both are 500 000 x 1024 bytes = 512 MB."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: types.SimpleNamespace(ru_maxrss=peak))
    assert peak_rss_mb() == 512


def test_a_damaged_config_in_the_folder_is_an_error_not_a_new_run(tmp_path):
    train(config(tmp_path, "updates=1"), policy=GaussianPolicy())
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(UserError, match="config.yaml holds an empty file"):
        train(config(tmp_path, "updates=1"), resume=True, policy=GaussianPolicy())


# ------------------------------------------------------------------------------------------------------- a pipeline
def pipeline_config(folder: Path, *overrides: str):
    (folder / "images.txt").write_text("a red circle\ntwo dogs\n")
    return config(
        folder, f"prompts.source={folder / 'images.txt'}", "reward=jpeg", "updates=2", "prompts_per_update=2",
        "group_size=2", "rollout={steps: 3}", "optimizer.lr=1e-3",
        f"eval={{prompts: '{folder / 'images.txt'}', images_per_prompt: 2, steps: 2, judge: null, rewards: jpeg}}",
        *overrides,
    )  # fmt: skip


def test_a_pipeline_in_memory_is_trained_evaluated_and_exported(tmp_path):
    """No embedding cache, so the text encoders stay; the adapter that is written holds the averaged weights."""
    from safetensors.torch import load_file

    policy = PipelinePolicy(tiny_sd3(tmp_path / "tokenizers"))
    settings = pipeline_config(tmp_path, "ema={decay: 0.9, ramp: false}")
    summary = train(settings, policy=policy)
    assert policy.has_text_encoders and summary["cost"]["images"] == 2 * 2 * 2
    assert summary["on_policy_ratio_max_dev"] == 0.0
    run = tmp_path / "run"
    assert not (run / "embeddings").exists()
    weights = load_file(next((run / "adapter").glob("*.safetensors")))
    sets = policy.named_states()
    name = next(name for name in sets if name.startswith("ema/") and "lora_B" in name)
    assert sets[name].any() and not torch.equal(sets[name], sets[name.replace("ema/", "current/")])
    key = "transformer." + name.removeprefix("ema/").replace(".default", "")
    exported = weights[key]
    ratio = (exported / sets[name])[sets[name] != 0]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))  # ema, scaled by the folded alpha
    after = [row["scores"]["jpeg"] for row in read_rows(run, "after")]
    assert after == [row["scores"]["jpeg"] for row in drawn(policy, settings, "ema", reward_models.load("jpeg"))]


def test_a_folder_is_loaded_encoded_once_and_trained_whole(tmp_path):
    """`train: full` with a KL: two weight sets; prompts are encoded before training, the encoders dropped."""
    tiny_sd3(tmp_path / "tokenizers").save_pretrained(tmp_path / "model")
    settings = pipeline_config(
        tmp_path, f"policy={{path: '{tmp_path / 'model'}', device: cpu, train: full}}", "objective.kl.weight=0.1",
        "optimizer.inner_updates=2", "updates=1",
    )  # fmt: skip
    summary = train(settings)
    cost = summary["cost"]  # the reference looks at every state too
    assert cost["training_forwards"] == 2 * cost["training_backwards"] == 2 * 2 * 2 * 2
    assert len(list((tmp_path / "run" / "embeddings").rglob("*.safetensors"))) == 3  # two prompts and the empty one
    found = load_latest(tmp_path / "run" / "checkpoints")
    assert found.step == 1 and not [name for name in found.tensors if "reference" in name]


def test_sizes_are_checked_before_anything_slow(tmp_path):
    policy = PipelinePolicy(tiny_sd3(tmp_path / "tokenizers"))
    settings = pipeline_config(tmp_path, "eval.height=1024", "eval.width=1024")
    with pytest.raises(UserError, match="1024 x 1024"):
        train(settings, policy=policy)
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not list((tmp_path / "run").glob("eval*"))
