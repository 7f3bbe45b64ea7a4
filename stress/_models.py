"""Small models that the scripts of this folder build in memory, and their common command line."""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from hooks import HookedModel, Site, Transcoder

WORDS = ["<end>", "<unk>", *(f"w{i}" for i in range(62))]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token is a word."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="<unk>")


def transcoder(layer: int, d_model: int, *, features: int = 24, k: int = 6) -> Transcoder:
    """Random weights; it reads and writes the stream in front of a block."""
    generator = torch.Generator().manual_seed(layer)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / d_model**0.5

    weights = draw(features, d_model), draw(features), draw(features, d_model), draw(d_model)
    site = Site("resid_pre", layer)
    return Transcoder(layer, site, site, *weights, None, None, 1e-5, k)


def small_model(layers: int = 3, d_model: int = 24) -> HookedModel:
    """A random Qwen2 with a transcoder for each layer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=d_model,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=None,
    )
    sets = [transcoder(layer, d_model) for layer in range(layers)]
    return HookedModel.from_model(Qwen2ForCausalLM(config).eval(), word_tokenizer(), sets)


def main(measure: Callable[..., dict[str, Any]], what: str, count: int) -> int:
    """The command line of a script: `--count`, `--seed`, `--json`; the exit status is 1 if anything failed."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    asked = parser.parse_args()
    found = measure(asked.count, asked.seed)
    print(json.dumps(found, indent=None if asked.json else 2))
    return int(bool(found["failed"]))
