"""How a set got better while it was trained: FVU on held-out text by tokens, and the last figures by layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from circuits.drawing import FIRST, INK, QUIET, SECOND, picture
from hooks.train import Training

WIDTH, HEIGHT = 11.0, 3.6  # inches


def training_plot(done: Training, path: str | Path) -> None:
    """Write a picture, PNG or SVG by its suffix, whole or not at all.

    Raises:
        OutputError: another suffix, matplotlib is not installed, or the place cannot be written to.
    """
    with picture(Path(path), (WIDTH, HEIGHT)) as figure:
        curves, layers, dead = (figure.add_axes((left, 0.15, 0.26, 0.7)) for left in (0.06, 0.39, 0.72))
        _curves(curves, done)
        numbers = sorted(done.figures)
        _bars(layers, numbers, [done.figures[n].fvu for n in numbers], FIRST, "FVU on held-out text, by layer")
        _bars(dead, numbers, [done.figures[n].dead for n in numbers], SECOND, "features never active there, by layer")


def _curves(axes: Any, done: Training) -> None:
    for curve in done.curves.values():
        axes.plot([p["tokens"] for p in curve], [p["fvu"] for p in curve], color=QUIET, linewidth=0.8)
    points = list(zip(*done.curves.values(), strict=False))
    middle = [sorted(p["fvu"] for p in at)[len(at) // 2] for at in points]
    axes.plot([at[0]["tokens"] for at in points], middle, color=FIRST, linewidth=1.8, label="middle layer")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, frameon=False, labelcolor=INK)
    _frame(axes, "tokens", "FVU on held-out text, while trained")


def _bars(axes: Any, layers: list[int], values: Sequence[float | int], colour: str, title: str) -> None:
    axes.bar(layers, values, color=colour, width=0.8)
    _frame(axes, "layer", title)


def _frame(axes: Any, xlabel: str, title: str) -> None:
    axes.set_xlabel(xlabel, fontsize=8, color=INK)
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.tick_params(labelsize=7, colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
