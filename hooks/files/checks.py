"""Checks of a checkpoint file before its bytes become tensors: sizes, shapes and its directory.

Nothing here reads weights. The sizes that a file states are compared with the bytes that are there, so memory is
allocated only for data that exists. Refused are, for example, a header that states a terabyte, an archive that unpacks
to one, and a tensor of a million rows that all share the same four bytes.
"""

import io
import math
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from hooks.errors import CheckpointError, first_line
from hooks.files.documents import check_text, parse_json
from hooks.files.links import is_file

_HEADER_LIMIT = 16 << 20  # bytes of a safetensors header, or of the pickle in an archive; 1 kB is usual
_DIRECTORY_LIMIT = 1 << 20  # bytes of a zip archive's directory, some 10,000 members; a dozen is usual
_PICKLE_STEPS = 300_000  # opcodes of a pickle; each may make a container. A hundred per tensor is usual
_DEPTH = 32  # containers within containers
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "BOOL": 1, "C64": 8}
_BYTES |= {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C128": 16}
# what reading a damaged archive raises; an encrypted member is a RuntimeError
UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, struct.error)
FLOATS = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor as a safetensors header describes it; `dtype` is the format's own name for it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Archive:
    """The directory of a `.pt` file.

    Attributes:
        size: bytes of the file.
        storages: sizes of the storages that tensors may use; None: the layout of torch before 1.6.
    """

    size: int
    storages: frozenset[int] | None


def check_safetensors(path: Path) -> dict[str, HeaderEntry]:
    """Names, dtypes and shapes in a safetensors file, after its header was compared with the bytes of the file.

    Raises:
        CheckpointError: the header is longer than the file, is no JSON dict, or names a tensor twice; or the byte range
            of a tensor exceeds the file, overlaps another, or has another length than shape and dtype say.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if not 2 <= length <= min(size - 8, _HEADER_LIMIT):
                raise ValueError(f"{size:,} bytes, and a header that claims {length:,}")
            header = parse_json(file.read(length))
        return _entries_of(header, size - 8 - length)
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{path.name} is not a readable safetensors file",
            expected="a header, and behind it the bytes of every tensor it names",
            found=first_line(error),
            where=str(path),
            repair="download or convert it again",
        ) from None


def _entries_of(header: Any, available: int) -> dict[str, HeaderEntry]:
    if not isinstance(header, dict):
        raise ValueError(f"a header that is a {type(header).__name__}")
    out, places = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (start, end) = _entry(name, entry)
        claimed = math.prod(shape) * _BYTES[dtype]
        if claimed > available or not 0 <= start <= end <= available:
            raise ValueError(f"{name[:80]} claims {max(claimed, end):,} bytes, and there are {available:,}")
        if end - start != claimed:
            raise ValueError(f"{name[:80]} has {end - start:,} bytes for {dtype} {list(shape)}"[:160])
        out[name] = HeaderEntry(dtype, shape)
        places.append((start, end))
    behind = 0
    for start, end in sorted(places):
        if start != behind:
            raise ValueError("two tensors overlap" if start < behind else "bytes that belong to no tensor")
        behind = end
    if behind != available:
        raise ValueError(f"{available - behind:,} bytes behind the last tensor")
    return out


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    try:
        dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, *place]
        start, end = place
        if dtype in _BYTES and len(shape) <= 16 and all(type(number) is int and number >= 0 for number in numbers):
            return dtype, tuple(shape), (start, end)
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"{name[:80]} without a dtype, a shape and two offsets")


def check_archive(path: Path) -> Archive:
    """The directory of a `.pt` file: nothing compressed, encrypted, named twice, or larger than the file.

    Raises:
        CheckpointError: torch.save does not write such an archive, or it is damaged.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        size = path.stat().st_size
        if not zipped:
            _check_old_layout(path)
            return Archive(size, None)
        with open_zip(path) as archive:
            members = archive.infolist()
            broken = _fault(members, size) or _damaged_text(archive, members)
    except _Foreign as error:
        refuse_foreign(path, str(error))
    except UNREADABLE as error:
        raise _damaged(path, first_line(error)) from None
    if broken:
        raise _damaged(path, broken)
    return Archive(size, frozenset(member.file_size for member in members))


