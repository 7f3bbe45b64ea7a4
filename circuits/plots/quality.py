"""A picture of a quality report: FVU, active features and the cost of swapping, by layer.

The cost is that of one swapped site. The cost of all sites together and the cost of mean ablation are of another order
of magnitude, so they are written above the panel.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from circuits.drawing import FIRST, INK, QUIET, SECOND, picture
from hooks.check import QualityReport

WIDTH, HEIGHT = 12.2, 3.6  # inches
LINES = (  # one is dashed, because the two lines coincide if the text has no sinks
    ("fvu", "all tokens", FIRST, "-"),
    ("fvu_calm", "without sinks", QUIET, "--"),
    ("fvu_normed", "norm space", SECOND, "-"),
)


def quality_plot(report: QualityReport, path: str | Path) -> None:
    """Write a picture, PNG or SVG by its suffix, whole or not at all. The same report gives the same bytes.

    Raises:
        OutputError: the suffix is another one, matplotlib is not installed, or the file cannot be written.
    """
    path = Path(path)
    with picture(path, (WIDTH, HEIGHT)) as figure:
        panels = [figure.add_axes((left, 0.13, 0.265, 0.71)) for left in (0.05, 0.38, 0.725)]
        for panel, draw in zip(panels, (_unexplained, _active, _cost), strict=True):
            draw(panel, report)


def _unexplained(axes: Any, report: QualityReport) -> None:
    layers = [layer.layer for layer in report.layers]
    for column, label, colour, style in LINES:
        _line(axes, layers, [getattr(layer, column) for layer in report.layers], colour, label, style)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, frameon=False, labelcolor=INK)
    _frame(axes, "fraction of variance unexplained", "reconstruction", f"{report.tokens:,} tokens")


def _active(axes: Any, report: QualityReport) -> None:
    layers = [layer.layer for layer in report.layers]
    _line(axes, layers, [layer.l0 for layer in report.layers], FIRST)
    axes.set_ylim(0, 1.15 * max(layer.l0 for layer in report.layers) or 1.0)
    dead, always, size = (
        sum(getattr(layer, name) for layer in report.layers) for name in ("dead", "always_on", "features")
    )
    note = f"of {size:,} features {dead:,} never active here, {always:,} always"
    _frame(axes, "active features per token (L0)", "features", note)


def _cost(axes: Any, report: QualityReport) -> None:
    layers, replaced = list(report.one), list(report.one.values())
    axes.axhline(0, color="#dddddd", linewidth=0.6, zorder=1)
    _line(axes, layers, [item.delta_ce for item in replaced], FIRST)
    every = report.together["all"]
    least = min(item.ablated.ce for item in replaced) - report.clean_ce
    note = f"all sites together {every.delta_ce:+.3g}; one site at its mean {least:+.3g} or more".replace("-", "−")
    _frame(axes, "change in cross-entropy (nats per token)", "one site swapped, error dropped", note)
    axes.margins(y=0.15)


def _line(
    axes: Any, x: Sequence[int], y: Sequence[float | None], colour: str, label: str = "", style: str = "-"
) -> None:
    known = [(place, value) for place, value in zip(x, y, strict=True) if value is not None]
    places, values = zip(*known, strict=True) if known else ((), ())
    size = 3.5 if len(x) <= 24 else 2
    axes.plot(places, values, style, color=colour, linewidth=1.2, marker="o", markersize=size, label=label, zorder=3)


def _frame(axes: Any, ylabel: str, title: str, note: str) -> None:
    axes.set_xlabel("layer", fontsize=8, color=INK)
    axes.set_ylabel(ylabel, fontsize=8, color=INK, labelpad=2)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=7, colors=INK)
    axes.set_title(title, fontsize=10, color=INK, loc="left", pad=18)
    axes.text(0, 1.03, note, transform=axes.transAxes, fontsize=7.5, color="#555555", va="bottom")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
