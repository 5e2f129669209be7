"""Finding, checking, converting and loading weights."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from reward_models import weights


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "flowrl" / "weights"


@pytest.fixture
def state():
    return {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([1.0, 2.0])}


def test_a_pickle_is_converted_once_and_what_is_no_tensor_is_dropped(state, tmp_path, cache, monkeypatch):
    file = tmp_path / "model.pt"
    shared = state["weight"].T  # neither contiguous nor with memory of its own: safetensors refuses such tensors
    torch.save({"epoch": 3, "state_dict": state | {"again": shared, "note": "text"}}, file)
    got, digest = weights.read(file)
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert set(got) == {"weight", "bias", "again"} and torch.equal(got["again"], shared)
    assert [f.name for f in cache.iterdir()] == [f"{digest}.safetensors"]

    def refuse(*args, **kwargs):
        raise AssertionError("read again")

    monkeypatch.setattr(torch, "load", refuse)
    assert torch.equal(weights.read(file)[0]["weight"], state["weight"])


def test_code_in_a_pickle_is_not_run(tmp_path, cache):
    ran = tmp_path / "ran"

    class Bad:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    for name, write in (("a.pt", torch.save), ("b.bin", lambda x, f: f.write_bytes(pickle.dumps(x)))):
        write({"weight": Bad()}, tmp_path / name)
        with pytest.raises(ValueError, match="weights_only"):
            weights.read(tmp_path / name)
    assert not ran.exists() and not list(cache.iterdir())


def test_half_a_file_is_an_error_and_leaves_nothing(state, tmp_path, cache):
    torch.save(state, tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:400])
    with pytest.raises(ValueError, match="Fetch the file again"):
        weights.read(tmp_path / "half.pt")
    assert not list(cache.iterdir())


def test_files_without_tensors_and_of_other_kinds_are_named(tmp_path):
    torch.save({"a": 1}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="without tensors"):
        weights.read(tmp_path / "empty.pt")
    (tmp_path / "x.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"expected \.safetensors"):
        weights.read(tmp_path / "x.onnx")


def test_a_file_with_a_published_name_must_be_the_published_one(state, tmp_path):
    name = weights.OFFICIAL["aesthetic"].path.rpartition("/")[2]
    torch.save(state, tmp_path / name)
    with pytest.raises(ValueError, match="21dd590f3ccdc646"):
        weights.read(tmp_path / name)
    (tmp_path / name).rename(tmp_path / "mine.pth")
    assert set(weights.read(tmp_path / "mine.pth")[0]) == {"weight", "bias"}


@pytest.mark.parametrize("name", ["HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt", "ImageReward.pt"])
def test_single_files_of_the_hub_are_checked_by_name(state, tmp_path, name):
    torch.save(state, tmp_path / name)
    with pytest.raises(ValueError, match="expected the published file"):
        weights.read(tmp_path / name)


def test_published_hashes_are_whole_or_unknown():
    for official in weights.OFFICIAL.values():
        assert official.sha256 is None or len(bytes.fromhex(official.sha256)) == 32
        assert official.licence and [f.name for f in dataclasses.fields(official)] == ["path", "licence", "sha256"]


def test_every_tensor_of_the_model_must_be_filled(state):
    model = nn.Linear(3, 2)
    weights.fill(model, state | {"more": torch.ones(1)}, "file")
    assert torch.equal(model.weight, state["weight"]) and torch.equal(model.bias, state["bias"])
    with pytest.raises(ValueError, match=r"lack 1 of 2 tensors \(bias\)"):
        weights.fill(model, {"weight": state["weight"]}, "file")
    with pytest.raises(ValueError, match=r"bias \(3,\) for \(2,\)"):
        weights.fill(model, state | {"bias": torch.ones(3)}, "file")


def test_offline_and_absent_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE.*hf download no/such-model"):
        weights.locate_folder("no/such-model", ["*.json"])
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE.*hf download no/such-model w\.pt"):
        weights.locate_file("no/such-model:w.pt")
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE.*curl"):
        weights.locate_file(weights.OFFICIAL["aesthetic"].path)
    with pytest.raises(ValueError, match="unknown hash"):
        weights.locate_file("https://example.com/w.pt")
    for wrong in ("w.pt", "no/such-model", tmp_path):
        with pytest.raises(ValueError, match="no file here"):
            weights.locate_file(wrong)
    for wrong in ("folder", "a/b:c"):
        with pytest.raises(ValueError, match="no folder here"):
            weights.locate_folder(wrong, ["*"])


def test_a_repository_without_safetensors_gives_its_pickle(state, tmp_path, monkeypatch):
    asked = []

    def snapshot(repo, allow_patterns):
        asked.append(list(allow_patterns))
        folder = tmp_path / repo.replace("/", "--")
        folder.mkdir(exist_ok=True)
        name = "model.safetensors" if repo == "some/new" else weights.OLD_WEIGHTS
        if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
            (folder / name).touch()
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    wanted = ["*.json", "model*.safetensors"]
    assert (weights.locate_folder("some/new", wanted) / "model.safetensors").is_file()
    assert asked == [wanted]
    assert (weights.locate_folder("some/old", wanted) / "pytorch_model.bin").is_file()
    assert not (weights.locate_folder("some/tokenizer", ["*.json"]) / "pytorch_model.bin").exists()
    assert len(asked) == 4


def test_local_files_win(state, tmp_path, cache):
    save_file(state, tmp_path / "w.safetensors")
    assert weights.locate_file(tmp_path / "w.safetensors") == tmp_path / "w.safetensors"
    assert weights.locate_folder(tmp_path, ["*.json"]) == tmp_path
    got, _ = weights.read(tmp_path / "w.safetensors")
    assert torch.equal(got["bias"], load_file(tmp_path / "w.safetensors")["bias"])


def test_a_transformers_folder_that_does_not_fill_its_model_is_refused(tmp_path):
    from tiny_scorers import clip_folder
    from transformers import CLIPModel

    folder = clip_folder(tmp_path / "clip")
    model, digest = weights.pretrained(CLIPModel, folder)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert digest == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    state = load_file(folder / "model.safetensors")

    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    again, other = weights.pretrained(CLIPModel, folder)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert other == hashlib.sha256((folder / "pytorch_model.bin").read_bytes()).hexdigest()

    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="without a .safetensors file"):
        weights.pretrained(CLIPModel, folder)
    del state["visual_projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"visual_projection\.weight"):
        weights.pretrained(CLIPModel, folder)
