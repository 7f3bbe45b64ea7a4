"""What the features of a cut give to the targets behind one block: most of the work of `_middle`, in two ways.

At each position stand some probes: the gradients of the targets there, then, where norms respond, the normed stream.
They meet the decoder rows of the features there; v̄ and k̄ of the targets at or after the position meet their images.
`Lying` reads rows where they lie (`hooks.rows`). `Gathered` says the same in plain tensor operations, anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from circuits.attribution import Cut, stretches
from hooks.kernels import linear_fp32, matmul_rounded, working_dtype
from hooks.rows import add_products, cut_blocks, usable

ROWS_AT_ONCE = 64  # of a decoder: what stays in a core's cache
GATHERED = 60  # products with a decoder row that take as long as gathering it (measured: 2 cores and d_model 5120)
FEATURES_AT_ONCE = 384  # of a dictionary, that the probes of all positions meet before the next ones are read


@dataclass(frozen=True)
class Sources:
    """The features of a cut, and what meets them.

    Attributes:
        images: W_V γ d_i of some features, and W_K γ d_i unless the rule holds the pattern.
        which: the row of each node there.
        first: how many targets stand before each position, and how many there are.
        same: the gradient at each target's own position; targets ascend by position.
        unit: the normed stream x̂.
        scale: 1 / rms at every position that is reached.
        norms: whether norms respond.
    """

    cut: Cut
    images: tuple[Float[Tensor, "feature keyvalue"], ...]
    which: Int[Tensor, " node"]
    first: list[int]
    same: Float[Tensor, "target d_model"]
    unit: Float[Tensor, "pos d_model"]
    scale: Float[Tensor, " reached"]
    norms: bool

    @cached_property
    def nodes(self) -> dict[int, slice]:
        """Where the nodes of each position stand."""
        return dict(stretches(self.cut.pos, len(self.scale)))

    @cached_property
    def probes(self) -> Float[Tensor, "probe d_model"]:
        """Position by position: its targets' gradients, then the stream if norms respond."""
        if not self.norms:
            return self.same
        places = enumerate(pairwise(self.first))
        return torch.cat([part for t, (a, b) in places for part in (self.same[a:b], self.unit[t : t + 1])])

    def probes_at(self, t: int) -> slice:
        """Where the probes of a position stand."""
        return slice(self.first[t] + self.norms * t, self.first[t + 1] + self.norms * (t + 1))

    @cached_property
    def activation(self) -> Float[Tensor, " node"]:
        """Each node's activation in the precision of the gradients."""
        return self.cut.activation.to(self.same.dtype)


def features_of(sources: Sources) -> "Gathered | Lying":
    """The faster of the two ways that can be gone."""
    W_dec, count = sources.cut.transcoder.W_dec, len(sources.cut.pos) * len(sources.same)
    known = all(usable(sources.same, table, count * W_dec.shape[1]) for table in (W_dec, *sources.images))
    return Lying(sources) if known else Gathered(sources)


class Gathered:
    """Gathers the decoder rows and images of one position after the other.

    Probes meet the whole dictionary at once where that is cheaper than gathering every node's decoder row.
    """

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        most = max((nodes.stop - nodes.start for nodes in sources.nodes.values()), default=0)
        # rows are gathered into memory that is already there: fresh pages would cost ten times the copy
        self._rooms = [table.new_empty(most, table.shape[1]) for table in sources.images]
        self._W_dec, self._probes = sources.cut.transcoder.W_dec, sources.probes
        cheap = len(self._probes) * len(self._W_dec) < GATHERED * len(sources.cut.pos)
        whole = cheap and self._probes.dtype == working_dtype(self._W_dec)
        self._products = linear_fp32(self._probes, self._W_dec, None) if whole else None
        self._room = self._W_dec.new_empty(0 if whole else ROWS_AT_ONCE, self._W_dec.shape[1])

    def put(
        self,
        out: Float[Tensor, "target source"],
        at: range,
        bars: Sequence[Float[Tensor, "later at keyvalue"]],
        along: Float[Tensor, "target pos"],
    ) -> None:
        """Fill the columns of some positions, for the targets at or after each; what stood there is forgotten.

        Args:
            bars: v̄ and k̄ there, of the targets at or after the first of them.
            along: the part of each gradient on the normed stream that lies along it.
        """
        first = self._sources.first
        for t in at:
            self._put(out, t, [bar[first[t] - first[at.start] :, t - at.start] for bar in bars], along[first[t] :, t])

    def _put(
        self,
        out: Float[Tensor, "target source"],
        t: int,
        bars: Sequence[Float[Tensor, "later keyvalue"]],
        along: Float[Tensor, " later"],
    ) -> None:
        s = self._sources
        nodes = s.nodes.get(t)
        if nodes is None:
            return
        first, stop = s.first[t], s.first[t + 1]
        edges = None
        for bar, table, room in zip(bars, s.images, self._rooms, strict=True):
            which = s.which[nodes]
            part = matmul_rounded(bar, torch.index_select(table, 0, which, out=room[: len(which)]).T)
            edges = part if edges is None else edges.add_(part)
        assert edges is not None
        met = self._met(s.probes_at(t), s.cut.feature[nodes])
        if s.norms:
            edges.addr_(along, met[-1], alpha=-1 / self._probes.shape[1])
        activation = s.activation[nodes]
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
        rows = torch.index_select(self._W_dec, 0, feature, out=self._room[: len(feature)])
        return probes @ rows.to(probes.dtype).T


