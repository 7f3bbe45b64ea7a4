"""A word-level tokenizer for the demo world, in the Hugging Face fast format.

Every word carries its leading space (" Austin"), as byte-level BPE vocabularies have it, so code written for
the full-size model ("the answer token is ' Austin'") works unchanged. Text that begins without a space is
read as if it had one. Load it with `PreTrainedTokenizerFast.from_pretrained(folder)`: `AutoTokenizer` sees
`model_type: qwen2` beside it and builds a byte-level BPE tokenizer instead.
"""

import re

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hooks.demo.world import STATE_OF_CITY, all_texts, capital_of_city

EOS_TOKEN = "<|endoftext|>"
UNK_TOKEN = "<unk>"
EOS_ID = 0
_PIECE = re.compile(r"\w+|[^\w\s]")


def build_vocabulary() -> dict[str, int]:
    """Token -> id: end of text, unknown, then every word of the world in sorted order."""
    pieces = sorted({piece for text in all_texts() for piece in _PIECE.findall(text)})
    tokens = [EOS_TOKEN, UNK_TOKEN, *(f" {p}" if re.match(r"\w", p) else p for p in pieces)]
    return {token: index for index, token in enumerate(tokens)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the demo model; a pure function of the world, not of the training seed."""
    tokenizer = Tokenizer(models.WordLevel(build_vocabulary(), unk_token=UNK_TOKEN))
    # One space before each word, none before punctuation, none at the end.
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Strip(),
            normalizers.Prepend(" "),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Replace(Regex(r" (?=[^\w\s])"), ""),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w\s]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def capital_token(tokenizer: PreTrainedTokenizerFast, city: str) -> int:
    """The first token of the city's two-hop answer; capitals differ pairwise in it."""
    return encode(tokenizer, capital_of_city(city))[0]


def city_position(tokenizer: PreTrainedTokenizerFast, template: str, city: str) -> int:
    """Index of the city's last token in `template.format(c=city)`."""
    if city not in STATE_OF_CITY:
        raise KeyError(city)
    before = template.split("{c}")[0]
    return len(encode(tokenizer, before + city)) - 1
