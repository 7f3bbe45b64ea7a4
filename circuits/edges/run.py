"""The inputs of edges: cuts, where a written tensor is split into the contributions of nodes, and the nodes.

There is a cut at every layer that has a transcoder. A target reads a stream that comes from the *feeding* cuts below
it. If transcoders replace the whole residual stream, only the highest cut below the target feeds it, since every
earlier path passes through that cut's features, rest, error and bias. If transcoders write the output of an MLP, nodes
add to the stream, so all cuts below feed the target, and the tokens too. Then edges skip layers, and pass through the
attention of the blocks between. An edge is a derivative through the part of the model between its two nodes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from circuits.edges.buffer import Buffer
from circuits.edges.stack import Stack, stack_of
from circuits.graph import BIAS, ERROR, FEATURE, NONE, REST, TARGET, TOKEN, NodeIndex
from circuits.targets import AnyTarget
from hooks.checkpoints import TranscoderStore
from hooks.kernels import gather_features
from hooks.model import HookedModel
from hooks.passes import Recording
from hooks.sites import EMBEDDING, Site
from hooks.transcoder import Transcoder
from hooks.types import SparseActs


@dataclass(frozen=True)
class Cut:
    """A layer's written tensor, split into parts: selected features a_i d_i + rest + b_dec + error.

    In a pair of prompts each part is the difference from the counterfactual, so the bias is zero.

    Attributes:
        pos, feature, activation: the selected features, in node order.
        rest: the sum of all other active features, [pos d_model].
        error: the reconstruction error, [pos d_model].
        bias: b_dec.
    """

    layer: int
    store: TranscoderStore
    pos: Int[Tensor, " node"]
    feature: Int[Tensor, " node"]
    activation: Float[Tensor, " node"]
    rest: Float[Tensor, "pos d_model"]
    error: Float[Tensor, "pos d_model"]
    bias: Float[Tensor, " d_model"]

    @property
    def transcoder(self) -> Transcoder:
        """The layer's transcoder, looked up at each use, so that the store's byte budget holds while a graph is
        built."""
        return self.store[self.layer]

    @property
    def read(self) -> Site:
        """The transcoder's read site."""
        return self.store.sites(self.layer)[0]

    @property
    def write(self) -> Site:
        """The transcoder's write site."""
        return self.store.sites(self.layer)[1]


@dataclass(frozen=True)
class LocalRun:
    """Everything a rule needs: the model, the recorded prompt, the cuts and the index of nodes.

    Attributes:
        cuts: ascending, all below the targets.
        embedding: x_0 [pos d_model], the vectors of the token nodes.
        paired: whether nodes are differences from a counterfactual; then constants cancel.
    """

    model: HookedModel
    recording: Recording
    cuts: tuple[Cut, ...]
    targets: tuple[AnyTarget, ...]
    index: NodeIndex
    embedding: Float[Tensor, "pos d_model"]
    paired: bool = False

    @cached_property
    def stack(self) -> Stack | None:
        """The recorded values of every block; None where the algebra does not support the model."""
        return stack_of(self.model.host, self.recording)

    @cached_property
    def buffer(self) -> Buffer:
        """The buffer for blocks of edges."""
        return Buffer()

    @property
    def groups(self) -> range:
        """Numbers of the target groups, from the targets (`len(cuts)`) down: each cut's features are one."""
        return range(len(self.cuts), -1, -1)

    def reads(self, number: int) -> Site | None:
        """The site that a target group reads; None: the logits."""
        return self.cuts[number].read if number < len(self.cuts) else self.targets[0].site

    def feeders(self, number: int) -> tuple[int | None, ...]:
        """Numbers of the cuts that feed a target group, highest first; None, always last, means the tokens."""
        site = self.reads(number)
        found: list[int | None] = []
        for below in reversed(range(number)):
            write = self.cuts[below].write
            if site is None or write.depth <= site.depth:
                found.append(below)
                if write.whole_stream:
                    return tuple(found)
        return (*found, None)

    def reads_embedding(self, number: int) -> bool:
        """Whether a group reads the embedding itself, with no block before it."""
        return self.reads(number) == EMBEDDING

    def source_rows(self, number: int) -> Int[Tensor, " source"]:
        """Node rows that feed a target group: feeder by feeder, each in the order of `contract`."""
        parts = []
        for feeder in self.feeders(number):
            kinds = (TOKEN, BIAS) if feeder is None else (FEATURE, REST, ERROR, BIAS)
            layer = NONE if feeder is None else self.cuts[feeder].layer
            parts += [torch.from_numpy(self.index.rows(kind, layer)) for kind in kinds]
        return torch.cat(parts)

    def target_rows(self, number: int) -> Int[Tensor, " target"]:
        """Node rows of a target group: a cut's features, or the targets."""
        if number == len(self.cuts):
            return torch.from_numpy(self.index.rows(TARGET))
        return torch.from_numpy(self.index.rows(FEATURE, self.cuts[number].layer))


@dataclass(frozen=True)
class Rows:
    """Edges into some targets: one row per target node, one column per source node.

    Attributes:
        targets, sources: node rows.
        weights: contribution of each source to each target, in the target's units.
        values: a feature's pre-activation, or a target's value; the weights of a conserving rule sum to it.
    """

    targets: Int[Tensor, " target"]
    sources: Int[Tensor, " source"]
    weights: Float[Tensor, "target source"]
    values: Float[Tensor, " target"]