class Lying:
    """Meets decoder rows and images where they lie: nothing is gathered, and only what is asked for is formed."""

    def __init__(self, sources: Sources) -> None:
        s = self._sources = sources
        at = range(len(s.scale))
        self._starts = torch.tensor([s.nodes[t].start if t in s.nodes else 0 for t in at])
        self._stops = torch.tensor([s.nodes[t].stop if t in s.nodes else 0 for t in at])
        first, W_dec = torch.tensor(s.first), s.cut.transcoder.W_dec
        probes, reached = s.norms + first.diff(), slice(int(self._stops.max()))
        self._which, feature = s.which[reached], s.cut.feature[reached]
        self._met = s.same.new_zeros(int(probes.max()), len(feature))
        add_products(self._met, [(s.probes, W_dec)], feature, self._by_feature(probes, len(W_dec)))
        self._column = s.activation[reached] * self._spread(s.scale)
        last = self._spread(probes - 1)  # the normed stream
        pos = torch.arange(len(probes))
        counts = len(s.same) - first[:-1]
        columns = [first[:-1], counts, self._starts, self._stops, torch.zeros_like(pos), pos, pos]
        self._blocks = cut_blocks(torch.stack(columns, dim=1))
        self._bounds = torch.searchsorted(self._blocks[:, 5].contiguous(), torch.arange(len(probes) + 1)).tolist()
        self._unit = -self._met[last, torch.arange(len(last))] / W_dec.shape[1] if s.norms else None

    def _spread(self, each: Shaped[Tensor, " reached"]) -> Shaped[Tensor, " node"]:
        """One number per position → the number of each node's."""
        return each.repeat_interleave(self._stops - self._starts)

    def _by_feature(self, probes: Int[Tensor, " reached"], features: int) -> Int[Tensor, "block 7"]:
        """Every position's nodes in as many parts: neighbouring parts meet about the same rows."""
        parts = -(-features // FEATURES_AT_ONCE)
        part = rearrange(torch.arange(parts + 1), "part -> part 1")
        edges = self._starts + (self._stops - self._starts) * part // parts
        columns = (0, probes, edges[:-1], edges[1:], probes.cumsum(0) - probes, 0, part[:-1])
        wide = [torch.as_tensor(each).expand(parts, len(probes)) for each in columns]
        return cut_blocks(rearrange(torch.stack(wide, dim=-1), "part pos number -> (part pos) number"))

    def put(
        self,
        out: Float[Tensor, "target source"],
        at: range,
        bars: Sequence[Float[Tensor, "later at keyvalue"]],
        along: Float[Tensor, "target pos"],
    ) -> None:
        """As `Gathered.put`."""
        s, begin = self._sources, self._sources.first[at.start]
        blocks = self._blocks[self._bounds[at.start] : self._bounds[at.stop]].clone()
        blocks[:, 4] = (blocks[:, 0] - begin) * len(at) + blocks[:, 5] - at.start  # rows of v̄
        rank_one = None if self._unit is None else (along, self._unit)
        lefts = [
            rearrange(bar.to(table.dtype).to(bar.dtype), "later at keyvalue -> (later at) keyvalue")
            for bar, table in zip(bars, s.images, strict=True)
        ]
        pairs = list(zip(lefts, s.images, strict=True))
        add_products(out, pairs, self._which, blocks, column=self._column, step=len(at), rank_one=rank_one, fresh=True)
        for t in at:
            if t in s.nodes:
                first, stop, nodes = s.first[t], s.first[t + 1], s.nodes[t]
                out[first:stop, nodes] += self._met[: stop - first, nodes] * s.activation[nodes]
