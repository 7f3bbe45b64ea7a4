"""graphml: XML for Gephi, yEd, Cytoscape and networkx."""

from pathlib import Path

import networkx as nx

from circuits.graph import Graph
from hooks.files import replacing


def write(graph: Graph, path: Path) -> None:
    """Every node and edge attribute, typed."""
    with replacing(path) as temporary:
        nx.write_graphml(graph.to_networkx(), temporary, named_key_ids=True)
