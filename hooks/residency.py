"""What is near without being resident: the layer that is read ahead, and layers kept in host memory."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hooks.transcoder import WEIGHTS, Transcoder


@dataclass(frozen=True)
class Loaded:
    """A transcoder, and the precision in which its files hold each of its tensors."""

    transcoder: Transcoder
    dtypes: Mapping[str, torch.dtype]


Load = Callable[[Callable[[], bool]], Loaded]
"""Reads one layer; asks again and again whether it should stop."""


class ReadAhead:
    """One layer, read by a thread of its own while another layer is used.

    It begins when the layers dropped in its favour are really gone: whoever asked for them may hold them a little
    longer, and until then their memory is not free.
    """

    def __init__(self, layer: int, nbytes: int, load: Load, after: Sequence[Transcoder]):
        self.layer, self.nbytes = layer, nbytes
        self._load, self._stopped = load, False
        self._begin = threading.Event()
        self._loaded: Loaded | None = None
        self._error: BaseException | None = None
        self._held = [weakref.ref(transcoder, self._released) for transcoder in after]
        self._thread = threading.Thread(target=self._run, name=f"read ahead: layer {layer}", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Look whether the way is free; called once the maker has let go of the layers too."""
        self._released(None)

    def _released(self, _: object) -> None:
        if all(held() is None for held in self._held):
            self._begin.set()

    def _run(self) -> None:
        self._begin.wait()
        try:
            if not self._stopped:
                self._loaded = self._load(lambda: self._stopped)
        except BaseException as error:  # raised where the layer is asked for
            self._error = error

    def result(self) -> Loaded:
        """The layer, as soon as it is there; raises what reading it raised."""
        self._begin.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._loaded is not None, "a stopped read has no result"
        return self._loaded

    def stop(self, *, wait: bool = True) -> Loaded | None:
        """Nobody needs it now: end the thread. The layer, if it is there already."""
        self._stopped = True
        self._begin.set()
        if wait:
            self._thread.join()
        return self._loaded


def following(layers: Sequence[int], previous: int | None, layer: int) -> int | None:
    """The layer that is probably next: a pass begins at an end of the set and takes neighbours in turn."""
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
    """Layers that a device or a cast held, in host memory and in the precision of their files, under a byte budget.

    They are pinned where CUDA is there. Of two precisions that hold the same numbers the smaller one is kept.
    """

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self._kept: OrderedDict[int, Loaded] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of host memory in use."""
        return sum(loaded.transcoder.nbytes for loaded in self._kept.values())

    def get(self, layer: int) -> Loaded | None:
        """A layer that is kept."""
        if layer in self._kept:
            self._kept.move_to_end(layer)
        return self._kept.get(layer)

    def keep(self, loaded: Loaded) -> None:
        """Keep a layer that is dropped, and let go of those kept longest where there is no room."""
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
        self._kept[layer] = Loaded(replace(loaded.transcoder, **copies), dtypes)  # type: ignore[arg-type]


def _smallest(stored: torch.dtype, held: torch.dtype) -> torch.dtype:
    """The precision to keep numbers in that were cast from one to the other: none of those held is changed by it."""
    return stored if torch.promote_types(stored, held) == held else held


def _on_host(part: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(part.shape, dtype=dtype, pin_memory=torch.cuda.is_available())
    return out.copy_(part)
