"""Faithfulness over circuit size: the curve, its areas, its picture. This file needs no model.

    f(C_k) = mean over prompts (m(C_k) − m(0)) / mean over prompts (m(M) − m(0))

CPR is the area under f, and CMD the area of |1 − f|. Both use trapezoids over the share k of kept features, on a linear
axis, and are not divided by its length, as in MIB's circuit track (arXiv:2504.13151). Half of such an area is above
k = 50 %, where rankings hardly differ. So the same areas are also given on a logarithmic axis, divided by its length.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from einops import reduce
from jaxtyping import Float
from torch import Tensor

from circuits.drawing import picture, plain_decades
from circuits.shown import drawn

Order = Literal["signed", "absolute"]
"""Which features come first: those with the highest score (MIB uses this for CPR), or with the largest |score|
(CMD)."""

LEVEL = 0.8
COLOURS = ("#1f6f8b", "#c8553d", "#588157", "#7b5ea7", "#b08900", "#8c8c8c", "#2b2b2b", "#d4a5c9")


@dataclass(frozen=True)
class Curve:
    """f over circuit size, for one ranking.

    Attributes:
        ranking: its name.
        order: which features of the ranking come first.
        shares: size of each circuit as a share of the universe; the mean over prompts if sizes were given as counts.
        counts: mean number of features of each circuit.
        numerator: m(C_k) − m(0) per prompt.
        denominator: m(M) − m(0) per prompt.
    """

    ranking: str
    order: Order
    shares: tuple[float, ...]
    counts: tuple[float, ...]
    numerator: Float[Tensor, "pair size"]
    denominator: Float[Tensor, " pair"]

    @cached_property
    def values(self) -> tuple[float, ...]:
        """f at each size: the ratio of the means, so that prompts with a small denominator do not dominate."""
        means = reduce(self.numerator.double(), "pair size -> size", "mean") / self.denominator.double().mean()
        return tuple(means.tolist())

    @property
    def each(self) -> Float[Tensor, "pair size"]:
        """f of every single prompt."""
        return self.numerator / self.denominator[:, None]

    @property
    def cpr(self) -> float:
        """Area under f, linear axis. It is 1 − the first share if all circuits are perfect, and can be larger."""
        return area(self.shares, self.values)

    @property
    def cmd(self) -> float:
        """Area of |1 − f|, linear axis. It is 0 if all circuits are perfect."""
        return area(self.shares, self._misses)

    @property
    def log_cpr(self) -> float:
        """Mean of f over a logarithmic axis."""
        return log_area(self.shares, self.values)

    @property
    def log_cmd(self) -> float:
        """Mean of |1 − f| over a logarithmic axis."""
        return log_area(self.shares, self._misses)

    @property
    def _misses(self) -> list[float]:
        return [abs(1 - value) for value in self.values]

    def needed(self, level: float = LEVEL) -> float | None:
        """Mean number of features of the smallest measured circuit with f at `level` or above; None without one."""
        return next((n for n, value in zip(self.counts, self.values, strict=True) if value >= level), None)


def area(x: Sequence[float], y: Sequence[float]) -> float:
    """The area of trapezoids under y over x. For a single point it is NaN."""
    if len(x) < 2:
        return math.nan
    return sum((b - a) * (c + d) / 2 for a, b, c, d in zip(x, x[1:], y, y[1:], strict=False))


def log_area(x: Sequence[float], y: Sequence[float]) -> float:
    """The same over log x, divided by the length of the axis: the mean of y."""
    logs = [math.log(value) for value in x]
    return area(logs, y) / (logs[-1] - logs[0]) if len(x) > 1 else math.nan


def plot_curves(
    panels: Mapping[str, Sequence[Curve]], path: str | Path, title: str = "", *, columns: int = 3, bound: float = LEVEL
) -> None:
    """Write a picture: one panel per entry, one line per curve, areas in the legend.

    The legend has CPR for curves in signed order and CMD for curves in absolute order: on the linear axis, and in
    brackets on the logarithmic axis.

    Args:
        path: the suffix is the format, .png or .svg.
        bound: the height of a dotted line.

    Raises:
        OutputError: the suffix is another one, matplotlib is not installed, or the file cannot be written.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with picture(Path(path), (5.4 * columns, 0.4 + 3.8 * rows), "constrained", dpi=80) as figure:
        places = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
        for axes in places[len(panels) :]:
            axes.axis("off")
        for axes, (name, curves) in zip(places, panels.items(), strict=False):
            _panel(axes, curves, bound)
            axes.set_title(drawn(name), fontsize=10)
        figure.suptitle(drawn(title), fontsize=12)


def _panel(axes: Any, curves: Sequence[Curve], bound: float) -> None:
    for value, style in ((0.0, "-"), (bound, ":"), (1.0, "-")):
        axes.axhline(value, color="#cccccc", linewidth=1, linestyle=style, zorder=0)
    for number, curve in enumerate(curves):
        signed = curve.order == "signed"
        areas = (curve.cpr, curve.log_cpr) if signed else (curve.cmd, curve.log_cmd)
        label = f"{drawn(curve.ranking)}: {'CPR' if signed else 'CMD'} {areas[0]:.2f} ({areas[1]:.2f})"
        axes.plot(curve.shares, curve.values, color=COLOURS[number % len(COLOURS)], marker=".", label=label)
    axes.set_xscale("log")
    plain_decades(axes.xaxis)
    axes.set_xlabel("share of the features kept")
    axes.set_ylabel("faithfulness f")
    axes.legend(loc="upper left", fontsize=7, title="area, linear axis (log axis)", title_fontsize=7)
