"""Unsteered generation against transformers: random small models, random generation configs, token for token.

Each case is a model (Qwen2, Qwen3, Llama, Mistral; windows shorter and longer than the prompt; SDPA in fp32 and fp64,
eager in fp32), a generation_config with a few random fields, and prompts of several lengths. Every row of our batch, a
stream, a session in pieces and, if the model is supported, a decoder with a static cache must generate the same tokens
as `hf.generate(do_sample=False)` on that prompt alone. Then the scores from which sampling draws must equal
transformers' scores, number by number.

    python stress/generation.py --json [--count N] [--seed S]
"""

import argparse
import json
import random
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    WatermarkingConfig,
)
from transformers.utils import logging

from hooks import HookedModel, Sampling, Site, Transcoder
from hooks.generation.fast import FastDecoder
from hooks.generation.generation_config import Processing

ARCHITECTURES: Mapping[str, tuple[Any, Any]] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
VOCAB, NEW, END = 48, 9, 1


@dataclass(frozen=True)
class Case:
    """A model with a generation_config, and prompts."""

    name: str
    model: HookedModel
    prompts: tuple[tuple[int, ...], ...]

    @property
    def hf(self) -> Any:
        """The transformers model."""
        return self.model.host.model


def tokenizer() -> PreTrainedTokenizerFast:
    """One word per token; the second is the end."""
    words = {"<unk>": 0, "<end>": END, **{f"w{i}": i for i in range(2, VOCAB - 1)}}
    words["abcdef"] = VOCAB - 1  # transformers reads a vocabulary behind this prefix when it looks for stop strings
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<end>", pad_token="<end>")


def random_model(draw: random.Random) -> tuple[str, Any]:
    """A small model with weights wide enough that no two logits are near each other."""
    name = draw.choice(list(ARCHITECTURES))
    config, kind = ARCHITECTURES[name]
    options: dict[str, Any] = {}
    if name in ("qwen2", "qwen3") and draw.random() < 0.5:
        options = {"use_sliding_window": True, "sliding_window": draw.choice([3, 5, 64])}
        options["max_window_layers"] = draw.choice([0, 1])
    if name == "mistral":
        options = {"sliding_window": draw.choice([None, 3, 5, 64])}
    torch.manual_seed(draw.randrange(1 << 30))
    made = config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4, head_dim=8,
        tie_word_embeddings=draw.random() < 0.5, bos_token_id=0, eos_token_id=END, pad_token_id=END,
        attn_implementation=draw.choice(["sdpa", "eager"]), **options,
    )  # fmt: skip
    # transformers' eager attention gives NaN at padding in fp64
    wide = made._attn_implementation == "sdpa" and draw.random() < 0.5
    model = kind(made).to(torch.float64 if wide else torch.float32).eval()
    return f"{name} {options} {made._attn_implementation} {model.dtype}", model


def random_fields(draw: random.Random) -> dict[str, Any]:
    """A few fields of a generation_config."""

    def ids(count: int) -> list[int]:
        return draw.sample(range(2, VOCAB), count)

    fields: dict[str, Callable[[], Any]] = {
        "repetition_penalty": lambda: draw.choice([0.7, 1.05, 1.3, 2.0, 5.0]),
        "encoder_repetition_penalty": lambda: draw.choice([0.5, 2.0]),
        "no_repeat_ngram_size": lambda: draw.choice([1, 2, 3]),
        "encoder_no_repeat_ngram_size": lambda: draw.choice([1, 2]),
        "bad_words_ids": lambda: [ids(1), ids(1), ids(2), ids(3)],
        "sequence_bias": lambda: [[ids(1), 9.0], [ids(2), -7.0], [ids(2), 12.0]],
        "suppress_tokens": lambda: ids(draw.choice([1, 12, 40])),
        "begin_suppress_tokens": lambda: ids(12),
        "min_length": lambda: draw.choice([3, 9, 14]),
        "min_new_tokens": lambda: draw.choice([1, 4, NEW]),
        "forced_bos_token_id": lambda: draw.randrange(2, VOCAB),
        "forced_eos_token_id": lambda: draw.choice([END, [END, 5]]),
        "exponential_decay_length_penalty": lambda: (draw.choice([1, 4]), draw.choice([1.1, 2.0])),
        "remove_invalid_values": lambda: True,
        "renormalize_logits": lambda: True,
        "watermarking_config": lambda: WatermarkingConfig(
            bias=draw.choice([1.0, 5.0]), seeding_scheme=draw.choice(["lefthash", "selfhash"])
        ),
        "stop_strings": lambda: draw.choice([f"w{draw.randrange(2, 10)}", ["w11", f"{draw.randrange(2, 10)}"]]),
        "max_length": lambda: draw.choice([5, 30]),
        "top_k": lambda: 20,
        "temperature": lambda: 0.7,
        "top_p": lambda: 0.8,
        "do_sample": lambda: True,
        "use_cache": lambda: False,
    }
    chosen = draw.sample(sorted(fields), draw.randint(1, 6))
    made = {name: fields[name]() for name in chosen}
    if made.get("forced_eos_token_id") == END and made.get("min_new_tokens"):
        del made["min_new_tokens"]  # they leave no token, and transformers takes token 0
    ends = draw.choice([END, END, None, 0, [END, 7, 9], ids(9)])
    if ends is None and "exponential_decay_length_penalty" in made:
        ends = END  # transformers itself cannot do without
    return {**made, "eos_token_id": ends}


