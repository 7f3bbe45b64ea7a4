"""A described layer → tensors on their device, read in parts, so that no tensor is in memory twice.

A matrix is read some rows at a time. Each part is cast, checked for NaN and infinity, and copied into the tensor.
Safetensors are read, not mapped. A `.pt` file is mapped again for every part, so that the pages of one mapping do not
stay in memory beside the new tensors. A decoder that is stored transposed is transposed part by part.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooks.errors import CheckpointError
from hooks.files import (
    check_pt_sums,
    maps_pt,
    npz_dtypes,
    npz_load,
    npz_shapes,
    open_pt,
    safetensors_dtypes,
    safetensors_parts,
    safetensors_rows,
    safetensors_shapes,
    sha256,
)
from hooks.formats import LayerSource, TensorSource

PART_BYTES = 2 << 20  # of a file in memory at a time; together with its cast up to four times as much
LEAST_PART_BYTES = 512 << 10  # the same where memory is short


class Stopped(Exception):  # noqa: N818
    """The load was stopped, because its result is not needed any more."""


@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of one tensor on disk; of several decoders in a file, the described one."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """Number of rows; a single number counts as one row."""
        return self.shape[0] if self.shape else 1

    def nbytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes in memory, in another precision if one is given."""
        return math.prod(self.shape) * (dtype or self.dtype).itemsize


def stored(source: LayerSource) -> dict[str, StoredTensor]:
    """Shape and precision of every tensor of a layer, from headers alone.

    Raises:
        CheckpointError: a file is damaged.
    """
    contents = {file: _headers(file) for file in source.files}
    return {name: _described(where, contents[where.file]) for name, where in source.tensors.items()}


def _headers(file: Path) -> Any:
    if file.suffix not in (".safetensors", ".npz"):
        return open_pt(file)
    packed = file.suffix == ".npz"
    shapes, dtypes = (
        (npz_shapes(file), npz_dtypes(file)) if packed else (safetensors_shapes(file), safetensors_dtypes(file))
    )
    return {key: StoredTensor(shape, dtypes[key]) for key, shape in shapes.items()}


def _described(where: TensorSource, content: Any) -> StoredTensor:
    found = _within(content, where)
    shape = tuple(found.shape)
    return StoredTensor((where.rows[1] - where.rows[0], *shape[1:]) if where.rows else shape, found.dtype)


def _within(content: Any, where: TensorSource) -> Any:
    try:
        for key in where.key:
            content = content[key]
    except (KeyError, TypeError, IndexError):
        raise CheckpointError(
            f"{where.file.name} lacks the tensor {where.key[-1]}",
            expected="the file that was there when the folder was opened",
            where=str(where.file),
        ) from None
    return content


def bytes_needed(source: LayerSource, dtype: torch.dtype | None) -> int:
    """Bytes that a layer takes once it is loaded, or while it is computed from the stored tensors if that is more."""
    described = stored(source)
    if source.finish is None:
        return sum(size.nbytes(dtype) for size in described.values())
    given = {name: _shaped(source.tensors[name], size) for name, size in described.items()}
    finished = source.finish(dict(given))
    before, now = _bytes_of(given.values()), _bytes_of(finished.values())
    most = _bytes_of((*given.values(), *finished.values()))  # `finish` makes new tensors beside the stored ones
    most = max(most, before, now)
    for part in finished.values():  # cast one at a time: each is freed when its cast exists
        if dtype is not None and part.dtype != dtype:
            now += part.numel() * dtype.itemsize
            most = max(most, now)
            now -= part.nbytes
    return most


def _shaped(where: TensorSource, size: StoredTensor) -> Tensor:
    """A tensor of the right shape and precision without memory, on which `finish` can be run to see what it makes."""
    return torch.empty(size.shape[::-1] if where.transposed else size.shape, dtype=size.dtype, device="meta")


