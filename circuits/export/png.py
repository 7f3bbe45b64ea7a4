"""png: the picture, for reports and READMEs."""

from pathlib import Path

from circuits.export._picture import draw
from circuits.graph import Graph


def write(graph: Graph, path: Path) -> None:
    """Draw the strongest nodes at 160 dots per inch."""
    draw(graph, path, "png")
