"""A picture of the circuit: layers upward, tokens to the right, edges with width and colour.

Only as much is drawn as can be read: tokens, the target, and in every layer the strongest features, rests and errors by
score. An edge is drawn if both its nodes are drawn and it is among the strongest into its target. Biases are constants
and are not drawn. A note under the picture says how much is left out.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from circuits.drawing import INK, MUTED, OPPOSES, ROLES, SUPPORTS, picture
from circuits.graph import BIAS, ERROR, FEATURE, NONE, REST, TARGET, TOKEN, Graph, carried
from circuits.shown import drawn
from circuits.shown import token as shown_token
from hooks.errors import OutputError

DRAWN_PER_LAYER = 7
EDGES_PER_NODE = 3  # the strongest edges into each node are drawn
ABREAST = 4  # nodes of one layer and token side by side; further ones are in a second line
SLOT, NARROW, LINE, GAP, HEIGHT = 0.98, 0.72, 0.52, 0.55, 0.4  # inches
BOTTOM, LEFT = 1.0, 0.85
LONGEST = 24  # characters of a token that are shown
FILL = {
    TOKEN: "#efe9dc",
    FEATURE: "#ffffff",
    REST: "#f3f3f3",
    ERROR: "#f3f3f3",
    BIAS: "#f3f3f3",
    TARGET: "#dcebef",
}


def draw(graph: Graph, path: Path, kind: str) -> None:
    """Write the picture of a graph.

    Raises:
        OutputError: there is nothing to draw, the picture would be too large, matplotlib is not installed, or the file
            cannot be written.
    """
    shown, edges = choose(graph)
    if not len(shown):
        raise OutputError("there is nothing to draw in this graph", expected="a token, a target or a feature")
    places, size = _layout(graph, shown)
    with picture(path, size, kind=kind) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, size[0]), ylim=(0, size[1]))
        axes.axis("off")
        _draw_frame(axes, graph, places)
        _draw_edges(axes, graph, edges, places)
        _draw_nodes(axes, graph, places)
        _draw_captions(axes, graph, len(shown), len(edges), size)


def choose(graph: Graph) -> tuple[Int[np.ndarray, " node"], Int[np.ndarray, " edge"]]:
    """The rows of the nodes and edges that are drawn."""
    kind = graph.index.kind
    show: Bool[np.ndarray, " node"] = (kind == TARGET) | (kind == TOKEN)
    for layer in set(graph.index.layer.tolist()) - {NONE}:
        here = np.flatnonzero((graph.index.layer == layer) & (kind != BIAS))
        show[here[np.argsort(-np.abs(graph.score[here]), kind="stable")][:DRAWN_PER_LAYER]] = True
    between = np.flatnonzero(show[graph.source] & show[graph.target])
    kept: list[int] = []
    for target in np.unique(graph.target[between]):
        into = between[graph.target[between] == target]
        kept += into[np.argsort(-np.abs(graph.effect[into]), kind="stable")][:EDGES_PER_NODE].tolist()
    edges = np.array(sorted(kept), dtype=np.int64)
    joined = np.zeros(len(kind), dtype=bool)
    joined[graph.source[edges]] = joined[graph.target[edges]] = True
    return np.flatnonzero(show & (joined | (kind == TOKEN) | (kind == TARGET))), edges


def _layout(
    graph: Graph, shown: Int[np.ndarray, " node"]
) -> tuple[dict[int, tuple[float, float]], tuple[float, float]]:
    """Centre of every shown node in inches, and the size of the picture. There is one column per token."""
    cells: dict[tuple[int, int], list[int]] = defaultdict(list)
    levels = _levels(graph, shown)
    for row in shown.tolist():
        cells[int(graph.index.pos[row]), levels[row]].append(row)
    left = LEFT + np.cumsum([0.0, *_widths(cells, graph.tokens)])
    heights = _heights(cells, max(levels.values()) + 1)
    places = {}
    for (pos, level), rows in cells.items():
        lines = [rows[start : start + ABREAST] for start in range(0, len(rows), ABREAST)]
        for number, line in enumerate(lines):
            y = heights[level] + LINE * (number - (len(lines) - 1) / 2)
            for slot, row in enumerate(line):
                places[row] = ((left[pos] + left[pos + 1]) / 2 + SLOT * (slot - (len(line) - 1) / 2), y)
    return places, (float(left[-1] + 0.15), heights[-1] + 0.8)


def _widths(cells: dict[tuple[int, int], list[int]], tokens: Sequence[str]) -> list[float]:
    """Widths of columns: of a column with features, by its longest line; of one with only a token, by the token's
    text."""
    widths = []
    for pos, token in enumerate(tokens):
        most = max((len(rows) for (p, level), rows in cells.items() if p == pos and level), default=0)
        widths.append(max(SLOT * min(most, ABREAST) + 0.14 if most else NARROW, _token_width(token) + 0.1))
    return widths


def _token_width(token: str) -> float:
    return max(NARROW - 0.1, 0.085 * len(_token(token)) + 0.12)


def _token(text: str) -> str:
    return shown_token(text, LONGEST) if text.strip() else "␣"


def _heights(cells: dict[tuple[int, int], list[int]], count: int) -> list[float]:
    """The height of each level's middle, from the tokens up, with space for second lines."""
    lines = [
        max((-(-len(r) // ABREAST) for (_, lv), r in cells.items() if lv == level), default=1) for level in range(count)
    ]
    heights, y = [], BOTTOM
    for level in range(count):
        if level:
            y += GAP + LINE * (lines[level - 1] + lines[level]) / 2
        heights.append(y)
    return heights


def _levels(graph: Graph, shown: Int[np.ndarray, " node"]) -> dict[int, int]:
    layers = sorted({int(graph.index.layer[row]) for row in shown} - {NONE})
    level = {layer: 1 + number for number, layer in enumerate(layers)}
    top = len(layers) + 1
    kind = graph.index.kind
    return {
        row: 0 if kind[row] == TOKEN else top if kind[row] == TARGET else level[int(graph.index.layer[row])]
        for row in shown.tolist()
    }


def _draw_frame(axes: Any, graph: Graph, places: dict[int, tuple[float, float]]) -> None:
    """Level names at the left, a faint line per level."""
    levels = _levels(graph, np.array(sorted(places)))
    for level in sorted(set(levels.values())):
        rows = [row for row in places if levels[row] == level]
        height = (min(places[row][1] for row in rows) + max(places[row][1] for row in rows)) / 2
        kind, layer = int(graph.index.kind[rows[0]]), int(graph.index.layer[rows[0]])
        name = "tokens" if kind == TOKEN else "target" if kind == TARGET else f"layer {layer}"
        axes.axhline(height, color="#ececec", linewidth=0.8, zorder=0)
        axes.text(0.1, height, name, fontsize=9, color="#777777", va="center", ha="left", zorder=4)


def _draw_edges(
    axes: Any, graph: Graph, edges: Int[np.ndarray, " edge"], places: dict[int, tuple[float, float]]
) -> None:
    from matplotlib.patches import FancyArrowPatch

    largest = np.abs(graph.effect[edges]).max() if len(edges) else 1.0
    for edge in edges[np.argsort(np.abs(graph.effect[edges]))]:
        share = abs(graph.effect[edge]) / max(largest, 1e-30)
        start, end = places[int(graph.source[edge])], places[int(graph.target[edge])]
        axes.add_patch(
            FancyArrowPatch(
                (start[0], start[1] + HEIGHT / 2),
                (end[0], end[1] - HEIGHT / 2),
                arrowstyle="-|>",
                mutation_scale=5 + 5 * share,
                linewidth=0.5 + 3.0 * share**0.6,
                color=SUPPORTS if graph.effect[edge] > 0 else OPPOSES,
                alpha=0.35 + 0.6 * share**0.5,
                shrinkA=0,
                shrinkB=0,
                zorder=1,
            )
        )


def _draw_nodes(axes: Any, graph: Graph, places: dict[int, tuple[float, float]]) -> None:
    from matplotlib.patches import FancyBboxPatch

    labels = graph.meta.get("labels", {})
    for row, (x, y) in places.items():
        kind = int(graph.index.kind[row])
        title, detail = _caption(graph, row, labels.get(graph.names[row], ""))
        width = {TOKEN: _token_width(title), TARGET: 0.1 * len(title) + 0.1}.get(kind, SLOT - 0.1)
        edge = INK if kind in (TOKEN, TARGET) else SUPPORTS if graph.score[row] > 0 else OPPOSES
        box = FancyBboxPatch(
            (x - width / 2, y - HEIGHT / 2),
            width,
            HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=FILL[kind],
            edgecolor=edge,
            linewidth=1.0,
            linestyle="--" if kind in (REST, ERROR, BIAS) else ":" if _absent(graph, row) else "-",
            zorder=2,
        )
        axes.add_patch(box)
        offset = 0.08 if detail else 0.0
        size = 8.5 if kind != FEATURE else min(8.5, 8.5 * 11 / len(title))  # so that a long label fits into its box
        axes.text(x, y + offset, title, fontsize=size, color=INK, ha="center", va="center", zorder=3)
        if detail:
            axes.text(x, y - 0.1, detail, fontsize=7, color="#666666", ha="center", va="center", zorder=3)


def _absent(graph: Graph, row: int) -> bool:
    """Whether a feature of a pair is active only in the other prompt."""
    return graph.baseline is not None and graph.index.kind[row] == FEATURE and graph.activation[row] == 0


def _caption(graph: Graph, row: int, label: str) -> tuple[str, str]:
    kind, layer, feature = (int(c[row]) for c in (graph.index.kind, graph.index.layer, graph.index.feature))
    score = _figure(graph.score[row], "+")
    if kind == TOKEN:
        return _token(graph.tokens[int(graph.index.pos[row])]), ""
    if kind == TARGET:
        return f"{drawn(graph.names[row].removeprefix('target '), 48)} = {_figure(graph.activation[row])}", ""
    if kind == FEATURE:
        return (drawn(label, 40) or f"L{layer}/{feature}"), (f"L{layer}/{feature}  {score}" if label else score)
    return {REST: "other features", ERROR: "error", BIAS: "bias"}[kind], score


def _figure(value: float, sign: str = "") -> str:
    """Two decimals, or powers of ten where they would not fit."""
    return f"{value:{sign}.2f}" if abs(value) < 1e5 else f"{value:{sign}.1e}"


def _draw_captions(axes: Any, graph: Graph, nodes: int, edges: int, size: tuple[float, float]) -> None:
    check = graph.meta.get("verification") or {}
    figures = [f"rule {drawn(graph.meta.get('rule', 'unknown'), 24)}"]
    if check.get("node_spearman") is not None:
        figures.append(
            f"scores against {check['n']} real ablations: Spearman {check['node_spearman']:.2f}"
            + (f"; edges against {check['n_edges']}: {check['edge_spearman']:.2f}" if check["edge_spearman"] else "")
        )
    if (share := carried(graph.meta)) is not None:
        figures.append(share)
    title = drawn(graph.meta.get("prompt", "").strip())
    legend = f"{ROLES}; width: effect in logits; numbers: score in logits, above 0 where a node supports"
    if "counterfactual" in graph.meta:
        title += f"    (and not: {drawn(graph.meta['counterfactual']['prompt'].strip())})"
        legend += "; dotted: active in the other prompt alone"
    axes.text(0.1, size[1] - 0.28, title, fontsize=12, color=INK, va="center")
    left_out = f"{nodes} of {graph.n_nodes} nodes and {edges} of {graph.n_edges} edges drawn"
    axes.text(0.1, 0.42, "; ".join(figures), fontsize=8, color=MUTED, va="center")
    axes.text(0.1, 0.2, f"{legend}. {left_out}.", fontsize=8, color=MUTED, va="center")
