"""Weight sets, LoRA, full fine-tuning."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowrl.errors import UserError
from flowrl.policies import LoraSettings
from flowrl.policies.weights import WeightSets

PROMPTS = ["a photo of red circle", "two dog", "cat"]


def stir(policy, seed: int = 0, scale: float = 0.3):
    """Move every trainable weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def velocity(policy, batch, name: str = "current"):
    x, s = batch(policy)
    cond = policy.encode(PROMPTS)
    with policy.weights(name):
        return policy.predict(x, s, cond)


def sets(**values: float) -> WeightSets:
    weights = WeightSets({"w": torch.nn.Parameter(torch.tensor([0.0]))})
    with torch.no_grad():
        for name, value in values.items():
            weights.current["w"].fill_(value)
            weights.copy("current", name)
        weights.current["w"].fill_(1.0)
    return weights


def test_blocks_nest_and_put_back_what_they_found():
    weights = sets(old=2.0, ema=3.0)
    w = weights.current["w"]
    with weights.use("old"):
        assert w.item() == 2
        with weights.use("ema"):
            assert w.item() == 3
            with weights.use("current"):
                assert w.item() == 1
            assert w.item() == 3
        with pytest.raises(RuntimeError, match="boom"), weights.use("ema"):
            raise RuntimeError("boom")
        assert w.item() == 2
    assert w.item() == 1 and weights.sets["old"]["w"].item() == 2 and weights.sets["ema"]["w"].item() == 3


def test_copy_blends_by_decay():
    weights = sets(ema=3.0)
    with torch.no_grad():
        weights.copy("current", "ema", decay=0.9)  # 0.9 * 3 + 0.1 * 1
    assert weights.sets["ema"]["w"].item() == pytest.approx(2.8, abs=1e-6)
    with torch.no_grad():
        weights.copy("ema", "current")
        weights.copy("current", "pool/3", decay=0.9)  # a missing set starts as a copy
    assert weights.current["w"].item() == weights.sets["pool/3"]["w"].item() == pytest.approx(2.8, abs=1e-6)
    with pytest.raises(ValueError, match="decay"):
        weights.copy("current", "ema", decay=1.1)


def test_a_kept_graph_still_differentiates_the_live_weights():
    weights = sets(old=5.0)
    w = weights.current["w"]
    loss = (w * w).sum()
    with weights.use("old"), torch.no_grad():
        assert (w * w).sum().item() == 25
    loss.backward()
    assert w.grad.item() == 2


def test_unknown_and_misused_sets_are_refused():
    weights = sets(old=2.0)
    with pytest.raises(UserError, match=r"'olf'.*'current', 'old'"), weights.use("olf"):
        pass
    with weights.use("old"):
        for action in (lambda: weights.copy("old", "ema"), weights.states):
            with pytest.raises(RuntimeError, match="while 'old' was in use"):
                action()
        with pytest.raises(UserError), weights.use("ema"):
            pass
        assert weights.current["w"].item() == 2


def test_states_round_trip_and_misfits_change_nothing():
    weights = sets(**{"old": 2.0, "pool/3": 7.0})
    saved = {key: value.clone() for key, value in weights.states().items()}
    assert saved.keys() == {"current/w", "old/w", "pool/3/w"}
    fresh = sets()
    with torch.no_grad():
        fresh.load(saved)
    assert {key: value.item() for key, value in fresh.states().items()} == {"current/w": 1, "old/w": 2, "pool/3/w": 7}
    for bad in ({"current/w": torch.zeros(2)}, {"current/u": torch.zeros(1)}, {"old/w": torch.zeros(1)}, {}):
        with pytest.raises(UserError):
            fresh.load(bad)
        assert fresh.current["w"].item() == 1


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_fresh_adapter_changes_nothing_and_the_reference_is_the_base(make, batch, name):
    base, policy = make(name, train="none"), make(name)
    expected = velocity(base, batch)
    assert torch.equal(velocity(policy, batch), expected)
    stir(policy)
    moved = velocity(policy, batch)
    assert not torch.allclose(moved, expected, atol=1e-3)
    assert torch.equal(velocity(policy, batch, "reference"), expected)
    assert torch.equal(velocity(policy, batch), moved)


def test_old_ema_and_a_moved_reference(make, batch):
    policy = make("sd3")
    stir(policy, 1)
    policy.copy_weights("current", "old")
    old = velocity(policy, batch)
    stir(policy, 2)
    policy.copy_weights("current", "ema")
    assert torch.equal(velocity(policy, batch, "old"), old)
    with policy.weights("old"):
        assert torch.equal(velocity(policy, batch, "reference"), velocity(make("sd3", train="none"), batch))
        assert torch.equal(velocity(policy, batch, "current"), velocity(policy, batch, "ema"))
        assert torch.equal(velocity(policy, batch, "old"), old)
    policy.copy_weights("old", "reference")
    assert torch.equal(velocity(policy, batch, "reference"), old)
    assert {key.split("/")[0] for key in policy.named_states()} == {"current", "old", "ema", "reference"}


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_published_targets(make, name):
    layers = {key.split(".lora_")[0].split(".", 2)[-1] for key, _ in make(name).trainable()}
    attention = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    expected = {f"attn.{layer}" for layer in attention}
    if name == "flux":
        expected |= {"ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"}
    assert layers == expected


