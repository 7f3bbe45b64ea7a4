"""A picture of a check: the FVU of every pair of sites, one map per encoder, and the FVU by k.

Dark cells are pairs that the set reconstructs well; the winner has a frame. Pairs whose write site is before the read
site do not exist and are left out.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from circuits.drawing import FIRST, INK, QUIET, SECOND, picture
from circuits.shown import drawn
from hooks.check import Calibration, Option
from hooks.checkpoints import Findings
from hooks.sites import SiteSpec

CELL, SIDE, LEAST = 0.46, 3.4, 3.2  # inches
WORST = 1.0  # FVU of the mean alone; values above have the same colour


def check_plot(found: Calibration, path: str | Path) -> None:
    """Write a picture, PNG or SVG by its suffix, whole or not at all. The same findings give the same bytes.

    Raises:
        OutputError: the suffix is another one, matplotlib is not installed, or the file cannot be written.
    """
    path = Path(path)
    scores = found.ranking.scores
    encoders = sorted({option.encoder for option in scores}, reverse=True)
    reads, writes = (_in_order(scores, end) for end in ("read", "write"))
    curve = bool(found.findings.selection.curve)
    widths = [CELL * len(writes) + 0.9] * len(encoders) + [SIDE] * curve
    height = max(LEAST, CELL * len(reads) + 1.7)
    with picture(path, (sum(widths), height), layout="constrained") as figure:
        panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        figure.suptitle(_title(found.findings), fontsize=8.5, color=INK, x=0.01, ha="left")
        for axes, encoder in zip(panels, encoders, strict=False):
            drawn = _map(axes, _cells(scores, reads, writes, encoder), reads, writes, encoder)
            _frame(axes, found.findings, reads, writes, encoder)
        bar = figure.colorbar(drawn, ax=list(panels[: len(encoders)]), shrink=0.8, pad=0.01)
        _dress_bar(bar)
        if curve:
            _curve(panels[-1], found.findings)


def _in_order(scores: Any, end: str) -> list[SiteSpec]:
    sites: set[SiteSpec] = {getattr(option, end) for option in scores}
    return sorted(sites, key=lambda site: site.at(0).depth)


def _cells(
    scores: Any, reads: list[SiteSpec], writes: list[SiteSpec], encoder: str
) -> Float[np.ndarray, "source target"]:
    """The FVU of each pair; NaN where there is none."""
    cells = np.full((len(reads), len(writes)), np.nan)
    decoder = min(option.decoder for option in scores)
    for row, read in enumerate(reads):
        for column, write in enumerate(writes):
            cells[row, column] = scores.get(Option(read, write, encoder, decoder), np.nan)
    return cells


def _title(findings: Findings) -> str:
    best = findings.best
    return (
        f"{findings.verdict}: {best.read} → {best.write}, {best.encoder} encoder, FVU {best.fvu:.3f}"
        f"   ({drawn(findings.model)}, {findings.tokens:,} tokens, median over layers)"
    )


def _map(
    axes: Any, cells: Float[np.ndarray, "source target"], reads: list[SiteSpec], writes: list[SiteSpec], encoder: str
) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("fvu", [FIRST, "#dbe8d3", "#f4efe9"]).with_extremes(bad="#ffffff")
    drawn = axes.imshow(np.minimum(cells, WORST), aspect="auto", cmap=colours, vmin=0, vmax=WORST)
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            text = f"{value:.2f}" if value < 10 else ">10"
            axes.text(column, row, text, ha="center", va="center", fontsize=6, color="white" if value < 0.25 else INK)
    axes.set_xticks(range(len(writes)), map(str, writes), rotation=55, ha="right", rotation_mode="anchor", fontsize=7)
    axes.set_yticks(range(len(reads)), map(str, reads), fontsize=7)
    axes.set_title(f"{encoder} encoder", fontsize=8, color=INK, loc="left")
    axes.set_xlabel("writes", fontsize=7, color=INK)
    axes.set_ylabel("reads", fontsize=7, color=INK)
    axes.tick_params(length=0, labelcolor=INK)
    for side in axes.spines.values():
        side.set_visible(False)
    return drawn


def _frame(axes: Any, findings: Findings, reads: list[SiteSpec], writes: list[SiteSpec], encoder: str) -> None:
    from matplotlib.patches import Rectangle

    best = findings.best
    if best.encoder == encoder:
        place = writes.index(findings.write) - 0.5, reads.index(findings.read) - 0.5
        colour = SECOND if findings.verdict == "clear" else QUIET
        axes.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor=colour, linewidth=1.8))


def _dress_bar(bar: Any) -> None:
    bar.ax.tick_params(labelsize=6.5, colors=INK)
    bar.set_label("FVU without sinks", fontsize=7, color=INK)
    bar.outline.set_visible(False)


def _curve(axes: Any, findings: Findings) -> None:
    """FVU by the mean number of active features, with k where it is known."""
    selection = findings.selection
    topk = [point for point in selection.curve if point.k is not None]
    relu = [point for point in selection.curve if point.k is None]
    axes.plot([p.l0 for p in topk], [p.fvu for p in topk], color=FIRST, marker="o", markersize=3, linewidth=1)
    axes.plot([p.l0 for p in relu], [p.fvu for p in relu], color=SECOND, marker="s", markersize=4, linestyle="none")
    if selection.k is not None:
        axes.axvline(selection.k, color=QUIET, linewidth=0.8, linestyle="--")
    for point in relu:
        axes.annotate(
            "ReLU", (point.l0, point.fvu), xytext=(0, 6), textcoords="offset points", fontsize=6.5, ha="center"
        )
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = _apart([point.l0 for point in selection.curve if point.l0 > 0])
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.set_ylim(bottom=0)
    named = selection.activation or "undetermined"
    known = f"k = {selection.k}, {selection.source}" if selection.k is not None else selection.source
    axes.set_title(
        f"FVU by k ({drawn(named if named == known else f'{named}, {known}')})", fontsize=8, color=INK, loc="left"
    )
    axes.set_xlabel("active features per token", fontsize=7, color=INK)
    axes.tick_params(labelsize=6.5, labelcolor=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _apart(values: list[float], factor: float = 1.5) -> list[float]:
    """Those values, ascending, that are far enough apart for a label each."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value >= factor * kept[-1]:
            kept.append(value)
    return kept
