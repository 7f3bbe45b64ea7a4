"""Edges from the features of a cut to targets one block above: most of the work of `one_block`, in two implementations.

Each position has some *probes*: the gradients of the targets there and, if norms respond, the normed stream. An edge is
the sum of two kinds of products: of the probes with the decoder rows of the features at their position; and of v̄ and k̄
of the targets at or after a position with the images of the features at that position. `EdgesInPlace` reads rows in
place (`hooks.kernels.rows_in_place`). `Gathered` computes the same with plain tensor operations, on any device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from circuits.blocks import Pulled
from circuits.edges.run import Cut, stretches
from hooks.kernels import (
    INNER,
    add_products,
    compiled,
    cut_blocks,
    linear_fp32,
    matmul_fp32,
    on_every_thread,
    usable,
    working_dtype,
)

ROWS_AT_ONCE = 64  # rows of a decoder that stay in a core's cache
GATHERED = 60  # as many products with a decoder row take as long as copying it (measured: 2 cores and d_model 5120)
POSITIONS_AT_ONCE = 8  # positions for which v̄ and k̄ are computed at once
FEATURES_AT_ONCE = 384  # features of a dictionary that are multiplied with all probes before the next ones are read


@dataclass(frozen=True)
class Sources:
    """The features of a cut, and the factors that they are multiplied with.

    Attributes:
        images: W_V γ d_i of some features, and W_K γ d_i unless the rule holds the pattern.
        which: of each node, its row in `images`.
        fields: the same images of vectors that every position has; the last is x̂ if norms respond.
        pulled: v̄ and k̄ of the targets, in factored form; targets ascend by position.
        same: the gradient at each target's own position.
        along: the component of it along x̂, without the skip connection's part.
        unit: the normed stream x̂ at every position that has an edge.
        scale: 1 / rms there.
    """

    cut: Cut
    images: tuple[Float[Tensor, "feature keyvalue"], ...]
    which: Int[Tensor, " node"]
    fields: tuple[Float[Tensor, "field pos keyvalue"], ...]
    pulled: Pulled
    same: Float[Tensor, "target d_model"]
    along: Float[Tensor, " target"]
    unit: Float[Tensor, "reached d_model"]
    scale: Float[Tensor, " reached"]

    @property
    def norms(self) -> bool:
        """Whether norms respond."""
        return self.pulled.rule.norms == "exact"

    @cached_property
    def first(self) -> list[int]:
        """How many targets are before each position; the last entry is the number of targets."""
        places = torch.arange(len(self.scale) + 1, device=self.same.device)
        return torch.searchsorted(self.pulled.pos.contiguous(), places).tolist()

    @cached_property
    def nodes(self) -> dict[int, slice]:
        """The slice of nodes at each position."""
        return dict(stretches(self.cut.pos, len(self.scale)))

    @cached_property
    def probes(self) -> Float[Tensor, "probe d_model"]:
        """Position by position: its targets' gradients, then the stream if norms respond."""
        if not self.norms:
            return self.same
        places = enumerate(pairwise(self.first))
        return torch.cat([part for t, (a, b) in places for part in (self.same[a:b], self.unit[t : t + 1])])

    def probes_at(self, t: int) -> slice:
        """The slice of probes at a position."""
        return slice(self.first[t] + self.norms * t, self.first[t + 1] + self.norms * (t + 1))

    @cached_property
    def activation(self) -> Float[Tensor, " node"]:
        """Each node's activation in the precision of the gradients."""
        return self.cut.activation.to(self.same.dtype)


def features_of(sources: Sources) -> "Gathered | EdgesInPlace":
    """The faster of the two implementations that is possible here."""
    W_dec, count = sources.cut.transcoder.W_dec, len(sources.cut.pos) * len(sources.same)
    known = all(usable(sources.same, table, count * W_dec.shape[1]) for table in (W_dec, *sources.images))
    return EdgesInPlace(sources) if known else Gathered(sources)


