"""Policies of diffusion models against diffusers' own pipelines and schedulers."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import samplers
from flowrl.errors import UserError
from flowrl.policies import LoraSettings, PipelinePolicy, Policy, load_policy
from flowrl.policies.loading import set_attention
from flowrl.policies.vp import vp_scale

PROMPTS = ["a photo of red circle", "two dog", "blue star left of cat"]
NAMES = ["sd", "sd_v", "sdxl", "lcm"]


def start(policy, n=3, height=16, width=16):
    """x_vp ~ N(0, 1), as diffusers begins."""
    shape = policy.latent_shape(height, width)
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))


@torch.no_grad()
def roll(policy, x_vp, cond, steps, kernel, level, guidance, noises=None, size=(16, 16)):
    """A whole sampling by the policy's own grid and a kernel; `noises[i]` is that of step i. Returns the last x_vp."""
    sigmas = policy.sigmas(steps, *size)
    x = x_vp * policy.prior_std(float(sigmas[0]))
    for i in range(steps):
        s = sigmas[i].float().expand(len(x))
        a, b, c = samplers.get_kernel(kernel).coefficients(sigmas[i], sigmas[i + 1], level)
        x = samplers.affine(x, policy.predict(x, s, cond, guidance), a, b)
        if c > 0:
            x = x + c.float() * noises[i]
    return x * float(vp_scale(float(sigmas[-1])))


class Injected:
    """diffusers' scheduler with its noise given: replaces `randn_tensor` there."""

    def __init__(self, module, noises):
        self.module, self.noises, self.used = module, noises, 0

    def __enter__(self):
        self.before = self.module.randn_tensor
        self.module.randn_tensor = self.draw
        return self

    def __exit__(self, *_):
        self.module.randn_tensor = self.before

    def draw(self, shape, **_):
        self.used += 1
        return self.noises[self.used - 1]


@pytest.mark.parametrize("name", NAMES)
def test_satisfies_the_protocol(make, name):
    policy = make(name)
    assert isinstance(policy, Policy)
    assert policy.resolution == 16 and policy.latent_shape() == (4, 8, 8) and policy.latent_shape(18, 12) == (4, 9, 6)
    with pytest.raises(UserError, match="multiples of 2 pixels"):
        policy.latent_shape(17, 16)


