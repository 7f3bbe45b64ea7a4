"""Checkpoint formats. Each file *describes* where the tensors of a folder are; the store reads them.

A format is a module with

    matches(root: Path) -> bool          decides by file names and content, never by the folder's name
    locate(root: Path) -> Checkpoint     where every tensor is, and the facts that the files state

To add one, add a file to this folder: its file name is its public name. A fact that the files do not state is None,
with the source `unknown`; a fact that the format's own program would assume has the source `assumed`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from hooks.errors import CheckpointError
from hooks.files import check_file, check_links, hub_snapshot, is_folder, read_json, what_is
from hooks.plugins import discover
from hooks.sites import SiteSpec
from hooks.transcoder import Activation

Source = Literal["stored", "metadata", "assumed", "given", "calibrated", "undecided", "unknown"]
"""How a fact about a checkpoint is known; `undecided`: it was measured, and the measurement did not decide it."""

OPEN: tuple[Source, ...] = ("assumed", "calibrated", "undecided", "unknown")
"""Sources of facts that a measurement or an argument may overrule."""


@dataclass(frozen=True)
class TensorSource:
    """One tensor on disk.

    Attributes:
        key: its name in the file; several for a dict within a dict.
        transposed: stored as [d_model feature] where `Transcoder` has [feature d_model] (or the other way round).
        rows: only these rows (first, one past the last) of the stored tensor: one of several decoders.
    """

    file: Path
    key: tuple[str, ...]
    transposed: bool = False
    rows: tuple[int, int] | None = None


Finish = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Stored tensors → the fields of `Transcoder`, if they differ (a gate to fold in, a scalar threshold)."""

Norm = Literal["layernorm", "rms", "none"]


