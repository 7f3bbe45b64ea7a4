"""Checkpoint formats. Each file *describes* where the tensors of a folder are; the store does the reading.

A format is a module with

    matches(root: Path) -> bool          by content and file names of its own, never by a guess from the folder's name
    locate(root: Path) -> Checkpoint     where every tensor is, and what the files say about themselves

To add one, add a file to this folder: its file name is its public name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hooks.errors import CheckpointError
from hooks.plugins import discover
from hooks.sites import SiteSpec

Source = Literal["stored", "metadata", "assumed", "given", "calibrated", "unknown"]
"""Where a fact about a checkpoint comes from."""


@dataclass(frozen=True)
class TensorSource:
    """One tensor on disk. `transposed`: stored [d_model feature] where we hold [feature d_model]."""

    file: Path
    key: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class LayerSource:
    """One layer's tensors (by the field names of `Transcoder`) and its selection rule."""

    layer: int
    d_model: int
    d_features: int
    tensors: Mapping[str, TensorSource]
    k: int | None
    k_source: Source
    metadata: Mapping[str, object] = field(default_factory=dict)
    sha256: str | None = None  # of the layer's file, where the format stores one; checked when the layer is loaded


@dataclass(frozen=True)
class Checkpoint:
    """A transcoder folder, described. `read` and `write` are None where the files do not say.

    `sites_source`: how whoever wrote the files knew the sites they state.
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


FORMATS = discover(__name__, ("matches", "locate"))


def recognise(root: Path) -> Checkpoint:
    """Describe the transcoders in a folder.

    Raises:
        CheckpointError: there is no such folder, no format or several formats recognise it, or a file is damaged.
    """
    if not root.is_dir():
        raise CheckpointError(
            f"there is no folder {root}",
            expected="a folder with transcoder files",
            found="a file" if root.exists() else "nothing",
            repair="check the path after --transcoders",
        )
    found = [name for name, module in FORMATS.items() if module.matches(root)]
    if len(found) != 1:
        names = sorted(path.name for path in root.iterdir())
        listing = ", ".join(names[:6]) + (f", … ({len(names)} entries)" if len(names) > 6 else "")
        raise CheckpointError(
            f"{'several formats' if found else 'no transcoders'} found in {root}",
            expected=f"the files of one format: {', '.join(FORMATS)}",
            found=f"{', '.join(found)}" if found else (listing or "an empty folder"),
            where=str(root),
        )
    checkpoint: Checkpoint = FORMATS[found[0]].locate(root)
    widths = {source.d_model for source in checkpoint.layers}
    if len(widths) > 1:
        raise CheckpointError(
            "the layers have different widths",
            expected="one model width for the whole set",
            found=", ".join(f"layer {source.layer}: {source.d_model}" for source in checkpoint.layers),
            where=str(root),
        )
    return checkpoint
