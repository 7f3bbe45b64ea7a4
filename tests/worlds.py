"""Small models and transcoder sets that tests build in memory."""

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hooks import HookedModel, Site, Transcoder

ARCHITECTURES = {  # whose blocks the algebra knows
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),  # queries and keys are normed
    "llama": (LlamaConfig, LlamaForCausalLM),
}
WORDS = ["<end>", "<unk>", *(f"w{i}" for i in range(62))]


def left_behind(hf: nn.Module) -> list[str]:
    """What is attached to a model's modules; transformers' own hooks, which it leaves there for good, do not count."""
    out = []
    for path, module in hf.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        out += [
            f"a hook on {path}" for hook in hooks if not getattr(hook, "__module__", "").startswith("transformers.")
        ]
        out += [f"a forward of its own in {path}"] * ("forward" in vars(module))
    return out


def word_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="<unk>")


def random_qwen2(
    *,
    seed: int = 0,
    layers: int = 4,
    d_model: int = 40,
    d_ff: int = 56,
    heads: int = 5,
    kv_heads: int = 1,
    head_dim: int = 16,
    eps: float = 1e-5,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Qwen2ForCausalLM:
    """5:1 query grouping, head_dim not d/heads, another eps, tied embeddings, and biases that are not zero."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=eps,
        tie_word_embeddings=tied,
        max_position_embeddings=128,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = Qwen2ForCausalLM(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def random_transcoder(
    layer: int,
    d_model: int,
    d_features: int = 96,
    k: int | None = 11,
    *,
    read: Site | None = None,
    write: Site | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Transcoder:
    generator = torch.Generator().manual_seed(1000 * seed + layer)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (std * torch.randn(*shape, generator=generator)).to(dtype)

    return Transcoder(
        layer=layer,
        read=read or Site("resid_pre", layer),
        write=write or Site("resid_pre", layer),
        W_enc=normal(d_features, d_model, std=d_model**-0.5),
        b_enc=normal(d_features, std=0.1),
        W_dec=normal(d_features, d_model, std=0.2),
        b_dec=normal(d_model, std=0.1),
        norm_weight=1 + normal(d_model, std=0.2),
        norm_bias=normal(d_model, std=0.1),
        norm_eps=1e-5,
        k=k,
    )


def planted_sink(dtype: torch.dtype = torch.float32) -> HookedModel:
    """A random Qwen2 whose token `w1` (id 3) has 100 times the usual norm, with large key biases."""
    model = random_qwen2(dtype=dtype)
    with torch.no_grad():
        model.model.embed_tokens.weight[3] *= 100
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias += 4
    coders = [random_transcoder(n, 40, dtype=dtype) for n in range(4)]
    return HookedModel.from_model(model, word_tokenizer(), coders)


def random_hooked(missing: int | None = 2, **options) -> HookedModel:
    """A random Qwen2 with random same-site transcoders; one layer has none."""
    model = random_qwen2(**options)
    dtype = next(model.parameters()).dtype
    width = model.config.hidden_size
    coders = [
        random_transcoder(layer, width, dtype=dtype)
        for layer in range(model.config.num_hidden_layers)
        if layer != missing
    ]
    return HookedModel.from_model(model, word_tokenizer(), coders)
