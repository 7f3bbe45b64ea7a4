"""Edges through one block: targets and sources meet in its value and key spaces.

The target's cotangent u_j is pulled back in factored form (`blocks`), every source vector y at position t is projected
once onto the same small spaces, and they meet in the middle:

    e_ij = a_i { s1_t (v̄_jt · W_V γy + k̄_jt · W_K γy) + [t = t'] y · (g_mid + s1 γ W_Qᵀ q̄) − s1_t (y·x̂_t)/d · dot_jt }

with γ the first norm's gain, x̂ the normed stream and dot_jt the projection of x̂_t in place of y; the last term, k̄ and q̄
fall away where the rule freezes norms or attention. Everything that crosses positions passes n_kv · d_head numbers, so
an edge costs a dot product of that size, and a target the same whatever the number of sources. The images W_V γ d_i
and W_K γ d_i do not depend on the prompt; once half of a dictionary is asked for, all are kept (`store.derived`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from circuits.attribution import Cut, stretches
from circuits.attribution._stack import Block
from circuits.blocks import Pulled, Rule
from hooks.kernels import linear_fp32, matmul_rounded, working_dtype
from hooks.store import TranscoderStore

POSITIONS_AT_ONCE = 8  # of v̄ and k̄
ROWS_AT_ONCE = 64  # of a decoder: what stays in a core's cache
GATHERED = 60  # products with a decoder row that take as long as gathering it (measured: 2 cores and d_model 5120)


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
    return Fields(rows[at], images, (rows[at] * unit).mean(-1))


def _table(
    image: Callable[[Tensor], Tensor], W_dec: Float[Tensor, "feature d_model"], dtype: torch.dtype
) -> Float[Tensor, "feature keyvalue"]:
    """The images of a whole dictionary in the precision of the model's weights, some rows at a time."""
    rows = max(1, (1 << 24) // W_dec.shape[1])
    return torch.cat([image(part).to(dtype) for part in W_dec.split(rows)])


def meet(cut: Cut, block: Block, projected: Projected, pulled: Pulled, rule: Rule) -> Float[Tensor, "target source"]:
    """Edges of a one-block step, columns: features, rest, error, bias.

    v̄ and k̄ are formed for a few positions of sources, for the targets at or after them (these stand together), and
    dropped: at all positions they would be the largest thing here, and half of it zeros.
    """
    count, whole, length = len(cut.pos), len(cut.rest), pulled.length
    fields, scale = projected.fields, block.record.s1[:length, 0]
    first = torch.searchsorted(pulled.pos, torch.arange(length + 1, device=pulled.pos.device)).tolist()
    same, along_unit = _at_own_position(block, fields, pulled)
    features = _Features(cut, projected, same, first, scale.tolist(), norms=rule.norms == "exact")
    out = same.new_zeros(len(same), count + 2 * whole + 1)
    seen = same.new_zeros(len(fields.vectors), len(same), length)
    for start in range(0, length, POSITIONS_AT_ONCE):
        at, later = slice(start, min(start + POSITIONS_AT_ONCE, length)), slice(first[start], None)
        bars = [bar for bar in (pulled.v_bar(later, at), pulled.k_bar(later, at)) if bar is not None]
        for bar, image in zip(bars, fields.images, strict=True):
            seen[:, later, at] += einsum(bar, image[:, at], "j t c, field t c -> field j t")
        own = slice(first[at.start], first[at.stop])
        seen[-1, own].scatter_add_(1, pulled.pos[own, None], along_unit[own, None])
        for t in range(at.start, at.stop):
            after = slice(first[t], None)
            features.put(out, t, [bar[first[t] - first[start] :, t - start] for bar in bars], seen[-1, after, t])
    rows = torch.arange(len(same), device=same.device)
    if rule.norms == "exact":  # how the first norm answers to a change along the stream
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


class _Features:
    """What the features of a cut give to the targets, one position of sources at a time.

    At each position stand some probes: the gradients of the targets there, then, where norms respond, the normed
    stream. They meet the whole dictionary at once where that is cheaper than gathering every node's decoder row.
    """

    def __init__(
        self,
        cut: Cut,
        projected: Projected,
        same: Float[Tensor, "target d_model"],
        first: list[int],
        scale: list[float],
        *,
        norms: bool,
    ) -> None:
        self._cut, self._projected, self._norms, self._first, self._scale = cut, projected, norms, first, scale
        self._nodes = dict(stretches(cut.pos, len(scale)))
        most = max((nodes.stop - nodes.start for nodes in self._nodes.values()), default=0)
        # rows are gathered into memory that is already there: fresh pages would cost ten times the copy
        self._rooms = [table.new_empty(most, table.shape[1]) for table in projected.images]
        W_dec, unit = cut.transcoder.W_dec, projected.fields.vectors[-1]
        self._W_dec = W_dec
        places = enumerate(pairwise(first))
        parts = [part for t, (start, stop) in places for part in (same[start:stop], unit[t : t + norms])]
        self._probes = torch.cat(parts)
        whole = self._probes.dtype == working_dtype(W_dec) and len(self._probes) * len(W_dec) < GATHERED * len(cut.pos)
        self._products = linear_fp32(self._probes, W_dec, None) if whole else None
        self._room = W_dec.new_empty(0 if whole else ROWS_AT_ONCE, W_dec.shape[1])

    def put(
        self,
        out: Float[Tensor, "target source"],
        t: int,
        bars: Sequence[Float[Tensor, "later keyvalue"]],
        dot: Float[Tensor, " later"],
    ) -> None:
        """Fill the columns of position t, for the targets at or after it.

        Args:
            bars: v̄ and k̄ there.
            dot: the part of the gradient on the normed stream that lies along it.
        """
        nodes = self._nodes.get(t)
        if nodes is None:
            return
        first, stop = self._first[t], self._first[t + 1]
        edges = None
        for bar, table, room in zip(bars, self._projected.images, self._rooms, strict=True):
            which = self._projected.which[nodes]
            part = matmul_rounded(bar, torch.index_select(table, 0, which, out=room[: len(which)]).T)
            edges = part if edges is None else edges.add_(part)
        assert edges is not None
        met = self._met(slice(first + self._norms * t, stop + self._norms * (t + 1)), self._cut.feature[nodes])
        if self._norms:
            edges.addr_(dot, met[-1], alpha=-1 / self._probes.shape[1])
        activation = self._cut.activation[nodes].to(edges.dtype)
        torch.mul(edges, self._scale[t] * activation, out=out[first:, nodes])
        out[first:stop, nodes] += met[: stop - first] * activation

    def _met(self, probes: slice, feature: Int[Tensor, " node"]) -> Float[Tensor, "probe node"]:
        if self._products is not None:
            return self._products[probes].index_select(1, feature)
        parts = feature.split(ROWS_AT_ONCE)
        return torch.cat([self._gathered(self._probes[probes], part) for part in parts], dim=1)

    def _gathered(
        self, probes: Float[Tensor, "probe d_model"], feature: Int[Tensor, " node"]
    ) -> Float[Tensor, "probe node"]:
        rows = torch.index_select(self._W_dec, 0, feature, out=self._room[: len(feature)])
        return probes @ rows.to(probes.dtype).T
