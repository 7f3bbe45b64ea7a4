"""Random models and transcoders for benchmarks, in memory, of any shape, precision and device.

Weights are drawn in place, one tensor after the other, so that a model needs no memory beyond its own size.
"""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from hooks import HookedModel, Site, Transcoder

CONVENTIONS = {  # reads, writes
    "same-site": ("resid_pre", "resid_pre"),
    "next-layer": ("resid_pre", "resid_post"),
    "mlp": ("mlp_in", "mlp_out"),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and its transcoders.

    Attributes:
        features, k: of each transcoder's dictionary, and how many of them TopK keeps.
        transcoders: how many layers have one, from layer 0 on; None: all.
    """

    layers: int
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    features: int
    k: int
    head_dim: int = 128
    vocab: int = 1000
    transcoders: int | None = None

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads} heads of {self.head_dim}"
        return (
            f"{self.layers} layers, d_model {self.d_model}, d_ff {self.d_ff}, {heads}, {self.features} features, "
            f"{self.k} kept per token"
        )

    @property
    def block_numbers(self) -> int:
        """Entries of one block's matrices."""
        query, keyvalue = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.d_model * (2 * query + 2 * keyvalue + 3 * self.d_ff)

    def nbytes(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of all weights."""
        coders = self.layers if self.transcoders is None else self.transcoders
        numbers = self.layers * self.block_numbers + 2 * self.vocab * self.d_model
        return dtype.itemsize * (numbers + coders * 2 * self.features * self.d_model)


def random_model(
    shape: Shape,
    convention: str = "same-site",
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> HookedModel:
    """A random Qwen2 whose streams neither grow nor die, with a random transcoder at each of its layers."""
    torch.manual_seed(seed)
    model = _random_qwen2(shape, dtype, device)
    count = shape.layers if shape.transcoders is None else shape.transcoders
    coders = [_random_transcoder(shape, layer, convention, dtype, device) for layer in range(count)]
    return HookedModel.from_model(model, _word_tokenizer(shape.vocab), coders)


def random_prompt(shape: Shape, length: int, *, seed: int = 0) -> list[int]:
    """Token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, shape.vocab, (length,), generator=generator).tolist()


def _random_qwen2(shape: Shape, dtype: torch.dtype, device: str) -> nn.Module:
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    model = model.to(dtype).to_empty(device=device)
    model.model.rotary_emb = Qwen2RotaryEmbedding(config).to(device)  # its buffers are computed, not drawn
    for name, parameter in model.named_parameters():
        _draw(name, parameter.data)
    return model.eval()


def _draw(name: str, parameter: Tensor) -> None:
    if "norm" in name:
        parameter.uniform_(0.5, 1.5)
    elif "embed_tokens" in name:
        parameter.normal_()
    elif name.endswith("bias"):
        parameter.normal_(std=0.1)
    else:
        parameter.normal_(std=parameter.shape[1] ** -0.5)


def _random_transcoder(shape: Shape, layer: int, convention: str, dtype: torch.dtype, device: str) -> Transcoder:
    def normal(*size: int, mean: float = 0.0, std: float) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device).normal_(mean, std)

    read, write = CONVENTIONS[convention]
    width, features = shape.d_model, shape.features
    return Transcoder(
        layer=layer,
        read=Site(read, layer),
        write=Site(write, layer),
        W_enc=normal(features, width, std=width**-0.5),
        b_enc=normal(features, std=0.1),
        W_dec=normal(features, width, std=shape.k**-0.5),
        b_dec=normal(width, std=0.1),
        norm_weight=normal(width, mean=1.0, std=0.2),
        norm_bias=normal(width, std=0.1),
        norm_eps=1e-5,
        k=shape.k,
    )


def _word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    words = ["<end>", "<unk>", *(f"w{i}" for i in range(vocab - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="<unk>")
