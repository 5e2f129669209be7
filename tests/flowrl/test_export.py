"""What is exported must compute, in plain diffusers, exactly what was trained."""

import json
import math
import struct

import diffusers
import pytest
import torch
import yaml
from tiny_pipelines import tiny_flux, tiny_sd, tiny_sd3

from flowrl.commands.pictures import open_policy
from flowrl.errors import UserError
from flowrl.export import (
    export_lora,
    export_merged,
    export_policy,
    fold,
    lora_strength,
    merged_state,
    strength_pictures,
)
from flowrl.policies import LoraSettings, PipelinePolicy
from flowrl.sampling import SampleSettings

RANK, ALPHA = 4, 10.0  # far from alpha = rank, so that a lost factor of 2.5 shows
BUILD = {"sd3": tiny_sd3, "flux": tiny_flux, "sd": tiny_sd}


@pytest.fixture(scope="module", params=["sd3", "flux", "sd"])
def base(request, tmp_path_factory):
    """(kind, folder of a saved random pipeline)."""
    folder = tmp_path_factory.mktemp(request.param)
    BUILD[request.param](folder / "parts").save_pretrained(folder / "model")
    return request.param, folder / "model"


def network(pipeline):
    """The transformer or UNet of a pipeline."""
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def part(base):
    """Its name, which is also the folder's and the prefix of its keys."""
    return "unet" if base[0] == "sd" else "transformer"


def load(base):
    _, folder = base
    return diffusers.DiffusionPipeline.from_pretrained(folder)


def trained(base, seed=1, **settings):
    """A policy whose adapter is far from zero."""
    policy = PipelinePolicy(load(base), lora=LoraSettings(rank=RANK, alpha=ALPHA, **settings))
    randomise(policy, seed)
    return policy


