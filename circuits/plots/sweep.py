"""A picture of a sweep: the strongest effects by layer and position, and the features with the strongest effects.

A cell shows the effect of largest magnitude among the features at that layer and position. It is grey if no effect is
above the noise floor. The bars beside the map are the strongest single effects. Colours show whether a feature supports
or opposes the target (`circuits.drawing.colours`); the direction of a bar shows the change of the metric.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from circuits import shown
from circuits.drawing import INK, MUTED, OPPOSES, QUIET, ROLE, ROLES, SUPPORTS, picture
from hooks.effects import Sweep
from hooks.errors import UserError

BARS = 15  # bars of the ranking
LONGEST = 12  # characters of a token that are shown
CELL, BAR_SIDE, LEAST, FOOT = 0.34, 3.6, 3.4, 0.25  # inches
LEGEND = f"{ROLES}; bars: change of logit(target) − logit(against)"


def sweep_plot(sweep: Sweep, path: str | Path) -> None:
    """Write a picture, PNG or SVG by its suffix, whole or not at all. The same sweep gives the same bytes.

    Raises:
        OutputError: the suffix is another one, matplotlib is not installed, or the file cannot be written.
        UserError: no group of the sweep is one feature at one position.
    """
    path = Path(path)
    single = sweep.table.dropna(subset=["layer", "pos"])
    if not len(single):
        raise UserError("there is no map of this sweep", expected="groups of one feature at one position")
    layers, cells = _cells(single, len(sweep.tokens))
    width, height = max(LEAST, CELL * cells.shape[1] + 1.6), max(LEAST, CELL * len(layers) + 1.6)
    with picture(path, (width + BAR_SIDE, height + FOOT), layout="constrained") as figure:
        left, right = figure.subplots(1, 2, width_ratios=(width, BAR_SIDE))
        _map(figure, left, cells, layers, sweep)
        _ranking(right, sweep)
        figure.supxlabel(LEGEND, x=0.01, ha="left", fontsize=7, color=MUTED)


def _cells(table: pd.DataFrame, length: int) -> tuple[list[int], Float[np.ndarray, "layer pos"]]:
    """The size of the largest effect in each cell, negative where it opposes the target; NaN where none has a role."""
    layers = sorted({int(layer) for layer in table["layer"]})
    cells = np.full((len(layers), length), np.nan)
    drawn = table[table["role"].notna()]
    for layer, pos, delta, role in zip(drawn["layer"], drawn["pos"], drawn["delta"], drawn["role"], strict=True):
        at = layers.index(int(layer)), int(pos)
        if not abs(cells[at]) >= abs(delta):
            cells[at] = abs(delta) if role == "supports" else -abs(delta)
    return layers, cells


def _map(figure: Any, axes: Any, cells: Float[np.ndarray, "layer pos"], layers: list[int], sweep: Sweep) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("effect", [OPPOSES, "#ffffff", SUPPORTS]).with_extremes(bad="#e6e6e6")
    most = float(np.nanmax(np.abs(cells))) if np.isfinite(cells).any() else 1.0
    drawn = axes.imshow(cells, origin="lower", aspect="auto", cmap=colours, vmin=-most, vmax=most)
    tokens = [shown.token(text, LONGEST) for text in sweep.tokens]
    axes.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", rotation_mode="anchor", fontsize=7, color=INK)
    axes.set_yticks(range(len(layers)), [f"L{layer}" for layer in layers], fontsize=7, color=INK)
    axes.set_title("strongest single effect", fontsize=8, color=INK, loc="left")
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8, pad=0.015)
    bar.ax.tick_params(labelsize=6.5, colors=INK)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    bar.set_label("size of the change (logits)", fontsize=7, color=INK)
    bar.outline.set_visible(False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)


def _ranking(axes: Any, sweep: Sweep) -> None:
    top = sweep.ranked().head(BARS)
    values = top["delta"].to_numpy()
    places = np.arange(len(top))[::-1]
    axes.barh(places, values, height=0.66, color=[ROLE.get(role, QUIET) for role in top["role"]])
    axes.axvspan(-sweep.noise_floor, sweep.noise_floor, color=QUIET, alpha=0.35, linewidth=0)
    axes.axvline(0, color=INK, linewidth=0.6)
    names = [shown.drawn(name, 29) for name in top["name"]]
    axes.set_yticks(places, names, fontsize=7, color=INK)
    axes.tick_params(axis="x", labelsize=6.5, colors=INK)
    axes.set_title("ranking", fontsize=8, color=INK, loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
