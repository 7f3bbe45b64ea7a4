"""The command line: parses, runs one subcommand, prints its result under `--json`.

Exit status 0: done; 2: the input was wrong, or a file could not be read or written (a message without a traceback);
130: interrupted; 141: the reader of the output closed it; 1: an error in this project.
"""

import argparse
import contextlib
import errno
import importlib
import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from circuits.options import build_parser
from hooks.errors import PictureError, UserError, first_line, printable

INTERRUPTED, READER_GONE = 130, 141  # the statuses that a shell shows for commands ended by INT and PIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    _open_streams()
    try:
        with _flushed():
            return _answer(argv)
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        return READER_GONE
    except UserError as error:
        _complain(f"error: {error}")
    except OSError as error:  # from a file, a disk or memory: no error in this project, so it is shown in one line
        where = error.filename or ("the output" if error.errno == errno.ENOSPC else type(error).__name__)
        _complain(f"error: {printable(str(where)[:200])}: {error.strerror or first_line(error)}")
    return 2


def _answer(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)
    logging.basicConfig(format="circuits: %(message)s", stream=sys.stderr, level=logging.WARNING)
    try:
        with _no_backend():
            result = run(args)
    except PictureError as error:
        _print_result(args, error.result)
        raise
    _print_result(args, result)
    return 0


def _print_result(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if args.json:
        plain = (sys.stdout.encoding or "").lower() not in ("utf-8", "utf8")
        print(json.dumps(result, ensure_ascii=plain, allow_nan=False))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Import the chosen command's module, which takes seconds, and run it. Returns the result that `--json` prints."""
    return importlib.import_module(f"circuits.commands.{args.command}").run(args)


# -- the process around it ---------------------------------------------------------------------------------------------


def _open_streams() -> None:
    """Make sure that stdout and stderr exist and accept any text: a terminal may support only ASCII, and a token may be
    half a character.

    A closed descriptor is opened to the null device. Otherwise the next file could get its number, and messages for
    stderr would be written into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _flushed() -> Iterator[None]:
    """Flush the streams at the end of the block. At exit Python would report a full disk or a closed pipe its own
    way."""
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                _mute(stream)
                raise


@contextlib.contextmanager
def _no_backend() -> Iterator[None]:
    """Choose matplotlib's file backend: a window backend that is set but not installed would stop its import."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def _complain(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _mute(sys.stderr)


def _mute(stream: TextIO) -> None:
    """Discard the buffered text of a stream that cannot be written."""
    with contextlib.suppress(OSError, io.UnsupportedOperation):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


if __name__ == "__main__":
    sys.exit(main())
