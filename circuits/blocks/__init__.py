"""The algebra of one decoder block, forward and transposed. One file per architecture; it finds the weights.

A file defines

    matches(model: nn.Module) -> bool                       by the model's class of layers, not by its name
    read(model: nn.Module, layer: int) -> BlockWeights      views of the weights, nothing copied

The algebra itself, shared by all pre-norm blocks with grouped-query attention and SwiGLU, is in `_algebra`.
"""

from torch import nn

from circuits.blocks._algebra import (
    BlockRecord,
    BlockWeights,
    Pulled,
    Rule,
    norm_transposed,
    on_key,
    on_query,
    pull_back,
    record_block,
    spread,
    through_attention,
    through_attention_everywhere,
    through_mlp,
)
from hooks.plugins import discover

BLOCKS = discover(__name__, ("matches", "read"))


def read_block(model: nn.Module, layer: int) -> BlockWeights | None:
    """The weights of one block; None if no file supports the architecture."""
    for module in BLOCKS.values():
        if module.matches(model):
            weights: BlockWeights = module.read(model, layer)
            return weights
    return None


__all__ = [
    "BLOCKS",
    "BlockRecord",
    "BlockWeights",
    "Pulled",
    "Rule",
    "norm_transposed",
    "on_key",
    "on_query",
    "pull_back",
    "read_block",
    "record_block",
    "spread",
    "through_attention",
    "through_attention_everywhere",
    "through_mlp",
]
