"""Interventions → a checked plan → edits. Everything is verified before the model runs.

Delta form, the default: at the transcoder's write site x' = x + sum_i (new_i − a_i) d_i, so the reconstruction error
is kept and nothing else moves. Swapped form: the site is replaced by its reconstruction (plus error, by mode) and the
same deltas are added. Either way the activation a_i is the one TopK gives on the stream *as it arrives*, edits at
earlier layers included, and the result is cast to the model's precision once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.errors import AddressError, InterventionError
from hooks.interventions import FeatureIntervention
from hooks.interventions.clamp import Clamp
from hooks.kernels import gather_features, working_dtype
from hooks.store import TranscoderStore
from hooks.swap import Swap
from hooks.transcoder import Transcoder
from hooks.types import Edit, FeatureAddress, MaskMode, Pass, Positions, SparseActs

NEVER = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class LayerTable:
    """All interventions at one layer: entry e turns a into factor·a + shift at positions start..stop−1 of its row."""

    rows: Int[Tensor, " entry"]
    features: Int[Tensor, " entry"]
    factor: Float[Tensor, " entry"]
    shift: Float[Tensor, " entry"]
    skip_inactive: Bool[Tensor, " entry"]
    start: Int[Tensor, " entry"]
    stop: Int[Tensor, " entry"]

    def hits(self, at: Pass, count: int) -> tuple[Int[Tensor, " hit"], Int[Tensor, " hit"]]:
        """(entry, flat token) for every token of this pass that an entry touches; flat = row · count + pos."""
        here = torch.arange(at.first, at.first + count)
        inside = (here >= rearrange(self.start, "e -> e 1")) & (here < rearrange(self.stop, "e -> e 1"))
        entry, pos = inside.nonzero(as_tuple=True)
        return entry, self.rows[entry] * count + pos


@dataclass(frozen=True)
class Plan:
    """Checked interventions, as one table per layer."""

    tables: Mapping[int, LayerTable]
    mask: MaskMode


def as_interventions(items: Sequence[object]) -> list[FeatureIntervention]:
    """Accept intervention objects and circuit-tracer's `(layer, position, feature, value)`.

    Raises:
        InterventionError: an item is neither.
    """
    out: list[FeatureIntervention] = []
    for item in items:
        if isinstance(item, tuple) and len(item) == 4:
            layer, positions, feature, value = item
            out.append(Clamp(FeatureAddress(int(layer), int(feature), Positions.of(positions)), float(value)))
        elif isinstance(item, FeatureIntervention):
            out.append(item)
        else:
            raise InterventionError(
                f"{item!r} is not an intervention",
                expected='Ablate("L3/118"), Clamp("L3/118", 8.0), … or (layer, position, feature, value)',
            )
    return out


def make_plan(
    store: TranscoderStore,
    per_row: Sequence[Sequence[object]],
    prompt_lengths: Sequence[int],
    *,
    new_tokens: int = 0,
    mask: MaskMode = "frozen",
) -> Plan:
    """Check everything and lay it out as tables.

    Args:
        per_row: the interventions of each prompt of the batch.
        new_tokens: how many tokens will be generated behind each prompt.
        mask: see `hooks.types.MaskMode`.

    Raises:
        AddressError: an address names what does not exist.
        InterventionError: two interventions meet at the same feature and token.
    """
    by_layer: dict[int, list[tuple[int, FeatureIntervention, int, int]]] = {}
    for row, (items, length) in enumerate(zip(per_row, prompt_lengths, strict=True)):
        checked = as_interventions(items)
        for item in checked:
            _check_address(store, item.address, length, new_tokens)
        _check_overlaps(checked, length)
        for item in checked:
            start, stop = item.address.positions.bounds(length)
            entry = (row, item, start, NEVER if stop is None else stop)
            by_layer.setdefault(item.address.layer, []).append(entry)
    return Plan({layer: _table(entries) for layer, entries in sorted(by_layer.items())}, mask)


def _table(entries: list[tuple[int, FeatureIntervention, int, int]]) -> LayerTable:
    affine = torch.tensor([item.affine for _, item, _, _ in entries], dtype=torch.float64)
    return LayerTable(
        rows=torch.tensor([row for row, _, _, _ in entries]),
        features=torch.tensor([item.address.feature for _, item, _, _ in entries]),
        factor=affine[:, 0],
        shift=affine[:, 1],
        skip_inactive=torch.tensor([item.when_inactive == "skip" for _, item, _, _ in entries]),
        start=torch.tensor([start for _, _, start, _ in entries]),
        stop=torch.tensor([stop for _, _, _, stop in entries]),
    )


def _check_address(store: TranscoderStore, address: FeatureAddress, length: int, new_tokens: int) -> None:
    if address.layer not in store:
        raise AddressError(
            f"{address}: layer {address.layer} has no transcoder",
            expected=f"a layer among {', '.join(map(str, store.layers))}",
            where=store.name,
        )
    size = store.d_features(address.layer)
    if not 0 <= address.feature < size:
        raise AddressError(
            f"{address}: there is no feature {address.feature}",
            expected=f"0 to {size - 1} at layer {address.layer}",
            where=store.name,
        )
    address.positions.check(length, new_tokens, str(address))


def _check_overlaps(items: Sequence[FeatureIntervention], length: int) -> None:
    taken: dict[tuple[int, int], list[tuple[int, int, FeatureAddress]]] = {}
    for item in items:
        start, stop = item.address.positions.bounds(length)
        span = (start, NEVER if stop is None else stop)
        others = taken.setdefault((item.address.layer, item.address.feature), [])
        for first, last, other in others:
            if span[0] < last and first < span[1]:
                raise InterventionError(
                    f"two interventions meet at {item.address} and {other}",
                    expected="at most one intervention per feature and token",
                    repair="narrow the positions of one of them, or merge them",
                )
        others.append((*span, item.address))


def make_edits(store: TranscoderStore, plan: Plan, swap: Swap | None = None) -> list[Edit]:
    """The edits that carry out a plan, replaced sites included; layers that neither touches get none."""
    swapped = set(swap.layers) if swap else set()
    edits: list[Edit] = []
    for layer in sorted(swapped | set(plan.tables)):
        local = swap if layer in swapped else None
        edits += _layer_edits(store, layer, plan.tables.get(layer), plan.mask, local)
    return edits


@dataclass(frozen=True)
class _Seen:
    """What the read site leaves for the write site."""

    acts: SparseActs | None  # of all tokens; only when the site is replaced
    tokens: Int[Tensor, " token"]  # flat indices of the tokens with edited features
    delta: Float[Tensor, "token d_model"] | None


def _layer_edits(
    store: TranscoderStore, layer: int, table: LayerTable | None, mask: MaskMode, swap: Swap | None
) -> list[Edit]:
    """The transcoder is looked up when a pass reaches it: the store's budget holds, and nothing loads in vain."""
    key = ("transcoder", layer)

    def read(x: Tensor, at: Pass) -> Tensor:
        acts = store[layer].encode(x) if swap and swap.error != "live" else None
        at.memo[key] = _Seen(acts, *_deltas(store, layer, table, mask, x, at))
        return x

    def write(x: Tensor, at: Pass) -> Tensor:
        seen: _Seen = at.memo.pop(key)
        out = swap.base(store[layer], seen.acts, x, at).to(x.device) if swap and seen.acts is not None else x
        if seen.delta is not None:
            flat = rearrange(out, "batch pos d -> (batch pos) d")
            tokens = seen.tokens.to(x.device)
            edited = flat[tokens].to(seen.delta.dtype) + seen.delta.to(x.device)
            out = flat.index_copy(0, tokens, edited.to(flat.dtype)).view_as(out)
        return out.to(x.dtype)

    read_site, write_site = store.sites(layer)
    if read_site == write_site:
        return [Edit(read_site, lambda x, at: write(read(x, at), at))]
    return [Edit(read_site, read), Edit(write_site, write)]


