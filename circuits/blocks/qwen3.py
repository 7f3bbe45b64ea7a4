"""Qwen3: queries and keys are normed per head before the rotation; no biases."""

from torch import nn

from circuits.blocks._algebra import BlockWeights
from circuits.blocks._weights import gather, style
from hooks.sites import decoder_layers


def matches(model: nn.Module) -> bool:
    """The attention has head norms."""
    return style(model) == "head norms"


def read(model: nn.Module, layer: int) -> BlockWeights:
    """Views of one block's weights."""
    return gather(decoder_layers(model)[layer], head_norms=True)
