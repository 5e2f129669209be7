"""Quantised bases. diffusers quantises on a GPU only, so here its check is lifted and bitsandbytes' CPU kernels run."""

import pytest
import torch

from flowrl.errors import UserError
from flowrl.policies import LoraSettings, PipelinePolicy, loading

pytest.importorskip("bitsandbytes")
PROMPTS = ["a photo of red circle", "two dog", "cat"]


@pytest.fixture
def quantised(folders, monkeypatch):
    """quantised(name, kind) -> a policy on a quantised transformer, on the CPU."""
    import bitsandbytes.nn.modules
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    # the CPU kernel for packed weights takes only layers of certain sizes, larger than these
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    for kind in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(kind, "validate_environment", lambda self, *args, **kwargs: None)
        monkeypatch.setattr(kind, "update_device_map", lambda self, device_map: {"": "cpu"})

    def load(name: str, quantize: str, **arguments) -> PipelinePolicy:
        index = loading.model_index(str(folders[name]), None)
        pipeline = loading._load_pipeline(str(folders[name]), index, torch.float32, quantize, None, "lora")
        return PipelinePolicy(pipeline, **arguments)

    return load


@pytest.mark.parametrize(
    ("name", "quantize", "bound"), [("sd3", "int8", 0.1), ("sd3", "nf4", 0.5), ("flux", "nf4", 0.5)]
)
def test_a_quantised_base_trains_its_adapter(quantised, make, batch, name, quantize, bound):
    policy, exact = quantised(name, quantize, lora=LoraSettings(rank=2)), make(name, train="none")
    stored = policy.pipeline.transformer.transformer_blocks[0].attn.to_q.base_layer.weight
    assert stored.dtype == {"int8": torch.int8, "nf4": torch.uint8}[quantize]
    x, s = batch(policy)
    cond = policy.encode(PROMPTS)
    with torch.no_grad():
        base, expected = policy.predict(x, s, cond), exact.predict(x, s, cond)
        assert 0 < (base - expected).abs().mean() < bound * expected.abs().mean()
        with policy.weights("reference"):
            assert torch.equal(policy.predict(x, s, cond), base)
    policy.predict(x, s, cond).square().mean().backward()
    grads = {key: p.grad for key, p in policy.trainable()}
    assert all(torch.isfinite(grad).all() and grad.dtype == torch.float32 for grad in grads.values())
    assert any(grad.any() for key, grad in grads.items() if "lora_B" in key)


def test_a_quantised_base_cannot_be_trained_itself(quantised):
    with pytest.raises(UserError, match="quantised weights are fixed"):
        quantised("sd3", "nf4", train="full")
