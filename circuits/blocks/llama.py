"""Llama 2 and 3: neither biases nor head norms."""

from torch import nn

from circuits.blocks._algebra import BlockWeights
from circuits.blocks._weights import gather, style
from hooks.sites import decoder_layers


def matches(model: nn.Module) -> bool:
    """No bias on the query projection and no head norm."""
    return style(model) == "plain"


def read(model: nn.Module, layer: int) -> BlockWeights:
    """Views of one block's weights."""
    return gather(decoder_layers(model)[layer], head_norms=False)
