"""The only file that opens weight files.

`.pt` files are unpickled with `weights_only=True` and memory-mapped, so nothing in them is executed and unused
tensors (some published files carry a 240 MB table nobody needs) are never read.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooks.errors import CheckpointError, first_line, memory_ran_out
from hooks.files.checks import UNREADABLE, check_archive, check_safetensors, check_sums, open_zip, plain, refuse_foreign
from hooks.files.links import is_file
from hooks.files.output import replacing

# operand 149 opens a pickle of protocol 4 or later, which torch.save does not write
_UNSAFE = re.compile(
    r"Unsupported (global|class)[^.\n]*|GLOBAL \S+|Unsupported operand 149|TorchScript archive|legacy .tar format"
)


def open_pt(path: Path) -> Any:
    """The object in a `.pt` file, in plain containers, tensors memory-mapped.

    Raises:
        CheckpointError: the file is damaged, claims more than it holds, or holds anything but tensors and containers.
    """
    archive = check_archive(path)
    return plain(_unpickled(path), path, archive)


def check_pt_sums(path: Path, keys: Sequence[tuple[str, ...]]) -> None:
    """Compare the storages of the named tensors of a `.pt` file with its checksums. The file is read, not mapped.

    Raises:
        CheckpointError: see `open_pt`; or a byte has changed.
    """
    content, sizes = open_pt(path), set()
    for key in keys:
        part = content
        for name in key:
            part = part[name]
        sizes.add(part.untyped_storage().nbytes())
    check_sums(path, sizes)


def _unpickled(path: Path) -> Any:
    try:
        return _load_pt(path)
    except Exception as error:  # torch.load raises many kinds of errors for damaged files
        unsafe = _UNSAFE.search(str(error))
        if unsafe:
            refuse_foreign(path, unsafe[0][:160])
        if memory_ran_out(error):
            _refuse_size(path)
        raise CheckpointError(
            f"{path.name} is damaged or incomplete",
            expected="a file written by torch.save",
            found=f"{path.stat().st_size:,} bytes; {first_line(error)}" if is_file(path) else "a link to nothing",
            where=str(path),
            repair="download it again",
        ) from None


def _refuse_size(path: Path) -> NoReturn:
    """Raise the error for a file that there is no memory for, or no address space to map it."""
    raise CheckpointError(
        f"memory ran out while {path.name} was read",
        expected=f"room for {path.stat().st_size:,} bytes",
        found="an allocation that the system refused",
        where=str(path),
        repair="close other programs, lower --budget-gb, or raise the limit on address space (ulimit -v)",
    ) from None


def _load_pt(path: Path) -> Any:
    with warnings.catch_warnings():  # about content that torch.save never writes; such a file is refused below
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error) or memory_ran_out(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # the legacy layout cannot be mapped


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header alone.

    Raises:
        CheckpointError: the file is damaged.
    """
    return {key: stored.shape for key, stored in check_safetensors(path).items()}


def safetensors_load(path: Path, key: str) -> Tensor:
    """One tensor of a safetensors file."""
    with _opened(path) as file:
        return file.get_tensor(key)


def safetensors_rows(path: Path, key: str, rows: list[int]) -> Tensor:
    """Single rows of one matrix. Nothing else is read. The file is not mapped, since that would read whole pages."""
    dtype, shape, begin = _stored_at(path, key)
    out = torch.empty((len(rows), *shape[1:]), dtype=dtype)
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for row, place in zip(rows, out, strict=True):
            file.seek(begin + row * place.nbytes)
            _fill(place, file, path)
    return out


def safetensors_parts(path: Path, key: str, first: int, last: int, count: int) -> Iterator[Tensor]:
    """Rows `first .. last - 1` of one tensor, `count` at a time; each part is overwritten by the next one."""
    dtype, shape, begin = _stored_at(path, key)
    buffer = torch.empty((min(count, last - first), *shape[1:]), dtype=dtype)
    with path.open("rb", buffering=0) as file:
        file.seek(begin + first * (buffer[:1].nbytes if len(buffer) else 0))
        for start in range(first, last, count):
            part = buffer[: min(count, last - start)]
            _fill(part, file, path)
            yield part


def safetensors_dtypes(path: Path) -> dict[str, torch.dtype]:
    """The dtype of each tensor in a safetensors file, from its header alone."""
    return {key: _DTYPES.get(entry["dtype"], torch.uint8) for key, entry in _header(path)[0].items()}


