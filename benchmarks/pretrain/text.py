"""The words of the box: one word-level CLIP tokenizer, two small CLIP text encoders, and a T5 that says nothing."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from reward_models.shapes.grammar import COLOURS, NUMBERS, PHRASES, RELATIONS, SHAPES, plural

MAX_LENGTH = 16  # tokens; the longest prompt has 10 words, a start and an end
WIDTH = 64
START, END = "<|startoftext|>", "<|endoftext|>"


def words() -> list[str]:
    """Every word of the grammar, and a few that people type."""
    sources = [*PHRASES, *SHAPES, *map(plural, SHAPES), *COLOURS, *RELATIONS, *NUMBERS.values(), "a an and one the of"]
    return sorted({word for source in sources for word in source.split()})


def learn_merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges after which each of these words is one token, commonest pair first, ties by spelling.

    The `tokenizers` trainer breaks ties by the order of a hash map: another run would give the words other numbers.
    """
    pieces = {word: [*word[:-1], f"{word[-1]}</w>"] for word in vocabulary}
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for parts in pieces.values() for pair in zip(parts, parts[1:], strict=False)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for parts in pieces.values():
            for i in range(len(parts) - 2, -1, -1):
                if (parts[i], *parts[i + 1 : i + 2]) == best:
                    parts[i : i + 2] = ["".join(best)]
    return merges


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the grammar is one token; other words fall apart into characters."""
    folder.mkdir(parents=True, exist_ok=True)
    characters = sorted("abcdefghijklmnopqrstuvwxyz0123456789.,'-!?")
    merges = learn_merges(words())
    tokens = [*characters, *(f"{c}</w>" for c in characters), *("".join(pair) for pair in merges), START, END]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, "pad_token": END}
    settings |= {"bos_token": START, "eos_token": END, "unk_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def vocabulary_hash(tokenizer: CLIPTokenizer) -> str:
    """Of the number of every token: weights mean nothing under other numbers, so checkpoints keep it."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:12]


def text_config(tokenizer: CLIPTokenizer, layers: int = 3) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """(N, MAX_LENGTH) as the pipelines make them."""
    out = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
    return out.input_ids


class TextEncoders(nn.Module):
    """The two CLIP encoders of SD3: second-to-last hidden states side by side, and both projections."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.layers_1 = CLIPTextModelWithProjection(text_config(tokenizer))
        self.layers_2 = CLIPTextModelWithProjection(text_config(tokenizer))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (N, L) to hidden states (N, L, 2 WIDTH) and pooled (N, 2 WIDTH)."""
        outs = [encoder(ids, output_hidden_states=True) for encoder in (self.layers_1, self.layers_2)]
        return (
            torch.cat([out.hidden_states[-2] for out in outs], -1),
            torch.cat([out.text_embeds for out in outs], -1),
        )


def silent_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """A one-layer T5 whose last layer-norm weight is 0, so that its output is exactly 0: plain diffusers wants a third
    text encoder, and this one adds nothing."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    tokenizer.model_max_length = MAX_LENGTH
    config = T5Config(
        vocab_size=len(tokenizer), d_model=2 * WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same weights every time, though they say nothing
        model = T5EncoderModel(config)
    nn.init.zeros_(model.encoder.final_layer_norm.weight)
    return model, tokenizer
