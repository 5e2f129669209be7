"""Whole runs on diffusion models: a policy gradient over DDIM's and the consistency model's own steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_pipelines import tiny_lcm, tiny_sd, tiny_sdxl

from flowrl.config import parse_config
from flowrl.errors import UserError
from flowrl.planning import make_plan
from flowrl.policies.vp import Clock
from flowrl.trainer import train

BUILD = {"sd": tiny_sd, "sdxl": tiny_sdxl, "lcm": tiny_lcm}


def settings(folder: Path, model: Path, **rollout: Any) -> Any:
    (folder / "prompts.txt").write_text("a photo of red circle\ntwo dog\n")
    prompts = str(folder / "prompts.txt")
    return parse_config(
        {
            "output_dir": str(folder / "run"),
            "policy": {"path": str(model), "device": "cpu", "dtype": "float32", "lora": {"rank": 2, "alpha": 8}},
            "reward": "jpeg",
            "prompts": {"source": prompts},
            "updates": 2,
            "prompts_per_update": 2,
            "group_size": 4,
            "rollout": {"steps": 4, **rollout},
            "advantage": {"std": "prompt"},
            "objective": {
                "clip_range": 1e-4,
                "measured_with": {"kernel": rollout["kernel"], "reduction": "mean", "density": "gaussian"},
            },
            "optimizer": {"lr": 1e-2, "micro_batch": 8},
            "eval": {
                "prompts": prompts, "limit": 2, "images_per_prompt": 2, "steps": 2, "judge": None, "rewards": "jpeg"
            },
            "logging": {"samples_every": 0},
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rollout"),
    [
        ("sd", {"kernel": "ddim", "level": 1.0, "guidance": 5.0}),
        ("sdxl", {"kernel": "ddim", "level": 0.5}),
        ("lcm", {"kernel": "consistency", "level": 1.0, "guidance": 8.0}),
    ],
)
def test_two_updates_train_an_adapter_that_plain_diffusers_loads(tmp_path, monkeypatch, name, rollout):
    monkeypatch.setattr("flowrl.report.write_report", lambda folder: folder / "report.html")
    BUILD[name](tmp_path / "parts").save_pretrained(tmp_path / "model")
    summary = train(settings(tmp_path, tmp_path / "model", **rollout))
    assert summary["on_policy_ratio_max_dev"] == 0
    calls = 2 if name == "sd" else 1  # rows of the network: guidance, or guidance as an input
    images = 2 * 2 * 4
    assert summary["cost"]["sampling_calls"] == calls * images * 4
    assert summary["cost"]["training_backwards"] == calls * images * 3  # the last step has no noise
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    plain.set_progress_bar_config(disable=True)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    draw = {"num_inference_steps": 2, "guidance_scale": 1.0, "latents": x, "output_type": "latent"}
    before = plain("two dog", **draw, generator=torch.Generator().manual_seed(0)).images
    plain.load_lora_weights(tmp_path / "run" / "adapter")
    after = plain("two dog", **draw, generator=torch.Generator().manual_seed(0)).images
    assert (after - before).abs().max() > 1e-5


def test_the_shift_of_flows_is_refused_even_where_the_times_begin_at_noise_alone(tmp_path):
    config = settings(tmp_path, tmp_path, kernel="ddim", shift=3.0)
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", rescale_betas_zero_snr=True, prediction_type="v_prediction",
        timestep_spacing="trailing", set_alpha_to_one=False,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"begin at 1\.0000 and end at 0\.0.*shift=null"):
        make_plan(config, Clock(scheduler).sigmas(4), 0)
