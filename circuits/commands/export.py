"""`circuits export`: write a saved graph in another format."""

import argparse
from pathlib import Path
from typing import Any

from circuits.commands._options import command
from circuits.commands._output import Result, show
from circuits.export import EXPORTERS, check_format, export
from circuits.graph import Graph
from hooks.files import check_writable


def add(commands: Any) -> None:
    """Its options."""
    exporter = command(commands, "export", run, "write a saved graph in another format", model=False)
    exporter.add_argument("file", type=Path, metavar="FILE", help="a graph written by trace")
    exporter.add_argument("--format", required=True, metavar="F", help=f"one of {', '.join(EXPORTERS)}")
    exporter.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to")


def run(args: argparse.Namespace) -> Result:
    """Write a saved graph in another format."""
    check_format(args.format)
    check_writable(args.out)
    graph = Graph.load(args.file)
    export(graph, args.out, args.format)
    show(args, f"{args.out}: {graph.n_nodes} nodes, {graph.n_edges} edges")
    return {"path": str(args.out), "format": args.format, "nodes": graph.n_nodes, "edges": graph.n_edges}
