"""Encoding, velocity, s-grid, decoding and whole samples against diffusers' own pipelines."""

import pytest
import torch

from flowrl.errors import UserError
from flowrl.policies import PipelinePolicy, Policy

PROMPTS = ["a photo of red circle", "two dog", "blue star left of cat"]
ALL = ["sd3", "sd3_t5", "flux", "flux_schnell"]


@torch.no_grad()
def ode(policy: PipelinePolicy, x, cond, steps: int, guidance: float, size: tuple[int, int]):
    """Euler steps on the policy's own grid, in float32 like diffusers' scheduler."""
    sigmas = policy.sigmas(steps, *size).float()
    for s, s_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (s_next - s) * policy.predict(x, s.expand(len(x)), cond, guidance)
    return x


@pytest.mark.parametrize("name", ALL)
def test_satisfies_the_protocol(make, name):
    assert isinstance(make(name), Policy)


@pytest.mark.parametrize(("name", "tokens"), [("sd3", 0), ("sd3_t5", 256), ("sd3_no_t5", 256)])
def test_sd3_embeddings_are_the_pipelines(pipelines, make, name, tokens):
    cond = make(name).encode(PROMPTS, negative="cat")
    embeds, negative, pooled, negative_pooled = pipelines[name].encode_prompt(
        PROMPTS, None, None, negative_prompt="cat", max_sequence_length=tokens or 256
    )
    length = 16 + tokens
    close = {"atol": 1e-5 * embeds.abs().max().item(), "rtol": 0}  # theirs is another batch shape
    assert cond.rows["embeds"].shape[1] == length
    torch.testing.assert_close(cond.rows["embeds"], embeds[:, :length], **close)
    torch.testing.assert_close(cond.rows["pooled"], pooled, **close)
    torch.testing.assert_close(cond.uncond["embeds"], negative[:1, :length], **close)
    torch.testing.assert_close(cond.uncond["pooled"], negative_pooled[:1], **close)
    if name != "sd3_t5":  # what is cut off, or padded, is exactly nothing
        assert not embeds[:, 16:].any()


def test_flux_embeddings_are_the_pipelines(pipelines, make):
    cond = make("flux").encode(PROMPTS)
    embeds, pooled, _ = pipelines["flux"].encode_prompt(PROMPTS, None)
    torch.testing.assert_close(cond.rows["embeds"], embeds, atol=1e-5 * embeds.abs().max().item(), rtol=0)
    torch.testing.assert_close(cond.rows["pooled"], pooled, atol=1e-6, rtol=0)
    assert cond.uncond is None


def test_an_embedding_depends_on_its_prompt_only(make):
    policy = make("sd3")
    together, alone = policy.encode([*PROMPTS, "cat"] * 4), policy.encode(["two dog"])
    for key in together.rows:
        assert torch.equal(together.rows[key][1], alone.rows[key][0])
        assert torch.equal(together.rows[key][5], alone.rows[key][0])


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_sd3_velocity_is_the_transformers(pipelines, make, batch, guidance):
    policy, transformer = make("sd3"), pipelines["sd3"].transformer
    x, s = batch(policy)
    cond = policy.encode(PROMPTS)

    def call(rows):
        return transformer(
            hidden_states=x,
            timestep=1000 * s,
            encoder_hidden_states=rows["embeds"].expand(3, -1, -1),
            pooled_projections=rows["pooled"].expand(3, -1),
        ).sample

    expected = call(cond.rows)
    if guidance != 1:
        free = call(cond.uncond)
        expected = free + guidance * (expected - free)
    v = policy.predict(x, s, cond, guidance)
    assert v.dtype == torch.float32
    torch.testing.assert_close(v, expected, atol=2e-5, rtol=1e-5)
    assert policy.calls(guidance) == (1 if guidance == 1 else 2)


@torch.no_grad()
@pytest.mark.parametrize(("name", "guidance"), [("sd3", 1.0), ("sd3", 4.0), ("sd3_t5", 4.0)])
def test_a_whole_sd3_sample_is_the_pipelines(pipelines, make, batch, name, guidance):
    policy, pipeline = make(name), pipelines[name]
    x, _ = batch(policy)
    cond = policy.encode(PROMPTS)
    mine = ode(policy, x, cond, 4, guidance, (16, 16))
    if name == "sd3_t5":
        prompts = {"prompt": PROMPTS}
    else:  # the plain call would append 256 zero tokens; with our embeddings the rest of it must agree
        prompts = {
            "prompt_embeds": cond.rows["embeds"],
            "pooled_prompt_embeds": cond.rows["pooled"],
            "negative_prompt_embeds": cond.uncond["embeds"].expand(3, -1, -1),
            "negative_pooled_prompt_embeds": cond.uncond["pooled"].expand(3, -1),
        }
    theirs = pipeline(
        **prompts, latents=x, num_inference_steps=4, guidance_scale=guidance, height=16, width=16, output_type="latent"
    ).images
    torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)
    image = pipeline.image_processor.postprocess(
        pipeline.vae.decode(theirs / 1.5035 + 0.0609, return_dict=False)[0], output_type="pt"
    )
    torch.testing.assert_close(policy.decode(mine), image, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("name", "guidance"), [("flux", 3.5), ("flux", 1.0), ("flux_schnell", 1.0)])
