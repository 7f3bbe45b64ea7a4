"""Printing, and numbers and tables as text."""

import argparse
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from hooks.errors import PictureError, UserError, first_line, printable
from hooks.readout import RankedToken
from hooks.types import FeatureAddress

Result = dict[str, Any]


def finish(result: Result, path: Path | None, draw: Callable[[Path], None]) -> Result:
    """Draw the picture, if one is wanted, and return the result. The picture is drawn last, so that nothing else is
    lost if it fails.

    Raises:
        PictureError: the picture could not be drawn.
    """
    if path is not None:
        try:
            draw(path)
        except Exception as error:  # matplotlib raises many kinds
            found = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
            raise PictureError(
                f"the picture {path} could not be drawn; everything else is done", result, found=found
            ) from error
    return result


def say(text: str) -> None:
    """A line of progress on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def say_inactive(addresses: Sequence[FeatureAddress]) -> list[str]:
    """The texts of features that the prompt does not activate; if there are any, they are printed to stderr."""
    names = [str(address) for address in addresses]
    if names:
        be = "is" if len(names) == 1 else "are"
        say(f"circuits: {', '.join(names)} {be} inactive on this prompt: at the tokens named, the activation is 0")
    return names


def show(args: argparse.Namespace, text: str, end: str = "\n") -> None:
    """Print the result as text and flush, also in the middle of a line; print nothing under `--json`.

    Tokens and prompts are foreign text: characters that act on the terminal are escaped. JSON has its own escapes.
    """
    if not args.json:
        print(printable(text), end=end, flush=not end)


def table(frame: pd.DataFrame) -> str:
    """A table as text."""
    texts = frame.select_dtypes(["object", "string"]).columns
    frame = frame.assign(**{name: [_cell(item) for item in frame[name]] for name in texts})
    return frame.to_string(index=False, float_format=lambda value: f"{value:.4g}")


def _cell(item: object) -> object:
    """A cell with its text escaped, before the widths of columns are computed."""
    return printable(item) if isinstance(item, str) else item


def ranked(tokens: list[RankedToken]) -> str:
    """Tokens with their probabilities, on one line."""
    return ", ".join(f"{item.token!r} {item.prob:.3f}" for item in tokens)


def standing_line(name: str, standing: Any, metric: float) -> str:
    """One row of a before-and-after table."""
    return f"{name:<13} {standing.logit:9.3f} {standing.prob:8.4f} {standing.rank:6d} {metric:14.3f}"


def figure(value: float | None) -> str:
    """Three digits, or the word undefined."""
    return "undefined" if value is None else f"{value:.3f}"


def peak_bytes() -> int:
    """The largest memory use of this process; on the device, if there is one."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
