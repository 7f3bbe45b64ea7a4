"""Export formats. One file per format; the file name is its public name.

A format is a module with

    write(graph: Graph, path: Path) -> None      whole or not at all (`hooks.files.output.replacing`)
"""

from pathlib import Path

from circuits.graph import Graph, check_graph
from hooks.errors import OutputError
from hooks.plugins import discover

EXPORTERS = discover(__name__, ("write",))


def check_format(name: str) -> None:
    """Refuse an unknown format.

    Raises:
        OutputError: the message lists the known ones.
    """
    if name not in EXPORTERS:
        raise OutputError(f"unknown export format {name!r}", expected=", ".join(EXPORTERS), where="--format")


def export(graph: Graph, path: str | Path, format: str) -> None:
    """Write a graph in a named format.

    Raises:
        OutputError: the format is unknown, or the file cannot be written.
        UserError: the graph is not sound, see `check_graph`.
    """
    check_format(format)
    check_graph(graph)
    EXPORTERS[format].write(graph, Path(path))


__all__ = ["EXPORTERS", "check_format", "export"]
