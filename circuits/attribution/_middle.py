"""Edges through one block: targets and sources meet in its value and key spaces.

The target's cotangent u_j is pulled back in factored form (`blocks`), every source vector y at position t is projected
once onto the same small spaces, and they meet in the middle:

    e_ij = a_i { s1_t (v̄_jt · W_V γy + k̄_jt · W_K γy) + [t = t'] y · (g_mid + s1 γ W_Qᵀ q̄) − s1_t (y·x̂_t)/d · dot_jt }

with γ the first norm's gain, x̂ the normed stream and dot_jt the projection of x̂_t in place of y; the last term, k̄ and q̄
fall away where the rule freezes norms or attention. Everything that crosses positions passes n_kv · d_head numbers, so
an edge costs a dot product of that size, and a target the same whatever the number of sources. The images W_V γ d_i
and W_K γ d_i do not depend on the prompt; once half of a dictionary is asked for, all are kept (`store.derived`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution import Cut
from circuits.attribution._features import Sources, features_of
from circuits.attribution._room import Room
from circuits.attribution._stack import Block
from circuits.blocks import Pulled, Rule
from hooks.kernels import matmul_rounded
from hooks.store import TranscoderStore

POSITIONS_AT_ONCE = 8  # of v̄ and k̄


@dataclass(frozen=True)
class Fields:
    """Vectors that stand at every position: rest, error, bias, and last the normed stream x̂; and their images.

    Attributes:
        images: in the spaces that `Projected.images` names.
        along: y · x̂ / d_model of each, how far it lies along the stream it is part of.
    """

    vectors: Float[Tensor, "field pos d_model"]
    images: tuple[Float[Tensor, "field pos keyvalue"], ...]
    along: Float[Tensor, "field pos"]


@dataclass(frozen=True)
class Projected:
    """The images of a cut's nodes in a block's value and key spaces.

    Attributes:
        images: W_V γ d_i of some features, and W_K γ d_i unless the rule holds the pattern.
        which: the row of each node.
    """

    images: tuple[Float[Tensor, "feature keyvalue"], ...]
    which: Int[Tensor, " node"]
    fields: Fields


def project(store: TranscoderStore, cut: Cut, block: Block, rule: Rule) -> Projected:
    """Everything about the sources that no target changes."""
    w, record = block.weights, block.record
    gain, W_dec = w.g1.to(record.x.dtype), cut.transcoder.W_dec
    weights = {"values": w.W_V} if rule.attention == "frozen" else {"values": w.W_V, "keys": w.W_K}
    which, images = cut.feature, []
    whole = 2 * int(torch.bincount(cut.feature, minlength=1).count_nonzero()) > len(W_dec)
    if not whole:
        feature, which = cut.feature.unique(return_inverse=True)
    for name, weight in weights.items():

        def image(rows: Tensor, weight: Tensor = weight) -> Tensor:
            return matmul_rounded(rows.to(gain.dtype) * gain, weight.T)

        if whole:  # the static table pays off
            images.append(store.derived(cut.layer, name, (weight, w.g1), partial(_table, image, W_dec, weight.dtype)))
        else:
            images.append(image(W_dec[feature]))
    unit = record.x * record.s1
    return Projected(tuple(images), which, _fields(cut, unit, gain, list(weights.values())))


def _fields(
    cut: Cut, unit: Float[Tensor, "pos d_model"], gain: Float[Tensor, " d_model"], weights: list[Tensor]
) -> Fields:
    rows = torch.cat([cut.rest.to(unit), cut.error.to(unit), unit, rearrange(cut.bias.to(unit), "d -> 1 d")])
    rest, error, own = torch.arange(len(rows) - 1, device=unit.device).split(len(unit))
    at = torch.stack([rest, error, torch.full_like(own, len(rows) - 1), own])  # the one bias stands everywhere
    images = tuple(matmul_rounded(rows * gain, weight.T)[at] for weight in weights)
    vectors = rows[at]
    return Fields(vectors, images, einsum(vectors, unit, "field pos d, pos d -> field pos") / unit.shape[1])


def _table(
    image: Callable[[Tensor], Tensor], W_dec: Float[Tensor, "feature d_model"], dtype: torch.dtype
) -> Float[Tensor, "feature keyvalue"]:
    """The images of a whole dictionary in the precision of the model's weights, some rows at a time."""
    rows = max(1, (1 << 24) // W_dec.shape[1])
    return torch.cat([image(part).to(dtype) for part in W_dec.split(rows)])


def meet(
    cut: Cut, block: Block, projected: Projected, pulled: Pulled, rule: Rule, room: Room
) -> Float[Tensor, "target source"]:
    """Edges of a one-block step, columns: features, rest, error, bias.

    v̄ and k̄ are formed for a few positions of sources, for the targets at or after them (these stand together), and
    dropped: at all positions they would be the largest thing here, and half of it zeros.
    """
    count, whole, length = len(cut.pos), len(cut.rest), pulled.length
    fields, scale = projected.fields, block.record.s1[:length, 0]
    first = torch.searchsorted(pulled.pos, torch.arange(length + 1, device=pulled.pos.device)).tolist()
    same, along_unit = _at_own_position(block, fields, pulled)
    norms = rule.norms == "exact"
    sources = Sources(cut, projected.images, projected.which, first, same, fields.vectors[-1], scale, norms)
    features = features_of(sources)
    out = room.empty((len(same), count + 2 * whole + 1), same)
    for t, nodes in sources.nodes.items():
        out[: first[t], nodes] = 0  # a target has no edge from a later position
    out[:, max((nodes.stop for nodes in sources.nodes.values()), default=0) :] = 0
    seen = same.new_zeros(len(fields.vectors), len(same), length)
    for start in range(0, length, POSITIONS_AT_ONCE):
        at, later = slice(start, min(start + POSITIONS_AT_ONCE, length)), slice(first[start], None)
        bars = [bar for bar in (pulled.v_bar(later, at), pulled.k_bar(later, at)) if bar is not None]
        for bar, image in zip(bars, fields.images, strict=True):
            seen[:, later, at] += einsum(bar, image[:, at], "j t c, field t c -> field j t")
        own = slice(first[at.start], first[at.stop])
        seen[-1, own].scatter_add_(1, pulled.pos[own, None], along_unit[own, None])
        features.put(out, range(at.start, at.stop), bars, seen[-1])
    rows = torch.arange(len(same), device=same.device)
    if norms:  # how the first norm answers to a change along the stream
        seen = seen - seen[-1] * rearrange(fields.along[:, :length], "field pos -> field 1 pos")
    seen = seen[:-1] * scale
    seen[:, rows, pulled.pos] += einsum(same, fields.vectors[:-1, pulled.pos], "j d, field j d -> field j")
    out[:, count : count + length], out[:, count + whole : count + whole + length] = seen[0], seen[1]
    out[:, -1] = seen[2].sum(1)
    return out


def _at_own_position(
    block: Block, fields: Fields, pulled: Pulled
) -> tuple[Float[Tensor, "target d_model"], Float[Tensor, " target"]]:
    """The gradient at each target's own position, but for values and keys; and the queries' part along the stream."""
    if pulled.q_bar is None:
        return pulled.direct, pulled.direct.new_zeros(len(pulled.direct))
    on_query = matmul_rounded(pulled.q_bar, block.weights.W_Q) * block.weights.g1.to(pulled.direct.dtype)
    along = (on_query * fields.vectors[-1, pulled.pos]).sum(-1)
    return pulled.direct + block.record.s1[pulled.pos] * on_query, along