def randomise(policy, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def inputs(base):
    """Keyword arguments of the network alone, so that nothing of flowrl stands between the two outputs."""
    g = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    if base[0] == "sd":
        return {
            "sample": draw(2, 4, 8, 8),
            "timestep": torch.tensor([300, 900]),
            "encoder_hidden_states": draw(2, 5, 16),
        }
    if base[0] == "sd3":
        return {
            "hidden_states": draw(2, 4, 8, 8), "encoder_hidden_states": draw(2, 5, 32),
            "pooled_projections": draw(2, 32), "timestep": torch.tensor([300.0, 900.0]),
        }  # fmt: skip
    return {
        "hidden_states": draw(2, 16, 16), "encoder_hidden_states": draw(2, 5, 32), "pooled_projections": draw(2, 16),
        "timestep": torch.tensor([0.3, 0.9]), "guidance": torch.tensor([3.5, 3.5]), "txt_ids": torch.zeros(5, 3),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
    }  # fmt: skip


@torch.no_grad()
def output(transformer, base):
    return transformer.eval()(**inputs(base), return_dict=False)[0]


def header(path):
    """The JSON header of a safetensors file, read with nothing but the standard library."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


def read(path):
    from safetensors.torch import load_file

    return load_file(path)


def test_plain_diffusers_computes_what_was_trained(base, tmp_path):
    policy = trained(base)
    plain = load(base)
    untrained = output(network(plain), base)
    export_lora(policy, tmp_path)
    plain.load_lora_weights(tmp_path)
    expected = output(policy.denoiser, base)
    torch.testing.assert_close(output(network(plain), base), expected, rtol=1e-5, atol=1e-5)
    assert (expected - untrained).abs().max() > 1e-2  # the adapter matters


def test_the_usual_way_of_saving_would_lose_strength(base, tmp_path):
    # What the export is for: without folding and without metadata the adapter loads at rank / alpha of its strength.
    from peft.utils import get_peft_model_state_dict

    policy = trained(base)
    state = get_peft_model_state_dict(policy.denoiser, adapter_name="default")
    policy.pipeline.save_lora_weights(tmp_path, **{f"{part(base)}_lora_layers": state})
    plain = load(base)
    plain.load_lora_weights(tmp_path)
    wrong, right = output(network(plain), base), output(policy.denoiser, base)
    assert (wrong - right).abs().max() > 1e-2


def test_effective_update_and_key_prefixes_as_comfyui_reads_them(base, tmp_path):
    # ComfyUI: W + (alpha / rank) B A with alpha from a `.alpha` tensor, and factor 1 without one.
    policy = trained(base)
    file = export_lora(policy, tmp_path)
    state = read(file)
    assert all(key.startswith(f"{part(base)}.") and ".lora_" in key for key in state)
    assert not any(key.endswith(".alpha") for key in state)
    plain = dict(network(load(base)).named_modules())
    adapted = dict(policy.denoiser.named_modules())
    layers = {key.split(".lora_")[0].removeprefix(f"{part(base)}.") for key in state}
    assert len(state) == 2 * len(layers) == len(policy.trainable())
    for layer in layers:
        a, b = (state[f"{part(base)}.{layer}.lora_{half}.weight"] for half in "AB")
        x = torch.randn(3, plain[layer].in_features)
        update = adapted[layer](x) - plain[layer](x)
        torch.testing.assert_close(x @ (b @ a).T, update, rtol=1e-4, atol=1e-5)
        kept = adapted[layer]
        by_hand = ALPHA / RANK * kept.lora_B["default"].weight @ kept.lora_A["default"].weight
        torch.testing.assert_close(b @ a, by_hand, rtol=1e-5, atol=1e-6)


def test_header_is_readable_without_torch_and_says_alpha_is_rank(base, tmp_path):
    content = header(export_lora(trained(base), tmp_path))
    settings = json.loads(content["__metadata__"]["lora_adapter_metadata"])
    assert settings[f"{part(base)}.r"] == settings[f"{part(base)}.lora_alpha"] == RANK
    assert content["__metadata__"]["format"] == "pt"
    assert all(entry["dtype"] == "F32" for key, entry in content.items() if key != "__metadata__")


def test_named_weights_are_exported_and_the_policy_keeps_its_own(base, tmp_path):
    policy = trained(base)
    policy.copy_weights("current", "ema")
    first = output(policy.denoiser, base)
    randomise(policy, seed=2)
    second = output(policy.denoiser, base)
    for weights, expected in (("ema", first), ("current", second)):
        export_lora(policy, tmp_path / weights, weights=weights)
        plain = load(base)
        plain.load_lora_weights(tmp_path / weights)
        torch.testing.assert_close(output(network(plain), base), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(output(policy.denoiser, base), second)


def test_an_adapter_of_several_ranks_and_rank_stabilised_scale(base):
    from peft import LoraConfig

    transformer = network(load(base))
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_k"], rank_pattern={"to_k": 2}, alpha_pattern={"to_k": 3},
        use_rslora=True,
    )  # fmt: skip
    transformer.add_adapter(config, adapter_name="default")
    state, metadata = fold(transformer)
    layer = next(name for name, _ in transformer.named_modules() if name.endswith(("attn.to_k", "attn2.to_k")))
    kept = dict(transformer.named_modules())[layer]
    torch.nn.init.normal_(kept.lora_B["default"].weight)
    state, metadata = fold(transformer)
    torch.testing.assert_close(state[f"{layer}.lora_B.weight"], kept.lora_B["default"].weight * 3 / math.sqrt(2))
    assert metadata["r"] == metadata["lora_alpha"] == 4
    assert metadata["rank_pattern"] == metadata["alpha_pattern"] and metadata["rank_pattern"][layer] == 2


# ---- merged weights --------------------------------------------------------------------------------------------------


def test_merged_pipeline_equals_the_policy_and_leaves_it_alone(base, tmp_path):
    policy = trained(base)
    expected = output(policy.denoiser, base)
    before = {key: value.clone() for key, value in policy.denoiser.state_dict().items()}
    export_merged(policy, tmp_path / "merged")
    whole = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert type(whole) is type(policy.pipeline)
    torch.testing.assert_close(output(network(whole), base), expected, rtol=1e-5, atol=1e-5)
    assert not any("lora" in name for name, _ in network(whole).named_parameters())
    after = policy.denoiser.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(output(policy.denoiser, base), expected)


def test_merging_agrees_with_diffusers_fuse_and_unfuse_gives_the_base_back(base, tmp_path):
    policy, plain = trained(base), load(base)
    untouched = {key: value.clone() for key, value in network(plain).state_dict().items()}
    export_lora(policy, tmp_path)
    plain.load_lora_weights(tmp_path)
    plain.fuse_lora()
    fused = {
        key.replace(".base_layer", ""): value
        for key, value in network(plain).state_dict().items()
        if ".lora_" not in key
    }
    merged = merged_state(policy.denoiser)
    assert fused.keys() == merged.keys() == untouched.keys()
    for key in merged:
        torch.testing.assert_close(merged[key], fused[key], rtol=1e-5, atol=1e-5)
    plain.unfuse_lora()
    plain.unload_lora_weights()
    for key, value in network(plain).state_dict().items():
        torch.testing.assert_close(value, untouched[key], rtol=1e-5, atol=1e-5)


def test_full_fine_tuning_is_exported_whole(base, tmp_path):
    policy = PipelinePolicy(load(base), train="full")
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(0.01)
    with pytest.raises(UserError, match="no LoRA adapter"):
        export_lora(policy, tmp_path / "lora")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings()))
    export_policy(policy, tmp_path / "run", tmp_path / "out")
    whole = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(output(network(whole), base), output(policy.denoiser, base))


def test_without_text_encoders_the_network_alone_is_written(base, tmp_path):
    policy = trained(base)
    policy.drop_text_encoders()
    export_merged(policy, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [part(base)]
    plain = load(base)
    setattr(plain, part(base), type(network(plain)).from_pretrained(tmp_path, subfolder=part(base)))
    expected = output(policy.denoiser, base)
    torch.testing.assert_close(output(network(plain), base), expected, rtol=1e-5, atol=1e-5)


def test_merging_refuses_what_is_no_plain_lora(base):
    from peft import LoraConfig

    transformer = network(load(base))
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], use_dora=True), adapter_name="default")
    with pytest.raises(UserError, match="is a DoRA"):
        merged_state(transformer)
    assert fold(transformer)[1]["use_dora"] is True


# ---- strength --------------------------------------------------------------------------------------------------------


def test_strength_zero_is_the_base_and_one_the_policy(base):
    policy, plain = trained(base), load(base)
    expected = output(policy.denoiser, base)
    with lora_strength(policy, 0.0):
        torch.testing.assert_close(output(policy.denoiser, base), output(network(plain), base))
    with lora_strength(policy, 1.0):
        assert torch.equal(output(policy.denoiser, base), expected)
    assert torch.equal(output(policy.denoiser, base), expected)


def test_strength_agrees_with_diffusers_adapter_weights(base, tmp_path):
    policy, plain = trained(base), load(base)
    export_lora(policy, tmp_path)
    plain.load_lora_weights(tmp_path, adapter_name="flowrl")
    plain.set_adapters("flowrl", 0.5)
    with lora_strength(policy, 0.5):
        half = output(policy.denoiser, base)
    torch.testing.assert_close(output(network(plain), base), half, rtol=1e-5, atol=1e-5)


def test_strength_pictures_share_their_noise(base):
    policy = trained(base)
    small = SampleSettings(steps=2, height=16, width=16)
    rows = strength_pictures(policy, ["a red circle", "a cat"], small, (0.0, 1.0, 0.0))
    assert len(rows) == 2 and all(len(row) == 3 and row[0].shape == (3, 16, 16) for row in rows)
    for row in rows:
        assert torch.equal(row[0], row[2])
        assert not torch.equal(row[0], row[1])


# ---- the folder ------------------------------------------------------------------------------------------------------


def settings(path="tiny-sd3"):
    return {
        "method": "flow_grpo", "seed": 7, "output_dir": "runs/x", "updates": 60, "prompts_per_update": 8,
        "group_size": 16, "reward": {"shapes-soft": 1.0},
        "policy": {"path": path, "revision": None, "lora": {"rank": RANK, "alpha": ALPHA}},
        "rollout": {"steps": 8, "guidance": 1.0, "kernel": "flow", "level": 0.7},
        "eval": {"prompts": "shapes:test", "steps": 2, "guidance": 1.0, "height": 16, "width": 16},
    }  # fmt: skip


def test_a_run_is_exported_with_card_config_and_sheet(base, tmp_path):
    from fake_run import fake_run
    from PIL import Image

    run = fake_run(tmp_path / "run", updates=2, alarms=False)
    (run / "config.yaml").write_text(yaml.safe_dump(settings()))
    (run / "environment.json").write_text(
        json.dumps({"commit": "abc", "rewards": [{"name": "shapes-soft", "version": "1", "licence": "Apache-2.0"}]})
    )
    policy = trained(base)
    policy.copy_weights("current", "ema")
    randomise(policy, seed=5)
    out = export_policy(policy, run, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.yaml", "pytorch_lora_weights.safetensors", "strengths.png"
    }  # fmt: skip
    with policy.weights("ema"):
        expected = output(policy.denoiser, base)
    plain = load(base)
    plain.load_lora_weights(out)
    torch.testing.assert_close(output(network(plain), base), expected, rtol=1e-5, atol=1e-5)
    Image.open(out / "strengths.png").verify()

    card = (out / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "apache-2.0" and "lora" in yaml.safe_load(head)["tags"]
    facts = json.loads((run / "summary.json").read_text())["eval"]
    assert f"{facts['before']['shapes']['mean']:.3f} [" in text
    assert f"+{facts['paired']['shapes']['mean_diff']:.3f} [+" in text
    for part in (
        "moving average",
        "recommended weight | 1.0",
        "kernel `flow` at noise level 0.7",
        "flowrl train config.yaml",
        "tiny-clip (held-out judge)",
        "Reward shapes-soft (version 1): Apache-2.0",
        "(commit abc)",
        "seed 7",
    ):
        assert part in text, part


def test_card_of_a_run_without_numbers(tmp_path):
    from flowrl.card import write_card

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(settings("stabilityai/stable-diffusion-3.5-medium")))
    text = write_card(run, run, merged=True).read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["base_model"] == "stabilityai/stable-diffusion-3.5-medium"
    assert head["license_name"] == "stabilityai-ai-community"
    assert "Not evaluated." in text and "lora" not in head["tags"] and "pipe.transformer = type(" in text
    (run / "unet").mkdir()
    assert "pipe.unet = type(" in write_card(run, run, merged=True).read_text()
    (run / "config.yaml").write_text(yaml.safe_dump(settings("/home/someone/models/mine")))
    text = write_card(run, run, merged=True).read_text()
    assert "/home" not in text and "base_model" not in text and 'from_pretrained("PATH/TO/mine")' in text


def test_export_from_a_checkpoint(tmp_path):
    from flowrl.checkpoint import save_checkpoint
    from flowrl.config import parse_config, resolved_yaml
    from flowrl.export import export

    tiny_sd3(tmp_path / "parts").save_pretrained(tmp_path / "model")
    base = ("sd3", tmp_path / "model")
    policy = trained(base)
    policy.copy_weights("current", "ema")
    randomise(policy, seed=9)
    run = tmp_path / "run"
    run.mkdir()
    config = parse_config(
        {
            "output_dir": str(run), "updates": 3, "prompts_per_update": 2, "group_size": 2, "reward": "jpeg",
            "prompts": {"source": "shapes:train"}, "ema": {},
            "policy": {"path": str(tmp_path / "model"), "lora": {"rank": RANK, "alpha": ALPHA}},
        }
    )  # fmt: skip
    (run / "config.yaml").write_text(resolved_yaml(config))
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        export(run, tmp_path / "out")
    save_checkpoint(run / "checkpoints", 3, {f"weights/{k}": v for k, v in policy.named_states().items()}, {})
    export(run, tmp_path / "out", device="cpu")
    plain = load(base)
    plain.load_lora_weights(tmp_path / "out")
    with policy.weights("ema"):
        torch.testing.assert_close(output(network(plain), base), output(policy.denoiser, base), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="already exists"):
        export(run, tmp_path / "out")
    with pytest.raises(UserError, match="holds no config.yaml"):
        export(tmp_path / "parts", tmp_path / "other")
    export(run, tmp_path / "merged", merge=True, device="cpu")
    whole = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(output(network(whole), base), output(network(plain), base), rtol=1e-5, atol=1e-5)
    opened = open_policy(str(tmp_path / "merged"), device="cpu")  # its config.yaml does not make it a run
    assert torch.equal(output(opened.denoiser, base), output(network(whole), base))


def test_a_run_that_trained_all_weights_can_be_sampled(tmp_path):
    tiny_sd3(tmp_path / "parts").save_pretrained(tmp_path / "model")
    base, run = ("sd3", tmp_path / "model"), tmp_path / "run"
    policy = PipelinePolicy(load(base), train="full")
    randomise(policy, seed=2)
    policy.drop_text_encoders()  # as a run does: the export then holds the network alone
    run.mkdir()
    chosen = settings(str(tmp_path / "model"))
    chosen["policy"]["train"] = "full"
    (run / "config.yaml").write_text(yaml.safe_dump(chosen))
    export_policy(policy, run, run / "adapter", sheet=False)
    opened = open_policy(str(run), device="cpu")
    assert torch.equal(output(opened.denoiser, base), output(policy.denoiser, base))
