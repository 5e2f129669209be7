"""Tiny pipelines, built once; a policy takes its pipeline over, so tests get deep copies."""

import copy

import pytest
import torch
from tiny_pipelines import tiny_flux, tiny_lcm, tiny_sd, tiny_sd3, tiny_sdxl

from flowrl.policies import PipelinePolicy


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """name -> pipeline, not to be changed."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "sd3": tiny_sd3(folder / "sd3"),
        "sd3_t5": tiny_sd3(folder / "sd3_t5", t5="real"),
        "sd3_no_t5": tiny_sd3(folder / "sd3_no_t5", t5="none"),
        "flux": tiny_flux(folder / "flux"),
        "flux_schnell": tiny_flux(folder / "schnell", guidance_embeds=False),
        "sd": tiny_sd(folder / "sd"),
        "sd_v": tiny_sd(folder / "sd_v", prediction_type="v_prediction", timestep_spacing="trailing"),
        "sdxl": tiny_sdxl(folder / "sdxl"),
        "sdxl_negative": tiny_sdxl(folder / "sdxl_negative", zeros=False),
        "lcm": tiny_lcm(folder / "lcm"),
    }


@pytest.fixture(scope="session")
def folders(pipelines, tmp_path_factory):
    """name -> folder of the saved pipeline."""
    root = tmp_path_factory.mktemp("models")
    names = ("sd3", "flux", "sd3_no_t5", "sd", "sdxl", "lcm")
    for name in names:
        pipelines[name].save_pretrained(root / name)
    return {name: root / name for name in names}


@pytest.fixture
def make(pipelines):
    """make("sd3", **arguments) -> a policy on a copy of that pipeline."""

    def build(name: str, **arguments) -> PipelinePolicy:
        return PipelinePolicy(copy.deepcopy(pipelines[name]), **arguments)

    return build


@pytest.fixture
def batch():
    """batch(policy, n) -> (latents, s) of n rows, seeded."""

    def draw(policy, n: int = 3, height: int = 16, width: int = 16):
        generator = torch.Generator().manual_seed(n)
        latents = torch.randn(n, *policy.latent_shape(height, width), generator=generator)
        return latents, torch.linspace(0.9, 0.2, n)

    return draw