@pytest.mark.parametrize("name", ["sd", "sd_v", "sdxl", "sdxl_negative"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_whole_ddim_sample_is_the_pipelines(pipelines, make, name, guidance, eta):
    import diffusers.schedulers.scheduling_ddim as module

    policy, pipeline, size = make(name, train="none"), pipelines[name], (16, 24)
    x_vp, steps = start(policy, 3, *size), 5
    noises = torch.randn(steps, *x_vp.shape, generator=torch.Generator().manual_seed(1))
    mine = roll(policy, x_vp, policy.encode(PROMPTS), steps, "ddim", eta, guidance, noises, size)
    arguments = {"negative_prompt": [""] * 3} if name == "sdxl_negative" else {}
    with Injected(module, noises) as injected:
        theirs = pipeline(
            PROMPTS, latents=x_vp, height=size[0], width=size[1], num_inference_steps=steps, guidance_scale=guidance,
            eta=eta, output_type="latent", **arguments,
        ).images  # fmt: skip
    assert injected.used == (steps if eta else 0)
    torch.testing.assert_close(mine, theirs, atol=5e-5, rtol=2e-5)
    # the decoder: finished latents are x at the last of sigmas
    with torch.no_grad():
        image = pipeline.vae.decode(theirs / 0.18215, return_dict=False)[0]
        x = theirs / float(vp_scale(float(policy.sigmas(steps)[-1])))
        expected = pipeline.image_processor.postprocess(image, output_type="pt")
        torch.testing.assert_close(policy.decode(x), expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 8.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_whole_lcm_sample_is_the_pipelines(pipelines, make, guidance, steps):
    import diffusers.schedulers.scheduling_lcm as module

    policy, pipeline = make("lcm", train="none"), pipelines["lcm"]
    x_vp = start(policy)
    noises = torch.randn(steps, *x_vp.shape, generator=torch.Generator().manual_seed(1))
    cond = policy.encode(PROMPTS)
    assert cond.uncond is None and policy.calls(guidance) == 1
    with Injected(module, noises):
        theirs = pipeline(
            PROMPTS, latents=x_vp, num_inference_steps=steps, guidance_scale=guidance, output_type="latent"
        ).images
    for kernel in ("consistency", "cps"):  # re-noising with fresh noise alone: the same step
        mine = roll(policy, x_vp, cond, steps, kernel, 1.0, guidance, noises)
        torch.testing.assert_close(mine, theirs, atol=5e-5, rtol=2e-5)
    with pytest.raises(UserError, match="negative prompt"):
        policy.encode(PROMPTS, negative="cat")


def test_the_boundary_condition_shows_where_time_is_small(make):
    # at timestep 1 and scaling 0.1 the skip is c_skip = 0.25 / 0.26: by hand
    policy = make("lcm", train="none")
    clock = policy.backbone.clock
    clock.timestep_scaling, s = 0.1, clock.table[1].float().expand(3)
    x, cond = start(policy), policy.encode(PROMPTS)
    with torch.no_grad():
        f = x - s[0] * policy.predict(x, s, cond, 8.0)
        clock.consistent = False
        x0 = x - s[0] * policy.predict(x, s, cond, 8.0)
    expected = 0.1 / 0.26**0.5 * x0 + 0.25 / 0.26 * vp_scale(s)[0] * x
    torch.testing.assert_close(f, expected, atol=1e-5, rtol=1e-5)


def test_v_and_epsilon_of_the_same_network_say_the_same(pipelines):
    """A network that says v where another says epsilon = sqrt(abar) v + sqrt(1 - abar) x_vp: one flow."""
    policies = [PipelinePolicy(copy.deepcopy(pipelines["sd"]), train="none") for _ in range(2)]
    says_v, says_epsilon = policies
    says_v.backbone.clock.prediction = "v_prediction"
    abar = says_v.pipeline.scheduler.alphas_cumprod
    network = says_v.network

    def epsilon(x_vp, t, **arguments):
        signal, noise = (part[t.long()].view(-1, 1, 1, 1) for part in (abar.sqrt(), (1 - abar).sqrt()))
        return (signal * network(x_vp, t, **arguments)[0] + noise * x_vp,)

    says_epsilon.network = epsilon
    x_vp = start(says_v)
    for guidance in (1.0, 4.0):
        first, second = (roll(p, x_vp, p.encode(PROMPTS), 4, "ddim", 0.0, guidance) for p in policies)
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_guidance_is_one_forward_of_both_halves(make, name):
    policy, seen = make(name, train="none"), []
    policy.network.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    x, s = start(policy, 5, 12, 20), torch.full((5,), 0.5)
    cond = policy.encode(PROMPTS, negative="cat")[[0, 1, 2, 0, 1]]
    with torch.no_grad():
        plain, guided = policy.predict(x, s, cond), policy.predict(x, s, cond, 3.0)
    assert [len(args[0]) for args, _ in seen] == [8, 16] and policy.calls(3.0) == 2 and policy.calls(1.0) == 1
    (args, kwargs) = seen[1]
    assert torch.equal(args[0][:8], args[0][8:]) and torch.equal(args[1][:8], args[1][8:])
    negative = policy.encode(["cat"]).rows
    assert torch.equal(kwargs["encoder_hidden_states"][0], negative["embeds"][0])
    if name == "sdxl":
        added = kwargs["added_cond_kwargs"]
        assert added["time_ids"].tolist() == [[12, 20, 0, 0, 12, 20]] * 16  # height first
        assert torch.equal(added["text_embeds"][0], negative["pooled"][0])
    assert not torch.allclose(plain, guided)


def test_sdxls_unconditional_row_is_zeros_only_where_the_pipeline_says_so(make):
    cond = make("sdxl", train="none").encode(PROMPTS)
    assert not cond.uncond["embeds"].any() and not cond.uncond["pooled"].any()
    for other in (make("sdxl", train="none").encode(PROMPTS, negative="cat"), make("sdxl_negative").encode(PROMPTS)):
        assert other.uncond["embeds"].any() and other.uncond["pooled"].any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd", "sdxl", "lcm"])
def test_other_rows_change_no_bit(make, name):
    policy = make(name, train="none")
    x, s = start(policy, 8), torch.linspace(0.9, 0.2, 8)
    cond = policy.encode(PROMPTS)[torch.arange(8) % 3]
    full = policy.predict(x, s, cond, 3.0)
    assert torch.equal(policy.predict(x[:3], s[:3], cond[:3], 3.0), full[:3])


@torch.no_grad()
def test_bfloat16_is_for_the_network_only(make):
    policy = make("sd", dtype="bfloat16")
    assert policy.pipeline.unet.dtype == torch.bfloat16
    x, s = start(policy), torch.tensor([0.93, 0.5, 0.2])
    policy.network = lambda x_vp, t, **_: (torch.zeros_like(x_vp),)  # epsilon 0: v = -x / (1 - s), in float32
    found = policy.predict(x, s, policy.encode(PROMPTS))
    torch.testing.assert_close(found, -x / (1 - s).view(-1, 1, 1, 1), rtol=1e-6, atol=1e-6)
    for name in NAMES:
        near, expected = (p.predict(x, s, p.encode(PROMPTS), 3.0) for p in (make(name, dtype="bfloat16"), make(name)))
        assert near.dtype == torch.float32 and (near - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_the_adapter_and_checkpointing_changes_nothing(make, name):
    gradients = []
    for checkpointing in (False, True):
        policy = make(name, lora=LoraSettings(rank=2), gradient_checkpointing=checkpointing)
        x, s = start(policy), torch.tensor([0.9, 0.5, 0.3])
        policy.predict(x, s, policy.encode(PROMPTS), 3.0).square().mean().backward()
        ends = {tuple(key.split(".lora_")[0].split(".")[-2:]) for key, _ in policy.trainable()}
        assert {end[-1] for end in ends} == {"to_q", "to_k", "to_v", "0"}
        gradients.append({key: p.grad for key, p in policy.trainable() if "lora_B" in key})
    assert all(g is not None and g.isfinite().all() for g in gradients[0].values())
    assert sum(g.abs().sum() for g in gradients[0].values()) > 0
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient)


def test_the_directional_derivative_of_a_prediction(make):
    policy = make("sd", train="none")
    x, s, cond = start(policy), torch.tensor([0.9, 0.5, 0.3]), policy.encode(PROMPTS)
    x.requires_grad_(True)
    policy.predict(x, s, cond, 2.0).square().sum().backward()
    d = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        up, down = (policy.predict(x + h * d, s, cond, 2.0).double().square().sum() for h in (2e-3, -2e-3))
    torch.testing.assert_close((x.grad * d).sum().double(), (up - down) / 4e-3, rtol=5e-3, atol=1e-2)


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sdxl", "lcm"])
def test_folders_load(folders, pipelines, name):
    policy = load_policy(folders[name], train="none")
    x, s = start(policy), torch.tensor([0.9, 0.5, 0.3])
    same = PipelinePolicy(copy.deepcopy(pipelines[name]), train="none")
    with torch.no_grad():
        first, second = (p.predict(x, s, p.encode(PROMPTS), 2.0) for p in (policy, same))
    torch.testing.assert_close(first, second)
    with pytest.raises(UserError, match="max_sequence_length 64"):
        load_policy(folders[name], max_sequence_length=64)


def test_a_safety_checker_is_not_needed(folders, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(folders["sd"], tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["requires_safety_checker"] = True
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load_policy(folder, train="none").pipeline.safety_checker is None
    shutil.rmtree(folder / "unet")
    with pytest.raises(UserError, match="without unet"):
        load_policy(folder)


def test_the_attention_switch_is_refused_where_it_would_do_nothing(make):
    with pytest.raises(UserError, match="UNet2DConditionModel, which ignores diffusers' attention switch"):
        set_attention(make("sd", train="none").denoiser, "flash")


def test_full_fine_tuning_trains_the_unet(make):
    policy = make("sd", train="full")
    assert len(policy.trainable()) == len(list(policy.denoiser.parameters()))
    assert policy.memory().keys() == {"unet", "vae", "text_encoders", "trainable", "set:reference"}


@pytest.mark.parametrize("layout", ["old", "kohya"])
def test_loras_of_other_programs_load_at_their_strength(make, tmp_path, layout):
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    g = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 16, generator=g), torch.randn(16, 2, generator=g)
    if layout == "old":
        state = {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up}
    else:
        key = f"lora_unet_{name.replace('.', '_')}"
        state = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
    save_file(state, tmp_path / "lora.safetensors")
    policy, base = make("sd", lora=LoraSettings(source=str(tmp_path / "lora.safetensors"))), make("sd", train="none")
    layer, plain = (dict(p.denoiser.named_modules())[name] for p in (policy, base))
    x = torch.randn(3, 16, generator=g)
    factor = 0.5 if layout == "kohya" else 1.0  # alpha / rank
    torch.testing.assert_close(layer(x) - plain(x), factor * x @ (up @ down).T, atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="holds no layer of a transformer"):
        make("sd3", lora=LoraSettings(source=str(_as_flux(state, tmp_path))))


def _as_flux(state, folder):
    """The same weights under names of a UNet, which no transformer has."""
    path = folder / "unet.safetensors"
    save_file({f"unet.x{i}.lora_A.weight": value for i, value in enumerate(state.values())}, path)
    return path


def test_a_reloaded_adapter_is_the_saved_one(make, tmp_path):
    from flowrl.export import export_lora

    policy = make("sdxl", lora=LoraSettings(rank=2, alpha=5.0))
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.copy_(
                0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    file = export_lora(policy, tmp_path)
    assert all(key.startswith("unet.") for key in load_file(file))
    again = make("sdxl", lora=LoraSettings(source=str(tmp_path)))
    x, s = start(policy), torch.tensor([0.9, 0.5, 0.3])
    with torch.no_grad():
        first, second = (p.predict(x, s, p.encode(PROMPTS), 2.0) for p in (policy, again))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_steps_between_two_times_of_the_grid_use_a_time_between(make):
    # half a grid step: the network's timestep is not rounded
    policy, seen = make("sd", train="none"), []
    policy.network.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    scheduler = DDIMScheduler.from_config(policy.pipeline.scheduler.config)
    scheduler.set_timesteps(5)
    sigmas = policy.sigmas(5)
    with torch.no_grad():
        policy.predict(start(policy, 1), sigmas[:1].float(), policy.encode(["a cat"]))
        policy.predict(start(policy, 1), sigmas[:2].mean(0, keepdim=True).float(), policy.encode(["a cat"]))
    assert seen[0][0] == scheduler.timesteps[0] and scheduler.timesteps[1] < seen[1][0] < scheduler.timesteps[0]
    assert isinstance(policy.denoiser, UNet2DConditionModel)
