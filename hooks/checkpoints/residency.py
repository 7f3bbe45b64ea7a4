"""Which layers are in memory under a byte budget; one more may be read ahead, and some may wait in host memory.

Before a layer is read, the layers used longest ago are dropped until it fits.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hooks.errors import CheckpointError
from hooks.transcoder import WEIGHTS, Transcoder


@dataclass(frozen=True)
class LoadedLayer:
    """A transcoder, and the precision in which its files hold each of its tensors."""

    transcoder: Transcoder
    dtypes: Mapping[str, torch.dtype]


Load = Callable[[Callable[[], bool]], LoadedLayer]
"""Reads one layer; calls its argument repeatedly to ask whether it should stop."""


class ReadAhead:
    """One layer, read by its own thread while another layer is used.

    The thread begins when the layers that were dropped for it are freed. A caller may keep such a layer for a while
    after it was dropped, and until then its memory is not free.
    """

    def __init__(self, layer: int, nbytes: int, load: Load, after: Sequence[Transcoder]):
        self.layer, self.nbytes = layer, nbytes
        self._load, self._stopped = load, False
        self._begin = threading.Event()
        self._loaded: LoadedLayer | None = None
        self._error: BaseException | None = None
        self._held = [weakref.ref(transcoder, self._released) for transcoder in after]
        self._thread = threading.Thread(target=self._run, name=f"read ahead: layer {layer}", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Begin to read if the dropped layers are freed. Call this after the caller's own references to them are
        gone."""
        self._released(None)

    def _released(self, _: object) -> None:
        if all(held() is None for held in self._held):
            self._begin.set()

    def _run(self) -> None:
        self._begin.wait()
        try:
            if not self._stopped:
                self._loaded = self._load(lambda: self._stopped)
        except BaseException as error:  # `result` raises it
            self._error = error

    def result(self) -> LoadedLayer:
        """Wait for the layer and return it; raises the error that reading it raised."""
        self._begin.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._loaded is not None, "a stopped read has no result"
        return self._loaded

    def stop(self, *, wait: bool = True) -> LoadedLayer | None:
        """End the thread, because the layer is not needed. Returns the layer if it has been read already."""
        self._stopped = True
        self._begin.set()
        if wait:
            self._thread.join()
        return self._loaded


def following(layers: Sequence[int], previous: int | None, layer: int) -> int | None:
    """The layer that is probably used next: a pass begins at one end of the set and goes from neighbour to
    neighbour."""
    here = layers.index(layer)
    came = layers.index(previous) if previous in layers else None
    if came is not None and abs(here - came) == 1:
        step = here - came
    elif here in (0, len(layers) - 1):
        step = 1 if here == 0 else -1
    else:
        return None
    return layers[here + step] if 0 <= here + step < len(layers) else None