def test_adapter_shape_scale_and_seed(make, batch):
    policies = [make("sd3", lora=LoraSettings(rank=3, alpha=12, seed=seed)) for seed in (0, 0, 1)]
    torch.manual_seed(99)
    first = dict(policies[0].trainable())
    for key, parameter in first.items():
        assert parameter.shape[0 if "lora_A" in key else 1] == 3
        assert ("lora_A" in key) == bool(parameter.any())
    assert all(torch.equal(p, first[key]) for key, p in policies[1].trainable())
    assert not all(torch.equal(p, first[key]) for key, p in policies[2].trainable())
    # W + (alpha / rank) B A, with the layer's own weight
    layer = policies[0].pipeline.transformer.transformer_blocks[0].attn.to_q
    stir(policies[0])
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(5, 16)
    expected = x @ (layer.weight + 12 / 3 * b @ a).T + layer.bias
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_lora_mistakes(make):
    with pytest.raises(UserError, match="'attn.to_g'.*'attn.to_q'"):
        make("sd3", lora=LoraSettings(targets=("attn.to_g",)))
    with pytest.raises(UserError, match="rank 0"):
        make("sd3", lora=LoraSettings(rank=0))
    with pytest.raises(UserError, match="'pissa'.*gaussian"):
        make("sd3", lora=LoraSettings(init="pissa"))
    with pytest.raises(UserError, match="train 'half'"):
        make("sd3", train="half")
    with pytest.raises(UserError, match="train 'full'.*fuse"):
        make("sd3", train="full", lora=LoraSettings(source="x.safetensors"))


