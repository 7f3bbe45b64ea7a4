"""Edges by meeting in the middle: exact products, no autograd graph, no gradient per source position.

For a piece of one block, a target's cotangent u_j is pulled back to the block's input in factored form (`blocks`), and
every source vector y at position t is projected once onto the same small spaces:

    e_ij = a_i { s1_t (v̄_jt · W_V γy + k̄_jt · W_K γy) + [t = t'] y · (g_mid + s1 γ W_Qᵀ q̄) − s1_t (y·x̂_t)/d · dot_jt }

with γ the first norm's gain, x̂ the normed stream and dot_jt the projection of x̂_t in place of y; the last term, k̄ and q̄
fall away where the rule freezes norms or attention. Everything that crosses positions passes n_kv · d_head numbers, so
an edge costs a dot product of that size, and a target the same whatever the number of sources.

Pieces of several blocks (a layer without transcoder, the way to the logits) pull full gradients through all but none:
they are dense, and few.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution import Cut, LocalRun, Rows, contract
from circuits.attribution._tokens import token_rows
from circuits.blocks import BLOCKS, BlockRecord, BlockWeights, Pulled, Rule, pull_back, read_block, record_block
from circuits.blocks._algebra import norm_transposed
from circuits.targets import Target
from hooks.errors import UserError
from hooks.sites import Site
from hooks.transcoder import Transcoder

TARGETS_AT_ONCE = 256


@dataclass(frozen=True)
class Block:
    """One block of a piece: its weights and what it computed."""

    weights: BlockWeights
    record: BlockRecord


@dataclass(frozen=True)
class Piece:
    """The blocks between the cut before and cut `number` (or the targets)."""

    number: int
    blocks: tuple[Block, ...]
    end: Float[Tensor, "pos d_model"]  # the stream that arrives


def pieces(run: LocalRun) -> list[Piece] | None:
    """The pieces of a run, first to last; None where the algebra does not know the architecture or a site.

    Memory: one prompt's stream, queries, keys, values and gate inputs per block.
    """
    host = run.model.host
    bounds = [_block_number(cut.transcoder.write) for cut in run.cuts]
    known = [number for number in bounds if number is not None]
    if len(known) < len(bounds) or read_block(host.model, 0) is None:
        return None
    edges = [0, *known, host.n_layers]
    sites = [Site("resid_pre", layer) for layer in range(host.n_layers)] + [Site("resid_post", host.n_layers - 1)]
    _, seen = host.capture(run.recording.batch, sites)
    streams = [seen[site][0] for site in sites]
    dtype = torch.float64 if streams[0].dtype == torch.float64 else torch.float32
    rotary = host.decoder.rotary_emb
    places = torch.arange(len(streams[0]), device=streams[0].device)
    cos, sin = (part[0].to(dtype) for part in rotary(streams[0][None].to(dtype), rearrange(places, "pos -> 1 pos")))
    out = []
    for number, (first, last) in enumerate(pairwise(edges)):
        blocks = []
        for layer in range(first, last):
            weights = read_block(host.model, layer)
            assert weights is not None, f"block {layer} is unlike block 0"
            blocks.append(Block(weights, record_block(weights, streams[layer].to(dtype), cos, sin)))
        out.append(Piece(number, tuple(blocks), streams[last].to(dtype)))
    return out


def _block_number(site: Site) -> int | None:
    """How many blocks lie below a cut: resid_pre L and resid_post L − 1 are the same place."""
    layer, within = site.depth
    return layer if within == 0 else None


def all_edges(run: LocalRun, rule: Rule) -> Iterator[Rows] | None:
    """Every edge of the graph under a rule; None where the algebra does not know the model."""
    found = pieces(run)
    if found is None:
        return None
    return _all_edges(run, found, rule)


def _all_edges(run: LocalRun, found: list[Piece], rule: Rule) -> Iterator[Rows]:
    for piece in found:
        if piece.number == 0 and run.starts_at_embedding:
            yield token_rows(run)
        else:
            yield from piece_edges(run, piece, rule)


def known_edges(run: LocalRun, rule: Rule, name: str) -> Iterator[Rows]:
    """`all_edges` for a rule that has no other way.

    Raises:
        UserError: the algebra does not know the model's blocks, or the set's site.
    """
    edges = all_edges(run, rule)
    if edges is None:
        raise UserError(
            f"rule {name} needs to know what a block computes",
            expected=f"a model of {', '.join(BLOCKS)} with plain weights, and transcoders at resid_pre or resid_post",
            found=f"{type(run.model.host.model).__name__}, transcoders at {run.model.store.convention.write}",
            repair="use --rule autograd",
        )
    return edges


def piece_edges(run: LocalRun, piece: Piece, rule: Rule) -> Iterator[Rows]:
    """All edges of one piece, `TARGETS_AT_ONCE` targets at a time."""
    rows, sources, cut = run.target_rows(piece.number), run.source_rows(piece.number), run.cut_before(piece.number)
    projected = _project(cut, piece.blocks[0]) if cut is not None and len(piece.blocks) == 1 else None
    for start in range(0, len(rows), TARGETS_AT_ONCE):
        part = slice(start, start + TARGETS_AT_ONCE)
        cotangents, pos, values = _cotangents(run, piece, part, rule)
        if projected is not None and cut is not None:
            weights = _factored(cut, piece.blocks[0], projected, cotangents, pos, rule)
        else:
            weights = _dense(run, cut, piece, cotangents, pos, rule)
        yield Rows(rows[part], sources, weights, values)


# -- the target's end ----------------------------------------------------------------------------------------------


def _cotangents(
    run: LocalRun, piece: Piece, part: slice, rule: Rule
) -> tuple[Float[Tensor, "target d_model"], Int[Tensor, " target"], Float[Tensor, " target"]]:
    """Gradient of each target by the stream that arrives, at its position; and its value without constant parts."""
    if piece.number == len(run.cuts):
        return _target_cotangents(run, piece, run.targets[part], rule)
    cut = run.cuts[piece.number]
    pos, feature = cut.pos[part], cut.feature[part]
    transcoder = cut.transcoder
    rows = transcoder.W_enc[feature].to(piece.end.dtype)
    x = piece.end[pos]
    return encoder_gradient(transcoder, rows, x, rule), pos, encoder_value(transcoder, rows, x)


def encoder_gradient(
    transcoder: Transcoder, rows: Float[Tensor, "target d_model"], x: Float[Tensor, "target d_model"], rule: Rule
) -> Float[Tensor, "target d_model"]:
    """∂pre_j/∂x through the encoder's LayerNorm: σ (g − mean g − x̂ mean(x̂ g)), g = γ w_j; frozen: without the last."""
    if transcoder.norm_weight is None:
        return rows
    g = rows * transcoder.norm_weight.to(rows.dtype)
    unit, scale = _layer_normed(x, transcoder.norm_eps)
    centred = g - reduce(g, "target d -> target 1", "mean")
    if rule.norms == "exact":
        centred = centred - unit * reduce(unit * g, "target d -> target 1", "mean")
    return scale * centred


