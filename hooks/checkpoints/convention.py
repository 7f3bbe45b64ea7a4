"""Choose the sites, encoder, decoder and layers of a described set: as stored, as given, or assumed with a warning."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hooks.checkpoints.findings import Candidate, Findings, read_findings
from hooks.errors import CheckpointError
from hooks.formats import OPEN, Checkpoint, LayerSource, Source, encoders, for_decoder, recognise
from hooks.sites import SiteSpec
from hooks.whole import whole, wholes

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
        CheckpointError: an argument contradicts what the files state. It may contradict assumptions and measurements.
    """
    out = []
    for name, want, have in (("read", read, checkpoint.read), ("write", write, checkpoint.write)):
        site = SiteSpec.parse(want) if isinstance(want, str) else want
        if site and have and site != have and checkpoint.sites_source not in OPEN:
            raise CheckpointError(
                f"--{name} {site} contradicts the files",
                expected=f"{have}, as stored",
                where=str(checkpoint.root),
                repair=f"leave --{name} away",
            )
        out.append(site or have)
    return out[0], out[1]


def sites_source(checkpoint: Checkpoint, read: str | SiteSpec | None, write: str | SiteSpec | None) -> Source:
    """How a pair of sites is known: `given` if both were given, or one was given and the files state the other for
    certain; else the files' own source.

    If only one of the two sites is known, the pair counts as unknown.
    """
    asked = [site is not None for site in (read, write)]
    known = [site is not None for site in (checkpoint.read, checkpoint.write)]
    certain = checkpoint.sites_source not in OPEN
    if certain and all(known):
        return checkpoint.sites_source
    if all(asked) or (certain and all(a or k for a, k in zip(asked, known, strict=True))):
        return "given"
    return checkpoint.sites_source if all(known) else "unknown"


def resolve_convention(checkpoint: Checkpoint, read: str | SiteSpec | None, write: str | SiteSpec | None) -> Convention:
    """Stored sites, else given ones, else the default, with a warning that it is assumed.

    Raises:
        CheckpointError: an argument contradicts what the files state.
    """
    given_read, given_write = given_sites(checkpoint, read, write)
    if checkpoint.sites_source == "calibrated":
        for name, taken, have in (("read", given_read, checkpoint.read), ("write", given_write, checkpoint.write)):
            if have and taken != have:
                said = "%s: --%s %s is taken, and an earlier check found %s"
                log.warning(said, checkpoint.root, name, taken, have)
    if given_read and given_write:
        return Convention(given_read, given_write, sites_source(checkpoint, read, write))
    undecided = checkpoint.sites_source == "undecided"
    known_read, known_write = given_read or DEFAULT_SITE, given_write
    if known_write is None:
        known_write = known_read if known_read.name.startswith("resid") else SiteSpec("mlp_out", known_read.offset)
    log.warning(
        "%s: the files do not say what the transcoders read and write%s; assuming --read %s --write %s",
        checkpoint.root,
        ", and a check did not settle it" if undecided else "",
        known_read,
        known_write,
    )
    return Convention(known_read, known_write, "undecided" if undecided else "assumed")


def describe(root: Path, **choice: Any) -> Checkpoint:
    """A folder, with what an earlier check found about it, and the part of it that was asked for; see `choose`.

    Raises:
        CheckpointError: see `hooks.formats.recognise`, `read_findings` and `choose`.
    """
    checkpoint = recognise(root)
    return choose(checkpoint, found=read_findings(root), **choice)


def narrowed(found: Findings | None, decoder: int) -> Findings | None:
    """The findings about one decoder, as if the set had no other one; None where it was not measured."""
    if found is None:
        return None
    for finding in found.decoders:
        if finding.best.decoder == decoder:
            verdict, margin = finding.verdict, finding.margin
            best = finding.best.model_copy(update={"decoder": 0})
            return found.model_copy(
                update={"best": best, "verdict": verdict, "margin": margin, "ranking": (best,), "decoders": ()}
            )
    if decoder != found.best.decoder:
        return None
    return found.model_copy(update={"best": found.best.model_copy(update={"decoder": 0}), "decoders": ()})


def _settled(checkpoint: Checkpoint, best: Candidate, clear: bool) -> Checkpoint:
    """Take the measured sites where the files do not state theirs for certain."""
    if checkpoint.read and checkpoint.write and checkpoint.sites_source not in OPEN:
        doubt = "an earlier check did not find these sites clearly the best; `circuits check` shows what it found"
        return checkpoint if clear else replace(checkpoint, notes=(*checkpoint.notes, doubt))
    if not clear:
        return replace(checkpoint, sites_source="undecided")
    read, write = SiteSpec.parse(best.read), SiteSpec.parse(best.write)
    return replace(checkpoint, read=read, write=write, sites_source="calibrated")


def choose(
    checkpoint: Checkpoint,
    *,
    encoder: str | None = None,
    decoder: int | None = None,
    layers: Sequence[int] | None = None,
    k: int | None = None,
    found: Findings | None = None,
) -> Checkpoint:
    """The part of a set that was asked for; see `TranscoderStore.open`.

    Args:
        k: overrides a stored one, with a warning.
        found: findings of an earlier check. They give sites, encoder and decoder where nothing else does.

    Raises:
        CheckpointError: the set has no such encoder, decoder, layer or k.
    """
    decoder, k = (None if number is None else whole(number, name) for name, number in (("decoder", decoder), ("k", k)))
    layers = None if layers is None else wholes(layers, "layers")
    source: Source | None = "given" if encoder else None
    if encoder not in (None, "trained") and checkpoint.encoder_source not in OPEN:
        log.warning("%s: --encoder %s is taken, and the files state the trained one", checkpoint.root, encoder)
    measured = found if decoder is None else narrowed(found, decoder)
    if measured:
        best, clear = measured.best, measured.usable
        checkpoint = _settled(checkpoint, best, clear)
        if clear:
            decoder = best.decoder if decoder is None and checkpoint.decoders > 1 else decoder
            if encoder is None and checkpoint.encoder_source in OPEN and best.encoder in encoders(checkpoint):
                encoder, source = best.encoder, "calibrated"
            elif encoder not in (None, best.encoder):
                said = "%s: --encoder %s is taken, and an earlier check found that %s fits best"
                log.warning(said, checkpoint.root, encoder, best.encoder)
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
    if source:
        checkpoint = replace(checkpoint, encoder_source=source)
    sources = checkpoint.layers if layers is None else named_layers(checkpoint, layers)
    if k is None:
        _check_k_known(checkpoint, sources)
        return replace(checkpoint, layers=sources)
    chosen = tuple(_with_k(source, k) for source in sources)
    _say_other_k(checkpoint, sources, k)
    return replace(checkpoint, layers=chosen, selection_notes=())


def _say_other_k(checkpoint: Checkpoint, sources: Sequence[LayerSource], k: int) -> None:
    """Warn that a given k overrides a stored one."""
    other = [s for s in sources if s.k_source not in ("assumed", "unknown") and (s.activation, s.k) != ("topk", k)]
    if other:
        rules = sorted({f"{source.activation} {source.k or ''}".strip() for source in other})
        log.warning(
            "%s: --k %d is taken, and the files state %s (layers %s)",
            checkpoint.root,
            k,
            ", ".join(rules)[:80],
            spans([source.layer for source in other]),
        )


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


def named_layers(checkpoint: Checkpoint, layers: Sequence[int]) -> tuple[LayerSource, ...]:
    """Some layers of a set.

    Raises:
        CheckpointError: the set lacks one of them, or none was named.
    """
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