@pytest.fixture(params=["sd3", "flux"])
def saved_lora(request, make, batch, tmp_path):
    """(name, trained policy, its velocity, folder with the adapter in diffusers' layout): alpha != rank."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    policy = make(request.param, lora=LoraSettings(rank=2, alpha=6))
    stir(policy)
    transformer = policy.pipeline.transformer
    policy.pipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=get_peft_model_state_dict(transformer),
        **_collate_lora_metadata({"transformer": transformer}),
    )  # fmt: skip
    return request.param, policy, velocity(policy, batch), tmp_path


@pytest.mark.parametrize("as_file", [False, True])
def test_start_from_a_diffusers_lora(saved_lora, make, batch, as_file):
    name, _, expected, folder = saved_lora
    source = folder / "pytorch_lora_weights.safetensors" if as_file else folder
    policy = make(name, lora=LoraSettings(source=str(source)))
    assert torch.equal(velocity(policy, batch), expected)
    assert torch.equal(velocity(policy, batch, "reference"), velocity(make(name, train="none"), batch))
    assert policy.trainable() and all(p.requires_grad for _, p in policy.trainable())
    frozen = make(name, train="none", lora=LoraSettings(source=str(source)))
    assert torch.equal(velocity(frozen, batch), expected) and not frozen.trainable()
    velocity(frozen, batch, "reference")
    assert not any(p.requires_grad for p in frozen.pipeline.transformer.parameters())


def test_start_from_a_peft_folder(saved_lora, make, batch, tmp_path):
    name, policy, expected, folder = saved_lora
    state = load_file(folder / "pytorch_lora_weights.safetensors")
    peft = tmp_path / "peft"
    peft.mkdir()
    save_file(
        {k.replace("transformer.", "base_model.model.", 1): v for k, v in state.items()},
        peft / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": list(policy.backbone.lora_targets)}
    (peft / "adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(velocity(make(name, lora=LoraSettings(source=str(peft))), batch), expected)


def test_start_from_a_flux_lora_with_alphas(make, batch, tmp_path):
    """kohya's layout: keys with underscores, lora_down/lora_up and an alpha tensor per layer; scale alpha / rank."""
    lora = LoraSettings(rank=2, alpha=1, targets=("ff.net.2", "attn.to_out.0"))
    policy = make("flux", lora=lora)
    stir(policy)
    names = {"ff.net.2": "img_mlp_2", "attn.to_out.0": "img_attn_proj"}
    state = {}
    for key, value in policy.trainable():
        layer, _, half = key.removeprefix("transformer_blocks.0.").partition(".lora_")
        if layer not in names or not key.startswith("transformer_blocks.0"):
            continue
        kohya = f"lora_unet_double_blocks_0_{names[layer]}"
        state[f"{kohya}.lora_{'down' if half[0] == 'A' else 'up'}.weight"] = value.detach().clone()
        state[f"{kohya}.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "kohya.safetensors")
    loaded = make("flux", lora=LoraSettings(source=str(tmp_path / "kohya.safetensors")))
    torch.testing.assert_close(velocity(loaded, batch), velocity(policy, batch), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(velocity(loaded, batch), velocity(loaded, batch, "reference"), atol=1e-3)


def test_unusable_lora_files(saved_lora, make, tmp_path):
    name, _, _, folder = saved_lora
    state = load_file(folder / "pytorch_lora_weights.safetensors")

    def attempt(tensors):
        save_file(tensors, tmp_path / "bad.safetensors")
        make(name, lora=LoraSettings(source=str(tmp_path / "bad.safetensors")))

    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="0 safetensors files in it"):
        make(name, lora=LoraSettings(source=str(tmp_path / "empty")))
    with pytest.raises(UserError, match="does not exist.*hub id"):
        make(name, lora=LoraSettings(source=str(tmp_path / "none.safetensors")))
    with pytest.raises(UserError, match="holds no layer of a transformer"):
        attempt({key.replace("transformer.", "unet.", 1): value for key, value in state.items()})
    with pytest.raises(UserError, match="does not exist or has another shape"):
        attempt({key: torch.cat([value, value], dim=1) if "lora_A" in key else value for key, value in state.items()})
    with pytest.raises(UserError, match=r"also changes \['text_encoder'\]"):
        key, value = next(iter(state.items()))
        attempt(state | {key.replace("transformer.", "text_encoder.", 1): value.clone()})
    (tmp_path / "cut.safetensors").write_bytes((folder / "pytorch_lora_weights.safetensors").read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        make(name, lora=LoraSettings(source=str(tmp_path / "cut.safetensors")))


def test_full_fine_tuning_keeps_a_frozen_copy_and_says_so(make, batch, caplog):
    caplog.set_level("INFO")
    policy = make("sd3", train="full", dtype="bfloat16")
    count = sum(p.numel() for p in policy.pipeline.transformer.parameters())
    assert sum(p.numel() for _, p in policy.trainable()) == count
    assert all(p.dtype == torch.float32 for _, p in policy.trainable())
    assert policy.memory()["set:reference"] == policy.memory()["trainable"] == 4 * count
    assert "frozen float32 copy" in caplog.text
    before = velocity(policy, batch)
    stir(policy, scale=0.05)
    assert not torch.equal(velocity(policy, batch), before)
    assert torch.equal(velocity(policy, batch, "reference"), before)
    assert {key.split("/")[0] for key in policy.named_states()} == {"current"}
    policy.copy_weights("current", "reference")  # a reference that moved must be saved
    assert {key.split("/")[0] for key in policy.named_states()} == {"current", "reference"}


def test_full_fine_tuning_without_a_reference(make):
    policy = make("sd3", train="full", reference=False)
    assert policy.memory().keys() == {"transformer", "vae", "text_encoders", "trainable"}
    with pytest.raises(UserError, match="'reference'"), policy.weights("reference"):
        pass


@pytest.mark.parametrize(("name", "train"), [("sd3", "lora"), ("sd3", "full"), ("flux", "lora")])
def test_checkpointed_gradients_are_the_plain_ones(make, batch, name, train):
    grads = []
    for checkpointing in (False, True):
        policy = make(name, train=train, gradient_checkpointing=checkpointing)
        stir(policy, scale=0.05)
        x, s = batch(policy)
        policy.predict(x, s, policy.encode(PROMPTS)).square().mean().backward()
        grads.append({key: p.grad for key, p in policy.trainable()})
        frozen = [p for p in policy.pipeline.transformer.parameters() if not p.requires_grad]
        assert all(p.grad is None for p in frozen)
    assert policy.pipeline.transformer.gradient_checkpointing
    missing = [key for key in grads[0] if grads[0][key] is None]
    assert not missing or all("norm" in key or "pos_embed" in key for key in missing)
    for key, grad in grads[0].items():
        if grad is not None:
            torch.testing.assert_close(grads[1][key], grad, atol=1e-7, rtol=1e-5)


def test_checkpointing_in_bfloat16_on_a_cpu(make, batch):
    grads = []
    for checkpointing in (False, True):
        policy = make("sd3", dtype="bfloat16", gradient_checkpointing=checkpointing)
        stir(policy, scale=0.05)
        x, s = batch(policy)
        policy.predict(x, s, policy.encode(PROMPTS)).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for _, p in policy.trainable() if p.grad is not None]))
    # another attention kernel: the same up to bfloat16
    assert torch.cosine_similarity(*grads, dim=0) > 0.99


def test_nothing_random_inside_the_network(make, batch):
    policy = make("sd3_t5")
    assert not any(module.training for module in policy.pipeline.transformer.modules())
    assert not any(module.training for module in policy.pipeline.text_encoder_3.modules())
    torch.manual_seed(0)
    first = velocity(policy, batch)
    torch.manual_seed(1)
    assert torch.equal(velocity(policy, batch), first)