def encoder_value(
    transcoder: Transcoder, rows: Float[Tensor, "target d_model"], x: Float[Tensor, "target d_model"]
) -> Float[Tensor, " target"]:
    """pre_j − b_j − w_j · ln_b: what the stream itself contributes."""
    if transcoder.norm_weight is not None:
        x = _layer_normed(x, transcoder.norm_eps)[0] * transcoder.norm_weight.to(x.dtype)
    return (x * rows).sum(-1)


def _layer_normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    centred = x - reduce(x, "target d -> target 1", "mean")
    scale = torch.rsqrt(reduce(centred.square(), "target d -> target 1", "mean") + eps)
    return centred * scale, scale


def _target_cotangents(
    run: LocalRun, piece: Piece, targets: tuple[Target, ...], rule: Rule
) -> tuple[Float[Tensor, "target d_model"], Int[Tensor, " target"], Float[Tensor, " target"]]:
    norm: Any = run.model.host.decoder.norm
    head: Any = run.model.host.model.get_output_embeddings()  # type: ignore[operator]
    dtype, device = piece.end.dtype, piece.end.device
    pos = torch.tensor([target.pos for target in targets], device=device)
    directions = torch.stack(
        [
            torch.tensor(target.coefficients, dtype=dtype, device=device) @ head.weight[list(target.tokens)].to(dtype)
            for target in targets
        ]
    )
    x = piece.end[pos]
    scale = torch.rsqrt(reduce(x.square(), "target d -> target 1", "mean") + norm.variance_epsilon)
    values = (directions * norm.weight.to(dtype) * x * scale).sum(-1)
    return norm_transposed(directions, norm.weight, x, scale, rule), pos, values


