"""Export formats. One file each; the file name is the format's public name.

A format is a module with

    write(graph: Graph, path: Path) -> None      whole or not at all (`hooks.files.output.replacing`)
"""

from pathlib import Path

from circuits.graph import Graph, check_graph
from hooks.errors import OutputError
from hooks.plugins import discover

EXPORTERS = discover(__name__, ("write",))


def check_format(name: str) -> None:
    """Refuse a format that is not there.

    Raises:
        OutputError: with the list of known ones.
    """
    if name not in EXPORTERS:
        raise OutputError(f"unknown export format {name!r}", expected=", ".join(EXPORTERS), where="--format")


def export(graph: Graph, path: str | Path, format: str) -> None:
    """Write a graph in a named format.

    Raises:
        OutputError: the format is unknown, or the place cannot be written to.
        UserError: the graph is not sound, see `check_graph`.
    """
    check_format(format)
    check_graph(graph)
    EXPORTERS[format].write(graph, Path(path))


__all__ = ["EXPORTERS", "check_format", "export"]
