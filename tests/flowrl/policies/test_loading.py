"""load_policy: what it accepts, and what it says otherwise."""

import json
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from flowrl.errors import UserError
from flowrl.policies import load_policy, loading
from flowrl.policies.loading import set_attention

PROMPTS = ["a photo of red circle", "two dog", "cat"]


@pytest.mark.parametrize("name", ["sd3", "flux", "sd3_no_t5"])
def test_a_saved_pipeline_loads_as_it_was(folders, make, batch, name):
    policy = load_policy(folders[name], train="none")
    x, s = batch(policy)
    expected = make(name, train="none")
    with torch.no_grad():
        mine = policy.predict(x, s, policy.encode(PROMPTS))
        assert torch.equal(mine, expected.predict(x, s, expected.encode(PROMPTS)))


def test_a_folder_that_never_heard_of_t5(folders, tmp_path):
    index = json.loads((folders["sd3_no_t5"] / "model_index.json").read_text())
    for part in folders["sd3_no_t5"].iterdir():
        (tmp_path / part.name).symlink_to(part) if part.name != "model_index.json" else None
    del index["text_encoder_3"], index["tokenizer_3"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert load_policy(tmp_path, train="none").encode(PROMPTS).rows["embeds"].shape == (3, 272, 32)


def test_options_arrive(folders, tmp_path):
    policy = load_policy(
        folders["sd3"], dtype="bfloat16", device="auto", gradient_checkpointing=True, cache_dir=tmp_path / "cache"
    )
    assert policy.dtype == torch.bfloat16 and policy.pipeline.transformer.gradient_checkpointing
    policy.encode(PROMPTS)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 4  # three prompts and the empty one
    full = load_policy(folders["sd3"], dtype="bfloat16", train="full")
    assert {p.dtype for p in full.pipeline.transformer.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "fp8"}, "dtype 'fp8'; expected one of float32, bfloat16, float16"),
        ({"quantize": "int4"}, "quantize 'int4'; expected one of None, int8, nf4"),
        ({"attention": "sage"}, "attention 'sage'; expected one of native, xformers, flash"),
        ({"train": "all"}, "train 'all'"),
        ({"device": "gpu"}, "device 'gpu'; expected 'auto', 'cpu', 'cuda'"),
        ({"device": "mps"}, "device 'mps'; expected 'auto', 'cpu', 'cuda'"),
        ({"attention": "xformers"}, "attention 'xformers' on device cpu; expected 'native'"),
        ({"quantize": "nf4"}, "quantize 'nf4' on device cpu; expected a CUDA device"),
        ({"quantize": "nf4", "train": "full"}, "quantised weights are fixed"),
    ],
)
def test_options_out_of_range(folders, arguments, message):
    with pytest.raises(UserError, match=message):
        load_policy(folders["sd3"], **arguments)


def test_cuda_where_there_is_none(folders, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="sees no CUDA device.*'cpu' or 'auto'"):
        load_policy(folders["sd3"], device="cuda")
    assert load_policy(folders["sd3"], device="auto", train="none").device.type == "cpu"


def test_wrong_places(folders, tmp_path):
    with pytest.raises(UserError, match="'./nothing/here', which does not exist"):
        load_policy("./nothing/here")
    with pytest.raises(UserError, match="without model_index.json.*'model_index.json'|without model_index.json"):
        load_policy(folders["sd3"] / "transformer")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    with pytest.raises(UserError, match="is a file.*from_single_file"):
        load_policy(file)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="unreadable.*JSON"):
        load_policy(tmp_path)


def test_a_misspelt_bundled_name(monkeypatch):
    monkeypatch.setattr(loading, "bundled", lambda: ["tiny-sd3"])
    with pytest.raises(UserError, match="'tiny-sd4'.*did you mean 'tiny-sd3'"):
        load_policy("tiny-sd4")


def test_unsupported_classes_name_the_supported(folders, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    with pytest.raises(
        UserError, match=r"'WanPipeline'; expected one of \['FluxPipeline', 'Latent.*, 'StableDiffusion3Pipeline', "
    ):
        load_policy(tmp_path)


def test_an_incomplete_folder(folders, tmp_path):
    for part in folders["sd3"].iterdir():
        if part.name != "transformer":
            (tmp_path / part.name).symlink_to(part)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text((folders["sd3"] / "transformer" / "config.json").read_text())
    with pytest.raises(UserError, match="missing or unreadable.*complete pipeline"):
        load_policy(tmp_path)


def _remove_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer")


def _cut_encoder_short(folder):
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def _change_width(folder):
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "in_channels": 8}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove_tokenizer, "without tokenizer; expected a complete pipeline folder"),
        (_cut_encoder_short, "missing or unreadable"),
        (_change_width, "missing or unreadable.*expected shape"),
    ],
)
def test_a_damaged_folder(folders, tmp_path, damage, message):
    copy = shutil.copytree(folders["sd3"], tmp_path / "copy")
    damage(copy)
    with pytest.raises(UserError, match=message):
        load_policy(copy)


def test_hub_failures_say_what_to_do(monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors as hub

    response = SimpleNamespace(status_code=401, headers={}, request=None)  # whichever client the hub library uses
    cases = {
        "accept the terms, then run `hf auth login`": hub.GatedRepoError("gated", response=response),
        "no such model on the hub": hub.RepositoryNotFoundError("missing", response=response),
        "revision 'v9'": hub.RevisionNotFoundError("revision", response=response),
        "not in the local hub cache": hub.LocalEntryNotFoundError("offline"),
        "has no model_index.json": hub.EntryNotFoundError("entry"),
        "expected a pipeline folder or a hub id": hub.HFValidationError("bad id"),
    }
    for message, error in cases.items():

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
        with pytest.raises(UserError, match=message) as caught:
            load_policy("owner/model", revision="v9")
        assert caught.value.__cause__ is error


def test_offline_mode_is_named(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set.*unset HF_HUB_OFFLINE"):
        load_policy("nobody/no-such-model")


def test_attention_switch_that_would_be_ignored(pipelines, make):
    with pytest.raises(UserError, match="SD3Transformer2DModel, which ignores diffusers' attention switch"):
        set_attention(make("sd3", train="none").pipeline.transformer, "xformers")


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_attention_package_that_is_absent(make):
    transformer = make("flux", train="none").pipeline.transformer
    with pytest.raises(UserError, match="'flash', which is not usable here.*pip install flash-attn"):
        set_attention(transformer, "flash")


def test_the_switch_of_a_class_that_has_one_is_used(make, monkeypatch):
    transformer, seen = make("flux", train="none").pipeline.transformer, []
    monkeypatch.setattr(transformer, "set_attention_backend", seen.append)
    set_attention(transformer, "xformers")
    assert seen == ["xformers"]
