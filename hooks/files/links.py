"""The real files of a folder: links are followed within the folder, or within its hub repository's cache.

A folder of the hub's cache consists of links, `models--org--name/snapshots/<commit>/file -> ../../blobs/<digest>`. They
are followed if they end inside `models--org--name`. Every other link out of the folder is refused before a format
opens it: a downloaded set must not be able to read the user's own files.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hooks.errors import CheckpointError

_DEPTH = 4  # folders below the given one: `layer_3/width_16k/average_l0_71/params.npz` is the deepest layout known
_ENTRIES = 100_000
_TOOLS = {".git", ".cache"}  # folders in which git and the hub client keep their own files; no format reads them
_REPOSITORY = re.compile(r"models--(?P<name>[^/]+)")


@dataclass(frozen=True)
class Snapshot:
    """One commit of a hub repository, as the hub's cache holds it. `folder` is `models--org--name`."""

    repo: str
    commit: str
    folder: Path


def is_file(path: str | Path) -> bool:
    """Whether an ordinary file is there. False, too, where permission is missing and for names that no disk accepts.

    `Path.is_file` raises in those two cases.
    """
    return os.path.isfile(path)


def is_folder(path: str | Path) -> bool:
    """Whether a folder is there; otherwise as `is_file`."""
    return os.path.isdir(path)


def is_there(path: str | Path) -> bool:
    """Whether anything is there, a broken link included; otherwise as `is_file`."""
    return os.path.lexists(path)


_DEVICE = "a device, a pipe or a socket"


def what_is(path: str | Path) -> str:
    """`a file`, `a folder`, `a device, …` or `nothing`; where permission is missing, the system's message."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
    except OSError as error:
        return error.strerror or type(error).__name__
    except ValueError as error:  # a zero byte in the name
        return str(error)
    return "a file" if is_file(path) else "a folder" if is_folder(path) else _DEVICE


def hub_snapshot(root: Path) -> Snapshot | None:
    """The commit of the hub repository that a folder belongs to; None for any other folder."""
    try:
        real = root.resolve()
    except (OSError, ValueError, RuntimeError):  # it cannot be a file's name
        return None
    for folder in (real, *real.parents):
        repository = folder.parent.parent
        match = _REPOSITORY.fullmatch(repository.name)
        if match and folder.parent.name == "snapshots":
            return Snapshot(match["name"].replace("--", "/", 1), folder.name, repository)
    return None


def check_links(root: Path) -> None:
    """Check every entry of a folder and of its subfolders before any is opened.

    Raises:
        CheckpointError: an entry leads out of the folder, or is neither a file nor a folder; or there are too many.
    """
    allowed = _allowed(root)
    for count, entry in enumerate(_entries(root, _DEPTH)):
        if count == _ENTRIES:
            raise CheckpointError(
                f"{root} has more than {_ENTRIES:,} entries",
                expected="the folder of one set",
                found=f"at least {_ENTRIES + 1:,} files and folders",
                where=str(root),
                repair="name the folder that the files are in",
            )
        if entry.is_symlink() or not (is_file(entry.path) or is_folder(entry.path)):
            _check(Path(entry.path), root, allowed)


def found(root: Path, patterns: Iterable[str]) -> list[Path]:
    """The files of a folder that match, sorted; only those that `check_links` has checked."""
    files = {path for pattern in patterns for path in root.glob(pattern)}
    return sorted(path for path in files if _TOOLS.isdisjoint(path.relative_to(root).parts))


def check_file(path: Path, root: Path) -> None:
    """The same for one file that a format names.

    Raises:
        CheckpointError: it is outside the folder, is a link out of it, or is no ordinary file.
    """
    _check(path, root, _allowed(root))


def _allowed(root: Path) -> Path:
    snapshot = hub_snapshot(root)
    return snapshot.folder if snapshot else root.resolve()


def _entries(folder: str | Path, depth: int) -> Iterator[os.DirEntry[str]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        if depth < _DEPTH:  # no format opens files below that depth
            return
        raise CheckpointError(
            f"cannot look into {folder}",
            expected="a folder that may be read",
            found=error.strerror or type(error).__name__,
            where=str(folder),
            repair="give yourself permission to read it",
        ) from None
    for entry in entries:
        yield entry
        if depth and entry.name not in _TOOLS and is_folder(entry.path):  # a link too: it has been checked above
            yield from _entries(entry.path, depth - 1)


def _check(path: Path, root: Path, allowed: Path) -> None:
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        real = path.parent.resolve() / os.readlink(path) if path.is_symlink() else path
    if not real.is_relative_to(allowed):
        raise CheckpointError(
            f"{path.name} leads out of its folder",
            expected=f"a file inside {allowed}",
            found=f"{path} -> {real}",
            where=str(root),
            repair="open the folder that the files are in, or copy them into this one",
        )
    what = what_is(real)
    if what == _DEVICE:
        raise CheckpointError(
            f"{path.name} is no ordinary file",
            expected="a file or a folder",
            found=_DEVICE,
            where=str(path),
            repair="take it out of the folder",
        )
    if what not in ("a file", "a folder", "nothing"):
        raise CheckpointError(
            f"cannot look at {path.name}",
            expected="a file or a folder that may be read",
            found=what,
            where=str(path),
            repair="give yourself permission to read it, or take it out of the folder",
        )