def _damaged(path: Path, found: str) -> CheckpointError:
    size = f"{path.stat().st_size:,} bytes; " if is_file(path) else "a link to nothing; " if path.is_symlink() else ""
    return CheckpointError(
        f"{path.name} is damaged or incomplete",
        expected="a file written by torch.save",
        found=size + found,
        where=str(path),
        repair="download it again",
    )


def _fault(members: list[zipfile.ZipInfo], size: int) -> str:
    names = [member.filename for member in members]
    for member in members:
        name = member.filename[:80]
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            return f"{name!r} is compressed, to {member.compress_size:,} of {member.file_size:,} bytes"
        if member.flag_bits & 1:
            return f"{name!r} is encrypted"
        if name.startswith(("/", "\\")) or ".." in Path(name).parts:
            return f"{name!r} leads out of the archive"
        if member.header_offset + member.file_size > size:
            return f"{name!r} claims {member.file_size:,} bytes"
    if len(set(names)) < len(names):
        return f"{next(name for name in names if names.count(name) > 1)[:80]!r} is there twice"
    return f"{len(names)} files that overlap" if sum(member.file_size for member in members) > size else ""


def _damaged_text(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> str:
    """What is wrong with a small member, such as the pickle; empty if their checksums fit. The checksums of tensors are
    compared when the tensors are read."""
    for member in members:
        if member.filename.split("/")[1:2] == ["data"]:
            continue
        if member.file_size > _HEADER_LIMIT:
            return f"{member.filename[:80]!r} of {member.file_size:,} bytes"
        if not member.CRC:  # torch can write archives without checksums; then there is nothing to compare
            del member.CRC
        raw = archive.read(member)  # raises if the checksum differs
        if member.filename.endswith("byteorder") and raw == b"big":
            return "numbers in big-endian order"
        if member.filename.endswith(".pkl"):
            _check_pickle(io.BytesIO(raw))
    return ""


class _Bounded(io.FileIO):
    """A file that refuses to read very much at once: zipfile reads a directory as long as the archive says it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        """At most `_DIRECTORY_LIMIT` bytes at once.

        Raises:
            ValueError: more are asked for.
        """
        if size is not None and size > _DIRECTORY_LIMIT:
            raise ValueError(f"a directory of {size:,} bytes")
        return super().read(-1 if size is None else size) or b""


def open_zip(path: Path) -> zipfile.ZipFile:
    """An archive, its directory read within bounds.

    Raises:
        ValueError: the directory is too large.
        OSError, zipfile.BadZipFile: the file cannot be read, or is no archive.
    """
    with _Bounded(path) as file:
        zipfile.ZipFile(file).close()
    return zipfile.ZipFile(path)


# Names in a pickle of tensors and plain containers. The unpickler allows some more, which can allocate memory.
_NAMED = re.compile(
    r"collections OrderedDict|builtins set|torch (Size|device|\w+Storage|[a-z]+\d*(_\w+)?)"
    r"|torch\.storage UntypedStorage|torch\._utils _rebuild_\w+"
    r"|torch\.nn\.parameter Parameter|torch\.serialization _get_layout"
)

_CALLS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}  # torch.save writes none of these


def _check_pickle(file: io.BytesIO | io.BufferedReader) -> None:
    """Read the opcodes of one pickle without building any object. The file's position is after the pickle then.

    Raises:
        ValueError: it is damaged, has too many steps, or names something that no set of tensors needs.
    """
    try:
        for count, (step, named, _) in enumerate(pickletools.genops(file)):
            if count > _PICKLE_STEPS:
                raise ValueError(f"a pickle of more than {_PICKLE_STEPS:,} steps")
            if step.name in _CALLS:
                raise _Foreign(f"a pickle with {step.name}")
            if step.name == "GLOBAL" and not _NAMED.fullmatch(str(named)):
                raise _Foreign(f"GLOBAL {str(named).replace(' ', '.')[:140]}")
    except (MemoryError, OverflowError):
        raise ValueError("a pickle that claims more bytes than there are") from None


def _check_old_layout(path: Path) -> None:
    """torch's layout before 1.6: a magic number, a version, facts about the machine, the object, and its storages."""
    with path.open("rb") as file:
        for _ in range(5):
            _check_pickle(file)


class _Foreign(ValueError):  # noqa: N818
    """A pickle that holds more than tensors and containers."""


def refuse_foreign(path: Path, found: str) -> NoReturn:
    """Refuse a pickle that holds more than tensors and containers.

    Raises:
        CheckpointError: always.
    """
    raise CheckpointError(
        f"{path.name} holds more than tensors and was not opened: unpickling it could run code",
        expected="tensors, numbers and texts in plain containers",
        where=str(path),
        found=found,
        repair="save it again as a plain dict of tensors, or use another source",
    ) from None


def plain(content: object, path: Path, archive: Archive) -> Any:
    """The same content in plain dicts, lists and detached tensors, every tensor within the bytes of its file.

    Content that was unpickled without running code may still be harmful: an ordered dict whose `get` was overwritten,
    a list that contains itself, a tensor of a trillion numbers that share one number's memory.

    Raises:
        CheckpointError: containers within themselves or nested too deeply, or a tensor that the file cannot hold.
    """
    try:
        return _plain(content, archive, {}, 0)
    except ValueError as error:
        raise CheckpointError(
            f"{path.name} holds something that is no ordinary tensor or container",
            expected=f"dense tensors within the {archive.size:,} bytes of the file, in plain containers",
            found=str(error),
            where=str(path),
            repair="save it again as a plain dict of tensors, or use another source",
        ) from None


_OPEN = object()


def _plain(part: object, archive: Archive, seen: dict[int, Any], depth: int) -> Any:
    if isinstance(part, Tensor):
        _check_tensor(part, archive)
        return Tensor.detach(part)
    if isinstance(part, str):
        check_text(part)
    if not isinstance(part, dict | list | tuple | set | frozenset):
        return part
    if id(part) in seen:
        if seen[id(part)] is _OPEN:
            raise ValueError("a container that holds itself")
        return seen[id(part)]
    if depth > _DEPTH:
        raise ValueError("containers nested too deeply")
    seen[id(part)] = _OPEN
    made: Any
    if isinstance(part, dict):
        for key in part:
            _plain(key, archive, seen, depth + 1)
        made = {key: _plain(value, archive, seen, depth + 1) for key, value in dict.items(part)}
    elif isinstance(part, set | frozenset):
        made = set(part)
    else:
        made = [_plain(value, archive, seen, depth + 1) for value in part]
        made = tuple(made) if isinstance(part, tuple) else made
    seen[id(part)] = made
    return made


def _check_tensor(tensor: Tensor, archive: Archive) -> None:
    shape = f"a tensor {tensor.dtype} {list(tensor.shape)}".replace("torch.", "")[:120]
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type != "cpu":
        raise ValueError(f"{shape}, not dense and on the CPU")
    if tensor.numel() * tensor.element_size() > archive.size:
        raise ValueError(f"{shape}, which claims {tensor.numel() * tensor.element_size():,} bytes")
    storage = tensor.untyped_storage().nbytes()
    if storage and archive.storages is not None and storage not in archive.storages:
        raise ValueError(f"{shape} in {storage:,} bytes that the archive does not have")


def check_sums(path: Path, sizes: Collection[int]) -> None:
    """Compare every member that has one of these sizes with its stored checksum, some bytes at a time.

    Raises:
        CheckpointError: a byte has changed. Archives without checksums pass.
    """
    if check_archive(path).storages is None:
        return
    try:
        with open_zip(path) as archive:
            for member in archive.infolist():
                if member.CRC and member.file_size in sizes:  # torch can write archives without checksums
                    with archive.open(member) as file:
                        while file.read(1 << 20):  # raises at the end if the checksum differs
                            pass
    except UNREADABLE as error:
        raise _damaged(path, first_line(error)) from None