# -- the source's end ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projected:
    """Source vectors and their images in a block's value and key spaces, each needed once per piece.

    `feature` arrays hold one row per *different* selected feature; `which` says which row a node uses.
    """

    vectors: Float[Tensor, "feature d_model"]
    values: Float[Tensor, "feature keyvalue"]
    keys: Float[Tensor, "feature keyvalue"]
    which: Int[Tensor, " node"]
    fields: dict[str, "Field"]


@dataclass(frozen=True)
class Field:
    """One vector per position (rest, error, bias, the normed stream) and its images."""

    vectors: Float[Tensor, "pos d_model"]
    values: Float[Tensor, "pos keyvalue"]
    keys: Float[Tensor, "pos keyvalue"]


def _project(cut: Cut, block: Block) -> Projected:
    w, record = block.weights, block.record
    dtype = record.x.dtype
    feature, which = cut.feature.unique(return_inverse=True)
    vectors = cut.transcoder.W_dec[feature].to(dtype)

    def images(y: Tensor) -> tuple[Tensor, Tensor]:
        scaled = y * w.g1.to(dtype)
        return scaled @ w.W_V.to(dtype).T, scaled @ w.W_K.to(dtype).T

    bias = repeat(cut.transcoder.b_dec.to(dtype), "d -> pos d", pos=len(record.x))
    fields = {"rest": cut.rest.to(dtype), "error": cut.error.to(dtype), "bias": bias, "unit": record.x * record.s1}
    return Projected(vectors, *images(vectors), which, {name: Field(y, *images(y)) for name, y in fields.items()})


def _factored(
    cut: Cut,
    block: Block,
    projected: Projected,
    cotangents: Float[Tensor, "target d_model"],
    pos: Int[Tensor, " target"],
    rule: Rule,
) -> Float[Tensor, "target source"]:
    """Edges of a one-block piece, columns as in `LocalRun.source_rows`."""
    w, record = block.weights, block.record
    pulled = pull_back(w, record, cotangents, pos, rule)
    same = pulled.direct
    on_query = None
    if pulled.q_bar is not None:
        on_query = (pulled.q_bar @ w.W_Q.to(same.dtype)) * w.g1.to(same.dtype)
        same = same + record.s1[pos] * on_query
    dot = _dots(projected.fields["unit"], pulled, on_query) if rule.norms == "exact" else None
    features = _feature_edges(cut, record, projected, pulled, same, dot)
    fields = {
        name: _field_edges(projected.fields[name], record, pulled, same, dot) for name in ("rest", "error", "bias")
    }
    bias = fields["bias"].sum(1) + value_bias(w, pulled.v_bar, rule)
    return torch.cat([features, fields["rest"], fields["error"], rearrange(bias, "target -> target 1")], dim=1)


def value_bias(w: BlockWeights, v_bar: Float[Tensor, "target pos keyvalue"], rule: Rule) -> Float[Tensor, " target"]:
    """What the value bias contributes when the pattern is held: it reaches every target as a constant.

    Under a live pattern the rule does not conserve, and constants are not attributed.
    """
    if w.b_V is None or rule.attention == "exact":
        return v_bar.new_zeros(len(v_bar))
    return reduce(v_bar, "target pos keyvalue -> target keyvalue", "sum") @ w.b_V.to(v_bar.dtype)


def _dots(unit: Field, pulled: Pulled, on_query: Float[Tensor, "target d_model"] | None) -> Float[Tensor, "target pos"]:
    """The normed stream's own projection: how the first norm answers to a change along the stream."""
    out = einsum(pulled.v_bar, unit.values, "j t c, t c -> j t")
    if pulled.k_bar is not None:
        out = out + einsum(pulled.k_bar, unit.keys, "j t c, t c -> j t")
    if on_query is not None:
        rows = torch.arange(len(out), device=out.device)
        extra = (on_query * unit.vectors[pulled.pos]).sum(-1)
        out = out.index_put((rows, pulled.pos), extra, accumulate=True)
    return out