class HostTier:
    """Dropped layers, kept in host memory in the precision of their files, under a byte budget. Only layers that were
    on another device or were cast are kept here.

    Their memory is pinned if CUDA is available. If two precisions hold the same numbers, the smaller one is used.
    """

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self._kept: OrderedDict[int, LoadedLayer] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of host memory in use."""
        return sum(loaded.transcoder.nbytes for loaded in self._kept.values())

    def get(self, layer: int) -> LoadedLayer | None:
        """The layer, if it is kept here."""
        if layer in self._kept:
            self._kept.move_to_end(layer)
        return self._kept.get(layer)

    def keep(self, loaded: LoadedLayer) -> None:
        """Keep a dropped layer; layers that were kept longest are freed until it fits."""
        layer, dtypes = loaded.transcoder.layer, loaded.dtypes
        weights = {name: part for name in WEIGHTS if (part := getattr(loaded.transcoder, name)) is not None}
        as_stored = all(part.dtype == dtypes[name] for name, part in weights.items())
        if layer in self._kept or (as_stored and loaded.transcoder.device.type == "cpu"):
            return
        small = {name: _smallest(dtypes[name], part.dtype) for name, part in weights.items()}
        size = sum(part.numel() * small[name].itemsize for name, part in weights.items())
        if size > self.budget_bytes:
            return
        while self.nbytes + size > self.budget_bytes:
            self._kept.popitem(last=False)
        copies = {name: _on_host(part, small[name]) for name, part in weights.items()}
        self._kept[layer] = LoadedLayer(replace(loaded.transcoder, **copies), dtypes)  # type: ignore[arg-type]


def _smallest(stored: torch.dtype, held: torch.dtype) -> torch.dtype:
    """The smaller of two precisions, of numbers that were cast from `stored` to `held`; no number in `held` changes."""
    return stored if torch.promote_types(stored, held) == held else held


def _on_host(part: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(part.shape, dtype=dtype, pin_memory=torch.cuda.is_available())
    return out.copy_(part)


class Residency:
    """The layers in memory, the one used longest ago first. Threads may share it; a lock lets one change it at a time.

    Attributes:
        resident: by layer.
        ahead: the layer that is read ahead.
        host: dropped layers that are kept in host memory.
    """

    def __init__(
        self,
        layers: Sequence[int],
        loader: Callable[[int], Load],
        needed: Callable[[int], int],
        from_files: Callable[[int], bool],
        budget_bytes: int | None,
        host: HostTier,
        prefetch: bool,
    ):
        """`loader` gives the function that loads a layer, `needed` the bytes it takes, `from_files` whether it reads
        a file."""
        self._budget_bytes, self.host, self._prefetch = budget_bytes, host, prefetch
        self._changing = threading.RLock()
        self._layers, self._loader, self._needed, self._from_files = layers, loader, needed, from_files
        self.resident: OrderedDict[int, Transcoder] = OrderedDict()
        self.ahead: ReadAhead | None = None
        self._dtypes: dict[int, Mapping[str, torch.dtype]] = {}  # of resident layers: the dtypes in their files
        self._derived: dict[int, dict[str, tuple[list[weakref.ref[Tensor]], list[int], Tensor]]] = {}
        self._last: int | None = None  # the layer that was used last
        self._unused: set[int] = set()  # layers that were read ahead and are not used yet
        self._in_vain: set[int] = set()  # layers that were read ahead and dropped before they were used

    def get(self, layer: int) -> Transcoder:
        """A layer, loaded now if it is not resident."""
        with self._changing:
            if layer not in self.resident:
                self._admit(self._fetch(layer))
                self._evict(layer)  # the layer may be larger than expected
            self.resident.move_to_end(layer)
            self._unused.discard(layer)
            self._in_vain.discard(layer)
            self._look_ahead(layer)
            return self.resident[layer]

    @property
    def budget_bytes(self) -> int | None:
        """At most so many bytes are resident, except that the layer asked for last stays."""
        return self._budget_bytes

    @budget_bytes.setter
    def budget_bytes(self, budget_bytes: int | None) -> None:
        with self._changing:
            self._budget_bytes = budget_bytes
            self._evict(self._last)

    def _admit(self, loaded: LoadedLayer) -> None:
        layer = loaded.transcoder.layer
        self.resident[layer], self._dtypes[layer] = loaded.transcoder, loaded.dtypes

    def _fetch(self, layer: int) -> LoadedLayer:
        """The layer, from the thread that is reading it, or loaded now after others were dropped."""
        if self.ahead is not None and self.ahead.layer == layer:
            ahead, self.ahead = self.ahead, None
            return ahead.result()
        self.settle()
        if self.budget_bytes is not None:
            need = self._needed(layer)
            while self.resident and self.nbytes + need > self.budget_bytes:
                self.drop(next(iter(self.resident)))
        return self._loader(layer)(lambda: False)

    def _look_ahead(self, layer: int) -> None:
        """Let a thread read the layer that is probably next, if both fit into the budget."""
        previous, self._last = self._last, layer
        if not self._prefetch or self.budget_bytes is None or layer == previous:
            return
        coming = following(self._layers, previous, layer)
        known = {*self.resident, *self._in_vain, *([self.ahead.layer] if self.ahead else [])}
        if coming is None or coming in known or not self._from_files(coming):
            return
        self.settle()
        try:
            need = self._needed(coming)
        except CheckpointError:  # `get` raises it when the layer is used
            return
        if self._taken(layer) + need > self.budget_bytes:
            return
        dropped = []
        while self.nbytes + need > self.budget_bytes:
            oldest = next(other for other in self.resident if other != layer)
            dropped.append(self.resident[oldest])
            self.drop(oldest)
        self.ahead = ReadAhead(coming, need, self._loader(coming), dropped)
        dropped.clear()
        self.ahead.start()

    def settle(self) -> None:
        """End reading ahead. A layer that has been read stays, and is the first to be dropped."""
        with self._changing:
            ahead, self.ahead = self.ahead, None
            if ahead is None:
                return
            loaded = ahead.stop()
            self._in_vain.add(ahead.layer)
            if loaded is not None:
                self._admit(loaded)
                self.resident.move_to_end(ahead.layer, last=False)
                self._unused.add(ahead.layer)

    def derived(self, layer: int, name: str, given: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
        """See `TranscoderStore.derived`."""
        kept = self._derived.get(layer, {})
        versions = [tensor._version for tensor in given]
        if name in kept:
            seen, then, made = kept[name]
            if all(ref() is tensor for ref, tensor in zip(seen, given, strict=True)) and then == versions:
                return made
        made = make()
        with self._changing:
            if layer in self.resident:
                references = [weakref.ref(tensor) for tensor in given]
                self._derived.setdefault(layer, {})[name] = (references, versions, made)
                self._evict(layer)
        return made

    def _evict(self, keep: int | None) -> None:
        """Drop the layers used longest ago until the rest fits into the budget, but never the layer `keep`."""
        if self.budget_bytes is None:
            return
        ahead = self.ahead.nbytes if self.ahead else 0
        for layer in [layer for layer in self.resident if layer != keep]:
            if self.nbytes + ahead > self.budget_bytes:
                self.drop(layer)
        if ahead and self.nbytes + ahead > self.budget_bytes:
            self.settle()
            self._evict(keep)

    @property
    def nbytes(self) -> int:
        """Bytes of all resident layers."""
        return sum(map(self._taken, self.resident))

    def _taken(self, layer: int) -> int:
        derived = self._derived.get(layer, {}).values()
        return self.resident[layer].nbytes + sum(made.nbytes for _, _, made in derived)

    def drop(self, layer: int) -> None:
        """Free a layer's weights."""
        with self._changing:
            transcoder, dtypes = self.resident.pop(layer, None), self._dtypes.pop(layer, None)
            self._derived.pop(layer, None)
            if layer in self._unused:
                self._unused.discard(layer)
                self._in_vain.add(layer)
            if transcoder is not None and dtypes is not None and self._from_files(layer):
                self.host.keep(LoadedLayer(transcoder, dtypes))

    def close(self) -> None:
        """End reading ahead, and free all layers."""
        with self._changing:
            self.settle()
            self.host = HostTier(0)
            for layer in list(self.resident):
                self.drop(layer)

    def __del__(self) -> None:
        if self.ahead is not None:
            self.ahead.stop(wait=False)