def test_a_whole_flux_sample_is_the_pipelines(pipelines, make, batch, name, guidance):
    policy, pipeline = make(name), pipelines[name]
    height, width = 16, 24  # not square: a transposed packing would show
    x, _ = batch(policy, height=height, width=width)
    mine = ode(policy, x, policy.encode(PROMPTS), 4, guidance, (height, width))
    packed = pipeline._pack_latents(x, 3, 4, height // 2, width // 2)
    theirs = pipeline(
        PROMPTS, latents=packed, height=height, width=width, num_inference_steps=4, guidance_scale=guidance,
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(mine, pipeline._unpack_latents(theirs, height, width, 2), atol=2e-5, rtol=1e-5)
    assert policy.calls(guidance) == 1


def test_flux_guidance_is_an_input_that_matters(make, batch):
    policy = make("flux", train="none")
    x, s = batch(policy)
    cond = policy.encode(PROMPTS)
    with torch.no_grad():
        assert not torch.allclose(policy.predict(x, s, cond, 1.0), policy.predict(x, s, cond, 5.0))
    schnell = make("flux_schnell", train="none")
    with pytest.raises(UserError, match="without embedded guidance"):
        schnell.predict(x, s, schnell.encode(PROMPTS), 3.5)
    with pytest.raises(UserError, match="negative prompt"):
        policy.encode(PROMPTS, negative="cat")


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_other_rows_change_no_bit(make, batch, name):
    policy = make(name, train="none")
    x, s = batch(policy, 8)
    cond = policy.encode(PROMPTS)[torch.arange(8) % 3]
    full = policy.predict(x, s, cond)
    assert torch.equal(policy.predict(x[:3], s[:3], cond[:3]), full[:3])  # padded to 8
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(policy.predict(x[order], s[order], cond[order]), full[order])


@torch.no_grad()
def test_guidance_is_one_forward_of_a_multiple_of_eight(make, batch):
    policy = make("sd3", train="none")
    shapes = []
    policy.network.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["hidden_states"].shape[0]), with_kwargs=True
    )
    x, s = batch(policy, 5)
    cond = policy.encode(PROMPTS)[[0, 1, 2, 0, 1]]
    policy.predict(x, s, cond)
    policy.predict(x, s, cond, 4.0)
    assert shapes == [8, 16]


def test_predict_refuses_rows_that_do_not_match(make, batch):
    policy = make("sd3", train="none")
    x, s = batch(policy)
    with pytest.raises(ValueError, match="3 latents, 3 times, 2 conditioning rows"):
        policy.predict(x, s, policy.encode(PROMPTS[:2]))


def test_sigmas(make):
    policy = make("sd3", train="none")
    policy.pipeline.scheduler.set_timesteps(10)
    expected = policy.pipeline.scheduler.sigmas
    assert torch.equal(policy.sigmas(10).float(), expected) and policy.sigmas(10).dtype == torch.float64
    # diffusers' double shift f(t) = 3 t / (1 + 2 t) with its smallest t f(0.001), Flow-GRPO's table to four digits
    table = [1.0, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0.0]
    torch.testing.assert_close(policy.sigmas(10), torch.tensor(table, dtype=torch.float64), atol=6e-5, rtol=0)
    # FLUX at 512 px has 1024 packed tokens; here a pixel is half a latent, a token 4 x 4 px: 128 x 128 px
    flux = [1.0, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0.0]
    mine = make("flux", train="none").sigmas(6, 128, 128)
    torch.testing.assert_close(mine, torch.tensor(flux, dtype=torch.float64), atol=6e-5, rtol=0)


def test_sizes(make):
    policy = make("sd3", train="none")
    assert policy.resolution == 16 and policy.latent_shape() == (4, 8, 8)
    assert policy.latent_shape(32, 8) == (4, 16, 4)
    with pytest.raises(UserError, match="multiples of 4 pixels.*use for example 16 x 16"):
        policy.latent_shape(18, 16)
    with pytest.raises(UserError, match="at most 64 pixels"):  # 16 positions of 2 x 2 latents of 2 x 2 pixels
        policy.latent_shape(68, 16)
    assert make("flux", train="none").latent_shape(16, 24) == (4, 8, 12)
    with pytest.raises(UserError, match="at least 1"):
        policy.sigmas(0)


def test_decoding_is_chunked_by_shape_and_differentiable(make, batch):
    policy = make("sd3", train="none")
    x, _ = batch(policy, 11)
    with torch.no_grad():
        images = policy.decode(x)
        assert torch.equal(policy.decode(x[8:9]), images[8:9])
    assert images.shape == (11, 3, 16, 16) and images.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1
    x.requires_grad_(True)
    policy.decode(x).square().sum().backward()
    # a directional derivative by central differences
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        step = 1e-3
        up, down = (policy.decode(x + sign * step * direction).double().square().sum() for sign in (1, -1))
    torch.testing.assert_close((x.grad * direction).sum().double(), (up - down) / (2 * step), rtol=2e-3, atol=1e-3)


def test_large_images_are_decoded_in_tiles(make):
    policy = make("sd3", train="none")
    policy.pipeline.vae.decode = lambda z, return_dict: (torch.zeros(len(z), 3, 2 * z.shape[2], 2 * z.shape[3]),)
    policy.decode(torch.zeros(1, 4, 512, 512))
    assert policy.pipeline.vae.use_tiling
    policy.decode(torch.zeros(1, 4, 256, 256))
    assert not policy.pipeline.vae.use_tiling


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_low_precision_keeps_latents_and_adapters_in_float32(make, batch, dtype, bound):
    policy, exact = make("sd3", dtype=dtype), make("sd3")
    x, s = batch(policy)
    v, expected = (p.predict(x, s, p.encode(PROMPTS), 3.0) for p in (policy, exact))
    assert v.dtype == torch.float32
    assert (v - expected).abs().max() < bound * expected.abs().max()
    assert all(parameter.dtype == torch.float32 for _, parameter in policy.trainable())
    frozen = policy.pipeline.transformer.proj_out.weight
    assert frozen.dtype == getattr(torch, dtype) and policy.pipeline.vae.dtype == torch.float32
    assert policy.decode(x).dtype == torch.float32
