"""Attribution rules: how the edges of a graph are computed. One file each; the file name is the rule's name.

The residual stream is cut at every layer that has a transcoder. Between two neighbouring cuts runs a piece of the
plain model (usually one block), and since the *whole* stream is rewritten at a cut, every path between two features
that do not sit at neighbouring cuts passes through features, rest, error and bias of the cuts between. So edges join
neighbouring cuts only, and each is a derivative through one piece.

A rule defines

    CONSERVES: bool          whether the edges into a target sum to its value, biases included
    edge_rows(run: LocalRun) -> Iterator[Rows]
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from circuits.nodes import BIAS, ERROR, FEATURE, NONE, REST, TARGET, TOKEN, NodeIndex
from circuits.scores import EMBEDDING
from circuits.targets import Target
from hooks.kernels import gather_features
from hooks.model import HookedModel
from hooks.plugins import discover
from hooks.recording import Recording
from hooks.transcoder import Transcoder
from hooks.types import SparseActs


@dataclass(frozen=True)
class Cut:
    """One place where the stream is taken apart: x = sum_selected a_i d_i + rest + b_dec + error.

    Attributes:
        pos, feature, activation: the selected features, in node order.
        rest: what the other active features write, [pos d_model].
        error: what the transcoder does not explain, [pos d_model].
    """

    layer: int
    transcoder: Transcoder
    pos: Int[Tensor, " node"]
    feature: Int[Tensor, " node"]
    activation: Float[Tensor, " node"]
    rest: Float[Tensor, "pos d_model"]
    error: Float[Tensor, "pos d_model"]


@dataclass(frozen=True)
class LocalRun:
    """Everything a rule needs: the model, the recorded prompt, the cuts and the index of nodes.

    Attributes:
        cuts: ascending; edges run from tokens to the first, from each to the next, and from the last to the targets.
        embedding: x_0 [pos d_model], what the token nodes carry.
    """

    model: HookedModel
    recording: Recording
    cuts: tuple[Cut, ...]
    targets: tuple[Target, ...]
    index: NodeIndex
    embedding: Float[Tensor, "pos d_model"]

    @property
    def starts_at_embedding(self) -> bool:
        """Whether the first cut is the embedding itself, with no block before it."""
        return bool(self.cuts) and self.cuts[0].transcoder.write == EMBEDDING

    def cut_before(self, number: int) -> Cut | None:
        """The cut whose nodes feed cut `number` (`len(cuts)`: the targets); None: the tokens do."""
        return self.cuts[number - 1] if number else None

    def source_rows(self, number: int) -> Int[Tensor, " source"]:
        """Node rows that feed cut `number`, in the order of `contract`."""
        cut = self.cut_before(number)
        if cut is None:
            return torch.cat([torch.from_numpy(self.index.rows(kind, NONE)) for kind in (TOKEN, BIAS)])
        kinds = (FEATURE, REST, ERROR, BIAS)
        return torch.cat([torch.from_numpy(self.index.rows(kind, cut.layer)) for kind in kinds])

    def target_rows(self, number: int) -> Int[Tensor, " target"]:
        """Node rows that cut `number` feeds: its features, or the targets."""
        if number == len(self.cuts):
            return torch.from_numpy(self.index.rows(TARGET))
        return torch.from_numpy(self.index.rows(FEATURE, self.cuts[number].layer))


@dataclass(frozen=True)
class Rows:
    """Edges into some targets: one row per target node, one column per source node.

    Attributes:
        targets, sources: node rows.
        weights: contribution of each source to each target, in the target's units.
        values: what the contributions of a conserving rule add up to, encoder bias taken off.
    """

    targets: Int[Tensor, " target"]
    sources: Int[Tensor, " source"]
    weights: Float[Tensor, "target source"]
    values: Float[Tensor, " target"]


def contract(
    cut: Cut | None, gradients: Float[Tensor, "target pos d_model"], embedding: Float[Tensor, "pos d_model"]
) -> Float[Tensor, "target source"]:
    """Gradients at a cut → edges from its nodes: every node's vector dotted with the gradient at its position.

    One position at a time, so no more than the selected features of one token are gathered at once. Each node's edge
    is computed on its own; none is a difference to a total.
    """
    gradients = gradients.to(torch.promote_types(gradients.dtype, torch.float32))
    if cut is None:
        tokens = einsum(gradients, embedding.to(gradients.dtype), "target pos d, pos d -> target pos")
        return torch.cat([tokens, gradients.new_zeros(len(gradients), 1)], dim=1)
    dtype = gradients.dtype
    features = gradients.new_zeros(len(gradients), len(cut.pos))
    for pos in cut.pos.unique().tolist():
        here = (cut.pos == pos).nonzero()[:, 0]
        rows = cut.transcoder.W_dec[cut.feature[here]].to(dtype)
        along = einsum(gradients[:, pos], rows, "target d, node d -> target node")
        features[:, here] = along * cut.activation[here].to(dtype)
    rest = einsum(gradients, cut.rest.to(dtype), "target pos d, pos d -> target pos")
    error = einsum(gradients, cut.error.to(dtype), "target pos d, pos d -> target pos")
    bias = einsum(gradients, cut.transcoder.b_dec.to(dtype), "target pos d, d -> target")
    return torch.cat([features, rest, error, rearrange(bias, "target -> target 1")], dim=1)


def make_cuts(
    model: HookedModel, recording: Recording, selected: Mapping[int, list[tuple[int, int]]]
) -> tuple[Cut, ...]:
    """Take the recorded stream apart at every layer with a transcoder."""
    return tuple(_cut(model, recording, layer, sorted(pairs)) for layer, pairs in sorted(selected.items()))


def _cut(model: HookedModel, recording: Recording, layer: int, pairs: list[tuple[int, int]]) -> Cut:
    record, transcoder = recording.layers[layer], model.store[layer]
    acts = record.acts
    table = torch.tensor(pairs, dtype=torch.int64, device=acts.indices.device).reshape(-1, 2)
    pos, feature = table.T
    here = SparseActs(acts.values[0][pos], acts.indices[0][pos])
    activation = gather_features(here, feature[:, None])[:, 0]
    written = torch.zeros_like(record.reconstruction[0])
    for here in (pos == p for p in pos.unique()):  # one position's decoder rows at a time
        vectors = transcoder.W_dec[feature[here]].to(written.dtype)
        written[pos[here][0]] = activation[here].to(written.dtype) @ vectors
    rest = record.reconstruction[0] - transcoder.b_dec.to(written.dtype) - written
    return Cut(layer, transcoder, pos, feature, activation, rest, record.error[0])


RULES = discover(__name__, ("CONSERVES", "edge_rows"))
