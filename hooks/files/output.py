"""How every file and folder is written: under a temporary name, then renamed. Pipes and devices are written to
directly.

The temporary file is in the same folder as its target, its name begins with `.qwen-circuits-`, and it is locked (flock)
while its writer runs. The kernel drops the lock when the process ends, for any reason. So the next process that writes
into the folder removes the temporary files that it can lock. A process number in the name would not be enough: another
machine or container that shares the folder uses the same numbers for other processes.

A link is followed and the file's mode is kept. A target that is no regular file (a pipe, a terminal, a device, an open
descriptor such as /dev/stdout) gets the bytes when they are complete, since a rename would replace it by a file.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hooks.errors import OutputError, first_line

PREFIX = ".qwen-circuits-"
_LONGEST_SUFFIX = 16
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary file that takes the place of `path` only if nothing was raised.

    Raises:
        OutputError: the folder cannot be made or written to, `path` is a folder, a block device or a socket, or the
            disk is full.
    """
    with _refused(path):
        target = _destination(path)
    if target is None:
        with _temporary_file(path, Path(tempfile.gettempdir()), 0o600) as temporary, _disk_errors(path):
            yield temporary
            _send(temporary, path)
        return
    with _refused(path):
        old = _existing(target)
        target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_file(path, target.parent, 0o666 if old is None else 0o600) as temporary, _disk_errors(path):
        yield temporary
        with _refused(path):
            if old is not None:
                _keep_owner_and_mode(temporary, old)
            temporary.replace(target)


@contextlib.contextmanager
def new_folder(path: Path, nbytes: int) -> Iterator[Path]:
    """Fill a temporary folder beside `path`, and rename it to `path` only if nothing was raised.

    Args:
        path: must not exist yet, or be an empty folder.
        nbytes: about how many bytes will be written.

    Raises:
        OutputError: `path` exists, cannot be made, or its disk has too little free space.
    """
    with _refused(path):
        target = Path(os.path.realpath(path))
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise OutputError(
                f"{path} exists", expected="a new folder, or an empty one", repair="choose another, or remove it"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        temporary, lock = _locked(target.parent, "", None)
    try:
        if free < nbytes:
            found = f"{free / 1e9:.1f} GB"
            raise OutputError(f"{path} would not fit on its disk", expected=f"{nbytes / 1e9:.1f} GB free", found=found)
        with _disk_errors(path):
            yield temporary
            with _refused(path):
                if target.exists():
                    temporary.chmod(stat.S_IMODE(target.stat().st_mode))
                temporary.replace(target)  # the target is an empty folder, or does not exist
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def check_writable(path: Path) -> None:
    """Fail now, not after minutes of work, if `path` cannot be written. No file and no folder is left behind.

    Raises:
        OutputError: see `replacing`.
    """
    with _refused(path):
        target = _destination(path)
        if target is None:
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        _existing(target)
        made = [folder for folder in target.parents if not folder.exists()]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _temporary_file(path, target.parent, 0o600):
                pass
        finally:
            for folder in made:  # innermost first
                with contextlib.suppress(OSError):
                    folder.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


# -- the file that a path means ----------------------------------------------------------------------------------------


def _destination(path: Path) -> Path | None:
    """The file that `path` means once all links are followed; None where it is no file and bytes are sent to it."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, f"{path} is a folder")
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode) or _descriptor(path) is not None:
        return None
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a block device or a socket, not a file or a stream")
    return Path(os.path.realpath(path))


def _descriptor(path: Path) -> str | None:
    """The descriptor's own name if `path` links to one, as /dev/stdout does; then the open file is meant."""
    name = os.path.abspath(path)
    while os.path.islink(name):
        folder, last = os.path.realpath(os.path.dirname(name)), os.path.basename(name)
        if re.fullmatch(r"/proc/(\d+|self)(/task/\d+)?/fd", folder):
            return f"{folder}/{last}"
        name = os.path.join(folder, os.readlink(name))
    return None


def _send(made: Path, path: Path) -> None:
    """Copy a complete file into an open descriptor, at its current offset, or into a pipe or device."""
    name = _descriptor(path)
    own = name is not None and name.startswith(f"/proc/{os.getpid()}/")
    sink = os.dup(int(Path(str(name)).name)) if own else os.open(path, os.O_WRONLY | os.O_APPEND)
    with made.open("rb") as source, open(sink, "wb") as out:
        shutil.copyfileobj(source, out)


def _existing(target: Path) -> os.stat_result | None:
    """The status of the existing file; None if there is none. A read-only file is not replaced."""
    try:
        old = target.stat()
    except FileNotFoundError:
        return None
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, f"{os.strerror(errno.EACCES)}: the file is read-only")
    return old


def _keep_owner_and_mode(temporary: Path, old: os.stat_result) -> None:
    new = temporary.stat()
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        with contextlib.suppress(PermissionError):
            os.chown(temporary, old.st_uid, old.st_gid)
    temporary.chmod(stat.S_IMODE(old.st_mode))  # last: a change of owner clears bits of the mode


# -- temporary names ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _temporary_file(path: Path, folder: Path, mode: int) -> Iterator[Path]:
    suffix = (
        path.suffix if len(os.fsencode(path.suffix)) <= _LONGEST_SUFFIX else ""
    )  # libraries choose the format by it
    with _refused(path):
        temporary, lock = _locked(folder, suffix, mode)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)


def _locked(folder: Path, suffix: str, mode: int | None) -> tuple[Path, int]:
    """A new file of that mode, or a new folder (None), and the descriptor that holds its lock."""
    remove_stale(folder)
    while True:
        temporary = folder / f"{PREFIX}{secrets.token_hex(6)}{suffix}"
        if mode is None:
            temporary.mkdir()
        try:
            lock = os.open(temporary, os.O_RDONLY if mode is None else os.O_RDWR | os.O_CREAT | os.O_EXCL, mode or 0)
            with contextlib.suppress(OSError):  # a file system without locks: files of killed runs are not removed
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(lock), temporary.stat()):
                return temporary, lock
        except FileNotFoundError:  # another run removed it as stale before it was locked
            if not folder.is_dir():
                raise


def remove_stale(folder: Path) -> None:
    """Remove the temporary files and folders that killed runs have left in a folder."""
    with os.scandir(folder) as entries:
        names = [entry.path for entry in entries if entry.name.startswith(PREFIX)]
    for name in names:
        with contextlib.suppress(OSError):  # it was removed meanwhile, is in use, or belongs to another user
            lock = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.isdir(name):
                    shutil.rmtree(name)
                else:
                    os.unlink(name)
            finally:
                os.close(lock)


# -- errors ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into an `OutputError`."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise OutputError(
            "cannot write a file of this name", found=ascii(str(path))[:200], repair=error.reason
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, OutputError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OutputError(
            f"cannot write {shortened(path)}",
            found=f"{type(error).__name__}: {reason}",
            repair="choose a folder you may write to, with --out",
        ) from None


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn the error of a full or failing disk into an `OutputError`; any other error passes unchanged."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in _DISK:
            raise
        raise OutputError(
            f"{path} could not be written to its end",
            expected="a disk with room for it",
            found=first_line(error),
            where=str(path.parent),
            repair="make room, or choose another disk; what was there before is unchanged",
        ) from None


def shortened(path: Path, most: int = 200) -> str:
    """A path for a message; a name of thousands of characters is shortened."""
    text = str(path)
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 4 :]}"
