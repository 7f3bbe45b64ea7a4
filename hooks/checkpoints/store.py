"""Opens a described checkpoint: one `Transcoder` per layer, read when it is first used.

The store is one of the objects of this project that change over time: it records which layers are in memory
(`hooks.checkpoints.residency`). This file knows what the set is and where each layer's weights come from.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooks.checkpoints.convention import Convention, describe, resolve_convention, spans
from hooks.checkpoints.loading import bytes_needed, load_rows, load_weights, part_bytes
from hooks.checkpoints.residency import HostTier, Load, LoadedLayer, Residency
from hooks.errors import AddressError, CheckpointError, UserError
from hooks.formats import Checkpoint, LayerSource, Norm, Source
from hooks.sites import Site, SiteSpec
from hooks.transcoder import WEIGHTS, Transcoder
from hooks.whole import wholes

log = logging.getLogger("hooks")


class TranscoderStore:
    """The transcoders of one model, by layer.

    Examples:
        >>> from hooks.demo import TRANSCODERS
        >>> store = TranscoderStore.open(TRANSCODERS["demo"])
        >>> store[1].read.lens_name
        'blocks.1.hook_resid_pre'
    """

    def __init__(
        self,
        sources: dict[int, LayerSource | Transcoder],
        convention: Convention,
        *,
        norm_eps: float = 1e-5,
        norm: Norm = "layernorm",
        dtype: torch.dtype | None = None,
        budget_bytes: int | None = None,
        name: str = "in memory",
        devices: dict[int, torch.device] | None = None,
        host_budget_bytes: int | None = None,
        prefetch: bool = True,
    ):
        self.convention, self.name = convention, name
        self._sources, self._dtype = dict(sorted(sources.items())), dtype
        self._norm_eps, self._norm_centred = norm_eps, norm != "rms"
        self._devices = devices or {}
        self._near = Residency(
            tuple(self._sources),
            self._loader,
            self.bytes_of,
            self._from_files,
            budget_bytes,
            HostTier(host_budget_bytes or 0),
            prefetch,
        )
        self._said_cost = False

    @classmethod
    def open(
        cls,
        root: str | Path,
        *,
        read: str | SiteSpec | None = None,
        write: str | SiteSpec | None = None,
        k: int | None = None,
        encoder: str | None = None,
        decoder: int | None = None,
        layers: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        budget_bytes: int | None = None,
        host_budget_bytes: int | None = None,
        prefetch: bool = True,
        name: str | None = None,
    ) -> "TranscoderStore":
        """Open a folder in any known format; only headers are read.

        Args:
            read: the site the set reads, if the files do not say (`resid_pre`, `mlp_in`, ...).
            write: the site it writes, likewise (`resid_pre`, `resid_post`, `mlp_out+1`, ...).
            k: overrides the number of features TopK keeps; a warning says so if the files state another.
            encoder: `trained`, or `card` for the code on the published set's card (see `hooks.formats.encoders`).
            decoder: which one, from 0, where the files hold decoders for several target layers.
            layers: open only these.
            dtype: convert the weights to this precision.
            budget_bytes: keep at most this many bytes of weights in memory; one layer is always loaded, whatever it
                takes.
            host_budget_bytes: keep dropped layers in host memory, up to so many bytes, if they were on another device
                or were cast, so that using them again reads no file.
            prefetch: under a byte budget, read the next layer while one is used, if both fit.
            name: the set's name in messages and saved results; the folder by default.

        Raises:
            CheckpointError: see `hooks.formats.recognise`; or `read`/`write` contradict the files.
        """
        checkpoint = describe(Path(root), encoder=encoder, decoder=decoder, layers=layers, k=k)
        convention = resolve_convention(checkpoint, read, write)
        for note in (*checkpoint.notes, *checkpoint.selection_notes):
            log.warning("%s: %s", root, note)
        return cls.described(
            checkpoint,
            convention,
            dtype=dtype,
            budget_bytes=budget_bytes,
            host_budget_bytes=host_budget_bytes,
            prefetch=prefetch,
            name=name,
        )

    @classmethod
    def described(
        cls,
        checkpoint: Checkpoint,
        convention: Convention,
        *,
        dtype: torch.dtype | None = None,
        budget_bytes: int | None = None,
        host_budget_bytes: int | None = None,
        prefetch: bool = True,
        name: str | None = None,
    ) -> "TranscoderStore":
        """The transcoders of a described checkpoint, under the caller's convention; see `open`."""
        return cls(
            {source.layer: source for source in checkpoint.layers},
            convention,
            norm_eps=checkpoint.norm_eps,
            norm=checkpoint.norm,
            dtype=dtype,
            budget_bytes=budget_bytes,
            host_budget_bytes=host_budget_bytes,
            prefetch=prefetch,
            name=name or str(checkpoint.root),
        )

    @classmethod
    def of(cls, transcoders: Sequence[Transcoder]) -> "TranscoderStore":
        """Transcoders that are already in memory, all of one convention."""
        if not transcoders:
            raise CheckpointError("no transcoders given", expected="at least one Transcoder")
        layers = [transcoder.layer for transcoder in transcoders]
        twice = sorted({layer for layer in layers if layers.count(layer) > 1})
        if twice:
            raise CheckpointError(f"two transcoders for layer {twice[0]}", expected="one per layer")
        conventions = {_relative(transcoder) for transcoder in transcoders}
        if len(conventions) != 1:
            raise CheckpointError(
                "the transcoders follow several conventions",
                expected="one pair of read and write sites for the whole set",
                found="; ".join(f"{read} -> {write}" for read, write in sorted(conventions, key=str)),
            )
        read, write = conventions.pop()
        return cls({t.layer: t for t in transcoders}, Convention(read, write, "given"))

    @property
    def dtype(self) -> torch.dtype | None:
        """The precision of the weights in memory; None: as they are stored."""
        return self._dtype

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have a transcoder, ascending."""
        return tuple(self._sources)

    def d_model(self, layer: int) -> int:
        """Width of the residual stream that one layer reads, without loading it."""
        return self._sources[layer].d_model

    def sites(self, layer: int) -> tuple[Site, Site]:
        """The sites that one layer's transcoder reads and writes."""
        return self.convention.read.at(layer), self.convention.write.at(layer)

    def d_features(self, layer: int) -> int:
        """Dictionary size of one layer, without loading it."""
        return self._sources[layer].d_features

    def k(self, layer: int) -> int | None:
        """How many features TopK keeps at one layer, without loading it."""
        return self._sources[layer].k

    def has_skip(self, layer: int) -> bool:
        """Whether a layer's transcoder has a skip connection, without loading it."""
        source = self._sources[layer]
        return source.W_skip is not None if isinstance(source, Transcoder) else "W_skip" in source.tensors

    def k_source(self, layer: int) -> Source:
        """How `k` is known."""
        source = self._sources[layer]
        return "given" if isinstance(source, Transcoder) else source.k_source

    def metadata(self, layer: int) -> Mapping[str, object]:
        """The metadata about training in a layer's files."""
        source = self._sources[layer]
        return {} if isinstance(source, Transcoder) else source.metadata

    def __contains__(self, layer: int) -> bool:
        return layer in self._sources

    def __len__(self) -> int:
        return len(self._sources)

    def __iter__(self) -> Iterator[Transcoder]:
        return (self[layer] for layer in self.layers)

    def place(self, layer: int, device: torch.device) -> None:
        """Set the device of a layer's transcoder: the device of its block."""
        if self._devices.get(layer) != device:
            self._devices[layer] = device
            self._near.settle()
            self.drop(layer)

    def __getitem__(self, layer: int) -> Transcoder:
        """One layer's transcoder, read now if it is not in memory.

        Raises:
            CheckpointError: there is none for this layer, or its file is damaged or holds NaN or infinity.
        """
        self.require(layer)
        return self._near.get(layer)

    @property
    def budget_bytes(self) -> int | None:
        """At most so many bytes of weights are in memory; one layer is always loaded, whatever it takes."""
        return self._near.budget_bytes

    @budget_bytes.setter
    def budget_bytes(self, budget_bytes: int | None) -> None:
        self._near.budget_bytes = budget_bytes

    @property
    def _resident(self) -> Mapping[int, Transcoder]:
        return self._near.resident

    def require(self, layer: int) -> None:
        """Refuse a layer that has no transcoder, without loading anything.

        Raises:
            CheckpointError: there is none; the message names the layers that have one.
        """
        if layer not in self._sources:
            raise CheckpointError(
                f"layer {layer} has no transcoder",
                expected=f"a layer among {spans(self.layers)}",
                where=self.name,
            )

    def chosen(self, layers: str | Sequence[int]) -> tuple[int, ...]:
        """`"all"`, or some layers in any order, as layers in ascending order.

        Raises:
            UserError: another text, or what is no layer.
            CheckpointError: a layer has no transcoder.
        """
        if layers == "all":
            return self.layers
        if isinstance(layers, str):
            raise UserError(f"unknown layers {layers!r}", expected='"all" or a list of layer numbers')
        numbers = wholes(layers, "layers")
        for layer in numbers:
            self.require(layer)
        return tuple(sorted(set(numbers)))

    def decoder_rows(self, layer: int, features: Sequence[int] | Int[Tensor, " row"]) -> Float[Tensor, "row d_model"]:
        """Decoder rows of some features, without loading the layer; taken from the layer if it is in memory.

        Single rows are not compared with the digest of their file. Where they cannot be read alone, the layer is
        loaded, and a warning says once what that costs.

        Raises:
            AddressError: there is no such feature.
            CheckpointError: as in `store[layer]`.
        """
        return self._rows(layer, "W_dec", features)

    def encoder_rows(self, layer: int, features: Sequence[int] | Int[Tensor, " row"]) -> Float[Tensor, "row d_model"]:
        """Encoder rows of some features; otherwise as `decoder_rows`."""
        return self._rows(layer, "W_enc", features)

    def _rows(
        self, layer: int, name: str, features: Sequence[int] | Int[Tensor, " row"]
    ) -> Float[Tensor, "row d_model"]:
        self.require(layer)
        rows, size = [int(feature) for feature in features], self.d_features(layer)
        for row in rows:
            if not 0 <= row < size:
                raise AddressError(f"L{layer}: there is no feature {row}", expected=f"0 to {size - 1}")
        source, device = self._sources[layer], self.device(layer)
        waiting = self._near.host.get(layer)
        held = self._resident.get(layer) or (waiting.transcoder if waiting else None)
        if held is None and isinstance(source, Transcoder):
            held = source
        if held is None and isinstance(source, LayerSource) and source.finish is None:
            found = load_rows(source.tensors[name], rows, self._dtype)
            if found is not None:
                return found.to(device)
        if held is None:
            self._say_cost(layer)
            held = self[layer]
        return getattr(held, name)[torch.tensor(rows, dtype=torch.long, device=held.device)].to(device, self._dtype)

    def _say_cost(self, layer: int) -> None:
        if not self._said_cost:
            self._said_cost = True
            log.warning(
                "%s: single rows cannot be read from these files, so layer %d is loaded as a whole (%.0f MB), and so "
                "is every other; `circuits convert` writes a form whose rows can be read alone",
                self.name,
                layer,
                self.bytes_of(layer) / 1e6,
            )

    def device(self, layer: int) -> torch.device:
        """Where a layer's transcoder is, once it is loaded."""
        return self._devices.get(layer, torch.device("cpu"))

    # -- loading and freeing -----------------------------------------------------------------------------------

    def _loader(self, layer: int) -> Load:
        """The function that loads a layer. It has no reference to the store, which may be freed before a thread
        ends."""
        source, device = self._sources[layer], self.device(layer)
        waiting = self._near.host.get(layer)
        if isinstance(source, Transcoder):
            dtypes = {name: part.dtype for name in WEIGHTS if (part := getattr(source, name)) is not None}
            waiting = waiting or LoadedLayer(source, dtypes)
        if waiting is not None:
            return partial(_moved, waiting, device, self._dtype)
        assert isinstance(source, LayerSource)
        budget = self.budget_bytes
        room = None if budget is None else budget - self.nbytes - bytes_needed(source, self._dtype)
        facts = {
            "read": self.convention.read.at(layer),
            "write": self.convention.write.at(layer),
            "norm_eps": self._norm_eps,
            "norm_centred": self._norm_centred,
        }
        return partial(_read, source, device, self._dtype, part_bytes(room), facts)

    def _from_files(self, layer: int) -> bool:
        return isinstance(self._sources[layer], LayerSource)

    def bytes_of(self, layer: int) -> int:
        """Bytes that a layer takes once it is loaded, or while it is read if that is more."""
        source, waiting = self._sources[layer], self._near.host.get(layer)
        if isinstance(source, LayerSource) and waiting is None:
            return bytes_needed(source, self._dtype)
        there = waiting.transcoder if waiting else source
        assert isinstance(there, Transcoder)
        parts = (part for name in WEIGHTS if (part := getattr(there, name)) is not None)
        return sum(part.numel() * (self._dtype or part.dtype).itemsize for part in parts)

    def close(self) -> None:
        """End reading ahead, and free all layers, those in host memory too."""
        self._near.close()

    def drop(self, layer: int) -> None:
        """Free a layer's weights. When they are used again, they are read again or copied from host memory."""
        self._near.drop(layer)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers in memory."""
        return self._near.nbytes

    def derived(self, layer: int, name: str, given: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
        """A tensor that depends only on a layer's weights and on the tensors `given`: computed once, kept with the
        layer.

        It counts in the byte budget. It is computed again when a given tensor is another one or was written to. If the
        budget has dropped the layer, the result is not kept.
        """
        return self._near.derived(layer, name, given, make)


def _moved(
    waiting: LoadedLayer, device: torch.device, dtype: torch.dtype | None, stop: Callable[[], bool]
) -> LoadedLayer:
    """A transcoder from host memory, moved to its device and cast."""
    return LoadedLayer(waiting.transcoder.to(device, dtype), waiting.dtypes)


def _read(
    source: LayerSource,
    device: torch.device,
    dtype: torch.dtype | None,
    part: int,
    facts: Mapping[str, Any],
    stop: Callable[[], bool],
) -> LoadedLayer:
    weights, dtypes = load_weights(source, device, dtype, stop, part)
    fields: dict[str, Any] = {name: weights.get(name) for name in WEIGHTS}
    return LoadedLayer(Transcoder(layer=source.layer, **fields, **facts, k=source.k, groups=source.groups), dtypes)


def _relative(transcoder: Transcoder) -> tuple[SiteSpec, SiteSpec]:
    read, write = transcoder.read, transcoder.write
    return (
        SiteSpec(read.name, read.layer - transcoder.layer),
        SiteSpec(write.name, write.layer - transcoder.layer),
    )