class Gathered:
    """Copies the decoder rows and images of one position after the other.

    Probes are multiplied with the whole dictionary at once if that is cheaper than copying every node's decoder row. v̄
    and k̄ are computed for a few source positions at a time, for the targets at or after them (a contiguous range), and
    then freed: for all positions they would be the largest tensors here, and half of their entries would be zeros.
    """

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        most = max((nodes.stop - nodes.start for nodes in sources.nodes.values()), default=0)
        # rows are copied into buffers that are used again: new pages would cost ten times the copy
        self._buffers = [table.new_empty(most, table.shape[1]) for table in sources.images]
        self._W_dec, self._probes = sources.cut.transcoder.W_dec, sources.probes
        cheap = len(self._probes) * len(self._W_dec) < GATHERED * len(sources.cut.pos)
        whole = cheap and self._probes.dtype == working_dtype(self._W_dec)
        self._products = linear_fp32(self._probes, self._W_dec, None) if whole else None
        self._buffer = self._W_dec.new_empty(0 if whole else ROWS_AT_ONCE, self._W_dec.shape[1])

    def put(self, out: Float[Tensor, "target source"]) -> Float[Tensor, "field target reached"]:
        """Overwrite the columns of all nodes, at positions that have an edge.

        Returns:
            Products of v̄ and k̄ with the images of each field; if norms respond, `along` is added to the last one.
        """
        s, reached = self._sources, len(self._sources.scale)
        seen = s.same.new_zeros(len(s.fields[0]), len(s.same), reached)
        for start in range(0, reached, POSITIONS_AT_ONCE):
            at = slice(start, min(start + POSITIONS_AT_ONCE, reached))
            later = slice(s.first[start], None)
            bars = [bar for bar in (s.pulled.v_bar(later, at), s.pulled.k_bar(later, at)) if bar is not None]
            for bar, image in zip(bars, s.fields, strict=True):
                seen[:, later, at] += einsum(bar, image[:, at], "j t c, field t c -> field j t")
            if s.norms:
                own = slice(s.first[at.start], s.first[at.stop])
                seen[-1, own].scatter_add_(1, s.pulled.pos[own, None], s.along[own, None])
            for t in range(at.start, at.stop):
                self._put(out, t, [bar[s.first[t] - s.first[start] :, t - start] for bar in bars], seen[-1, :, t])
        return seen

    def _put(
        self,
        out: Float[Tensor, "target source"],
        t: int,
        bars: Sequence[Float[Tensor, "later keyvalue"]],
        through: Float[Tensor, " target"],
    ) -> None:
        s = self._sources
        nodes = s.nodes.get(t)
        if nodes is None:
            return
        first, stop = s.first[t], s.first[t + 1]
        edges = None
        for bar, table, buffer in zip(bars, s.images, self._buffers, strict=True):
            which = s.which[nodes]
            part = matmul_fp32(bar, torch.index_select(table, 0, which, out=buffer[: len(which)]).T)
            edges = part if edges is None else edges.add_(part)
        assert edges is not None
        met = self._met(s.probes_at(t), s.cut.feature[nodes])
        if s.norms:
            edges.addr_(through[first:], met[-1], alpha=-1 / self._probes.shape[1])
        activation = s.activation[nodes]
        out[:first, nodes] = 0  # a target has no edge from a later position
        torch.mul(edges, s.scale[t] * activation, out=out[first:, nodes])
        out[first:stop, nodes] += met[: stop - first] * activation

    def _met(self, probes: slice, feature: Int[Tensor, " node"]) -> Float[Tensor, "probe node"]:
        if self._products is not None:
            return self._products[probes].index_select(1, feature)
        parts = feature.split(ROWS_AT_ONCE)
        return torch.cat([self._gathered(self._probes[probes], part) for part in parts], dim=1)

    def _gathered(
        self, probes: Float[Tensor, "probe d_model"], feature: Int[Tensor, " node"]
    ) -> Float[Tensor, "probe node"]:
        rows = torch.index_select(self._W_dec, 0, feature, out=self._buffer[: len(feature)])
        return probes @ rows.to(probes.dtype).T


