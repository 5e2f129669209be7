"""The words of the box: one word-level CLIP tokenizer, two small CLIP text encoders, and a T5 that says nothing."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import BpeTrainer
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


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the grammar is one token; other words fall apart into characters."""
    folder.mkdir(parents=True, exist_ok=True)
    learner = Tokenizer(BPE(unk_token=END, end_of_word_suffix="</w>"))
    learner.pre_tokenizer = Whitespace()
    alphabet = list("abcdefghijklmnopqrstuvwxyz0123456789.,'-!?")
    trainer = BpeTrainer(
        vocab_size=4096, show_progress=False, initial_alphabet=alphabet, end_of_word_suffix="</w>", min_frequency=1
    )
    learner.train_from_iterator([" ".join(words() + alphabet)], trainer)
    model = json.loads(learner.to_str())["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].get) + [START, END]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}, ensure_ascii=False))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, "pad_token": END}
    settings |= {"bos_token": START, "eos_token": END, "unk_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


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
    model = T5EncoderModel(config)
    nn.init.zeros_(model.encoder.final_layer_norm.weight)
    return model, tokenizer
