import json
import threading

import pytest
import torch

from flowrl.errors import UserError
from flowrl.policies import Conditioning
from flowrl.policies.conditioning import EmbeddingCache


def some(n: int, free: float = 0.0) -> Conditioning:
    rows = {"embeds": torch.arange(n * 6.0).view(n, 2, 3), "pooled": torch.arange(n * 2.0).view(n, 2)}
    return Conditioning(rows, {"embeds": torch.full((1, 2, 3), free), "pooled": torch.full((1, 2), free)})


def test_rows_are_taken_by_tensor_slice_or_list():
    cond = some(4)
    assert len(cond) == 4
    for index in (torch.tensor([3, 0, 0]), [3, 0, 0]):
        part = cond[index]
        assert part.rows["pooled"].tolist() == [[6, 7], [0, 1], [0, 1]]
        assert part.uncond is cond.uncond
    assert cond[1:3].rows["pooled"].tolist() == [[2, 3], [4, 5]]


def test_cat_keeps_order_and_refuses_another_negative():
    cond = some(4)
    both = Conditioning.cat([cond[2:], some(4)[:1]])
    assert both.rows["pooled"].tolist() == [[4, 5], [6, 7], [0, 1]]
    with pytest.raises(ValueError, match="negative prompt"):
        Conditioning.cat([cond, some(2, free=1.0)])


def test_cache_returns_what_was_put(tmp_path):
    cache = EmbeddingCache(tmp_path, "encoder")
    rows = {"embeds": torch.randn(1, 2, 3).to(torch.bfloat16), "pooled": torch.randn(1, 2)}
    assert cache.get("a cat") is None
    cache.put("a cat", rows)
    again = EmbeddingCache(tmp_path, "encoder").get("a cat")
    assert all(torch.equal(again[key], rows[key]) and again[key].dtype == rows[key].dtype for key in rows)
    assert cache.get("a cat ") is None and EmbeddingCache(tmp_path, "other").get("a cat") is None


def test_cache_writers_meet_without_harm(tmp_path):
    cache = EmbeddingCache(tmp_path, "encoder")
    rows = {"pooled": torch.ones(1, 50_000)}
    threads = [threading.Thread(target=cache.put, args=("a cat", rows)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(cache.get("a cat")["pooled"], rows["pooled"])
    assert [file.suffix for file in tmp_path.rglob("*") if file.is_file()] == [".safetensors"]


def test_a_damaged_cache_file_is_reported_and_made_again(make, tmp_path, caplog):
    policy = make("sd3", train="none", cache_dir=tmp_path)
    fresh = policy.encode(["two cat"])
    path = policy._open_cache().path("two cat")
    path.write_bytes(path.read_bytes()[:-7])
    again = policy.encode(["two cat"])
    assert "damaged" in caplog.text
    assert all(torch.equal(again.rows[key], fresh.rows[key]) for key in fresh.rows)
    assert policy._open_cache().get("two cat") is not None


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_cached_prompts_need_no_text_encoder(make, tmp_path, name):
    policy = make(name, train="none", cache_dir=tmp_path)
    before = policy.memory()["text_encoders"]
    fresh = policy.encode(["two cat", "red star"])
    policy.drop_text_encoders()
    assert before > 0 and policy.memory()["text_encoders"] == 0 and not policy.has_text_encoders
    cached = policy.encode(["red star", "two cat"])
    assert all(torch.equal(cached.rows[key], fresh.rows[key][[1, 0]]) for key in fresh.rows)
    with pytest.raises(UserError, match="'blue dog'.*embedding cache"):
        policy.encode(["two cat", "blue dog"])


def test_cache_knows_weights_tokenizers_and_settings(make, tmp_path):
    def key(**arguments):
        change = arguments.pop("change", lambda pipeline: None)
        policy = make("sd3", train="none", cache_dir=tmp_path, **arguments)
        change(policy.pipeline)
        return policy._open_cache().encoder

    def weights(pipeline):
        next(iter(pipeline.text_encoder_2.parameters())).data.view(-1)[0] += 1e-3

    def words(pipeline):
        text = json.loads(pipeline.tokenizer.backend_tokenizer.to_str())
        vocabulary = text["model"]["vocab"]
        vocabulary["cat</w>"], vocabulary["dog</w>"] = vocabulary["dog</w>"], vocabulary["cat</w>"]
        pipeline.tokenizer._tokenizer = type(pipeline.tokenizer.backend_tokenizer).from_str(json.dumps(text))

    assert key() == key()
    others = [key(change=weights), key(change=words), key(max_sequence_length=7)]
    assert len({key(), *others}) == 4


def test_prompts_must_be_a_list(make):
    with pytest.raises(UserError, match="non-empty list"):
        make("sd3", train="none").encode("a cat")
