"""Which sites, encoder, decoder and layers of a described set are meant: stored, given, or assumed aloud."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hooks.errors import CheckpointError
from hooks.formats import Checkpoint, LayerSource, Source, encoders, for_decoder
from hooks.sites import SiteSpec

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


def given_sites(
    checkpoint: Checkpoint, read: str | SiteSpec | None, write: str | SiteSpec | None
) -> tuple[SiteSpec | None, SiteSpec | None]:
    """The read and write site from the arguments, else from the files, else None.

    Raises:
        CheckpointError: what is given contradicts what is stored; an assumption may be contradicted.
    """
    out = []
    for name, want, have in (("read", read, checkpoint.read), ("write", write, checkpoint.write)):
        site = SiteSpec.parse(want) if isinstance(want, str) else want
        if site and have and site != have and checkpoint.sites_source != "assumed":
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
    if given_read and given_write:
        as_stored = (given_read, given_write) == (checkpoint.read, checkpoint.write)
        return Convention(given_read, given_write, checkpoint.sites_source if as_stored else "given")
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
        _check_k_known(checkpoint, sources)
        return replace(checkpoint, layers=sources)
    return replace(checkpoint, layers=tuple(_with_k(source, k) for source in sources), selection_notes=())


def _check_k_known(checkpoint: Checkpoint, sources: Sequence[LayerSource]) -> None:
    unknown = [s.layer for s in sources if s.activation == "topk" and s.k is None and s.k_source == "unknown"]
    if unknown:
        raise CheckpointError(
            "the files do not say how many features TopK keeps",
            expected="--k N",
            found="; ".join(checkpoint.selection_notes) or f"no k at layers {spans(unknown)}",
            where=str(checkpoint.root),
            repair="look k up where the set is published, and give it",
        )


def _named_layers(checkpoint: Checkpoint, layers: Sequence[int]) -> tuple[LayerSource, ...]:
    sources = {source.layer: source for source in checkpoint.layers}
    missing = sorted(set(layers) - set(sources))
    if missing or not layers:
        raise CheckpointError(
            f"no transcoder for layer {missing[0]}" if missing else "no layers chosen",
            expected=f"layers among {spans(sorted(sources))}",
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


def spans(layers: Sequence[int]) -> str:
    """`0-4, 6` for [0, 1, 2, 3, 4, 6]."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and spans[-1][-1] == layer - 1:
            spans[-1] = [spans[-1][0], layer]
        else:
            spans.append([layer])
    return ", ".join("-".join(map(str, span)) for span in spans)
