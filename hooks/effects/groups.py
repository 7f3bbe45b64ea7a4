"""Groups of interventions as rows of one pass: where each joins, what it adds there, and what it changes later on.

Where rows cannot share a clean run, `run_whole` gives the same by the whole prompt, once per group.

What the first layer of a group changes is known from the clean run, since nothing below it differs. At its later layers
the features are encoded on the stream as it arrives. The rules are those of `intervene`: delta form, a → factor · a +
shift, `when_inactive`, one cast at the end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.checkpoints import TranscoderStore
from hooks.effects.staggered import Clean, Rows, Walk
from hooks.host import Batch, Host, tap
from hooks.interventions import change
from hooks.kernels import gather_features
from hooks.passes import Interventions, LayerTable, make_edits, make_plan
from hooks.sites import Site
from hooks.types import Edit, Pass, SparseActs

BETWEEN_BLOCKS = ("resid_pre", "resid_post", "mlp_out")  # what is written there is part of the stream of the next block


@dataclass(frozen=True)
class Hits:
    """(entry, position) pairs of a layer's table.

    Attributes:
        change: new − old activation, where it is known.
    """

    entry: Int[Tensor, " hit"]
    group: Int[Tensor, " hit"]
    pos: Int[Tensor, " hit"]
    change: Float[Tensor, " hit"] | None = None

    def of(self, chosen: Tensor) -> "Hits":
        """Some of them."""
        change = None if self.change is None else self.change[chosen]
        return Hits(self.entry[chosen], self.group[chosen], self.pos[chosen], change)


@dataclass(frozen=True)
class Work:
    """Groups as tensors.

    Attributes:
        tables: entries of every layer; an entry's row is its group.
        start: first position that differs.
        block: in front of which block it joins.
        first: the layer that changes something first.
        inside: whether what the first layer writes is added inside a block, not as the row joins.
        known: by layer, what is changed by groups of which it is the first.
        end: one past the position where effects are read.
    """

    tables: Mapping[int, LayerTable]
    start: Int[Tensor, " group"]
    block: Int[Tensor, " group"]
    first: Int[Tensor, " group"]
    inside: Bool[Tensor, " group"]
    known: Mapping[int, Hits]
    end: int


def lay_out(
    host: Host,
    store: TranscoderStore,
    tables: Mapping[int, LayerTable],
    dense: Mapping[int, Float[Tensor, "pos feature"]],
    n: int,
    end: int,
) -> Work:
    """Where each group joins, and what it changes there.

    Args:
        dense: by layer, the clean run's activations.
        n: groups.
        end: one past the position where effects are read.
    """
    order = sorted(tables, key=lambda layer: (store.sites(layer)[1].depth, layer))
    start, first = torch.full((n,), end), torch.full((n,), -1)
    layers: dict[int, list[int]] = {}
    for layer in order:
        start.scatter_reduce_(0, tables[layer].rows, tables[layer].start, "amin")
        for group in tables[layer].rows.unique().tolist():
            layers.setdefault(group, []).append(layer)
    block, inside = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.bool)
    entries = {chosen: _entry(store, chosen) for chosen in {tuple(chosen) for chosen in layers.values()}}
    for group, chosen in layers.items():
        first[group] = chosen[0]
        block[group], inside[group] = entries[tuple(chosen)]
    known = {}
    for layer, table in tables.items():
        hits = _all_hits(table, end)
        hits = hits.of(first[hits.group] == layer)
        old = dense[layer][hits.pos, table.features[hits.entry]]
        known[layer] = replace(hits, change=_change(table, hits.entry, old))
    return Work(tables, start, block, first, inside, known, end)


def _entry(store: TranscoderStore, layers: tuple[int, ...]) -> tuple[int, bool]:
    """The block in front of which a group of these layers joins, and whether it then differs only inside that block.

    The first layer's change is added to the stream as the row joins, where it is written between blocks and no other
    layer of the group reads in front of there; else the row joins as it is, below everything the group reads or writes.
    """
    sites = [store.sites(layer) for layer in layers]
    _, write = sites[0]
    joins = write.layer + (write.name in ("resid_post", "mlp_out"))
    if write.name in BETWEEN_BLOCKS and all(read.depth > (joins, 0) for read, _ in sites[1:]):
        return joins, False
    if len(layers) == 1:  # what it changes is known without looking
        return write.layer, True
    return min(site.layer for pair in sites for site in pair), True


def _all_hits(table: LayerTable, end: int) -> Hits:
    """Every position below `end` that each entry touches."""
    counts = (table.stop.clamp(max=end) - table.start).clamp(min=0)
    entry = torch.arange(len(counts)).repeat_interleave(counts)
    within = torch.arange(len(entry)) - (counts.cumsum(0) - counts)[entry]
    return Hits(entry, table.rows[entry], table.start[entry] + within)


def _change(table: LayerTable, entry: Int[Tensor, " hit"], old: Float[Tensor, " hit"]) -> Float[Tensor, " hit"]:
    return change(old, table.factor[entry], table.shift[entry], table.skip_inactive[entry])


def live_groups(work: Work) -> Int[Tensor, " live"]:
    """Groups that can have an effect, in the order in which they join."""
    acts = torch.zeros(len(work.start), dtype=torch.bool)
    for layer, hits in work.known.items():
        acts[hits.group[hits.change != 0]] = True
        acts[work.tables[layer].rows[work.first[work.tables[layer].rows] != layer]] = True
    rows = (acts & (work.start < work.end)).nonzero()[:, 0]
    key = work.block[rows] * (work.end + 1) + work.start[rows]
    return rows[key.argsort(stable=True)]


def run_groups(
    host: Host, store: TranscoderStore, clean: Clean, work: Work, chosen: Int[Tensor, " live"], controls: int
) -> Float[Tensor, "row d_model"]:
    """Run some groups in one pass.

    Returns:
        The stream behind the last block at the last position, one row per group; then `controls` rows in which nothing
        is changed, which join with the first of the groups, at positions spread over theirs.
    """
    end = work.end
    starts = work.start[chosen].sort().values
    spread = starts[torch.linspace(0, len(starts) - 1, controls).round().long()]
    start = torch.cat([work.start[chosen], spread])
    block = torch.cat([work.block[chosen], work.block[chosen].min().expand(controls)])
    place = torch.full((len(work.start),), -1)
    place[chosen] = torch.arange(len(chosen))
    rows = Rows(start, block, torch.zeros(0, host.d_model), end)
    wide = torch.promote_types(clean.streams[0].dtype, torch.float32)
    delta = torch.zeros(int(rows.lengths.sum()), host.d_model, dtype=wide, device=clean.streams[0].device)
    outside = place.clone()
    outside[work.inside] = -1
    for layer, hits in work.known.items():
        here = hits.of(outside[hits.group] >= 0)
        at = rows.offsets[outside[here.group]] + here.pos - start[outside[here.group]]
        delta.index_add_(0, at.to(delta.device), _vectors(store, work.tables[layer], layer, here).to(delta))
    walk = Walk(host, clean, replace(rows, delta=delta))
    return walk.run([edit for layer in work.tables for edit in _edits_inside(store, walk, work, layer, place)])


def run_whole(
    host: Host,
    store: TranscoderStore,
    batch: Batch,
    groups: Sequence[Interventions],
    pos: int,
    controls: int,
    edits: Sequence[Edit] = (),
) -> Float[Tensor, "row d_model"]:
    """The same by whole passes, as `HookedModel.run` makes them: the prompt once per group, then `controls` times as it
    is; the stream behind the last block at one position. `edits` are made in every row."""
    rows = batch.rows([0] * (len(groups) + controls))
    end, seen = Site("resid_post", host.n_layers - 1), dict[Site, Tensor]()
    plan = make_plan(store, [*groups, *[()] * controls], rows.lengths)
    host.forward_hidden(rows, [*edits, *make_edits(store, plan), tap(end, seen)])
    return seen[end][:, pos]


def _vectors(store: TranscoderStore, table: LayerTable, layer: int, hits: Hits) -> Float[Tensor, "hit d_model"]:
    """change · d_i of every hit."""
    transcoder = store[layer]
    assert hits.change is not None
    rows = transcoder.W_dec[table.features[hits.entry].to(transcoder.device)]
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rearrange(hits.change.to(rows.device, wide), "hit -> hit 1") * rows.to(wide)


def _edits_inside(
    store: TranscoderStore, walk: Walk, work: Work, layer: int, place: Int[Tensor, " group"]
) -> list[Edit]:
    """What a layer changes in rows that are under way already: what is known, and what depends on what arrives."""
    table = work.tables[layer]
    known = work.known[layer]
    known = known.of((place[known.group] >= 0) & work.inside[known.group])
    late = _all_hits(table, walk.rows.end)
    late = late.of((place[late.group] >= 0) & (work.first[late.group] != layer))
    if not len(known.entry) and not len(late.entry):
        return []
    read_site, write_site = store.sites(layer)

    def at_tokens(hits: Hits) -> Int[Tensor, " hit"]:
        rows = place[hits.group]
        return walk.layout.tokens(len(walk.rows.start))[rows] + hits.pos - walk.rows.start[rows]

    def read(x: Tensor, at: Pass) -> Tensor:
        if len(late.entry):
            at.memo["late", layer] = replace(
                late, change=_late_change(store, table, layer, late, x[0], at_tokens(late))
            )
        return x

    def write(x: Tensor, at: Pass) -> Tensor:
        changes = [hits for hits in (known, at.memo.pop(("late", layer), None)) if hits is not None and len(hits.entry)]
        flat = x[0].to(torch.promote_types(x.dtype, torch.float32))
        for hits in changes:
            added = _vectors(store, table, layer, hits).to(flat)
            flat = flat.index_add(0, at_tokens(hits).to(flat.device), added)
        return flat.to(x.dtype)[None]

    if read_site == write_site:
        return [Edit(read_site, lambda x, at: write(read(x, at), at))]
    return [Edit(read_site, read), Edit(write_site, write)]


def _late_change(
    store: TranscoderStore,
    table: LayerTable,
    layer: int,
    hits: Hits,
    x: Float[Tensor, "token d_model"],
    tokens: Int[Tensor, " hit"],
) -> Float[Tensor, " hit"]:
    """new − old of features whose old activation depends on what the row changed before."""
    transcoder = store[layer]
    unique, where = tokens.unique(return_inverse=True)
    acts = transcoder.encode(x[unique.to(x.device)])
    where = where.to(acts.indices.device)
    picked = SparseActs(acts.values[where], acts.indices[where])
    features = table.features[hits.entry].to(where.device)
    old = gather_features(picked, rearrange(features, "hit -> hit 1"))[:, 0].double().cpu()
    return _change(table, hits.entry, old)
