"""Checks of output paths: none is also an input, none is given twice, and none is an existing file of another kind."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from hooks.errors import OutputError
from hooks.files import check_writable

SIGNS = {  # bytes that are among the first ones of a file of this kind
    "graph": b"qwen-circuits-graph",
    "png": b"\x89PNG\r\n",
    "svg": b"<svg",
    "json": b'"directed"',
    "graphml": b"graphdrawing.org",
    "gexf": b"<gexf",
    "dot": b"digraph",
    "parquet": b"PAR1",
    "table": b"resolved",
    "quality": b"delta_ce",
    "report": b"# What the embedded model does",
}
_HEAD = 1 << 16


def check_places(force: bool, places: Sequence[tuple[Path | None, str]], reads: Sequence[Path | None] = ()) -> None:
    """Refuse places that cannot be written, and those where something would be lost.

    Args:
        force: overwrite what is of another kind.
        places: files to write (None for those that are not wanted) and their kinds: keys of `SIGNS`, or `picture` and
            `table`, whose kind is chosen by the suffix.
        reads: files that the command reads.

    Raises:
        OutputError: naming the file.
    """
    wanted = [(path, kind) for path, kind in places if path is not None]
    for path, _ in wanted:
        check_writable(path)
    for i, (path, kind) in enumerate(wanted):
        if any(read is not None and _same(path, read) for read in reads):
            raise OutputError(f"{path} is what the command reads", expected="another file to write to")
        if any(_same(path, other) for other, _ in wanted[:i]):
            raise OutputError(f"{path} is named twice", expected="a file for each of the results")
        if not force and _is_other(path, SIGNS.get(_by_suffix(path, kind), b"")):
            raise OutputError(
                f"{path} exists, and holds something else than what would be written",
                expected=f"a new file, or one that an earlier run has written ({kind})",
                repair="--force overwrites it; or choose another name",
            )


def _by_suffix(path: Path, kind: str) -> str:
    suffix = path.suffix.lower().removeprefix(".")
    drawn = kind in ("picture", "scatter")
    return suffix if drawn or suffix == "parquet" else kind


def _is_other(path: Path, sign: bytes) -> bool:
    """Whether a file with something in it lacks the sign of its kind."""
    try:
        held = path.stat()
        if not stat.S_ISREG(held.st_mode) or not held.st_size:
            return False
        with path.open("rb") as file:
            return not sign or sign not in file.read(_HEAD)
    except FileNotFoundError:
        return False


def _same(one: Path, other: Path) -> bool:
    """Whether two names lead to one regular file, there already or not yet."""
    first, second = os.path.realpath(one), os.path.realpath(other)
    if os.path.exists(first) and os.path.exists(second):
        return os.path.isfile(first) and os.path.samefile(first, second)
    return first == second
