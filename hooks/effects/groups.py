"""Groups of interventions as rows of one pass: at which block each row enters, what it adds there, and what it changes
at later layers.

If rows cannot share a clean run, `run_whole` computes the same with the whole prompt, once per group.

The change at the first layer of a group is known from the clean run, since no earlier layer differs. At its later
layers the features are encoded on the row's own stream. The rules are those of `hooks.passes.plan`: delta form,
a → factor · a + shift, `when_inactive`, one cast at the end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.checkpoints import TranscoderStore
from hooks.effects.staggered import Clean, StaggeredPass, Variants
from hooks.host import Batch, Host, tap
from hooks.interventions import change
from hooks.kernels import gather_features
from hooks.passes import Interventions, LayerTable, make_edits, make_plan
from hooks.sites import Site
from hooks.types import Edit, Pass, SparseActs

BETWEEN_BLOCKS = ("resid_pre", "resid_post", "mlp_out")  # a change written there is added to the next block's input


@dataclass(frozen=True)
class Hits:
    """(entry, position) pairs of a layer's table.

    Attributes:
        change: new − old activation, if it is known.
    """

    entry: Int[Tensor, " hit"]
    group: Int[Tensor, " hit"]
    pos: Int[Tensor, " hit"]
    change: Float[Tensor, " hit"] | None = None

    def of(self, chosen: Tensor) -> "Hits":
        """The chosen pairs."""
        change = None if self.change is None else self.change[chosen]
        return Hits(self.entry[chosen], self.group[chosen], self.pos[chosen], change)


@dataclass(frozen=True)
class GroupTensors:
    """Groups as tensors.

    Attributes:
        tables: entries of every layer; an entry's row is its group.
        start: each group's first position that differs.
        block: the block before which its row enters.
        first: the first layer that it changes.
        inside: whether the first layer's change is added inside a block, and not when the row enters.
        known: by layer, the changes of the groups whose first layer it is.
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
) -> GroupTensors:
    """Where each group's row enters the pass, and what it changes there.

    Args:
        dense: by layer, the clean run's activations.
        n: number of groups.
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
    return GroupTensors(tables, start, block, first, inside, known, end)


def _entry(store: TranscoderStore, layers: tuple[int, ...]) -> tuple[int, bool]:
    """The block before which the row of a group of these layers enters, and whether its first change is added inside
    that block.

    If the first layer writes between blocks, and no other layer of the group reads before that point, the first layer's
    change is added to the stream when the row enters. Else the row enters unchanged, before all that the group reads or
    writes.
    """
    sites = [store.sites(layer) for layer in layers]
    _, write = sites[0]
    joins = write.layer + (write.name in ("resid_post", "mlp_out"))
    if write.name in BETWEEN_BLOCKS and all(read.depth > (joins, 0) for read, _ in sites[1:]):
        return joins, False
    if len(layers) == 1:  # its change is known from the clean run
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


def live_groups(work: GroupTensors) -> Int[Tensor, " live"]:
    """Groups that can have an effect, in the order in which their rows enter."""
    acts = torch.zeros(len(work.start), dtype=torch.bool)
    for layer, hits in work.known.items():
        acts[hits.group[hits.change != 0]] = True
        acts[work.tables[layer].rows[work.first[work.tables[layer].rows] != layer]] = True
    rows = (acts & (work.start < work.end)).nonzero()[:, 0]
    key = work.block[rows] * (work.end + 1) + work.start[rows]
    return rows[key.argsort(stable=True)]


def run_groups(
    host: Host, store: TranscoderStore, clean: Clean, work: GroupTensors, chosen: Int[Tensor, " live"], controls: int
) -> tuple[Float[Tensor, "row d_model"], Int[Tensor, " control"]]:
    """Run some groups in one pass.

    Returns:
        The stream after the last block at the last position, one row per group; then of unchanged rows, `controls` of
        them or one per block at which groups enter. And the block at which each unchanged row enters. Their first
        positions are spread over those of the groups that enter there.
    """
    end = work.end
    control_start, control_block = _controls(work.start[chosen], work.block[chosen], controls)
    start = torch.cat([work.start[chosen], control_start])
    block = torch.cat([work.block[chosen], control_block])
    place = torch.full((len(work.start),), -1)
    place[chosen] = torch.arange(len(chosen))
    rows = Variants(start, block, torch.zeros(0, host.d_model), end)
    wide = torch.promote_types(clean.streams[0].dtype, torch.float32)
    delta = torch.zeros(int(rows.lengths.sum()), host.d_model, dtype=wide, device=clean.streams[0].device)
    outside = place.clone()
    outside[work.inside] = -1
    for layer, hits in work.known.items():
        here = hits.of(outside[hits.group] >= 0)
        at = rows.offsets[outside[here.group]] + here.pos - start[outside[here.group]]
        delta.index_add_(0, at.to(delta.device), _vectors(store, work.tables[layer], layer, here).to(delta))
    running = StaggeredPass(host, clean, replace(rows, delta=delta))
    edits = [edit for layer in work.tables for edit in _edits_inside(store, running, work, layer, place)]
    return running.run(edits), control_block


def _controls(
    start: Int[Tensor, " live"], block: Int[Tensor, " live"], count: int
) -> tuple[Int[Tensor, " control"], Int[Tensor, " control"]]:
    """First positions and blocks of unchanged rows: at every block where groups enter."""
    blocks = block.unique()
    each = max(1, count // len(blocks))
    starts = []
    for number in blocks.tolist():
        here = start[block == number].sort().values
        starts.append(here[torch.linspace(0, len(here) - 1, each + 2)[1:-1].round().long()])
    return torch.cat(starts), blocks.repeat_interleave(each)


def run_whole(
    host: Host, store: TranscoderStore, batch: Batch, groups: Sequence[Interventions], pos: int, controls: int
) -> Float[Tensor, "row d_model"]:
    """The same by whole passes, as in `HookedModel.run`: the prompt once per group, then `controls` times unchanged.
    Returns the stream after the last block at one position."""
    rows = batch.rows([0] * (len(groups) + controls))
    end, seen = Site("resid_post", host.n_layers - 1), dict[Site, Tensor]()
    plan = make_plan(store, [*groups, *[()] * controls], rows.lengths)
    host.forward_hidden(rows, [*make_edits(store, plan), tap(end, seen)])
    return seen[end][:, pos]


def _vectors(store: TranscoderStore, table: LayerTable, layer: int, hits: Hits) -> Float[Tensor, "hit d_model"]:
    """change · d_i of every hit."""
    transcoder = store[layer]
    assert hits.change is not None
    rows = transcoder.W_dec[table.features[hits.entry].to(transcoder.device)]
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rearrange(hits.change.to(rows.device, wide), "hit -> hit 1") * rows.to(wide)


def _edits_inside(
    store: TranscoderStore, running: StaggeredPass, work: GroupTensors, layer: int, place: Int[Tensor, " group"]
) -> list[Edit]:
    """The changes of a layer in rows that have entered before: known changes, and those that depend on the row's own
    stream."""
    table = work.tables[layer]
    known = work.known[layer]
    known = known.of((place[known.group] >= 0) & work.inside[known.group])
    late = _all_hits(table, running.rows.end)
    late = late.of((place[late.group] >= 0) & (work.first[late.group] != layer))
    if not len(known.entry) and not len(late.entry):
        return []
    read_site, write_site = store.sites(layer)

    def at_tokens(hits: Hits) -> Int[Tensor, " hit"]:
        rows = place[hits.group]
        return running.layout.tokens(len(running.rows.start))[rows] + hits.pos - running.rows.start[rows]

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
    """new − old of features whose old activation depends on the row's earlier changes."""
    transcoder = store[layer]
    unique, where = tokens.unique(return_inverse=True)
    acts = transcoder.encode(x[unique.to(x.device)])
    where = where.to(acts.indices.device)
    picked = SparseActs(acts.values[where], acts.indices[where])
    features = table.features[hits.entry].to(where.device)
    old = gather_features(picked, rearrange(features, "hit -> hit 1"))[:, 0].double().cpu()
    return _change(table, hits.entry, old)
