"""The only file that opens weight files, and the way every file is written: a temporary name, then a rename.

`.pt` files are unpickled with `weights_only=True` and memory-mapped, so nothing in them is executed and unused
tensors (some published files carry a 240 MB table nobody needs) are never read.
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooks.errors import CheckpointError, OutputError, first_line


def open_pt(path: Path) -> Any:
    """The object in a `.pt` file, tensors memory-mapped.

    Raises:
        CheckpointError: the file is damaged, or holds anything but tensors and plain containers.
    """
    try:
        return _load_pt(path)
    except Exception as error:  # torch.load raises whatever its parser stumbles over
        # operand 149 opens a pickle of protocol 4 or later, which torch.save does not write
        unsafe = re.search(r"Unsupported (global|class)[^.\n]*|GLOBAL \S+|Unsupported operand 149", str(error))
        if isinstance(error, pickle.UnpicklingError) and unsafe:
            raise CheckpointError(
                f"{path.name} holds more than tensors and was not opened: unpickling it could run code",
                where=str(path),
                found=unsafe[0][:160],
                repair="save it again as a plain dict of tensors, or use another source",
            ) from None
        raise CheckpointError(
            f"{path.name} is damaged or incomplete",
            expected="a file written by torch.save",
            found=f"{path.stat().st_size:,} bytes; {first_line(error)}" if path.is_file() else "a link to nothing",
            where=str(path),
            repair="download it again",
        ) from None


def _load_pt(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        with warnings.catch_warnings():  # of a pickle protocol that torch.save never writes; refused right after
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)  # the legacy layout cannot be mapped


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header alone.

    Raises:
        CheckpointError: the file is damaged.
    """
    with _opened(path) as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def safetensors_load(path: Path, key: str) -> Tensor:
    """One tensor of a safetensors file."""
    with _opened(path) as file:
        return file.get_tensor(key)


def safetensors_rows(path: Path, key: str, rows: list[int]) -> Tensor:
    """Single rows of one matrix, without reading the rest."""
    with _opened(path) as file:
        matrix = file.get_slice(key)
        return torch.cat([matrix[row : row + 1] for row in rows])


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The text metadata in a safetensors header."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name} is not a readable safetensors file",
            where=str(path),
            found=first_line(error),
            repair="download or convert it again",
        ) from None


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary sibling, and rename it to `path` only if nothing was raised.

    Raises:
        OutputError: the folder cannot be made or written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}",
            found=f"{type(error).__name__}: {error.strerror or error}",
            repair="choose a folder you may write to, with --out",
        ) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Fail now, not after minutes of work, if `path` cannot be written. Leaves no trace, folders included.

    Raises:
        OutputError: the folder cannot be made or written to, or `path` is a folder.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        with contextlib.suppress(_Probe), replacing(path):
            raise _Probe
    finally:
        for folder in made:  # innermost first
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def new_folder(path: Path, nbytes: int) -> Iterator[Path]:
    """Fill a temporary folder beside `path`, and rename it to `path` only if nothing was raised.

    Args:
        path: what does not exist yet, or is an empty folder.
        nbytes: about what will be written.

    Raises:
        OutputError: `path` exists, cannot be made, or its disk has too little room.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(
            f"{path} exists", expected="a new folder, or an empty one", repair="choose another, or remove it"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    except OSError as error:
        raise OutputError(f"cannot write {path}", found=f"{type(error).__name__}: {error.strerror or error}") from None
    try:
        if free < nbytes:
            found = f"{free / 1e9:.1f} GB"
            raise OutputError(f"{path} would not fit on its disk", expected=f"{nbytes / 1e9:.1f} GB free", found=found)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        temporary.replace(path)  # over an empty folder, or where nothing is
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Probe(Exception):  # noqa: N818
    """Ends the trial write of `check_writable` before the rename."""


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all. One metadata key at most keeps the bytes reproducible."""
    assert metadata is None or len(metadata) <= 1, "safetensors orders several metadata keys at random"
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
