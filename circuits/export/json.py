"""json: networkx node-link data, `{"directed", "graph", "nodes", "edges"}`; read back with `nx.node_link_graph`."""

from pathlib import Path

import networkx as nx

from circuits.graph import Graph, plain
from hooks.files import write_json


def write(graph: Graph, path: Path) -> None:
    """Nodes, edges, and under `graph` everything the trace knows, its verification included; null: not known."""
    data = nx.node_link_data(graph.to_networkx(), edges="edges")
    write_json(path, data | {"graph": plain(graph.meta)})