_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool},
}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of a header that the safetensors library has accepted, and the offset of the first tensor's bytes."""
    with _opened(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        return entries, 8 + length


def _stored_at(path: Path, key: str) -> tuple[torch.dtype, tuple[int, ...], int]:
    entries, begin = _header(path)
    if key not in entries or entries[key]["dtype"] not in _DTYPES:
        raise CheckpointError(
            f"{path.name} is not a readable safetensors file",
            expected=f"the tensor {key} in one of {', '.join(_DTYPES)}",
            found=str(entries.get(key, {}).get("dtype", ", ".join(entries))),
            where=str(path),
            repair="download or convert it again",
        )
    entry = entries[key]
    return _DTYPES[entry["dtype"]], tuple(entry["shape"]), begin + entry["data_offsets"][0]


def _fill(place: Tensor, file: io.FileIO, path: Path) -> None:
    """Read as many bytes as a tensor takes, directly into its memory."""
    buffer = memoryview(place.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    while len(buffer):
        count = file.readinto(buffer)
        if not count:
            raise CheckpointError(
                f"{path.name} is not a readable safetensors file",
                found="it became shorter while it was read",
                where=str(path),
                repair="download or convert it again",
            )
        buffer = buffer[count:]


def maps_pt(path: Path) -> bool:
    """Whether `open_pt` maps the file; one in torch's old layout is read whole instead."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The text metadata in a safetensors header."""
    with _opened(path) as file:
        return file.metadata() or {}


def safetensors_header(path: Path, most: int) -> bytes:
    """The bytes of a header, not parsed. The caller says how many bytes it accepts.

    Raises:
        CheckpointError: the header's stated length exceeds the file, or `most` bytes.
    """
    with path.open("rb") as file:
        first = file.read(8)
        length, size = int.from_bytes(first, "little"), path.stat().st_size
        if len(first) == 8 and length <= min(size - 8, most):
            return file.read(length)
    raise CheckpointError(
        f"{path.name} is not a readable safetensors file",
        expected=f"a header of at most {most:,} bytes, and behind it the bytes of every tensor it names",
        found=f"{size:,} bytes, and a header that claims {length:,}",
        where=str(path),
        repair="download or convert it again",
    )


def safetensors_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a small safetensors file, read, not mapped."""
    with _opened(path) as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, MemoryError, RuntimeError) as error:
        if memory_ran_out(error):
            _refuse_size(path)
        if isinstance(error, RuntimeError):
            raise
        raise CheckpointError(
            f"{path.name} is not a readable safetensors file",
            expected="a header, and behind it the bytes of every tensor it names",
            where=str(path),
            found=first_line(error),
            repair="download or convert it again",
        ) from None


_NPZ_MOST = 4  # unpacked bytes per byte of the archive, at most; float32 weights with bf16 values pack to about half


def npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays in an `.npz` file, from their headers alone.

    Raises:
        CheckpointError: the archive is damaged, states far more bytes than it holds, or has members that are no float
            arrays.
    """
    with _npz(path) as archive:
        return {info.filename.removesuffix(".npy"): _npy_shape(archive, info) for info in _members(path, archive)}


def npz_dtypes(path: Path) -> dict[str, torch.dtype]:
    """The dtype of each array in an `.npz` file, from their headers alone."""
    out = {}
    with _npz(path) as archive:
        for info in _members(path, archive):
            _npy_shape(archive, info)  # refuses anything but float arrays
            with archive.open(info) as file:
                newer = np.lib.format.read_magic(file) != (1, 0)
                _, _, dtype = (np.lib.format.read_array_header_2_0 if newer else np.lib.format.read_array_header_1_0)(
                    file
                )
            out[info.filename.removesuffix(".npy")] = torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype
    return out


def npz_load(path: Path, key: str) -> Tensor:
    """One array of an `.npz` file; checked as in `npz_shapes`, and never unpickled."""
    with _npz(path) as archive:
        info = next(info for info in _members(path, archive) if info.filename == f"{key}.npy")
        _npy_shape(archive, info)
        with archive.open(info) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
        return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))


@contextlib.contextmanager
def _npz(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with open_zip(path) as archive:
            yield archive
    except (*UNREADABLE, MemoryError) as error:
        if isinstance(error, CheckpointError):
            raise
        if memory_ran_out(error):
            _refuse_size(path)
        raise CheckpointError(
            f"{path.name} is not a readable npz file",
            expected="an archive of plain float arrays, as numpy.savez writes it",
            found=first_line(error),
            where=str(path),
            repair="download it again",
        ) from None


def _members(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    infos = archive.infolist()
    names = [info.filename for info in infos]
    if strange := [name for name in names if not re.fullmatch(r"\w+\.npy", name) or names.count(name) > 1]:
        raise ValueError(f"the member {strange[0][:80]!r}")
    claimed, held = sum(info.file_size for info in infos), path.stat().st_size
    if claimed > _NPZ_MOST * held:
        raise ValueError(f"{claimed:,} bytes of arrays in an archive of {held:,} bytes")
    return infos


def _npy_shape(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[int, ...]:
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{info.filename}: npy version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        size = file.tell() + math.prod(shape) * dtype.itemsize
    if dtype.kind != "f" or dtype.itemsize > 8 or min(shape, default=0) < 0:
        raise ValueError(f"{info.filename}: an array of {dtype} {shape}")
    if size != info.file_size:
        raise ValueError(f"{info.filename}: {info.file_size:,} bytes, and its header says {size:,}")
    return tuple(shape)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all. One metadata key at most keeps the bytes reproducible."""
    assert metadata is None or len(metadata) <= 1, "safetensors orders several metadata keys at random"
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
