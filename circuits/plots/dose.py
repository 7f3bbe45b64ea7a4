"""A picture of a dose response: the effect on the target at the left, the cost in fluency at the right.

Where the first new token changes, it is written above its dose. So the picture shows which strength changes the answer,
and how much fluency that strength costs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from circuits import shown
from circuits.drawing import FIRST, INK, QUIET, SECOND, picture
from hooks.generation import DoseResponse

WIDTH, HEIGHT = 8.6, 3.7  # inches


def dose_plot(response: DoseResponse, path: str | Path) -> None:
    """Write a picture, PNG or SVG by its suffix, whole or not at all. The same sweep gives the same bytes.

    Raises:
        OutputError: the suffix is another one, matplotlib is not installed, or the file cannot be written.
    """
    path = Path(path)
    with picture(path, (WIDTH, HEIGHT)) as figure:
        left, right = figure.add_axes((0.075, 0.14, 0.395, 0.68)), figure.add_axes((0.59, 0.14, 0.395, 0.68))
        amounts = [dose.strength.amount for dose in response.doses]
        _effect(left, response, amounts)
        _fluency(right, response, amounts)


def _effect(axes: Any, response: DoseResponse, amounts: Sequence[float]) -> None:
    metric = [dose.effect.metric_after for dose in response.doses]
    axes.axhline(0, color="#dddddd", linewidth=0.6, zorder=1)
    axes.axhline(response.metric, color=QUIET, linewidth=0.9, dashes=(4, 3), zorder=2)
    _line(axes, amounts, metric, FIRST)
    _frame(
        axes,
        response.unit,
        "logit difference",
        f"{shown.token(response.target)} against {shown.token(response.against)}",
    )
    before = None
    for i, (amount, value, dose) in enumerate(zip(amounts, metric, response.doses, strict=True)):
        token = dose.scored.tokens[0]
        if token != before:
            falls = value >= (
                metric[i + 1] if i + 1 < len(metric) else metric[i - 1]
            )  # the label must not cover the line
            axes.annotate(
                shown.token(token),
                (amount, value),
                (4 if falls else -4, 5),
                textcoords="offset points",
                fontsize=7,
                color=INK,
                ha="left" if falls else "right",
            )
        before = token
    axes.margins(x=0.12, y=0.18)


def _fluency(axes: Any, response: DoseResponse, amounts: Sequence[float]) -> None:
    axes.axhline(response.baseline.mean_plain, color=QUIET, linewidth=0.9, dashes=(4, 3), zorder=2)
    _line(axes, amounts, [dose.scored.mean_plain for dose in response.doses], SECOND)
    _frame(axes, response.unit, "mean log-probability (nats)", "the steered text under the plain model")
    axes.margins(x=0.12, y=0.18)


def _line(axes: Any, x: Sequence[float], y: Sequence[float], colour: str) -> None:
    order = sorted(range(len(x)), key=lambda i: x[i])
    axes.plot(
        [x[i] for i in order], [y[i] for i in order], color=colour, linewidth=1.2, marker="o", markersize=3.5, zorder=3
    )


def _frame(axes: Any, unit: str, ylabel: str, title: str) -> None:
    axes.set_xlabel(f"strength ({unit})", fontsize=8, color=INK)
    axes.set_ylabel(ylabel, fontsize=8, color=INK, labelpad=2)
    axes.tick_params(labelsize=7, colors=INK)
    axes.set_title(title, fontsize=10, color=INK, loc="left", pad=18)
    axes.text(0, 1.03, "dashed: not steered", transform=axes.transAxes, fontsize=7.5, color="#555555", va="bottom")
