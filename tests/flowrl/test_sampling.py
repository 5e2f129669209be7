"""Drawing images of prompts."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import tiny_sd3

import samplers
from flowrl.policies import PipelinePolicy
from flowrl.sampling import SampleSettings, generate

PROMPTS = ["a red circle", "two stars", "a red circle"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> PipelinePolicy:
    return PipelinePolicy(tiny_sd3(tmp_path_factory.mktemp("tokenizer")), train="none")


def draw(policy: PipelinePolicy, prompts: list[str], **settings: object) -> list[torch.Tensor]:
    chosen = SampleSettings(steps=3, images_per_prompt=2, **settings)  # type: ignore[arg-type]
    found = list(generate(policy, prompts, chosen))
    assert [number for number, _ in found] == list(range(len(prompts)))
    return [images for _, images in found]


def test_images_do_not_depend_on_the_batch(policy: PipelinePolicy) -> None:
    together = draw(policy, PROMPTS)
    single = [draw(policy, [prompt], chunk=1)[0] for prompt in PROMPTS[:2]]
    for a, b in zip(together, single, strict=False):
        assert (a - b).abs().max() <= 1 / 255  # on the 8-bit grid a difference in the last bit may round either way
    assert not torch.equal(together[0], together[2])  # the same words a second time are another draw
    assert not torch.equal(together[0][0], together[0][1])


def test_images_are_on_the_8_bit_grid_and_follow_the_seed(policy: PipelinePolicy) -> None:
    images = torch.cat(draw(policy, PROMPTS, seed=3))
    assert images.shape == (6, 3, policy.resolution, policy.resolution)
    assert torch.equal(images, (images * 255).round() / 255)
    assert torch.equal(images, torch.cat(draw(policy, PROMPTS, seed=3)))
    assert not torch.equal(images, torch.cat(draw(policy, PROMPTS, seed=4)))


@torch.no_grad()
def test_the_path_is_euler_on_the_policys_own_grid(policy: PipelinePolicy) -> None:
    sigmas = policy.sigmas(3).float()
    shape = policy.latent_shape()
    x = samplers.noise([samplers.Key(0, "sample", None, PROMPTS[0], 0, i) for i in range(2)], shape)
    cond = policy.encode([PROMPTS[0]])[[0, 0]]
    for s, s_next in zip(sigmas, sigmas[1:], strict=False):
        x = x + (s_next - s) * policy.predict(x, s.repeat(2), cond, 2.5)
    assert (policy.decode(x) - draw(policy, PROMPTS[:1], guidance=2.5)[0]).abs().max() < 0.5 / 255 + 1e-5
