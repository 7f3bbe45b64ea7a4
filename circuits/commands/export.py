"""`circuits export`: write a saved graph in another format."""

import argparse

from circuits.commands._output import Result, show
from circuits.export import check_format, export
from circuits.graph import Graph
from hooks.output import check_writable


def run(args: argparse.Namespace) -> Result:
    """Write a saved graph in another format."""
    check_format(args.format)
    check_writable(args.out)
    graph = Graph.load(args.file)
    export(graph, args.out, args.format)
    show(args, f"{args.out}: {graph.n_nodes} nodes, {graph.n_edges} edges")
    return {"path": str(args.out), "format": args.format, "nodes": graph.n_nodes, "edges": graph.n_edges}