def random_case(seed: int) -> Case:
    """A case that the seed alone decides."""
    draw = random.Random(seed)
    name, hf = random_model(draw)
    fields = random_fields(draw)
    for field, value in fields.items():
        setattr(hf.generation_config, field, value)
    prompts = tuple(
        tuple(draw.choices(range(1 if draw.random() < 0.2 else 2, VOCAB), k=draw.choice([1, 2, 3, 6, 11])))
        for _ in range(4)
    )
    coder = _transcoder(hf.dtype)
    return Case(f"{seed}: {name} {fields}", HookedModel.from_model(hf, tokenizer(), [coder]), prompts)


def _transcoder(dtype: torch.dtype) -> Transcoder:
    def numbers(*shape: int) -> torch.Tensor:
        return torch.ones(*shape, dtype=dtype)

    site = Site("resid_post", 0)
    return Transcoder(0, site, site, numbers(8, 32), numbers(8), numbers(8, 32), numbers(32), None, None, 1e-6, 2)


def theirs(case: Case, prompt: Sequence[int], **options: Any) -> list[int]:
    """The tokens that transformers generates after a prompt."""
    ids = torch.tensor([list(prompt)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = case.hf.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
            tokenizer=case.model.host.tokenizer, **options,
        )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


def ours(case: Case) -> dict[str, list[list[int]]]:
    """The tokens that we generate, by every function that chooses tokens."""
    model, prompts = case.model, [list(prompt) for prompt in case.prompts]
    found = {
        "batch": [list(row.ids) for row in model.generate(prompts, max_new_tokens=NEW)],
        "alone": [list(model.generate(prompt, max_new_tokens=NEW).ids) for prompt in prompts],
        "stream": [[token.id for token in model.stream(prompt, max_new_tokens=NEW)] for prompt in prompts],
    }
    if getattr(case.hf.generation_config, "forced_eos_token_id", None) is None:  # forced where each piece ends
        found["session"] = [in_pieces(model, prompt) for prompt in prompts]
    if model.host.window() is None and "full" in full_attention(case.hf):
        decoder = FastDecoder(model, max_length=32)
        found["decoder"] = [list(decoded(decoder, prompt)) for prompt in prompts]
    return found


def full_attention(hf: Any) -> str:
    """Why a decoder with a static cache does not support the model; empty if it does."""
    return "full" if set(getattr(hf.config, "layer_types", None) or ["full_attention"]) == {"full_attention"} else ""


def in_pieces(model: HookedModel, prompt: list[int]) -> list[int]:
    """Three tokens, then the rest."""
    session = model.session(prompt)
    first = session.generate(3)
    if first.reason != "length":
        return list(first.ids)
    return [*first.ids, *session.generate(NEW - 3).ids]


def decoded(decoder: FastDecoder, prompt: list[int]) -> tuple[int, ...]:
    """The same with a static cache."""
    decoder.prefill(prompt)
    return decoder.generate(NEW).ids


def check_greedy(case: Case) -> list[str]:
    """Differences between our tokens and transformers'."""
    expected = [theirs(case, prompt) for prompt in case.prompts]
    return [
        f"{case.name}: {way}, prompt {prompt}: {said}, transformers {right}"
        for way, rows in ours(case).items()
        for prompt, said, right in zip(case.prompts, rows, expected, strict=True)
        if said != right
    ]


def random_sampling(draw: random.Random) -> Sampling:
    """Any mixture of warpers."""
    return Sampling(
        temperature=draw.choice([0.3, 1.0, 1.7]),
        top_p=draw.choice([1.0, 0.9, 0.5]),
        top_k=draw.choice([0, 1, 5, 1000]),
        min_p=draw.choice([0.0, 0.05, 0.5]),
        repetition_penalty=draw.choice([None, 1.0, 1.4]),
    )


def check_sampling(case: Case, seed: int) -> list[str]:
    """Differences between the scores from which we sample and those from which transformers samples."""
    draw = random.Random(seed)
    case.hf.generation_config.stop_strings = None
    wrong = []
    for prompt in case.prompts:
        sampling = random_sampling(draw)
        penalty = {} if sampling.repetition_penalty is None else {"repetition_penalty": sampling.repetition_penalty}
        ids = torch.tensor([list(prompt)])
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = case.hf.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=True,
                temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
                min_p=sampling.min_p or None, output_scores=True, output_logits=True, return_dict_in_generate=True,
                **penalty,
            )  # fmt: skip
            mine = Processing(case.model.host, prompt, NEW, sampling.warpers(), sampling.repetition_penalty)
        new = out.sequences[0, ids.shape[1] :].tolist()
        for at, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
            if not torch.equal(mine.scores(new[:at], logits[0]), scores[0]):
                wrong.append(f"{case.name}: {sampling} at {at} behind {prompt}")
    return wrong


def check(seed: int) -> list[str]:
    """Everything about one case."""
    case = random_case(seed)
    return check_greedy(case) + check_sampling(case, seed)


def main() -> int:
    """Run some cases and say how many were wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object (always so)")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [check(seed) for seed in range(args.seed, args.seed + args.count)]
    wrong = [text for texts in found for text in texts]
    sys.stdout.write(json.dumps({"count": args.count, "failed": sum(map(bool, found)), "examples": wrong[:5]}) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