def _deltas(
    store: TranscoderStore, layer: int, table: LayerTable | None, mask: MaskMode, x: Tensor, at: Pass
) -> tuple[Tensor, Tensor | None]:
    """sum_i (new_i − a_i) d_i for every token with an edited feature; only those tokens are encoded."""
    nothing = torch.zeros(0, dtype=torch.int64)
    if table is None:
        return nothing, None
    entry, flat = table.hits(at, x.shape[1])
    if not len(entry):
        return nothing, None
    transcoder = store[layer]
    home = transcoder.device
    x, entry, flat = x.to(home), entry.to(home), flat.to(home)
    tokens, where = flat.unique(return_inverse=True)
    entries = _Hits(table, entry, where)
    stream = rearrange(x, "batch pos d -> (batch pos) d")[tokens]
    pre = transcoder.preactivations(stream)
    acts = transcoder.select(pre)
    delta = torch.zeros(len(tokens), transcoder.d_model, dtype=working_dtype(transcoder.W_dec), device=home)
    if mask == "live":
        acts_after = _reselect(transcoder, pre, entries)
        delta = delta + transcoder.decode(acts_after) - transcoder.decode(acts)
        acts = acts_after
    change = entries.change(acts).to(delta.dtype)
    rows = transcoder.W_dec[entries.features].to(delta.dtype)
    return tokens, delta.index_add(0, where, rearrange(change, "hit -> hit 1") * rows)


@dataclass(frozen=True)
class _Hits:
    """Entries of a table paired with the encoded tokens they touch."""

    table: LayerTable
    entry: Int[Tensor, " hit"]
    where: Int[Tensor, " hit"]

    def _column(self, name: str) -> Tensor:
        column: Tensor = getattr(self.table, name)
        return column.to(self.entry.device)[self.entry]

    @property
    def features(self) -> Int[Tensor, " hit"]:
        return self._column("features")

    @property
    def ablated(self) -> Bool[Tensor, " hit"]:
        return (self._column("factor") == 0) & (self._column("shift") == 0)

    def change(self, acts: SparseActs) -> Float[Tensor, " hit"]:
        """new − old per hit, from the activations of the touched tokens."""
        picked = SparseActs(acts.values[self.where], acts.indices[self.where])
        old = gather_features(picked, rearrange(self.features, "hit -> hit 1"))[:, 0].double()
        new = self._column("factor") * old + self._column("shift")
        return torch.where(self._column("skip_inactive") & (old == 0), torch.zeros_like(old), new - old)


def _reselect(transcoder: Transcoder, pre: Float[Tensor, "token feature"], hits: _Hits) -> SparseActs:
    """TopK again with the ablated features out of the race, so the next in line moves up."""
    barred = pre.clone()
    barred[hits.where[hits.ablated], hits.features[hits.ablated]] = -torch.inf
    return transcoder.select(barred)
