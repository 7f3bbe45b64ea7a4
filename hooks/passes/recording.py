"""One pass over prompts → a frozen record of features, errors, residuals and logits.

prompts → host (one hooked pass) → per layer: the read site, the features, the write site
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.checkpoints import TranscoderStore
from hooks.errors import PromptError
from hooks.host import Batch, Host
from hooks.sites import Site
from hooks.types import Edit, Pass, SparseActs

SINK = 10.0  # a token whose stream is this many times the median norm is an attention sink


def sink_norm(norms: Float[Tensor, " token"]) -> float:
    """The norm above which a token of this text is an attention sink. All of this project uses this rule."""
    return SINK * float(norms.median())


def is_sink(norms: Float[Tensor, " token"]) -> Bool[Tensor, " token"]:
    """Which tokens of a text are attention sinks, by the norms of their residual streams at one site."""
    return norms > sink_norm(norms)


def sink_tokens(host: Host, batch: Batch) -> Bool[Tensor, "batch pos"]:
    """Which real tokens are attention sinks at any block of the plain model. One pass, no logits."""
    found = torch.zeros_like(batch.mask)
    streams = [*(Site("resid_pre", layer) for layer in range(host.n_layers)), Site("resid_post", host.n_layers - 1)]
    host.forward_hidden(batch, [sink_watch(site, batch.lengths, found) for site in streams])
    return found


def sink_watch(site: Site, lengths: Sequence[int], found: Bool[Tensor, "batch pos"]) -> Edit:
    """An edit that changes nothing and marks in `found` which real tokens are attention sinks at a site."""

    def look(x: Float[Tensor, "batch pos d_model"], at: Pass) -> Float[Tensor, "batch pos d_model"]:
        norms = x.float().norm(dim=-1).cpu()
        for row, length in enumerate(lengths):
            found[row, :length] |= is_sink(norms[row, :length])
        return x

    return Edit(site, look)


@dataclass(frozen=True)
class LayerRecord:
    """The pass at one transcoder: read site, features, write site. Values at padding mean nothing: mask them
    (`acts.real`)."""

    layer: int
    read: Float[Tensor, "batch pos d_model"]
    acts: SparseActs
    target: Float[Tensor, "batch pos d_model"]
    reconstruction: Float[Tensor, "batch pos d_model"]

    @property
    def error(self) -> Float[Tensor, "batch pos d_model"]:
        """The reconstruction error: target − reconstruction."""
        return self.target.to(self.reconstruction.dtype) - self.reconstruction


@dataclass(frozen=True)
class Recording:
    """The record of one plain pass over a batch of prompts.

    Attributes:
        final: the stream after the final norm.
        streams: the tensors at further sites that were requested.
        shared: results computed from the pass, by name. An entry is freed when no other object uses it.
    """

    batch: Batch
    layers: Mapping[int, LayerRecord]
    final: Float[Tensor, "batch pos d_model"]
    host: Host = field(repr=False)
    streams: Mapping[Site, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict)
    shared: WeakValueDictionary[str, Any] = field(
        default_factory=WeakValueDictionary, init=False, compare=False, repr=False
    )

    @cached_property
    def logits(self) -> Float[Tensor, "batch pos vocab"]:
        """Logits at every position, computed at the first use."""
        return self.host.unembed(self.final)

    def __repr__(self) -> str:
        """One line: how much was recorded."""
        real = self.batch.mask[..., None]
        active = sum(int(((seen.acts.values > 0).cpu() & real).sum()) for seen in self.layers.values())
        size = f"{len(self.batch.lengths)} prompts, {sum(self.batch.lengths)} tokens, {len(self.layers)} layers"
        further = f", {len(self.streams)} streams" if self.streams else ""
        return f"Recording({size}, {active:,} active features{further})"


def record(
    host: Host,
    store: TranscoderStore,
    batch: Batch,
    layers: Sequence[int] | None = None,
    *,
    streams: Sequence[Site] = (),
) -> Recording:
    """Run once and encode every recorded layer.

    Args:
        streams: further sites whose tensors are kept.

    Memory: batch × pos × (3 d_model + 2 k) numbers per layer, and d_model per further site.
    """
    layers = store.layers if layers is None else layers
    sites = {layer: store.sites(layer) for layer in layers}
    final, seen = host.capture(batch, [*(site for pair in sites.values() for site in pair), *streams])
    records = {}
    for layer, (read, write) in sites.items():
        transcoder = store[layer]
        acts = replace(transcoder.encode(seen[read]), real=batch.mask)
        whole = transcoder.reconstruct(acts, seen[read])
        home = transcoder.device  # a block's input may be on the device of the block before
        records[layer] = LayerRecord(layer, seen[read].to(home), acts, seen[write].to(home), whole)
    return Recording(batch, records, final, host, {site: seen[site] for site in streams})


def check_same_length(recording: Recording, counterfactual: Recording) -> None:
    """Features are compared position by position, so both prompts must have the same number of tokens.

    Raises:
        PromptError: they have different numbers of tokens.
    """
    own, other = recording.batch, counterfactual.batch
    if own.lengths != other.lengths:
        raise PromptError(
            "the two prompts of a pair must have the same number of tokens",
            expected=f"{own.lengths[0]} tokens",
            found=f"{other.lengths[0]}: {' | '.join(other.strings[0])}",
            repair="choose a counterfactual whose tokens stand in the same places",
        )