@dataclass(frozen=True)
class LayerSource:
    """One layer's tensors (by the field names of `Transcoder`) and its selection rule.

    Attributes:
        k_source: how the selection rule, k included, is known.
        groups: of GroupMax.
        finish: a function that is applied to the loaded tensors; None: nothing is to be done.
        sha256: of the layer's file, where the format stores one; checked when the layer is first loaded.
    """

    layer: int
    d_model: int
    d_features: int
    tensors: Mapping[str, TensorSource]
    k: int | None
    k_source: Source
    metadata: Mapping[str, object] = field(default_factory=dict)
    sha256: str | None = None
    activation: Activation = "topk"
    groups: int | None = None
    finish: Finish | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files its tensors are in."""
        return tuple(dict.fromkeys(tensor.file for tensor in self.tensors.values()))


@dataclass(frozen=True)
class Checkpoint:
    """A transcoder folder, described. None means that the files do not state a fact.

    Attributes:
        norm: the encoder's norm of its input; `norm_eps` belongs to it.
        encoder_source: how the encoder's input (norm, shift, skip connection) is known.
        sites_source: how the sites in the files were known to the writer of the files.
        base_revision: the commit of the base model.
        revision: the commit of the hub repository the files come from.
        decoders: how many target layers each file has a decoder for; `decoder` is the one described, from 0.
        notes: assumptions, for warnings; `selection_notes`: assumptions about the selection rule, k included.
    """

    root: Path
    format: str
    layers: tuple[LayerSource, ...]
    read: SiteSpec | None
    write: SiteSpec | None
    norm_eps: float = 1e-5
    base_model: str | None = None
    notes: tuple[str, ...] = ()
    sites_source: Source = "stored"
    norm: Norm = "layernorm"
    encoder_source: Source = "stored"
    base_revision: str | None = None
    revision: str | None = None
    decoders: int = 1
    decoder: int = 0
    selection_notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, tuple[object, Source]]:
        """The facts about the set, and how each is known."""
        rules = {(source.activation, source.k or source.groups, source.k_source) for source in self.layers}
        kinds = sorted({kind for kind, _, _ in rules})
        sizes = sorted({size for _, size, _ in rules if size is not None})
        sources = {source for _, _, source in rules}
        sites = (str(site) if site else None for site in (self.read, self.write))
        read, write = ((site, self.sites_source if site else "unknown") for site in sites)
        selected: Source = sources.pop() if len(sources) == 1 else "assumed"
        return {
            "base_model": (self.base_model, "stored" if self.base_model else "unknown"),
            "read": read,
            "write": write,
            "input_norm": (self.norm, self.encoder_source),
            "activation": (", ".join(kinds), selected),
            "k": (", ".join(map(str, sizes)) or None, selected),
        }


def for_decoder(checkpoint: Checkpoint, decoder: int) -> Checkpoint:
    """The set with one of its decoders, counted from 0.

    Raises:
        CheckpointError: there are fewer.
    """
    if not 0 <= decoder < checkpoint.decoders:
        raise CheckpointError(
            f"there is no decoder {decoder}",
            expected=f"0 to {checkpoint.decoders - 1}: each file has decoders for {checkpoint.decoders} target layers",
            where=str(checkpoint.root),
            repair="choose another with --decoder",
        )
    if checkpoint.decoders == 1:
        return checkpoint

    def narrowed(source: LayerSource) -> LayerSource:
        part = (decoder * source.d_model, (decoder + 1) * source.d_model)
        own = {name: replace(source.tensors[name], rows=part) for name in ("W_dec", "b_dec")}
        return replace(source, tensors={**source.tensors, **own})

    return replace(checkpoint, layers=tuple(map(narrowed, checkpoint.layers)), decoder=decoder)


def encoders(checkpoint: Checkpoint) -> dict[str, Checkpoint]:
    """The possible encoders of a set: as described; and, for a set with a LayerNorm, as in the card's code.

    The code on the published set's card adds the norm's bias to x and leaves out the norm.
    """
    out = {"trained": checkpoint}
    if checkpoint.norm == "layernorm" and all("norm_bias" in source.tensors for source in checkpoint.layers):
        layers = tuple(replace(source, finish=_as_on_the_card(source.finish)) for source in checkpoint.layers)
        out["card"] = replace(checkpoint, layers=layers, norm="none")
    return out


def _as_on_the_card(before: Finish | None) -> Finish:
    def finish(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = before(weights) if before else weights
        kept = {name: weight for name, weight in weights.items() if name not in ("norm_weight", "norm_bias")}
        return {**kept, "shift": -weights["norm_bias"]}

    return finish


FORMATS = discover(__name__, ("matches", "locate"))


def recognise(root: Path) -> Checkpoint:
    """Describe the transcoders in a folder.

    Raises:
        CheckpointError: there is no such folder, no format or several formats recognise it, or a file is damaged.
    """
    if not is_folder(root):
        raise CheckpointError(
            f"there is no folder {root}",
            expected="a folder with transcoder files",
            found=what_is(root),
            where=str(root),
            repair="check the path after --transcoders",
        )
    check_links(root)
    found = [name for name, module in FORMATS.items() if module.matches(root)]
    if len(found) != 1:
        names = sorted(path.name for path in root.iterdir())
        listing = ", ".join(names[:6]) + (f", … ({len(names)} entries)" if len(names) > 6 else "")
        raise CheckpointError(
            f"{'several formats' if found else 'no transcoders'} found in {root}",
            expected=f"the files of one format: {', '.join(FORMATS)}",
            found=f"{', '.join(found)}" if found else (listing or "an empty folder") + _unreadable(root),
            where=str(root),
            repair="name the folder that the files are in, with the files of one set alone",
        )
    checkpoint: Checkpoint = FORMATS[found[0]].locate(root)
    for file in {file: None for source in checkpoint.layers for file in source.files}:
        check_file(file, root)
    widths = {source.d_model for source in checkpoint.layers}
    if len(widths) > 1:
        raise CheckpointError(
            "the layers have different widths",
            expected="one model width for the whole set",
            found=", ".join(f"layer {source.layer}: {source.d_model}" for source in checkpoint.layers)[:400],
            where=str(root),
            repair="open the layers of one width alone",
        )
    snapshot = hub_snapshot(root)
    return replace(checkpoint, revision=snapshot.commit) if snapshot and not checkpoint.revision else checkpoint


def _unreadable(root: Path) -> str:
    """A text about JSON files in the folder that cannot be read; empty if there are none."""
    for path in sorted(root.glob("*.json"))[:8]:
        try:
            read_json(path)
        except CheckpointError as error:
            return f"; {path.name} cannot be read: {error.found}"
    return ""


__all__ = [
    "FORMATS",
    "OPEN",
    "Checkpoint",
    "LayerSource",
    "Norm",
    "Source",
    "TensorSource",
    "encoders",
    "for_decoder",
    "recognise",
]
