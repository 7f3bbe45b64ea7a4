"""Interventions → a checked plan → edits. Everything is verified before the model runs.

Delta form, the default: at the transcoder's write site x' = x + sum_i (new_i − a_i) d_i, so the reconstruction error
stays and nothing else changes. Swapped form: the site is replaced by its reconstruction (plus error, by mode) and the
same deltas are added. In both forms the activation a_i is TopK's on the stream of the *edited* run, with edits at
earlier layers in it, and the result is cast to the model's precision once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Any, NoReturn

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.checkpoints import TranscoderStore
from hooks.errors import AddressError, InterventionError
from hooks.host import Batch, Host, tap
from hooks.interventions import INTERVENTIONS, FeatureIntervention, change
from hooks.interventions.clamp import Clamp
from hooks.kernels import gather_features, working_dtype
from hooks.passes.swap import Swap
from hooks.sites import Site
from hooks.transcoder import Transcoder
from hooks.types import Edit, FeatureAddress, MaskMode, Pass, SparseActs, as_row, shortened

Interventions = Any
"""One intervention, or any sequence of them: objects, or rows (layer, position, feature, value) of any library."""

KNOWN = (*(module.Intervention for module in INTERVENTIONS.values()), FeatureIntervention)  # a protocol costs 50 µs
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

    def touched(self, at: Pass, count: int) -> "_Hits | None":
        """The same with all that an edit needs; None if no token is touched.

        While decoding, the same entries are touched at every step, so the result is kept and used again.
        """
        if count > 1:
            return _Hits.of(self, *self.hits(at, count))
        entries = tuple(e for e, (start, stop) in enumerate(self._spans) if start <= at.first < stop)
        if entries not in self._laid_out:
            entry = torch.tensor(entries, dtype=torch.int64)
            self._laid_out[entries] = _Hits.of(self, entry, self.rows[entry])
        return self._laid_out[entries]

    @cached_property
    def _spans(self) -> list[tuple[int, int]]:
        return list(zip(self.start.tolist(), self.stop.tolist(), strict=True))

    @cached_property
    def _laid_out(self) -> "dict[tuple[int, ...], _Hits | None]":
        return {}


@dataclass(frozen=True)
class Plan:
    """Checked interventions, as one table per layer."""

    tables: Mapping[int, LayerTable]
    mask: MaskMode


def as_interventions(items: Interventions) -> list[FeatureIntervention]:
    """Accept intervention objects and circuit-tracer's `(layer, position, feature, value)`, many or a single one.

    Raises:
        InterventionError: an item is neither.
        AddressError: a row of numbers names no feature.
    """
    out: list[FeatureIntervention] = []
    for item in listed(items):
        row = as_row(item)
        if row is not None and _is_clamp(row):
            layer, positions, feature, value = row
            out.append(Clamp(FeatureAddress.of((layer, positions, feature)), value))
        elif isinstance(item, KNOWN):
            out.append(item)
        else:
            _refuse(item)
    return out


def listed(interventions: Interventions) -> list[Any]:
    """One intervention, or any sequence of them, as a list; None gives an empty list.

    Raises:
        InterventionError: it is neither.
    """
    if _is_one(interventions):
        return [interventions]
    if interventions is None:
        return []
    if isinstance(interventions, str) or not isinstance(interventions, Iterable):
        _refuse(interventions)
    return list(interventions)


def _refuse(item: object) -> NoReturn:
    raise InterventionError(
        f"{shortened(repr(item))} is not an intervention",
        expected='Ablate("L3/383"), Clamp("L3/383", 8.0), … or (layer, position, feature, value)',
    )


def _is_one(item: object) -> bool:
    return hasattr(item, "address") or _is_clamp(as_row(item) or [])


def _is_clamp(row: list[Any]) -> bool:
    return len(row) == 4 and isinstance(row[0], Real | Tensor)


def lists_per_row(interventions: Interventions, rows: int) -> list[list[Any]]:
    """One list of interventions for every row of a batch, or already one list per row.

    Raises:
        InterventionError: there are lists, but not one per row.
    """
    items = listed(interventions)
    lists = [list(item) for item in items if _is_list(item)]
    if not lists:
        return [items] * rows
    if len(lists) < len(items) or len(lists) != rows:
        raise InterventionError(
            f"{len(lists)} lists of interventions for {rows} prompts",
            expected="one list for all prompts, or a list of lists, one per prompt",
            found=f"{len(items) - len(lists)} interventions beside them" * (len(lists) < len(items)),
        )
    return lists


def _is_list(item: object) -> bool:
    """A list of interventions; a row that begins with a number is itself one."""
    if len(getattr(item, "shape", ())) == 2:
        return True
    return isinstance(item, list | tuple) and not (item and isinstance(item[0], Real | Tensor))


def make_plan(
    store: TranscoderStore,
    per_row: Sequence[Interventions],
    prompt_lengths: Sequence[int],
    *,
    new_tokens: int = 0,
    mask: MaskMode = "frozen",
    pads: Sequence[int] = (),
) -> Plan:
    """Check all interventions and write them into tables.

    Args:
        per_row: the interventions of each prompt of the batch.
        new_tokens: how many tokens will be generated after each prompt.
        mask: see `hooks.types.MaskMode`.
        pads: length of the padding before each row, if there is any; the tables count columns, padding included.

    Raises:
        AddressError: an address names a layer, feature or position that does not exist.
        InterventionError: two interventions act on the same feature and token.
    """
    by_layer: dict[int, list[tuple[int, FeatureIntervention, int, int]]] = {}
    for row, (items, length) in enumerate(zip(per_row, prompt_lengths, strict=True)):
        checked = as_interventions(items)
        for item in checked:
            _check_address(store, item.address, length, new_tokens)
        _check_overlaps(checked, length)
        pad = pads[row] if pads else 0
        for item in checked:
            for start, stop in item.address.positions.spans(length):
                entry = (row, item, start + pad, NEVER if stop is None else stop + pad)
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
        spans = [(a, NEVER if b is None else b) for a, b in item.address.positions.spans(length)]
        others = taken.setdefault((item.address.layer, item.address.feature), [])
        for first, last, other in others:
            if any(start < last and first < stop for start, stop in spans):
                raise InterventionError(
                    f"two interventions act on the same feature and token: {item.address} and {other}",
                    expected="at most one intervention per feature and token",
                    repair="narrow the positions of one of them, or merge them",
                )
        others += [(*span, item.address) for span in spans]


def inactive(
    host: Host, store: TranscoderStore, batch: Batch, interventions: Interventions
) -> tuple[FeatureAddress, ...]:
    """Addresses whose feature is inactive, in the plain model, at every token of the prompt that they name. One pass.

    An address that names only generated tokens is not returned.

    Raises:
        AddressError: an address names a layer, feature or position that does not exist.
    """
    items = as_interventions(interventions)
    length = batch.lengths[0]
    for item in items:
        _check_address(store, item.address, length, host.max_positions)
    addresses = list(dict.fromkeys(item.address for item in items))
    seen: dict[Site, Tensor] = {}
    layers = sorted({address.layer for address in addresses})
    host.forward_hidden(batch, [tap(site, seen) for site in dict.fromkeys(store.sites(layer)[0] for layer in layers)])
    silent = set()
    for layer in layers:
        acts = store[layer].encode(seen[store.sites(layer)[0]][0])
        for address in (address for address in addresses if address.layer == layer):
            here = address.positions.mask(0, length, length).to(acts.values.device)
            active = (acts.indices[here] == address.feature) & (acts.values[here] > 0)
            if bool(here.any()) and not bool(active.any()):
                silent.add(address)
    return tuple(address for address in addresses if address in silent)


def make_edits(store: TranscoderStore, plan: Plan, swap: Swap | None = None) -> list[Edit]:
    """The edits of a plan and of a swap. Layers that neither of them touches get none."""
    swapped = set(swap.layers) if swap else set()
    edits: list[Edit] = []
    for layer in sorted(swapped | set(plan.tables)):
        local = swap if layer in swapped else None
        edits += _layer_edits(store, layer, plan.tables.get(layer), plan.mask, local)
    return edits


@dataclass(frozen=True)
class _Seen:
    """Values that the edit at the read site stores for the edit at the write site."""

    acts: SparseActs | None  # of all tokens; only if the site is replaced at some of them
    replaced: Bool[Tensor, "batch pos"] | None  # tokens at which the site is replaced; None: all
    skipped: Float[Tensor, "batch pos d_model"] | None  # the skip connection's part, if the site is replaced
    tokens: Int[Tensor, " token"]  # flat indices of the tokens with edited features
    delta: Float[Tensor, "token d_model"] | None


def _layer_edits(
    store: TranscoderStore, layer: int, table: LayerTable | None, mask: MaskMode, swap: Swap | None
) -> list[Edit]:
    """The edits at a layer's read and write site. They look up the transcoder when a pass reaches them, so the store's
    budget is kept and no layer is loaded that is not used."""
    key = ("transcoder", layer)

    def read(x: Tensor, at: Pass) -> Tensor:
        places = swap.places.mask(at, *x.shape[:2]) if swap else None
        replaced = swap is not None and swap.error != "live" and (places is None or bool(places.any()))
        acts, skipped = (store[layer].encode(x), store[layer].skipped(x)) if replaced else (None, None)
        at.memo[key] = _Seen(acts, places, skipped, *_deltas(store, layer, table, mask, x, at))
        return x

    def write(x: Tensor, at: Pass) -> Tensor:
        seen: _Seen = at.memo.pop(key)
        out = x
        if swap and seen.acts is not None:
            out = swap.base(store[layer], seen.acts, seen.skipped, x, at).to(x.device)
            out = out if seen.replaced is None else torch.where(seen.replaced[..., None].to(x.device), out, x)
        return (out if seen.delta is None else _added(out, seen.tokens, seen.delta)).to(x.dtype)

    read_site, write_site = store.sites(layer)
    if read_site == write_site:
        return [Edit(read_site, lambda x, at: write(read(x, at), at))]
    return [Edit(read_site, read), Edit(write_site, write)]


def _added(
    x: Float[Tensor, "batch pos d_model"], tokens: Int[Tensor, " token"], delta: Float[Tensor, "token d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """x with the vectors added at some tokens, rounded once; the other tokens stay the same, bit for bit."""
    flat, delta = x.flatten(0, 1), delta.to(x.device)
    if len(flat) == len(tokens):
        return (flat.to(delta.dtype) + delta).to(x.dtype).view_as(x)
    tokens = tokens.to(x.device)
    edited = flat[tokens].to(delta.dtype) + delta
    return flat.index_copy(0, tokens, edited.to(flat.dtype)).view_as(x)


def _deltas(
    store: TranscoderStore, layer: int, table: LayerTable | None, mask: MaskMode, x: Tensor, at: Pass
) -> tuple[Tensor, Tensor | None]:
    """sum_i (new_i − a_i) d_i for every token with an edited feature; only those tokens are encoded."""
    if table is None:
        return _NO_TOKENS, None
    touched = table.touched(at, x.shape[1])
    if touched is None:
        return _NO_TOKENS, None
    transcoder = store[layer]
    hits = touched.on(transcoder.device)
    stream = hits.stream(x.to(transcoder.device))
    if mask == "frozen":
        old, base = transcoder.activations_at(stream, hits.where, hits.features), None
    else:
        pre = transcoder.preactivations(stream)
        acts, after = transcoder.select(pre), _reselect(transcoder, pre, hits)
        old, base = hits.gather(after), transcoder.decode(after) - transcoder.decode(acts)
    change = hits.change(old).to(working_dtype(transcoder.W_dec))
    vectors = change[:, None] * transcoder.W_dec[hits.features].to(change.dtype)
    return hits.tokens, hits.summed(vectors, base)


_NO_TOKENS = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class _Hits:
    """Pairs (entry of a table, token that it touches).

    Attributes:
        tokens: flat indices of the touched tokens, ascending.
        where: of each hit, the index into `tokens`.
        in_order: whether hit h is at token h, so that each token has exactly one hit.
    """

    tokens: Int[Tensor, " token"]
    where: Int[Tensor, " hit"]
    features: Int[Tensor, " hit"]
    factor: Float[Tensor, " hit"]
    shift: Float[Tensor, " hit"]
    skip_inactive: Bool[Tensor, " hit"]
    in_order: bool

    @classmethod
    def of(cls, table: LayerTable, entry: Int[Tensor, " hit"], flat: Int[Tensor, " hit"]) -> "_Hits | None":
        if not len(entry):
            return None
        tokens, where = flat.unique(return_inverse=True)
        in_order = torch.equal(where, torch.arange(len(tokens)))
        features, factor, shift = table.features[entry], table.factor[entry], table.shift[entry]
        return cls(tokens, where, features, factor, shift, table.skip_inactive[entry], in_order)

    def on(self, device: torch.device) -> "_Hits":
        """The same on another device; the copy is kept."""
        if device not in self._copies:
            columns = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
            moved: dict[str, Any] = {name: value.to(device) for name, value in columns.items()}
            self._copies[device] = replace(self, **moved)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, "_Hits"]:
        return {self.tokens.device: self}

    @property
    def ablated(self) -> Bool[Tensor, " hit"]:
        return (self.factor == 0) & (self.shift == 0)

    def stream(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "token d_model"]:
        flat = x.flatten(0, 1)
        return flat if len(flat) == len(self.tokens) else flat[self.tokens]

    def gather(self, acts: SparseActs) -> Float[Tensor, " hit"]:
        """The activation of each hit's feature."""
        picked = SparseActs(acts.values[self.where], acts.indices[self.where])
        return gather_features(picked, rearrange(self.features, "hit -> hit 1"))[:, 0]

    def change(self, old: Float[Tensor, " hit"]) -> Float[Tensor, " hit"]:
        """new − old per hit."""
        return change(old, self.factor, self.shift, self.skip_inactive if self.some_skip else None)

    @cached_property
    def some_skip(self) -> bool:
        return bool(self.skip_inactive.any())

    def summed(
        self, vectors: Float[Tensor, "hit d_model"], base: Float[Tensor, "token d_model"] | None
    ) -> Float[Tensor, "token d_model"]:
        """The sum of the hits' vectors per token, plus `base`."""
        if base is None and self.in_order:
            return vectors
        if base is None:
            base = vectors.new_zeros(len(self.tokens), vectors.shape[1])
        return base.index_add(0, self.where, vectors)


def _reselect(transcoder: Transcoder, pre: Float[Tensor, "token feature"], hits: _Hits) -> SparseActs:
    """TopK again without the ablated features, so that the next feature takes the place of each."""
    barred = pre.clone()
    barred[hits.where[hits.ablated], hits.features[hits.ablated]] = -torch.inf
    return transcoder.select(barred)
