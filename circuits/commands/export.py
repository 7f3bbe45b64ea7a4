"""`circuits export`: write a saved graph in another format."""

import argparse

from circuits.commands._output import Result, show
from circuits.commands._places import check_places
from circuits.export import check_format, export
from circuits.graph import Graph


def run(args: argparse.Namespace) -> Result:
    """Write a saved graph in another format."""
    check_format(args.format)
    check_places(args.force, [(args.out, args.format)], reads=[args.file])
    graph = Graph.load(args.file)
    export(graph, args.out, args.format)
    show(args, f"{args.out}: {graph.n_nodes} nodes, {graph.n_edges} edges")
    return {"path": str(args.out), "format": args.format, "nodes": graph.n_nodes, "edges": graph.n_edges}