def contract(
    cut: Cut | None, gradients: Float[Tensor, "target reached d_model"], embedding: Float[Tensor, "pos d_model"]
) -> Float[Tensor, "target source"]:
    """Gradients at a cut's write site → edges from its nodes: the dot product of each node's vector with the gradient
    at its position.

    It runs one position at a time, so only the selected features of one token are gathered at once. Each node's edge is
    computed directly; none is a difference from a total. The gradients may have fewer positions than the prompt: nodes
    at later positions have no edge. Edges are computed on the device of the cut.
    """
    device = (embedding if cut is None else cut.pos).device
    gradients = gradients.to(device, torch.promote_types(gradients.dtype, torch.float32))
    dtype, length = gradients.dtype, gradients.shape[1]

    def along(vectors: Tensor) -> Tensor:
        found = einsum(gradients, vectors[:length].to(dtype), "target pos d, pos d -> target pos")
        return pad(found, (0, len(vectors) - length))

    if cut is None:
        return torch.cat([along(embedding), gradients.new_zeros(len(gradients), 1)], dim=1)
    features = gradients.new_zeros(len(gradients), len(cut.pos))
    for pos, here in stretches(cut.pos, length):
        rows = cut.transcoder.W_dec[cut.feature[here]].to(dtype)
        features[:, here] = (gradients[:, pos] @ rows.T) * cut.activation[here].to(dtype)
    bias = einsum(gradients, cut.bias.to(dtype), "target pos d, d -> target")
    return torch.cat([features, along(cut.rest), along(cut.error), rearrange(bias, "target -> target 1")], dim=1)


def stretches(pos: Int[Tensor, " node"], length: int) -> Iterator[tuple[int, slice]]:
    """Ascending positions → each position below `length`, with the slice of its nodes."""
    start = 0
    for t, count in enumerate(torch.bincount(pos, minlength=length).tolist()[:length]):
        if count:
            yield t, slice(start, start + count)
        start += count


def contract_here(
    cut: Cut | None,
    gradients: Float[Tensor, "target d_model"],
    pos: Int[Tensor, " target"],
    embedding: Float[Tensor, "pos d_model"],
) -> Float[Tensor, "target source"]:
    """The same, if each target has a gradient only at its own position."""
    dtype, device = gradients.dtype, (embedding if cut is None else cut.pos).device
    gradients, pos = gradients.to(device), pos.to(device)
    rows = torch.arange(len(pos), device=pos.device)

    def along(vectors: Tensor) -> Tensor:
        found = gradients.new_zeros(len(gradients), len(vectors))
        found[rows, pos] = (gradients * vectors[pos].to(dtype)).sum(-1)
        return found

    if cut is None:
        return torch.cat([along(embedding), gradients.new_zeros(len(gradients), 1)], dim=1)
    features = gradients.new_zeros(len(gradients), len(cut.pos))
    for t, nodes in stretches(cut.pos, len(cut.rest)):
        here = (pos == t).nonzero()[:, 0]
        if len(here):
            vectors = cut.transcoder.W_dec[cut.feature[nodes]].to(dtype)
            features[here, nodes] = (gradients[here] @ vectors.T) * cut.activation[nodes].to(dtype)
    bias = gradients @ cut.bias.to(dtype)
    return torch.cat([features, along(cut.rest), along(cut.error), rearrange(bias, "target -> target 1")], dim=1)


def make_cuts(
    model: HookedModel,
    recording: Recording,
    selected: Mapping[int, list[tuple[int, int]]],
    counterfactual: Recording | None = None,
) -> tuple[Cut, ...]:
    """One cut per layer with a transcoder; in a pair, of the difference from the counterfactual."""
    return tuple(
        _cut(model, recording, counterfactual, layer, sorted(pairs)) for layer, pairs in sorted(selected.items())
    )


def _cut(
    model: HookedModel,
    recording: Recording,
    counterfactual: Recording | None,
    layer: int,
    pairs: list[tuple[int, int]],
) -> Cut:
    record, transcoder = recording.layers[layer], model.store[layer]
    table = torch.tensor(pairs, dtype=torch.int64, device=record.acts.indices.device).reshape(-1, 2)
    pos, feature = table.T
    activation, written, error = _named(record.acts, pos, feature), record.reconstruction[0], record.error[0]
    bias = transcoder.b_dec.to(written.dtype)
    if counterfactual is not None:
        other = counterfactual.layers[layer]
        activation = activation - _named(other.acts, pos, feature)
        written, error = written - other.reconstruction[0], error - other.error[0]
        bias = torch.zeros_like(bias)
    claimed = torch.zeros_like(written)
    for t, here in stretches(pos, len(written)):  # one position's decoder rows at a time
        claimed[t] = activation[here].to(written.dtype) @ transcoder.W_dec[feature[here]].to(written.dtype)
    return Cut(layer, model.store, pos, feature, activation, written - bias - claimed, error, bias)


def _named(acts: SparseActs, pos: Int[Tensor, " node"], feature: Int[Tensor, " node"]) -> Float[Tensor, " node"]:
    """The activation of named (position, feature) pairs of one prompt: 0 where TopK did not keep them."""
    found = [
        gather_features(SparseActs(acts.values[0, t], acts.indices[0, t]), feature[here])
        for t, here in stretches(pos, acts.values.shape[1])
    ]
    return torch.cat([acts.values.new_zeros(0), *found])
