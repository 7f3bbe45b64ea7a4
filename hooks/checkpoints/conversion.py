"""A checkpoint in any known format → the native one, or another that can be written.

source folder → described by its format → one layer at a time → a new folder beside the target → renamed when complete
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hooks.checkpoints.convention import DEFAULT_SITE, Convention, describe, given_sites, narrowed, sites_source
from hooks.checkpoints.findings import read_findings
from hooks.checkpoints.store import TranscoderStore
from hooks.errors import CheckpointError
from hooks.files import new_folder, sha256
from hooks.formats import FORMATS, Checkpoint, LayerSource
from hooks.transcoder import Transcoder

WRITERS = {name: module for name, module in FORMATS.items() if hasattr(module, "save")}
"""The formats that can be written: those whose file defines `save`."""


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote.

    Attributes:
        nbytes: of the new folder.
        facts: facts about the set, by name: (value, how it is known).
    """

    root: Path
    format: str
    layers: tuple[int, ...]
    nbytes: int
    facts: dict[str, tuple[object, str]] = field(default_factory=dict)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str = "native",
    read: str | None = None,
    write: str | None = None,
    k: int | None = None,
    encoder: str | None = None,
    decoder: int | None = None,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
    origin: dict[str, Any] | None = None,
    progress: bool = False,
) -> Converted:
    """Write a set in another format, one layer in memory at a time.

    Sites that neither the files nor the arguments state stay unknown in the new files.

    Args:
        target: a folder that does not exist, or is empty.
        to: a format with a writer, see `WRITERS`.
        read, write, k, encoder, decoder, layers: see `TranscoderStore.open`.
        dtype: of the new weights; their own by default.
        base_model: the model they belong to, if the files do not state it.
        origin: where the files come from (hub repository, revision), for the manifest.
        progress: show a bar on stderr.

    Raises:
        CheckpointError: the source is damaged, or the target format cannot express this kind of set.
        OutputError: the target exists, or does not fit on the disk.
    """
    root, out = Path(source), Path(target)
    if to not in WRITERS:
        raise CheckpointError(
            f"cannot write the format {to!r}", expected=", ".join(WRITERS), where="--to", repair="take one of these"
        )
    checkpoint = describe(root, encoder=encoder, decoder=decoder, layers=layers, k=k)
    _check_base(checkpoint, base_model)
    given_read, given_write = given_sites(checkpoint, read, write)
    known = replace(
        checkpoint,
        read=given_read,
        write=given_write,
        sites_source=sites_source(checkpoint, read, write),
        base_model=base_model or checkpoint.base_model,
    )
    facts = known.facts()
    found = narrowed(read_findings(root), checkpoint.decoder)
    convention = Convention(given_read or DEFAULT_SITE, given_write or DEFAULT_SITE, "unknown")
    store = TranscoderStore.described(checkpoint, convention, dtype=dtype)
    with new_folder(out, sum(_bytes(source, dtype) for source in checkpoint.layers)) as folder:
        WRITERS[to].save(
            folder,
            _layers(store, progress),
            read=given_read,
            write=given_write,
            sites_source=known.sites_source,
            encoder_source=checkpoint.encoder_source,
            activation_source=facts["activation"][1],
            base_model=known.base_model,
            base_revision=checkpoint.base_revision,
            calibration=found.model_dump(mode="json") if found else None,
            metadata={source.layer: _plain(source.metadata) for source in checkpoint.layers},
            **_origin(checkpoint, origin),
        )
    size = sum(path.stat().st_size for path in out.iterdir())
    return Converted(out, to, store.layers, size, dict(facts))


def _check_base(checkpoint: Checkpoint, base_model: str | None) -> None:
    if base_model and checkpoint.base_model and base_model != checkpoint.base_model:
        raise CheckpointError(
            f"--base-model {base_model} contradicts the files",
            expected=f"{checkpoint.base_model}, as stored",
            where=str(checkpoint.root),
            repair="leave --base-model away",
        )


def _bytes(source: LayerSource, dtype: torch.dtype | None) -> int:
    """About how many bytes a layer takes: the two matrices in the wanted precision, or as many as its files."""
    if dtype is None:
        return sum(file.stat().st_size for file in source.files)
    return 2 * source.d_features * source.d_model * dtype.itemsize


def _layers(store: TranscoderStore, progress: bool) -> Iterator[Transcoder]:
    for layer in tqdm(store.layers, desc="layers", unit="layer", disable=not progress):
        yield store[layer].to("cpu")
        store.drop(layer)


def _plain(metadata: Any) -> dict[str, Any]:
    """The part of a layer's training metadata that JSON can hold."""
    return {str(key): value for key, value in metadata.items() if isinstance(value, str | int | float | bool)}


def _origin(checkpoint: Checkpoint, origin: dict[str, Any] | None) -> dict[str, Any]:
    files = sorted({file for source in checkpoint.layers for file in source.files})
    return {
        "format": checkpoint.format,
        "files": {str(file.relative_to(checkpoint.root)): sha256(file) for file in files},
        "assumed": [*checkpoint.notes, *checkpoint.selection_notes],
        "decoder": checkpoint.decoder,
        **({"revision": checkpoint.revision} if checkpoint.revision else {}),
        "converted_by": f"qwen-circuits {version('qwen-circuits')}",
        "date": datetime.now(UTC).date().isoformat(),
        **{key: value for key, value in (origin or {}).items() if value is not None},
    }
