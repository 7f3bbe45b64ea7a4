"""Find the weights of a pre-norm SwiGLU block in a transformers model."""

from typing import Any, Literal

from torch import nn

from circuits.blocks._algebra import BlockWeights
from hooks.sites import decoder_layers

_PARTS = (
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def style(model: nn.Module) -> Literal["biases", "head norms", "plain"] | None:
    """The kind of a model's attention; None if the algebra does not support its blocks.

    Supported blocks have exactly these matrices, as plain float weights, RMSNorms and SiLU. Whether a model combines
    them like the algebra is measured (`circuits.edges.stack.reproduces`).
    """
    layer: Any = decoder_layers(model)[0]
    if not _known(layer):
        return None
    if hasattr(layer.self_attn, "q_norm"):
        return "head norms"
    return "plain" if layer.self_attn.q_proj.bias is None else "biases"


def _known(layer: Any) -> bool:
    if not {name for name, _ in layer.named_modules()} >= set(_PARTS):
        return False
    norms, linear = ([layer.get_submodule(name) for name in part] for part in (_PARTS[:2], _PARTS[2:]))
    plain = all(type(part) is nn.Linear and part.weight.is_floating_point() for part in linear)
    rms = all(hasattr(norm, "weight") and hasattr(norm, "variance_epsilon") for norm in norms)
    silu = "silu" in type(layer.mlp.act_fn).__name__.lower()
    return plain and rms and silu and layer.self_attn.o_proj.bias is None


def gather(layer: nn.Module, *, head_norms: bool) -> BlockWeights:
    """Views of the weights; nothing is copied."""
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    norm: Any = layer.input_layernorm
    second: Any = layer.post_attention_layernorm
    return BlockWeights(
        g1=norm.weight,
        g2=second.weight,
        eps=float(norm.variance_epsilon),
        W_Q=attention.q_proj.weight,
        W_K=attention.k_proj.weight,
        W_V=attention.v_proj.weight,
        W_O=attention.o_proj.weight,
        b_Q=attention.q_proj.bias,
        b_K=attention.k_proj.bias,
        b_V=attention.v_proj.bias,
        q_norm=attention.q_norm.weight if head_norms else None,
        k_norm=attention.k_norm.weight if head_norms else None,
        W_G=mlp.gate_proj.weight,
        W_U=mlp.up_proj.weight,
        W_D=mlp.down_proj.weight,
        d_head=attention.head_dim,
    )
