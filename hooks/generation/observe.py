"""Features of every token that passes by, while generating: an edit per layer that changes nothing and keeps them."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.checkpoints import TranscoderStore
from hooks.errors import UserError
from hooks.kernels import select_relu
from hooks.sites import Site
from hooks.types import Edit, Pass, SparseActs
from hooks.whole import whole

Observed = str | Sequence[int | Site]
"""`"all"`, or layers, or the sites that layers read."""


def observed_layers(store: TranscoderStore, observe: Observed) -> tuple[int, ...]:
    """The layers that are meant.

    Raises:
        UserError: a text other than "all", or a site that no transcoder reads.
        CheckpointError: a layer has no transcoder.
    """
    if isinstance(observe, str):
        return store.chosen(observe)
    by_site = {store.sites(layer)[0]: layer for layer in store.layers}
    chosen = []
    for item in observe:
        if isinstance(item, Site) and item not in by_site:
            raise UserError(
                f"no transcoder reads {item}",
                expected=", ".join(map(str, by_site)),
                where="observe",
                repair="name layers, or the sites that they read",
            )
        layer = by_site[item] if isinstance(item, Site) else whole(item, "an entry of layers")
        store.require(layer)
        chosen.append(layer)
    return tuple(sorted(set(chosen)))


class Observer:
    """Keeps the features of some layers, column by column.

    They are what the encoder gives on the stream as it arrives: edits at earlier layers are in it, those of the layer
    itself are not.
    """

    def __init__(self, store: TranscoderStore, layers: Sequence[int]):
        self._store = store
        self._seen: dict[int, list[tuple[int, SparseActs]]] = {layer: [] for layer in layers}

    def edits(self) -> list[Edit]:
        """To be attached in front of all others."""
        return [Edit(self._store.sites(layer)[0], self._look(layer)) for layer in self._seen]

    def _look(self, layer: int) -> Callable[[Tensor, Pass], Tensor]:
        def look(x: Float[Tensor, "batch pos d_model"], at: Pass) -> Float[Tensor, "batch pos d_model"]:
            seen = self._seen[layer]
            while seen and seen[-1][0] >= at.first:  # computed again, by a run without cache or after a crop
                seen.pop()
            if seen:
                first, acts = seen.pop()
                seen.append((first, _columns(acts, 0, at.first - first)))
            seen.append((at.first, self._store[layer].encode(x)))
            return x

        return look

    def features(self, row: int, start: int, stop: int) -> dict[int, SparseActs]:
        """Per layer, the features of columns `start .. stop-1` of one row, [pos k]."""
        out = {}
        for layer, seen in self._seen.items():
            rows = [SparseActs(acts.values[row : row + 1], acts.indices[row : row + 1]) for _, acts in seen]
            whole = _columns(_joined(rows, self._store.d_features(layer)), start, stop)
            out[layer] = SparseActs(whole.values[0], whole.indices[0])
        return out


def _columns(acts: SparseActs, start: int, stop: int) -> SparseActs:
    return SparseActs(acts.values[:, start:stop], acts.indices[:, start:stop])


def _joined(parts: list[SparseActs], d_features: int) -> SparseActs:
    if len({part.values.shape[-1] for part in parts}) == 1:
        return SparseActs(torch.cat([p.values for p in parts], 1), torch.cat([p.indices for p in parts], 1))
    # plain ReLU keeps as many as the densest token of each pass
    return select_relu(torch.cat([part.dense(d_features) for part in parts], 1))