def _feature_edges(
    cut: Cut,
    record: BlockRecord,
    projected: Projected,
    pulled: Pulled,
    same: Float[Tensor, "target d_model"],
    dot: Float[Tensor, "target pos"] | None,
) -> Float[Tensor, "target node"]:
    """One position of sources at a time; only targets at or after it."""
    out = same.new_zeros(len(same), len(cut.pos))
    d_model = same.shape[1]
    unit = projected.fields["unit"].vectors
    for t in cut.pos.unique().tolist():
        nodes = (cut.pos == t).nonzero()[:, 0]
        later = (pulled.pos >= t).nonzero()[:, 0]
        rows = projected.which[nodes]
        vectors = projected.vectors[rows]
        edges = pulled.v_bar[later, t] @ projected.values[rows].T
        if pulled.k_bar is not None:
            edges = edges + pulled.k_bar[later, t] @ projected.keys[rows].T
        if dot is not None:
            edges = edges - dot[later, t, None] * ((vectors @ unit[t]) / d_model)
        edges = edges * record.s1[t]
        here = (pulled.pos[later] == t).nonzero()[:, 0]
        edges = edges.index_add(0, here, same[later[here]] @ vectors.T)
        out[later[:, None], nodes] = edges * cut.activation[nodes].to(edges.dtype)
    return out


def _field_edges(
    field: Field,
    record: BlockRecord,
    pulled: Pulled,
    same: Float[Tensor, "target d_model"],
    dot: Float[Tensor, "target pos"] | None,
) -> Float[Tensor, "target pos"]:
    edges = einsum(pulled.v_bar, field.values, "j t c, t c -> j t")
    if pulled.k_bar is not None:
        edges = edges + einsum(pulled.k_bar, field.keys, "j t c, t c -> j t")
    if dot is not None:
        along = (field.vectors * record.x * record.s1).mean(-1)
        edges = edges - dot * along
    edges = edges * record.s1[:, 0]
    rows = torch.arange(len(edges), device=edges.device)
    return edges.index_put((rows, pulled.pos), (same * field.vectors[pulled.pos]).sum(-1), accumulate=True)


# -- several blocks ------------------------------------------------------------------------------------------------


def _dense(
    run: LocalRun,
    cut: Cut | None,
    piece: Piece,
    cotangents: Float[Tensor, "target d_model"],
    pos: Int[Tensor, " target"],
    rule: Rule,
) -> Float[Tensor, "target source"]:
    """Full gradients through every block of the piece, then the dot product with every node."""
    length = len(piece.end)
    gradient = cotangents.new_zeros(len(cotangents), length, cotangents.shape[1])
    gradient[torch.arange(len(pos), device=pos.device), pos] = cotangents
    constant = cotangents.new_zeros(len(cotangents))
    for block in reversed(piece.blocks):
        gradient, added = full_gradient(block, gradient, rule)
        constant = constant + added
    weights = contract(cut, gradient, run.embedding.to(gradient.dtype))
    weights[:, -1] += constant
    return weights


def full_gradient(
    block: Block, gradient: Float[Tensor, "target pos d_model"], rule: Rule
) -> tuple[Float[Tensor, "target pos d_model"], Float[Tensor, " target"]]:
    """A gradient on all positions of a block's output → on its input, and the value bias's constant part."""
    w, record = block.weights, block.record
    out = torch.zeros_like(gradient)
    constant = gradient.new_zeros(len(gradient))
    for t in range(gradient.shape[1]):
        pos = torch.full((len(gradient),), t, device=gradient.device)
        pulled = pull_back(w, record, gradient[:, t], pos, rule)
        on_n1 = pulled.v_bar @ w.W_V.to(out.dtype)
        if pulled.k_bar is not None and pulled.q_bar is not None:
            on_n1 = on_n1 + pulled.k_bar @ w.W_K.to(out.dtype)
            on_n1[:, t] += pulled.q_bar @ w.W_Q.to(out.dtype)
        out = out + norm_transposed(on_n1, w.g1, record.x, record.s1, rule)
        out[:, t] += pulled.direct
        constant = constant + value_bias(w, pulled.v_bar, rule)
    return out, constant