class EdgesInPlace:
    """Reads decoder rows and images in place: none is copied, and only the needed products are computed.

    v̄ and k̄ of a position are computed by the thread that needs them, and stay in its core's cache.
    """

    def __init__(self, sources: Sources) -> None:
        s = self._sources = sources
        at = range(len(s.scale))
        self._starts = torch.tensor([s.nodes[t].start if t in s.nodes else 0 for t in at])
        self._stops = torch.tensor([s.nodes[t].stop if t in s.nodes else 0 for t in at])
        self._first = torch.tensor(s.first)
        W_dec, reached = s.cut.transcoder.W_dec, slice(int(self._stops.max()))
        probes, feature = s.norms + self._first.diff(), s.cut.feature[reached]
        self._met = s.same.new_zeros(int(probes.max()), len(feature))
        add_products(self._met, s.probes, W_dec, feature, self._by_feature(probes, len(feature)))

    def _by_feature(self, probes: Int[Tensor, " reached"], nodes: int) -> Int[Tensor, "block 6"]:
        """Blocks for `add_products`: some features of every position, then the next features. So neighbouring blocks
        use the same rows of the dictionary."""
        cut, features = self._sources.cut, len(self._sources.cut.transcoder.W_dec)
        place = cut.pos[:nodes] * features + cut.feature[:nodes]  # ascends
        part = torch.arange(0, features + FEATURES_AT_ONCE, FEATURES_AT_ONCE).clamp(max=features)
        pos = rearrange(torch.arange(len(probes)), "pos -> pos 1")
        edges = rearrange(torch.searchsorted(place, pos * features + part), "pos part -> part pos")
        columns = (0, probes, edges[:-1], edges[1:], probes.cumsum(0) - probes, rearrange(part[:-1], "part -> part 1"))
        wide = [torch.as_tensor(each).expand(len(part) - 1, len(probes)) for each in columns]
        return cut_blocks(rearrange(torch.stack(wide, dim=-1), "part pos number -> (part pos) number"))

    def put(self, out: Float[Tensor, "target source"]) -> Float[Tensor, "field target reached"]:
        """As `Gathered.put`."""
        tiles = compiled()
        assert tiles is not None
        assert out.is_contiguous()
        s, pulled, first = self._sources, self._sources.pulled, self._first
        w, table = pulled.w, s.images[0]
        assert all(each.stride() == table.stride() and each.dtype == table.dtype for each in s.images)
        pos = torch.arange(len(s.scale))
        blocks = [first[:-1], len(s.same) - first[:-1], self._starts, self._stops, torch.zeros_like(pos), pos]
        block = cut_blocks(torch.stack(blocks, dim=1))
        seen = s.same.new_zeros(len(s.fields[0]), len(s.same), len(pos))
        held = [each.contiguous() for each in (pulled.pattern, pulled.scores) if each is not None]
        vectors, fields = (pulled.heads.contiguous(), pulled.queries), [field.contiguous() for field in s.fields]
        unit, unit_scale, gain = pulled.record.k.unit, pulled.record.k.scale, w.k_norm
        numbers = {
            "blocks": len(block),
            "most": int(block[:, 1].max()),
            "widest": int((block[:, 3] - block[:, 2]).max()),
            "targets": len(s.same),
            "positions": len(pos),
            "nodes": self._met.shape[1],
            "probes": len(self._met),
            "sources": out.shape[1],
            "inner": table.shape[1],
            "next_row": table.stride(0) * table.element_size(),
            "narrow": table.dtype == torch.bfloat16,
            "chunk": INNER,
            "pairs": len(held),
            "heads": w.n_kv,
            "group": w.group,
            "size": w.d_head,
            "fields": len(fields[0]),
            "norms": s.norms,
            "key_norm": 0 if gain is None else tiles.EXACT if s.norms else tiles.FROZEN,
            "d_model": s.same.shape[1],
        }
        none = s.same.new_empty(0)
        arrays = {
            "block": block,
            "first": first,
            "out": out,
            "seen": seen,
            "direct": self._met,
            "along": s.along,
            "activation": s.activation,
            "scale": s.scale,
            "row": s.which,
            "order": torch.arange(len(fields[0])),
            "table": _places(s.images),
            "image": _places(fields),
            "weight": _places(held),
            "vector": _places(vectors),
            "cos": pulled.record.cos.to(none),
            "sin": pulled.record.sin.to(none),
            "gain": none if gain is None else gain.to(none),
            "unit": none if unit is None else unit,
            "unit_scale": none if unit_scale is None else unit_scale,
        }
        arrays = {name: array.contiguous() for name, array in arrays.items()}
        work = block[:, 1] * (block[:, 3] - block[:, 2] + len(fields[0]))
        on_every_thread(tiles.work_heads, tiles.GIVEN_HEADS, numbers, arrays, work)
        return seen


def _places(arrays: Sequence[Tensor]) -> Int[Tensor, " array"]:
    """The addresses of some arrays in memory."""
    return torch.tensor([array.data_ptr() for array in arrays])
