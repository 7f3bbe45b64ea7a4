"""Tools for drawing: checks of suffixes, a figure that is written whole, plain labels."""

import contextlib
import importlib.util
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from hooks.errors import OutputError
from hooks.files import check_writable, replacing

SUFFIXES = (".png", ".svg")


def check_suffix(path: Path) -> None:
    """Refuse a suffix that is no picture format, before anything is computed.

    Raises:
        OutputError: the suffix is neither .png nor .svg.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(f"unknown picture format {path.suffix!r}", expected=" or ".join(SUFFIXES), where=str(path))


def check_drawing(path: Path) -> None:
    """Refuse a picture that cannot be drawn or written, before minutes of work.

    Raises:
        OutputError: the suffix is unknown, matplotlib is missing, or the folder cannot be written to.
    """
    check_suffix(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise OutputError("pictures need matplotlib", repair="pip install 'qwen-circuits[plot]'")
    check_writable(path)


PLAIN: Any = {  # a fixed salt and no date make an svg reproducible; a text with dollar signs is text, not TeX
    "svg.hashsalt": "qwen-circuits",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "text.parse_math": False,
    "text.usetex": False,
}
MOST_DOTS, WIDEST, COARSEST = 1 << 24, 1 << 16, 60  # dots of a PNG (four bytes each), along a side, and per inch


@contextlib.contextmanager
def picture(
    path: Path,
    size: tuple[float, float],
    layout: Literal["constrained"] | None = None,
    *,
    kind: str | None = None,
    dpi: int = 160,
) -> Iterator[Any]:
    """A figure to draw in, written whole or not at all. All pictures use this.

    It draws with Agg and changes no global state; the same drawing gives the same bytes. No text is read as TeX, and a
    sign that the font lacks is drawn as a box. Foreign text must be cleaned by `circuits.shown.drawn`.

    Args:
        kind: png or svg; None: by the path's suffix.

    Raises:
        OutputError: the suffix is another one, matplotlib is not installed, the picture is too large for a PNG, or the
            file cannot be written.
    """
    if kind is None:
        check_suffix(path)
        kind = path.suffix.lower()[1:]
    fitting = dpi if kind == "svg" else min(dpi, _dots_per_inch(size))
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise OutputError("pictures need matplotlib", repair="pip install 'qwen-circuits[plot]'") from None
    with matplotlib.rc_context(PLAIN), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from", UserWarning)
        figure = Figure(figsize=size, dpi=fitting, layout=layout)
        yield figure
        with replacing(path) as temporary:
            figure.savefig(temporary, format=kind, metadata={"Date": None} if kind == "svg" else None)


def _dots_per_inch(size: tuple[float, float]) -> int:
    """The resolution at which a PNG of so many inches can be drawn."""
    most = min(math.sqrt(MOST_DOTS / (size[0] * size[1])), (WIDEST - 1) / max(size))
    if most < COARSEST:
        raise OutputError(
            f"a picture of {size[0]:,.0f} by {size[1]:,.0f} inches is too large for a PNG",
            expected=f"at most {MOST_DOTS:,} dots, {COARSEST} to the inch",
            repair="write an svg, or draw less",
        )
    return int(most)


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def plain_decades(*scales: Any) -> None:
    """Label the decades of logarithmic axes as 10⁻² in plain text; matplotlib's own labels are TeX."""

    def label(value: float, _: int) -> str:
        power = round(math.log10(abs(value))) if value else 0
        return "0" if not value else f"{'−' if value < 0 else ''}10{str(power).translate(_RAISED)}"

    for scale in scales:
        scale.set_major_formatter(label)
