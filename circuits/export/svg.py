"""svg: the picture, to zoom into and to edit."""

from pathlib import Path

from circuits.export._picture import draw
from circuits.graph import Graph


def write(graph: Graph, path: Path) -> None:
    """Draw the strongest nodes, text kept as text."""
    draw(graph, path, "svg")
