"""Qwen2 and Qwen2.5: biases on q, k and v; no head norms."""

from torch import nn

from circuits.blocks._algebra import BlockWeights
from circuits.blocks._weights import gather, style
from hooks.sites import decoder_layers


def matches(model: nn.Module) -> bool:
    """The query projection has a bias and there is no head norm."""
    return style(model) == "biases"


def read(model: nn.Module, layer: int) -> BlockWeights:
    """Views of one block's weights."""
    return gather(decoder_layers(model)[layer], head_norms=False)
