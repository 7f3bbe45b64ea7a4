"""Opens a described checkpoint: one `Transcoder` per layer, read when first asked for.

One of the two objects of this project that change over time: it remembers which layers are resident, and with
`budget_bytes` it drops the one used longest ago when the budget is full.
"""

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooks.errors import CheckpointError
from hooks.files import open_pt, safetensors_load, sha256
from hooks.formats import Checkpoint, LayerSource, Norm, Source, TensorSource, encoders, for_decoder, recognise
from hooks.sites import Site, SiteSpec
from hooks.transcoder import WEIGHTS, Transcoder

log = logging.getLogger("hooks")

DEFAULT_SITE = SiteSpec("resid_pre")


@dataclass(frozen=True)
class Convention:
    """What a set reads and writes, relative to a transcoder's layer, and how that is known."""

    read: SiteSpec
    write: SiteSpec
    source: Source

    @property
    def same_site(self) -> bool:
        """Whether the set reconstructs what it reads."""
        return self.read == self.write


class TranscoderStore:
    """The transcoders of one model, by layer.

    Example:
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
    ):
        self.convention, self.name, self.budget_bytes = convention, name, budget_bytes
        self._sources, self._dtype = dict(sorted(sources.items())), dtype
        self._norm_eps, self._norm_centred = norm_eps, norm != "rms"
        self._devices = devices or {}
        self._resident: OrderedDict[int, Transcoder] = OrderedDict()
        self._derived: dict[int, dict[str, tuple[list[weakref.ref[Tensor]], list[int], Tensor]]] = {}

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
        name: str | None = None,
    ) -> "TranscoderStore":
        """Open a folder in any known format; nothing but headers is read yet.

        Args:
            read: the site the set reads, if the files do not say (`resid_pre`, `mlp_in`, ...).
            write: the site it writes, likewise (`resid_pre`, `resid_post`, `mlp_out+1`, ...).
            k: overrides the number of features TopK keeps.
            encoder: `trained`, or `card` for the code on the published set's card (see `hooks.formats.encoders`).
            decoder: which one, from 0, where the files hold decoders for several target layers.
            layers: open only these.
            dtype: hold the weights in another precision.
            budget_bytes: keep at most this many bytes of weights resident.
            name: what messages and saved results call the set; the folder by default.

        Raises:
            CheckpointError: see `hooks.formats.recognise`; or `read`/`write` contradict what the files say.
        """
        checkpoint = choose(recognise(Path(root)), encoder=encoder, decoder=decoder, layers=layers, k=k)
        convention = resolve_convention(checkpoint, read, write)
        for note in (*checkpoint.notes, *checkpoint.selection_notes):
            log.warning("%s: %s", root, note)
        return cls.described(checkpoint, convention, dtype=dtype, budget_bytes=budget_bytes, name=name)

    @classmethod
    def described(
        cls,
        checkpoint: Checkpoint,
        convention: Convention,
        *,
        dtype: torch.dtype | None = None,
        budget_bytes: int | None = None,
        name: str | None = None,
    ) -> "TranscoderStore":
        """The transcoders of a described checkpoint, under a convention that the caller knows; see `open`."""
        return cls(
            {source.layer: source for source in checkpoint.layers},
            convention,
            norm_eps=checkpoint.norm_eps,
            norm=checkpoint.norm,
            dtype=dtype,
            budget_bytes=budget_bytes,
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
    def layers(self) -> tuple[int, ...]:
        """Layers that have a transcoder, ascending."""
        return tuple(self._sources)

    def d_model(self, layer: int) -> int:
        """Width of the streams one layer reads, without loading it."""
        return self._sources[layer].d_model

    def sites(self, layer: int) -> tuple[Site, Site]:
        """Where one layer's transcoder reads and writes."""
        return self.convention.read.at(layer), self.convention.write.at(layer)

    def d_features(self, layer: int) -> int:
        """Dictionary size of one layer, without loading it."""
        return self._sources[layer].d_features

    def k(self, layer: int) -> int | None:
        """How many features TopK keeps at one layer, without loading it."""
        return self._sources[layer].k

    def k_source(self, layer: int) -> Source:
        """Where `k` comes from."""
        source = self._sources[layer]
        return "given" if isinstance(source, Transcoder) else source.k_source

    def __contains__(self, layer: int) -> bool:
        return layer in self._sources

    def __len__(self) -> int:
        return len(self._sources)

    def __iter__(self) -> Iterator[Transcoder]:
        return (self[layer] for layer in self.layers)

    def place(self, layer: int, device: torch.device) -> None:
        """Say where a layer's transcoder belongs: the device of the block it sits at."""
        if self._devices.get(layer) != device:
            self._devices[layer] = device
            self.drop(layer)

    def __getitem__(self, layer: int) -> Transcoder:
        """One layer's transcoder, read now if it is not resident.

        Raises:
            CheckpointError: there is none for this layer, or its file is damaged.
        """
        self.require(layer)
        if layer in self._resident:
            self._resident.move_to_end(layer)
        else:
            self._resident[layer] = self._load(layer)
            self._evict()
        return self._resident[layer]

    def require(self, layer: int) -> None:
        """Refuse a layer that has no transcoder, without loading anything.

        Raises:
            CheckpointError: naming the layers there are.
        """
        if layer not in self._sources:
            raise CheckpointError(
                f"layer {layer} has no transcoder",
                expected=f"a layer among {_spans(self.layers)}",
                where=self.name,
            )

    def _load(self, layer: int) -> Transcoder:
        source = self._sources[layer]
        device = self._devices.get(layer, torch.device("cpu"))
        if isinstance(source, Transcoder):
            return source.to(device, self._dtype)
        weights = {name: _read(where).to(device, self._dtype) for name, where in source.tensors.items()}
        weights = source.finish(weights) if source.finish else weights
        _check_digest(source)
        return Transcoder(
            layer=layer,
            read=self.convention.read.at(layer),
            write=self.convention.write.at(layer),
            **{name: weights.get(name) for name in WEIGHTS},  # type: ignore[arg-type]
            norm_eps=self._norm_eps,
            norm_centred=self._norm_centred,
            k=source.k,
            groups=source.groups,
        )

    def derived(self, layer: int, name: str, given: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
        """A tensor that depends on a layer's weights and the `given` ones alone: made once, kept with the layer.

        It counts in the byte budget. It is made anew when a given tensor is another one, or was written to. For a layer
        that the budget has dropped nothing is kept.
        """
        kept = self._derived.get(layer, {})
        versions = [tensor._version for tensor in given]
        if name in kept:
            seen, then, made = kept[name]
            if all(ref() is tensor for ref, tensor in zip(seen, given, strict=True)) and then == versions:
                return made
        made = make()
        if layer in self._resident:
            references = [weakref.ref(tensor) for tensor in given]
            self._derived.setdefault(layer, {})[name] = (references, versions, made)
            self._evict()
        return made

    def _evict(self) -> None:
        while self.budget_bytes is not None and len(self._resident) > 1 and self.nbytes > self.budget_bytes:
            self.drop(next(iter(self._resident)))

    @property
    def nbytes(self) -> int:
        """Bytes of what is resident."""
        kept = (made for tensors in self._derived.values() for _, _, made in tensors.values())
        return sum(t.nbytes for t in self._resident.values()) + sum(made.nbytes for made in kept)

    def drop(self, layer: int) -> None:
        """Let go of a layer's weights; they are read again when asked for."""
        self._resident.pop(layer, None)
        self._derived.pop(layer, None)


def given_sites(
    checkpoint: Checkpoint, read: str | SiteSpec | None, write: str | SiteSpec | None
) -> tuple[SiteSpec | None, SiteSpec | None]:
    """The read and write site from the arguments, else from the files, else None.

    Raises:
        CheckpointError: what is given contradicts what is stored.
    """
    out = []
    for name, want, have in (("read", read, checkpoint.read), ("write", write, checkpoint.write)):
        site = SiteSpec.parse(want) if isinstance(want, str) else want
        if site and have and site != have:
            raise CheckpointError(
                f"--{name} {site} contradicts the files",
                expected=f"{have}, as stored",
                where=str(checkpoint.root),
                repair=f"leave --{name} away",
            )
        out.append(site or have)
    return out[0], out[1]


def resolve_convention(checkpoint: Checkpoint, read: str | SiteSpec | None, write: str | SiteSpec | None) -> Convention:
    """Stored sites, else given ones, else the assumption that is said aloud.

    Raises:
        CheckpointError: what is given contradicts what is stored.
    """
    given_read, given_write = given_sites(checkpoint, read, write)
    if checkpoint.read and checkpoint.write:
        return Convention(checkpoint.read, checkpoint.write, checkpoint.sites_source)
    if given_read and given_write:
        return Convention(given_read, given_write, "given")
    known_read, known_write = given_read or DEFAULT_SITE, given_write
    if known_write is None:
        known_write = known_read if known_read.name.startswith("resid") else SiteSpec("mlp_out", known_read.offset)
    log.warning(
        "%s: the files do not say what the transcoders read and write; assuming --read %s --write %s",
        checkpoint.root,
        known_read,
        known_write,
    )
    return Convention(known_read, known_write, "assumed")


def choose(
    checkpoint: Checkpoint,
    *,
    encoder: str | None = None,
    decoder: int | None = None,
    layers: Sequence[int] | None = None,
    k: int | None = None,
) -> Checkpoint:
    """The part of a set that was asked for; see `TranscoderStore.open`.

    Raises:
        CheckpointError: the set has no such encoder, decoder, layer or k.
    """
    known = encoders(checkpoint)
    if encoder is not None and encoder not in known:
        raise CheckpointError(
            f"unknown encoder {encoder!r}", expected=f"one of {', '.join(known)} for this set", where="--encoder"
        )
    if checkpoint.decoders > 1 and decoder is None:
        log.warning(
            "%s: each file has decoders for %d target layers; taking the first, --decoder 0",
            checkpoint.root,
            checkpoint.decoders,
        )
    checkpoint = for_decoder(known[encoder or "trained"], decoder or 0)
    if encoder:
        checkpoint = replace(checkpoint, encoder_source="given")
    sources = checkpoint.layers if layers is None else _named_layers(checkpoint, layers)
    if k is None:
        return replace(checkpoint, layers=sources)
    return replace(checkpoint, layers=tuple(_with_k(source, k) for source in sources), selection_notes=())


def _named_layers(checkpoint: Checkpoint, layers: Sequence[int]) -> tuple[LayerSource, ...]:
    sources = {source.layer: source for source in checkpoint.layers}
    missing = sorted(set(layers) - set(sources))
    if missing or not layers:
        raise CheckpointError(
            f"no transcoder for layer {missing[0]}" if missing else "no layers chosen",
            expected=f"layers among {_spans(sorted(sources))}",
            where=str(checkpoint.root),
        )
    return tuple(sources[layer] for layer in sorted(set(layers)))


def _with_k(source: LayerSource, k: int) -> LayerSource:
    if not 1 <= k <= source.d_features:
        raise CheckpointError(f"k = {k} is out of range", expected=f"1 to {source.d_features}", where="--k")
    if source.activation in ("jumprelu", "groupmax"):
        raise CheckpointError(
            f"--k {k} has no meaning here", expected="a set with TopK or ReLU", found=f"a {source.activation} set"
        )
    return replace(source, k=k, k_source="given", activation="topk")


def _check_digest(source: LayerSource) -> None:
    if source.sha256 is None:
        return
    file = source.files[0]
    found = sha256(file)
    if found != source.sha256:
        raise CheckpointError(
            f"{file.name} is not the file its manifest describes",
            expected=f"sha256 {source.sha256}",
            found=found,
            where=str(file),
            repair="download or convert it again",
        )


def _read(source: TensorSource) -> Tensor:
    if source.file.suffix == ".safetensors":
        tensor = safetensors_load(source.file, source.key[-1])
    else:
        content: Any = open_pt(source.file)
        for key in source.key:
            content = content[key]
        tensor = content
    if source.rows:
        tensor = tensor[slice(*source.rows)]
    return tensor.T.contiguous() if source.transposed else tensor.clone()


def _relative(transcoder: Transcoder) -> tuple[SiteSpec, SiteSpec]:
    read, write = transcoder.read, transcoder.write
    return (
        SiteSpec(read.name, read.layer - transcoder.layer),
        SiteSpec(write.name, write.layer - transcoder.layer),
    )


def _spans(layers: Sequence[int]) -> str:
    """`0-4, 6` for [0, 1, 2, 3, 4, 6]."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and spans[-1][-1] == layer - 1:
            spans[-1] = [spans[-1][0], layer]
        else:
            spans.append([layer])
    return ", ".join("-".join(map(str, span)) for span in spans)
