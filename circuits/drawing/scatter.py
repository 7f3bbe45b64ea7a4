"""A picture of predictions against measurements: one panel per kind of prediction, with its figures above it.

Effects range over several decades and have both signs, so axes are symmetric-logarithmic: linear around zero, up to the
noise floor or to a small share of the largest effect, and logarithmic beyond. Both axes of a panel are the same, so
points on the diagonal are as predicted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from circuits.agreement import Agreement, Values, agree
from circuits.drawing.canvas import check_suffix, picture, plain_decades
from circuits.drawing.colours import AS_PREDICTED, INK, MUTED, OTHER_SIGN, QUIET
from circuits.shown import drawn

COLUMNS = 3  # panels side by side
SIDE, HEAD, MARGIN, FOOT = 3.3, 0.65, 0.75, 0.3  # inches: a panel; the space for its title, its labels, the legend
TINY = 1e-30  # smaller values are drawn as 0
DECADES = 4  # decades below the largest effect; smaller effects are in the linear part
LEGEND = "dashed: as predicted; green: of the predicted sign; purple: of the other sign; grey: within the noise floor"


@dataclass(frozen=True)
class Panel:
    """One kind of prediction.

    Attributes:
        name: for example "features: ablation".
        predicted, measured: the items, in the same order. Items with a NaN or an infinity are not drawn.
        noise_floor: the largest effect measured without an edit; drawn as a band.
        unit: unit of both axes.
    """

    name: str
    predicted: Values
    measured: Values
    noise_floor: float = 0.0
    unit: str = "logits"

    @property
    def agreement(self) -> Agreement:
        """The figures in the title."""
        return agree(self.predicted, self.measured, self.noise_floor)


def scatter_plot(panels: Sequence[Panel], path: Path) -> None:
    """Write a picture, PNG or SVG by its suffix, whole or not at all. The same panels give the same bytes.

    Raises:
        OutputError: the suffix is another one, matplotlib is not installed, or the file cannot be written.
    """
    check_suffix(path)
    columns = max(1, min(COLUMNS, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    width, height = columns * (SIDE + MARGIN) + 0.2, rows * (SIDE + MARGIN + HEAD) + FOOT
    with picture(path, (width, height)) as figure:
        for number, panel in enumerate(panels):
            row, column = divmod(number, columns)
            left, bottom = column * (SIDE + MARGIN) + MARGIN, height - (row + 1) * (SIDE + HEAD + MARGIN) + MARGIN
            axes = figure.add_axes((left / width, bottom / height, SIDE / width, SIDE / height))
            _draw(axes, panel)
        figure.text(MARGIN / width, 0.12 / height, LEGEND, fontsize=7.5, color=MUTED)


def _draw(axes: Any, panel: Panel) -> None:
    x, y = (np.asarray(column, dtype=np.float64) for column in (panel.predicted, panel.measured))
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    limit = _scale(axes, np.abs(np.concatenate([x, y])), panel.noise_floor)
    if panel.noise_floor > 0:
        axes.axhspan(-panel.noise_floor, panel.noise_floor, color="#ececec", linewidth=0, zorder=0)
    axes.axhline(0, color="#dddddd", linewidth=0.6, zorder=1)
    axes.axvline(0, color="#dddddd", linewidth=0.6, zorder=1)
    axes.plot([-limit, limit], [-limit, limit], color=INK, linewidth=0.8, dashes=(4, 3), zorder=2)
    quiet, right = np.abs(y) <= panel.noise_floor, np.sign(x) == np.sign(y)
    for shown, colour in ((quiet, QUIET), (~quiet & right, AS_PREDICTED), (~quiet & ~right, OTHER_SIGN)):
        axes.scatter(x[shown], y[shown], s=9, color=colour, alpha=0.55, linewidths=0, zorder=3)
    axes.set_xlabel(f"predicted ({drawn(panel.unit)})", fontsize=8, color=INK)
    axes.set_ylabel(f"measured ({drawn(panel.unit)})", fontsize=8, color=INK, labelpad=2)
    axes.tick_params(labelsize=7, colors=INK)
    axes.set_title(f"{drawn(panel.name)}\n", fontsize=10, color=INK, loc="left", pad=14)
    axes.text(0, 1.02, _figures(panel.agreement), transform=axes.transAxes, fontsize=7.5, color=MUTED, va="bottom")


def _scale(axes: Any, size: Float[np.ndarray, " item"], noise_floor: float) -> float:
    """Set both axes in the same way; returns their end."""
    largest = max(float(size.max(initial=0.0)), noise_floor)
    if largest < TINY:
        largest = 1.0
    smallest = max(noise_floor, float(np.quantile(size[size > 0], 0.1)) if (size > 0).any() else 0.0)
    threshold = 10.0 ** np.ceil(np.log10(max(smallest, largest * 10.0**-DECADES)))
    limit = 1.3 * largest
    if largest > 10 * threshold:  # otherwise there is no decade to show
        axes.set_xscale("symlog", linthresh=threshold, linscale=0.6)
        axes.set_yscale("symlog", linthresh=threshold, linscale=0.6)
        plain_decades(axes.xaxis, axes.yaxis)
        limit = 1.6 * largest
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit))
    return limit


def _figures(found: Agreement) -> str:
    def share(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.0f} %"

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}".replace("-", "−")

    left_out = f" ({found.n_left_out} left out)" if found.n_left_out else ""
    return (
        f"{found.n} items{left_out}   Pearson {number(found.pearson)}   Spearman {number(found.spearman)}\n"
        f"slope {number(found.slope)}   signs {share(found.sign)}   strongest tenth {share(found.top_tenth)}"
    )


def plot_sample(sample: Mapping[str, Any], path: Path) -> None:
    """Draw a stored sample.

    Raises:
        UserError: the file cannot be written, or its suffix is another.
    """
    nodes, edges, noise = sample["nodes"], sample["edges"], sample["noise_floor"]
    panels = [
        Panel("features ablated", nodes["score"], nodes["effect"], noise),
        Panel("features doubled", nodes["score"], nodes["doubled"], noise),
        Panel("edges, source ablated", edges["weight"], edges["effect"], sample["edge_noise_floor"], "target's units"),
    ]
    scatter_plot(panels, path)