def _bytes_of(parts: Iterable[Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    return sum(part.nbytes for part in {id(part): part for part in parts}.values())


def part_bytes(room: int | None) -> int:
    """How many bytes of a file to read at a time, so that they and their casts fit into memory beside the layer."""
    return PART_BYTES if room is None else min(PART_BYTES, max(LEAST_PART_BYTES, room // 4))


def load_weights(
    source: LayerSource,
    device: torch.device,
    dtype: torch.dtype | None,
    stop: Callable[[], bool] = lambda: False,
    part: int = PART_BYTES,
) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
    """The fields of a `Transcoder`, and the precision each is stored in.

    Args:
        dtype: precision of the result; as stored if None.
        stop: asked before every part.
        part: bytes of a file in memory at a time.

    Raises:
        CheckpointError: the file is damaged, is not the one its manifest describes, or holds NaN or infinity.
        Stopped: `stop` returned True.
    """
    described = stored(source)
    check_digest(source)
    _check_sums(source)
    early = None if source.finish else dtype  # `finish` computes in the stored precision, so the cast comes after it
    weights = {
        name: _tensor(where, described[name], device, early, stop, part) for name, where in source.tensors.items()
    }
    if source.finish is None:
        return weights, {name: size.dtype for name, size in described.items()}
    weights = source.finish(weights)
    dtypes = {name: weight.dtype for name, weight in weights.items()}
    for name in weights:
        key = f"{name}, worked out from the file"  # one at a time, so that the stored tensor is freed
        weights[name] = _cast(weights[name], dtype, key, source.files[0], 0)
    return weights, dtypes


def _tensor(
    where: TensorSource,
    size: StoredTensor,
    device: torch.device,
    dtype: torch.dtype | None,
    stop: Callable[[], bool],
    at_once: int,
) -> Tensor:
    shape = size.shape[::-1] if where.transposed else size.shape
    out = torch.empty(shape, dtype=dtype or size.dtype, device=device)
    first = where.rows[0] if where.rows else 0
    for start, part in _parts(where, size, at_once):
        if stop():
            raise Stopped
        cast = _cast(part, out.dtype, where.key[-1], where.file, first + start)
        if not size.shape:
            out.copy_(cast.view(()))
        elif where.transposed:
            out[:, start : start + len(cast)].copy_(cast.T)
        else:
            out[start : start + len(cast)].copy_(cast)
    return out


def _parts(where: TensorSource, size: StoredTensor, at_once: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows), counted within the described tensor. A part may be overwritten by the next one."""
    row_bytes = max(1, size.nbytes() // max(1, size.rows))
    count = max(1, at_once // row_bytes)
    first = where.rows[0] if where.rows else 0
    starts = range(0, size.rows, count)
    if where.file.suffix == ".safetensors":
        yield from zip(starts, safetensors_parts(where.file, where.key[-1], first, first + size.rows, count))
        return
    whole = _opener(where)
    for start in starts:
        last = min(start + count, size.rows)
        yield start, whole()[first + start : first + last] if size.shape else whole()[None]


def _opener(where: TensorSource) -> Callable[[], Tensor]:
    """A function that returns the whole tensor: mapped again each time, or read once if its file cannot be mapped."""
    if where.file.suffix == ".npz":
        content = npz_load(where.file, where.key[-1])
    elif maps_pt(where.file):
        return lambda: _within(open_pt(where.file), where)
    else:
        content = _within(open_pt(where.file), where)
    return lambda: content


def _cast(part: Tensor, dtype: torch.dtype | None, key: str, file: Path, first: int) -> Tensor:
    """Rows of a file in another precision. Refuses NaN and infinity, whether in the file or caused by the cast."""
    cast = part.to(dtype or part.dtype)
    if not _is_finite(cast):
        _require_finite(part, key, file, first)
        row, kind = first + _first_bad_row(cast), str(cast.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{kind} cannot hold the numbers in {key}, row {row}, of {file.name}",
            expected=f"numbers up to {torch.finfo(cast.dtype).max:.4g}, for --dtype {kind}",
            found=f"{float(part.abs().max()):.4g}",
            where=str(file),
            repair="--dtype bfloat16 or float32, or leave --dtype away; the file itself is sound",
        )
    return cast


def _is_finite(part: Tensor) -> bool:
    """Whether all numbers are finite. `aminmax` is NaN if any is, and several times faster than `isfinite`."""
    if not part.numel() or not part.is_floating_point():
        return True
    return all(math.isfinite(bound) for bound in torch.aminmax(part))


def _first_bad_row(part: Tensor) -> int:
    return int((~torch.isfinite(part.reshape(len(part) if part.ndim else 1, -1)).all(-1)).nonzero()[0])


def _require_finite(part: Tensor, key: str, file: Path, first: int) -> None:
    if _is_finite(part):
        return
    kind = "NaN" if bool(part.isnan().any()) else "infinity"
    raise CheckpointError(
        f"{file.name} holds {kind} in {key}, row {first + _first_bad_row(part)}",
        expected=f"finite numbers (in {str(part.dtype).removeprefix('torch.')})",
        found=kind,
        where=str(file),
        repair="download it again; if it is like that at its source, leave this layer out with layers=",
    )


def load_rows(where: TensorSource, rows: Sequence[int], dtype: torch.dtype | None = None) -> Tensor | None:
    """Single rows of a tensor, read without the others, in another precision if one is given. None where the file's
    layout does not allow it."""
    first = where.rows[0] if where.rows else 0
    if where.transposed:
        return None
    if where.file.suffix == ".safetensors":
        out = safetensors_rows(where.file, where.key[-1], [first + row for row in rows])
    elif where.file.suffix != ".npz" and maps_pt(where.file):
        out = _within(open_pt(where.file), where)[torch.tensor([first + row for row in rows], dtype=torch.long)]
    else:
        return None
    for row, part in zip(rows, out, strict=True):
        _cast(part[None], dtype, where.key[-1], where.file, first + row)
    return out.to(dtype or out.dtype)


def check_digest(source: LayerSource) -> None:
    """Compare a layer's file with the digest in its manifest, once until the file changes.

    Raises:
        CheckpointError: the file has another digest.
    """
    if source.sha256 is None:
        return
    file = source.files[0]
    state = file.stat()
    found = _digest(file, state.st_size, state.st_mtime_ns, state.st_ino)
    if found != source.sha256:
        raise CheckpointError(
            f"{file.name} is not the file its manifest describes",
            expected=f"sha256 {source.sha256}",
            found=found,
            where=str(file),
            repair="download or convert it again",
        )


def _check_sums(source: LayerSource) -> None:
    for file in source.files:
        if file.suffix == ".pt":
            state = file.stat()
            keys = tuple(where.key for where in source.tensors.values() if where.file == file)
            _summed(file, keys, state.st_size, state.st_mtime_ns, state.st_ino)


@lru_cache(maxsize=4096)
def _summed(file: Path, keys: tuple[tuple[str, ...], ...], size: int, mtime_ns: int, inode: int) -> None:
    check_pt_sums(file, keys)


@lru_cache(maxsize=4096)
def _digest(file: Path, size: int, mtime_ns: int, inode: int) -> str:
    """The digest of a file. It is computed again when size, time or inode have changed."""
    return sha256(file)
