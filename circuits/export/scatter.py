"""scatter: predicted against measured, as the graph's own verification found it; PNG or SVG by the file's suffix."""

from pathlib import Path

from circuits.drawing import plot_sample
from circuits.graph import Graph
from hooks.errors import OutputError


def write(graph: Graph, path: Path) -> None:
    """Draw the verified sample.

    Raises:
        OutputError: the graph was traced without verification, or the suffix is another.
    """
    if "verification_sample" not in graph.meta:
        raise OutputError(
            "the graph was not verified, so there is nothing to draw",
            expected="a graph traced with --sample above 0",
            repair="trace it again, or call circuits.verification.verifying(model, graph).plot(path)",
        )
    plot_sample(graph.meta["verification_sample"], path)
